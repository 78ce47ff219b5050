"""optax's own tests, which lie in its wheel, of what is Adam and of what is put around it."""

import json
import os
import sys
from pathlib import Path

import optax
import pytest

HERE = Path(optax.__file__).parent
FILES = [
    "_src/alias_test.py",
    "_src/transform_test.py",
    "_src/wrappers_test.py",
    "contrib/_sam_test.py",
    "contrib/_schedule_free_test.py",
    "schedules/_inject_test.py",
    "transforms/_accumulation_test.py",
    "transforms/_combining_test.py",
    "transforms/_conditionality_test.py",
    "transforms/_freezing_test.py",
    "transforms/_layouts_test.py",
    "transforms/_masking_test.py",
    "tree_utils/_state_utils_test.py",
]
# They go through all optimizers: of these the family.
OF_ALL = ("alias_test", "transform_test", "_sam_test", "_schedule_free_test")


class Outcomes:
    def __init__(self):
        self.passed = {}

    def pytest_collection_modifyitems(self, items):
        def says(item):
            return item.nodeid + getattr(item.function, "__x_params_repr__", "")

        items[:] = [
            item
            for item in items
            if not any(name in item.nodeid for name in OF_ALL)
            or any(name in says(item) for name in ("adam", "amsgrad"))
        ]

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.split("optax/")[-1]
        # What fails in one of its parts has failed.
        if report.when != "teardown" and self.passed.get(name) is not False:
            self.passed[name] = None if report.skipped else report.passed


outcomes = Outcomes()
files = [str(HERE / name) for name in FILES if (HERE / name).exists()]
stdout, sys.stdout = sys.stdout, sys.stderr
options = ("-q", "-c", os.devnull, "--rootdir", str(HERE), "-p", "no:cacheprovider")
pytest.main([*files, *options], [outcomes])
sys.stdout = stdout
print(json.dumps({"tests": outcomes.passed}))
