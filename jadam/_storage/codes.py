"""Moments as codes: 16 bits an element for the first and the second moment together.

The second moment's root √v lies on a lattice of 32 levels an octave. Its code has 9 bits and counts
levels below the top of its block of 128 elements: 16 octaves, zero and NaN. The first moment is
stored beside it in 7 bits, as its ratio to the stored √v (`Curve`). For AdaMax read u for √v.

- The lattice is logarithmic, so a small moment beside a large one keeps its relative accuracy.
- A block's top is a whole level. When it moves, no other value changes.
- |m| <= C·√v holds for exact Adam (Cauchy and Schwarz), and one exact step preserves it from any
  moments for which it holds. The stored m is at most C times the stored √v, and the update is made
  from the moments before they are stored. So no update is beyond Adam's own bound.
- Both roundings are dithered over time, so nothing gets stuck. Without a gradient a moment dies.

What this needs of a member: the `Ratio` of each first moment, and equations whose second moment
grows with |g| and with itself (`Equations`).

Further moments have an array of 8 bits each: a first moment its ratio, as an int8; the maximum of
the second moment its distance above it in levels, as a uint8. No maximum falls: where it is more
than 255 levels above v, v is stored so much below it. AMSGrad divides by the maximum alone, and a v
that is 65,536 times smaller does not change it.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Integer, Shaped
from numpy.polynomial import chebyshev

from jadam._math import Equations, Relation, largest_gradient, limit_range
from jadam._rounding import OTHER_STEP, STEP, weyl
from jadam._state import Moment, Role
from jadam._storage.curve import Curve
from jadam._types import Count, Real, Shape

BLOCK = 128
MIN_SIZE = 4096
_PER_OCTAVE = 32
TOP = 510  # the highest of the 9-bit codes for a number; 0 is zero, 511 NaN
NAN = 511
M_LEVELS = 63  # the highest of the 7-bit codes for m
_BYTE_LEVELS = 127  # the highest of the 8-bit codes for a further first moment
_FARTHEST = 255  # levels that a maximum is above its second moment
_TOPS = np.dtype(np.int16)
_BOTH = np.dtype(np.uint16)
_BESIDE = {Role.FIRST: np.dtype(np.int8), Role.MAXIMUM: np.dtype(np.uint8)}

Blocks = Integer[Array, "*rows blocks"]
Codes = Integer[Array, "*rows lanes"]


def suits(shape: Shape, dtype: jnp.dtype, min_size: int) -> bool:
    """Whether codes pay for a parameter: real, of 32 bits or less, neither small nor narrow.

    A block costs two bytes, so a last axis under 32 would cost more than 2.06 bytes an element.
    """
    real = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits <= 32
    return bool(real and shape and shape[-1] >= 32 and math.prod(shape) >= max(min_size, 1))


def tops_shape(shape: Shape) -> Shape:
    """One top for each block along the last axis."""
    return (*shape[:-1], -(-shape[-1] // BLOCK))


def block_max(
    x: Shaped[Array, "*rows lanes"], seen: Callable[[Array], Array]
) -> Shaped[Array, "*rows blocks"]:
    """The largest seen(x) >= 0 of each block; seen(seen(x)) is seen(x).

    `seen` is part of the reduction. Before it, XLA:CPU would store its result as a whole array.
    """
    n = x.shape[-1]
    if n > BLOCK:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -n % BLOCK)])
        x = x.reshape(*x.shape[:-1], -1, BLOCK)
    else:
        x = x[..., None, :]
    zero = np.zeros((), x.dtype)
    return lax.reduce(x, zero, lambda a, b: lax.max(seen(a), seen(b)), (x.ndim - 1,))


@dataclass(frozen=True)
class EightBitCodes:
    """The moments of one parameter as codes. The second moment's array holds the blocks' tops.

    Attributes:
        moments: of the member, in order.
        block_max: the largest of a function of each block's elements. A kernel that steps one block
            a row has its own.
    """

    moments: tuple[Moment, ...]
    block_max: Callable[[Array, Callable[[Array], Array]], Array] = block_max
    has_numbers = False
    name = "8-bit codes"
    largest_gradient = largest_gradient(jnp.dtype(jnp.float32))

    @property
    def _roles(self) -> list[Role]:
        return [moment.role for moment in self.moments]

    @property
    def _places(self) -> range:
        return range(len(self.moments))

    @property
    def _first(self) -> int:
        return self._firsts[0]

    @property
    def _firsts(self) -> list[int]:
        return [i for i, role in enumerate(self._roles) if role is Role.FIRST]

    @property
    def _second(self) -> int:
        return self._roles.index(Role.SECOND)

    @property
    def _maxima(self) -> list[int]:
        return [i for i, role in enumerate(self._roles) if role is Role.MAXIMUM]

    @property
    def _beside(self) -> dict[int, Role]:
        """The further moments, which have arrays of their own."""
        pair = (self._first, self._second)
        return {i: role for i, role in enumerate(self._roles) if i not in pair}

    @property
    def unfit(self) -> dict[str, str]:
        """Nothing: any moment has a code."""
        return {}

    @staticmethod
    def holds(stored: Sequence[Any]) -> bool:
        """Whether these arrays are a parameter's codes."""
        return any(x.dtype == _BOTH for x in stored)

    def zeros(self, p: Any) -> tuple[Array, ...]:
        """The codes of parameter p before the first step."""
        arrays = {i: jnp.zeros_like(p, dtype=_BESIDE[role]) for i, role in self._beside.items()}
        arrays[self._first] = jnp.zeros_like(p, dtype=_BOTH)
        # Every 128th of zeros like p: a slice lies where the elements of p lie that it is cut from.
        tops = lax.slice_in_dim(jnp.zeros_like(p, dtype=_TOPS), 0, None, BLOCK, -1)
        arrays[self._second] = tops
        return tuple(arrays[i] for i in self._places)

    def shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """The shapes of the arrays for a parameter of this shape."""
        return tuple(tops_shape(shape) if i == self._second else shape for i in self._places)

    def wide(self, dtype: jnp.dtype) -> jnp.dtype:
        """The dtype to compute in with gradients of `dtype`."""
        del dtype
        return jnp.dtype(jnp.float32)

    def load(
        self, stored: Sequence[Array], then: Callable[[], Relation], wide: jnp.dtype
    ) -> tuple[Real, ...]:
        """The moments, 0 where v's code is 0; `then` gives the relation that they were made by."""
        del wide
        relation, both = then(), stored[self._first]
        code, level = _code_and_level(both, stored[self._second])
        root = _special(code, _power_of_two(level))
        x = ((both >> 9).astype(jnp.int32) - 64).astype(jnp.float32) / M_LEVELS
        curves = self._curves(relation)
        moments = {self._first: root * curves[self._first].expand(x)}
        moments[self._second] = root**relation.power
        for i, role in self._beside.items():
            if role is Role.FIRST:
                x = stored[i].astype(jnp.float32) / _BYTE_LEVELS
                moments[i] = root * curves[i].expand(x)
            else:
                higher = _power_of_two(level + stored[i].astype(jnp.int32))
                moments[i] = _special(code, higher) ** relation.power
        return tuple(moments[i] for i in self._places)

    def store(
        self,
        moments: Sequence[Real],
        stored: Sequence[Array],
        g: Real,
        now: Equations,
        relation: Callable[[], Relation],
        count: Count,
    ) -> tuple[Array, ...]:
        """The codes of the moments after a step with gradient g, dithered for that step."""
        related = relation()
        # The equations of a block's largest v and |g| bound v in it: no pass over v is needed.
        largest = self._largest(stored, related.power)
        g_largest = self.block_max(lax.stop_gradient(g), _finite_size).astype(jnp.float32)
        before = [largest.get(i, jnp.zeros_like(g_largest)) for i in self._places]
        _, after = now(limit_range(g_largest, self.largest_gradient), *before)
        bounds = {i: after[i] for i in largest}
        # What falls below the block's range stays on its lowest level while it is fed.
        return self._encode(moments, bounds, jnp.where(g == 0, 0, 1), related, count)

    def round(self, moments: Sequence[Real], relation: Relation) -> tuple[Array, ...]:
        """The codes nearest to the moments of a state that was not made by a step of codes."""
        moments = list(moments)
        # m's code has no NaN: v's says it.
        v = jnp.where(jnp.isfinite(moments[self._first]), moments[self._second], jnp.nan)
        moments[self._second] = v
        # Half a level lower: then a block's top is the level nearest to its largest root.
        shares = {self._second: 2.0 ** (-1 / (2 * _PER_OCTAVE))} | dict.fromkeys(self._maxima, 1.0)

        def bound(x: Real, share: float) -> Float[Array, "*rows blocks"]:
            root = (jnp.sqrt(x) if relation.power == 2 else x) * share
            largest = limit_range(self.block_max(root, _finite_size), self.largest_gradient)
            return largest**relation.power

        bounds = {i: bound(moments[i], share) for i, share in shares.items()}
        return self._encode(moments, bounds, jnp.where(v == 0, 0, 1), relation, None)

    def range_ends(self, stored: Sequence[Array]) -> dict[str, Array]:
        """Which codes are the outermost ones, of those that stand for a number."""
        both = stored[self._first]
        code = both & NAN
        x = (both >> 9).astype(jnp.int32) - 64
        number = (code > 0) & (code < NAN)
        return {
            # An m at its bound is on either of the last two codes, by rounding and dither.
            "m_end": number & (jnp.abs(x) >= M_LEVELS - 1),
            "v_end": (code == 1) | (code == TOP),
        }

    def _curves(self, relation: Relation) -> dict[int, Curve]:
        """The curve of each first moment, by its place."""
        return {i: Curve.of(r) for i, r in zip(self._firsts, relation.ratios, strict=True)}

    def _largest(
        self, stored: Sequence[Array], power: int
    ) -> dict[int, Float[Array, "*rows blocks"]]:
        """The largest v of each block, and the largest maximum where there is one, by place."""
        both, tops = stored[self._first], stored[self._second].astype(jnp.int32)
        codes = {self._second: self.block_max(both, _number).astype(jnp.int32)}
        for i in self._maxima:
            # As int16, which holds NaN's code with the largest distance.
            code = _number(both).astype(jnp.int16)
            higher = jnp.where(code > 0, code + stored[i].astype(jnp.int16), 0)
            codes[i] = self.block_max(higher, lambda x: x).astype(jnp.int32)

        def number(code: Blocks) -> Float[Array, "*rows blocks"]:
            return jnp.where(code > 0, _power_of_two(code - TOP + tops) ** power, 0)

        return {i: number(code) for i, code in codes.items()}

    def _encode(
        self,
        moments: Sequence[Real],
        bounds: Mapping[int, Float[Array, "*rows blocks"]],
        fed: Codes,
        relation: Relation,
        count: Count | None,
    ) -> tuple[Array, ...]:
        """The codes of moments that are at most `bounds` in each block: v, and maxima of it."""
        m, v, power = moments[self._first], moments[self._second], relation.power

        def top_of(place: int) -> Blocks:
            return _floor(_level(bounds[place], power)) + 1

        tops, some = top_of(self._second), bounds[self._second] > 0
        level, alive = self._level_of(v, moments, relation, count), v > 0
        for i in self._maxima:
            # Neither a block's top nor a v is farther below a maximum than a byte can say.
            tops = jnp.maximum(tops, top_of(i) - _FARTHEST)
            level = jnp.maximum(level, _level_above(moments[i], power) - _FARTHEST)
            some, alive = some | (bounds[i] > 0), alive | (moments[i] > 0)
            fed = jnp.where(moments[i] > 0, 1, fed)
        # Computed once: the tops that are stored are those that the codes count from.
        tops = lax.optimization_barrier(jnp.where(some, tops, 0))
        top = _spread(tops, v.shape[-1])
        raised = level - top + TOP
        code = jnp.where(raised >= 1, jnp.minimum(raised, TOP), fed)
        code = jnp.where(jnp.isfinite(v), jnp.where(alive, code, 0), NAN)

        level, curves = code - TOP + top, self._curves(relation)

        def ratio_code(place: int, m: Real, dither: Real, levels: int) -> Real:
            return curves[place].compress(m * _power_of_two(-level), dither, levels)

        x = ratio_code(self._first, m, _unit(v.shape, count, 1), M_LEVELS)
        both = (x.astype(jnp.int32) + 64) * 512 + code
        arrays = {self._first: both.astype(_BOTH), self._second: tops.astype(_TOPS)}
        for salt, (i, role) in enumerate(self._beside.items(), start=2):
            if role is Role.FIRST:
                # A slow average adds up over thousands of steps what its dither has in common with
                # that of v, so it has one that moves differently.
                dither = _unit(v.shape, count, salt, OTHER_STEP)
                arrays[i] = ratio_code(i, moments[i], dither, _BYTE_LEVELS).astype(jnp.int8)
            else:
                above = _level_above(moments[i], power) - level
                arrays[i] = jnp.clip(above, 0, _FARTHEST).astype(jnp.uint8)
        return tuple(arrays[i] for i in self._places)

    def _level_of(
        self, v: Real, moments: Sequence[Real], relation: Relation, count: Count | None
    ) -> Codes:
        """The level of v, dithered; the upper one where a further first moment needs it.

        A slow average of a constant gradient is at its limit for thousands of steps. Were v to go
        down, it would be cut short each time, and it takes as long to recover.
        """
        level = _level(v, relation.power)
        lower = _floor(level + _unit(v.shape, count, 0))
        beside = [i for i, role in self._beside.items() if role is Role.FIRST]
        if not beside:
            return lower
        limits = dict(zip(self._firsts, relation.ratios, strict=True))
        room = _power_of_two(lower)
        needs = [jnp.abs(moments[i]) > limits[i].limit * room for i in beside]
        return jnp.where(functools.reduce(jnp.logical_or, needs), -_floor(-level), lower)


# Blocks


def _code_and_level(both: Codes, tops: Blocks) -> tuple[Codes, Codes]:
    """v's code of each element, and the level that it stands for."""
    code = (both & NAN).astype(jnp.int32)
    top = _spread(tops, both.shape[-1]).astype(jnp.int32)
    return code, code - TOP + top


def _number(both: Array) -> Array:
    """The code of v, 0 where it is NaN's."""
    code = both & NAN
    return jnp.where(code == NAN, jnp.zeros_like(code), code)


def _finite_size(g: Array) -> Array:
    """|g|, 0 where it is not finite."""
    return jnp.where(jnp.isfinite(g), jnp.abs(g), jnp.zeros_like(g))


def _spread(blocks: Blocks, n: int) -> Codes:
    """A block's value for each of its elements, n along the last axis."""
    if blocks.shape[-1] == 1:
        return lax.broadcast_in_dim(blocks, (*blocks.shape[:-1], n), tuple(range(blocks.ndim)))
    shape = (*blocks.shape, min(n, BLOCK))
    spread = lax.broadcast_in_dim(blocks, shape, tuple(range(blocks.ndim)))
    return spread.reshape(*blocks.shape[:-1], -1)[..., :n]


# Levels


def _unit(
    shape: Shape, count: Count | None, salt: int, step: np.uint32 = STEP
) -> Float[Array, "*shape"]:
    """The Weyl dither in [0, 1); without a count ½, which rounds to nearest."""
    if count is None:
        return jnp.full(shape, 0.5, jnp.float32)
    return (weyl(shape, count, salt, step) >> 8).astype(jnp.float32) * 2.0**-24


def _floor(x: Real) -> Int[Array, "*shape"]:
    return jnp.floor(x).astype(jnp.int32)


# Powers and logarithms are polynomials on [0, 1), to 2e-7 and 3e-7. XLA:CPU would store the result
# of an `exp2` or `log2` that is used twice as a whole array, but recomputes products and sums.
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


def _level_above(x: Real, power: int) -> Codes:
    """The level at or above that of x. A number on the lattice stays, to a hundredth of a level."""
    return -_floor(0.01 - _level(x, power))


def _special(code: Int[Array, "*shape"], x: Real) -> Real:
    """x, or what the two codes beside numbers mean."""
    return jnp.where(code == 0, 0, jnp.where(code == NAN, jnp.nan, x))
