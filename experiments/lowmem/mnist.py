"""MNIST: the training of a CNN, once for a setting and a seed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, PyTree, UInt8

from experiments.common.mnist.cnn import CNN
from experiments.common.mnist.dataset import Mnist as Images
from experiments.common.mnist.dataset import load

from .runs import Comparison
from .settings import SETTINGS, in_dtype

Pixels: TypeAlias = UInt8[Array, "n 28 28 1"]
Labels: TypeAlias = Int[Array, " n"]
Logits: TypeAlias = Float[Array, "n 10"]


@dataclass(frozen=True)
class Mnist(Comparison):
    """Trains a CNN on MNIST with each setting."""

    seeds: int = 5
    """Of parameters and of the images' order: 0, 1, ..."""
    epochs: int = 2
    """Passes over the 60,000 images."""
    batch_size: int = 128
    """Images in a step: an even number."""
    learning_rate: float = 1e-3
    """Adam's step size."""

    def __post_init__(self) -> None:
        if self.batch_size < 2 or self.batch_size % 2:
            raise ValueError(f"--batch-size: expected an even number, got {self.batch_size}")


def predict(graphdef: nnx.GraphDef, params: PyTree, images: Pixels) -> Logits:
    return nnx.merge(graphdef, params)(images.astype(jnp.float32) / 255)


def losses_of(logits: Logits, labels: Labels) -> Float[Array, " n"]:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def make_train(graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation) -> Callable:
    """The jitted function that trains on the batches order[start:stop]; also their losses' sum."""

    # A dynamic start and stop: one compiled loop serves each span, the shorter last one, too.
    @partial(jax.jit, donate_argnums=(0, 1))
    def train(
        params: PyTree,
        state: optax.OptState,
        images: Pixels,
        labels: Labels,
        order: Int[Array, "steps batch"],
        start: Int[Array, ""],
        stop: Int[Array, ""],
    ) -> tuple[PyTree, optax.OptState, Float[Array, ""]]:
        def loss(params: PyTree, batch: Int[Array, " half"]) -> Float[Array, ""]:
            return losses_of(predict(graphdef, params, images[batch]), labels[batch]).mean()

        def step(i: Int[Array, ""], carry: tuple) -> tuple:
            params, state, total = carry
            # Two halves of a batch are independent, and XLA:CPU computes them at the same time.
            made = [jax.value_and_grad(loss)(params, half) for half in order[i].reshape(2, -1)]
            value, grads = jax.tree.map(lambda one, other: (one + other) / 2, *made)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state, total + value

        *trained, total = lax.fori_loop(start, stop, step, (params, state, jnp.float32(0)))
        return *trained, total

    return train


def make_evaluate(graphdef: nnx.GraphDef) -> Callable:
    """The jitted function from parameters, images and labels to the sums of losses and hits."""

    @jax.jit
    def evaluate(
        params: PyTree, images: Pixels, labels: Labels
    ) -> tuple[Float[Array, ""], Int[Array, ""]]:
        # 100 at a time: the widest activation of 10,000 images would need 1 GB.
        hundreds = images.reshape(-1, 100, 28, 28, 1)
        logits = lax.map(partial(predict, graphdef, params), hundreds).reshape(-1, 10)
        return losses_of(logits, labels).sum(), jnp.sum(logits.argmax(-1) == labels)

    return evaluate


def train(setting: str, seed: int, config: Mnist, mnist: Images) -> dict[str, Any]:
    """Final losses and accuracy, and the mean loss of every 12 steps."""
    optimizer = SETTINGS[setting].build(config.learning_rate, 0.0, optax.identity())
    graphdef, params = nnx.split(CNN(rngs=nnx.Rngs(seed)), nnx.Param)
    params = in_dtype(nnx.to_pure_dict(params), SETTINGS[setting].param_dtype)
    state = optimizer.init(params)
    train = make_train(graphdef, optimizer)
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
            params, state, loss = train(params, state, images, labels, order, *span)
            curve["steps"].append(epoch * steps + stop)
            curve["loss"].append(float(loss) / (stop - start))

    seen = slice(len(test_images))  # as many as are in the test: all would take seconds
    training_loss, _ = evaluate(params, images[seen], labels[seen])
    test_loss, correct = evaluate(params, test_images, test_labels)
    return {
        "final": {
            "training loss": float(training_loss) / len(images[seen]),
            "test loss": float(test_loss) / len(test_images),
            "test accuracy": int(correct) / len(test_images),
        },
        "curve": curve,
    }


def main(config: Mnist) -> None:
    """Every run that is not there yet."""
    mnist = load()

    def run(setting: str, seed: int) -> dict[str, Any]:
        return train(setting, seed, config, mnist)

    config.run_all("mnist", run, guess=45)
