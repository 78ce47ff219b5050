"""Weights of 16 bits that stand for more: how a parameter lies between two steps.

A 16-bit parameter that moves by less than half a unit in its last place rounds back to itself.
Either a residual keeps what the rounding took, or the rounding is random and right in the mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int32, Integer, UInt32

from jadam._rounding import elements_before, grid, weyl
from jadam._types import DType

_LARGEST = 0x7F7F  # the upper half of the bits of bfloat16's largest finite number
_SIGN = np.int32(-(2**31))


@runtime_checkable
class Weights(Protocol):
    """How a parameter lies between two steps, and what else belongs to it."""

    @property
    def taken(self) -> int:
        """How many further arrays a step takes."""
        ...

    @property
    def kept(self) -> int:
        """How many of them, the first ones, have a next value."""
        ...

    @property
    def divides(self) -> bool:
        """Whether a device can step its shard without knowing where it lies."""
        ...

    def load(self, p: Array, extra: Sequence[Array]) -> Float32[Array, "*shape"]:
        """The weight that is trained, in float32."""
        ...

    def store(
        self, master: Float32[Array, "*shape"], p: Array, extra: Sequence[Array]
    ) -> tuple[Float32[Array, "*shape"], tuple[Array, ...]]:
        """The update that takes p to the weight, and what belongs to it then."""
        ...


@dataclass(frozen=True)
class Compensated:
    """A bfloat16 parameter with a residual of 8 or 16 bits.

    Attributes:
        residual_dtype: int8 or int16.
        place: the leaf's place among all, a salt: leaves of one shape are dithered apart.
    """

    residual_dtype: np.dtype
    place: int
    kept = 1
    divides = True

    @property
    def taken(self) -> int:
        """The residual, and for int8 the dither's count."""
        return 2 if self.residual_dtype == jnp.int8 else 1

    def __str__(self) -> str:
        return f"compensated {self.residual_dtype}"

    def load(self, p: Array, extra: Sequence[Array]) -> Float32[Array, "*shape"]:
        """The parameter with its residual; `extra` is that and, for int8, the dither's count."""
        return join(p, extra[0])

    def store(
        self, master: Float32[Array, "*shape"], p: Array, extra: Sequence[Array]
    ) -> tuple[Float32[Array, "*shape"], tuple[Array, ...]]:
        """The update to the nearest bfloat16, and the residual there."""
        _, *dither = extra
        phase = weyl(p.shape, dither[0], self.place) if dither else None
        update, residual = split(master, p, self.residual_dtype, phase)
        return update, (residual,)


@dataclass(frozen=True)
class Stochastic:
    """A parameter of 16 bits that is rounded randomly in each step, by two words a leaf."""

    dtype: np.dtype
    taken = 1
    kept = 0
    divides = False  # the random bits are those of the element's place among all

    def __str__(self) -> str:
        return f"stochastic {self.dtype}"

    def load(self, p: Array, extra: Sequence[Array]) -> Float32[Array, "*shape"]:
        """The parameter itself."""
        del extra
        return p.astype(jnp.float32)

    def store(
        self, master: Float32[Array, "*shape"], p: Array, extra: Sequence[Array]
    ) -> tuple[Float32[Array, "*shape"], tuple[Array, ...]]:
        """The update to one of the two neighbours; `extra` is the random words."""
        (words,) = extra
        rounded = round_randomly(master, self.dtype, random_bits(words, p.shape))
        return difference(rounded, p.astype(jnp.float32)), ()


# One array. float32's bits as an integer, with the magnitude negated below zero, count the float32
# numbers in their order. A bfloat16 number is every 65,536th of them.


def _ordered(x: Float32[Array, "*shape"]) -> Int32[Array, "*shape"]:
    bits = lax.bitcast_convert_type(x, jnp.int32)
    sign = bits >> 31
    return ((bits & ~_SIGN) ^ sign) - sign


def _exactly(p: Float[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """A bfloat16 array in float32, subnormal numbers too, which a conversion may flush."""
    upper = lax.bitcast_convert_type(p, jnp.int16).astype(jnp.int32)
    return lax.bitcast_convert_type(upper << 16, jnp.float32)


def join(p: Float[Array, "*shape"], residual: Integer[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """The master weight: the float32 number that lies `residual` steps from p.

    A step is one float32 number for an int16 residual, 256 for int8.
    """
    x = _exactly(p)
    bits = lax.bitcast_convert_type(x, jnp.int32)
    shift = 16 - jnp.iinfo(residual.dtype).bits
    order = _ordered(x) + (residual.astype(jnp.int32) << shift)
    joined = jnp.abs(order) | (jnp.where(order == 0, bits, order) & _SIGN)
    return lax.bitcast_convert_type(jnp.where(jnp.isfinite(x), joined, bits), jnp.float32)


def difference(
    target: Float32[Array, "*shape"], x: Float32[Array, "*shape"]
) -> Float32[Array, "*shape"]:
    """u with x + u = target, finite for finite arguments; -0 where nothing moves, also ±0 and ±∞.

    Wrong only where x is 2¹⁶ and more times the target and the target has digits below x's last.
    """
    same = lax.bitcast_convert_type(target, jnp.int32) == lax.bitcast_convert_type(x, jnp.int32)
    largest = float(jnp.finfo(jnp.float32).max)
    moved = jnp.where(jnp.isfinite(target), jnp.clip(target - x, -largest, largest), target)
    return jnp.where(same, -0.0, moved)


def split(
    master: Float32[Array, "*shape"],
    p: Float[Array, "*shape"],
    dtype: DType,
    dither: UInt32[Array, "*shape"] | None = None,
) -> tuple[Float32[Array, "*shape"], Integer[Array, "*shape"]]:
    """The update that takes p to the bfloat16 number nearest to `master`, and the residual there.

    The residual is taken from the number that p + update rounds to. An int8 residual has its last
    bit dithered, up as often as the master lies above. Finite masters stay finite: past the middle
    between bfloat16's largest number and infinity they are brought back to it.
    """
    shift = 16 - jnp.iinfo(dtype).bits
    order, x = _ordered(master), _exactly(p)
    finite = jnp.isfinite(master)
    if shift and dither is not None:
        order += (dither >> (32 - shift)).astype(jnp.int32)
    upper = jnp.clip((order + 2**15) >> 16, -_LARGEST, _LARGEST)
    sign = lax.bitcast_convert_type(master, jnp.int32) & _SIGN
    target = lax.bitcast_convert_type((jnp.abs(upper) << 16) | sign, jnp.float32)
    update = difference(jnp.where(finite, target, master), x)
    # XLA may drop a conversion to bfloat16 and back, but not this.
    landed = _ordered(lax.reduce_precision(x + update, 8, 7))
    residual = (jnp.clip(order, landed - 2**15, landed + (2**15 - 1)) - landed) >> shift
    return update, jnp.where(finite, residual, 0).astype(dtype)


def random_bits(words: UInt32[Array, "2"], shape: tuple[int, ...]) -> UInt32[Array, "*shape"]:
    """32 random bits for each element, from two random words and the element's index.

    Wellons' lowbias32 twice. For one element over the steps it is as random as the words are; it
    is fused into what uses it, where threefry takes 16 bytes an element for itself and, on a CPU,
    50 times as long. The same under every sharding.
    """
    bits = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        index = lax.broadcasted_iota(jnp.uint32, shape, axis)
        bits += index * np.uint32(stride % 2**32)
        stride *= shape[axis]
    bits += elements_before(stride)
    for word in words:
        bits ^= word
        bits = (bits ^ (bits >> 16)) * np.uint32(0x7FEB352D)
        bits = (bits ^ (bits >> 15)) * np.uint32(0x846CA68B)
        bits ^= bits >> 16
    return bits


def round_randomly(
    x: Float32[Array, "*shape"], dtype: jnp.dtype, bits: UInt32[Array, "*shape"]
) -> Float32[Array, "*shape"]:
    """x as one of its two neighbours in `dtype`, with mean x to 2⁻²⁴ of their distance.

    What `dtype` has stays. Past its largest finite number it is a plain conversion.
    """
    info = jnp.finfo(dtype)
    s = grid(x, dtype)
    steps = jnp.abs(x) / s
    below = jnp.floor(steps)
    up = (bits >> 8).astype(jnp.float32) * 2.0**-24 < steps - below
    rounded = jnp.copysign((below + up.astype(jnp.float32)) * s, x)
    beyond = lax.reduce_precision(x, info.nexp, info.nmant)
    return jnp.where(jnp.abs(x) <= float(info.max), rounded, beyond)
