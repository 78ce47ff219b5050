"""The pictures: contours with paths, losses, and the planes of Adam's hyperparameters."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from experiments.common.palette import BLUE, GREY, RED, SIX

from .choose import RATES, Choice
from .descend import JADAM, OPTAX, TARGET, Runs, outcomes
from .planes import DEFAULTS, LEARNING_RATES, PLANES, Planes
from .problem import Problem

# jadam's curves are solid, optax's dashed.
DASHED = (0, (3, 1.2))
STYLES: dict[str, dict[str, Any]] = {
    name: {"color": color, "linestyle": line}
    for names, line in ((JADAM, "-"), (OPTAX, DASHED))
    for name, color in zip(names, SIX, strict=True)
}
PALE = LinearSegmentedColormap.from_list("pale", ["#ffffff", "#b9c0cf"])
WIDTH = 9.0  # inches, which a README shows on some 900 pixels
FLOOR, CEILING = 1e-12, 1e3
"""Losses beyond are drawn at these limits: in float32 a loss comes to 0, without a logarithm."""


def landscape(axes: Axes, problem: Problem, pixels: int = 400) -> AxesImage:
    """The function as bands of equal loss, the lower the lighter, with a star at each minimum."""
    (left, right), (bottom, top) = problem.view
    x, y = np.meshgrid(np.linspace(left, right, pixels), np.linspace(bottom, top, pixels))
    loss = problem.function.value(x, y)
    # The bands are even in the logarithm, but for what is next to 0.
    edges = np.geomspace(loss.min() + 1e-2, loss.max() + 1e-2, 12) - 1e-2
    # An image: contours as vectors would make an SVG of megabytes.
    image = axes.imshow(
        loss,
        PALE,
        BoundaryNorm(edges, PALE.N),
        origin="lower",
        extent=(left, right, bottom, top),
        aspect="auto",
    )
    minima = np.transpose(problem.function.minima)
    axes.plot(*minima, "*", color="#555555", markersize=8, markeredgewidth=0)
    axes.set(xlim=(left, right), ylim=(bottom, top))
    return image


def visible(runs: Runs, problem: Problem) -> Float[np.ndarray, "n 2"]:
    """A path up to where it is far outside the picture or no longer finite."""
    centre, width = np.mean(problem.view, axis=1), np.ptp(problem.view, axis=1)
    away = ~np.all(np.abs(runs.points - centre) < 3 * width, axis=-1)
    return runs.points[: np.argmax(away) if away.any() else len(away)]


def path(axes: Axes, runs: Runs, problem: Problem, color: str, **options: Any) -> None:
    """A path from a ring to a dot, or to a cross where it went far away."""
    points = visible(runs, problem)
    end = "o" if len(points) == len(runs.points) else "x"
    axes.plot(*points.T, color=color, markersize=4, **options)
    axes.plot(*points[0], "o", markerfacecolor="none", color=color, markersize=4)
    axes.plot(*points[-1], end, color=color, markersize=3.5)


def drawable(losses: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """The losses within FLOOR and CEILING; what is not finite lies at CEILING."""
    return np.clip(np.nan_to_num(losses, nan=CEILING), FLOOR, CEILING)


def still_to_come(losses: Float[np.ndarray, " steps"]) -> Float[np.ndarray, " steps"]:
    """The largest loss from each step on: below TARGET where it has arrived for good."""
    losses = np.nan_to_num(losses, nan=np.inf)
    return np.maximum.accumulate(losses[::-1])[::-1]


def loss_axes(axes: Axes) -> None:
    """A logarithmic axis, with the target as a dotted line."""
    axes.axhline(TARGET, color=GREY, linewidth=0.9, linestyle=":")
    axes.set(yscale="log")
    axes.grid(alpha=0.25)


def pairs(count: int, heights: tuple[float, float]) -> tuple[Figure, list[tuple[Axes, Axes]]]:
    """A figure of two panels for each function: side by side for one, else below each other."""
    if count == 1:
        figure = Figure((WIDTH, 4.2), layout="constrained")
        return figure, [tuple(figure.subplots(1, 2))]
    bands = -(-count // 3)
    figure = Figure((WIDTH, bands * sum(heights)), layout="constrained")
    axes = figure.subplots(2 * bands, 3, height_ratios=heights * bands)
    return figure, [(axes[i // 3 * 2, i % 3], axes[i // 3 * 2 + 1, i % 3]) for i in range(count)]


def title(axes: Axes, problem: Problem) -> None:
    axes.set_title(problem.function.title, fontsize=10)


def readable(x: float) -> str:
    """Two digits, without an exponent where that is short."""
    return f"{x:.0f}" if 10 <= x < 1e5 else f"{x:.2g}"


def adam_figure(problems: Sequence[Problem], runs: Sequence[Runs], learning_rate: float) -> Figure:
    """Adam's path and loss on each function; of its runs [starts, steps+1] the first is bold."""
    figure, panels = pairs(len(problems), (2.5, 1.7))
    for (above, below), problem, of_problem in zip(panels, problems, runs, strict=True):
        image = landscape(above, problem)
        edges = image.norm.boundaries[::3]
        bar = figure.colorbar(image, ax=above, pad=0.02, aspect=30, ticks=edges)
        bar.ax.set_yticklabels([readable(x) if x > 1e-2 else "0" for x in edges], fontsize=7)
        bar.minorticks_off()
        for i, run in reversed(list(enumerate(map(Runs, *of_problem)))):
            color, width = (BLUE, 1.6) if i == 0 else (GREY, 0.8)
            path(above, run, problem, color, linewidth=width, marker=".", markevery=10)
            below.plot(drawable(run.losses), color=color, linewidth=width)
        loss_axes(below)
        below.set(xlabel="step", ylabel="loss")
        title(above, problem)
    if len(problems) == 1:
        above.set(title=problem.function.formula, xlabel="x", ylabel="y", aspect="equal")
    figure.suptitle(f"jadam.adam, learning rate {learning_rate:g}; a dot every 10 steps")
    return figure


def comparison_figure(
    problems: Sequence[Problem], choices: Mapping[str, Sequence[Choice]], steps: int
) -> Figure:
    """A row for each optimizer, a column for each function."""
    columns = len(problems)
    figure = Figure((WIDTH * max(columns, 3) / 6, 13.5), layout="constrained")
    axes = figure.subplots(len(choices), columns, squeeze=False)
    for row, (name, of_optimizer) in zip(axes, choices.items(), strict=True):
        for cell, problem, choice in zip(row, problems, of_optimizer, strict=True):
            landscape(cell, problem, 200)
            path(cell, choice.runs, problem, STYLES[name]["color"], linewidth=1.2)
            arrived = outcomes(choice.runs.losses).steps
            count = f"{arrived} steps" if arrived <= steps else "never"
            cell.set(xticks=[], yticks=[])
            cell.set_xlabel(f"{readable(choice.learning_rate)}: {count}", fontsize=8, labelpad=2)
        row[0].set_ylabel(f"{name}\n{'jadam' if name in JADAM else 'optax'}", fontsize=8.5)
    for cell, problem in zip(axes[0], problems, strict=True):
        title(cell, problem)
    figure.suptitle(
        "under each path its learning rate, and the steps until the loss is below "
        f"{TARGET:g} for good, of {steps}",
        fontsize=10,
    )
    return figure


def losses_figure(
    problems: Sequence[Problem], choices: Mapping[str, Sequence[Choice]], steps: int
) -> Figure:
    """Of each function the loss along the way, and how the last loss depends on the rate."""
    figure, panels = pairs(len(problems), (2.3, 2.1))
    of_problems = zip(*choices.values(), strict=True)
    for (above, below), problem, of_problem in zip(panels, problems, of_problems, strict=True):
        for name, choice in zip(choices, of_problem, strict=True):
            options = {"linewidth": 1.2, **STYLES[name]}
            above.plot(drawable(still_to_come(choice.runs.losses)), label=name, **options)
            below.plot(RATES, drawable(choice.last_losses), **options)
            for rate in RATES[~np.isfinite(choice.last_losses)][:1]:
                below.plot(rate, CEILING, "x", color=options["color"])
        for axes in (above, below):
            loss_axes(axes)
            axes.set(xscale="log", ylim=(FLOOR / 5, CEILING * 5))
        above.set(xlabel="step", ylabel="largest loss to come", xlim=(1, steps))
        below.set(xlabel="learning rate", ylabel="last loss")
        title(above, problem)
    lines = panels[0][0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=6, frameon=False)
    return figure


def planes_figure(problems: Sequence[Problem], planes: Planes, steps: int) -> Figure:
    """Adam's last loss by learning rate and b1, and by learning rate and b2."""
    figure, panels = pairs(len(problems), (2.1, 2.1))
    norm = LogNorm(1e-9, 1e1)
    colors = colormaps["cividis"].with_extremes(bad=RED)
    for i, (problem, panel) in enumerate(zip(problems, panels, strict=True)):
        for axes, (name, complements) in zip(panel, PLANES.items(), strict=True):
            losses = getattr(planes, name)[i]
            losses = np.where(np.isfinite(losses), np.maximum(losses, FLOOR), np.nan)
            image = axes.pcolormesh(
                LEARNING_RATES, complements, losses, norm=norm, cmap=colors, rasterized=True
            )
            axes.axhline(1 - DEFAULTS[name], color="white", linewidth=0.8)
            axes.set(xscale="log", yscale="log", ylabel=name)
            shown = [b for b in (0.1, 0.9, 0.99, 0.999, 0.9999) if 1 - b > complements[0] / 1.01]
            axes.set_yticks([1 - b for b in shown], [f"{b:g}" for b in shown], minor=False)
            axes.minorticks_off()
            axes.invert_yaxis()
        panel[1].set_xlabel("learning rate")
        title(panel[0], problem)
    figure.colorbar(
        image,
        ax=figure.axes,
        label=f"loss after {steps} steps (red: not finite)",
        location="bottom",
        aspect=60,
        fraction=0.02,
        pad=0.01,
        extend="both",
    )
    return figure
