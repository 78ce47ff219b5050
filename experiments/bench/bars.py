"""The picture of the speed bench: each contender's time over the limit, a panel for a workload."""

from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

FULL = 6.0
"""Where an axis ends; a longer bar is cut and says its length."""
JADAM, PEER, SPREAD = "#1f6fb4", "#b9b9b9", "#444444"
REFERENCES = ("limit", "copy", "buffers alone")


def draw(results: dict[str, Any]) -> Figure:
    """The medians, with the quartiles as whiskers."""
    panels = {name: _bars(workload) for name, workload in results["workloads"].items()}
    columns = min(2, len(panels))
    pairs = [list(panels.values())[i : i + columns] for i in range(0, len(panels), columns)]
    heights = [3.5 + max(map(len, pair)) for pair in pairs]
    with mpl.rc_context({"font.size": 8}):
        figure = Figure((6 * columns, 0.2 * sum(heights)), layout="constrained")
        grid = figure.subplots(
            len(pairs), columns, gridspec_kw={"height_ratios": heights}, squeeze=False
        )
        axes = list(grid.flat)
        for axis, (name, bars) in zip(axes, panels.items(), strict=False):
            _panel(axis, name, bars)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        figure.suptitle(
            f"Time of an AdamW step over the limit, a kernel that moves the same bytes\n"
            f"({results['machine']}, {results['processor']})"
        )
    return figure


def _bars(workload: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The ratio of each contender that has one, the fastest first."""
    found = {
        name: contender["over limit"]
        for name, contender in workload["contenders"].items()
        if "over limit" in contender and name not in REFERENCES
    }
    return dict(sorted(found.items(), key=lambda item: item[1]["median"]))


def _panel(axis: Any, name: str, bars: dict[str, dict[str, float]]) -> None:
    medians = [ratio["median"] for ratio in bars.values()]
    colours = [JADAM if contender.startswith("jadam") else PEER for contender in bars]
    axis.barh(list(bars), [min(m, FULL) for m in medians], color=colours, height=0.72)
    for place, ratio in enumerate(bars.values()):
        if ratio["median"] < FULL:
            ends = [min(ratio[end], FULL) for end in ("low", "high")]
            axis.plot(ends, [place, place], color=SPREAD, linewidth=1)
        label = f"{ratio['median']:.2f}" if ratio["median"] < 10 else f"{ratio['median']:.0f}"
        if ratio["median"] > FULL:  # two white strokes: the bar goes on
            for x in (FULL - 0.25, FULL - 0.13):
                axis.plot([x - 0.04, x + 0.04], [place + 0.36, place - 0.36], color="white", lw=1.5)
        end = min(max(ratio["median"], ratio["high"]), FULL)
        axis.text(end + 0.05, place, label, va="center")
    axis.axvline(1, color="black", linewidth=1, zorder=3)
    axis.invert_yaxis()
    axis.set_title(name, loc="left", fontweight="bold")
    axis.set_xlim(0, FULL + 0.5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
