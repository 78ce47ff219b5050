"""`python -m experiments.bench.drift curves|tasks|report`; all three without a word."""

import argparse

from experiments.bench.publish import write
from experiments.common.report import provenance

from . import measure, report, tasks

COMMAND = "python -m experiments.bench.drift"


def main() -> None:
    """What is asked for: about eight minutes for the curves, three for the tasks."""
    parser = argparse.ArgumentParser(COMMAND, description=__doc__)
    parser.add_argument("parts", nargs="*", help="curves, tasks, report")
    parts = parser.parse_args().parts or ["curves", "tasks", "report"]
    if unknown := set(parts) - {"curves", "tasks", "report"}:
        parser.error(f"expected curves, tasks or report, got {sorted(unknown)}")
    if "curves" in parts:
        write("drift", {**provenance(f"{COMMAND} curves"), **measure.curves()})
    if "tasks" in parts:
        write("drift-tasks", {**provenance(f"{COMMAND} tasks"), "tasks": tasks.search()})
    if "report" in parts:
        report.main()


if __name__ == "__main__":
    main()
