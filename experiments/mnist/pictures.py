"""What a run looked like: its curves, the digits it took for others, the confusion matrix."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from scipy.special import softmax

from experiments.common.picture import write

TRAINING, VALIDATION = "#1f6fb4", "#d55e00"
TILE = 40  # pixels of a mistake with its caption


def write_all(
    folder: Path,
    rows: list[dict[str, Any]],
    images: np.ndarray,
    labels: np.ndarray,
    logits: np.ndarray,
) -> None:
    """curves, mistakes and confusion, each as PNG and SVG; images and logits of the test."""
    write(curves(rows), folder / "curves")
    write(mistakes(images, labels, logits), folder / "mistakes")
    write(confusion(labels, logits.argmax(-1)), folder / "confusion")


def curves(rows: list[dict[str, Any]]) -> Figure:
    """Loss, share of errors and learning rate over epochs, from the rows of metrics.jsonl."""
    figure = Figure((10, 3.4), layout="constrained")
    loss, errors, rate = figure.subplots(1, 3)

    def draw(axes: Any, name: str, *, error: bool = False, **style: Any) -> None:
        points = [(row["epoch"], row[name]) for row in rows if name in row]
        if points:
            x, y = np.array(points).T
            axes.plot(x, 1 - y if error else y, **style)

    # The twenty means of an epoch scatter around the mean of the epoch.
    noise = {"color": TRAINING, "alpha": 0.35, "linewidth": 1}
    training = {"color": TRAINING, "marker": "o", "markersize": 3, "label": "training, epoch"}
    validation = {"color": VALIDATION, "marker": "s", "markersize": 3, "label": "validation"}
    for axes, quantity, error in ((loss, "loss", False), (errors, "accuracy", True)):
        draw(axes, f"train/{quantity}", error=error, **noise)
        draw(axes, f"epoch/{quantity}", error=error, **training)
        draw(axes, f"validation/{quantity}", error=error, **validation)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    loss.yaxis.set_major_formatter("{x:g}")
    errors.yaxis.set_major_formatter(lambda x, _: f"{100 * x:g}%")
    draw(rate, "learning_rate", color=TRAINING)
    rate.set_ylim(0)
    rate.ticklabel_format(axis="y", scilimits=(0, 0))
    for axes, title in ((loss, "cross entropy"), (errors, "errors"), (rate, "learning rate")):
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("epoch")
        axes.spines[["top", "right"]].set_visible(False)
    loss.legend(frameon=False, fontsize="small")
    return figure


def mistakes(images: np.ndarray, labels: np.ndarray, logits: np.ndarray, most: int = 50) -> Figure:
    """The digits that were taken for others, the surest mistakes first, ten in a row."""
    probabilities = softmax(logits, axis=-1)
    taken, sureness = probabilities.argmax(-1), probabilities.max(-1)
    wrong = np.flatnonzero(taken != labels)
    shown = wrong[np.argsort(-sureness[wrong], kind="stable")][:most]
    # One mosaic: fifty panels would take seconds to lay out.
    rows = max(1, -(-len(shown) // 10))
    mosaic = np.zeros((rows * TILE, 10 * TILE), np.uint8)
    figure = Figure((10, rows + 0.6), layout="constrained")
    axes = figure.subplots()
    for place, i in enumerate(shown):
        top, left = place // 10 * TILE, place % 10 * TILE
        mosaic[top + 10 : top + 38, left + 6 : left + 34] = images[i, ..., 0]
        text = f"{labels[i]} → {taken[i]}  {sureness[i]:.0%}"
        axes.text(left + TILE / 2, top + 5, text, ha="center", va="center", fontsize=9)
    axes.imshow(mosaic, cmap="gray_r")
    axes.axis("off")
    of = f"all {len(wrong)}" if len(wrong) == len(shown) else f"{len(shown)} of {len(wrong)}"
    axes.set_title(
        f"{of} mistakes in {len(labels):,} test images: label → answer, and how sure it was",
        fontsize="medium",
    )
    return figure


def confusion(labels: np.ndarray, taken: np.ndarray) -> Figure:
    """How often each digit was taken for each; colours for mistakes alone."""
    counts = np.zeros((10, 10), int)
    np.add.at(counts, (labels, taken), 1)
    wrong = np.where(np.eye(10, dtype=bool), 0, counts)
    figure = Figure((5.6, 5.2), layout="constrained")
    axes = figure.subplots()
    axes.imshow(
        np.ma.masked_equal(wrong, 0), cmap="Oranges", norm=LogNorm(0.5, max(2, 2 * wrong.max()))
    )
    for (label, answer), count in np.ndenumerate(counts):
        if count:
            color = "gray" if label == answer else "black"
            axes.text(answer, label, count, ha="center", va="center", color=color, fontsize=9)
    axes.set_xticks(range(10))
    axes.set_yticks(range(10))
    axes.tick_params(length=0)
    axes.set_xlabel("answer")
    axes.set_ylabel("label")
    axes.set_title(f"{wrong.sum()} mistakes in {len(labels):,} test images", fontsize="medium")
    return figure
