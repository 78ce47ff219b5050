"""The state of every member of the family."""

from typing import NamedTuple

from jadam._types import Count, PyTree


class AdamState(NamedTuple):
    """What Adam remembers between two updates, with optax's field names.

    Attributes:
        count: the number of updates made, int32, stays at 2³¹-1 once there.
        mu: the first moments m, a tree like the parameters.
        nu: the second moments v (AdaMax: the norms u), a tree like the parameters. Real also for
            complex parameters.
        nu_max: AMSGrad's maxima of v, a tree like the parameters; None for the others.
    """

    count: Count  # pyright: ignore[reportIncompatibleMethodOverride]  (optax has this name)
    mu: PyTree
    nu: PyTree
    nu_max: PyTree = None
