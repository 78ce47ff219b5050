"""The equations, each once, for one array.

Every member of the family is a function of the step and its hyperparameters that returns the
member's equations `(g, *moments) -> (direction, moments)`. What depends on the step alone is
computed before, once for all leaves. The parameter moves by -learning_rate * direction.

All arrays come in float32 or wider. A hyperparameter is a Python number, whose `1 - b` and
`log b` are then taken in float64, or an array of any float dtype.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jadam._rounding import spacing, weyl
from jadam._types import Count, Leaf, Real, Scalar


def widen(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype that numbers of `dtype` are computed in: itself, at least float32."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else dtype


class Step(NamedTuple):
    """The step number t, counting from 1, and this step's dither in (-½, ½)."""

    t: Float[Array, ""]
    dither: Float[Array, ""]

    @classmethod
    def of(cls, count: Count, dtype: jnp.dtype) -> "Step":
        """t = count in `dtype`, with a Weyl dither for float32 and none for float64."""
        u = (weyl((), count) >> 8).astype(dtype) * 2.0**-24 - (0.5 - 2.0**-25)
        return cls(count.astype(dtype), u if dtype == jnp.float32 else jnp.zeros_like(u))


def _reciprocal(x: Real) -> Real:
    """1/x for positive float32 x, by Newton's iteration from a guess with the exponent negated.

    XLA:CPU keeps a quotient that is used twice in memory; products and sums it computes again.
    """
    bits = lax.bitcast_convert_type(x, jnp.int32)
    y = lax.bitcast_convert_type(np.int32(0x7EF311C7) - bits, jnp.float32)
    for _ in range(3):
        y = y * (2 - x * y)
    return y


class Ratio(NamedTuple):
    """m/√v (AdaMax: m/u) after a step: its size for gradients of noise, and its limit.

    The limit of what is stored is the bound, or 200 times the noise where that is less.
    """

    noise: Scalar
    limit: Scalar

    @property
    def curve(self) -> tuple[Scalar, Scalar]:
        """a and s of `expand`."""
        return 3 * self.noise, 1 + 3 * self.noise / self.limit

    def expand(self, x: Real) -> Real:
        """x in [-1, 1] to r = a·x/(s - |x|), a = 3·noise, s = 1 + a/limit: fine near 0."""
        a, s = self.curve
        return a * x * _reciprocal(s - jnp.abs(x))

    def compress(self, r: Real, u: Real, levels: int) -> Real:
        """r to a code in ±levels, levels·x with r = expand(x), dithered by u in [0, 1).

        No code is beyond the limit. The dither is even in x; that r is not, is 4e-5 of bias at most
        where moments are.
        """
        a, s = self.curve
        size = jnp.abs(r)
        code = jnp.floor(levels * s * size / (a + size) + u)
        return jnp.copysign(jnp.minimum(code, levels), r)


class Coefficients(NamedTuple):
    """One step of Adam or NAdam as numbers, for the native kernel.

    m_weight and g_weight are Nesterov's, both 0 without; dither is that of v, over 1 - b2.
    """

    complement1: Scalar
    complement2: Scalar
    dither: Scalar
    m_weight: Scalar
    g_weight: Scalar
    c1: Scalar
    c2: Scalar
    eps: Scalar
    eps_root: Scalar


class Equations(NamedTuple):
    """A member's equations at one step, and what the codes of its moments need to know of them.

    Attributes:
        step: `(g, *moments) -> (direction, moments)`.
        ratio: how m compares with the root of the second moment.
        power: 2 where the second moment is v, 1 where it is AdaMax's u.
        coefficients: the same as numbers, where the native kernel has the equations too.
    """

    step: Callable[..., tuple[Leaf, tuple[Leaf, ...]]]
    ratio: Ratio
    power: int = 2
    coefficients: Coefficients | None = None


class Decay(NamedTuple):
    """A decay rate b, as the equations need it."""

    rate: Scalar
    complement: Scalar
    log: Scalar

    @classmethod
    def of(cls, b: Scalar, dtype: jnp.dtype) -> "Decay":
        """b, 1 - b and log b: from float64 for a Python number, else from b's own dtype."""
        if isinstance(b, (int, float)):
            return cls(b, 1.0 - b, math.log(max(b, 1e-300)))
        b = jnp.asarray(b, widen(b.dtype))
        # Kept from -∞, which is NaN times t - 1 = 0; where it counts, b⁰ or b·bᵗ⁻¹, b is 0 itself.
        log = jnp.log1p(jnp.maximum(b - 1, jnp.finfo(b.dtype).eps - 1))
        return cls(*(x.astype(dtype) for x in (b, 1 - b, log)))


def _times(scalar: Scalar, x: Leaf) -> Leaf:
    """scalar * x in the dtype of x."""
    return jnp.asarray(scalar, x.dtype) * x


def divide(x: Leaf, y: Real) -> Leaf:
    """x / y for real y: a complex x is divided part by part, exactly as two real numbers."""
    if jnp.iscomplexobj(x):
        return lax.complex(x.real / y, x.imag / y)
    return x / y


def limit_range(g: Leaf) -> Leaf:
    """g with its finite values in ±2⁶³ (float32) or ±2⁵¹¹ (float64), so that g² and v are finite.

    Past √max no second moment can be stored. A gradient of constant size keeps the right update
    there, since m and √v are limited alike. Infinities and NaN pass, to be seen.
    """
    if jnp.iscomplexobj(g):
        return lax.complex(limit_range(g.real), limit_range(g.imag))
    limit = 2.0 ** (jnp.finfo(g.dtype).maxexp // 2 - 1)
    return jnp.where(jnp.isinf(g), g, jnp.clip(g, -limit, limit))


def square(g: Leaf) -> Real:
    """|g|²."""
    return g.real**2 + g.imag**2 if jnp.iscomplexobj(g) else g * g


def average(m: Leaf, x: Leaf, b: Decay) -> Leaf:
    """b·m + (1-b)·x as m + (1-b)·(x - m), which needs no rounded b."""
    return m + _times(b.complement, x - m)


def second_moment(v: Real, g: Leaf, b: Decay, step: Step) -> Real:
    """b·v + (1-b)·|g|², in float32 with a dithered rounding.

    Rounded to nearest, v stops short of |g|² once (1-b)·(|g|²-v) is under half a unit in v's last
    place: by up to 2⁻²⁴/(1-b), 0.3% at b = .99999. Under a dither of one unit it goes on moving.
    """
    toward = square(g) - v
    if v.dtype == jnp.float32:
        # A number times a power of two is exact: no fused product rounds it in another way.
        toward += _dither_of_v(b, step) * spacing(v)
    return v + _times(b.complement, toward)


def _dither_of_v(b: Decay, step: Step) -> Float[Array, ""]:
    """The dither over 1-b. From b = ½ on v cannot come below 0; under it no sum stops short."""
    return jnp.where(b.complement <= 0.5, step.dither / b.complement, 0)


def bias_correction(b: Decay, t: Float[Array, ""]) -> Float[Array, ""]:
    """1 - bᵗ as (1-b) - b·(bᵗ⁻¹ - 1), without cancellation and exact at t = 1."""
    return b.complement - b.rate * jnp.expm1((t - 1) * b.log)


def ratio(m: Leaf, c1: Real, v_hat: Real, eps: Scalar, eps_root: Scalar) -> Leaf:
    """m̂ / (√(v̂ + eps_root) + eps) with m̂ = m/c1, the direction of Algorithm 1.

    c1 multiplies the denominator: one division and one rounding less than m/c1 first. The root's
    argument is kept from 0 by 2⁻¹⁰³ (float64: 2⁻⁹⁷⁰), so that derivatives are finite, and so is
    the direction at eps = 0; gradients under 3e-16 then count as 0, since their squares are lost.
    """
    info = jnp.finfo(v_hat.dtype)
    eps, eps_root = (jnp.asarray(x, v_hat.dtype) for x in (eps, eps_root))
    root = jnp.sqrt(jnp.maximum(v_hat + eps_root, float(info.tiny / info.eps)))
    return divide(m, c1 * (root + eps))


def moment_ratio(b1: Decay, b2: Decay, t: Float[Array, ""]) -> Ratio:
    """For m and v: |m| <= C·√v with C² = (1-b1)²/(1-b2)·(1-ρᵗ)/(1-ρ), ρ = b1²/b2.

    By Cauchy and Schwarz, and step by step: C² becomes ρ·C² + (1-b1)²/(1-b2). Of gradients of
    noise E[m²] = (1-b1)/(1+b1)·(1-b1²ᵗ) and E[v] = 1-b2ᵗ.
    """
    t = jnp.maximum(t, 1)
    first = b1.complement / jnp.sqrt(jnp.asarray(b2.complement, t.dtype))
    bound = first * jnp.sqrt(_powers(2 * b1.log - b2.log, t))
    return _with_noise(jnp.sqrt(_noise_of_m(b1, t) / bias_correction(b2, t)), bound)


def norm_ratio(b1: Decay, b2: Decay, t: Float[Array, ""]) -> Ratio:
    """For m and AdaMax's u: |m| <= C·u with C = (1-b1)·(1-ρᵗ)/(1-ρ), ρ = b1/b2.

    Of noise the largest of many is about three times the root mean square.
    """
    t = jnp.maximum(t, 1)
    bound = b1.complement * _powers(b1.log - b2.log, t)
    return _with_noise(jnp.sqrt(_noise_of_m(b1, t)) / 3, bound)


def _powers(log_rho: Scalar, t: Float[Array, ""]) -> Float[Array, ""]:
    """1 + ρ + … + ρᵗ⁻¹, with ρ kept from 1, where it is t, and from overflow."""
    log_rho = jnp.asarray(log_rho, t.dtype)
    log_rho = jnp.minimum(jnp.where(jnp.abs(log_rho) < 1e-6, 1e-6, log_rho), 80)
    return jnp.expm1(t * log_rho) / jnp.expm1(log_rho)


def _noise_of_m(b1: Decay, t: Float[Array, ""]) -> Float[Array, ""]:
    """E[m²] over E[g²] of independent gradients."""
    return b1.complement / (1 + b1.rate) * -jnp.expm1(2 * t * b1.log)


def _with_noise(noise: Float[Array, ""], bound: Float[Array, ""]) -> Ratio:
    return Ratio(noise, jnp.minimum(bound, 200 * noise))


def adam(step: Step, *, b1: Scalar, b2: Scalar, eps: Scalar, eps_root: Scalar) -> Equations:
    """Adam, Kingma & Ba (2015), Algorithm 1.

    m = b1·m + (1-b1)·g,  v = b2·v + (1-b2)·g²,  m̂ = m/(1-b1ᵗ),  v̂ = v/(1-b2ᵗ)
    """
    t = step.t
    d1, d2 = Decay.of(b1, t.dtype), Decay.of(b2, t.dtype)
    c1, c2 = bias_correction(d1, t), bias_correction(d2, t)

    def equations(g: Leaf, m: Leaf, v: Real) -> tuple[Leaf, tuple[Leaf, Real]]:
        m = average(m, g, d1)
        v = second_moment(v, g, d2, step)
        return ratio(m, c1, v / c2, eps, eps_root), (m, v)

    dither = _dither_of_v(d2, step)
    numbers = Coefficients(d1.complement, d2.complement, dither, 0.0, 0.0, c1, c2, eps, eps_root)
    return Equations(equations, moment_ratio(d1, d2, t), coefficients=numbers)


class Momentum(NamedTuple):
    """The weights of m and of g in Nesterov's look-ahead m̂ = m_weight·m + g_weight·g."""

    m_weight: Float[Array, ""]
    g_weight: Float[Array, ""]

    def __call__(self, g: Leaf, m: Leaf) -> Leaf:
        """m̂."""
        return _times(self.m_weight, m) + _times(self.g_weight, g)


def nesterov(b1: Decay, t: Float[Array, ""]) -> Momentum:
    """Dozat (2016) with constant momentum: m̂ = b1·m/(1-b1ᵗ⁺¹) + (1-b1)·g/(1-b1ᵗ)."""
    return Momentum(b1.rate / bias_correction(b1, t + 1), b1.complement / bias_correction(b1, t))


def dozat(b1: Decay, t: Float[Array, ""], momentum_decay: Scalar) -> Momentum:
    """Dozat (2016), Algorithm 2, with its schedule μᵢ = b1·(1 - ½·0.96^(i·momentum_decay)).

    m̂ = μₜ₊₁·m/(1-M(t+1)) + (1-μₜ)·g/(1-M(t)) with M(t) = μ₁·…·μₜ.

    No product is kept in the state: with x = 0.96^momentum_decay, log(1 - ½xⁱ) = -Σₖ xⁱᵏ/(k·2ᵏ),
    and the sum over i is geometric, log M(t) = t·log b1 - Σₖ xᵏ·(1-xᵏᵗ)/(1-xᵏ)/(k·2ᵏ). Terms
    past k = 48 are below float64's rounding.
    """
    log_x = jnp.asarray(momentum_decay * math.log(0.96), t.dtype)
    k = jnp.arange(1, 49, dtype=t.dtype)
    weights = jnp.exp(k * log_x) / -jnp.expm1(k * log_x) / (k * 2**k)

    def mu(i: Float[Array, ""]) -> Float[Array, ""]:
        return b1.rate * (1 - 0.5 * jnp.exp(i * log_x))

    def one_minus_product(i: Float[Array, ""]) -> Float[Array, ""]:
        return -jnp.expm1(i * b1.log + jnp.sum(weights * jnp.expm1(i * k * log_x)))

    return Momentum(mu(t + 1) / one_minus_product(t + 1), (1 - mu(t)) / one_minus_product(t))


def nadam(
    step: Step,
    *,
    b1: Scalar,
    b2: Scalar,
    eps: Scalar,
    eps_root: Scalar,
    momentum_decay: Scalar | None = None,
) -> Equations:
    """Adam with Nesterov's momentum, Dozat (2016), without Algorithm 2's extra b2 in v̂."""
    t = step.t
    d1, d2 = Decay.of(b1, t.dtype), Decay.of(b2, t.dtype)
    look_ahead = nesterov(d1, t) if momentum_decay is None else dozat(d1, t, momentum_decay)
    c2 = bias_correction(d2, t)

    def equations(g: Leaf, m: Leaf, v: Real) -> tuple[Leaf, tuple[Leaf, Real]]:
        m = average(m, g, d1)
        v = second_moment(v, g, d2, step)
        return ratio(look_ahead(g, m), jnp.ones_like(t), v / c2, eps, eps_root), (m, v)

    dither = _dither_of_v(d2, step)
    numbers = Coefficients(
        d1.complement, d2.complement, dither, *look_ahead, jnp.ones_like(t), c2, eps, eps_root
    )
    return Equations(equations, moment_ratio(d1, d2, t), coefficients=numbers)


def amsgrad(
    step: Step,
    *,
    b1: Scalar,
    b2: Scalar,
    eps: Scalar,
    eps_root: Scalar,
    maximum: Literal["raw", "corrected"],
    bias_correction_mu: bool,
    bias_correction_nu: bool,
) -> Equations:
    """AMSGrad, Reddi, Kale & Kumar (2018), Algorithm 2, with Adam's bias corrections.

    raw:        v_max = max(v_max, v),          v̂ = v_max/(1-b2ᵗ)
    corrected:  v_max = max(v_max, v/(1-b2ᵗ)),  v̂ = v_max
    """
    t = step.t
    d1, d2 = Decay.of(b1, t.dtype), Decay.of(b2, t.dtype)
    one = jnp.ones_like(t)
    c1 = bias_correction(d1, t) if bias_correction_mu else one
    c2 = bias_correction(d2, t) if bias_correction_nu else one
    before, after = (c2, one) if maximum == "corrected" else (one, c2)

    def equations(g: Leaf, m: Leaf, v: Real, v_max: Real) -> tuple[Leaf, tuple[Leaf, Real, Real]]:
        m = average(m, g, d1)
        v = second_moment(v, g, d2, step)
        v_max = jnp.maximum(v_max, v / before)
        return ratio(m, c1, v_max / after, eps, eps_root), (m, v, v_max)

    return Equations(equations, moment_ratio(d1, d2, t))


def adamax(step: Step, *, b1: Scalar, b2: Scalar, eps: Scalar) -> Equations:
    """AdaMax, Kingma & Ba (2015), Algorithm 2, with eps beside |g| as in torch and optax.

    u = max(b2·u, |g| + eps),  direction = m/(1-b1ᵗ)/u
    """
    t = step.t
    d1, d2 = Decay.of(b1, t.dtype), Decay.of(b2, t.dtype)
    c1 = bias_correction(d1, t)

    def equations(g: Leaf, m: Leaf, u: Real) -> tuple[Leaf, tuple[Leaf, Real]]:
        m = average(m, g, d1)
        u = jnp.maximum(u - d2.complement * u, jnp.abs(g) + jnp.asarray(eps, u.dtype))
        return divide(m, c1 * jnp.where(u == 0, 1, u)), (m, u)

    return Equations(equations, norm_ratio(d1, d2, t), power=1)


def sma_length(b2: Decay, t: Float[Array, ""]) -> Float[Array, ""]:
    """ρₜ = ρ∞ - 2t·b2ᵗ/(1-b2ᵗ) with ρ∞ = 2/(1-b2) - 1, Liu et al. (2020), Algorithm 2.

    With y = -t·log b2 it is ρ∞ - 2t/(eʸ-1), which cancels almost wholly for small y. There the
    series of 1/(eʸ-1) gives t·(1 - y/6·(1 - y²/60·(1 - y²/42·(1 - y²/40)))) + (ρ∞ + 2/log b2).
    """
    y = -t * b2.log
    limit = 2 / b2.complement - 1
    if isinstance(b2.log, float):
        gap = limit + 2 / b2.log
    else:
        d = b2.complement
        gap = d * (1 / 6 + d * (1 / 12 + d * (19 / 360 + d * (3 / 80 + d * (863 / 30240)))))
    y2 = y * y
    small = t * (1 - y / 6 * (1 - y2 / 60 * (1 - y2 / 42 * (1 - y2 / 40)))) + gap
    return jnp.where(y < 0.25, small, limit - 2 * t / jnp.expm1(jnp.maximum(y, 0.25)))


def rectification(rho: Float[Array, ""], limit: Scalar) -> Float[Array, ""]:
    """rₜ² = (ρₜ-4)(ρₜ-2)ρ∞ / ((ρ∞-4)(ρ∞-2)ρₜ), Liu et al. (2020), Algorithm 2."""
    return (rho - 4) / (limit - 4) * ((rho - 2) / (limit - 2)) * (limit / rho)


def radam(
    step: Step,
    *,
    b1: Scalar,
    b2: Scalar,
    eps: Scalar,
    eps_root: Scalar,
    threshold: Scalar,
    nesterov_momentum: bool,
) -> Equations:
    """Rectified Adam, Liu et al. (2020), Algorithm 2.

    direction = rₜ·m̂/(√(v̂ + eps_root) + eps) where ρₜ >= threshold, else m̂
    """
    t = step.t
    d1, d2 = Decay.of(b1, t.dtype), Decay.of(b2, t.dtype)
    c1, c2 = bias_correction(d1, t), bias_correction(d2, t)
    look_ahead = nesterov(d1, t)
    rho = sma_length(d2, t)
    tractable = rho >= jnp.asarray(threshold, t.dtype)
    r = jnp.sqrt(jnp.where(tractable, rectification(rho, 2 / d2.complement - 1), 1))

    def equations(g: Leaf, m: Leaf, v: Real) -> tuple[Leaf, tuple[Leaf, Real]]:
        m = average(m, g, d1)
        v = second_moment(v, g, d2, step)
        m_hat = look_ahead(g, m) if nesterov_momentum else divide(m, c1)
        adaptive = _times(r, ratio(m_hat, jnp.ones_like(t), v / c2, eps, eps_root))
        return jnp.where(tractable, adaptive, m_hat), (m, v)

    return Equations(equations, moment_ratio(d1, d2, t))
