"""Training and evaluation: the jitted functions, and the loop over epochs around them."""

import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import jadam
from experiments.bench.report import write_file

from .data import Mnist, load
from .model import CNN

RESULT = Path(__file__).parents[2] / "runs" / "mnist" / "result.json"


@dataclass(frozen=True)
class Config:
    """Trains a small CNN on MNIST with jadam.adam."""

    learning_rate: float = 1e-3
    """Adam's step size."""
    batch_size: int = 32
    """Images in a step; an epoch leaves out the few images that fill no batch, others each time."""
    epochs: int = 4
    """Passes over the 60,000 images."""
    seed: int = 0
    """Of the parameters and of the order of the images."""
    data_dir: Path | None = None
    """A prepared TFDS folder to read instead of the files that come with the project."""
    out: Path = RESULT
    """The JSON file for the numbers."""
    diagnostics: bool = False
    """Writes jadam.diagnostics of 20 steps an epoch, and a picture of them, beside that file."""

    def __post_init__(self) -> None:
        checks = {
            "learning-rate": (
                0 < self.learning_rate < math.inf,
                "a number above 0",
                self.learning_rate,
            ),
            "batch-size": (1 <= self.batch_size <= 60_000, "1 to 60000", self.batch_size),
            "epochs": (self.epochs >= 1, "1 or more", self.epochs),
            "seed": (self.seed >= 0, "0 or more", self.seed),
            "out": (not self.out.is_dir(), "a file to write", f"the folder {self.out}"),
        }
        for name, (right, expected, got) in checks.items():
            if not right:
                raise ValueError(f"--{name}: expected {expected}, got {got}")


class State(NamedTuple):
    """All that a step changes."""

    params: nnx.State
    opt_state: optax.OptState


class Metrics(NamedTuple):
    """Sums over images."""

    loss: jax.Array
    correct: jax.Array


def loss_fn(model: CNN, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, Metrics]:
    """The mean cross entropy of a batch uint8[n, 28, 28, 1], and its sums."""
    logits = model(images.astype(jnp.float32) / 255)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    correct = jnp.sum(logits.argmax(-1) == labels)
    return losses.mean(), Metrics(losses.sum(), correct)


class Step(NamedTuple):
    """What a step makes."""

    state: State
    metrics: Metrics
    grads: nnx.State
    updates: nnx.State


def make_step(
    graphdef: nnx.GraphDef[CNN], optimizer: optax.GradientTransformation, batch_size: int
) -> Callable[..., Step]:
    """The function of a state, images, labels and the indices of a batch that makes a step."""
    # Two halves of a batch are independent computations, which XLA:CPU runs at the same time:
    # that occupies two cores better than threads inside each product.
    parts = 2 if jax.default_backend() == "cpu" and batch_size % 2 == 0 else 1

    def step(state: State, images: jax.Array, labels: jax.Array, batch: jax.Array) -> Step:
        def loss(params: nnx.State, part: jax.Array) -> tuple[jax.Array, Metrics]:
            return loss_fn(nnx.merge(graphdef, params), images[part], labels[part])

        halves = batch.reshape(parts, -1)
        gradients = [jax.grad(loss, has_aux=True)(state.params, part) for part in halves]
        grads, sums = jax.tree.map(lambda *xs: sum(xs), *gradients)
        grads = jax.tree.map(lambda g: g / parts, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return Step(State(params, opt_state), sums, grads, updates)

    return step


def make_train(
    graphdef: nnx.GraphDef[CNN], optimizer: optax.GradientTransformation, batch_size: int
) -> Callable:
    """The jitted function that trains on the batches `order[start:stop]`."""
    make_one = make_step(graphdef, optimizer, batch_size)

    # A dynamic start and stop: one compiled loop for a progress report's worth of steps or an
    # epoch, in which no step waits for Python. All images stay on the device.
    @partial(jax.jit, donate_argnames="state")
    def train(
        state: State,
        images: jax.Array,
        labels: jax.Array,
        order: jax.Array,
        start: jax.Array,
        stop: jax.Array,
    ) -> tuple[State, Metrics]:
        def step(i: jax.Array, carry: tuple[State, Metrics]) -> tuple[State, Metrics]:
            state, metrics = carry
            made = make_one(state, images, labels, order[i])
            return made.state, jax.tree.map(jnp.add, metrics, made.metrics)

        return lax.fori_loop(start, stop, step, (state, Metrics(jnp.float32(0), jnp.int32(0))))

    return train


def make_diagnose(
    graphdef: nnx.GraphDef[CNN], optimizer: optax.GradientTransformation, batch_size: int
) -> Callable:
    """The jitted function that reports on a step which it does not take."""
    make_one = make_step(graphdef, optimizer, batch_size)

    @jax.jit
    def diagnose(
        state: State, images: jax.Array, labels: jax.Array, batch: jax.Array
    ) -> dict[str, Any]:
        made = make_one(state, images, labels, batch)
        return jadam.diagnostics(made.state.opt_state, made.updates, state.params, made.grads)

    return diagnose


def make_evaluate(graphdef: nnx.GraphDef[CNN]) -> Callable:
    """The jitted function that sums loss and hits over batches."""

    @jax.jit
    def evaluate(params: nnx.State, images: jax.Array, labels: jax.Array) -> Metrics:
        model = nnx.merge(graphdef, params)
        # 100 at a time: the widest activation of 10,000 images would need 1 GB.
        batches = (images.reshape(-1, 100, 28, 28, 1), labels.reshape(-1, 100))
        sums = lax.map(lambda batch: loss_fn(model, *batch)[1], batches)
        return jax.tree.map(jnp.sum, sums)

    return evaluate


def train_and_test(config: Config, mnist: Mnist) -> dict[str, Any]:
    """Trains on the one split, measures the other, and returns the numbers."""
    graphdef, params = nnx.split(CNN(rngs=nnx.Rngs(config.seed)), nnx.Param)
    optimizer = jadam.adam(config.learning_rate)
    state = State(params, optimizer.init(params))
    images, labels, test_images, test_labels = map(jnp.asarray, mnist)

    # Compiled before the clock of the first epoch starts.
    clock = time.perf_counter()
    steps = len(images) // config.batch_size
    order = jax.ShapeDtypeStruct((steps, config.batch_size), jnp.int32)
    train = make_train(graphdef, optimizer, config.batch_size)
    train = train.lower(state, images, labels, order, jnp.int32(0), jnp.int32(0)).compile()
    evaluate = make_evaluate(graphdef).lower(params, test_images, test_labels).compile()
    diagnose = make_diagnose(graphdef, optimizer, config.batch_size)
    compile_seconds = time.perf_counter() - clock

    epochs, reports = [], []
    with Progress(
        TextColumn("epoch {task.description}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  accuracy {task.fields[accuracy]:.2%}"),
        TextColumn("{task.fields[speed]:,.0f} images/s"),
        TimeElapsedColumn(),
    ) as progress:
        for epoch in range(config.epochs):
            task = progress.add_task(
                f"{epoch + 1}/{config.epochs}", total=steps, loss=0, accuracy=0, speed=0
            )
            clock = time.perf_counter()
            order = np.random.default_rng([config.seed, epoch]).permutation(len(images))
            order = order[: steps * config.batch_size].astype(np.int32).reshape(steps, -1)
            loss, correct, stop = 0.0, 0, 0
            while stop < steps:
                start, stop = stop, min(stop + max(1, steps // 20), steps)
                if config.diagnostics:
                    report = jax.device_get(diagnose(state, images, labels, order[start]))
                    reports.append({"step": epoch * steps + start + 1, **report})
                span = jnp.int32(start), jnp.int32(stop)
                state, metrics = train(state, images, labels, order, *span)
                loss, correct = loss + float(metrics.loss), correct + int(metrics.correct)
                seen, seconds = stop * config.batch_size, time.perf_counter() - clock
                means = {"loss": loss / seen, "accuracy": correct / seen}
                progress.update(task, completed=stop, speed=seen / seconds, **means)
            epochs.append({**means, "images": seen, "seconds": seconds})

    test = evaluate(state.params, test_images, test_labels)
    return {
        "test": {
            "loss": float(test.loss) / len(test_images),
            "accuracy": int(test.correct) / len(test_images),
            "images": len(test_images),
        },
        "epochs": epochs,
        "compile_seconds": compile_seconds,
        **({"diagnostics": reports} if config.diagnostics else {}),
    }


def main(config: Config) -> None:
    """Runs the experiment and writes its JSON file."""
    result = train_and_test(config, load(config.data_dir))
    if config.diagnostics:
        from . import diagnostics  # matplotlib, for whom a picture is wanted

        diagnostics.write(result.pop("diagnostics"), config.out.parent)
    result["config"] = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in asdict(config).items()
    }
    result["machine"] = {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
    }
    result["versions"] = {"python": platform.python_version()} | {
        module.__name__: module.__version__ for module in (jax, flax, optax, jadam)
    }
    write_file(config.out, json.dumps(result, indent=2).encode() + b"\n")
    test = result["test"]
    print(
        f"test loss {test['loss']:.4f}, accuracy {test['accuracy']:.2%} "
        f"of {test['images']:,} images; numbers in {config.out}"
    )
