"""The lattices on which codes lie: levels of √v, and how v's and m's codes share an integer."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Integer
from numpy.polynomial import chebyshev

from jadam._types import Real

Both = Integer[Array, "..."]
Code = Int[Array, "..."]
Level = Int[Array, "..."]


@dataclass(frozen=True)
class Lattice:
    """A logarithmic lattice of √v, and a code of v and one of m in one integer.

    Attributes:
        name: of the storage.
        asked: the `mu_dtype` and the `nu_dtype` that stand for it.
        dtype: of the integer.
        per_octave: levels of √v in a factor 2: a power of two.
        top: the highest code of v that is a number. 0 is zero, and top + 1 is NaN.
        sizes: codes of m on either side of 0.
        dense: half of m's codes are for ratios up to this many times that of noise (`Curve`).
        bend: how far the rounding between two levels is from a linear one (`rounded`).
        parts: how many of them are a level, where a maximum's distance above √v is counted.
    """

    name: str
    asked: tuple[str, str]
    dtype: np.dtype
    per_octave: int
    top: int
    sizes: int
    dense: float
    bend: float = 0.0
    parts: int = 1

    @property
    def in_parts(self) -> "Lattice":
        """The lattice of maxima, whose levels are parts of these."""
        return dataclasses.replace(self, per_octave=self.per_octave * self.parts)

    @property
    def nan(self) -> int:
        """v's code of what is not finite."""
        return self.top + 1

    @property
    def is_coarse(self) -> bool:
        """Whether roundings have to be unbiased where codes are not evenly spaced."""
        return self.bend > 0

    # The largest code of v in a block is found among values of `seen`, which have the order of the
    # codes. A reduction applies it to its own results too, so seen(seen(x)) is seen(x).

    def seen(self, both: Both) -> Both:
        """What says how large v's code is, still as a value of `both`; 0 for NaN's code."""
        raise NotImplementedError

    def code_of(self, both: Both) -> Code:
        """v's code."""
        raise NotImplementedError

    def size_of(self, both: Both) -> Code:
        """m's code, in ±sizes."""
        raise NotImplementedError

    def both_of(self, code: Code, size: Code) -> Both:
        """The integer of a code of v and one of m."""
        raise NotImplementedError

    def power_of_two(self, level: Level) -> Float[Array, "..."]:
        """2^(level/per_octave): whole octaves as exponent bits, the rest by the polynomial."""
        shift = self.per_octave.bit_length() - 1
        octave = lax.bitcast_convert_type(((level >> shift) + 127) << 23, jnp.float32)
        if self.per_octave == 1:
            return octave
        part = (level & (self.per_octave - 1)).astype(jnp.float32) * (1 / self.per_octave)
        return octave * _polynomial(EXP2, part)

    def level(self, x: Real, power: int) -> Float[Array, "..."]:
        """The level of √x (power 2) or x (power 1); any number where x is 0, infinite or NaN."""
        bits = lax.bitcast_convert_type(x, jnp.int32)
        mantissa = lax.bitcast_convert_type((bits & 0x7FFFFF) | 0x3F800000, jnp.float32)
        log2 = ((bits >> 23) - 127).astype(jnp.float32) + _polynomial(LOG2, mantissa - 1)
        return log2 * (self.per_octave / power)

    def level_above(self, x: Real, power: int) -> Level:
        """The least level that is not below x, but for a hundredth, by which logarithms are off."""
        return -floor(0.01 - self.level(x, power))

    def rounded(self, level: Float[Array, "..."], dither: Real) -> Level:
        """One of the two levels around `level`: the nearer the upper one is, the more often it.

        On a fine lattice the chance of the upper level is the part x of a level above the lower
        one, which keeps the mean of log √v. Once v has come to rest, the mean of 1/v is then right,
        and the mean update, which goes with 1/√v, is short by an eighth of the variance of log v:
        nothing for 32 levels an octave, much for one. So on a coarse lattice the rounding keeps the
        mean of v^¼, with which the mean of 1/√v is right to second order. Its chance of the upper
        level, (2^(x/2) - 1)/(√2 - 1) for levels of an octave, is x - bend·x·(1 - x) with a bend of
        0.173, to 4e-4.
        """
        if not self.is_coarse:
            return floor(level + dither)
        lower = jnp.floor(level)
        part = level - lower
        return floor(lower + jnp.floor(part - self.bend * part * (1 - part) + dither))


class _Split(Lattice):
    """m's code in the upper bits, v's in the lower."""

    @property
    def _bits(self) -> int:
        return self.nan.bit_length()

    def seen(self, both: Both) -> Both:
        code = both & self.nan
        return jnp.where(code == self.nan, jnp.zeros_like(code), code)

    def code_of(self, both: Both) -> Code:
        return (both & self.nan).astype(jnp.int32)

    def size_of(self, both: Both) -> Code:
        return (both >> self._bits).astype(jnp.int32) - (self.sizes + 1)

    def both_of(self, code: Code, size: Code) -> Both:
        return ((size + self.sizes + 1) * (self.nan + 1) + code).astype(self.dtype)


class _Mixed(Lattice):
    """Both codes are digits of one number, whose base is how many codes m has; v's is the upper.

    Where v is 0, the integer is 0, whatever m's code. The largest integer is NaN.
    """

    @property
    def _base(self) -> int:
        return 2 * self.sizes + 1

    @property
    def _last(self) -> int:
        return int(np.iinfo(self.dtype).max)

    def seen(self, both: Both) -> Both:
        return jnp.where(both == self._last, jnp.zeros_like(both), both)

    def code_of(self, both: Both) -> Code:
        # ⌈both/base⌉, by a product: exact for bytes (test_codec.py).
        return ((both.astype(jnp.int32) + self._base - 1) * (2**16 // self._base + 1)) >> 16

    def size_of(self, both: Both) -> Code:
        return both.astype(jnp.int32) - self._base * self.code_of(both) + self.sizes

    def both_of(self, code: Code, size: Code) -> Both:
        mixed = self._base * code + size - self.sizes
        mixed = jnp.where(code == self.nan, self._last, jnp.maximum(mixed, 0))
        return mixed.astype(self.dtype)


EIGHT_BITS = _Split(
    "8-bit codes", ("int8", "uint8"), np.dtype(np.uint16), 32, top=510, sizes=63, dense=3.0
)
"""16 octaves of √v in 9 bits, m in 7."""
FOUR_BITS = _Mixed(
    *("4-bit codes", ("int4", "uint4"), np.dtype(np.uint8), 1),
    top=12,
    sizes=10,
    dense=2.0,
    bend=0.173,
    parts=16,
)
"""12 octaves of √v, the powers of two, and 21 codes of m: 252 of a byte's 256 values."""
LATTICES = (EIGHT_BITS, FOUR_BITS)


def floor(x: Real) -> Int[Array, "..."]:
    """⌊x⌋ as an integer."""
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
