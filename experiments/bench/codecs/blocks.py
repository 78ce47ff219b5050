"""What the codes share: the scale of each block, and dithers that decide on the rounding."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt32

# Not public: the dither of jadam's own codes, which is a candidate here.
from jadam._rounding import weyl

Stored: TypeAlias = Any
"""What a code keeps of a moment from one step to the next: an array, or several."""


def dither(rounding: str, shape: tuple[int, ...], t: Array, salt: int) -> UInt32[Array, "..."]:
    """What is added to a number before it is cut, in units of 2⁻³².

    "nearest" adds a half, "weyl" jadam's low-discrepancy sequence, "hash" pseudo-random bits.
    """
    if rounding == "nearest":
        return jnp.full(shape, np.uint32(1 << 31))
    if rounding == "weyl":
        return weyl(shape, t, salt)
    x = lax.iota(jnp.uint32, int(np.prod(shape))).reshape(shape) * np.uint32(0x9E3779B9)
    x = x ^ (t.astype(jnp.uint32) * np.uint32(0x85EBCA6B) + np.uint32(salt))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * np.uint32(factor)
    return x ^ (x >> 16)


def unit(u: UInt32[Array, "..."]) -> Float[Array, "..."]:
    """The upper 24 bits as a number in [0, 1), which float32 holds exactly."""
    return (u >> 8).astype(jnp.float32) * 2.0**-24


def largest(x: Array, block: int) -> Array:
    """The maximum of each block, as a column; NaN and infinity do not count."""
    return jnp.where(x < jnp.inf, x, 0).reshape(-1, block).max(1, keepdims=True)


def by_block(x: Array, scale: Array, f: Callable = jnp.multiply) -> Array:
    """f(x, scale) with `scale` one for each block of x."""
    return f(x.reshape(len(scale), -1), scale).reshape(x.shape)


def safe(x: Array, y: Array) -> Array:
    """x/y, and 0 where y is 0."""
    return jnp.where(y > 0, x / jnp.where(y > 0, y, 1), 0)
