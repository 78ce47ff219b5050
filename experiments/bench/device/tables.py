"""The tables of the README, from the JSON of the parts that there are."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.common.report import quartiles, table

Rows = dict[str, dict[str, Any]]


def markdown(folder: Path) -> str:
    """All parts that were measured, each under its heading."""
    parts = []
    for name, (title, text) in PARTS.items():
        path = folder / f"device-{name}.json"
        if path.exists():
            results = json.loads(path.read_text())
            parts.append(f"### {title}\n\n{text(results['rows'])}\n\n({where(results)})")
    return "\n\n".join(parts)


def where(results: dict[str, Any]) -> str:
    """What was measured, on what."""
    versions = ", ".join(f"{name} {v}" for name, v in results.get("versions", {}).items())
    driver = f", driver {results['driver'].split(', ')[1]}" if results.get("driver") else ""
    return f"{results.get('device')}{driver}; jadam of commit {results.get('commit')}; {versions}"


def _missing(row: dict[str, Any]) -> str | None:
    return row.get("missing") or row.get("failed")


def _numbers(rows: Rows) -> str:
    """Of each kind the case with the largest distance, and the largest share that differs."""
    lines = []
    for kind in dict.fromkeys(kind for row in rows.values() for kind in row.get("found", {})):
        found = {name: row.get("found", {}) for name, row in rows.items()}
        cases = {name: kinds[kind] for name, kinds in found.items() if kind in kinds}
        worst = max(cases, key=lambda name: cases[name]["largest"])
        largest, share = (max(case[x] for case in cases.values()) for x in ("largest", "share"))
        shown = (worst, f"{largest:.3g}", f"{share:.1e}") if largest else ("", "0", "0")
        lines.append([kind, str(len(cases)), *shown])
    failed = [[name, "", reason, "", ""] for name, row in rows.items() if (reason := _missing(row))]
    columns = ("", "cases", "most in", "largest distance", "largest share that differs")
    return table(columns, [*lines, *failed])


def _ms(seconds: list[float] | None) -> str:
    if not seconds:
        return "–"
    found = quartiles(seconds)
    low, median, high = (1e3 * found[x] for x in ("low", "median", "high"))
    return f"{median:.3g} ({low:.3g} to {high:.3g})"


def copy_rate(rows: Rows, framework: str) -> float | None:
    """Bytes a second of a copy in a framework."""
    rates = rows.get(f"copy, {framework}", {}).get("rates")
    return statistics.median(rates) if rates else None


def rate(row: dict[str, Any], clock: str) -> float | None:
    """Bytes a second that a step moves, if it moves the least, by one of its two clocks."""
    if not row.get(clock):
        return None
    return row["bytes"] * row["parameters"] / statistics.median(row[clock])


def _share(row: dict[str, Any], clock: str, copy: float | None) -> str:
    own = rate(row, clock)
    return "–" if own is None or copy is None else f"{100 * own / copy:.0f}%"


SPEED = ("", "call [ms]", "in a loop [ms]", "bytes", "GB/s", "of a copy")


def _speed(rows: Rows) -> str:
    copies = {framework: copy_rate(rows, framework) for framework in ("jax", "torch")}
    shown = ", ".join(f"{r / 1e9:.0f} GB/s in {x}" for x, r in copies.items() if r)
    parts = [f"A copy, bytes read and written: {shown}. The faster one is what steps are held to."]
    copy = max((r for r in copies.values() if r), default=None)
    timed = [row for row in rows.values() if "framework" in row and "workload" in row]
    for workload in dict.fromkeys(row["workload"] for row in timed):
        lines = []
        left_out: dict[str, list[str]] = {}
        for row in timed:
            if row["workload"] != workload:
                continue
            if reason := _missing(row):
                left_out.setdefault(reason, []).append(row["contender"])
                continue
            best = rate(row, "device") or rate(row, "call")
            lines.append(
                [
                    row["contender"],
                    _ms(row["call"]),
                    _ms(row.get("device")),
                    f"{row['bytes']:.2f}",
                    f"{best / 1e9:.0f}" if best else "–",
                    _share(row, "device" if row.get("device") else "call", copy),
                ]
            )
        missing = (f"{reason}: {', '.join(names)}." for reason, names in left_out.items())
        parts.append("\n\n".join([f"**{workload}**", table(SPEED, lines), *missing]))
    firsts = [
        [row["contender"], _missing(row) or f"{row['first_s']:.1f}", *_compile_cells(row)]
        for key, row in rows.items()
        if key.startswith("first step, ")
    ]
    columns = ("first step of GPT-2", "all [s]", "trace and lower [s]", "compile [s]")
    return "\n\n".join([*parts, table(columns, firsts)])


def _compile_cells(row: dict[str, Any]) -> list[str]:
    return [f"{row[x]:.1f}" if x in row else "" for x in ("lowering_s", "compile_s")]


def _memory(rows: Rows) -> str:
    lines = []
    for name, row in rows.items():
        if reason := _missing(row):
            lines.append([name, reason, "", ""])
            continue
        peak = row["peak"]
        if peak is not None and peak == row.get("peak_before"):
            # What made the state needed more. Then a step has what XLA says that it allocates.
            peak = row["before"] + row["temporary"]
        sizes = (row["least"], row["before"], peak)
        lines.append([name, *("–" if x is None else f"{x / row['parameters']:.2f}" for x in sizes)])
    columns = ("bytes a parameter", "parameters, gradients, state", "before a step", "in a step")
    return table(columns, lines)


def _training(rows: Rows) -> str:
    trained = {name: row for name, row in rows.items() if row.get("losses")}
    common = min((len(row["losses"]) for row in trained.values()), default=0)
    at = sorted({common // 4, common // 2, common} - {0})
    lines = [
        [
            name,
            str(len(row["losses"])),
            f"{row['tokens_per_second']:,.0f}" if "tokens_per_second" in row else "–",
            *(f"{statistics.fmean(row['losses'][:step][-20:]):.3f}" for step in at),
            f"{row['validation_loss']:.3f}" if "validation_loss" in row else "–",
            f"{row['peak'] / 1e9:.2f}" if row.get("peak") else "–",
        ]
        for name, row in trained.items()
    ]
    failed = [[n, r, *[""] * (len(at) + 3)] for n, row in rows.items() if (r := _missing(row))]
    steps = (f"loss at step {step}" for step in at)
    columns = ("", "steps", "tokens a second", *steps, "loss of other text", "peak [GB]")
    return table(columns, [*lines, *failed])


PARTS: dict[str, tuple[str, Callable[[Rows], str]]] = {
    "numbers": ("Right numbers", _numbers),
    "speed": ("Time of a step", _speed),
    "memory": ("Memory of a GPT-2 step", _memory),
    "training": ("A training", _training),
}
