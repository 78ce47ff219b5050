"""What `jadam.diagnostics` said during a training, as JSON and as a picture."""

import re
from pathlib import Path
from typing import Any

import jax
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from experiments.common.picture import write as write_picture
from jadam._diagnostics import RATIO_EDGES

Rows = list[dict[str, Any]]


def write(rows: Rows, folder: Path) -> None:
    """diagnostics.png and .svg."""
    write_picture(picture(rows), folder / "diagnostics")


def as_json(report: dict[str, Any]) -> dict[str, Any]:
    """Numbers and lists of them, with null for what JSON has no number for."""

    def plain(x: Any) -> Any:
        x = np.asarray(x)
        return np.where(np.isfinite(x), x, None).tolist()

    return jax.tree.map(plain, report)


def picture(rows: Rows) -> Figure:
    """Three quantities of each leaf, and the histogram of all weights, over the steps."""
    figure = Figure((10, 7), layout="constrained")
    (ratio, gradients), (shares, signal) = figure.subplots(2, 2, sharex=True)
    steps = [row["step"] for row in rows]
    names = {path: "/".join(re.findall(r"'(\w+)'", path)) for path in rows[0]["leaves"]}

    def draw(axes: Axes, quantity: str, title: str) -> None:
        for path, name in names.items():
            line = "--" if name.endswith("bias") else "-"
            # null becomes NaN, a gap in the line.
            numbers = np.array([row["leaves"][path][quantity] for row in rows], float)
            axes.plot(steps, numbers, line, label=name)
        axes.set_title(title, fontsize="medium")

    draw(ratio, "update_to_param", "update_to_param: size of the update by that of the weights")
    draw(gradients, "v_rms", "v_rms: size of the gradients, averaged over steps")
    draw(shares, "eps_share", "eps_share: where eps is over half of the denominator")
    for axes in (ratio, gradients):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    figure.legend(*ratio.get_legend_handles_labels(), loc="outside lower center", ncols=6)

    labels = [f"up to {edge:g}" for edge in RATIO_EDGES] + ["above"]
    colors = mpl.colormaps["viridis"](np.linspace(0, 1, len(labels)))
    histogram = np.array([row["whole"]["ratio_histogram"] for row in rows]).T
    signal.stackplot(steps, histogram, labels=labels, colors=colors)
    signal.set_title("ratio_histogram: shares of |m̂|/√v̂, all weights", fontsize="medium")
    signal.set_ylim(0, 1)
    signal.legend(loc="center left", bbox_to_anchor=(1, 0.5), reverse=True, fontsize="small")
    for axes in (shares, signal):
        axes.set_xlabel("step")
    return figure
