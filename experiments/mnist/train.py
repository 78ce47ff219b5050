"""Training and evaluation: the jitted functions, and the loop over epochs around them."""

import contextlib
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jaxtyping import PyTree
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import jadam
from experiments.common.mnist.dataset import Mnist, load
from experiments.common.report import write_json

from . import diagnostics, pictures
from .augment import distort
from .checkpoints import begin, locked, save
from .config import Config
from .interruption import InterruptedRunError, interruptions
from .log import Lines, Metrics
from .model import MODELS
from .optimizers import make_schedule


class State(NamedTuple):
    """All that a step changes."""

    params: nnx.State
    opt_state: optax.OptState
    stats: tuple[nnx.State, ...] = ()
    """Of batch norm, if there can be any."""
    average: tuple[PyTree, ...] = ()
    """Of params and stats, if there is one."""

    @property
    def weights(self) -> tuple[nnx.State, ...]:
        """What the model is used with: the average, or params and stats themselves."""
        return self.average or (self.params, *self.stats)


class Sums(NamedTuple):
    """Sums over images."""

    loss: jax.Array
    correct: jax.Array


@jax.jit
def measure(logits: jax.Array, labels: jax.Array) -> Sums:
    """The cross entropies and the hits of logits float32[n, 10]."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return Sums(losses.sum(), jnp.sum(logits.argmax(-1) == labels))


def smooth_loss(logits: jax.Array, labels: jax.Array, smoothing: float) -> jax.Array:
    """The mean cross entropy with labels that give a share to all digits alike."""
    smooth = optax.smooth_labels(jax.nn.one_hot(labels, 10), smoothing)
    return optax.softmax_cross_entropy(logits, smooth).mean()


class Step(NamedTuple):
    """What a step makes."""

    state: State
    sums: Sums
    grads: nnx.State
    updates: nnx.State


def make_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    batch_size: int,
    *,
    augment: float = 0.0,
    label_smoothing: float = 0.0,
    ema: float = 0.0,
) -> Callable[..., Step]:
    """The function of a state, images, labels, the indices of a batch and a key that makes a step.

    The key is for dropout and distortions, and None where there are none.
    """
    # Two halves of a batch are independent computations, which XLA:CPU runs at the same time:
    # that occupies two cores better than threads inside each product.
    parts = 2 if jax.default_backend() == "cpu" and batch_size % 2 == 0 else 1

    def step(
        state: State,
        images: jax.Array,
        labels: jax.Array,
        batch: jax.Array,
        key: jax.Array | None = None,
    ) -> Step:
        def loss(params: nnx.State, part: jax.Array, key: jax.Array | None):
            model = nnx.merge(graphdef, params, *state.stats, copy=True)
            x, y = images[part].astype(jnp.float32) / 255, labels[part]
            if augment:
                x = distort(jax.random.fold_in(key, 1), x, augment)
            logits = model(x, key=key)
            sums = measure(logits, y)
            mean = sums.loss / len(part)
            if label_smoothing:
                mean = smooth_loss(logits, y, label_smoothing)
            stats = tuple(nnx.state(model, nnx.BatchStat) for _ in state.stats)
            return mean, (sums, stats)

        made = []
        for i, part in enumerate(batch.reshape(parts, -1)):
            part_key = None if key is None else jax.random.fold_in(key, i)
            made.append(jax.grad(loss, has_aux=True)(state.params, part, part_key))
        grads, (sums, stats) = jax.tree.map(lambda *xs: sum(xs), *made)
        grads, stats = jax.tree.map(lambda x: x / parts, (grads, stats))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if ema:
            average = optax.incremental_update((params, *stats), average, 1 - ema)
        return Step(State(params, opt_state, stats, average), sums, grads, updates)

    return step


def make_train(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    batch_size: int,
    **options: float,
) -> Callable:
    """The jitted function that trains on the batches `order[start:stop]`; options of make_step."""
    make_one = make_step(graphdef, optimizer, batch_size, **options)

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
        key: jax.Array | None = None,
    ) -> tuple[State, Sums]:
        def step(i: jax.Array, carry: tuple[State, Sums]) -> tuple[State, Sums]:
            state, sums = carry
            step_key = None if key is None else jax.random.fold_in(key, i)
            made = make_one(state, images, labels, order[i], step_key)
            return made.state, jax.tree.map(jnp.add, sums, made.sums)

        return lax.fori_loop(start, stop, step, (state, Sums(jnp.float32(0), jnp.int32(0))))

    return train


def make_diagnose(*arguments: Any, **options: float) -> Callable:
    """The jitted function that reports on a step which it does not take; as make_train."""
    make_one = make_step(*arguments, **options)

    @jax.jit
    def diagnose(state: State, *rest: jax.Array) -> dict[str, Any]:
        made = make_one(state, *rest)
        return jadam.diagnostics(made.state.opt_state, made.updates, state.params, made.grads)

    return diagnose


def make_predict(graphdef: nnx.GraphDef) -> Callable:
    """The jitted function from weights and images, in hundreds, to logits."""

    @jax.jit
    def predict(weights: tuple[nnx.State, ...], images: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, *weights)
        # 100 at a time: the widest activation of 10,000 images would need 1 GB.
        batches = images.reshape(-1, 100, 28, 28, 1)
        logits = lax.map(lambda batch: model(batch.astype(jnp.float32) / 255), batches)
        return logits.reshape(-1, 10)

    return predict


def make_evaluate(graphdef: nnx.GraphDef) -> Callable:
    """The jitted function that sums loss and hits of the parameters of a model without stats."""
    predict = make_predict(graphdef)
    return jax.jit(lambda params, images, labels: measure(predict((params,), images), labels))


def prefixed(prefix: str, numbers: dict[str, float]) -> dict[str, float]:
    """The numbers with names as TensorBoard groups them."""
    return {f"{prefix}/{name}": number for name, number in numbers.items()}


def means(sums: Sums, count: int) -> dict[str, float]:
    """Mean loss and accuracy of so many images."""
    return {"loss": float(sums.loss) / count, "accuracy": int(sums.correct) / count}


def initial_state(
    config: Config, optimizer: optax.GradientTransformation
) -> tuple[nnx.GraphDef, State]:
    """The model's graph, and the state before the first step."""
    model = MODELS[config.model](rngs=nnx.Rngs(config.seed), dropout=config.dropout)
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    # Copied, since the state is donated, and no buffer can be donated twice.
    average = jax.tree.map(jnp.copy, (params, stats)) if config.ema else ()
    return graphdef, State(params, optimizer.init(params), (stats,), average)


def batches_of(epoch: int, images: int, config: Config) -> np.ndarray:
    """The order of the images in an epoch, int32[steps, batch_size]."""
    steps = images // config.batch_size
    order = np.random.default_rng([config.seed, epoch]).permutation(images)
    return order[: steps * config.batch_size].astype(np.int32).reshape(steps, -1)


def train_and_test(config: Config, mnist: Mnist) -> dict[str, Any]:
    """Trains on the one split, measures the other, and returns the numbers.

    All that is random follows from the seed, the epoch and the step, so that a run goes on from
    a checkpoint to the same bits.

    Raises:
        InterruptedRunError: SIGINT or SIGTERM came in the loop; the state is saved.
    """
    count = len(mnist.train_images) - config.validation
    steps = count // config.batch_size
    total = steps * config.epochs
    schedule = jax.jit(make_schedule(config.schedule, config.learning_rate, total, config.warmup))
    # A constant is given as a number: a schedule would add its count to the optimizer's state.
    constant = config.schedule == "constant"
    optimizer = config.make_optimizer(config.learning_rate if constant else schedule)
    graphdef, state = initial_state(config, optimizer)
    checkpoints, state, at = begin(config, state)

    images, labels = (jnp.asarray(x[:count]) for x in mnist[:2])
    validation_images, validation_labels = (jnp.asarray(x[count:]) for x in mnist[:2])
    test_images, test_labels = map(jnp.asarray, mnist[2:])

    # Compiled before the clock of the first epoch starts.
    clock = time.perf_counter()
    key = jax.random.key(config.seed)
    options = {name: getattr(config, name) for name in ("augment", "label_smoothing", "ema")}
    order = jax.ShapeDtypeStruct((steps, config.batch_size), jnp.int32)
    train = make_train(graphdef, optimizer, config.batch_size, **options)
    train = train.lower(state, images, labels, order, jnp.int32(0), jnp.int32(0), key).compile()
    diagnose = make_diagnose(graphdef, optimizer, config.batch_size, **options)
    predict = make_predict(graphdef)
    compile_seconds = time.perf_counter() - clock

    log = Metrics(config.out, at.metrics, at.step)
    reports = (
        Lines(config.out / "diagnostics.jsonl", at.diagnostics) if config.diagnostics else None
    )
    with (
        contextlib.closing(checkpoints),
        contextlib.closing(log.events),
        interruptions() as interruption,
        Progress(
            TextColumn("epoch {task.description}"),
            BarColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  accuracy {task.fields[accuracy]:.2%}"),
            TextColumn("{task.fields[validation]}"),
            TextColumn("{task.fields[speed]:,.0f} images/s"),
            TimeElapsedColumn(),
        ) as progress,
    ):
        for epoch in range(at.step // steps, config.epochs):
            task = progress.add_task(
                f"{epoch + 1}/{config.epochs}",
                **{"total": steps, "loss": 0, "accuracy": 0, "speed": 0, "validation": ""},
            )
            order = batches_of(epoch, count, config)
            epoch_key = jax.random.fold_in(key, epoch)
            stop = at.step % steps
            while stop < steps:
                start, stop = stop, min(stop + max(1, steps // 20), steps)
                if reports is not None:
                    step_key = jax.random.fold_in(epoch_key, start)
                    report = diagnose(state, images, labels, order[start], step_key)
                    reports.add(diagnostics.as_json({"step": at.step + 1, **report}))
                clock = time.perf_counter()
                span = jnp.int32(start), jnp.int32(stop)
                state, sums = train(state, images, labels, order, *span, epoch_key)
                sums = Sums(float(sums.loss), int(sums.correct))
                at.seconds += time.perf_counter() - clock
                at.step += stop - start
                at.loss, at.correct = at.loss + sums.loss, at.correct + sums.correct
                seen = stop * config.batch_size
                so_far = means(Sums(at.loss, at.correct), seen)
                progress.update(task, completed=stop, speed=seen / at.seconds, **so_far)
                rate = float(schedule(at.step - 1))
                row = {"step": at.step, "epoch": at.step / steps, "learning_rate": rate}
                span_means = means(sums, (stop - start) * config.batch_size)
                log.add(row | prefixed("train", span_means))

                accuracy = None
                if stop == steps:
                    row = {"step": at.step, "epoch": epoch + 1, "images": seen}
                    row |= {"seconds": at.seconds} | prefixed("epoch", so_far)
                    if config.validation:
                        sums = measure(predict(state.weights, validation_images), validation_labels)
                        validation = means(sums, config.validation)
                        row |= prefixed("validation", validation)
                        accuracy = validation["accuracy"]
                        progress.update(task, validation=f"validation {accuracy:.2%}")
                    log.add(row)
                    at.loss, at.correct, at.seconds = 0.0, 0, 0.0
                signal = interruption()
                if signal or start * config.saves // steps < stop * config.saves // steps:
                    at.metrics, at.diagnostics = len(log.rows), len(reports.rows) if reports else 0
                    save(checkpoints, config, state, at, accuracy)
                if signal:
                    raise InterruptedRunError(signal, at.step)

    logits = predict(state.weights, test_images)
    pictures.write_all(config.out, log.rows, *mnist[2:], np.asarray(logits))
    if reports is not None:
        diagnostics.write(reports.rows, config.out)
    return {
        "test": {**means(measure(logits, test_labels), len(logits)), "images": len(logits)},
        "epochs": [row for row in log.rows if "seconds" in row],
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "compile_seconds": compile_seconds,
    }


def main(config: Config) -> None:
    """Runs the experiment and writes its folder, which no other run may write at the same time."""
    with locked(config.out):
        _run(config)


def _run(config: Config) -> None:
    result = train_and_test(config, load(config.data_dir))
    result["config"] = config.as_json()
    result["machine"] = {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
    }
    result["versions"] = {"python": platform.python_version()} | {
        module.__name__: module.__version__ for module in (jax, flax, optax, jadam)
    }
    write_json(config.out / "result.json", result)
    test = result["test"]
    print(
        f"test loss {test['loss']:.4f}, accuracy {test['accuracy']:.2%} "
        f"of {test['images']:,} images; all in {config.out}"
    )
