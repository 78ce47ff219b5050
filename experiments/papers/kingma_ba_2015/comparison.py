"""Optimizers side by side, each at the best of its own settings: figures 1 and 2."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optax
from jaxtyping import Float
from matplotlib.figure import Figure

from .training import Settings, Task, kept, listed, train


class Contender(NamedTuple):
    """An optimizer, the settings to choose from, and how it is drawn."""

    make: Callable[..., optax.GradientTransformation]
    settings: Settings
    color: str
    line: str = "-"


class Found(NamedTuple):
    """What became of a contender.

    Attributes:
        costs: the last cost of each setting.
        setting: the best of them.
        is_at_edge: a learning rate beyond the searched ones might have been better.
        curve: the cost of each epoch with the best.
    """

    costs: Float[np.ndarray, " settings"]
    setting: dict[str, float]
    is_at_edge: bool
    curve: Float[np.ndarray, " epochs"]


def compare(
    contenders: Mapping[str, Contender], task: Task, config: Any, parts: Path
) -> dict[str, Found]:
    """Trains every setting of each to the end: a part for each contender."""
    found = {}
    for name, (make, settings, *_) in contenders.items():
        origin = {**asdict(config), "settings": {key: x.tolist() for key, x in settings.items()}}
        run = partial(train, task, make, settings, config.epochs, config.seed, name)
        costs = kept(parts / f"{name.replace(' ', '_')}.json", origin, run)
        best = int(np.nanargmin(costs[-1]))
        rates = settings["learning_rate"]
        found[name] = Found(
            costs[-1],
            {key: float(x[best]) for key, x in settings.items()},
            bool(rates[best] in (rates.min(), rates.max())),
            costs[:, best],
        )
    return found


def lowest_of_each_rate(contender: Contender, found: Found) -> tuple[np.ndarray, np.ndarray]:
    """The learning rates, and of each the cost with the best other hyperparameters."""
    rates = contender.settings["learning_rate"]
    costs = np.nan_to_num(found.costs, nan=np.inf)
    return np.unique(rates), np.array([costs[rates == rate].min() for rate in np.unique(rates)])


def draw(
    contenders: Mapping[str, Contender],
    found: Mapping[str, Found],
    titles: tuple[str, str],
    **limits: Any,
) -> Figure:
    """The paper's figure on the left, and on the right the search that it rests on."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for name, contender in contenders.items():
        style = {"color": contender.color, "ls": contender.line, "lw": 1.8, "label": name}
        style["zorder"] = 2 if contender.line == "-" else 3  # what is broken shows what is below
        curve = found[name].curve
        axes[0].plot(np.arange(1, len(curve) + 1), curve, **style)
        axes[1].plot(*lowest_of_each_rate(contender, found[name]), marker="o", ms=4, **style)
    axes[0].set(title=titles[0], xlabel="passes over the training set", ylabel="training cost")
    axes[1].set(title=titles[1], xlabel="α", xscale="log")
    axes[0].legend(frameon=False)
    for ax in axes:
        ax.set(**limits)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    return figure


def as_json(found: Mapping[str, Found]) -> dict[str, Any]:
    """The same for a file."""
    return {
        "contenders": {
            name: {**one._asdict(), "costs": listed(one.costs), "curve": listed(one.curve)}
            for name, one in found.items()
        }
    }
