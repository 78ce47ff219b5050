"""The tables in the README."""

from collections.abc import Callable
from typing import Any

from experiments.bench.ahead.programs import (
    ALL_LEAVES,
    CODES,
    COMPENSATED,
    LEAVES,
    ONE_LEAF,
    PROGRAMS,
    SMALLEST,
)
from experiments.common.chips import CHIPS
from experiments.common.report import table

GOALS: dict[str, dict[str, float]] = {
    "over_the_least": {"tpu": 1.05, "cuda": 1.05},
    "temporary": {"tpu": 0.1, "cuda": 0.1},
    "kernels": {"tpu": 160, "cuda": 10},
    "compile_over_optax": {"tpu": 2.0, "cuda": 1.0},
}
NAMES = {
    "over_the_least": "bytes over the least",
    "temporary": "temporaries, bytes a parameter",
    "kernels": "kernels",
    "compile_over_optax": "compile time over optax's",
}
PLATFORMS = {chip.name: chip.platform for chip in CHIPS.values()}


def markdown(results: dict[str, Any]) -> str:
    """What was aimed at, then all figures, a column for each chip."""
    chips = {name: results["chips"][name] for name in PLATFORMS if name in results["chips"]}
    parts = [_goals(chips)]
    for leaves in LEAVES:
        there = {name: chip[leaves] for name, chip in chips.items() if leaves in chip}
        parts.append(f"### {leaves}: bytes a parameter\n\n{_table(there, _memory, _least)}")
        parts.append(f"### {leaves}: kernels and compilation\n\n{_table(there, _compilation)}")
    return "\n\n".join(parts)


def _table(
    chips: dict[str, dict[str, Any]],
    cell: Callable[[dict[str, Any] | None], str],
    *others: Callable[[dict[str, Any]], str],
) -> str:
    """A row for each program, with the other cells before the chips'."""
    names = [name for name in PROGRAMS if any(name in rows for rows in chips.values())]
    first = {name: [rows[name] for rows in chips.values() if name in rows] for name in names}
    lines = []
    for name in names:
        finished = next((row for row in first[name] if "failed" not in row), {})
        before = [other(finished) for other in others]
        lines.append([name, *before, *(cell(rows.get(name)) for rows in chips.values())])
    return table(("", *(["least"] * len(others)), *chips), lines)


def _least(row: dict[str, Any]) -> str:
    return f"{row['least']:.2f}" if "least" in row else ""


def _memory(row: dict[str, Any] | None) -> str:
    if row is None or "failed" in row:
        return _absent(row)
    beside = f" + {row['temporary']:.2f}" if row["temporary"] >= 0.005 else ""
    return f"{row['bytes']:.2f}{beside}"


def _compilation(row: dict[str, Any] | None) -> str:
    if row is None or "failed" in row:
        return _absent(row)
    over = f" ({row['compile_over_optax']:.2f})" if "compile_over_optax" in row else ""
    return f"{row['kernels']}; {row['compile_s']:.1f} s{over}"


def _absent(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return row["failed"] if row["failed"].startswith("not finished") else "does not compile"


def _goals(chips: dict[str, Any]) -> str:
    """The worst of 8-bit moments, compensated weights and both, on each chip."""
    lines = []
    for leaves in (ONE_LEAF, ALL_LEAVES):
        for figure, goals in GOALS.items():
            cells = []
            for name, chip in chips.items():
                rows = [chip.get(leaves, {}).get(x, {}) for x in (CODES, COMPENSATED, SMALLEST)]
                found = [row.get(figure) for row in rows]
                goal = goals[PLATFORMS[name]]
                if None in found:
                    cells.append("not finished")
                    continue
                worst = max(found)
                verdict = "met" if worst <= goal else f"missed: {goal:g}"
                shown = f"{worst}" if figure == "kernels" else f"{worst:.2f}"
                cells.append(f"{shown}, {verdict}")
            lines.append([leaves, NAMES[figure], *cells])
    return table(("worst of 8-bit, compensated, both", "", *chips), lines)
