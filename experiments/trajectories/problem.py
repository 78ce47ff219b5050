"""Where a descent begins: a function with its start and what a picture shows of it."""

from typing import NamedTuple

import numpy as np

from experiments.common.objectives import FUNCTIONS, Function, Point, View


class Problem(NamedTuple):
    """A function, where one begins on it, and what a picture shows of it."""

    name: str
    start: Point
    view: View

    @property
    def function(self) -> Function:
        return FUNCTIONS[self.name]

    @property
    def index(self) -> int:
        """Its place in FUNCTIONS."""
        return list(FUNCTIONS).index(self.name)


def problem(name: str, start: Point | None = None) -> Problem:
    """The function from its own start or another, with a view that holds the start.

    Raises:
        ValueError: the loss is not finite there.
    """
    function = FUNCTIONS[name]
    if start is None:
        return Problem(name, function.start, function.view)
    with np.errstate(over="ignore", invalid="ignore"):
        loss = function.value(*np.array(start, np.float32))
    if not np.isfinite(loss):
        raise ValueError(f"--start: expected a point where {name} is finite, got {start}: {loss}")
    # A tenth more, so that a start outside does not lie on the edge.
    low, high = np.transpose(function.view)
    margin = (np.maximum(high, start) - np.minimum(low, start)) / 10
    low = np.where(start < low, start - margin, low)
    high = np.where(start > high, start + margin, high)
    return Problem(name, start, tuple(zip(low.tolist(), high.tolist(), strict=True)))
