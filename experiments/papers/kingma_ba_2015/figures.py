"""The three figures, each with its numbers and what became of the paper's claims."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from experiments.common.mnist.dataset import Mnist, load
from experiments.papers.publish import RUNS, Claim, publish

from . import logistic, mlp, vae
from .comparison import as_json, compare
from .logistic import Logistic
from .mlp import Mlp
from .training import listed
from .vae import Vae

NAME = "kingma_ba_2015"


@dataclass(frozen=True)
class Config:
    """Figures 1, 2 and 4 of Kingma & Ba (2015)."""

    figure: tuple[Literal[1, 2, 4], ...] = (1, 2, 4)
    """Which figures."""
    logistic: Logistic = field(default_factory=Logistic)
    """Figure 1."""
    mlp: Mlp = field(default_factory=Mlp)
    """Figure 2."""
    vae: Vae = field(default_factory=Vae)
    """Figure 4."""
    out: Path = RUNS
    """The folder for JSON and pictures."""
    parts: Path = RUNS / NAME
    """The folder of finished trainings, which are not run again."""


class Result(NamedTuple):
    """What a figure's files are made of."""

    config: Any
    numbers: dict[str, Any]
    claims: list[Claim]
    picture: Figure


def figure_1(config: Config, mnist: Mnist) -> Result:
    task = logistic.task(config.logistic, mnist)
    found = compare(logistic.CONTENDERS, task, config.logistic, config.parts / "figure1")
    claims = logistic.claims({name: one.curve for name, one in found.items()})
    return Result(config.logistic, as_json(found), claims, logistic.picture(config.logistic, found))


def figure_2(config: Config, mnist: Mnist) -> Result:
    task = mlp.task(config.mlp, mnist)
    found = compare(mlp.CONTENDERS, task, config.mlp, config.parts / "figure2")
    claims = mlp.claims({name: one.curve for name, one in found.items()})
    return Result(config.mlp, as_json(found), claims, mlp.picture(config.mlp, found))


def figure_4(config: Config, mnist: Mnist) -> Result:
    task = vae.task(config.vae, mnist)
    parts = config.parts / "figure4"
    losses = vae.compare(config.vae, task, parts)
    uninformed = vae.uninformed(np.asarray(task.examples))
    noise = vae.noise(config.vae, mnist, parts, losses)
    return Result(
        config.vae,
        {"uninformed": uninformed, "noise": noise, "losses": listed(losses)},
        vae.claims(config.vae, losses, uninformed, noise),
        vae.picture(config.vae, losses, uninformed),
    )


FIGURES = {1: figure_1, 2: figure_2, 4: figure_4}


def main(config: Config) -> None:
    """JSON, picture and table of claims of each figure."""
    mnist = load()
    for number in config.figure:
        result = FIGURES[number](config, mnist)
        publish(f"{NAME}_figure{number}", *result, program=NAME, out=config.out)
