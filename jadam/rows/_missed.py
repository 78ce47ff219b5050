"""The steps that a row has missed, made up for: one by one, or summed.

Both give what the dense transformation would have made of the row in steps with zero gradients.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int
from numpy.polynomial import chebyshev

from jadam import _math, _validate
from jadam._leaf import Options, leaf_step
from jadam._members import Rule
from jadam._state import Role
from jadam._storage import storage_of
from jadam._types import Scalar, ScalarOrSchedule
from jadam.rows._quiet import QUIET, Quiet, faded, horizon, quiet, spread

# The number of scales at which an element is computed, twice that for a b2 far from 1, and the
# largest logarithm of their range. The sum is then 1e-5 of a learning rate off at most.
_POINTS = 10
_SPREAD = 3.0

Times = Int[Array, "rows"]
Numbers = Float[Array, "rows"]


class Plan(NamedTuple):
    """The rule with what goes with it.

    Attributes:
        rule: the member with its hyperparameters.
        learning_rate: a number or a schedule.
        weight_decay: a number or a schedule.
    """

    rule: Rule
    learning_rate: ScalarOrSchedule
    weight_decay: ScalarOrSchedule

    @property
    def decays(self) -> bool:
        """Whether parameters decay."""
        return not (isinstance(self.weight_decay, float) and self.weight_decay == 0)

    @property
    def decay_is_scheduled(self) -> bool:
        """Whether the decay of a step depends on its time."""
        return self.decays and (callable(self.learning_rate) or callable(self.weight_decay))

    def rates_at(self, made: Array) -> tuple[Scalar, Scalar]:
        """The learning rate and the weight decay after this many updates."""
        return (
            _validate.at_count("learning_rate", self.learning_rate, made),
            _validate.at_count("weight_decay", self.weight_decay, made),
        )

    def learning_rates_at(self, made: Times, dtype: Any) -> Numbers:
        """The learning rate of each of some times."""
        return jax.vmap(lambda made: jnp.asarray(self.rates_at(made)[0], dtype))(made)

    def log_decay_at(self, made: Array) -> Float[Array, ""]:
        """log(1 - learning_rate·weight_decay), by which the step after this many updates decays."""
        rate, decay = self.rates_at(made)
        if isinstance(rate, float) and isinstance(decay, float):
            return jnp.float32(math.log1p(-rate * decay))
        return jnp.log1p(-jnp.asarray(rate, jnp.float32) * jnp.asarray(decay, jnp.float32))

    def log_decays_at(self, made: Times) -> Numbers:
        """The same for each of some times."""
        return jax.vmap(self.log_decay_at)(made)


class Rows(NamedTuple):
    """Some rows of a table: the parameters, the stored moments, and when each was last touched.

    `log_decay` is by what a row decays in the missed steps: the sum of their
    log(1 - learning_rate·weight_decay), None where nothing decays.
    """

    p: Array
    stored: tuple[Array, ...]
    last: Times
    log_decay: Numbers | None


def _across(x: Array, like: Array) -> Array:
    """A number of each row, for all elements of the row."""
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim))


def _at_once(plan: Plan, rows: Rows, missed: Times, count: Array, decayed: Numbers | None) -> Rows:
    """The moments and the decay of steps that move nothing; `decayed` is made already."""
    rule = plan.rule
    storage = storage_of(rule.member.moments, rows.stored)
    wide = storage.wide(rows.p.dtype)
    real = jnp.finfo(wide).dtype
    then = _math.Time.of(_across(count - missed, rows.p), real)
    moments = storage.load(rows.stored, lambda: rule.relation_at(then), wide)
    steps = _across(missed, rows.p).astype(real)
    moments = faded(rule, moments, steps)
    kept = storage.round(moments, rule.relation_at(_math.Time.of(count, real)))
    passed = missed > 0
    stored = tuple(
        jnp.where(_across(passed, new), new, old)
        for new, old in zip(kept, rows.stored, strict=True)
    )
    p = rows.p
    if rows.log_decay is not None:
        rest = rows.log_decay if decayed is None else rows.log_decay - decayed
        p = shrunk(p, jnp.where(passed, rest, 0))
    return Rows(p, stored, rows.last, None)


def shrunk(p: Array, log_decay: Numbers) -> Array:
    """p·exp(log_decay), without the rounding of a factor near 1."""
    wide = p.astype(_math.widen(p.dtype))
    change = jnp.expm1(_across(log_decay, p).astype(wide.dtype))
    return (wide + change * wide).astype(p.dtype)


def one_by_one(plan: Plan, rows: Rows, count: Array) -> Rows:
    """The missed steps as the dense transformation makes them, up to where nothing moves any more.

    The rest is made at once. The bits are those of dense steps where the rest is nothing.
    """
    rule = plan.rule
    real = storage_of(rule.member.moments, rows.stored).wide(rows.p.dtype)
    most = horizon(rule, real)
    missed = count - rows.last
    options = Options(decays=plan.decays, to_params=True)

    def step(p: Array, stored: Sequence[Array], made: Array) -> tuple[Array, ...]:
        leaf = leaf_step(rule, *plan.rates_at(made), made)
        p, stored, _ = leaf(jnp.zeros_like(p), p, options, tuple(stored))
        return p, *stored

    def body(i: Array, carry: tuple[tuple[Array, ...], Numbers]) -> tuple[Any, Numbers]:
        arrays, decayed = carry
        p, *stored = arrays
        made = rows.last + i
        after = jax.vmap(step)(p, stored, made)
        is_missed = i < missed
        kept = tuple(
            jnp.where(_across(is_missed, new), new, old)
            for new, old in zip(after, arrays, strict=True)
        )
        if plan.decays:
            decayed += jnp.where(is_missed, plan.log_decays_at(made), 0)
        return kept, decayed

    start = (rows.p, *rows.stored), jnp.zeros(missed.shape, jnp.float32)
    turns = jnp.minimum(jnp.max(missed, initial=0), most)
    (p, *stored), decayed = lax.fori_loop(0, turns, body, start)
    rest = jnp.maximum(missed - most, 0)
    rows = Rows(p, tuple(stored), rows.last, rows.log_decay)
    # A branch: 8-bit moments would be rounded in vain.
    return lax.cond(
        jnp.any(rest > 0),
        lambda: _at_once(plan, rows, rest, count, decayed),
        lambda: rows._replace(log_decay=None),
    )


def summed(plan: Plan, rows: Rows, count: Array) -> Rows:
    """The missed steps in closed form.

    The moments and the decay are powers. The motion of an element is m·Σⱼ wⱼ/(√v + eps·sⱼ), with
    weights wⱼ and scales sⱼ of its row (`Quiet`; with learning rates and decays in wⱼ). The terms
    are smooth in s: they are interpolated between ten values of s, so that the sum over j is made
    once for a row, and an element takes ten divisions.
    """
    rule, missed = plan.rule, count - rows.last
    by_role: dict[Role, Array] = {}
    for moment, x in zip(rule.member.moments, rows.stored, strict=True):
        by_role.setdefault(moment.role, x)
    m, v = by_role[Role.FIRST], by_role.get(Role.MAXIMUM, by_role[Role.SECOND])
    motion = _motion(plan, rows, m, v, missed)
    p, stored, *_ = _at_once(plan, rows, missed, count, None)
    wide = p.astype(m.dtype)
    moved = (wide - motion).astype(p.dtype)
    moves = _across(missed > 0, p)
    return Rows(jnp.where(moves, moved, p), stored, rows.last, None)


class _Sums(NamedTuple):
    """Over the missed steps j of each row, with the decay from j to the last of them.

    Attributes:
        chebyshev: Σ learning_rateⱼ·weightⱼ·T_q(zⱼ) for the Chebyshev polynomials T_q.
        plain: Σ learning_rateⱼ·plainⱼ.
        decayed: Σ log(1 - learning_rateⱼ·weight_decayⱼ).
    """

    chebyshev: Float[Array, "nodes rows"]
    plain: Numbers
    decayed: Numbers


def can_sum(plan: Plan, stored: Sequence[Array]) -> bool:
    """Whether the missed steps of these moments are summed."""
    rule = plan.rule
    return (
        rule.member in QUIET
        and all(x.dtype == jnp.float32 for x in stored)
        and spread(rule, jnp.float32) <= _SPREAD
    )


def _points(rule: Rule, dtype: Any) -> tuple[list[float], list[list[float]]]:
    """Chebyshev's points z of [-1, 1], and at each point what makes an interpolation of sums.

    Σⱼ wⱼ·f(zⱼ) = Σ_z f(z)·Σ_q 2/n·T_q(z)·(Σⱼ wⱼ·T_q(zⱼ)), halved at q = 0.
    """
    n = _POINTS if spread(rule, dtype) <= 1 else 2 * _POINTS
    points = chebyshev.chebpts1(n)
    weights = chebyshev.chebvander(points, n - 1) * (2 - (np.arange(n) == 0)) / n
    return points.tolist(), weights.tolist()


def _motion(plan: Plan, rows: Rows, m: Array, v: Array, missed: Times) -> Array:
    """By how much the missed steps move the parameters."""
    rule, real, last = plan.rule, v.dtype, rows.last
    window = jnp.minimum(missed, horizon(rule, real))
    points, interpolation = _points(rule, real)

    def quiet_at(j: Times) -> Quiet:
        return quiet(rule, (last + j).astype(real), j.astype(real))

    # Scales grow with j. z = (s - c)/(s + c)/span is in [-1, 1], with c their geometric mean.
    ones = jnp.ones_like(last)
    first, end = quiet_at(ones).scale, quiet_at(jnp.maximum(window, 1)).scale
    centre = jnp.sqrt(first * end)
    span = jnp.maximum((end - centre) / (end + centre), float(jnp.finfo(real).eps))

    def body(i: Array, sums: _Sums) -> _Sums:
        made, is_missed = last + i, i < window
        weight, scale, plain = quiet_at((i + 1) * ones)
        z = jnp.clip((scale - centre) / (scale + centre) / span, -1, 1)
        polynomials = [jnp.ones_like(z), z]
        while len(polynomials) < len(points):
            polynomials.append(2 * z * polynomials[-1] - polynomials[-2])
        rate = jnp.where(is_missed, plan.learning_rates_at(made, real), 0)
        if plan.decays:
            log_decay = jnp.where(is_missed, plan.log_decays_at(made), 0)
            kept = jnp.exp(log_decay)
            sums = _Sums(sums.chebyshev * kept[None], sums.plain * kept, sums.decayed + log_decay)
        return _Sums(
            sums.chebyshev + jnp.stack(polynomials) * (rate * weight)[None],
            sums.plain + rate * plain,
            sums.decayed,
        )

    zeros = jnp.zeros(last.shape, real)
    start = _Sums(jnp.zeros((len(points), *last.shape), real), zeros, zeros)
    sums = lax.fori_loop(0, jnp.max(window, initial=0), body, start)

    eps, eps_root = (jnp.asarray(rule.hyperparameters[x], real) for x in ("eps", "eps_root"))
    least = float(jnp.finfo(real).tiny / jnp.finfo(real).eps)  # as in `adaptive_direction`
    total = _across(sums.plain, v)
    for x, weights in zip(points, interpolation, strict=True):
        weight = jnp.zeros_like(centre)
        for factor, row in zip(weights, sums.chebyshev, strict=True):
            weight += factor * row
        node = _across(centre * (1 + x * span) / (1 - x * span), v)
        root = jnp.sqrt(jnp.maximum(v + eps_root * node**2, least * node**2))
        total += _across(weight, v) / (root + eps * node)
    moved = m * total
    if rows.log_decay is not None:
        # Zero unless more was missed than the window has.
        moved *= jnp.exp(_across(rows.log_decay - sums.decayed, v))
    return moved
