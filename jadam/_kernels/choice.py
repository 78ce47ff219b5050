"""Which kernel has which leaf: what each declares, in one table that `jadam.kernels()` prints."""

import contextlib
import contextvars
import functools
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jadam import _validate
from jadam._leaf import Options
from jadam._masters import Stochastic
from jadam._members import MEMBERS, Rule
from jadam._rounding import is_slice
from jadam._storage import storage_of

Choice = Literal["auto", "xla", "native"]
"""The argument `kernel`: the faster form, XLA's, or the kernel wherever it has the step."""


@dataclass(frozen=True)
class Kernel:
    """What a kernel has. It takes a leaf's step if it has all of its features, and no other.

    Attributes:
        platform: where it runs.
        features: what `features_of` may say of a leaf.
        slow_updates: features with which XLA's form of an update alone is faster: "auto" leaves
            these to XLA.
    """

    platform: str
    features: frozenset[str]
    slow_updates: frozenset[str]

    def has(self, features: frozenset[str]) -> bool:
        """Whether the kernel has a leaf's step."""
        return features <= self.features

    def is_faster(self, features: frozenset[str]) -> bool:
        """Whether it is also the faster form."""
        is_update = not any(x == "to_params" or x.startswith("weights") for x in features)
        return not (is_update and features & self.slow_updates)


CPU = Kernel(
    platform="cpu",
    features=frozenset(
        [
            *(f"member {member.name}" for member in MEMBERS if member.coefficients is not None),
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
            "weights stochastic bfloat16",
        ]
    ),
    # An update alone leaves as much memory to read again in either form, and XLA can fuse its own
    # loops with what is around them.
    slow_updates=frozenset({"moments float32 float32"}),
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


def taken(choice: Choice, rule: Rule, leaves: Sequence[tuple[Any, ...]]) -> list[bool]:
    """Which leaves `(g, p, options, stored, extra)` of a call go to the kernel."""
    meshes = {jax.typeof(g).sharding.mesh for g, *_ in leaves}
    # A program whose primitives need to know the devices may have one mesh only, says JAX.
    if not _is_wanted(choice) or sum(not mesh.empty for mesh in meshes) > 1:
        return [False] * len(leaves)
    features = [features_of(rule, *leaf) for leaf in leaves]
    return [CPU.has(x) and (choice == "native" or CPU.is_faster(x)) for x in features]


def _is_wanted(choice: Choice) -> bool:
    """Whether the argument `kernel` asks for the native kernel, and it is there."""
    # Off the CPU each leaf is XLA's own, which leaves XLA free in their order.
    automatic = jax.default_backend() == "cpu" and not _is_left_to_xla.get()
    return (choice == "native" or (choice == "auto" and automatic)) and why_not() is None


def checked(choice: Choice) -> Choice:
    """The argument `kernel`, which is checked.

    Raises:
        RuntimeError: the native kernel is asked for, and there is none.
        ValueError: the argument is not one of the three.
    """
    _validate.choice("kernel", choice, ("auto", "xla", "native"))
    if choice == "native" and (reason := why_not()) is not None:
        raise RuntimeError(f'kernel: expected one for "native", got none: {reason}')
    return choice


@functools.cache
def why_not() -> str | None:
    """Why there is no native kernel; None if there is one."""
    try:
        cpu = importlib.import_module("jadam._kernels.cpu")
        importlib.import_module("jadam._kernels.primitive")
    except (ImportError, AttributeError) as error:
        return f"not usable: jax {jax.__version__} lacks what the kernel needs: {error}"
    library = cpu.library()
    return library.reason if library.instruction_set is None else None


def kernels() -> dict[str, str]:
    """What computes a step on each platform, and why.

    The kernel is there for several instruction sets: avx512, avx2 and, for any processor, baseline.
    It takes the best that the processor has, or what the environment variable
    JADAM_INSTRUCTION_SET names when the library is loaded.

    On a CPU the native kernel takes each leaf of which it has all features: the member, the dtypes,
    the storage of the moments. Each device steps its own shard. All other leaves are XLA's. With
    `kernel="auto"` so is the `update` of float32 moments, which is faster there.

    >>> import jadam
    >>> sorted(jadam.kernels())
    ['cpu', 'gpu', 'tpu']
    """
    reason = why_not()
    if reason is None:
        found = importlib.import_module("jadam._kernels.cpu").library()
        features = "; ".join(sorted(CPU.features))
        cpu = f"native ({found.instruction_set}): {found.reason}; it has {features}"
    else:
        cpu = f"xla: {reason}"
    return {
        "cpu": cpu,
        "gpu": "xla: it has no kernel yet; XLA fuses a leaf's step, but makes two passes of codes",
        "tpu": "xla: it has no kernel yet; XLA fuses a leaf's step, but makes copies of codes",
    }


_is_left_to_xla = contextvars.ContextVar("is_left_to_xla", default=False)


@contextlib.contextmanager
def left_to_xla() -> Iterator[None]:
    """Traces updates without the kernel, unless it is insisted on.

    Where XLA makes gradients and parameters from something smaller, it does so inside its loops.
    For the kernel they would have to lie in memory, in float32.
    """
    token = _is_left_to_xla.set(True)
    try:
        yield
    finally:
        _is_left_to_xla.reset(token)
