"""How moments are stored between two updates: as floats, or as codes of 16 bits for both.

**Floats** narrower than 32 bits are rounded with a dither (`_rounding`).

**Codes** hold √v on a lattice of 32 levels an octave, as 9 bits below the top of its block of 128
elements (16 octaves, zero and NaN), and m as 7 bits relative to the stored √v. For AdaMax read
u for √v.

- A level's error is relative, so small moments beside large ones keep theirs.
- A block's top is a whole level: when it moves, no value changes.
- |m| <= C·√v holds for exact Adam (Cauchy-Schwarz), and one exact step preserves it from any
  moments for which it holds. m is stored relative to the stored √v, by at most C, and the update
  is made of the moments before they are stored. So no update is beyond Adam's own bound.
- Both roundings are dithered over time, hence nothing sticks; without a gradient a moment dies.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Inexact, Int, UInt8, UInt16
from numpy.polynomial import chebyshev

from jadam._math import Equations, limit_range, widen
from jadam._rounding import round_dithered, weyl
from jadam._types import Count, Leaf, Real

BLOCK = 128
MIN_SIZE = 4096
_PER_OCTAVE = 32
TOP = 510  # the highest of the 9-bit codes for a number; 0 is zero, 511 NaN
NAN = 511
M_LEVELS = 63  # the highest of the 7-bit codes for m
Tops = Int[Array, "*blocks"]


def storage(param_dtype: jnp.dtype, chosen: jnp.dtype | None) -> jnp.dtype:
    """The float dtype to store a moment of a parameter in: `chosen`, else the parameter's, widened.

    A complex moment keeps its complex dtype, since no narrower one exists.
    """
    wide = widen(param_dtype)
    if chosen is None or chosen.kind in "iu":
        return wide
    return np.result_type(wide, widen(chosen)) if wide.kind == "c" else chosen


def load(stored: Inexact[Array, "*shape"], dtype: jnp.dtype) -> Leaf:
    """The stored moment in the dtype of the computation."""
    return stored.astype(dtype)


def store(x: Leaf, dtype: jnp.dtype, t: Count, salt: int) -> Inexact[Array, "*shape"]:
    """The moment x in its storage dtype, dithered where that has fewer than 32 bits."""
    if jnp.finfo(dtype).bits < 32:
        return round_dithered(x, dtype, t, salt)
    return x.astype(dtype)


def gains(shape: tuple[int, ...], dtype: jnp.dtype, min_size: int) -> bool:
    """Whether codes are for this leaf: a real float of 32 bits or less, neither small nor narrow.

    A block costs two bytes, so a last axis under 32 would cost more than 2.06 bytes an element.
    """
    real = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits <= 32
    return bool(real and shape and shape[-1] >= 32 and math.prod(shape) >= max(min_size, 1))


def is_coded(stored: Array) -> bool:
    """Whether a leaf of `mu` holds codes."""
    return stored.dtype == jnp.uint16


def tops_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """One top for each block along the last axis."""
    return (*shape[:-1], -(-shape[-1] // BLOCK))


def _block_max(x: Array, seen: Callable[[Array], Array]) -> Array:
    """The largest seen(x) >= 0 of each block; seen(seen(x)) is seen(x).

    `seen` is part of the reduction, since XLA:CPU would keep its result in memory.
    """
    n = x.shape[-1]
    if n > BLOCK:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -n % BLOCK)])
        x = x.reshape(*x.shape[:-1], -1, BLOCK)
    else:
        x = x[..., None, :]
    zero = np.zeros((), x.dtype)
    return lax.reduce(x, zero, lambda a, b: lax.max(seen(a), seen(b)), (x.ndim - 1,))


def _number(both: Array) -> Array:
    """The code of v, 0 where it is NaN's."""
    code = both & np.uint16(NAN)
    return jnp.where(code == NAN, jnp.zeros_like(code), code)


def _finite_size(g: Array) -> Array:
    """|g|, 0 where it is not finite."""
    return jnp.where(jnp.isfinite(g), jnp.abs(g), jnp.zeros_like(g))


def _spread(blocks: Array, n: int) -> Array:
    """A block's value for each of its elements, n along the last axis."""
    shape = (*blocks.shape, min(n, BLOCK))
    spread = lax.broadcast_in_dim(blocks, shape, tuple(range(blocks.ndim)))
    return spread.reshape(*blocks.shape[:-1], -1)[..., :n]


class Codes(NamedTuple):
    """A leaf's stored moments: both codes, each block's top, AMSGrad's maximum above v."""

    both: UInt16[Array, "*shape"]
    tops: Tops
    maximum: UInt8[Array, "*shape"] | None = None

    @property
    def _levels(self) -> tuple[Int[Array, "*shape"], Int[Array, "*shape"]]:
        code = (self.both & np.uint16(NAN)).astype(jnp.int32)
        top = _spread(self.tops, self.both.shape[-1]).astype(jnp.int32)
        return code, code - TOP + top

    def decode(self, equations: Equations) -> tuple[Real, ...]:
        """m, v and, for AMSGrad, v's maximum; each 0 where v's code is 0."""
        code, level = self._levels
        root = _special(code, _power_of_two(level))
        x = ((self.both >> 9).astype(jnp.int32) - 64).astype(jnp.float32) / M_LEVELS
        moments = root * equations.ratio.expand(x), root**equations.power
        if self.maximum is None:
            return moments
        higher = _power_of_two(level + self.maximum.astype(jnp.int32))
        return *moments, _special(code, higher) ** equations.power

    def encode(
        self, moments: tuple[Real, ...], g: Real, equations: Equations, t: Count | None
    ) -> "Codes":
        """The moments after a step with gradient g, dithered for step t, to nearest without it."""
        m, v, *maximum = moments
        # The equations of a block's largest v and |g| bound v in it: no pass over v is needed.
        code = _block_max(self.both, _number).astype(jnp.int32)
        largest = _power_of_two(code - TOP + self.tops.astype(jnp.int32)) ** equations.power
        largest = jnp.where(code > 0, largest, 0)
        g_largest = _block_max(lax.stop_gradient(g), _finite_size).astype(jnp.float32)
        bounds = (largest,) * (len(moments) - 1)
        _, (_, bound, *_) = equations.step(limit_range(g_largest), jnp.zeros_like(largest), *bounds)
        tops = jnp.where(bound > 0, _floor(_level(bound, equations.power)) + 1, 0)
        # Computed once: the tops that are stored are those that the codes count from.
        tops = lax.optimization_barrier(tops)
        top = _spread(tops, v.shape[-1])
        raised = _floor(_level(v, equations.power) + _unit(v.shape, t, 0)) - top + TOP
        # What falls below the block's range stays on its lowest level while it is fed.
        fed = jnp.where(g == 0, 0, 1)
        code = jnp.where(raised >= 1, jnp.minimum(raised, TOP), fed)
        code = jnp.where(jnp.isfinite(v), jnp.where(v > 0, code, 0), NAN)

        level = code - TOP + top
        x = equations.ratio.compress(m * _power_of_two(-level), _unit(v.shape, t, 1), M_LEVELS)
        both = (x.astype(jnp.int32) + 64) * 512 + code
        if maximum:
            # Upwards, and a number on the lattice stays: a maximum does not fall.
            above = -_floor(0.01 - _level(maximum[0], equations.power)) - level
            above = jnp.clip(above, 0, 255).astype(jnp.uint8)
        else:
            above = None
        return Codes(both.astype(jnp.uint16), tops.astype(jnp.int16), above)


def _unit(shape: tuple[int, ...], t: Count | None, salt: int) -> Float[Array, "*shape"]:
    """The Weyl dither in [0, 1); without a step ½, which rounds to nearest."""
    if t is None:
        return jnp.full(shape, 0.5, jnp.float32)
    return (weyl(shape, t, salt) >> 8).astype(jnp.float32) * 2.0**-24


def _floor(x: Real) -> Int[Array, "*shape"]:
    return jnp.floor(x).astype(jnp.int32)


# Powers and logarithms by polynomials on [0, 1), to 2e-7 and 3e-7. XLA:CPU keeps the result of an
# `exp2` or `log2` that is used twice in memory, in float32; products and sums it computes again.
def _interpolated(function: Callable[[np.ndarray], np.ndarray], degree: int) -> np.ndarray:
    """The coefficients of the polynomial through a function on [0, 1], in 2x - 1."""
    return chebyshev.cheb2poly(chebyshev.Chebyshev.interpolate(function, degree, [0, 1]).coef)


EXP2 = _interpolated(np.exp2, 6)
LOG2 = _interpolated(lambda x: np.log2(1 + x), 9)


def _polynomial(coefficients: np.ndarray, x: Real) -> Real:
    """For x in [0, 1), by Horner's rule on [-1, 1)."""
    x = 2 * x - 1
    y = jnp.full_like(x, float(coefficients[-1]))
    for coefficient in coefficients[-2::-1]:
        y = y * x + float(coefficient)
    return y


def _power_of_two(level: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """2^(level/32): the whole octaves as exponent bits, the rest by the polynomial."""
    octave = lax.bitcast_convert_type(((level >> 5) + 127) << 23, jnp.float32)
    return octave * _polynomial(EXP2, (level & 31).astype(jnp.float32) * (1 / _PER_OCTAVE))


def _level(x: Real, power: int) -> Float[Array, "*shape"]:
    """32·log₂ of √x (power 2) or x (power 1); any number where x is 0, infinite or NaN."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    mantissa = lax.bitcast_convert_type((bits & 0x7FFFFF) | 0x3F800000, jnp.float32)
    log2 = ((bits >> 23) - 127).astype(jnp.float32) + _polynomial(LOG2, mantissa - 1)
    return log2 * (_PER_OCTAVE / power)


def _special(code: Int[Array, "*shape"], x: Real) -> Real:
    """x, or what the two codes beside numbers mean."""
    return jnp.where(code == 0, 0, jnp.where(code == NAN, jnp.nan, x))
