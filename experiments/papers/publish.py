"""How a reproduction starts and ends: command line, JSON, picture, table of claims."""

import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import tyro
from absl import logging
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape

from experiments.common import picture, report

RUNS = Path("runs/papers")
RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent / "README.md"
COLUMNS = ("claim", "measured", "holds")

Config = TypeVar("Config")


class Claim(NamedTuple):
    """What a paper says, the figures that decide on it, and whether they bear it out.

    `holds` is computed from the figures, never stated.
    """

    claim: str
    measured: str
    holds: bool


def command_line(name: str, config: type[Config], main: Callable[[Config], None]) -> None:
    """`python -m experiments.papers.NAME`: wrong options are one line, without a traceback."""
    logging.set_verbosity(logging.ERROR)  # TFDS would advise a faster decoder than Pillow
    try:
        main(tyro.cli(config, prog=f"python -m experiments.papers.{name}"))
    except ValueError as error:
        sys.exit(f"error: {error}")


def at_least(config: Any, **least: float) -> None:
    """Checks options of a config by name.

    Raises:
        ValueError: one is smaller than the least that it may be.
    """
    for name, smallest in least.items():
        if (got := getattr(config, name)) < smallest:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag}: expected {smallest} or more, got {got}")


def digits(x: Any, count: int = 5) -> Any:
    """Numbers as nested lists with `count` significant digits: a JSON file to read."""
    return np.vectorize(lambda value: float(f"{value:.{count}g}"), otypes=[float])(x).tolist()


def rows_of(claims: list[Claim]) -> list[tuple[str, str, str]]:
    """The claims as cells."""
    return [(claim.claim, claim.measured, "yes" if claim.holds else "no") for claim in claims]


def table_of(claims: list[Claim]) -> str:
    """The claims as README.md shows them."""
    return report.table(COLUMNS, rows_of(claims))


def publish(
    name: str,
    config: Any,
    numbers: dict[str, Any],
    claims: list[Claim],
    figure: Figure,
    *,
    program: str | None = None,
    out: Path | None = None,
) -> None:
    """Writes name.json, name.png and name.svg, and shows the claims on the terminal.

    Where the folder is the committed one, the table of claims in README.md follows.

    Args:
        program: the module that ran, where it is not called `name`.
        out: the folder, where it is not `config.out`.
    """
    out = out or config.out
    command = ["python", "-m", f"experiments.papers.{program or name}", *sys.argv[1:]]
    results = {
        **report.provenance(shlex.join(command)),
        "config": {key: value for key, value in asdict(config).items() if key != "out"},
        "claims": [claim._asdict() for claim in claims],
        **numbers,
    }
    report.write_json(out / f"{name}.json", results)
    picture.write(figure, out / name)
    console = Console()
    report.show(console, name, COLUMNS, (map(escape, row) for row in rows_of(claims)))
    console.print(f"written to {out / name}.json, .png and .svg")
    if out.resolve() == RESULTS:
        report.update_readme(name, table_of(claims), README)
