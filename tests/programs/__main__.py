"""`python -m tests.programs`: many random programs, with a report in results.json.

Each configuration runs along many sequences of gradients; a pair of both is a program. Results are
kept as they come, and a run goes on where the one before was stopped.
"""

import argparse
import collections
import json
import os
import time
from pathlib import Path
from typing import Any

# Before jax starts its backend.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
)

import jax

import jadam
from experiments.common.report import processor, write_json
from tests.programs import running
from tests.programs.drawing import draw

PATH = Path(__file__).parent / "results.json"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.programs", description=__doc__)
    parser.add_argument("--programs", type=int, default=12_000)
    parser.add_argument(
        "--sequences", type=int, default=100, help="of gradients, of each configuration"
    )
    parser.add_argument("--first", type=int, default=0, help="the configuration to begin with")
    parser.add_argument("--out", type=Path, default=PATH)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many")
    options = parser.parse_args()
    began = time.monotonic()
    report: dict[str, Any] = {
        "machine": processor(),
        "jax": jax.__version__,
        "kernel": jadam.kernels()["cpu"],
        "steps of a program": 2 * running.HALF,
        "sequences of a configuration": options.sequences,
        "configurations": {},
        "failures": [],
    }
    if options.out.exists():
        report |= json.loads(options.out.read_text())
    done = report["configurations"]
    for seed in range(options.first, options.programs // options.sequences):
        if str(seed) in done:
            continue
        if time.monotonic() - began > 60 * options.minutes:
            break
        program = draw(seed)
        found = running.Found(program, range(options.sequences))
        jax.clear_caches()  # each executable takes memory maps, of which a process has 65,530
        report["failures"] += found.failures
        done[str(seed)] = {
            "member": program.member,
            "storage": program.storage,
            "wrapper": program.wrapper,
            "kernel": program.kernel,
            "dtypes": " ".join(program.dtypes),
            "ways": list(program.ways),
            "on": f"{processor()}, {jadam.kernels()['cpu'].split(':')[0]}",
            "sequences": found.ran,
            "failed": len(found.failures),
            "units of the kernel's updates": found.units,
        }
        report["programs"] = sum(x["sequences"] for x in done.values())
        report["counts"] = counts(done.values())
        write_json(options.out, report)
        print(seed, len(found.failures), program, *(x["what"] for x in found.failures), flush=True)
    print(report["programs"], "programs,", len(report["failures"]), "failures")


def counts(done: Any) -> dict[str, dict[str, int]]:
    """How many programs had each member, storage and so on."""
    done = list(done)
    return {
        name: dict(
            sum(
                (collections.Counter(dict.fromkeys(listed(x[name]), x["sequences"])) for x in done),
                collections.Counter(),
            ).most_common()
        )
        for name in ("member", "storage", "wrapper", "kernel", "dtypes", "ways")
    }


def listed(value: Any) -> list[str]:
    """One value, or several."""
    return value if isinstance(value, list) else [value]


if __name__ == "__main__":
    main()
