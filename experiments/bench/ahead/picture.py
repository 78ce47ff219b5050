"""The picture: bytes a parameter beside the least possible, a panel for each chip."""

from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from experiments.bench.ahead.programs import (
    BF16_MOMENTS,
    CODES,
    COMPENSATED,
    FEWER_CODES,
    FLASH,
    FLASH_BF16,
    FLOAT32,
    ONE_LEAF,
    OPTAX,
    PALLAS,
    SMALLEST,
    XLA,
)
from experiments.bench.bars import JADAM, PEER
from experiments.common.chips import CHIPS

FULL = 40.0
"""Where an axis ends; a longer bar is cut and says its length."""
SHOWN = {
    OPTAX: (OPTAX,),
    FLOAT32: (FLOAT32,),
    BF16_MOMENTS: (BF16_MOMENTS,),
    CODES: (CODES,),
    FEWER_CODES: (FEWER_CODES,),
    FLASH: (FLASH + PALLAS, FLASH + XLA),
    COMPENSATED: (COMPENSATED,),
    SMALLEST: (SMALLEST,),
    FLASH_BF16: (FLASH_BF16 + PALLAS, FLASH_BF16 + XLA),
}
"""Each bar, and the programs of which the one that moves least makes it."""


def draw(results: dict[str, Any]) -> Figure:
    """One leaf's bars, with a mark at the least."""
    there = [
        chip.name for chip in CHIPS.values() if ONE_LEAF in results["chips"].get(chip.name, {})
    ]
    with mpl.rc_context({"font.size": 9}):
        figure = Figure((11, 6.2), layout="constrained")
        axes = list(figure.subplots(2, 2, sharex=True, sharey=True).flat)
        for axis, name in zip(axes, there, strict=False):
            _panel(axis, name, results["chips"][name][ONE_LEAF])
        for axis in axes[len(there) :]:
            axis.set_visible(False)
        for axis in axes[2:]:
            axis.set_xlabel("bytes a parameter through memory")
        figure.suptitle(
            "What an AdamW step moves (bars) and the least that it can (black marks)\n"
            f"{ONE_LEAF}, compiled ahead of time"
        )
    return figure


def _panel(axis: Any, name: str, rows: dict[str, dict[str, Any]]) -> None:
    found = {
        bar: min(
            (rows[x] for x in those if "bytes" in rows.get(x, {})),
            key=lambda row: row["bytes"],
            default=None,
        )
        for bar, those in SHOWN.items()
    }
    for place, (bar, row) in enumerate(found.items()):
        if row is None:
            axis.text(0.5, place, "does not compile", va="center")
            continue
        moved, least = row["bytes"], row["least"]
        colour = JADAM if bar.startswith("jadam") else PEER
        axis.barh(place, min(moved, FULL), color=colour, height=0.72)
        axis.plot([least, least], [place - 0.42, place + 0.42], color="black", linewidth=2)
        if moved > FULL:  # two white strokes: the bar goes on
            for x in (FULL - 1.6, FULL - 0.9):
                axis.plot([x - 0.3, x + 0.3], [place + 0.36, place - 0.36], color="white", lw=1.5)
        label = f"{moved:.1f}" if moved < 100 else f"{moved:.0f}"
        axis.text(min(moved, FULL) + 0.6, place, label, va="center")
    axis.set_yticks(range(len(found)), list(found))
    if not axis.yaxis_inverted():  # panels share it
        axis.invert_yaxis()
    axis.set_title(name, loc="left", fontweight="bold")
    axis.set_xlim(0, FULL + 4)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
