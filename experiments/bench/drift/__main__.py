"""`python -m experiments.bench.drift curves|tasks|report`; all three without a word."""

import argparse

from experiments.bench.publish import write
from experiments.common.report import provenance

from . import measure

COMMAND = "python -m experiments.bench.drift"


def main() -> None:
    """What is asked for: about ten minutes for the curves, one for the tasks."""
    parser = argparse.ArgumentParser(COMMAND, description=__doc__)
    parser.add_argument("parts", nargs="*", choices=["curves", "tasks", "report"])
    parts = parser.parse_args().parts
    if not parts or "curves" in parts:
        write("drift", {**provenance(f"{COMMAND} curves"), **measure.curves()})


if __name__ == "__main__":
    main()
