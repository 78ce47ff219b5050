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

from jadam import _math, _validate
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
        options: all other hyperparameters, and how each is checked.
        power: the second moment is a root to this power: 2 for v, 1 for AdaMax's u.
        coefficients: the equations as numbers, where the kernels have them; None leaves this member
            to XLA.
    """

    name: str
    state: type[State]
    moments: tuple[Moment, ...]
    equations: Callable[..., _math.Equations]
    ratios: Callable[..., tuple[_math.Ratio, ...]]
    rates: Mapping[str, _validate.Check]
    options: Mapping[str, _validate.Check]
    power: int = 2
    coefficients: Callable[..., Coefficients] | None = None

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
        return Rule(self, self._checked({**self.rates, **self.options}, hyperparameters))

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
        *,
        b1: Any,
        b2: Any,
        eps: Any = 0.0,
    ) -> tuple[Array, ...]:
        """The moments after some steps without a gradient; `eps` is that of AdaMax alone.

        b1ᵏ·m, b2ᵏ·v, and a maximum as it is. AdaMax's u is eps at least after a step.
        """

        def one(role: Role, x: Array) -> Array:
            if role is Role.MAXIMUM:
                return x
            b = b1 if role is Role.FIRST else b2
            x = _math.Decay.of(b, steps.dtype).power(steps) * x
            if role is Role.SECOND and self.power == 1:
                x = jnp.where(steps > 0, jnp.maximum(x, jnp.asarray(eps, x.dtype)), x)
            return x

        roles = (moment.role for moment in self.moments)
        return tuple(one(role, x) for role, x in zip(roles, moments, strict=True))

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
        rates = self._values(self.member.rates, time)
        return _math.Relation(self.member.ratios(time, **rates), self.member.power)

    def coefficients_at(self, time: _math.Time) -> Coefficients:
        """The same as numbers."""
        assert self.member.coefficients is not None
        return self.member.coefficients(time, **self._values(self.hyperparameters, time))

    def _values(self, names: Iterable[str], time: _math.Time) -> dict[str, Any]:
        """The hyperparameters of these names, schedules at their values for the time."""
        return {
            name: _validate.at_count(name, self.hyperparameters[name], time.made) for name in names
        }


_M = Moment("mu", Role.FIRST)
_V = Moment("nu", Role.SECOND)
_V_MAX = Moment("nu_max", Role.MAXIMUM)
_SLOW = Moment("mu_slow", Role.FIRST)
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
    options=_EPS,
    coefficients=coefficients.adam,
)
NADAM = Member(
    name="nadam",
    state=AdamState,
    moments=(_M, _V),
    equations=_math.nadam,
    ratios=_math.moment_ratios,
    rates=_RATES,
    options=_EPS | {"momentum_decay": _validate.optional(_POSITIVE)},
    coefficients=coefficients.nadam,
)
AMSGRAD = Member(
    name="amsgrad",
    state=AmsgradState,
    moments=(_M, _V, _V_MAX),
    equations=functools.partial(_math.amsgrad, maximum="raw"),
    ratios=_math.moment_ratios,
    rates=_RATES,
    options=_EPS | {"bias_correction_mu": _validate.flag, "bias_correction_nu": _validate.flag},
)
CORRECTED_AMSGRAD = dataclasses.replace(
    AMSGRAD,
    name="corrected amsgrad",
    state=CorrectedAmsgradState,
    equations=functools.partial(_math.amsgrad, maximum="corrected"),
)
ADAMAX = Member(
    name="adamax",
    state=AdamState,
    moments=(_M, _V),
    equations=_math.adamax,
    ratios=_math.norm_ratios,
    rates=_RATES,
    options={"eps": _validate.non_negative},
    power=1,
)
RADAM = Member(
    name="radam",
    state=AdamState,
    moments=(_M, _V),
    equations=_math.radam,
    ratios=_math.moment_ratios,
    rates=_RATES,
    options=_EPS
    | {
        "threshold": functools.partial(_validate.in_range, at_least=4.0),
        "nesterov": _validate.flag,
    },
    coefficients=coefficients.radam,
)
_SCHEDULED_RATE = _validate.scheduled(_validate.decay_rate)
ADEMAMIX = Member(
    name="ademamix",
    state=AdemamixState,
    moments=(_M, _V, _SLOW),
    equations=_math.ademamix,
    ratios=_math.ademamix_ratios,
    rates=_RATES | {"b3": _SCHEDULED_RATE, "warmup": _validate.optional(_POSITIVE)},
    options=_EPS | {"alpha": _validate.schedulable},
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
