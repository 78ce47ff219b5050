"""The states of the family, and what a moment is in them."""

import enum
from typing import Any, NamedTuple

import optax
from jaxtyping import Array, Float, Int

from jadam._types import Count, PyTree


class Role(enum.Enum):
    """What a moment is to the equations, hence what a storage may do with it."""

    FIRST = "an average of gradients; complex for complex parameters"
    SECOND = "an average or a maximum of the gradients' sizes, or of their squares; real"
    MAXIMUM = "the largest second moment so far"


class Moment(NamedTuple):
    """A moment of a member.

    Attributes:
        name: its field in the state.
        role: what it is to the equations.
        rate: the hyperparameter by which it fades; None for a maximum, which does not.
    """

    name: str
    role: Role
    rate: str | None

    @property
    def is_first(self) -> bool:
        """Whether it is an average of gradients."""
        return self.role is Role.FIRST


AdamState = optax.ScaleByAdamState
"""What Adam remembers between two updates: optax's own class, so that its states go on here.

Attributes:
    count: the number of updates made, int32, stays at 2³¹-1 once there.
    mu: the first moments m, a tree like the parameters.
    nu: the second moments v (AdaMax: the norms u), a tree like the parameters. Real also for
        complex parameters, but in a state that optax made.
"""

CorrectedAmsgradState = optax.ScaleByAmsgradState
"""What AMSGrad remembers with the maximum of the corrected v, as in optax, whose class it is."""


class AmsgradState(optax.ScaleByAmsgradState):
    """What AMSGrad remembers with the maximum of the raw v, which optax has not.

    Neither maximum follows from the other. So this is a class of its own, with optax's fields, and
    no state of one goes on as the other.

    Attributes:
        count: as in `AdamState`.
        mu: as in `AdamState`.
        nu: as in `AdamState`.
        nu_max: the largest v so far, a tree like the parameters.
    """

    __slots__ = ()


class AdemamixState(NamedTuple):
    """What AdEMAMix remembers.

    Attributes:
        count: as in `AdamState`.
        mu: as in `AdamState`: the fast average of gradients.
        nu: as in `AdamState`.
        mu_slow: the slow average of gradients, a tree like the parameters.
    """

    count: Count  # pyright: ignore[reportIncompatibleMethodOverride]  (optax has this name)
    mu: PyTree
    nu: PyTree
    mu_slow: PyTree


class RowsState(NamedTuple):
    """What `jadam.rows` remembers of a table.

    Attributes:
        dense: the state of the dense transformation, in which the moments of a row are those after
            update `last` of the row. After `flush` it is the dense state of the table.
        last: the number of updates after which each row stands, int32.
        decayed: where the decay follows a schedule, what is needed to make up for it: the sum of
            log(1 - learning_rate·weight_decay) over all updates, and what it was when each row was
            last touched, each as a float32 and the part that it lacks. None otherwise.
    """

    dense: Any
    last: Int[Array, "rows"]
    decayed: tuple[Float[Array, "2"], Float[Array, "rows 2"]] | None
