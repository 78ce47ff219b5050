"""Codes for the second moment v."""

import math
from dataclasses import dataclass
from typing import Protocol

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from .adam import Betas, Moment
from .blocks import Stored, by_block, dither, largest, safe, unit

NO_LEVEL = -32000
"""Below every level, and a multiple of every step."""


class SecondMoment(Protocol):
    """A code for v."""

    @property
    def bytes(self) -> float: ...
    def encode(self, v: Moment, g: Moment, t: Array, betas: Betas) -> Stored: ...
    def decode(self, stored: Stored, t: Array, betas: Betas) -> Moment: ...


@dataclass(frozen=True)
class ExactV:
    """float32, to see the other moment's error alone."""

    @property
    def bytes(self) -> float:
        return 4

    def encode(self, v: Moment, g: Moment, t: Array, betas: Betas) -> Stored:
        return v

    def decode(self, stored: Stored, t: Array, betas: Betas) -> Moment:
        return stored


@dataclass(frozen=True)
class LinearRoot:
    """uint8 of √v/maximum, float16 maximum: FlashOptim's."""

    block: int = 32
    rounding: str = "nearest"
    power: float = 1

    @property
    def bytes(self) -> float:
        return 1 + 2 / self.block

    def encode(self, v: Moment, g: Moment, t: Array, betas: Betas) -> Stored:
        root = jnp.sqrt(v)
        scale = largest(root, self.block)
        x = 255 * by_block(root, scale, safe) ** (1 / self.power)
        u = unit(dither(self.rounding, v.shape, t, 0))
        return jnp.clip(jnp.floor(x + u), 0, 255).astype(jnp.uint8), scale.astype(jnp.float16)

    def decode(self, stored: Stored, t: Array, betas: Betas) -> Moment:
        code, scale = stored
        x = (code.astype(jnp.float32) / 255) ** self.power
        return jnp.square(by_block(x, scale.astype(jnp.float32)))


def dynamic_code(signed: bool, exponents: int = 7) -> np.ndarray:
    """bitsandbytes' 256 values: a decimal exponent of 1 to 7 bits, the rest a linear fraction.

    With signs and 3 exponents the 16 values of torchao's 4 bits.
    """
    values = [0.0, 1.0]
    for i in range(exponents):
        edges = np.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1)
        middles = 10.0 ** (i + 1 - exponents) * (edges[:-1] + edges[1:]) / 2
        values += [*middles, *(-middles if signed else ())]
    return np.sort(np.array(values, np.float32))


def nearest_in(table: np.ndarray, x: Array) -> Array:
    edges = jnp.asarray((table[:-1] + table[1:]) / 2)
    return jnp.searchsorted(edges, x).astype(jnp.uint8)


@dataclass(frozen=True)
class DynamicV:
    """bitsandbytes: v/maximum by its unsigned table, float32 maximum."""

    block: int = 256

    @property
    def bytes(self) -> float:
        return 1 + 4 / self.block

    def encode(self, v: Moment, g: Moment, t: Array, betas: Betas) -> Stored:
        scale = largest(v, self.block)
        return nearest_in(dynamic_code(False), by_block(v, scale, safe)), scale

    def decode(self, stored: Stored, t: Array, betas: Betas) -> Moment:
        return by_block(jnp.asarray(dynamic_code(False))[stored[0]], stored[1])


@dataclass(frozen=True)
class LinearV:
    """torchao's 4 bits: the nearest of 1/16, 2/16, ..., 1 of the maximum, which has no zero."""

    block: int = 128

    @property
    def bytes(self) -> float:
        return 1 / 2 + 4 / self.block

    def encode(self, v: Moment, g: Moment, t: Array, betas: Betas) -> Stored:
        scale = largest(v, self.block)
        code = jnp.floor(16 * by_block(v, scale, safe) + 0.5)
        return jnp.clip(code, 1, 16).astype(jnp.uint8), scale

    def decode(self, stored: Stored, t: Array, betas: Betas) -> Moment:
        return by_block(stored[0].astype(jnp.float32) / 16, stored[1])


@dataclass(frozen=True)
class Fp8Root:
    """An 8-bit float of √v/maximum scaled to the format's largest, float32 maximum."""

    dtype: str = "float8_e4m3fn"
    block: int = 128

    @property
    def bytes(self) -> float:
        return 1 + 4 / self.block

    def encode(self, v: Moment, g: Moment, t: Array, betas: Betas) -> Stored:
        root = jnp.sqrt(v)
        scale = largest(root, self.block) / float(jnp.finfo(self.dtype).max)
        return by_block(root, scale, safe).astype(self.dtype), scale

    def decode(self, stored: Stored, t: Array, betas: Betas) -> Moment:
        return jnp.square(by_block(stored[0].astype(jnp.float32), stored[1]))


@dataclass(frozen=True)
class Fp8V:
    """torchao: e4m3 of v/maximum·448, without a root; float32 maximum."""

    block: int = 256

    @property
    def bytes(self) -> float:
        return 1 + 4 / self.block

    def encode(self, v: Moment, g: Moment, t: Array, betas: Betas) -> Stored:
        scale = largest(v, self.block) / 448
        return jnp.minimum(by_block(v, scale, safe), 448).astype(jnp.float8_e4m3fn), scale

    def decode(self, stored: Stored, t: Array, betas: Betas) -> Moment:
        return by_block(stored[0].astype(jnp.float32), stored[1])


def top_of(level: Array, finite: Array, block: int, multiple: int = 1) -> Array:
    """The highest level in each block, rounded up to a multiple; NaN and infinity do not count."""
    top = jnp.where(finite, level, NO_LEVEL).reshape(-1, block).max(1, keepdims=True)
    return -(-top // multiple) * multiple


def below(top: Array, x: Array) -> Array:
    """How far x is below its block's top."""
    return by_block(x, top, lambda x, top: top - x)


def with_special(code: Array, codes: int, v: Moment, g: Moment) -> Array:
    """The codes with 0 for zero and codes+1 for what is not finite.

    A value below the window stays at code 1 as long as gradients come, and becomes zero otherwise.
    """
    code = jnp.where(code >= 1, code, jnp.where(g == 0, 0, 1))
    code = jnp.where(v > 0, code, 0)
    return jnp.where(jnp.isfinite(v), code, codes + 1).astype(jnp.uint16)


def without_special(x: Array, code: Array, codes: int) -> Array:
    """The decoded values x, with 0 and NaN where the code says so."""
    return jnp.where(code == 0, 0, jnp.where(code > codes, jnp.nan, x))


@dataclass(frozen=True)
class LogRoot:
    """log √v, rounded to a lattice of levels that is the same for all blocks and steps.

    A block stores the level of its maximum, the top of a window of levels; a code counts levels
    downwards from there. Since the lattice is fixed, another maximum moves the window but changes
    no value in it.

    The window has `zones`. Zone j begins j·`half` levels below the top, keeps every 2ʲ-th level,
    and has half as many codes as the zone above it: steps are finest near the maximum, where most
    elements are. The top is a multiple of the coarsest step. So when it moves, only those elements
    are rounded that come into a coarser zone.

    The rounding is unbiased in log v, which decays evenly; with `unbiased` it is so in v. With
    `clock` the lattice sinks by log b2 in each step, so that a code changes only by gradients.
    """

    octaves: float = 16
    zones: int = 1
    block: int = 128
    rounding: str = "weyl"
    unbiased: bool = False
    clock: bool = False
    half: int = 128

    @property
    def bytes(self) -> float:
        return 1 + 2 / self.block

    @property
    def codes(self) -> int:
        return 2 * self.half - 2

    @property
    def per_octave(self) -> float:
        """Levels in a factor 2 of v."""
        return (self.half * (self.zones + 1) - 2**self.zones) / (2 * self.octaves)

    def sunk(self, t: Array, betas: Betas) -> Array:
        return t.astype(jnp.float32) * betas.log_b2 * (1 / math.log(2)) if self.clock else 0.0

    def encode(self, v: Moment, g: Moment, t: Array, betas: Betas) -> Stored:
        some = (v > 0) & jnp.isfinite(v)
        y = (jnp.log2(jnp.where(some, v, 1)) - self.sunk(t, betas)) * self.per_octave
        coarsest = 1 << (self.zones - 1)
        top = jnp.where(some, y, NO_LEVEL).reshape(-1, self.block).max(1, keepdims=True)
        # XLA may compute y twice and round it differently. So the barrier makes the stored top the
        # one that is used, and the code is a continuous function of y: no branch on a zone, about
        # which two values of y could disagree.
        top = lax.optimization_barrier(jnp.ceil(top / coarsest) * coarsest)
        depth = by_block(y, top, lambda y, top: top - y)
        code = -jnp.inf
        for zone in range(self.zones):
            code = jnp.maximum(code, (self.half * (zone + 2) - depth) * 2.0**-zone - 2)
        u = unit(dither(self.rounding, v.shape, t, 0))
        low = jnp.floor(code)
        up = code - low
        if self.unbiased:  # (eᵃᵘ - 1)/(eᵃ - 1) with a the logarithm of the step in v
            zone = jnp.clip(jnp.floor(depth / self.half), 0, self.zones - 1)
            up -= jnp.exp2(zone) * (math.log(2) / (2 * self.per_octave)) * up * (1 - up)
        code = low.astype(jnp.int32) + (up + u >= 1)
        return with_special(code, self.codes, v, g), top.astype(jnp.int16)

    def decode(self, stored: Stored, t: Array, betas: Betas) -> Moment:
        code = stored[0].astype(jnp.int32)
        zone = lax.clz(code + 1) - lax.clz(jnp.full_like(code, self.codes + 1))
        zone = jnp.clip(zone, 0, self.zones - 1)
        depth = self.half * (zone + 2) - ((code + 2) << zone)
        level = below(stored[1].astype(jnp.int32), depth).astype(jnp.float32)
        v = jnp.exp2(level / self.per_octave + self.sunk(t, betas))
        return without_special(v, stored[0], self.codes)


@dataclass(frozen=True)
class FloatV:
    """v as a float32 whose mantissa is cut to `mantissa` bits; its upper bits are the level.

    This needs no logarithm, only (bits + dither) >> n. The rounding is unbiased in v.
    """

    mantissa: int = 3
    block: int = 128
    rounding: str = "weyl"

    @property
    def bytes(self) -> float:
        return 1 + 2 / self.block

    def encode(self, v: Moment, g: Moment, t: Array, betas: Betas) -> Stored:
        cut = 23 - self.mantissa
        u = dither(self.rounding, v.shape, t, 0) >> (32 - cut)
        level = ((lax.bitcast_convert_type(v, jnp.uint32) + u) >> cut).astype(jnp.int32)
        top = top_of(level, (v > 0) & jnp.isfinite(v), self.block)
        return with_special(254 - below(top, level), 254, v, g), top.astype(jnp.int16)

    def decode(self, stored: Stored, t: Array, betas: Betas) -> Moment:
        level = below(stored[1].astype(jnp.int32), 254 - stored[0].astype(jnp.int32))
        v = lax.bitcast_convert_type(level << (23 - self.mantissa), jnp.float32)
        return without_special(v, stored[0], 254)


@dataclass(frozen=True)
class FewLevels:
    """Any number of levels of √v below a block's top, on a lattice that is the same for all.

    `zones` has how many levels are a step apart, two steps, four, ..., from the top downwards;
    `per_octave` is how many steps there are in a factor 2 of √v. The rounding keeps the mean of v
    to this `power`, of log v where it is 0.
    """

    per_octave: float
    zones: tuple[int, ...]
    power: float = 0.0
    block: int = 128
    rounding: str = "weyl"

    @property
    def bytes(self) -> float:
        return math.log2(self.codes) / 8 + 2 / self.block

    @property
    def codes(self) -> int:
        return sum(self.zones)

    @property
    def octaves(self) -> float:
        return sum(n << i for i, n in enumerate(self.zones)) / self.per_octave

    @property
    def _edges(self) -> list[tuple[int, int, int]]:
        """Of each zone its depth, the number of levels above it, and its step."""
        edges, depth, above = [], 0, 0
        for i, n in enumerate(self.zones):
            edges.append((depth, above, 1 << i))
            depth, above = depth + (n << i), above + n
        return edges

    def encode(self, v: Moment, g: Moment, t: Array, betas: Betas) -> Stored:
        some = (v > 0) & jnp.isfinite(v)
        y = jnp.log2(jnp.where(some, v, 1)) * (self.per_octave / 2)
        coarsest = 1 << (len(self.zones) - 1)
        top = jnp.where(some, y, NO_LEVEL).reshape(-1, self.block).max(1, keepdims=True)
        # As in LogRoot: one top, and a code that is a continuous function of y.
        top = lax.optimization_barrier(jnp.ceil(top / coarsest) * coarsest)
        depth = by_block(y, top, lambda y, top: top - y)
        code, step = -jnp.inf, 1.0
        for start, above, width in self._edges:
            code = jnp.maximum(code, self.codes - above - (depth - start) / width)
            step = jnp.where(depth > start, width, step)
        low = jnp.floor(code)
        up = code - low
        if self.power:  # (eᵃᵘ - 1)/(eᵃ - 1) with a the logarithm of the step in v^power
            a = self.power * step * (2 * math.log(2) / self.per_octave)
            up = jnp.expm1(a * up) / jnp.expm1(a)
        u = unit(dither(self.rounding, v.shape, t, 0))
        code = low.astype(jnp.int32) + (up + u >= 1)
        return with_special(code, self.codes, v, g), top.astype(jnp.int16)

    def decode(self, stored: Stored, t: Array, betas: Betas) -> Moment:
        place = self.codes - stored[0].astype(jnp.float32)
        depth = -jnp.inf
        for start, above, width in self._edges:
            depth = jnp.maximum(depth, start + (place - above) * width)
        level = below(stored[1].astype(jnp.float32), depth)
        return without_special(jnp.exp2(level * (2 / self.per_octave)), stored[0], self.codes)


@dataclass(frozen=True)
class OfNeighbours:
    """One v for each two neighbours, the mean of both: not Adam's where their scales differ."""

    code: SecondMoment

    @property
    def bytes(self) -> float:
        return self.code.bytes / 2

    def encode(self, v: Moment, g: Moment, t: Array, betas: Betas) -> Stored:
        pairs = v.reshape(-1, 2).mean(1).reshape(-1, v.shape[1] // 2)
        largest_g = jnp.abs(g).reshape(-1, 2).max(1).reshape(pairs.shape)
        return self.code.encode(pairs, largest_g, t, betas)

    def decode(self, stored: Stored, t: Array, betas: Betas) -> Moment:
        pairs = self.code.decode(stored, t, betas)
        return jnp.repeat(pairs, 2, axis=1)
