"""The tables and pictures of the study of small memory, from results/drift*.json."""

import json
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from experiments.bench.publish import RESULTS
from experiments.common import palette, picture
from experiments.common.report import table, update_readme

from .gradients import GROUPS
from .measure import RATES
from .storages import EIGHT_BITS, STORAGES

README = RESULTS.parents[1] / "lowmem" / "README.md"
LATE = 0.2
"""The last share of the steps, whose mean is in the tables."""
NO_WAY = "alternating signs"
"""Its updates take each other back."""
DRAWN = ("stationary", "after 1,000 times more", "after 1,000 times less", "once in 1,000 steps")
COLORS = (palette.BLUE, palette.RED, palette.GREEN)
LOOK = {
    **{"font.size": 9, "axes.grid": True, "grid.alpha": 0.25},
    **{"axes.spines.top": False, "axes.spines.right": False},
}


def name_of(rates: tuple[float, float]) -> str:
    return "{:g}, {:g}".format(*rates)


def late(row: dict[str, list[float]], quantity: str) -> float:
    values = row[quantity]
    return float(np.mean(values[-max(1, int(LATE * len(values))) :]))


def share(x: float, sign: str = "") -> str:
    """In percent, or as a factor where that would be a long number."""
    if abs(x) >= 10:
        return f"{x:{sign},.0f} times" if abs(x) < 1e4 else f"{x:{sign}.0e} times"
    percent = round(100 * x, 1)
    return f"{percent:{sign if percent else ''}.1f}%".replace("-0.0%", "0.0%")


def pair(row: dict[str, list[float]], what: str) -> str:
    """Bias ± spread."""
    return f"{share(late(row, f'{what} bias'), '+')} ± {share(late(row, f'{what} spread'))}"


def way(row: dict[str, list[float]]) -> str:
    return f"{share(late(row, 'gain'), '+')}, {share(late(row, 'path error'))}"


def rates_table(storages: dict[str, Any]) -> str:
    """√v and m of the stationary stream for each pair of decay rates."""
    names = [name_of(rates) for rates in RATES]
    header = ["stored in", *(f"{x}, b = {n}" for n in names for x in ("√v", "m"))]
    rows = [
        [name, *(pair(found[n]["stationary"], x) for n in names for x in ("root", "m"))]
        for name, found in storages.items()
    ]
    return table(header, rows)


def groups_table(storages: dict[str, Any], cell: Any, groups: Sequence[str]) -> str:
    """A cell for each group, with the default decay rates."""
    default = name_of(RATES[0])
    rows = [
        [name, *(cell(found[default][label]) for label in groups)]
        for name, found in storages.items()
    ]
    return table(["stored in", *groups], rows)


def drift_markdown(results: dict[str, Any]) -> str:
    """What is stored beside float64's, and where the updates lead."""
    storages = results["storages"]
    sources = "; ".join(
        f"{storage.name}: {storage.source}" for storage in STORAGES if storage.source != "jadam"
    )
    return "\n\n".join(
        [
            f"**Stationary gradients, the last {LATE:.0%} of {results['steps'][-1]:,} steps**: "
            "bias ± spread over elements and steps, relative to the exact √v",
            rates_table(storages),
            "**√v with b = .9, .999, for each stream**",
            groups_table(storages, lambda row: pair(row, "root"), list(GROUPS)),
            "**The way that updates lead in 20 steps, with b = .9, .999**: how much longer it is "
            "along float64's, and the root mean square of what is between both",
            groups_table(storages, way, [x for x in GROUPS if x != NO_WAY]),
            f"Codes by formula: {sources}.",
        ]
    )


def tasks_markdown(results: dict[str, Any]) -> str:
    """How much larger the losses are than float32's."""
    tasks = results["tasks"]
    names = list(next(iter(tasks.values()))["storages"])
    rows = []
    for what, found in tasks.items():
        cells = [
            share_between(found["storages"][name], of_jadam=name.startswith("jadam"))
            for name in names
        ]
        rows.append([what, *cells])
    return table(["task", *names], rows)


def share_between(found: dict[str, float | None], *, of_jadam: bool) -> str:
    """A loss beside float32's; in bold where it is a larger one of jadam's."""
    mean, low, high = found["mean"], found["low"], found["high"]
    if mean is None or low is None or high is None:
        return "not finite"
    cell = share(mean, "+")
    if abs(mean) < 10:
        cell = f"{cell} ± {share(high - mean)}"
    return f"**{cell}**" if of_jadam and low > 0 else cell


@mpl.rc_context(LOOK)
def draw(found: dict[str, Any], steps: list[int], title: str) -> Figure:
    """Above √v, below m: bias over time as a line, with a band of the spread."""
    figure = Figure((13, 5.5), layout="constrained")
    axes = figure.subplots(2, len(DRAWN), sharex=True)
    for (what, label), row in zip((("root", "√v"), ("m", "m")), axes, strict=True):
        for stream, axis in zip(DRAWN, row, strict=True):
            for color, rates in zip(COLORS, RATES, strict=True):
                curve = found[name_of(rates)][stream]
                bias, spread = (
                    100 * np.array(curve[f"{what} {x}"], float) for x in ("bias", "spread")
                )
                axis.plot(steps, bias, color=color, linewidth=1.2, label=f"b = {name_of(rates)}")
                axis.fill_between(steps, bias - spread, bias + spread, color=color, alpha=0.13)
            axis.axhline(0, color=palette.BLACK, linewidth=0.8)
            if what == "root":
                axis.set_title(stream)
            else:
                axis.set_xlabel("step")
                axis.set_xticks((0, steps[-1] // 2, steps[-1]))
                axis.xaxis.set_major_formatter("{x:,.0f}")
            low, high = axis.get_ylim()
            if max(-low, high) > 200:
                axis.set_yscale("symlog", linthresh=10)
        row[0].set_ylabel(f"{label}: error [% of exact √v]")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.align_ylabels()
    figure.suptitle(title)
    return figure


def stem(name: str) -> str:
    """Of a storage's pictures."""
    words = "".join(c if c.isalnum() else " " for c in name).split()
    return "-".join(["drift", *words])


def pictures_markdown() -> str:
    """jadam's 8 bits as a picture, the others as links."""
    links = ", ".join(
        f"[{storage.name}](../bench/results/{stem(storage.name)}.png)"
        for storage in STORAGES
        if storage is not EIGHT_BITS
    )
    here = f"../bench/results/{stem(EIGHT_BITS.name)}.png"
    return f"![The errors of 8-bit codes over time]({here})\n\nThe same of {links}."


def blocks() -> dict[str, str]:
    """The README's tables from the committed results."""
    drift = json.loads((RESULTS / "drift.json").read_text())
    tasks = json.loads((RESULTS / "drift-tasks.json").read_text())
    return {
        "drift": f"{drift_markdown(drift)}\n\n{pictures_markdown()}",
        "tasks": tasks_markdown(tasks),
    }


def main() -> None:
    """Writes the pictures and the README's tables."""
    drift = json.loads((RESULTS / "drift.json").read_text())
    for name, found in drift["storages"].items():
        picture.write(draw(found, drift["steps"], name), RESULTS / stem(name), dpi=90)
    for name, block in blocks().items():
        update_readme(name, block, README)
