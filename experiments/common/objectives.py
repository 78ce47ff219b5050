"""The functions that optimizers descend: of two variables, with known minima of value 0."""

from collections.abc import Callable
from typing import Any, NamedTuple

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
