"""The step of Adam that all candidates take, and how large m can be beside √v."""

from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Moment: TypeAlias = Float[Array, "blocks 128"]
EPS = 1e-8


class Betas(NamedTuple):
    """The decay rates b, with 1 - b and log b as float64 computes them.

    All are float32 arrays and not Python numbers, so that one compilation serves every pair.
    """

    b1: Array
    c1: Array
    log_b1: Array
    b2: Array
    c2: Array
    log_b2: Array

    @classmethod
    def of(cls, b1: float, b2: float) -> "Betas":
        values = b1, 1 - b1, np.log(b1), b2, 1 - b2, np.log(b2)
        return cls(*(jnp.float32(x) for x in values))

    def largest_ratio(self, t: Array) -> Float[Array, ""]:
        """C, the most that |m|/√v can be: C² = (1-b1)²/(1-b2)·(1-ρᵗ)/(1-ρ) with ρ = b1²/b2.

        A step of Adam keeps |m| <= C·√v from where it holds: C² becomes ρC² + (1-b1)²/(1-b2).
        """
        log_rho = 2 * self.log_b1 - self.log_b2
        powers = jnp.expm1(jnp.maximum(t, 1).astype(jnp.float32) * log_rho) / jnp.expm1(log_rho)
        return self.c1 * jnp.sqrt(powers / self.c2)

    def noise_ratio(self, t: Array) -> Float[Array, ""]:
        """How large m/√v is for gradients that are noise, as a part of C, the most it can be.

        For noise of variance 1, E[m²] = (1-b1)²·(1-b1²ᵗ)/(1-b1²) and E[v] = 1-b2ᵗ.
        """
        t = jnp.maximum(t, 1).astype(jnp.float32)
        m2 = self.c1 / (1 + self.b1) * -jnp.expm1(2 * t * self.log_b1)
        return jnp.sqrt(m2 / -jnp.expm1(t * self.log_b2)) / self.largest_ratio(t)

    def step(self, m: Moment, v: Moment, g: Moment) -> tuple[Moment, Moment]:
        """The moments after another gradient."""
        return m + self.c1 * (g - m), v + self.c2 * (g * g - v)

    def corrections(self, t: Array) -> tuple[Array, Array]:
        """1 - b1ᵗ and 1 - b2ᵗ."""
        t = t.astype(jnp.float32)
        return -jnp.expm1(t * self.log_b1), -jnp.expm1(t * self.log_b2)
