"""Dozat (2016), "Incorporating Nesterov Momentum into Adam": NAdam.

    python -m experiments.papers.dozat_2016

Section 3, figure 1: a convolutional autoencoder squeezes MNIST's images into 16 numbers and draws
them again. Training and validation loss of SGD, momentum, Nesterov's momentum, RMSProp, Adam and
NAdam, each at the best learning rate found for it. The claim: NAdam's loss falls faster than that
of all the others, on training and validation images.

NAdam is `jadam.nadam` with the paper's warming momentum, momentum_decay = 0.004, and Adam's own
b1, b2 and eps; the two forms of momentum have 0.9 too. The warming takes longer than the training
here: 0.45 at first, 0.52 in step 1,000 instead of 0.9. So NAdam with constant momentum, which is
optax's and jadam's default, stands beside it: Adam with Nesterov's step and nothing else changed.
All but Adam and NAdam come from optax.

Reduced: the autoencoder is dense, 196-128-64-16-64-128-196 with ReLU on images of 14x14 pixels
(means of 2x2); 1,000 steps of 128 images. Each optimizer has a grid of learning rates of a factor 2
around a guess; the loss is the mean squared error of a pixel, and the best rate is that with the
least training loss over the whole training (the mean over all steps, and over the seeds), which is
also what "faster" means here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree
from matplotlib.figure import Figure

import jadam
from experiments.common.mnist.dataset import Mnist, load
from experiments.common.palette import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY
from experiments.papers.grid import apply_mlp, halved, mlp, orders, trained
from experiments.papers.publish import RUNS, Claim, at_least, command_line, digits, publish

WIDTHS = (196, 128, 64, 16, 64, 128, 196)
PARTS = 40
"""In which a training is cut; the validation loss is taken after each."""

CONSTANT = "NAdam with constant momentum"

Make = Callable[[Array], optax.GradientTransformation]
OPTIMIZERS: dict[str, tuple[Make, float]] = {
    "SGD": (optax.sgd, 4.0),
    "momentum": (lambda rate: optax.sgd(rate, momentum=0.9), 2.0),
    "Nesterov": (lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True), 2.0),
    "RMSProp": (lambda rate: optax.rmsprop(rate, decay=0.999, bias_correction=True), 4e-3),
    "Adam": (jadam.adam, 8e-3),
    "NAdam": (lambda rate: jadam.nadam(rate, momentum_decay=0.004), 8e-3),
    CONSTANT: (jadam.nadam, 8e-3),
}
"""Each with the middle of its learning rates."""
COLOURS = dict(zip(OPTIMIZERS, (GREY, PINK, ORANGE, GREEN, RED, BLUE, SKY), strict=True))


@dataclass(frozen=True)
class Config:
    """NAdam against five others on an autoencoder."""

    steps: int = 1_000
    """Of a batch each, a multiple of 40."""
    batch_size: int = 128
    """Images in a step."""
    octaves: int = 2
    """Learning rates up to a factor 2^octaves around each guess."""
    seeds: int = 3
    """Of parameters and the order of the images: 0, 1, ..."""
    validation: int = 2_000
    """Of the test images, to validate on."""
    optimizers: tuple[str, ...] = tuple(OPTIMIZERS)
    """Which to train; NAdam among them."""
    out: Path = RUNS
    """The folder for JSON and pictures."""

    def __post_init__(self) -> None:
        if self.steps < PARTS or self.steps % PARTS:
            raise ValueError(f"--steps: expected a multiple of {PARTS}, got {self.steps}")
        at_least(self, batch_size=1, octaves=0, seeds=1, validation=1)
        if "NAdam" not in self.optimizers or not set(self.optimizers) <= set(OPTIMIZERS):
            raise ValueError(
                f"--optimizers: expected NAdam and others of {', '.join(OPTIMIZERS)}, got "
                f"{', '.join(self.optimizers)}"
            )


def loss_of(params: PyTree, images: Float[Array, "n 196"]) -> Float[Array, ""]:
    """The mean squared error of a pixel."""
    return jnp.mean((jax.nn.sigmoid(apply_mlp(params, images)) - images) ** 2)


def measure(config: Config, mnist: Mnist) -> dict[str, Any]:
    """Of each optimizer and rate the training loss over all steps; of the best rate the curves."""
    images, held_out = halved(mnist.train_images), halved(mnist.test_images[: config.validation])
    batches = orders(config.seeds, config.steps, config.batch_size, len(images), len(images))
    validate = jax.jit(jax.vmap(jax.vmap(lambda params: loss_of(params, held_out))))
    rungs = 2.0 ** np.arange(-config.octaves, config.octaves + 1)
    numbers: dict[str, Any] = {"step": (np.arange(1, PARTS + 1) * (config.steps // PARTS)).tolist()}
    for name in config.optimizers:
        make, middle = OPTIMIZERS[name]
        training, validation = [], []
        for params, losses in trained(
            loss_of,
            lambda rate, make=make: make(rate),
            lambda key: mlp(key, *WIDTHS),
            {"rate": middle * rungs},
            images,
            batches,
            name,
            PARTS,
        ):
            training.append(losses.mean(0))
            validation.append(np.asarray(validate(params), np.float64))
        over_all = np.nan_to_num(np.mean(training, 0), nan=np.inf)
        best = int(over_all.mean(0).argmin())
        numbers[name] = {
            "rates": (middle * rungs).tolist(),
            "mean_training_loss": digits(np.minimum(over_all, 1e3)),
            "best_rate": float(middle * rungs[best]),
            "best_is_at_an_end": best in (0, len(rungs) - 1),
            "training": digits(np.array(training)[:, :, best]),
            "validation": digits(np.array(validation)[:, :, best]),
        }
    return numbers


def judge(numbers: dict[str, Any], config: Config) -> list[Claim]:
    """NAdam against each other one, at the best rates, paired by seed."""

    def faster(ours: str, theirs: str) -> Claim:
        shown, gains = [], []
        for kind in ("training", "validation"):
            one, other = (np.array(numbers[name][kind]) for name in (ours, theirs))
            gain = other.mean(0) - one.mean(0)
            gains.append(gain)
            shown.append(
                f"{kind} {one.mean():.4f} against {other.mean():.4f}, lower for "
                f"{(gain > 0).sum()} of {len(gain)} seeds, at the end {one[-1].mean():.4f} against "
                f"{other[-1].mean():.4f}"
            )
        if numbers[theirs]["best_is_at_an_end"]:
            shown.append(f"a rate beyond the grid may be better for {theirs}")
        return Claim(f"{ours} is faster than {theirs}", "; ".join(shown), bool(np.min(gains) > 0))

    pairs = [("NAdam", name) for name in config.optimizers if not name.startswith("NAdam")]
    if {"Adam", CONSTANT} <= set(config.optimizers):
        pairs.append((CONSTANT, "Adam"))
    return [faster(*pair) for pair in pairs]


def draw(numbers: dict[str, Any], config: Config) -> Figure:
    """Training and validation loss, a line for each optimizer and a thin one for each seed."""
    figure = Figure((11, 4.8), layout="constrained")
    for axes, kind in zip(
        figure.subplots(1, 2, sharey=True), ("training", "validation"), strict=True
    ):
        for name in config.optimizers:
            run = numbers[name]
            curve = np.array(run[kind])
            label = f"{name}, {run['best_rate']:g}"
            axes.plot(numbers["step"], curve, color=COLOURS[name], linewidth=0.5, alpha=0.5)
            axes.plot(
                *(numbers["step"], curve.mean(1)), color=COLOURS[name], linewidth=2, label=label
            )
        axes.set_yscale("log")
        axes.set_title(f"{kind} loss, {config.seeds} seeds", loc="left")
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("squared error of a pixel")
    figure.axes[1].legend(title="at its best learning rate")
    return figure


def run(config: Config, mnist: Mnist) -> tuple[dict[str, Any], list[Claim]]:
    """The numbers, and the claims that they decide on."""
    numbers = measure(config, mnist)
    return numbers, judge(numbers, config)


def main(config: Config) -> None:
    """Trains all, writes JSON and picture."""
    numbers, claims = run(config, load())
    publish("dozat_2016", config, numbers, claims, draw(numbers, config))


if __name__ == "__main__":
    command_line("dozat_2016", Config, main)
