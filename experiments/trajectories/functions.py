"""The functions that are walked down: two variables, known minima of value 0."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Point = tuple[float, float]
View = tuple[Point, Point]
"""The limits of x and of y in a picture."""


class Function(NamedTuple):
    """A function of x and y, scalars or arrays of jax or NumPy, with what is known of it."""

    title: str
    formula: str
    value: Callable[[Any, Any], Any]
    minima: tuple[Point, ...]
    """All of them; the value there is 0."""
    start: Point
    """Where all optimizers begin."""
    view: View


def sphere(x: Any, y: Any) -> Any:
    """The simplest: every direction is alike."""
    return x**2 + y**2


def ellipse(x: Any, y: Any) -> Any:
    """Ill-conditioned: the curvature across the valley is 100 times that along it."""
    return 0.5 * (x**2 + 100 * y**2)


def rosenbrock(x: Any, y: Any) -> Any:
    """A narrow curved valley, nearly flat along its floor. Rosenbrock (1960)."""
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def beale(x: Any, y: Any) -> Any:
    """Plateaus between steep walls. Beale (1958)."""
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


def himmelblau(x: Any, y: Any) -> Any:
    """Four minima, all alike. Himmelblau (1972)."""
    return (x**2 + y - 11) ** 2 + (x + y**2 - 7) ** 2


def saddle(x: Any, y: Any) -> Any:
    """x² - y² near the saddle point 0, with a minimum on either side of it."""
    return x**2 + (y**2 - 1) ** 2 / 2


FUNCTIONS = {
    "sphere": Function(
        "sphere", "x² + y²", sphere, ((0.0, 0.0),), (-4.0, 3.0), ((-5.5, 5.5), (-5.5, 5.5))
    ),
    "ellipse": Function(
        "ill-conditioned",
        "½(x² + 100y²)",
        ellipse,
        ((0.0, 0.0),),
        (-4.0, 1.0),
        ((-5.0, 3.0), (-1.5, 1.5)),
    ),
    "rosenbrock": Function(
        "Rosenbrock",
        "(1 - x)² + 100(y - x²)²",
        rosenbrock,
        ((1.0, 1.0),),
        (-1.2, 1.0),
        ((-2.0, 2.0), (-1.0, 3.0)),
    ),
    "beale": Function(
        "Beale",
        "(1.5 - x + xy)² + (2.25 - x + xy²)² + (2.625 - x + xy³)²",
        beale,
        ((3.0, 0.5),),
        (-1.0, -1.0),
        ((-4.5, 4.5), (-4.5, 4.5)),
    ),
    "himmelblau": Function(
        "Himmelblau",
        "(x² + y - 11)² + (x + y² - 7)²",
        himmelblau,
        (
            (3.0, 2.0),
            (-2.805118086952745, 3.131312518250573),
            (-3.779310253377747, -3.283185991286170),
            (3.584428340330492, -1.848126526964404),
        ),
        (0.0, 0.0),
        ((-5.0, 5.0), (-5.0, 5.0)),
    ),
    "saddle": Function(
        "saddle",
        "x² + ½(y² - 1)²",
        saddle,
        ((0.0, 1.0), (0.0, -1.0)),
        (-2.0, 0.01),
        ((-2.5, 2.5), (-2.0, 2.0)),
    ),
}


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
