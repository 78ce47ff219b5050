"""Moments as codes: 16 bits an element for the first and the second moment together, or 8.

The second moment's root √v lies on a logarithmic lattice (`Lattice`), of 32 levels an octave or of
one. Its code counts levels below the top of its block of 128 elements: 16 octaves or 12, zero and
NaN. The first moment is stored beside it, as its ratio to the stored √v (`Curve`). For AdaMax read
u for √v.

- The lattice is logarithmic, so a small moment beside a large one keeps its relative accuracy.
- A block's top is a whole level. When it moves, no other value changes.
- |m| <= C·√v holds for exact Adam (Cauchy and Schwarz), and one exact step preserves it from any
  moments for which it holds. The stored m is at most C times the stored √v, and the update is made
  from the moments before they are stored. So no update is beyond Adam's own bound.
- Both roundings are dithered over time, so nothing gets stuck. Without a gradient a moment dies.

What this needs of a member: the `Ratio` of each first moment, and equations whose second moment
grows with |g| and with itself (`Equations`).

Further moments have an array of 8 bits each: a first moment its ratio, as an int8; the maximum of
the second moment its distance above it, as a uint8, in levels, of coarse ones in sixteenths. No
maximum falls: a v that is too far below is stored as far below as a byte can say. AMSGrad divides
by the maximum alone, and a v that is 65,536 times smaller does not change it.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Integer

from jadam._math import Equations, Relation, largest_gradient, limit_range
from jadam._rounding import OTHER_STEP, STEP, weyl
from jadam._state import Moment, Role
from jadam._storage.blocks import BLOCK, block_max, tops_shape, uncut
from jadam._storage.curve import Curve
from jadam._storage.lattice import LATTICES, Lattice, floor
from jadam._types import Count, Real, Shape

MIN_SIZE = 4096
_BYTE_LEVELS = 127  # the highest of the 8-bit codes for a further first moment
_FARTHEST = 255  # parts of a level that a maximum is above its second moment
_TOPS = np.dtype(np.int16)
_BESIDE = {Role.FIRST: np.dtype(np.int8), Role.MAXIMUM: np.dtype(np.uint8)}

Blocks = Integer[Array, "*rows blocks"]
Lanes = Integer[Array, "*rows lanes"]


def suits(shape: Shape, dtype: jnp.dtype, min_size: int) -> bool:
    """Whether codes pay for a parameter: real, of 32 bits or less, neither small nor narrow.

    A block's top has two bytes: in a last axis under 32, more than a 16th of a byte an element.
    """
    real = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits <= 32
    return bool(real and shape and shape[-1] >= 32 and math.prod(shape) >= max(min_size, 1))


@dataclass(frozen=True)
class Codes:
    """The moments of one parameter as codes. The second moment's array holds the blocks' tops.

    Attributes:
        moments: of the member, in order.
        lattice: on which the first and the second moment lie.
        block_max: the largest of a function of each block's elements. A kernel that steps one block
            a row has its own.
    """

    moments: tuple[Moment, ...]
    lattice: Lattice
    block_max: Callable[[Array, Callable[[Array], Array]], Array] = block_max
    has_numbers = False
    largest_gradient = largest_gradient(jnp.dtype(jnp.float32))

    @property
    def name(self) -> str:
        """That of the lattice."""
        return self.lattice.name

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
        """Whether these arrays are a parameter's codes: they have the blocks' tops."""
        return any(x.dtype == _TOPS for x in stored)

    @staticmethod
    def dtypes(moments: tuple[Moment, ...]) -> Sequence[tuple[np.dtype, ...]]:
        """Which dtypes the array of each moment may have."""
        roles = [moment.role for moment in moments]
        found: list[tuple[np.dtype, ...]] = [(_BESIDE.get(role, _TOPS),) for role in roles]
        found[roles.index(Role.FIRST)] = tuple(lattice.dtype for lattice in LATTICES)
        return found

    @classmethod
    def of(cls, moments: tuple[Moment, ...], stored: Sequence[Any]) -> "Codes":
        """The codes that these arrays, a parameter's moments, are."""
        first = next(x for x, moment in zip(stored, moments, strict=True) if moment.is_first)
        return cls(moments, next(x for x in LATTICES if x.dtype == first.dtype))

    def zeros(self, p: Any) -> tuple[Array, ...]:
        """The codes of parameter p before the first step."""
        arrays = {i: jnp.zeros_like(p, dtype=_BESIDE[role]) for i, role in self._beside.items()}
        arrays[self._first] = jnp.zeros_like(p, dtype=self.lattice.dtype)
        # Every 128th of zeros like p: a slice lies where the elements of p lie that it is cut from.
        tops = lax.slice_in_dim(uncut(jnp.zeros_like(p, dtype=_TOPS)), 0, None, BLOCK, -1)
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
        code, level = self._code_and_level(both, stored[self._second])
        root = self._special(code, self.lattice.power_of_two(level))
        x = self.lattice.size_of(both).astype(jnp.float32) / self.lattice.sizes
        curves = self._curves(relation)
        moments = {self._first: root * curves[self._first].expand(x)}
        moments[self._second] = root**relation.power
        for i, role in self._beside.items():
            if role is Role.FIRST:
                x = stored[i].astype(jnp.float32) / _BYTE_LEVELS
                moments[i] = root * curves[i].expand(x)
            else:
                higher = self.lattice.parts * level + stored[i].astype(jnp.int32)
                root = self.lattice.in_parts.power_of_two(higher)
                moments[i] = self._special(code, root) ** relation.power
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
        shares = {self._second: 2.0 ** (-1 / (2 * self.lattice.per_octave))} | dict.fromkeys(
            self._maxima, 1.0
        )

        def bound(x: Real, share: float) -> Float[Array, "*rows blocks"]:
            root = (jnp.sqrt(x) if relation.power == 2 else x) * share
            largest = limit_range(self.block_max(root, _finite_size), self.largest_gradient)
            return largest**relation.power

        bounds = {i: bound(moments[i], share) for i, share in shares.items()}
        # None dies: what is far below the largest has the lowest level.
        return self._encode(moments, bounds, jnp.ones_like(v, jnp.int32), relation, None)

    def range_ends(self, stored: Sequence[Array]) -> dict[str, Array]:
        """Which codes are the outermost ones, of those that stand for a number."""
        both = stored[self._first]
        code, size = self.lattice.code_of(both), self.lattice.size_of(both)
        number = (code > 0) & (code < self.lattice.nan)
        return {
            # An m at its bound is on either of the last two codes, by rounding and dither.
            "m_end": number & (jnp.abs(size) >= self.lattice.sizes - 1),
            "v_end": (code == 1) | (code == self.lattice.top),
        }

    def _curves(self, relation: Relation) -> dict[int, Curve]:
        """The curve of each first moment, by its place."""
        dense = self.lattice.dense
        return {i: Curve.of(r, dense) for i, r in zip(self._firsts, relation.ratios, strict=True)}

    def _largest(
        self, stored: Sequence[Array], power: int
    ) -> dict[int, Float[Array, "*rows blocks"]]:
        """The largest v of each block, and the largest maximum where there is one, by place."""
        both, tops = stored[self._first], stored[self._second].astype(jnp.int32)
        lattice = self.lattice

        def number(code: Blocks, lattice: Lattice, parts: int) -> Float[Array, "*rows blocks"]:
            level = code + parts * (tops - lattice.top)
            return jnp.where(code > 0, lattice.power_of_two(level) ** power, 0)

        largest = lattice.code_of(self.block_max(both, lattice.seen).astype(jnp.int32))
        found = {self._second: number(largest, lattice, 1)}
        for i in self._maxima:
            # As int16, which holds NaN's code with the largest distance.
            code = lattice.code_of(lattice.seen(both)).astype(jnp.int16)
            higher = jnp.where(code > 0, lattice.parts * code + stored[i].astype(jnp.int16), 0)
            highest = self.block_max(higher, lambda x: x).astype(jnp.int32)
            found[i] = number(highest, lattice.in_parts, lattice.parts)
        return found

    def _encode(
        self,
        moments: Sequence[Real],
        bounds: Mapping[int, Float[Array, "*rows blocks"]],
        fed: Lanes,
        relation: Relation,
        count: Count | None,
    ) -> tuple[Array, ...]:
        """The codes of moments that are at most `bounds` in each block: v, and maxima of it."""
        m, v, power = moments[self._first], moments[self._second], relation.power
        lattice, fine = self.lattice, self.lattice.in_parts

        def least(level: Lanes) -> Lanes:
            """The least level from which a byte reaches a maximum's, which is in parts."""
            return -((_FARTHEST - level) // lattice.parts)

        tops = floor(lattice.level(bounds[self._second], power)) + 1
        some = bounds[self._second] > 0
        level, alive = self._level_of(v, moments, relation, count), v > 0
        for i in self._maxima:
            # Neither a block's top nor a v is farther below a maximum than a byte can say.
            tops = jnp.maximum(tops, least(floor(fine.level(bounds[i], power)) + 1))
            level = jnp.maximum(level, least(fine.level_above(moments[i], power)))
            some, alive = some | (bounds[i] > 0), alive | (moments[i] > 0)
            fed = jnp.maximum(fed, (moments[i] > 0).astype(jnp.int32))
        # Computed once: the tops that are stored are those that the codes count from.
        tops = lax.optimization_barrier(jnp.where(some, tops, 0))
        top = _spread(tops, v.shape[-1])
        raised = level - top + lattice.top
        code = jnp.maximum(jnp.minimum(raised, lattice.top), fed)
        code = jnp.where(jnp.isfinite(v), jnp.where(alive, code, 0), lattice.nan)

        level, curves = code - lattice.top + top, self._curves(relation)

        def ratio_code(
            place: int, m: Real, dither: Real, levels: int, *, unbiased: bool = False
        ) -> Real:
            r = m * lattice.power_of_two(-level)
            return curves[place].compress(r, dither, levels, unbiased=unbiased)

        size = ratio_code(
            self._first, m, _unit(v.shape, count, 1), lattice.sizes, unbiased=lattice.is_coarse
        )
        both = lattice.both_of(code, size.astype(jnp.int32))
        arrays = {self._first: both, self._second: tops.astype(_TOPS)}
        for salt, (i, role) in enumerate(self._beside.items(), start=2):
            if role is Role.FIRST:
                # A slow average adds up over thousands of steps what its dither has in common with
                # that of v, so it has one that moves differently.
                dither = _unit(v.shape, count, salt, OTHER_STEP)
                arrays[i] = ratio_code(i, moments[i], dither, _BYTE_LEVELS).astype(jnp.int8)
            else:
                above = fine.level_above(moments[i], power) - lattice.parts * level
                arrays[i] = jnp.clip(above, 0, _FARTHEST).astype(jnp.uint8)
        return tuple(arrays[i] for i in self._places)

    def _level_of(
        self, v: Real, moments: Sequence[Real], relation: Relation, count: Count | None
    ) -> Lanes:
        """The level of v, dithered; the upper one where a further first moment needs it.

        A slow average of a constant gradient is at its limit for thousands of steps. Were v to go
        down, it would be cut short each time, and it takes as long to recover.
        """
        level = self.lattice.level(v, relation.power)
        lower = self.lattice.rounded(level, _unit(v.shape, count, 0))
        beside = [i for i, role in self._beside.items() if role is Role.FIRST]
        if not beside:
            return lower
        limits = dict(zip(self._firsts, relation.ratios, strict=True))
        room = self.lattice.power_of_two(lower)
        needs = [jnp.abs(moments[i]) > limits[i].limit * room for i in beside]
        return jnp.where(functools.reduce(jnp.logical_or, needs), -floor(-level), lower)

    def _code_and_level(self, both: Lanes, tops: Blocks) -> tuple[Lanes, Lanes]:
        """v's code of each element, and the level that it stands for."""
        code = self.lattice.code_of(both)
        top = _spread(tops, both.shape[-1]).astype(jnp.int32)
        return code, code - self.lattice.top + top

    def _special(self, code: Lanes, x: Real) -> Real:
        """x, or what the two codes beside numbers mean."""
        return jnp.where(code == 0, 0, jnp.where(code == self.lattice.nan, jnp.nan, x))


def _finite_size(g: Array) -> Array:
    """|g|, 0 where it is not finite."""
    return jnp.where(jnp.isfinite(g), jnp.abs(g), jnp.zeros_like(g))


def _spread(blocks: Blocks, n: int) -> Lanes:
    """A block's value for each of its elements, n along the last axis."""
    if blocks.shape[-1] == 1:
        return lax.broadcast_in_dim(blocks, (*blocks.shape[:-1], n), tuple(range(blocks.ndim)))
    shape = (*blocks.shape, min(n, BLOCK))
    spread = lax.broadcast_in_dim(blocks, shape, tuple(range(blocks.ndim)))
    return spread.reshape(*blocks.shape[:-1], -1)[..., :n]


def _unit(
    shape: Shape, count: Count | None, salt: int, step: np.uint32 = STEP
) -> Float[Array, "*shape"]:
    """The Weyl dither in [0, 1); without a count ½, which rounds to nearest."""
    if count is None:
        return jnp.full(shape, 0.5, jnp.float32)
    return (weyl(shape, count, salt, step) >> 8).astype(jnp.float32) * 2.0**-24
