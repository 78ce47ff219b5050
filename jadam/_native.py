"""The kernel in C++ for CPUs (native/): when it is there, and when a leaf goes through it.

XLA:CPU compiles m, v and the parameter as three loops that each read again; the kernel makes one
pass. It is one primitive of many leaves. On another platform, under differentiation, vmap or an
export the leaf's XLA form takes its place.
"""

import contextlib
import contextvars
import ctypes
import functools
import importlib.util
import os
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.interpreters import batching, mlir
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float
from numpy.polynomial import chebyshev

from jadam import _codec, _math
from jadam._leaf import Rule, increment, leaf_step
from jadam._types import Count, Leaf, Scalar

_TARGET = "jadam_step"
_FORCED = "JADAM_INSTRUCTION_SET"
# More leaves in one call compile slowly, fewer cost a call each.
GROUP = 32


class Library(NamedTuple):
    """The loaded kernel, or why there is none."""

    instruction_set: str | None
    reason: str


@functools.cache
def library() -> Library:
    """Loads the kernel and registers it with XLA, once."""
    spec = importlib.util.find_spec("jadam._kernel")
    if spec is None or spec.origin is None:
        return Library(None, "not built: jadam was installed without a C++ compiler")
    if not _is_whole(Path(spec.origin)):
        return Library(None, f"not loaded: {spec.origin} is cut short; install jadam again")
    try:
        loaded = ctypes.CDLL(spec.origin)
        loaded.jadam_instruction_sets.restype = ctypes.c_char_p
        built = loaded.jadam_ffi_api_version()
        handler, use = loaded.jadam_step, loaded.jadam_use_instruction_set
    except (OSError, AttributeError) as error:
        return Library(None, f"not loaded: {error}")
    there = _ffi_api_version()
    # XLA calls a kernel that was built for its own major version and no later minor one.
    if built // 1000 != there // 1000 or built > there:
        versions = [f"{v // 1000}.{v % 1000}" for v in (built, there)]
        return Library(None, "not usable: built for XLA's FFI {}, jaxlib has {}".format(*versions))
    sets = loaded.jadam_instruction_sets().decode().split()
    forced = os.environ.get(_FORCED)
    if forced and forced not in sets:
        expected = ", ".join(sets)
        return Library(None, f"not used: {_FORCED} is {forced!r}, this processor has {expected}")
    chosen = forced or sets[0]
    use(chosen.encode())
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(handler), platform="cpu")
    return Library(chosen, f"loaded, forced by {_FORCED}" if forced else "loaded")


def _is_whole(path: Path) -> bool:
    """Whether an ELF file is as long as its header says.

    The table of sections is its end. To load one that is cut short is to be killed by SIGBUS. Files
    of another format count as whole: their loaders check them.
    """
    header = struct.Struct("<4sBB34xQ10xHH2x")  # of 64 bits, lower bytes first
    with path.open("rb") as file:
        start = file.read(header.size)
    if not start.startswith(b"\x7fELF"):
        return True
    if len(start) < header.size:
        return False
    _, bits, order, sections, size, number = header.unpack(start)
    return (bits, order) != (2, 1) or sections + size * number <= path.stat().st_size


def _ffi_api_version() -> int:
    """1000·major + minor of XLA's FFI in the installed jaxlib."""
    header = Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h").read_text()
    major, minor = (
        int(re.search(rf"define XLA_FFI_API_{part} (\d+)", header)[1])  # pyright: ignore
        for part in ("MAJOR", "MINOR")
    )
    return 1000 * major + minor


def kernels() -> dict[str, str]:
    """What computes a step on each platform, and why.

    On a CPU the native kernel takes the leaves of `adam`, `adamw`, `nadam`, `nadamw` and
    `scale_by_adam` whose gradients and parameters are float32 or bfloat16 and whose moments are
    float32 (in `step` alone), bfloat16 or codes; each device its own shard. The rest is XLA's.

    The kernel is there for several instruction sets: avx512, avx2 and, for any processor, baseline.
    It takes the best that the processor has, or what the environment variable
    JADAM_INSTRUCTION_SET names when the library is loaded.

    >>> import jadam
    >>> sorted(jadam.kernels())
    ['cpu', 'gpu', 'tpu']
    """
    found = library()
    name = "xla" if found.instruction_set is None else f"native ({found.instruction_set})"
    return {
        "cpu": f"{name}: {found.reason}",
        "gpu": "xla: it fuses a leaf's step into one kernel by itself",
        "tpu": "xla: it fuses a leaf's step into one kernel by itself",
    }


_is_left_to_xla = contextvars.ContextVar("is_left_to_xla", default=False)


@contextlib.contextmanager
def left_to_xla() -> Iterator[None]:
    """Traces updates without the kernel, unless it is insisted on.

    Where XLA makes gradients and parameters from something smaller, it does so inside its loops;
    for the kernel they would have to lie in memory, in float32.
    """
    token = _is_left_to_xla.set(True)
    try:
        yield
    finally:
        _is_left_to_xla.reset(token)


def is_wanted(kernel: str) -> bool:
    """Whether the argument `kernel` asks for the library, and it is there."""
    # Off the CPU XLA takes leaf by leaf, which leaves it free in their order.
    automatic = jax.default_backend() == "cpu" and not _is_left_to_xla.get()
    wanted = kernel == "native" or (kernel == "auto" and automatic)
    return wanted and library().instruction_set is not None


def gains(kernel: str, to_params: bool, *stored: Any) -> bool:
    """Whether the kernel is the faster form of a leaf's step, or insisted on.

    Alone, the update of float32 moments is memory that is read again, in either form, and XLA can
    order its own loops.
    """
    narrow = any(jnp.result_type(x) != jnp.float32 for x in stored)
    return kernel == "native" or to_params or narrow


_FLOATS = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))


def takes(rule: Any, g: Any, p: Any, *stored: Any) -> bool:
    """Whether the kernel has this leaf's step. `p` is None where it is not needed."""
    if rule.func not in (_math.adam, _math.nadam):
        return False
    dtypes = [jnp.result_type(x) for x in (g, *stored)]
    coded = _codec.is_coded(stored[0])
    param = dtypes[0] if p is None else jnp.result_type(p)
    return (
        dtypes[0] in _FLOATS
        and param in _FLOATS
        and (dtypes[0], param) != _FLOATS
        and (coded or all(dtype in _FLOATS for dtype in dtypes[1:]))
        and (coded or dtypes[1:] != list(_FLOATS))
    )


class Plan(NamedTuple):
    """What is known of a call while tracing.

    Attributes:
        structure: of the rule, the learning rate and the weight decay.
        known: their numbers, with None where an array comes as an operand.
        decays: of each leaf, whether it decays.
        to_params: whether p + update is wanted, or the update alone.
    """

    structure: Any
    known: tuple[Any, ...]
    decays: tuple[bool, ...]
    to_params: bool

    def leaves(self, operands: Sequence[Any]) -> list[tuple[Any, ...]]:
        """g, m, v and, where it is needed, p of each leaf."""
        sizes = [4 if self.to_params or decays else 3 for decays in self.decays]
        ends = np.cumsum(sizes)
        return [tuple(operands[end - n : end]) for end, n in zip(ends, sizes, strict=True)]


def step(
    rule: Rule,
    learning_rate: Scalar,
    weight_decay: Scalar,
    count: Count,
    leaves: Sequence[tuple[Any, ...]],
    *,
    to_params: bool,
) -> list[tuple[Leaf, ...]]:
    """`_leaf.leaf_step` of many leaves `(g, p, decays, m, v)`, through the kernel."""
    numbers, structure = jax.tree.flatten((rule, learning_rate, weight_decay))
    arrays = [x for x in numbers if isinstance(x, jax.Array)]
    known = tuple(None if isinstance(x, jax.Array) else x for x in numbers)
    packed = _packed(rule, learning_rate, weight_decay, count)
    results = []
    for first in range(0, len(leaves), GROUP):
        group = leaves[first : first + GROUP]
        decays = tuple(decays for _, _, decays, *_ in group)
        plan = Plan(structure, known, decays, to_params)
        operands = [
            jnp.asarray(x)
            for g, p, decay, *stored in group
            for x in (g, *stored, *([p] if to_params or decay else []))
        ]
        flat = _bound(plan, len(arrays), packed, count, *arrays, *operands)
        results += [tuple(flat[i : i + 3]) for i in range(0, len(flat), 3)]
    return results


# The fields of `Step` in native/step.h, in their order.
STEP = (
    "complement1",
    "complement2",
    "dither",
    "m_weight",
    "g_weight",
    "c1",
    "c2",
    "eps",
    "eps_root",
    "learning_rate",
    "weight_decay",
    "before_a",
    "before_s",
    "now_a",
    "now_s",
)


def _packed(
    rule: Rule, learning_rate: Scalar, weight_decay: Scalar, count: Count
) -> Float[Array, "15"]:
    """`Step` of native/step.h."""
    float32 = jnp.dtype(jnp.float32)
    then, now = (rule(_math.Step.of(t, float32)) for t in (count, increment(count)))
    assert now.coefficients is not None
    before, after = then.ratio.curve, now.ratio.curve
    numbers = now.coefficients._asdict() | {
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "before_a": before[0],
        "before_s": before[1],
        "now_a": after[0],
        "now_s": after[1],
    }
    assert numbers.keys() == set(STEP)
    return jnp.stack([jnp.asarray(numbers[name], float32) for name in STEP])


@functools.cache
def _tables() -> np.ndarray:
    """`Tables` of native/step.h: what `_codec` computes with polynomials, at 32 and 8 places.

    One record with the fields of the struct.
    """
    exp2, reciprocal, log2 = _tables_of(32)
    exp2_eighths, reciprocal_eighths, log2_eighths = _tables_of(8)
    tables = {
        "exp2": exp2,
        "reciprocal": reciprocal,
        "log2": log2,
        # Of 16·log₂(1 + r)/r, so that the logarithm is within 5e-7: Taylor's for |r| <= 1/65,
        # interpolated for |r| <= 1/17.
        "series": 16 / np.log(2) * np.array([1, -1 / 2, 1 / 3]),
        "exp2_eighths": exp2_eighths,
        "exp2_rest": np.exp2(np.arange(4) / 32),
        "reciprocal_eighths": reciprocal_eighths,
        "log2_eighths": log2_eighths,
        "series_eighths": chebyshev.Chebyshev.interpolate(
            lambda r: 16 / np.log(2) * np.log1p(r) / r, 3, [-1 / 17, 1 / 17]
        )
        .convert(kind=np.polynomial.Polynomial)
        .coef,
        "exp2_polynomial": _codec.EXP2,
        "log2_polynomial": 16 * _codec.LOG2,
    }
    fields = [(name, np.float32, table.shape) for name, table in tables.items()]
    return np.array([tuple(tables.values())], fields)


def _tables_of(n: int) -> tuple[np.ndarray, ...]:
    """At x = 1 + i/n, i < n: 2^(x-1); 1/x in the middle of a place; 16·log₂ of that 1/x, negated.

    As `Tables` has them: without what an exponent's lower bits hold of i.
    """
    i = np.arange(n)
    powers = np.polynomial.polynomial.polyval(2 * i / n - 1, _codec.EXP2).astype(np.float32)
    powers = (powers.view(np.int32) - i * (2**23 // n)).astype(np.int32).view(np.float32)
    reciprocal = (1 / (1 + (i + 1 / 2) / n)).astype(np.float32)
    return powers, reciprocal, -16 * np.log2(reciprocal.astype(np.float64)) - i * 16 // n


def _in_xla(plan: Plan, arrays: int, packed: Array, count: Count, *operands: Any) -> list[Leaf]:
    """The same step as XLA's operations."""
    del packed
    given = iter(operands[:arrays])
    numbers = [next(given) if x is None else x for x in plan.known]
    rule, learning_rate, weight_decay = jax.tree.unflatten(plan.structure, numbers)
    leaf = leaf_step(rule, learning_rate, weight_decay, count, to_params=plan.to_params)
    results = []
    for (g, m, v, *p), decays in zip(plan.leaves(operands[arrays:]), plan.decays, strict=True):
        results += leaf(g, p[0] if p else None, decays, m, v)
    return results


def _in_kernel(plan: Plan, arrays: int, packed: Array, count: Count, *operands: Any) -> Any:
    """The call of the library."""
    return _call(plan, *_numbers(packed, count), *operands[arrays:])


def _in_shards(plan: Plan, arrays: int, packed: Array, count: Count, *operands: Any) -> Any:
    """A call for each leaf, by each device for its shard."""
    numbers = _numbers(packed, count)
    results = []
    for leaf, decays in zip(plan.leaves(operands[arrays:]), plan.decays, strict=True):
        results += _partitioned(plan._replace(decays=(decays,)), *numbers, *leaf)
    return results


def _numbers(packed: Array, count: Count) -> tuple[Array, ...]:
    """What the kernel takes beside leaves."""
    return packed, jnp.asarray(_tables().view(np.float32)), increment(count).astype(jnp.uint32)


def _call(plan: Plan, *operands: Any) -> Any:
    numbers, operands = operands[:3], operands[3:]
    aliases, place, out = {}, len(numbers), 0
    for leaf in plan.leaves(operands):
        # A gradient is seldom needed after: the update takes its place.
        moved = place + 3 if plan.to_params else place
        aliases |= {moved: out, place + 1: out + 1, place + 2: out + 2}
        place, out = place + len(leaf), out + 3
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in _like(plan, operands)]
    call = jax.ffi.ffi_call(_TARGET, results, input_output_aliases=aliases)
    return call(
        *numbers,
        *operands,
        decays=np.array(plan.decays, np.int32),
        writes_params=plan.to_params,
    )


def _like(plan: Plan, operands: Sequence[Any]) -> list[Any]:
    """The operands whose shapes, dtypes and places the results have."""
    return [
        x for g, m, v, *p in plan.leaves(operands) for x in (p[0] if plan.to_params else g, m, v)
    ]


_partitioned = custom_partitioning(_call, static_argnums=(0,))


def _partition(plan: Plan, mesh: Any, operands: Any, results: Any) -> Any:
    """A leaf lies as its m does: each device steps its shard. Blocks stay whole."""
    del results
    *_, m, v = operands[:6]
    spec = [*m.sharding.spec, *[None] * (len(m.shape) - len(m.sharding.spec))]
    if v.shape != m.shape or jnp.bfloat16 in (m.dtype, v.dtype):
        shard = m.sharding.shard_shape(m.shape)[-1] if m.shape else 0
        if shard % _codec.BLOCK:
            spec[-1:] = [None] * len(spec[-1:])
    like_m = NamedSharding(mesh, PartitionSpec(*spec))
    everywhere = NamedSharding(mesh, PartitionSpec())
    places = (everywhere,) * 3 + (like_m,) * (len(operands) - 3)
    return mesh, functools.partial(_call, plan), [like_m] * 3, places


def _sharding_rule(plan: Plan, mesh: Any, operands: Any, results: Any) -> Any:
    """The axes of a leaf in their order; a code's top lies where its block lies."""
    del plan, mesh, results
    m, v, *p = (tuple(x.shape) for x in operands[4:])
    axes, sizes = [f"axis{i}" for i in range(len(m))], {}
    blocks = axes
    if m != v and m[-1] % _codec.BLOCK == 0:
        axes, blocks = [*axes[:-1], "(blocks lanes)"], [*axes[:-1], "blocks"]
        sizes = {"lanes": _codec.BLOCK}
    elif m != v:
        blocks = [*axes[:-1], "blocks"]
    of_m, of_v = " ".join(axes), " ".join(blocks)
    leaf = ", ".join([of_m, of_m, of_v, *[of_m for _ in p]])
    return f"numbers, tables, , {leaf} -> {of_m}, {of_m}, {of_v}", sizes


def _places(plan: Plan, mesh: Any, operands: Any, results: Any) -> Any:
    """Where the results lie: the same rule for XLA's older partitioner."""
    return _partition(plan, mesh, operands, results)[2]


_partitioned.def_partition(_partition, _places, sharding_rule=_sharding_rule)


_step_p = jax.extend.core.Primitive(_TARGET)
_step_p.multiple_results = True
_step_p.def_impl(
    jax.jit(
        lambda *operands, **plan: _step_p.bind(*operands, **plan),
        static_argnames=("plan", "arrays"),
    )
)


@_step_p.def_abstract_eval
def _abstract(*operands: Any, plan: Plan, arrays: int) -> list[Any]:
    return [x.strip_weak_type() for x in _like(plan, operands[2 + arrays :])]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _bound(plan: Plan, arrays: int, *operands: Any) -> Any:
    return _step_p.bind(*operands, plan=plan, arrays=arrays)


@_bound.defjvp
def _jvp(plan: Plan, arrays: int, primals: Any, tangents: Any) -> Any:
    return jax.jvp(functools.partial(_in_xla, plan, arrays), primals, tangents)


def _batched(operands: Any, axes: Any, *, plan: Plan, arrays: int) -> Any:
    results = jax.vmap(functools.partial(_in_xla, plan, arrays), in_axes=axes)(*operands)
    return results, (0,) * len(results)


def _lower(ctx: Any, *operands: Any, plan: Plan, arrays: int) -> Any:
    function = functools.partial(_in_xla, plan, arrays)
    return mlir.lower_fun(function, multiple_results=True)(ctx, *operands)


def _lower_cpu(ctx: Any, *operands: Any, plan: Plan, arrays: int) -> Any:
    function = functools.partial(_form_on_cpu(ctx.module_context), plan, arrays)
    return mlir.lower_fun(function, multiple_results=True)(ctx, *operands)


def _form_on_cpu(module: Any) -> Callable[..., Any]:
    """The kernel, in shards where arrays are divided; XLA's form in a program that is exported."""
    context = module.axis_context
    mesh = getattr(context, "mesh", None)
    is_manual = mesh is not None and context.manual_axes == frozenset(mesh.axis_names)
    if module.lowering_parameters.for_export:
        return _in_xla
    if is_manual or getattr(context, "num_devices", None) == 1:
        return _in_kernel
    return _in_xla if getattr(context, "device_assignment", None) is None else _in_shards


# Partitioning needs to know the devices. There is no public name for this: without it a divided
# array takes XLA's form.
with contextlib.suppress(ImportError):
    from jax._src.dispatch import prim_requires_devices_during_lowering

    prim_requires_devices_during_lowering.add(_step_p)
batching.primitive_batchers[_step_p] = _batched
mlir.register_lowering(_step_p, _lower)
mlir.register_lowering(_step_p, _lower_cpu, platform="cpu")
