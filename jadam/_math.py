"""The equations, each once, for one array.

Every member of the family is a function of the time and its hyperparameters. It returns the
member's equations `(g, *moments) -> (direction, moments)`. What depends on the time alone is
computed before them, once for all leaves. The parameter moves by -learning_rate * direction.

All arrays come in float32 or wider. A hyperparameter is either a Python number, whose `1 - b` and
`log b` are taken in float64, or an array of any float dtype.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax.numpy as jnp
from jax import lax
from jax.scipy.special import digamma
from jaxtyping import Array, Bool, Float, Int

from jadam._rounding import spacing, weyl
from jadam._types import Number, Real, Scalar


def widen(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype that numbers of `dtype` are computed in: itself, at least float32."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else dtype


class Time(NamedTuple):
    """When a step is made.

    Attributes:
        t: its number, counting from 1.
        dither: of this step, in (-½, ½).
        made: the number of updates made before it, which schedules are functions of.
    """

    t: Float[Array, "..."]
    dither: Float[Array, "..."]
    made: Int[Array, "..."]

    @classmethod
    def of(cls, count: Int[Array, "..."], dtype: jnp.dtype) -> "Time":
        """t = count in `dtype`, with a Weyl dither for float32 and none for float64."""
        made = jnp.maximum(count - 1, 0)
        u = (weyl((), count) >> 8).astype(dtype) * 2.0**-24 - (0.5 - 2.0**-25)
        return cls(count.astype(dtype), u if dtype == jnp.float32 else jnp.zeros_like(u), made)


Equations: TypeAlias = Callable[..., tuple[Number, tuple[Number, ...]]]
"""A member's equations at one time: `(g, *moments) -> (direction, moments)`.

The moments come in the order in which the member declares them. A second moment grows with |g| and
with itself before: codes take what follows from the largest |g| and the largest v of a block as a
bound of the block.
"""


class Ratio(NamedTuple):
    """How large a first moment is beside the root of the second (AdaMax: beside u).

    Attributes:
        noise: |m|/√v in the root mean square, for gradients that are independent noise.
        bound: the largest |m|/√v that any gradients give, or ∞. One exact step from moments within
            it leaves them within that of the next step, which keeps Adam's bound on a step.
        limit: where codes end: the bound, or less where it is so large that it hardly occurs.
    """

    noise: Scalar
    bound: Scalar
    limit: Scalar


class Relation(NamedTuple):
    """What relates a member's moments at one time, for a storage that stores one by the other.

    Attributes:
        ratios: of each first moment, in order.
        power: the second moment is a root to this power: 2 for v, 1 for AdaMax's u.
        least: a first moment may be as large as beside this second moment where that is smaller.
    """

    ratios: tuple[Ratio, ...]
    power: int
    least: Scalar


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

    @property
    def share(self) -> Scalar:
        """How much of x - m a mean b·m + (1-b)·x is away from the `heavier` of both."""
        return self.heavier(self.complement, -self.rate)

    def heavier(self, m: Any, x: Any) -> Any:
        """What weighs more in a mean b·m + (1-b)·x: m, or x for b < ½."""
        is_m = self.complement <= 0.5
        if isinstance(is_m, bool):
            return m if is_m else x
        return jnp.where(is_m, m, x)

    def power(self, steps: Float[Array, "..."]) -> Float[Array, "..."]:
        """b to the power of some steps; 0⁰ is 1, since 0 has a logarithm that is finite."""
        return jnp.exp(steps * self.log)


def _scaled(scalar: Scalar, x: Number) -> Number:
    """scalar * x in the dtype of x."""
    return jnp.asarray(scalar, x.dtype) * x


def divide(x: Number, y: Float[Array, "..."]) -> Number:
    """x / y for real y: a complex x is divided part by part, exactly as two real numbers."""
    if jnp.iscomplexobj(x):
        return lax.complex(x.real / y, x.imag / y)
    return x / y


def largest_gradient(dtype: jnp.dtype) -> float:
    """2⁶³ for a second moment in float32 or bfloat16, 2⁵¹¹ in float64: its square is finite."""
    return 2.0 ** (jnp.finfo(dtype).maxexp // 2 - 1)


def limit_range(g: Number, largest: float) -> Number:
    """g with its finite values in ±largest, so that g² and v are finite.

    Past √max no second moment can be stored. A gradient of constant size keeps the right update
    there, since m and √v are limited alike. Infinities and NaN pass, to be seen.
    """
    if jnp.iscomplexobj(g):
        return lax.complex(limit_range(g.real, largest), limit_range(g.imag, largest))
    return jnp.where(jnp.isinf(g), g, jnp.clip(g, -largest, largest))


def square(g: Number) -> Real:
    """|g|²."""
    return g.real**2 + g.imag**2 if jnp.iscomplexobj(g) else g * g


def average(m: Number, x: Number, b: Decay) -> Number:
    """b·m + (1-b)·x as m + (1-b)·(x - m), which needs no rounded b.

    For b < ½ it is x - b·(x - m): beside a much larger m the former would lose x.
    """
    return b.heavier(m, x) + _scaled(b.share, x - m)


def second_moment(v: Real, g: Number, b: Decay, time: Time) -> Real:
    """b·v + (1-b)·|g|², in float32 with a dithered rounding.

    Rounded to nearest, v would stop short of |g|²: once (1-b)·(|g|²-v) is under half a unit in
    v's last place, v no longer changes. It would be off by up to 2⁻²⁴/(1-b), 0.3% at b = .99999.
    With a dither of one unit it goes on moving.
    """
    squared = square(g)
    toward = squared - v
    if v.dtype == jnp.float32:
        # A number times a power of two is exact, so it does not matter whether XLA fuses it.
        toward += dither_of_v(b, time) * spacing(v)
    return b.heavier(v, squared) + _scaled(b.share, toward)


def dither_of_v(b: Decay, time: Time) -> Float[Array, "..."]:
    """The dither of `second_moment`, over 1-b.

    It is 0 for b < ½, where the dither could bring v below 0, and where no sum stops short.
    """
    return jnp.where(b.complement <= 0.5, time.dither / b.complement, 0)


def bias_correction(b: Decay, t: Real) -> Real:
    """1 - bᵗ as (1-b) - b·(bᵗ⁻¹ - 1), without cancellation and exact at t = 1."""
    return b.complement - b.rate * jnp.expm1((t - 1) * b.log)


def adaptive_direction(
    m: Number, c1: Float[Array, "..."], v_hat: Real, eps: Scalar, eps_root: Scalar
) -> Number:
    """m̂ / (√(v̂ + eps_root) + eps) with m̂ = m/c1, the direction of Algorithm 1.

    c1 multiplies the denominator, which takes one division and one rounding less than m/c1. The
    root's argument has a least value. So derivatives are finite, and so is the direction at
    eps = 0. Gradients under 3e-16 then count as 0, since their squares are lost.
    """
    eps, eps_root = (jnp.asarray(x, v_hat.dtype) for x in (eps, eps_root))
    root = jnp.sqrt(jnp.maximum(v_hat + eps_root, least_square(v_hat.dtype)))
    return divide(m, c1 * (root + eps))


def least_square(dtype: jnp.dtype) -> float:
    """The least that a root is taken of in a direction: 2⁻¹⁰³ in float32, 2⁻⁹⁷⁰ in float64."""
    info = jnp.finfo(dtype)
    return float(info.tiny / info.eps)


def least_bounding(time: Time, b2: Scalar) -> Float[Array, "..."]:
    """The least v beside which a rounded m is held to its bound: (1-b2ᵗ)·2⁻¹¹¹ in float32.

    Smaller ones have lost squares, and do not say what m may be. And a direction divides by more
    than 16 times their root, also in the next step, where a larger gradient may come.
    """
    c2 = bias_correction(Decay.of(b2, time.t.dtype), jnp.maximum(time.t, 1))
    return jnp.maximum(c2 * least_square(c2.dtype) / 256, float(jnp.finfo(c2.dtype).tiny))


def moment_ratios(time: Time, *, b1: Scalar, b2: Scalar) -> tuple[Ratio]:
    """Of m and v: |m| <= C·√v with C² = (1-b1)²/(1-b2)·(1-ρᵗ)/(1-ρ), ρ = b1²/b2.

    By Cauchy and Schwarz, and step by step: C² becomes ρ·C² + (1-b1)²/(1-b2). For gradients that
    are independent noise E[m²] = (1-b1)/(1+b1)·(1-b1²ᵗ) and E[v] = 1-b2ᵗ.
    """
    t = jnp.maximum(time.t, 1)
    d1, d2 = Decay.of(b1, t.dtype), Decay.of(b2, t.dtype)
    noise = jnp.sqrt(_noise_of_m(d1, t) / bias_correction(d2, t))
    return (_limited(noise, _moment_bound(d1, d2, t)),)


def _moment_bound(b1: Decay, b2: Decay, t: Float[Array, "..."]) -> Float[Array, "..."]:
    """C of `moment_ratios`."""
    first = b1.complement / jnp.sqrt(jnp.asarray(b2.complement, t.dtype))
    return first * jnp.sqrt(_powers(2 * b1.log - b2.log, t))


def norm_ratios(time: Time, *, b1: Scalar, b2: Scalar) -> tuple[Ratio]:
    """Of m and AdaMax's u: |m| <= C·u with C = (1-b1)·(1-ρᵗ)/(1-ρ), ρ = b1/b2.

    The largest of many independent gradients is about three times their root mean square.
    """
    t = jnp.maximum(time.t, 1)
    d1, d2 = Decay.of(b1, t.dtype), Decay.of(b2, t.dtype)
    bound = d1.complement * _powers(d1.log - d2.log, t)
    return (_limited(jnp.sqrt(_noise_of_m(d1, t)) / 3, bound),)


def _limited(noise: Float[Array, "..."], bound: Float[Array, "..."]) -> Ratio:
    """With the bound as limit, or 200 times the noise where that is less.

    For b1² > b2 the bound grows without end, and would spread the codes over sizes that hardly
    occur. 200 is more than a constant gradient gives at any b1 up to .9999: 1/noise is
    √((1+b1)/(1-b1)) = 141 there.
    """
    return Ratio(noise, bound, jnp.minimum(bound, 200 * noise))


def _powers(log_rho: Scalar, t: Float[Array, "..."]) -> Float[Array, "..."]:
    """1 + ρ + … + ρᵗ⁻¹. ρ is kept away from 1, where the quotient is 0/0, and from overflow."""
    log_rho = jnp.asarray(log_rho, t.dtype)
    log_rho = jnp.minimum(jnp.where(jnp.abs(log_rho) < 1e-6, 1e-6, log_rho), 80)
    return jnp.expm1(t * log_rho) / jnp.expm1(log_rho)


def _noise_of_m(b1: Decay, t: Float[Array, "..."]) -> Float[Array, "..."]:
    """E[m²]/E[g²] for gradients that are independent noise."""
    return b1.complement / (1 + b1.rate) * -jnp.expm1(2 * t * b1.log)


def adam(time: Time, *, b1: Scalar, b2: Scalar, eps: Scalar, eps_root: Scalar) -> Equations:
    """Adam, Kingma & Ba (2015), Algorithm 1.

    m = b1·m + (1-b1)·g,  v = b2·v + (1-b2)·g²,  m̂ = m/(1-b1ᵗ),  v̂ = v/(1-b2ᵗ)
    """
    t = time.t
    d1, d2 = Decay.of(b1, t.dtype), Decay.of(b2, t.dtype)
    c1, c2 = bias_correction(d1, t), bias_correction(d2, t)

    def equations(g: Number, m: Number, v: Real) -> tuple[Number, tuple[Number, Real]]:
        m = average(m, g, d1)
        v = second_moment(v, g, d2, time)
        return adaptive_direction(m, c1, v / c2, eps, eps_root), (m, v)

    return equations


class Momentum(NamedTuple):
    """The weights of m and of g in Nesterov's look-ahead m̂ = m_weight·m + g_weight·g."""

    m_weight: Scalar
    g_weight: Scalar

    def __call__(self, g: Number, m: Number) -> Number:
        """m̂."""
        return _scaled(self.m_weight, m) + _scaled(self.g_weight, g)


def constant_momentum(b1: Decay, t: Float[Array, "..."]) -> Momentum:
    """Dozat (2016) with constant momentum: m̂ = b1·m/(1-b1ᵗ⁺¹) + (1-b1)·g/(1-b1ᵗ)."""
    return Momentum(b1.rate / bias_correction(b1, t + 1), b1.complement / bias_correction(b1, t))


def dozat(b1: Decay, t: Float[Array, "..."], momentum_decay: Scalar) -> Momentum:
    """Dozat (2016), Algorithm 2, with its schedule μᵢ = b1·(1 - ½·0.96^(i·momentum_decay)).

    m̂ = μₜ₊₁·m/(1-M(t+1)) + (1-μₜ)·g/(1-M(t)) with M(t) = μ₁·…·μₜ.

    No product is kept in the state: with x = 0.96^momentum_decay, log(1 - ½xⁱ) = -Σₖ xⁱᵏ/(k·2ᵏ),
    and the sum over i is geometric, log M(t) = t·log b1 - Σₖ xᵏ·(1-xᵏᵗ)/(1-xᵏ)/(k·2ᵏ). Terms
    past k = 48 are below float64's rounding.
    """
    log_x = jnp.asarray(momentum_decay * math.log(0.96), t.dtype)
    k = jnp.arange(1, 49, dtype=t.dtype)
    weights = jnp.exp(k * log_x) / -jnp.expm1(k * log_x) / (k * 2**k)

    def mu(i: Float[Array, "..."]) -> Float[Array, "..."]:
        return b1.rate * (1 - 0.5 * jnp.exp(i * log_x))

    def one_minus_product(i: Float[Array, "..."]) -> Float[Array, "..."]:
        return -jnp.expm1(i * b1.log + jnp.sum(weights * jnp.expm1(i * k * log_x)))

    return Momentum(mu(t + 1) / one_minus_product(t + 1), (1 - mu(t)) / one_minus_product(t))


def momentum(b1: Decay, t: Float[Array, "..."], momentum_decay: Scalar | None) -> Momentum:
    """NAdam's look-ahead, with Dozat's schedule where its decay is given."""
    return constant_momentum(b1, t) if momentum_decay is None else dozat(b1, t, momentum_decay)


def nadam(
    time: Time,
    *,
    b1: Scalar,
    b2: Scalar,
    eps: Scalar,
    eps_root: Scalar,
    momentum_decay: Scalar | None = None,
) -> Equations:
    """Adam with Nesterov's momentum, Dozat (2016), without Algorithm 2's extra b2 in v̂."""
    t = time.t
    d1, d2 = Decay.of(b1, t.dtype), Decay.of(b2, t.dtype)
    look_ahead = momentum(d1, t, momentum_decay)
    c2 = bias_correction(d2, t)

    def equations(g: Number, m: Number, v: Real) -> tuple[Number, tuple[Number, Real]]:
        m = average(m, g, d1)
        v = second_moment(v, g, d2, time)
        m_hat = look_ahead(g, m)
        return adaptive_direction(m_hat, jnp.ones_like(t), v / c2, eps, eps_root), (m, v)

    return equations


def amsgrad(
    time: Time,
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
    t = time.t
    d1, d2 = Decay.of(b1, t.dtype), Decay.of(b2, t.dtype)
    one = jnp.ones_like(t)
    c1 = bias_correction(d1, t) if bias_correction_mu else one
    c2 = bias_correction(d2, t) if bias_correction_nu else one
    before, after = (c2, one) if maximum == "corrected" else (one, c2)

    def equations(
        g: Number, m: Number, v: Real, v_max: Real
    ) -> tuple[Number, tuple[Number, Real, Real]]:
        m = average(m, g, d1)
        v = second_moment(v, g, d2, time)
        v_max = jnp.maximum(v_max, v / before)
        return adaptive_direction(m, c1, v_max / after, eps, eps_root), (m, v, v_max)

    return equations


def adamax(time: Time, *, b1: Scalar, b2: Scalar, eps: Scalar) -> Equations:
    """AdaMax, Kingma & Ba (2015), Algorithm 2, with eps beside |g| as in torch and optax.

    u = max(b2·u, |g| + eps),  direction = m/(1-b1ᵗ)/u
    """
    t = time.t
    d1, d2 = Decay.of(b1, t.dtype), Decay.of(b2, t.dtype)
    c1 = bias_correction(d1, t)

    def equations(g: Number, m: Number, u: Real) -> tuple[Number, tuple[Number, Real]]:
        m = average(m, g, d1)
        faded = average(u, jnp.zeros_like(u), d2)
        u = jnp.maximum(faded, jnp.abs(g) + jnp.asarray(eps, u.dtype))
        # Devices flush a product below the smallest number to 0. And the quotient is finite, also
        # where u has fallen much faster than m.
        tiny = float(jnp.finfo(u.dtype).tiny)
        least = tiny * jnp.maximum(jnp.abs(m), 1)
        return divide(m, jnp.where(u == 0, 1, jnp.maximum(c1 * u, least))), (m, u)

    return equations


def sma_length(b2: Decay, t: Float[Array, "..."]) -> Float[Array, "..."]:
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


def rectification(
    b2: Decay, t: Float[Array, "..."], threshold: Scalar
) -> tuple[Bool[Array, "..."], Float[Array, "..."]]:
    """Whether ρₜ >= threshold, and then rₜ, else 1, Liu et al. (2020), Algorithm 2.

    rₜ² = (ρₜ-4)(ρₜ-2)ρ∞ / ((ρ∞-4)(ρ∞-2)ρₜ)
    """
    rho, limit = sma_length(b2, t), 2 / b2.complement - 1
    # For b2 <= 0.6 ρ∞ is not above 4, where no variance is defined; ρₜ may be rounded up to it.
    tractable = jnp.logical_and(rho >= jnp.asarray(threshold, t.dtype), limit > 4)
    squared = (rho - 4) / (limit - 4) * ((rho - 2) / (limit - 2)) * (limit / rho)
    return tractable, jnp.sqrt(jnp.where(tractable, squared, 1))


def radam(
    time: Time,
    *,
    b1: Scalar,
    b2: Scalar,
    eps: Scalar,
    eps_root: Scalar,
    threshold: Scalar,
    nesterov: bool,
) -> Equations:
    """Rectified Adam, Liu et al. (2020), Algorithm 2.

    direction = rₜ·m̂/(√(v̂ + eps_root) + eps) where ρₜ >= threshold, else m̂
    """
    t = time.t
    d1, d2 = Decay.of(b1, t.dtype), Decay.of(b2, t.dtype)
    c1, c2 = bias_correction(d1, t), bias_correction(d2, t)
    look_ahead = momentum(d1, t, None)
    tractable, r = rectification(d2, t, threshold)

    def equations(g: Number, m: Number, v: Real) -> tuple[Number, tuple[Number, Real]]:
        m = average(m, g, d1)
        v = second_moment(v, g, d2, time)
        m_hat = look_ahead(g, m) if nesterov else divide(m, c1)
        adaptive = _scaled(r, adaptive_direction(m_hat, jnp.ones_like(t), v / c2, eps, eps_root))
        return jnp.where(tractable, adaptive, m_hat), (m, v)

    return equations


class SlowDecay(NamedTuple):
    """The decay rate of AdEMAMix's slow average at one time, and how it came there.

    Attributes:
        now: the rate b3 at time t.
        log_product: log(b3₁·…·b3ₜ); -expm1 of it is the weight of all gradients together.
        share: of the warm-up, in [0, 1].
    """

    now: Decay
    log_product: Scalar
    share: Scalar

    @classmethod
    def of(
        cls, b3: Scalar, b1: Decay, t: Float[Array, "..."], warmup: Scalar | None
    ) -> "SlowDecay":
        """Pagliardini et al. (2024), section 3: the half-life grows linearly from that of b1.

        1/log b3ₜ = (1 - t/T)/log b1 + t/T/log b3 for t <= T = warmup, then 1/log b3. The sum of the
        logarithms is one of 1/(A + B·s) over s, a difference of two digamma functions.
        """
        end = Decay.of(b3, t.dtype)
        if warmup is None:
            return cls(end, t * end.log, 1.0)
        within = jnp.minimum(t, warmup)
        start = jnp.where(b1.rate == 0, 0, 1 / jnp.asarray(b1.log, t.dtype))
        slope = (1 / end.log - start) / warmup
        log = 1 / (start + slope * within)
        is_flat = slope == 0  # b3 is b1
        divisor = jnp.where(is_flat, 1, slope)
        shift = 1 + start / divisor
        grown = (digamma(within + shift) - digamma(shift)) / divisor
        passed = jnp.where(is_flat, within * end.log, grown)
        now = Decay(jnp.exp(log), -jnp.expm1(log), log)
        return cls(now, passed + (t - within) * end.log, within / warmup)


def ademamix(
    time: Time,
    *,
    b1: Scalar,
    b2: Scalar,
    b3: Scalar,
    alpha: Scalar,
    eps: Scalar,
    eps_root: Scalar,
    warmup: Scalar | None,
) -> Equations:
    """AdEMAMix, Pagliardini, Ablin & Grangier (2024), Algorithm 1: Adam with a second, slow m.

    slow = b3·slow + (1-b3)·g,  direction = (m̂ + alpha·slow) / (√(v̂ + eps_root) + eps)
    """
    t = time.t
    d1, d2 = Decay.of(b1, t.dtype), Decay.of(b2, t.dtype)
    d3, _, share = SlowDecay.of(b3, d1, t, warmup)
    c1, c2 = bias_correction(d1, t), bias_correction(d2, t)
    weight = jnp.asarray(alpha, t.dtype) * share

    def equations(
        g: Number, m: Number, v: Real, slow: Number
    ) -> tuple[Number, tuple[Number, Real, Number]]:
        m, slow = average(m, g, d1), average(slow, g, d3)
        v = second_moment(v, g, d2, time)
        mixed = divide(m, c1) + _scaled(weight, slow)
        return adaptive_direction(mixed, jnp.ones_like(t), v / c2, eps, eps_root), (m, v, slow)

    return equations


def ademamix_ratios(
    time: Time, *, b1: Scalar, b2: Scalar, b3: Scalar, warmup: Scalar | None
) -> tuple[Ratio, Ratio]:
    """Of m as in Adam. The slow moment's limit is a ratio that gradients can give, up to 4 times S.

    S = (1-P)/√(1-b2ᵗ) is what constant gradients give, with P the product of all b3. The bound is
    C² = Σₛ (1-b3ₛ)²·Πⱼ﹥ₛ b3ⱼ²/b2 / (1-b2); for b3² > b2 it has no end. Without a warm-up the limit
    is C, or 4·S. With one, C has no closed form. But each ratio that some gradients give is within
    C: the limit is that of gradients that were constant and stopped t/2 steps ago, or S, or 4·S.
    A schedule of b3 is taken as if it had always had its present value.

    The noise is that of the present b3, or that of a plain mean of t gradients where this is more,
    early in a warm-up.
    """
    t = jnp.maximum(time.t, 1)
    d1, d2 = Decay.of(b1, t.dtype), Decay.of(b2, t.dtype)
    d3, log_product, _ = SlowDecay.of(b3, d1, t, warmup)
    root, weight = jnp.sqrt(bias_correction(d2, t)), -jnp.expm1(jnp.asarray(log_product, t.dtype))
    noise = jnp.maximum(jnp.sqrt(_noise_of_m(d3, t)), weight / jnp.sqrt(t))
    if warmup is None:
        bound = within = _moment_bound(d3, d2, t)
    else:
        bound = jnp.full_like(t, jnp.inf)
        stop = jnp.ceil(t / 2)
        _, log_before, _ = SlowDecay.of(b3, d1, stop, warmup)
        faded = jnp.exp(log_product - log_before - (t - stop) * d2.log / 2)
        stopped = -jnp.expm1(log_before) * faded / jnp.sqrt(bias_correction(d2, stop))
        within = jnp.maximum(stopped, weight / root)
    slow = Ratio(noise / root, bound, jnp.minimum(within, 4 * weight / root))
    return (*moment_ratios(time, b1=b1, b2=b2), slow)
