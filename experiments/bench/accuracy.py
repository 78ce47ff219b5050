"""What float32 and bfloat16 Adams get wrong, measured: optax and jadam through the same code.

    python -m experiments.bench.accuracy

Nothing is stated that was not computed: if a newer optax mends a row, the table says so.
"""

from typing import Any

import optax
from rich.console import Console

import jadam
from experiments.bench.publish import write
from experiments.common import report
from experiments.common.accuracy import ROWS, measured, shown

COLUMNS = ("exact", "optax", "jadam")


def measure_all() -> dict[str, Any]:
    """Every row for both libraries, with what it was measured on."""
    rows = {
        row.name: {
            "question": row.question,
            "exact": row.exact,
            "optax": measured(row, optax),
            "jadam": measured(row, jadam),
        }
        for row in ROWS
    }
    return {**report.provenance("python -m experiments.bench.accuracy"), "rows": rows}


def cells(results: dict[str, Any]) -> list[list[str]]:
    """The tables' rows."""
    return [
        [row.question, *(shown(row, results["rows"][row.name][key]) for key in COLUMNS)]
        for row in ROWS
    ]


def markdown(results: dict[str, Any]) -> str:
    """The results as the page of numbers shows them."""
    lines = [
        f"| | exact | optax {results['versions']['optax']} | jadam |",
        "|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in cells(results)),
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write the JSON, and bring the page of numbers up to date."""
    results = measure_all()
    console = Console()
    report.show(console, "Accuracy", ("what", *COLUMNS), cells(results))
    console.print(f"written to {write('accuracy', results)}")
    report.update_readme("accuracy", markdown(results))


if __name__ == "__main__":
    main()
