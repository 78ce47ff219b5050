"""The kernels in C++ and CUDA: their library, and the numbers that they are called with.

XLA:CPU compiles m, v and the parameter as three loops, each of which reads its operands again;
XLA:GPU makes a kernel for each leaf, and two passes of codes. These make one pass, and on a GPU one
launch of up to 256 leaves.
"""

import ctypes
import functools
import importlib.util
import os
import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy.polynomial import chebyshev

from jadam import _math
from jadam._kernels.coefficients import Coefficients
from jadam._leaf import increment
from jadam._masters import Compensated, Weights
from jadam._members import Rule
from jadam._storage import lattice
from jadam._storage.curve import Curve
from jadam._types import Count, Scalar

TARGET, ROWS_NOW, ROWS_STEP = "jadam_step", "jadam_rows_now", "jadam_rows_step"
_FORCED = "JADAM_INSTRUCTION_SET"


class Library(NamedTuple):
    """The loaded library, or why there is none.

    Attributes:
        instruction_set: that which is in use.
        reason: why it is that one, or why there is none.
        available: all that the library and the processor have, the best first.
        why_not_on_gpu: why its kernels cannot run on a GPU here; it asks the driver when called.
    """

    instruction_set: str | None
    reason: str
    available: tuple[str, ...] = ()
    why_not_on_gpu: Callable[[], str | None] = lambda: "not built: only Linux has them"


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
        handlers = {name: getattr(loaded, name) for name in (TARGET, ROWS_NOW, ROWS_STEP)}
        use = loaded.jadam_use_instruction_set
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
    for name, handler in handlers.items():
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")
    reason = f"loaded, forced by {_FORCED}" if forced else "loaded"
    if not hasattr(loaded, "jadam_step_on_gpu"):
        return Library(chosen, reason, tuple(sets))
    # Also where there is no GPU: programs are compiled for one elsewhere.
    on_gpu = jax.ffi.pycapsule(loaded.jadam_step_on_gpu)
    jax.ffi.register_ffi_target(TARGET, on_gpu, platform="CUDA")
    why_not_on_gpu = loaded.jadam_why_not_on_gpu
    why_not_on_gpu.restype = ctypes.c_char_p
    return Library(chosen, reason, tuple(sets), lambda: why_not_on_gpu().decode() or None)


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


class Numbers(NamedTuple):
    """`Numbers` of step.h, field by field: the numbers of one step, for all its leaves.

    Around the bound are those of the curve of m's code (`Curve`) in the step before and in this
    one: of 8 bits, and at the end of 4.
    """

    coefficients: Coefficients
    learning_rate: Scalar
    weight_decay: Scalar
    before_a: Scalar
    before_s: Scalar
    now_a: Scalar
    now_s: Scalar
    bound: Scalar
    least_bounding: Scalar
    coarse_before_a: Scalar
    coarse_before_s: Scalar
    coarse_now_a: Scalar
    coarse_now_s: Scalar

    def packed(self) -> Float[Array, "numbers"]:
        """As one array, in which the library finds its struct."""
        return jnp.stack([jnp.asarray(x, jnp.float32) for x in (*self.coefficients, *self[1:])])


NAMES = (*Coefficients._fields, *Numbers._fields[1:])
"""Of all numbers, in the order in which they are packed."""


def numbers_of(
    rule: Rule, learning_rate: Scalar, weight_decay: Scalar, count: Count
) -> Float[Array, "numbers"]:
    """The numbers of the step after `count` updates."""
    then, now = (_math.Time.of(t, jnp.dtype(jnp.float32)) for t in (count, increment(count)))
    related_then, related = (rule.relation_at(t) for t in (then, now))
    (ratio_then,), (ratio,) = related_then.ratios, related.ratios
    (before, after), (coarse_before, coarse_after) = (
        [Curve.of(x, bits.dense) for x in (ratio_then, ratio)]
        for bits in (lattice.EIGHT_BITS, lattice.FOUR_BITS)
    )
    return Numbers(
        rule.coefficients_at(now),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        before_a=before.a,
        before_s=before.s,
        now_a=after.a,
        now_s=after.s,
        bound=ratio.bound,
        least_bounding=related.least,
        coarse_before_a=coarse_before.a,
        coarse_before_s=coarse_before.s,
        coarse_now_a=coarse_after.a,
        coarse_now_s=coarse_after.s,
    ).packed()


def weights_attributes(weights: Sequence[Weights | None]) -> dict[str, np.ndarray]:
    """How the parameters of some leaves lie, as the library's enum `Weights`, and their salts."""
    names = ["None", "compensated int8", "compensated int16", "stochastic bfloat16"]
    salts = [x.place if isinstance(x, Compensated) else 0 for x in weights]
    return {
        "weights": np.array([names.index(str(x)) for x in weights], np.int32),
        "salts": np.array(salts, np.int32),
    }


@functools.cache
def tables() -> np.ndarray:
    """`Tables` of step.h: what the storage computes with polynomials, at 32 and 8 places.

    One record with the fields of the struct.
    """
    exp2, reciprocal, log2 = _tables_of(32)
    exp2_eighths, reciprocal_eighths, log2_eighths = _tables_of(8)
    records = {
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
        "exp2_polynomial": lattice.EXP2,
        "log2_polynomial": 16 * lattice.LOG2,
    }
    fields = [(name, np.float32, table.shape) for name, table in records.items()]
    return np.array([tuple(records.values())], fields)


def _tables_of(n: int) -> tuple[np.ndarray, ...]:
    """At x = 1 + i/n, i < n: 2^(x-1); 1/x in the middle of a place; 16·log₂ of that 1/x, negated.

    What the place i stands for in a level, or in a number's upper bits, is subtracted, as `Tables`
    says it.
    """
    i = np.arange(n)
    powers = np.polynomial.polynomial.polyval(2 * i / n - 1, lattice.EXP2).astype(np.float32)
    powers = (powers.view(np.int32) - i * (2**23 // n)).astype(np.int32).view(np.float32)
    reciprocal = (1 / (1 + (i + 1 / 2) / n)).astype(np.float32)
    return powers, reciprocal, -16 * np.log2(reciprocal.astype(np.float64)) - i * 16 // n
