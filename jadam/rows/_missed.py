"""The steps that a row has missed, made up for: one by one, or summed.

Both give what the dense transformation would have made of the row in steps with zero gradients.
"""

import contextlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jadam import _math, _validate
from jadam._leaf import Options, leaf_step
from jadam._members import Rule
from jadam._state import Role
from jadam._storage import storage_of
from jadam._types import Scalar, ScalarOrSchedule
from jadam.rows._fading import Interpolation, horizon, interpolation, is_zero, left_after

# How many missed steps are summed in one turn.
_AT_A_TIME = 8

Times = Int[Array, "rows"]
RowNumbers = Float[Array, "rows"]


class DenseStep(NamedTuple):
    """What the step of the dense transformation is made of.

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
    def is_scheduled(self) -> bool:
        """Whether a rate depends on the time."""
        return callable(self.learning_rate) or callable(self.weight_decay)

    @property
    def decay_is_scheduled(self) -> bool:
        """Whether the decay of a step depends on its time."""
        return self.decays and self.is_scheduled

    def rates_at(self, made: Array) -> tuple[Scalar, Scalar]:
        """The learning rate and the weight decay after this many updates."""
        return (
            _validate.at_count("learning_rate", self.learning_rate, made),
            _validate.at_count("weight_decay", self.weight_decay, made),
        )

    def learning_rates_at(self, made: Times, dtype: Any) -> RowNumbers:
        """The learning rate of each of some times."""
        return jax.vmap(lambda made: jnp.asarray(self.rates_at(made)[0], dtype))(made)

    def log_decay_at(self, made: Array) -> Float[Array, ""]:
        """log(1 - learning_rate·weight_decay), by which the step after this many updates decays."""
        rate, decay = self.rates_at(made)
        if isinstance(rate, float) and isinstance(decay, float):
            return jnp.float32(math.log1p(-rate * decay))
        return jnp.log1p(-jnp.asarray(rate, jnp.float32) * jnp.asarray(decay, jnp.float32))

    def log_decays_at(self, made: Times) -> RowNumbers:
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
    log_decay: RowNumbers | None


def _across(x: Array, like: Array) -> Array:
    """A number of each row, for all elements of the row."""
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim))


def _at_once(
    plan: DenseStep, rows: Rows, missed: Times, count: Array, decayed: RowNumbers | None
) -> Rows:
    """The missed steps as far as moments fade in them and parameters decay.

    `decayed` is the part of the log decay that has been made before.
    """
    rule = plan.rule
    storage = storage_of(rule.member.moments, rows.stored)
    moments = _loaded(rule, rows, count - missed)
    real = jnp.finfo(storage.wide(rows.p.dtype)).dtype
    steps = _across(missed, rows.p).astype(real)
    moments = rule.member.faded(moments, steps, rule.hyperparameters)
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


def _loaded(rule: Rule, rows: Rows, made: Times) -> tuple[Array, ...]:
    """The moments of rows, which were stored after so many updates."""
    storage = storage_of(rule.member.moments, rows.stored)
    wide = storage.wide(rows.p.dtype)
    then = _math.Time.of(_across(made, rows.p), jnp.finfo(wide).dtype)
    return storage.load(rows.stored, lambda: rule.relation_at(then), wide)


def shrunk(p: Array, log_decay: RowNumbers) -> Array:
    """p·exp(log_decay), without the rounding of a factor near 1."""
    wide = p.astype(_math.widen(p.dtype))
    change = jnp.expm1(_across(log_decay, p).astype(wide.dtype))
    return (wide + change * wide).astype(p.dtype)


def one_by_one(plan: DenseStep, rows: Rows, count: Array) -> Rows:
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

    def body(i: Array, carry: tuple[tuple[Array, ...], RowNumbers]) -> tuple[Any, RowNumbers]:
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
    # A branch: where nothing is left, codes would be decoded and rounded in vain.
    return lax.cond(
        jnp.any(rest > 0),
        lambda: _at_once(plan, rows, rest, count, decayed),
        lambda: rows._replace(log_decay=None),
    )


class Sums(NamedTuple):
    """What missed steps make of each row, in numbers.

    The j-th step moves an element by learning_rateⱼ·m·fⱼ, with fⱼ smooth in j (`Quiet`). So fⱼ is
    Σ_q basis[j, q]·f of few nodes q, and what the learning rates and decays of all steps make of
    the basis are the weights of the row:

    p = (1 + decay)·p - m·(plain + Σ_q factor_q/(√(v + eps_root·scale_q²) + eps·scale_q)),
    m = first·m, v = second·v

    Attributes:
        steps: how many there are, as a real number. Where there are none nothing moves.
    """

    steps: RowNumbers
    plain: RowNumbers
    first: RowNumbers
    second: RowNumbers
    decay: RowNumbers
    factors: Float[Array, "nodes rows"]
    scales: Float[Array, "nodes rows"]

    @classmethod
    def none(cls, rows: int) -> "Sums":
        """Those of rows that have missed nothing."""
        zeros, nothing = jnp.zeros(rows, jnp.float32), jnp.zeros((0, rows), jnp.float32)
        return cls(zeros, zeros, zeros + 1, zeros + 1, zeros, nothing, nothing)

    @classmethod
    def of(cls, plan: DenseStep, last: Times, log_decay: RowNumbers | None, count: Array) -> "Sums":
        """Those of rows that stand after the updates `last` and are to decay by `log_decay`."""
        rule, missed = plan.rule, count - last
        between = interpolation(rule)
        assert between is not None
        weights = _weights(plan, last, log_decay, missed, between).T
        j = jnp.asarray(between.nodes, jnp.float32)
        weight, scale, plain = rule.quiet_at(last.astype(jnp.float32)[None], j[:, None])
        steps = missed.astype(jnp.float32)
        first, second = left_after(rule, steps)
        return cls(
            steps,
            jnp.zeros_like(steps) if is_zero(plain) else jnp.sum(weights * plain, axis=0),
            first,
            second,
            jnp.zeros_like(steps) if log_decay is None else jnp.expm1(log_decay),
            weights * weight,
            scale,
        )


def summed(plan: DenseStep, rows: Rows, count: Array) -> Rows:
    """The missed steps as `Sums` of few terms. Moments of fewer bits are rounded once for all."""
    rule, missed = plan.rule, count - rows.last
    by_role: dict[Role, Array] = {}
    for moment, x in zip(rule.member.moments, _loaded(rule, rows, rows.last), strict=True):
        by_role.setdefault(moment.role, x)
    m, v = by_role[Role.FIRST], by_role.get(Role.MAXIMUM, by_role[Role.SECOND])
    motion = m * _motion(rule, Sums.of(plan, rows.last, rows.log_decay, count), v)
    p, stored, *_ = _at_once(plan, rows, missed, count, None)
    moved = (p.astype(m.dtype) - motion).astype(p.dtype)
    return Rows(jnp.where(_across(missed > 0, p), moved, p), stored, rows.last, None)


def can_sum(plan: DenseStep, stored: Sequence[Array]) -> bool:
    """Whether the missed steps of these moments can be summed."""
    is_narrow = all(x.dtype != jnp.float64 for x in stored)
    has_closed_form = plan.rule.member.quiet is not None
    return is_narrow and has_closed_form and interpolation(plan.rule) is not None


def _motion(rule: Rule, sums: Sums, v: Array) -> Array:
    """By how much the missed steps move the parameters, divided by m."""
    real = v.dtype
    eps, eps_root = (jnp.asarray(rule.hyperparameters[x], real) for x in ("eps", "eps_root"))
    least = _math.least_square(real)
    rooted = jnp.sqrt(v)

    def root(scale: Array) -> Array:
        if is_zero(rule.hyperparameters["eps_root"]):
            return jnp.maximum(rooted, least**0.5 * scale)
        return jnp.sqrt(jnp.maximum(v + eps_root * scale**2, least * scale**2))

    total = jnp.zeros_like(v) + _across(sums.plain, v)
    for factor, scale in zip(sums.factors, sums.scales, strict=True):
        factor, scale = _across(factor, v), _across(scale, v)
        total += factor / (root(scale) + eps * scale)
    return total


def _weights(
    plan: DenseStep,
    last: Times,
    log_decay: RowNumbers | None,
    missed: Times,
    between: Interpolation,
) -> Float[Array, "rows nodes"]:
    """Σⱼ learning_rateⱼ·basisⱼ over the missed steps of each row, with all decay after step j."""
    steps = len(between.basis)
    window = jnp.minimum(missed, steps)
    if plan.is_scheduled:
        log_decay = jnp.zeros_like(missed, jnp.float32) if log_decay is None else log_decay
        return _summed_basis(plan, last, window, log_decay, between.basis, _AT_A_TIME)
    table, decays = _weights_of_windows(plan, between.basis)
    # Rows that have missed as many steps have the same weights.
    weights = table[window]
    if log_decay is None:
        return weights
    return weights * jnp.exp(log_decay - decays[window])[:, None]


def _weights_of_windows(
    plan: DenseStep, basis: np.ndarray
) -> tuple[Float[Array, "windows nodes"], Float[Array, "windows"]]:
    """`_weights` for each number of missed steps, and by what so many steps decay."""
    steps = len(basis)
    is_known = isinstance(plan.learning_rate, float) and isinstance(plan.weight_decay, float)
    with jax.ensure_compile_time_eval() if is_known else contextlib.nullcontext():
        windows = jnp.arange(steps + 1)
        each = plan.log_decay_at(jnp.int32(0)) if plan.decays else jnp.float32(0)
        decays = windows.astype(jnp.float32) * each
        last = jnp.zeros_like(windows)
        return _summed_basis(plan, last, windows, decays, basis, steps), decays


def _summed_basis(
    plan: DenseStep,
    last: Times,
    window: Times,
    log_decay: RowNumbers,
    basis: np.ndarray,
    at_a_time: int,
) -> Float[Array, "rows nodes"]:
    """The sum that `_weights` is, with `at_a_time` steps in each turn of a loop."""
    steps, nodes = basis.shape
    blocks = -(-steps // at_a_time)
    rest = ((0, blocks * at_a_time - steps), (0, 0))
    padded = np.pad(basis, rest).reshape(blocks, at_a_time, nodes).astype(np.float32)

    def body(block: Array, carry: tuple[Array, RowNumbers]) -> tuple[Array, RowNumbers]:
        weights, decayed = carry
        i = block * at_a_time + jnp.arange(at_a_time)
        made = last[:, None] + i[None]
        is_missed = i[None] < window[:, None]
        rates = plan.learning_rates_at(made.reshape(-1), jnp.float32).reshape(made.shape)
        if plan.decays:
            each = plan.log_decays_at(made.reshape(-1)).reshape(made.shape)
            until = decayed[:, None] + jnp.cumsum(jnp.where(is_missed, each, 0), axis=1)
            rates *= jnp.exp(log_decay[:, None] - until)
            decayed = until[:, -1]
        rates = jnp.where(is_missed, rates, 0)
        weights += jnp.dot(rates, jnp.asarray(padded)[block], precision=lax.Precision.HIGHEST)
        return weights, decayed

    start = jnp.zeros((len(last), nodes), jnp.float32), jnp.zeros_like(log_decay)
    if blocks == 1:
        return body(jnp.int32(0), start)[0]
    turns = -(-jnp.max(window, initial=0) // at_a_time)
    return lax.fori_loop(0, turns, body, start)[0]
