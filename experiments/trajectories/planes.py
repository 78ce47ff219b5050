"""Adam's hyperparameters in the plane: the last loss of thousands of settings, in one vmap."""

from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

import jadam

from .descend import descend
from .problem import Problem

LEARNING_RATES = np.logspace(-3, 1, 49)
# 1 - b. A decay rate b averages over some 1/(1-b) steps, so a logarithmic scale of 1 - b is even.
DEFAULTS = {"b1": 0.9, "b2": 0.999}
PLANES = {"b1": np.geomspace(1e-3, 0.9, 37), "b2": np.geomspace(1e-4, 0.9, 49)}


class Planes(NamedTuple):
    """The last losses of each problem: one minus decay rate by learning rate."""

    b1: Float[np.ndarray, "problems b1 learning_rate"]
    b2: Float[np.ndarray, "problems b2 learning_rate"]


@partial(jax.jit, static_argnums=0)
def _last_losses(steps: int, *arguments) -> Float[Array, "f s"]:
    """The last losses alone; inside one jit, so that no paths are kept."""
    return descend(jadam.adam, steps, *arguments).losses[..., -1]


def scan_planes(problems: list[Problem], steps: int) -> Planes:
    """Every learning rate with every b1 at the default b2, and the other way."""
    columns = []
    for name, complements in PLANES.items():
        b, rate = np.meshgrid(1 - complements, LEARNING_RATES, indexing="ij")
        others = {other: np.full(b.shape, value) for other, value in DEFAULTS.items()}
        columns.append({**others, "learning_rate": rate, name: b})
    settings = {
        name: np.concatenate([column[name].ravel() for column in columns]).astype(np.float32)
        for name in columns[0]
    }
    functions = np.array([problem.index for problem in problems])
    starts = np.array([problem.start for problem in problems], np.float32)
    losses = np.asarray(_last_losses(steps, functions, starts, settings))
    losses = np.where(np.isfinite(losses), losses, np.inf)
    parts = np.split(losses, [len(LEARNING_RATES) * len(PLANES["b1"])], axis=1)
    return Planes(*(part.reshape(len(problems), -1, len(LEARNING_RATES)) for part in parts))
