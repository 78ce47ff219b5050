"""Which kernel has which leaf: what each declares, in one table that `jadam.kernels()` prints."""

import contextlib
import contextvars
import dataclasses
import functools
import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jadam import _traced, _validate
from jadam._leaf import Options
from jadam._masters import Stochastic
from jadam._members import MEMBERS, Member, Rule
from jadam._rounding import is_slice
from jadam._storage import BLOCK, storage_of
from jadam._types import Shape

Choice = Literal["auto", "xla", "native"]
"""The argument `kernel`: the faster form, XLA's, or the kernel wherever it has the step."""


@dataclass(frozen=True)
class Kernel:
    """What a kernel has. It takes a leaf's step if it has all of its features, and no other.

    Attributes:
        platform: where it runs.
        features: what `features_of` may say of a leaf.
        suits: whether it has leaves of a shape.
        slow_updates: features with which XLA's form of an update alone is faster: "auto" leaves
            these to XLA.
        gains_by: features without all of which XLA's form is as fast; empty if it never is.
    """

    platform: str
    features: frozenset[str]
    suits: Callable[[Shape], bool] = lambda shape: True
    slow_updates: frozenset[str] = frozenset()
    gains_by: frozenset[str] = frozenset()

    def has(self, features: frozenset[str], shape: Shape) -> bool:
        """Whether the kernel has a leaf's step."""
        return features <= self.features and self.suits(shape)

    def is_faster(self, features: frozenset[str]) -> bool:
        """Whether it is also the faster form."""
        is_update = not any(x == "to_params" or x.startswith("weights") for x in features)
        gains = not self.gains_by or bool(features & self.gains_by)
        return gains and not (is_update and features & self.slow_updates)


_DTYPES_AND_OPTIONS = frozenset(
    [
        "gradients float32, parameters float32",
        "gradients bfloat16, parameters float32",
        "gradients bfloat16, parameters bfloat16",
        "moments float32 float32",
        "moments bfloat16 float32",
        "moments bfloat16 bfloat16",
        "moments 8-bit codes",
        "decays",
        "to_params",
        "weights compensated int8",
        "weights compensated int16",
    ]
)


def _members(those: Callable[[Member], bool]) -> frozenset[str]:
    return frozenset(f"member {member.name}" for member in MEMBERS if those(member))


CPU = Kernel(
    platform="cpu",
    # AMSGrad and AdEMAMix have a third moment, AdaMax an equation of u that no other member has.
    features=_members(lambda member: member.coefficients is not None)
    | _DTYPES_AND_OPTIONS
    | {"moments 4-bit codes", "weights stochastic bfloat16"},
    # An update alone leaves as much memory to read again in either form, and XLA can fuse its own
    # loops with what is around them.
    slow_updates=frozenset({"moments float32 float32"}),
)


ROWS = Kernel(
    platform="cpu",
    # Of the rows that a batch touches. Two features it has not: missed steps that are made one by
    # one, and eps_root.
    features=CPU.features
    & (
        _members(lambda member: True)
        | {"gradients float32, parameters float32", "moments float32 float32"}
        | {"decays", "to_params"}
    ),
)

GPU = dataclasses.replace(CPU, platform="gpu")


def _lies_in_blocks(shape: Shape) -> bool:
    """Whether a leaf lies in a TPU's memory as rows of blocks, so that a kernel moves nothing.

    A matrix of whole blocks does, and a stack of them with whole tiles of 32 rows. Others lie in an
    order that XLA chooses, and would be copied into this one.
    """
    if len(shape) < 2 or math.prod(shape) == 0:
        return False
    *stack, rows, n = shape
    return n % BLOCK == 0 and (not stack or rows % 32 == 0)


TPU = Kernel(
    platform="tpu",
    # It makes the step of one block from the equations and the storage themselves.
    features=_members(lambda member: True) | _DTYPES_AND_OPTIONS | {"moments 4-bit codes"},
    suits=_lies_in_blocks,
    # XLA makes one pass of float32, and two of what it rounds to 16 bits.
    gains_by=frozenset(
        [
            "moments bfloat16 float32",
            "moments bfloat16 bfloat16",
            "moments 8-bit codes",
            "moments 4-bit codes",
            "weights compensated int8",
            "weights compensated int16",
        ]
    ),
)


def features_of(
    rule: Rule, g: Any, p: Any, options: Options, stored: Any, extra: Any
) -> frozenset[str]:
    """All that a kernel must have to step a leaf. An option that is set is one feature each."""
    del extra
    gradient = jnp.result_type(g)
    # Weights that stand for more than their 16 bits are stepped in float32.
    param = jnp.result_type(p) if options.needs_params else gradient
    param = param if options.weights is None else jnp.dtype(jnp.float32)
    place = jax.typeof(g).sharding
    features = {
        f"member {rule.member.name}",
        f"gradients {gradient}, parameters {param}",
        f"moments {storage_of(rule.member.moments, stored).name}",
        *(name if x is True else f"{name} {x}" for name, x in options._asdict().items() if x),
    }
    if is_slice() and (isinstance(options.weights, Stochastic) or jnp.ndim(g) == 1):
        features.add("random bits or dithers of a slice of a stack")
    if place.spec.unreduced:
        features.add("gradients that are not summed over devices yet")
    if not place.mesh.empty and getattr(place.mesh, "abstract_device", None) is None:
        features.add("a mesh without devices")
    return frozenset(features)


def takers(choice: Choice, rule: Rule, leaves: Sequence[tuple[Any, ...]]) -> list[frozenset[str]]:
    """For each leaf `(g, p, options, stored, extra)` of a call the platforms whose kernels take it.

    None where it is XLA's everywhere. A program may be compiled for another platform than that of
    this process; what a kernel has here is then lowered to the kernel there, if that has it too.
    """
    meshes = {jax.typeof(g).sharding.mesh for g, *_ in leaves}
    wanted = _wanted(choice)
    # A program whose primitives need to know the devices may have one mesh only, says JAX.
    if not wanted or sum(not mesh.empty for mesh in meshes) > 1:
        return [frozenset()] * len(leaves)

    def platforms(leaf: tuple[Any, ...]) -> frozenset[str]:
        features, shape = features_of(rule, *leaf), np.shape(leaf[0])
        found = frozenset(
            kernel.platform
            for kernel in (CPU, GPU, TPU)
            if kernel.has(features, shape) and (choice == "native" or kernel.is_faster(features))
        )
        return found if found & wanted else frozenset()

    return [platforms(leaf) for leaf in leaves]


def takes_rows(
    choice: Choice,
    rule: Rule,
    g: Any,
    p: Any,
    options: Options,
    stored: Any,
    also: frozenset[str] = frozenset(),
) -> bool:
    """Whether the kernel for rows has those of a table p with gradients g; `also` are features."""
    features = features_of(rule, g, p, options, stored, ()) | also
    is_there = "cpu" in _wanted(choice) and _traced.why_not() is None
    return is_there and ROWS.has(features, np.shape(p))


def _wanted(choice: Choice) -> frozenset[str]:
    """The platforms for which the argument `kernel` asks for a kernel that is there."""
    # Only here: to make a transformation must not ask JAX for its devices, since
    # `jax.distributed.initialize` comes before anything that does.
    here = jax.default_backend()
    if choice == "native" and here == "gpu":
        _insist(why_not_on_gpu())
    automatic = choice == "auto" and not _is_left_to_xla.get()
    asked = {here} if automatic else {"cpu", here} if choice == "native" else frozenset[str]()
    return frozenset(x for x in asked if x in _WHY_NOT and _WHY_NOT[x]() is None)


def checked(choice: Any) -> Choice:
    """The argument `kernel`, which is checked.

    Raises:
        RuntimeError: the native kernel is asked for, and there is none.
        ValueError: the argument is not one of the three.
    """
    _validate.choice("kernel", choice, ("auto", "xla", "native"))
    if choice == "native":
        _insist(why_not())
    return choice


def _insist(reason: str | None) -> None:
    if reason is not None:
        raise RuntimeError(f'kernel: expected one for "native", got none: {reason}')


@functools.cache
def why_not() -> str | None:
    """Why there is no native kernel; None if there is one."""
    if (missing := _missing("jadam._kernels.primitive")) is not None:
        return missing
    library = importlib.import_module("jadam._kernels.native").library()
    return library.reason if library.instruction_set is None else None


def why_not_on_gpu() -> str | None:
    """Why there is no kernel for NVIDIA's GPUs here; None if there is one."""
    if (reason := why_not()) is not None:
        return reason
    return importlib.import_module("jadam._kernels.native").library().why_not_on_gpu()


@functools.cache
def why_not_on_tpu() -> str | None:
    """Why there is no kernel for TPUs; None if there is one."""
    missing = _missing("jadam._kernels.primitive") or _missing("jadam._kernels.tpu")
    return missing or _traced.why_not()


_WHY_NOT = {"cpu": why_not, "gpu": why_not_on_gpu, "tpu": why_not_on_tpu}


def _missing(module: str) -> str | None:
    """What a kernel's module needs of JAX and does not find."""
    try:
        importlib.import_module(module)
    except (ImportError, AttributeError) as error:
        return f"not usable: jax {jax.__version__} lacks what the kernel needs: {error}"
    return None


def kernels() -> dict[str, str]:
    """What computes a step on each platform, and why.

    The kernel is there for several instruction sets: avx512, avx2 and, for any processor, baseline.
    It takes the best that the processor has, or what the environment variable
    JADAM_INSTRUCTION_SET names when the library is loaded.

    On a CPU the native kernel takes each leaf of which it has all features: the member, the dtypes,
    the storage of the moments. Each device steps its own shard. All other leaves are XLA's. With
    `kernel="auto"` so is the `update` of float32 moments, which is faster there.

    Rows of `jadam.rows` have a kernel of their own on a CPU, for float32 tables and moments whose
    missed steps are summed, on one device and under `jax.shard_map`.

    On an NVIDIA GPU of compute capability 8.0 or later, with a driver for CUDA 12.1 or later, the
    same features are a kernel in CUDA, which the driver compiles when it is first used. Up to 256
    leaves are one launch. XLA makes a kernel for each leaf, and two passes of codes.

    On a TPU a kernel in Pallas takes leaves with moments of 4 to 16 bits and compensated weights,
    on one device and under `jax.shard_map(check_vma=False)`, as `jadam.sharding.step_in_parts`
    makes it. It was compiled for TPUs and compared with XLA's form on a CPU, but has not run on a
    TPU yet. XLA makes one pass of all other leaves but those of other shapes with such moments or
    residuals, and those divided over devices without it: of these, codes without 16-bit weights are
    stepped in the order of a TPU's tiles where each device has whole ones.

    >>> import jadam
    >>> sorted(jadam.kernels())
    ['cpu', 'gpu', 'tpu']
    """
    reason = why_not()
    if reason is None:
        found = importlib.import_module("jadam._kernels.native").library()
        lacking = _traced.why_not()
        rows = _listed(ROWS.features) if lacking is None else f"xla: {lacking}"
        cpu = (
            f"native ({found.instruction_set}): {found.reason}; it has {_listed(CPU.features)}; "
            f"in the rows of jadam.rows: {rows}"
        )
    else:
        cpu = f"xla: {reason}"
    if (reason := why_not_on_tpu()) is None:
        tpu = (
            f"pallas: for {_listed(TPU.gains_by)}; it has {_listed(TPU.features)}, in matrices of "
            "whole blocks of 128, on one device and under jax.shard_map(check_vma=False); "
            "the others are xla"
        )
    else:
        tpu = f"xla: {reason}"
    if (reason := why_not_on_gpu()) is None:
        gpu = f"cuda: loaded; it has {_listed(GPU.features)}"
    else:
        gpu = f"xla: {reason}"
    return {"cpu": cpu, "gpu": gpu, "tpu": tpu}


def _listed(features: frozenset[str]) -> str:
    return "; ".join(sorted(features))


@contextlib.contextmanager
def _inside(flag: contextvars.ContextVar[bool]) -> Iterator[None]:
    token = flag.set(True)
    try:
        yield
    finally:
        flag.reset(token)


_is_left_to_xla = contextvars.ContextVar("is_left_to_xla", default=False)


@contextlib.contextmanager
def left_to_xla() -> Iterator[None]:
    """Traces updates without the kernel, unless it is insisted on.

    Where XLA makes gradients and parameters from something smaller, it does so inside its loops.
    For the kernel they would have to lie in memory, in float32.
    """
    with _inside(_is_left_to_xla):
        yield


_is_apart = contextvars.ContextVar("is_apart", default=False)


def is_apart() -> bool:
    """Whether each leaf is to be a call of its own."""
    return _is_apart.get()


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Traces a call of the kernel for each leaf, so that the program can be taken apart."""
    with _inside(_is_apart):
        yield
