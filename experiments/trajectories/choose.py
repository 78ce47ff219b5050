"""The learning rate of each optimizer on each function, by one rule for all.

It is the one of RATES with which the loss falls below TARGET for good after the fewest steps. The
steps are a mean over STARTS starts, so that no lucky jump decides. A run that never arrives, or
that ever leaves the picture, counts as one step more than were made. Where two rates need the same
steps, and so where none arrives, the smaller median of the last losses decides.
"""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from .descend import Optimizer, Runs, descend, outcomes
from .problem import Problem

RATES = np.logspace(-4, 3, 57).astype(np.float32)
# The start of the shown run, then a lattice around it, as parts of the picture's width and height.
LATTICE = np.linspace(-0.03, 0.03, 4)
OFFSETS = np.array([(0.0, 0.0), *((x, y) for x in LATTICE for y in LATTICE)])
STARTS = len(OFFSETS)


class Choice(NamedTuple):
    """An optimizer on one function, with the learning rate chosen for it."""

    learning_rate: float
    runs: Runs
    """The one run from the problem's start, [steps+1]."""
    mean_steps: float
    """Over all starts."""
    arrived: int
    """How many of the starts arrived, without leaving the picture."""
    last_losses: Float[np.ndarray, " rates"]
    """The median over starts for each of RATES; infinite where it diverged."""


def choose(optimizer: Optimizer, problems: list[Problem], steps: int) -> list[Choice]:
    """The choice on each problem: functions, starts and learning rates are one vmapped grid."""
    functions = np.repeat([problem.index for problem in problems], STARTS)
    starts = np.concatenate(
        [problem.start + OFFSETS * np.ptp(problem.view, axis=1) for problem in problems]
    ).astype(np.float32)
    runs = jax.device_get(descend(optimizer, steps, functions, starts, {"learning_rate": RATES}))
    grid = (len(problems), STARTS, len(RATES))
    each = Runs(*(x.reshape(*grid, *x.shape[2:]) for x in runs))
    return [
        _choice(Runs(*of_problem), problem)
        for problem, *of_problem in zip(problems, *each, strict=True)
    ]


def _choice(runs: Runs, problem: Problem) -> Choice:
    """Of one problem's runs [starts, rates]."""
    low, high = np.transpose(problem.view)
    inside = np.all((runs.points >= low) & (runs.points <= high), axis=(-2, -1))
    last, steps = outcomes(runs.losses)
    never = runs.losses.shape[-1]
    steps = np.where(inside, steps, never)
    mean_steps = steps.mean(0)
    best = np.lexsort((np.median(np.where(inside, last, np.inf), 0), mean_steps))[0]
    return Choice(
        float(RATES[best]),
        Runs(runs.points[0, best], runs.losses[0, best]),
        float(mean_steps[best]),
        int(np.sum(steps[:, best] < never)),
        np.median(last, 0),
    )
