"""Which tests run which lines of the package, and how long each takes: a plugin of pytest.

`pytest -p tests.mutants.lines` writes what it saw into the file $MUTANTS_LINES. Every test starts
without what those before it have traced or cached: a line that one process traces once would seem
to be one test's alone.
"""

import ast
import functools
import gc
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import coverage
import jax
import pytest

CACHED = type(functools.cache(len))
PACKAGE = Path(__file__).parents[2] / "jadam"


@dataclass
class Lines:
    """What was recorded: the seconds of each test, and the tests of each line of each module."""

    seconds: dict[str, float]
    tests: dict[str, dict[int, set[str]]]

    @classmethod
    def read(cls, paths: dict[str, Path], late: set[str]) -> "Lines":
        """What was written of each file of tests; what late ones run at import is left out."""
        found = cls({}, {})
        for name, path in paths.items():
            data = json.loads(path.read_text())
            found.seconds |= data["seconds"]
            names = [*data["seconds"], ""]
            for module, lines in data["lines"].items():
                of_module = found.tests.setdefault(module, {})
                for line, tests in lines.items():
                    of_module.setdefault(int(line), set()).update(
                        names[i] for i in tests if i >= 0 or name not in late
                    )
        return found

    def covering(self, module: str, code: str, line: int) -> tuple[set[str], bool]:
        """The tests that run a line's statement, and whether importing the module runs it.

        For the head of a function those that run the function: its defaults and decorators count
        there.
        """
        around = [node for node in statements(code) if line in range(first(node), last(node) + 1)]
        if not around:
            return set(), True
        inner = min(around, key=lambda node: last(node) - first(node))
        body = getattr(inner, "body", None)
        end = first(body[0]) - 1 if body and not isinstance(inner, ast.FunctionDef) else last(inner)
        of_module = self.tests.get(module, {})
        tests = set().union(*(of_module.get(i, set()) for i in range(first(inner), end + 1)))
        return tests - {""}, "" in tests


@functools.cache
def statements(code: str) -> list[ast.stmt]:
    return [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.stmt)]


def first(node: ast.stmt) -> int:
    """Its first line, with decorators."""
    return min([node.lineno, *(x.lineno for x in getattr(node, "decorator_list", []))])


def last(node: ast.stmt) -> int:
    return node.end_lineno or node.lineno


class Recorder:
    """Coverage by test."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.coverage = coverage.Coverage(
            data_file=None, config_file=False, include=[f"{PACKAGE}/*"], messages=False
        )
        self.coverage.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        jax.clear_caches()
        for found in gc.get_objects():
            # Not isinstance, which asks objects for their class: some import what they stand for.
            if type(found) is CACHED and (found.__module__ or "").startswith("jadam"):
                found.cache_clear()
        self.coverage.switch_context(item.nodeid)
        began = time.process_time()
        try:
            return (yield)
        finally:
            self.seconds[item.nodeid] = round(time.process_time() - began, 3)
            self.coverage.switch_context("")

    def pytest_sessionfinish(self) -> None:
        self.coverage.stop()
        data, number = self.coverage.get_data(), {x: i for i, x in enumerate(self.seconds)}
        # Tests by their number in `seconds`; -1 for what runs before any test.
        lines = {
            str(Path(path).relative_to(PACKAGE.parent)): {
                line: [number.get(test, -1) for test in tests]
                for line, tests in data.contexts_by_lineno(path).items()
            }
            for path in data.measured_files()
        }
        path = Path(os.environ["MUTANTS_LINES"])
        path.with_suffix(".part").write_text(json.dumps({"seconds": self.seconds, "lines": lines}))
        path.with_suffix(".part").rename(path)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Recorder(), "mutants-lines")
