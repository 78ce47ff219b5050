"""Small tasks in search of a loss: the same noise for every storage, beside float32's result."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float
from rich.progress import track

from experiments.bench.codecs.adam import EPS
from experiments.common.intervals import interval

from .gradients import LANES
from .storages import FLOAT32, STORAGES, Rates, Storage

BLOCKS, GROUPS = 4, 4
"""Every fourth element of a block is a group: 16 groups of independent noise."""
SPREADS = (8, 16, 20, 24)


class Task(NamedTuple):
    """Parameters x that go from 0 to 1 by gradients s·(x - 1 + noise·z), z normal.

    Attributes:
        what: in the tables.
        rates: b1 and b2.
        learning_rate: of all steps.
        noise: the gradient's standard deviation, beside a distance of 1.
        steps: of which the second half counts.
        share: of the steps, in which an element has a gradient.
        octaves: over which the gradients' sizes s spread evenly within a block.
        eps: of Adam.
    """

    what: str
    rates: Rates = (0.9, 0.999)
    learning_rate: float = 1e-2
    noise: float = 1.0
    steps: int = 10_000
    share: float = 1.0
    octaves: int = 0
    eps: float = EPS


TASKS = (
    Task("noise"),
    Task("a tenth of the learning rate", learning_rate=1e-3, steps=30_000),
    Task("b2 = .9999", (0.9, 0.9999), steps=30_000),
    Task("b2 = .99999", (0.9, 0.99999), steps=100_000),
    Task("b1, b2 = .95, .95", (0.95, 0.95)),
    Task("b1 = .99", (0.99, 0.999)),
    Task("little noise", noise=0.01),
    Task("gradients once in 1,000 steps", learning_rate=3e-3, steps=60_000, share=1e-3),
    *(
        Task(f"sizes over {n} octaves in a block", octaves=n, eps=1e-20, steps=4_000)
        for n in SPREADS
    ),
)


def losses(storage: Storage, task: Task) -> Float[np.ndarray, " groups"]:
    """The mean of ½(x - 1)² in the second half of the steps, for each group of elements."""
    shape = BLOCKS, LANES
    scale = jnp.asarray(np.exp2(-np.linspace(0, task.octaves, LANES)), jnp.float32)[None]

    @jax.jit
    def run(stored: Any) -> Array:
        def step(carry: tuple, t: Array) -> tuple:
            stored, x, total = carry
            noise, chosen = jax.random.split(jax.random.fold_in(jax.random.key(0, impl="rbg"), t))
            g = scale * (x - 1 + task.noise * jax.random.normal(noise, shape))
            if task.share < 1:
                g = jnp.where(jax.random.uniform(chosen, shape) < task.share, g, 0)
            stored, u = storage.step(stored, t, g, task.rates, task.eps)
            x = x - task.learning_rate * u
            late = t > task.steps - task.steps // 2
            return (stored, x, total + jnp.where(late, 0.5 * jnp.square(x - 1), 0)), None

        start = stored, jnp.zeros(shape), jnp.zeros(shape)
        (_, _, total), _ = lax.scan(step, start, jnp.arange(1, task.steps + 1))
        return total.reshape(BLOCKS, -1, GROUPS).mean(1).reshape(-1) / (task.steps // 2)

    return np.asarray(run(storage.start(jnp.zeros(shape), task.rates)), np.float64)


def search(
    storages: Sequence[Storage] = STORAGES, tasks: Sequence[Task] = TASKS
) -> dict[str, dict[str, Any]]:
    """Of each task float32's loss, and how much larger each storage's is, with its interval."""
    found = {}
    for task in track(tasks, "tasks"):
        reference = losses(FLOAT32, task)
        found[task.what] = {"loss": float(reference.mean()), "storages": {}}
        for storage in storages:
            if storage is not FLOAT32:
                larger = interval(losses(storage, task) / reference - 1)
                # A loss past float32's range is null in JSON.
                row = {k: x if math.isfinite(x) else None for k, x in larger._asdict().items()}
                found[task.what]["storages"][storage.name] = row
    return found
