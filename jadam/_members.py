"""The family: each member declared once, for everybody who asks.

A member's equations are in `_math`, its state in `_state`. Here stands what else there is to know
of it. A new member needs an entry in `MEMBERS`; the rest of the package follows from that.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jadam import _math, _quiet, _validate
from jadam._kernels import coefficients
from jadam._kernels.coefficients import Coefficients
from jadam._state import (
    AdamState,
    AdemamixState,
    AmsgradState,
    CorrectedAmsgradState,
    Moment,
    Role,
)

State = AdamState | CorrectedAmsgradState | AdemamixState


@dataclass(frozen=True, eq=False)
class Member:
    """A member of the family.

    Attributes:
        name: as in its paper.
        state: the class of its state: a count, then the moments by their names.
        moments: in the order in which the equations take them, which is that of the state.
        equations: `(time, **hyperparameters) -> Equations`.
        ratios: `(time, **rates) -> the Ratio of each first moment`.
        rates: the hyperparameters on which the ratios depend, and how each is checked.
        epsilons: those that are added to the second moment or to its root, likewise.
        options: all other hyperparameters, likewise.
        power: the second moment is a root to this power: 2 for v, 1 for AdaMax's u.
        coefficients: the equations as numbers, where the kernels have them; None leaves this member
            to XLA.
        quiet: `(then, j, **hyperparameters) -> Quiet`, the direction of steps without a gradient,
            whose epsilons are eps and eps_root; None where such steps are made one by one.
    """

    name: str
    state: type[State]
    moments: tuple[Moment, ...]
    equations: Callable[..., _math.Equations]
    ratios: Callable[..., tuple[_math.Ratio, ...]]
    rates: Mapping[str, _validate.Check]
    epsilons: Mapping[str, _validate.Check]
    options: Mapping[str, _validate.Check] = field(default_factory=dict)
    power: int = 2
    coefficients: Callable[..., Coefficients] | None = None
    quiet: Callable[..., _quiet.Quiet] | None = None

    def rates_in(self, hyperparameters: Mapping[str, Any]) -> tuple[Any, Any]:
        """The rates by which the first and the second moment fade."""
        # Reversed: of several first moments the rate of the first one stays.
        rates = {moment.role: moment.rate for moment in reversed(self.moments) if moment.rate}
        return hyperparameters[rates[Role.FIRST]], hyperparameters[rates[Role.SECOND]]

    def stored(self, state: Any) -> tuple[Any, ...]:
        """The trees of a state that hold the moments, in order."""
        return tuple(getattr(state, moment.name) for moment in self.moments)

    def state_of(self, count: Any, structure: Any, rows: Sequence[Sequence[Any]]) -> Any:
        """The state with this count and each leaf's moments, in a tree of this structure."""
        columns = zip(*rows, strict=True) if rows else ((),) * len(self.moments)
        trees = (structure.unflatten(column) for column in columns)
        names = (moment.name for moment in self.moments)
        return self.state(count=count, **dict(zip(names, trees, strict=True)))

    def with_hyperparameters(self, **hyperparameters: Any) -> "Rule":
        """The member with its hyperparameters, which are checked.

        Raises:
            TypeError: one is of a wrong type, is missing, or is not the member's.
            ValueError: one is out of range.
        """
        checks = {**self.rates, **self.epsilons, **self.options}
        return Rule(self, self._checked(checks, hyperparameters))

    def relation_at(self, time: _math.Time, **rates: Any) -> _math.Relation:
        """The relation of the moments of a state of which the rates alone are known.

        Raises:
            TypeError, ValueError: as in `with_hyperparameters`.
        """
        missing = dict.fromkeys(self.rates)
        return Rule(self, self._checked(self.rates, missing | rates)).relation_at(time)

    def faded(
        self,
        moments: Sequence[Array],
        steps: Float[Array, "..."],
        hyperparameters: Mapping[str, Any],
    ) -> tuple[Array, ...]:
        """The moments after some steps without a gradient: bᵏ·x with the rate b of each.

        A maximum stays as it is, and AdaMax's u is at least its eps after a step.
        """

        def one(moment: Moment, x: Array) -> Array:
            if moment.rate is None:
                return x
            b = _math.Decay.of(hyperparameters[moment.rate], steps.dtype)
            x = b.power(steps) * x
            if moment.role is Role.SECOND and self.power == 1:
                least = jnp.asarray(hyperparameters["eps"], x.dtype)
                x = jnp.where(steps > 0, jnp.maximum(x, least), x)
            return x

        return tuple(one(moment, x) for moment, x in zip(self.moments, moments, strict=True))

    def _checked(
        self, checks: Mapping[str, _validate.Check], values: Mapping[str, Any]
    ) -> dict[str, Any]:
        for name in checks.keys() ^ values.keys():
            known = ", ".join(checks)
            raise TypeError(f"{name}: expected {known} for {self.name}, got {', '.join(values)}")
        return {name: checks[name](name, value) for name, value in values.items()}


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["hyperparameters"], meta_fields=["member"]
)
@dataclass(frozen=True)
class Rule:
    """A member with its hyperparameters: a tree of them, so that they may be traced."""

    member: Member
    hyperparameters: dict[str, Any] = field(default_factory=dict)

    def at(self, time: _math.Time) -> _math.Equations:
        """The equations of one step."""
        return self.member.equations(time, **self._values(self.hyperparameters, time))

    def relation_at(self, time: _math.Time) -> _math.Relation:
        """The relation of the moments at one step."""
        rates, power = self._values(self.member.rates, time), self.member.power
        least = 0.0 if power == 1 else _math.least_bounding(time, rates["b2"])
        return _math.Relation(self.member.ratios(time, **rates), power, least)

    def coefficients_at(self, time: _math.Time) -> Coefficients:
        """The same as numbers."""
        assert self.member.coefficients is not None
        return self.member.coefficients(time, **self._values(self.hyperparameters, time))

    def quiet_at(self, then: _quiet.Times, j: _quiet.Times) -> _quiet.Quiet:
        """The direction of the j-th step without a gradient after `then` updates."""
        assert self.member.quiet is not None
        return self.member.quiet(then, j, **self.hyperparameters)

    def _values(self, names: Iterable[str], time: _math.Time) -> dict[str, Any]:
        """The hyperparameters of these names, schedules at their values for the time."""
        return {
            name: _validate.at_count(name, self.hyperparameters[name], time.made) for name in names
        }


_M = Moment("mu", Role.FIRST, "b1")
_V = Moment("nu", Role.SECOND, "b2")
_V_MAX = Moment("nu_max", Role.MAXIMUM, None)
_SLOW = Moment("mu_slow", Role.FIRST, "b3")
_RATES = {"b1": _validate.decay_rate, "b2": _validate.decay_rate}
_POSITIVE = functools.partial(_validate.in_range, above=0.0)
_EPS = {"eps": _validate.non_negative, "eps_root": _validate.non_negative}

ADAM = Member(
    name="adam",
    state=AdamState,
    moments=(_M, _V),
    equations=_math.adam,
    ratios=_math.moment_ratios,
    rates=_RATES,
    epsilons=_EPS,
    coefficients=coefficients.adam,
    quiet=_quiet.adam,
)
NADAM = Member(
    name="nadam",
    state=AdamState,
    moments=(_M, _V),
    equations=_math.nadam,
    ratios=_math.moment_ratios,
    rates=_RATES,
    epsilons=_EPS,
    options={"momentum_decay": _validate.optional(_POSITIVE)},
    coefficients=coefficients.nadam,
    quiet=_quiet.nadam,
)
AMSGRAD = Member(
    name="amsgrad",
    state=AmsgradState,
    moments=(_M, _V, _V_MAX),
    equations=functools.partial(_math.amsgrad, maximum="raw"),
    ratios=_math.moment_ratios,
    rates=_RATES,
    epsilons=_EPS,
    options={"bias_correction_mu": _validate.flag, "bias_correction_nu": _validate.flag},
    quiet=functools.partial(_quiet.amsgrad, maximum="raw"),
)
CORRECTED_AMSGRAD = dataclasses.replace(
    AMSGRAD,
    name="corrected amsgrad",
    state=CorrectedAmsgradState,
    equations=functools.partial(_math.amsgrad, maximum="corrected"),
    quiet=functools.partial(_quiet.amsgrad, maximum="corrected"),
)
ADAMAX = Member(
    name="adamax",
    state=AdamState,
    moments=(_M, _V),
    equations=_math.adamax,
    ratios=_math.norm_ratios,
    rates=_RATES,
    epsilons={"eps": _validate.non_negative},
    power=1,
)
RADAM = Member(
    name="radam",
    state=AdamState,
    moments=(_M, _V),
    equations=_math.radam,
    ratios=_math.moment_ratios,
    rates=_RATES,
    epsilons=_EPS,
    options={
        "threshold": functools.partial(_validate.in_range, at_least=4.0),
        "nesterov": _validate.flag,
    },
    coefficients=coefficients.radam,
    quiet=_quiet.radam,
)
_SCHEDULED_RATE = _validate.scheduled(_validate.decay_rate)
ADEMAMIX = Member(
    name="ademamix",
    state=AdemamixState,
    moments=(_M, _V, _SLOW),
    equations=_math.ademamix,
    ratios=_math.ademamix_ratios,
    rates=_RATES | {"b3": _SCHEDULED_RATE, "warmup": _validate.optional(_POSITIVE)},
    epsilons=_EPS,
    options={"alpha": _validate.schedulable},
)
MEMBERS = (ADAM, NADAM, AMSGRAD, CORRECTED_AMSGRAD, ADAMAX, RADAM, ADEMAMIX)


def is_state(node: Any) -> bool:
    """Whether this is a state of the family."""
    return any(type(node) is member.state for member in MEMBERS)


def member_of(state: Any, *, adamax: bool = False) -> Member:
    """The member that a state is of, as far as the meaning of its moments goes.

    AdaMax has Adam's state, so it has to be said.
    """
    return ADAMAX if adamax else next(m for m in MEMBERS if type(state) is m.state)
