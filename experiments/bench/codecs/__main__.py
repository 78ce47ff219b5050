"""Compares all candidates; writes results/codecs.json and the table of the bench's README."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import track

from experiments.bench.publish import README, write
from experiments.common.report import show, table, update_readme

from .candidates import CANDIDATES, FEW, FEW_WINNER, FLOAT32, WINNER, ZONED, Codec
from .judgement import BETAS, compare, train_loss

COLUMNS = (
    *("code", "bytes", "bound", "mnist", "median", "p99", "gpt", "log-normal", "shrunk", "1..99%"),
    *("mixed 1..99%", "dead m", "ns", "loss"),
)


def cells(results: dict[str, Any], betas: str) -> list[list[str]]:
    """The table's rows for one pair of decay rates."""
    rows = []
    for name, row in results["rows"].items():
        loss = " ".join(f"{x:.4f}" for x in row.get("mnist loss", []))
        head, tail = [name, f"{row['bytes']:.3f}"], [f"{row['nanoseconds']:.1f}", loss]
        if betas not in row:
            rows.append([*head, *[""] * (len(COLUMNS) - 4), *tail])
            continue
        streams, shrink = row[betas]["streams"], row[betas]["shrink"]
        equal, mixed = shrink["equal scales"], shrink["mixed scales"]
        rows.append(
            [
                *head,
                f"{max(s['bound'] for s in streams.values()):.6g}",
                f"{1e3 * streams['mnist']['nmse']:.3g}",
                f"{streams['mnist']['median']:.1e}",
                f"{streams['mnist']['p99']:.1e}",
                f"{1e3 * streams['gpt']['nmse']:.3g}",
                f"{1e3 * streams['log_normal']['nmse']:.3g}",
                f"{equal['mean']:.3f}±{equal['sd']:.3f}",
                f"{equal['p1']:.2f}..{equal['p99']:.2f}",
                f"{mixed['p1']:.2f}..{mixed['p99']:.2f}",
                f"{max(equal['dead_m'], mixed['dead_m']):.0e}",
                *tail,
            ]
        )
    return rows


class Study(NamedTuple):
    """Some candidates, the code that jadam has, and those that are trained with."""

    candidates: Sequence[Codec]
    winner: Codec
    trained: Sequence[Codec]


STUDIES = {
    "codecs": Study(CANDIDATES, WINNER, (FLOAT32, CANDIDATES[1], ZONED, WINNER)),
    "codecs-few": Study(FEW, FEW_WINNER, (FLOAT32, FEW_WINNER, FEW[-2], WINNER)),
}
"""By what the JSON is called: 16 bits for both moments, and fewer."""


def markdown(results: dict[str, Any]) -> str:
    """The table of the default decay rates as the bench's README shows it."""
    return table(COLUMNS, cells(results, "0.9,0.999"))


def main() -> None:
    """Compare, write the JSON and the README's table, and print all."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bench.codecs")
    parser.add_argument("study", nargs="?", choices=STUDIES, default="codecs")
    name = parser.parse_args().study
    study = STUDIES[name]
    results = compare(study.candidates, study.winner, f"python -m experiments.bench.codecs {name}")
    for codec in track(study.trained, "MNIST, 400 steps"):
        results["rows"][codec.name]["mnist loss"] = train_loss(codec)
    write(name, results)
    update_readme(name, markdown(results), README)
    console = Console(width=None if sys.stdout.isatty() else 190)
    for b1, b2 in BETAS:
        betas = f"{b1},{b2}"
        title = f"b1,b2 = {betas}; NMSE·1e3 of the update"
        show(console, title, COLUMNS, cells(results, betas))
    console.print(results["winner"])


if __name__ == "__main__":
    main()
