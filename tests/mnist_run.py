"""A training run that gets a signal: `python -m tests.mnist_run OUT RESUME SIGNAL EVENT END TIMES`.

It is `python -m experiments.mnist` with a tiny model. SIGNAL comes before the audit event EVENT
("open", "os.rename") of a path that ends with END, when that comes for the TIMES-th time.
"""

import os
import runpy
import signal
import sys
from dataclasses import fields
from typing import Any

import jax
from flax import nnx

from experiments.common.mnist.idx import (
    FILES,
    TEST_IMAGES,
    TEST_LABELS,
    Mnist,
    read_images,
    read_labels,
)
from experiments.mnist import train
from experiments.mnist.config import Config

# 9 steps an epoch, a line of metrics after each, a checkpoint after the fifth and the last.
CONFIG = Config(
    model="mlp",
    dropout=0.2,
    optimizer="adamw",
    schedule="cosine",
    mu_dtype="bfloat16",
    nu_dtype="bfloat16",
    ema=0.9,
    epochs=3,
    batch_size=32,
    validation=100,
)


class Tiny(nnx.Module):
    """In the place of a model: each kind of variable, a dropout, and little to compile."""

    def __init__(self, *, rngs: nnx.Rngs, dropout: float):
        self.norm = nnx.BatchNorm(784, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)
        self.dense = nnx.Linear(784, 10, rngs=rngs)

    def __call__(self, images: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        x = self.norm(images.reshape(-1, 784), use_running_average=key is None)
        return self.dense(self.dropout(x, deterministic=key is None, rngs=key))


def digits() -> Mnist:
    """400 images to train on and 200 to test, without tensorflow-datasets."""
    images, labels = read_images(FILES / TEST_IMAGES), read_labels(FILES / TEST_LABELS)
    return Mnist(images[:400], labels[:400], images[400:600], labels[400:600])


def signal_at(number: signal.Signals, event: str, end: str, times: int) -> None:
    """Arranges for the signal to this process."""
    seen = 0

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if name == event and any(str(x).endswith(end) for x in arguments[:2]):
            seen += 1
            if seen == times:
                os.kill(os.getpid(), number)

    sys.addaudithook(hook)


def options(config: Config) -> list[str]:
    """The command line of a configuration."""
    changed = {
        f"--{field.name.replace('_', '-')}": str(getattr(config, field.name))
        for field in fields(config)
        if getattr(config, field.name) != field.default
    }
    return [text for pair in changed.items() for text in pair]


def main(out: str, resume: str, number: str, event: str, end: str, times: str) -> None:
    """The run."""
    train.MODELS["mlp"] = Tiny
    train.load = lambda data_dir: digits()
    signal_at(signal.Signals[number], event, end, int(times))
    sys.argv = ["experiments.mnist", *options(CONFIG), "--out", out]
    sys.argv += ["--resume"] if resume == "True" else []
    runpy.run_module("experiments.mnist", run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
