"""The training of experiments.mnist, once for a setting and a seed."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.common.mnist.cnn import CNN
from experiments.common.mnist.dataset import Mnist as Images
from experiments.common.mnist.dataset import load
from experiments.mnist.train import State, make_evaluate, make_train

from .runs import RUNS, run_all
from .settings import SETTINGS, in_dtype


@dataclass(frozen=True)
class Mnist:
    """Trains the CNN of experiments.mnist with each setting."""

    settings: tuple[str, ...] = tuple(SETTINGS)
    """Rows of the table to run."""
    seeds: int = 5
    """Of parameters and the images' order: 0, 1, ..."""
    epochs: int = 2
    """Passes over the 60,000 images."""
    batch_size: int = 128
    """Images in a step."""
    learning_rate: float = 1e-3
    """Adam's step size."""
    folder: Path = RUNS
    """Where finished runs are."""


def train(setting: str, seed: int, config: Mnist, mnist: Images) -> dict[str, Any]:
    """Final losses and accuracy, and the mean loss of every 12 steps."""
    optimizer = SETTINGS[setting].build(config.learning_rate, 0.0, optax.identity())
    graphdef, params = nnx.split(CNN(rngs=nnx.Rngs(seed)), nnx.Param)
    params = in_dtype(nnx.to_pure_dict(params), SETTINGS[setting].param_dtype)
    state = State(params, optimizer.init(params))
    train = make_train(graphdef, optimizer, config.batch_size)
    evaluate = make_evaluate(graphdef)
    images, labels, test_images, test_labels = map(jnp.asarray, mnist)

    steps = len(images) // config.batch_size
    curve: dict[str, list[float]] = {"steps": [], "loss": []}
    for epoch in range(config.epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(images)).astype(np.int32)
        order = order[: steps * config.batch_size].reshape(steps, -1)
        for start in range(0, steps, 12):
            stop = min(start + 12, steps)
            span = jnp.int32(start), jnp.int32(stop)
            state, metrics = train(state, images, labels, order, *span)
            curve["steps"].append(epoch * steps + stop)
            curve["loss"].append(float(metrics.loss) / (stop - start) / config.batch_size)

    seen = slice(len(test_images))  # as many as are in the test: all would take seconds
    training = evaluate(state.params, images[seen], labels[seen])
    test = evaluate(state.params, test_images, test_labels)
    return {
        "final": {
            "training loss": float(training.loss) / len(images[seen]),
            "test loss": float(test.loss) / len(test_images),
            "test accuracy": int(test.correct) / len(test_images),
        },
        "curve": curve,
    }


def main(config: Mnist) -> None:
    """Every run that is not there yet."""
    mnist = load()
    fixed = asdict(config)
    for name in ("settings", "seeds", "folder"):
        del fixed[name]
    run_all(
        "mnist",
        config.settings,
        config.seeds,
        config.folder,
        fixed,
        lambda setting, seed: train(setting, seed, config, mnist),
        guess=45,
    )
