"""What the three figures share: training under many settings at once, and finished parts kept."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, PyTree
from rich.progress import track

from experiments.common.report import write_json
from experiments.papers.grid import Settings, product

Losses = Float[np.ndarray, "epochs settings"]


class Task(NamedTuple):
    """What is learnt: `loss(params, batch, key)` on batches of the examples, from `params` on."""

    loss: Callable[[PyTree, PyTree, Array], Float[Array, ""]]
    params: PyTree
    examples: PyTree
    batch_size: int


def check(name: str, config: Any) -> None:
    """Checks the options that every figure has.

    Raises:
        ValueError: there is no epoch; the images are less than a batch or more than there are.
    """
    if np.min(config.epochs) < 1:
        raise ValueError(f"--{name}.epochs: expected 1 or more, got {config.epochs}")
    if not 1 <= config.batch_size <= config.images <= 60_000:
        raise ValueError(
            f"--{name}.images: expected {config.batch_size} (a batch) to 60000, got {config.images}"
        )


def grid(**values: tuple[float, ...]) -> Settings:
    """Every combination of the values, as float32."""
    return product(**{name: np.float32(value) for name, value in values.items()})


def train(
    task: Task,
    make: Callable[..., optax.GradientTransformation],
    settings: Settings,
    epochs: int,
    seed: int,
    label: str = "training",
) -> Losses:
    """The mean loss over each epoch's batches.

    An epoch is one scan, and all settings are one vmap: they see the same batches in the same
    order with the same noise, and one compilation serves them all.

    Args:
        make: the optimizer of a setting, `make(learning_rate=..., ...)`.
        seed: of the order and the noise.
    """
    count = len(jax.tree.leaves(task.examples)[0])
    steps = count // task.batch_size

    # The examples are an argument: as a constant they would be compiled into the program.
    @partial(jax.jit, donate_argnums=0)
    def epoch(
        carry: PyTree, settings: Settings, examples: PyTree, key: Array
    ) -> tuple[PyTree, Array]:
        order = jax.random.permutation(key, count)[: steps * task.batch_size].reshape(steps, -1)
        keys = jax.random.split(jax.random.fold_in(key, 1), steps)

        def of_one_setting(carry: PyTree, setting: Settings) -> tuple[PyTree, Array]:
            optimizer = make(**setting)

            def step(carry: PyTree, now: tuple[Array, Array]) -> tuple[PyTree, Array]:
                (params, state), (indices, key) = carry, now
                batch = jax.tree.map(lambda x: x[indices], examples)
                loss, grads = jax.value_and_grad(task.loss)(params, batch, key)
                updates, state = optimizer.update(grads, state, params)
                return (optax.apply_updates(params, updates), state), loss

            carry, losses = lax.scan(step, carry, (order, keys))
            return carry, losses.mean()

        return jax.vmap(of_one_setting)(carry, settings)

    def start(setting: Settings) -> PyTree:
        return task.params, make(**setting).init(task.params)

    carry = jax.jit(jax.vmap(start))(settings)
    losses = []
    for number in track(range(epochs), label):
        key = jax.random.fold_in(jax.random.key(seed), number)
        carry, means = epoch(carry, settings, task.examples, key)
        losses.append(np.asarray(means))
    return np.stack(losses)


def kept(path: Path, config: dict[str, Any], run: Callable[[], Losses]) -> Losses:
    """What `run` returned for this config, from the file where there is one."""
    known = json.loads(path.read_text()) if path.exists() else {}
    if known.get("config") != json.loads(json.dumps(config)):
        known = {"config": config, "losses": listed(run())}
        write_json(path, known)
    return unlisted(known["losses"])


def listed(losses: np.ndarray) -> Any:
    """Nested lists of six digits, with None for what is not finite: JSON has no word for it."""
    if losses.ndim:
        return [listed(row) for row in losses]
    return float(f"{losses:.6g}") if np.isfinite(losses) else None


def unlisted(losses: Any) -> np.ndarray:
    """The array that was `listed`; what was not finite is NaN."""
    return np.array(losses, np.float64)
