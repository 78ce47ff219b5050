"""Two megabytes of English that every machine has: the documentation inside Python's library."""

import ast
import hashlib
import platform
import sysconfig
import warnings
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import numpy as np

from experiments.common.report import write_file

# Folders that are not on every machine, or are not Python's own.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}


class Text(NamedTuple):
    """The text's bytes, uint8[n], split once: the tail is never trained on."""

    train: np.ndarray
    validation: np.ndarray
    origin: dict[str, Any]


def docstrings(folder: Path) -> list[str]:
    """Every docstring under a folder, sorted; modules are parsed and not imported."""
    found = set()
    for path in sorted(folder.rglob("*.py")):
        if LEFT_OUT & set(path.relative_to(folder).parts):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a backslash in somebody's string
            tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found.add(ast.get_docstring(node))
    return sorted(found - {None, ""})


def collect() -> bytes:
    """pydoc's topics, then the library's docstrings; about 5 s."""
    parts = [topics[name] for name in sorted(topics)]
    parts += docstrings(Path(sysconfig.get_path("stdlib")))
    return "\n\n".join(parts).encode(errors="replace")


def load(cache: Path, validation_bytes: int = 100_000) -> Text:
    """The text, collected at the first use. Its origin says of which version of Python it is."""
    path = cache / f"text-{platform.python_version()}.txt"
    if not path.exists():
        write_file(path, collect())
    text = path.read_bytes()
    values = np.frombuffer(text, np.uint8)
    return Text(
        values[:-validation_bytes],
        values[-validation_bytes:],
        {
            "bytes": len(text),
            "validation_bytes": validation_bytes,
            "sha256": hashlib.sha256(text).hexdigest(),
            "python": platform.python_version(),
        },
    )
