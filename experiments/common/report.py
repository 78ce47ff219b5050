"""Where a figure comes from, and how it is written down."""

import json
import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

NUMBERS = Path(__file__).parents[2] / "docs" / "pages" / "numbers.md"
PACKAGES = (
    *("jax", "jaxlib", "optax", "flax", "numpy", "torch", "flashoptim-jax"),
    *("flashoptim", "bitsandbytes", "torchao"),
)


def _commit() -> str:
    if shutil.which("git") is None:
        return "unknown"
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    answer = subprocess.run(git, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "unknown"


def _versions() -> dict[str, str]:
    installed = {d.metadata["Name"].lower(): d.version for d in metadata.distributions()}
    return {name: installed[name] for name in PACKAGES if name in installed}


def processor() -> str:
    """The processor's name."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    names = [line.split(": ", 1)[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def spread(ratio: dict[str, float] | None) -> str:
    """A median with its quartiles, as a cell."""
    return "–" if ratio is None else "{median:.2f} ({low:.2f} to {high:.2f})".format(**ratio)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show(
    console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]
) -> None:
    """A table on the terminal."""
    shown = Table(*columns, title=title)
    for row in rows:
        shown.add_row(*row)
    console.print(shown)


def provenance(command: str) -> dict[str, Any]:
    """Command, device, machine, versions and commit of a measurement."""
    return {
        "command": command,
        "device": jax.devices()[0].device_kind,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": _versions(),
        "commit": _commit(),
    }


def write_file(path: Path, content: bytes) -> None:
    """Writes a file in one step: a reader finds the old file or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    unfinished.write_bytes(content)
    unfinished.replace(path)


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Writes results as JSON."""
    write_file(path, json.dumps(results, indent=1).encode() + b"\n")


def readme_block(name: str, readme: Path = NUMBERS) -> tuple[str, str, str]:
    """A page before, in and after the block between a name's two markers."""
    before, rest = readme.read_text().split(f"<!-- {name}: begin -->\n")
    block, after = rest.split(f"<!-- {name}: end -->\n")
    return f"{before}<!-- {name}: begin -->\n", block, f"<!-- {name}: end -->\n{after}"


def update_readme(name: str, block: str, readme: Path = NUMBERS) -> None:
    """Put a table between its markers into a README, or by default the page of numbers."""
    before, _, after = readme_block(name, readme)
    write_file(readme, f"{before}{block}\n{after}".encode())
