"""The states of the family."""

from typing import NamedTuple

from jadam._types import Count, PyTree


class AdamState(NamedTuple):
    """What Adam remembers between two updates, field by field optax's `ScaleByAdamState`.

    Attributes:
        count: the number of updates made, int32, stays at 2³¹-1 once there.
        mu: the first moments m, a tree like the parameters.
        nu: the second moments v (AdaMax: the norms u), a tree like the parameters. Real also for
            complex parameters.
    """

    count: Count  # pyright: ignore[reportIncompatibleMethodOverride]  (optax has this name)
    mu: PyTree
    nu: PyTree


class AmsgradState(NamedTuple):
    """What AMSGrad remembers, field by field optax's `ScaleByAmsgradState`.

    Attributes:
        count: as in `AdamState`.
        mu: as in `AdamState`.
        nu: as in `AdamState`.
        nu_max: the largest v so far (raw or corrected), a tree like the parameters.
    """

    count: Count  # pyright: ignore[reportIncompatibleMethodOverride]  (optax has this name)
    mu: PyTree
    nu: PyTree
    nu_max: PyTree
