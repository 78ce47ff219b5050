"""Codes for the first moment m, given the stored second moment."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import jax.numpy as jnp
from jaxtyping import Array

from .adam import Betas, Moment
from .blocks import Stored, by_block, dither, largest, safe, unit
from .second_moment import dynamic_code, nearest_in


class FirstMoment(Protocol):
    """A code for m, given the stored v."""

    @property
    def bytes(self) -> float: ...
    def encode(self, m: Moment, v: Moment, v_stored: Moment, t: Array, betas: Betas) -> Stored: ...
    def decode(self, stored: Stored, v_stored: Moment, t: Array, betas: Betas) -> Moment: ...


@dataclass(frozen=True)
class ExactM:
    """float32, to see the other moment's error alone."""

    @property
    def bytes(self) -> float:
        return 4

    def encode(self, m: Moment, v: Moment, v_stored: Moment, t: Array, betas: Betas) -> Stored:
        return m

    def decode(self, stored: Stored, v_stored: Moment, t: Array, betas: Betas) -> Moment:
        return stored


@dataclass(frozen=True)
class SoftsignM:
    """int8 of 2x/(1+|x|) of x = m/maximum, float16 maximum: FlashOptim's."""

    block: int = 32

    @property
    def bytes(self) -> float:
        return 1 + 2 / self.block

    def encode(self, m: Moment, v: Moment, v_stored: Moment, t: Array, betas: Betas) -> Stored:
        scale = largest(jnp.abs(m), self.block)
        x = by_block(m, scale, safe)
        code = jnp.clip(jnp.floor(254 * x / (1 + jnp.abs(x)) + 0.5), -127, 127)
        return code.astype(jnp.int8), scale.astype(jnp.float16)

    def decode(self, stored: Stored, v_stored: Moment, t: Array, betas: Betas) -> Moment:
        x = stored[0].astype(jnp.float32) / 127
        return by_block(x / (2 - jnp.abs(x)), stored[1].astype(jnp.float32))


@dataclass(frozen=True)
class DynamicM:
    """bitsandbytes: m/maximum by its signed table, float32 maximum."""

    block: int = 256
    exponents: int = 7

    @property
    def bytes(self) -> float:
        return (1 + self.exponents) / 8 + 4 / self.block

    def encode(self, m: Moment, v: Moment, v_stored: Moment, t: Array, betas: Betas) -> Stored:
        scale = largest(jnp.abs(m), self.block)
        return nearest_in(dynamic_code(True, self.exponents), by_block(m, scale, safe)), scale

    def decode(self, stored: Stored, v_stored: Moment, t: Array, betas: Betas) -> Moment:
        return by_block(jnp.asarray(dynamic_code(True, self.exponents))[stored[0]], stored[1])


@dataclass(frozen=True)
class Fp8M:
    """e4m3 of m/maximum·448, float32 maximum."""

    block: int = 128

    @property
    def bytes(self) -> float:
        return 1 + 4 / self.block

    def encode(self, m: Moment, v: Moment, v_stored: Moment, t: Array, betas: Betas) -> Stored:
        scale = largest(jnp.abs(m), self.block) / 448
        x = jnp.clip(by_block(m, scale, safe), -448, 448)
        return x.astype(jnp.float8_e4m3fn), scale

    def decode(self, stored: Stored, v_stored: Moment, t: Array, betas: Betas) -> Moment:
        return by_block(stored[0].astype(jnp.float32), stored[1])


@dataclass(frozen=True)
class Power:
    """|q| = xᵖ."""

    p: float

    def compress(self, q: Array, s: Array) -> Array:
        return q ** (1 / self.p)

    def expand(self, x: Array, s: Array) -> Array:
        return x**self.p


@dataclass(frozen=True)
class Rational:
    """|q| = s·x/(1+s-x): the steps are fine below s. Each direction costs one division.

    s is `sigmas` times the size of q for gradients that are noise (`Betas.noise_ratio`).
    """

    sigmas: float = 3

    def compress(self, q: Array, s: Array) -> Array:
        s = self.sigmas * s
        return (1 + s) * q / (s + q)

    def expand(self, x: Array, s: Array) -> Array:
        s = self.sigmas * s
        return s * x / (1 + s - x)


@dataclass(frozen=True)
class Sinh:
    """|q| = sinh(a·x)/sinh(a): linear below 1/sinh(a) = `sigmas`, then logarithmic."""

    sigmas: float = 1

    def compress(self, q: Array, s: Array) -> Array:
        s = self.sigmas * s
        return jnp.arcsinh(q / s) / jnp.arcsinh(1 / s)

    def expand(self, x: Array, s: Array) -> Array:
        s = self.sigmas * s
        return s * jnp.sinh(x * jnp.arcsinh(1 / s))


@dataclass(frozen=True)
class Relative:
    """int8 of q = m/(C·√v), companded by a curve; |q| <= 1 by Cauchy-Schwarz, so without a scale.

    `of_stored`: whether the √v of q is the stored one; it is the exact one otherwise, whose error
    cancels in the update. `subtract`: whether the dither is subtracted again in decoding.
    """

    curve: Power | Rational | Sinh
    rounding: str = "weyl"
    of_stored: bool = True
    subtract: bool = False
    levels: int = 127
    salt: ClassVar[int] = 0x68E31DA4

    @property
    def bytes(self) -> float:
        return 1

    def shift(self, shape: tuple[int, ...], t: Array) -> Array:
        return unit(dither(self.rounding, shape, t, self.salt))

    def encode(self, m: Moment, v: Moment, v_stored: Moment, t: Array, betas: Betas) -> Stored:
        n, s = self.levels, betas.noise_ratio(t)
        root = jnp.sqrt(v_stored if self.of_stored else v)
        q = jnp.clip(safe(m, betas.largest_ratio(t) * root), -1, 1)
        x = jnp.abs(q)
        u = self.shift(m.shape, t)
        y = n * self.curve.compress(x, s)
        if self.subtract:
            code = jnp.clip(jnp.floor(jnp.sign(q) * y + u), -n, n)
        else:
            below = jnp.floor(y)
            low = self.curve.expand(below / n, s)
            high = self.curve.expand((below + 1) / n, s)
            above = y - below >= 0.5 if self.rounding == "nearest" else x - low > u * (high - low)
            code = jnp.sign(q) * jnp.minimum(below + above, n)
        return jnp.where(v_stored > 0, code, 0).astype(jnp.int16)

    def decode(self, stored: Stored, v_stored: Moment, t: Array, betas: Betas) -> Moment:
        y = stored.astype(jnp.float32)
        if self.subtract:
            y = jnp.clip(y + 0.5 - self.shift(stored.shape, t), -self.levels, self.levels)
        q = jnp.sign(y) * self.curve.expand(jnp.abs(y) / self.levels, betas.noise_ratio(t))
        return q * (betas.largest_ratio(t) * jnp.sqrt(v_stored))
