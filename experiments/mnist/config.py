"""The command line: what a run is made of, checked, and the presets."""

import argparse
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import optax
import tyro

from .model import MODELS
from .optimizers import OPTIMIZERS, SCHEDULES, make_optimizer

RUNS = Path(__file__).parents[2] / "runs"


@dataclass(frozen=True)
class Config:
    """Trains a model on MNIST."""

    preset: Literal["default", "mlp", "cnn", "best"] = "default"
    """The values that all other options start from; --help shows those of the preset before it."""
    model: Literal[tuple(MODELS)] = "cnn"
    """mlp: 784-128-10. cnn: two 5x5 convolutions. vgg: four convolutions with batch norm."""
    dropout: float = 0.0
    """The share of features that the last layer does not see while it is trained."""
    optimizer: Literal[tuple(OPTIMIZERS)] = "adam"
    """jadam's family, or one of optax: adam is jadam's, optax.adam is not."""
    learning_rate: float = 1e-3
    """The step size, the highest where it is scheduled."""
    schedule: Literal[SCHEDULES] = "constant"
    """How the learning rate goes; a cosine falls to 0 at the end."""
    warmup: float = 0.05
    """The share of all steps in which warmup-cosine rises from 0."""
    weight_decay: float | None = None
    """Of kernels, decoupled; by default the optimizer's own."""
    b1: float | None = None
    """Decay rate of the first moment, where there is one; by default the optimizer's own."""
    b2: float | None = None
    """Decay rate of the second moment."""
    eps: float | None = None
    """What is added to the root of the second moment."""
    mu_dtype: Literal["float32", "bfloat16", "float16", "int8"] | None = None
    """How the first moment is stored; int8 together with a second in uint8."""
    nu_dtype: Literal["float32", "bfloat16", "float16", "uint8"] | None = None
    """How the second moment is stored."""
    ema: float = 0.0
    """Decay rate of an average of the weights, which is used in their place; 0: none."""
    augment: float = 0.0
    """Strength of random distortions: 1 turns by up to 11 degrees, shifts by up to 2 pixels, ..."""
    label_smoothing: float = 0.0
    """The share of a label that is given to all digits alike."""
    epochs: int = 4
    """Passes over the training images."""
    batch_size: int = 32
    """Images in a step; an epoch leaves out the few images that fill no batch, others each time."""
    validation: int = 5_000
    """How many of the 60,000 images, the last ones, are not trained on but measured each epoch."""
    seed: int = 0
    """Of the parameters, the order of the images, dropout and distortions."""
    data_dir: Path | None = None
    """A prepared TFDS folder to read instead of the files that come with the project."""
    out: Path = RUNS / "mnist"
    """The folder for all that is written."""
    resume: bool = False
    """Goes on from the last checkpoint in that folder, to the same bits as without interruption."""
    saves: int = 2
    """Checkpoints in an epoch, the last at its end."""
    keep: int = 3
    """Checkpoints that are kept: so many of the last, and the one of the best validation."""
    diagnostics: bool = False
    """Writes jadam.diagnostics of 20 steps an epoch, and a picture of them."""

    def __post_init__(self) -> None:
        share = "0 or more and below 1"
        choices = {"model": MODELS, "optimizer": OPTIMIZERS, "schedule": SCHEDULES}
        checks = {
            **{
                flag: (getattr(self, flag) in names, f"one of {', '.join(names)}")
                for flag, names in choices.items()
            },
            "dropout": (0 <= self.dropout < 1, share),
            "learning-rate": (0 < self.learning_rate < math.inf, "a number above 0"),
            "warmup": (0 <= self.warmup < 1, share),
            "weight-decay": (0 <= (self.weight_decay or 0) < math.inf, "0 or more"),
            "b1": (0 <= (self.b1 or 0) < 1, share),
            "b2": (0 <= (self.b2 or 0) < 1, share),
            "eps": (0 <= (self.eps or 0) < math.inf, "0 or more"),
            "ema": (0 <= self.ema < 1, share),
            "augment": (0 <= self.augment < math.inf, "0 or more"),
            "label-smoothing": (0 <= self.label_smoothing < 1, share),
            "epochs": (self.epochs >= 1, "1 or more"),
            "validation": (
                0 <= self.validation < 60_000 and self.validation % 100 == 0,
                "0 to 59900, in hundreds",
            ),
            "batch-size": (
                1 <= self.batch_size <= 60_000 - self.validation,
                f"1 to {60_000 - self.validation}",
            ),
            "seed": (self.seed >= 0, "0 or more"),
            "saves": (1 <= self.saves <= 20, "1 to 20"),
            "keep": (self.keep >= 1, "1 or more"),
            "out": (not self.out.is_file(), "a folder"),
        }
        for flag, (right, expected) in checks.items():
            if not right:
                came = getattr(self, flag.replace("-", "_"))
                raise ValueError(f"--{flag}: expected {expected}, got {came}")
        self.make_optimizer(self.learning_rate)

    def make_optimizer(self, learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
        """The optimizer, with a number or a schedule."""
        options = ("weight_decay", "b1", "b2", "eps", "mu_dtype", "nu_dtype")
        return make_optimizer(
            self.optimizer, learning_rate, **{name: getattr(self, name) for name in options}
        )

    def as_json(self) -> dict[str, Any]:
        """All options, with paths as strings."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}


PRESETS = {
    "default": Config(),
    # Keras' first example.
    "mlp": Config(
        preset="mlp", model="mlp", epochs=5, batch_size=32, learning_rate=1e-3, out=RUNS / "mlp"
    ),
    # PyTorch users' learning rate and batch.
    "cnn": Config(
        preset="cnn",
        model="cnn",
        dropout=0.3,
        learning_rate=5e-4,
        schedule="cosine",
        augment=0.5,
        epochs=10,
        batch_size=64,
        out=RUNS / "cnn",
    ),
    "best": Config(
        preset="best",
        model="vgg",
        dropout=0.3,
        optimizer="adamw",
        learning_rate=2e-3,
        schedule="warmup-cosine",
        weight_decay=1e-2,
        ema=0.999,
        augment=1.0,
        label_smoothing=0.05,
        epochs=20,
        batch_size=64,
        out=RUNS / "best",
    ),
}


def parse(arguments: list[str] | None = None) -> Config:
    """The configuration of a command line: the preset's, and what else it says."""
    chosen = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chosen.add_argument("--preset", default="default")
    preset = chosen.parse_known_args(arguments)[0].preset
    return tyro.cli(
        Config,
        prog="python -m experiments.mnist",
        args=arguments,
        default=PRESETS.get(preset, PRESETS["default"]),
    )
