"""What `jadam.diagnostics` said during a training, as JSON lines and as a picture."""

import io
import json
import re
from pathlib import Path
from typing import Any

import jax
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from experiments.bench.report import write_file
from jadam._diagnostics import RATIO_EDGES

Rows = list[dict[str, Any]]


def write(rows: Rows, folder: Path) -> None:
    """diagnostics.jsonl, a line a step, and diagnostics.png and .svg."""
    lines = (json.dumps(jax.tree.map(_as_json, row)) for row in rows)
    write_file(folder / "diagnostics.jsonl", "".join(f"{line}\n" for line in lines).encode())
    # The same bytes for the same numbers: no date, and names that are not random.
    with mpl.rc_context({"svg.hashsalt": "jadam", "svg.fonttype": "none"}):
        figure = picture(rows)
        for kind, metadata in {"png": {}, "svg": {"Date": None}}.items():
            drawn = io.BytesIO()
            figure.savefig(drawn, format=kind, dpi=120, metadata=metadata)
            write_file(folder / f"diagnostics.{kind}", drawn.getvalue())


def _as_json(x: Any) -> Any:
    """Numbers and lists of them, with null for what JSON has no number for."""
    x = np.asarray(x)
    return np.where(np.isfinite(x), x, None).tolist()


def picture(rows: Rows) -> Figure:
    """Three quantities of each leaf, and the histogram of all weights, over the steps."""
    figure = Figure((10, 7), layout="constrained")
    (ratio, gradients), (shares, signal) = figure.subplots(2, 2, sharex=True)
    steps = [row["step"] for row in rows]
    names = {path: "/".join(re.findall(r"'(\w+)'", path)) for path in rows[0]["leaves"]}

    def draw(axes: Axes, quantity: str, title: str) -> None:
        for path, name in names.items():
            line = "--" if name.endswith("bias") else "-"
            axes.plot(steps, [row["leaves"][path][quantity] for row in rows], line, label=name)
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
