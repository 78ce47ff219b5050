"""Where the bench writes its results."""

from pathlib import Path
from typing import Any

from experiments.common.report import write_json

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent / "README.md"


def write(name: str, results: dict[str, Any]) -> Path:
    """Writes the results to results/NAME.json; returns the path."""
    path = RESULTS / f"{name}.json"
    write_json(path, results)
    return path
