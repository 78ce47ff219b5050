"""Rounding to 16-bit dtypes that loses nothing over time.

A moment that moves by less than half a unit in the last place rounds back to itself for ever.
(arXiv 2603.16731 studies this staleness of states in low precision, and resets them against it.) So
each rounding is dithered: up or down, so often up as the value lies above the lower neighbour.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Integer, UInt32

from jadam._types import Count, Real, Scalar, Shape

# 2³²/φ and 2³²/ρ, φ the golden and ρ the plastic number, as odd integers: multiples of an
# irrational number fill the unit interval evenly (Weyl), and these two do so most evenly.
STEP = np.uint32(0x9E3779B9)
# 2³²·(√2 - 1), which no multiple of the golden ratio follows.
OTHER_STEP = np.uint32(0x6A09E667)
_LANE = np.uint32(0xC13FA9A9)
_SALT = 0x85EBCA6B
_LANES = 128

_layer: contextvars.ContextVar[UInt32[Array, ""] | None] = contextvars.ContextVar(
    "layer", default=None
)


@contextlib.contextmanager
def as_layer(index: UInt32[Array, ""]) -> Iterator[None]:
    """Traces the steps of slices [1, ...] of stacks, each the one at `index`.

    They are dithered and rounded as in the stack. A whole leaf has the index 0.
    """
    token = _layer.set(index)
    try:
        yield
    finally:
        _layer.reset(token)


def is_slice() -> bool:
    """Whether what is traced is the step of a slice of a stack."""
    return _layer.get() is not None


def elements_before(size: int) -> UInt32[Array, ""] | np.uint32:
    """The number of elements of the stack before a slice of this size, modulo 2³²."""
    index = _layer.get()
    return np.uint32(0) if index is None else index * np.uint32(size % 2**32)


def weyl(
    shape: Shape, t: Integer[Array, "..."], salt: int = 0, step: np.uint32 = STEP
) -> UInt32[Array, "*shape"]:
    """A dither in [0, 2³²) for each element at step t: lane·2³²/ρ + t·2³²/φ mod 2³².

    Over time it fills the interval evenly, so the error of a sum of roundings stays bounded where
    that of random rounding grows with √t. It needs no key and no state. Each salt shifts it, so
    that the difference of two dithers stays the same over time; where this matters, another `step`
    moves one differently. The lane is the position along the last axis modulo 128, so the bits do
    not depend on how an array is sharded, as long as shards of the last axis start at multiples of
    128.
    """
    phase = t.astype(jnp.uint32) * step + np.uint32(salt * _SALT % 2**32)
    if not shape:
        return phase
    lane = lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1)
    if len(shape) == 1:
        lane += elements_before(shape[0])
    return lane % np.uint32(_LANES) * _LANE + phase


def _power_of_two(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The power of two at or below |x|, for float32 x; 0 for 0."""
    exponent = lax.bitcast_convert_type(x, jnp.uint32) & np.uint32(0x7F800000)
    return lax.bitcast_convert_type(exponent, jnp.float32)


def spacing(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The distance to the next float32 beyond float32 x; 0 for 0 and the smallest numbers."""
    return _power_of_two(x) * float(jnp.finfo(jnp.float32).eps)


def grid(x: Float[Array, "*shape"], dtype: jnp.dtype) -> Float[Array, "*shape"]:
    """The distance of the numbers of a narrower `dtype` around float32 x, at least 2⁻¹²⁶.

    Devices flush float32's subnormal numbers to 0: the grid ends at its smallest normal one.
    """
    info = jnp.finfo(dtype)
    smallest = max(float(info.smallest_subnormal), 2.0**-126)
    return jnp.maximum(_power_of_two(x) * float(info.eps), smallest)


def round_dithered(x: Real, dtype: jnp.dtype, t: Count, salt: int = 0) -> Float[Array, "*shape"]:
    """x in a narrower `dtype`, to one of its two neighbours there, unbiased over time.

    |x| becomes ⌊|x|/s + u⌋·s with s the spacing in `dtype` and u the Weyl dither in [0, 1), on as
    many bits as x has below s: the sum is exact, and a number that `dtype` has stays. Finite
    numbers stay finite; infinities and NaN pass.
    """
    bits = _bits_below(dtype)
    u = (weyl(x.shape, t, salt) >> (32 - bits)).astype(jnp.float32) * 2.0**-bits
    return _rounded(x, dtype, u)


def round_to_zero(x: Real, dtype: jnp.dtype) -> Float[Array, "*shape"]:
    """x in a narrower `dtype`, the neighbour nearer to 0."""
    return _rounded(x, dtype, 0.0)


def round_from_zero(x: Real, dtype: jnp.dtype) -> Float[Array, "*shape"]:
    """x in a narrower `dtype`, the neighbour farther from 0, or the largest number."""
    return _rounded(x, dtype, 1 - 2.0 ** -_bits_below(dtype))


def _bits_below(dtype: jnp.dtype) -> int:
    """How many bits float32 has more."""
    return jnp.finfo(jnp.float32).nmant - jnp.finfo(dtype).nmant


def _rounded(x: Real, dtype: jnp.dtype, u: Scalar | Real) -> Float[Array, "*shape"]:
    """⌊|x|/s + u⌋·s with the sign of x."""
    x = x.astype(jnp.float32)
    s = grid(x, dtype)
    magnitude = jnp.minimum(jnp.floor(jnp.abs(x) / s + u) * s, float(jnp.finfo(dtype).max))
    return jnp.where(jnp.isfinite(x), jnp.copysign(magnitude, x), x).astype(dtype)
