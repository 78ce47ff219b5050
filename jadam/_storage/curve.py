"""The curve on which the code of a first moment lies: fine where moments are, and bounded."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jadam._math import Ratio
from jadam._types import Real, Scalar


class Curve(NamedTuple):
    """x in [-1, 1] ↦ r = a·x/(s - |x|), r the first moment over the root of the second.

    a = dense·noise and s = 1 + a/limit, so that x = 1 is the limit. Half of the codes are for sizes
    up to `dense` times the noise: three times, where 99.7% of a normal distribution lie, or twice,
    95%, where codes are few. The other half reaches from there to the limit.
    """

    a: Scalar
    s: Scalar

    @classmethod
    def of(cls, ratio: Ratio, dense: float) -> "Curve":
        """The curve for one time."""
        a = dense * ratio.noise
        return cls(a, 1 + a / ratio.limit)

    def expand(self, x: Real) -> Real:
        """r of x."""
        return self.a * x * _reciprocal(self.s - jnp.abs(x))

    def compress(self, r: Real, dither: Real, levels: int, *, unbiased: bool = False) -> Real:
        """The code of r in ±levels: y = levels·x for r = expand(x), rounded by a dither in [0, 1).

        No code is beyond the limit. The rounding keeps the mean of x, but the curve is not
        straight. With many levels that leaves a bias of at most 4e-5 where moments are. With few
        it would make updates longer: `unbiased` keeps the mean of r. Between the codes k and
        k + 1 the chance of the upper one is then (y - k)·(e - k - 1)/(e - y) with e = levels·s,
        since r(x) - r(y) = a·s·(x - y)/((s - x)·(s - y)).
        """
        size, end = jnp.abs(r), levels * self.s
        if not unbiased:
            code = jnp.floor(end * size / (self.a + size) + dither)
            return jnp.copysign(jnp.minimum(code, levels), r)
        y = end * size * _reciprocal(self.a + size)
        lower = jnp.floor(y)
        # e - y = e·a/(a + size)
        chance = (y - lower) * (end - lower - 1) * (self.a + size) * (1 / (end * self.a))
        # Past the limit it would be negative.
        code = lower + jnp.floor(jnp.clip(chance, 0, 1) + dither)
        return jnp.copysign(jnp.minimum(code, levels), r)


def _reciprocal(x: Real) -> Real:
    """1/x for positive float32 x: Newton's iteration from a guess with the negated exponent.

    XLA:CPU stores a quotient that is used twice as a whole array, but recomputes sums and products.
    """
    bits = lax.bitcast_convert_type(x, jnp.int32)
    y = lax.bitcast_convert_type(np.int32(0x7EF311C7) - bits, jnp.float32)
    for _ in range(3):
        y = y * (2 - x * y)
    return y
