"""Time of one AdamW step beside its peers and beside the limit of the memory.

    python -m experiments.bench.speed

Each runtime with threads of its own (the limit's, XLA's, torch's) runs in a process of its own. In
every round each contender has one turn of a few steps, while the others wait. A ratio compares two
turns of the same round: where the machine is slower for a while, it is so for both. Contenders that
do not fit into memory together are timed in groups; each group has the limit and torch's fused
AdamW in its rounds. Figures are medians, with the quartiles as spread.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import tyro
from rich.console import Console

import jadam
from experiments.bench.bars import draw
from experiments.bench.contenders import (
    COPY,
    FLASHOPTIM_JAX,
    JADAM,
    JADAM_8,
    JADAM_16,
    JADAM_UPDATE,
    LIMIT,
    OPTAX,
    TORCH_FUSED,
    Contender,
    instruction_sets,
)
from experiments.bench.limit import COPY_BYTES, STEP_BYTES
from experiments.bench.program import INSTRUCTIONS
from experiments.bench.publish import README, RESULTS
from experiments.bench.rounds import measure, targets
from experiments.bench.workloads import QUICK, WORKLOADS, Workload
from experiments.common import picture, report

PARTS = Path("runs", "bench", "parts")
"""The folder of finished workloads, until all are finished."""
TIE = 0.05
"""On a shared machine a smaller difference says nothing."""


@dataclass(frozen=True)
class Config:
    """Times one AdamW step; writes JSON, a picture and the tables of the READMEs."""

    quick: bool = False
    """Small sizes, 3 rounds and no README, to see whether it works."""
    rounds: int = 9
    """Turns of each contender."""
    resume: bool = False
    """Goes on after a run that was stopped, with the workloads that it finished."""
    redraw: bool = False
    """Measures nothing: tables, targets and picture from the JSON that is there."""
    out: Path | None = None
    """The folder for JSON and pictures. Default: results/, or runs/bench with --quick."""


def _ratio(found: dict[str, Any], reference: Contender) -> dict[str, float] | None:
    return found.get(f"over {reference.name}")


def _times(ratio: dict[str, float] | None) -> str:
    return "–" if ratio is None else f"{ratio['median']:.2f}"


SHOWN = (TORCH_FUSED, JADAM, JADAM_UPDATE, OPTAX, JADAM_16, JADAM_8, FLASHOPTIM_JAX)
PEERS = ("jax", "optax", "torch", "flashoptim-jax")


def committed() -> list[dict[str, Any]]:
    """The results of all machines that were measured."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("speed-*.json"))]


def of_each(machines: list[dict[str, Any]], table: Callable[[dict[str, Any]], str]) -> str:
    """A table of each machine's results under its name."""
    return "\n\n".join(f"**{where(results)}**\n\n{table(results)}" for results in machines)


def kind_of(results: dict[str, Any]) -> str:
    """The instruction set that the kernel had, or the backend without one."""
    return results["instruction_set"] or results["backend"]


def where(results: dict[str, Any]) -> str:
    """What was measured, and the commit of the code that was."""
    machine = f"{results['processor']}, {results['machine']}"
    return f"{kind_of(results)}: {machine}, jadam of commit {results['commit']}"


def markdown(results: dict[str, Any]) -> str:
    """The medians over the limit, as the page of numbers shows them."""
    rows = []
    for name, workload in results["workloads"].items():
        found = workload["contenders"]
        limit = found[LIMIT.name].get("seconds")
        rows.append(
            [
                name,
                f"{1e3 * limit['median']:.2f}" if limit else "–",
                *(_times(_ratio(found.get(c.name, {}), LIMIT)) for c in SHOWN),
            ]
        )
    versions = ", ".join(f"{name} {v}" for name, v in results["versions"].items() if name in PEERS)
    table = report.table(["workload", "limit [ms]", *(c.name for c in SHOWN)], rows)
    return f"{table}\n\n({versions})"


def target_markdown(results: dict[str, Any]) -> str:
    """The targets and what came of them."""
    return report.table(TARGET_COLUMNS, target_cells(results))


def full_markdown(results: dict[str, Any]) -> str:
    """Targets, times and programs, as this folder's README shows them."""
    parts = [f"![Time of a step over the limit](results/speed-{kind_of(results)}.svg)"]
    if results["targets"]:
        parts.append(target_markdown(results))
    for name, workload in results["workloads"].items():
        parts += [
            f"### {name}\n\n{rates(workload)}",
            report.table(COLUMNS, cells(workload)),
            report.table(PROGRAM_COLUMNS, program_cells(workload)),
        ]
    return "\n\n".join(parts)


TARGET_COLUMNS = ("workload", "target", "measured", "")


def target_cells(results: dict[str, Any]) -> list[list[str]]:
    """Each target and the figure beside it."""
    rows = []
    for target in results["targets"]:
        low, high = target["at_most"], target["at_most"] * (1 + TIE)
        measured = (target["measured"] or {}).get("median")
        if measured is None:
            verdict = "not measured"
        else:
            verdict = "met" if measured <= low else "tie" if measured <= high else "missed"
        aim = f"{target['contender']} / {target['reference']} ≤ {target['at_most']:.2f}"
        rows.append([target["workload"], aim, report.spread(target["measured"]), verdict])
    return rows


COLUMNS = ("", "ms", "over the limit", "over torch fused")


def cells(workload: dict[str, Any]) -> list[list[str]]:
    """A row for each contender: medians, and ratios with their quartiles."""
    rows = []
    for name, found in workload["contenders"].items():
        if name == COPY.name:
            continue
        if "missing" in found:
            rows.append([name, found["missing"], "", ""])
        else:
            ratios = (report.spread(_ratio(found, reference)) for reference in (LIMIT, TORCH_FUSED))
            rows.append([name, f"{1e3 * found['seconds']['median']:.2f}", *ratios])
    return rows


def rates(workload: dict[str, Any]) -> str:
    """What the limit and a copy move in a second."""
    leaves = workload["leaves"]
    parts = [f"{leaves:,} {'leaf' if leaves == 1 else 'leaves'}"]
    parts.append(f"{workload['parameters']:,} parameters")
    for contender, size in ((LIMIT, STEP_BYTES), (COPY, COPY_BYTES)):
        if seconds := workload["contenders"][contender.name].get("seconds"):
            rate = size * workload["parameters"] / seconds["median"]
            parts.append(f"{contender.name} {rate / 1e9:.0f} GB/s")
    return ", ".join(parts)


PROGRAM_COLUMNS = (
    "program",
    "lower + compile [s]",
    "call [ms]",
    "compilations",
    "temporary, aliased, accessed [B]",
    "fusions, calls, copies",
)


def program_cells(workload: dict[str, Any]) -> list[list[str]]:
    """What XLA made of each jitted step; bytes a parameter."""
    rows = []
    for name, found in workload["contenders"].items():
        program = found.get("program")
        if program is None or "seconds" not in found:
            continue
        kinds = ("temporary_bytes", "aliased_bytes", "accessed_bytes")
        rows.append(
            [
                name,
                f"{program['lowering_seconds']:.2f} + {program['compile_seconds']:.2f}",
                f"{1e3 * found['dispatch_seconds']['median']:.2f}",
                str(found.get("compilations", "–")),
                ", ".join(f"{program[kind] / workload['parameters']:.1f}" for kind in kinds),
                ", ".join(str(program[kind]) for kind in INSTRUCTIONS),
            ]
        )
    return rows


def measured_once(workload: Workload, config: Config, pace: dict[str, float]) -> Any:
    """A workload's figures: measured and kept, or those that a stopped run has kept."""
    kept = PARTS / f"{workload.name}.json"
    if config.resume and kept.exists():
        return json.loads(kept.read_text())
    found = measure(workload, 3 if config.quick else config.rounds, pace)
    report.write_json(kept, found)
    return found


def kind_of_this_machine() -> str:
    """The instruction set that the kernel has here, or the backend without one."""
    backend = jax.default_backend()
    return instruction_sets()[0] if backend == "cpu" and instruction_sets() else backend


def measured(config: Config) -> dict[str, Any]:
    """Every workload's figures, and where they come from."""
    # The processes share a GPU's memory: none may take it all.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    backend = jax.default_backend()
    chosen = [w for w in WORKLOADS if backend == "gpu" or not w.gpu_only]
    load = os.getloadavg()[0]  # above 0: others disturb the times
    pace: dict[str, float] = {}
    workloads = {
        w.name: measured_once(w, config, pace) for w in (QUICK if config.quick else chosen)
    }
    return {
        **report.provenance("python -m experiments.bench.speed"),
        "processor": report.processor() if backend == "cpu" else jax.devices()[0].device_kind,
        "backend": backend,
        "kernels": jadam.kernels()[backend],
        "instruction_set": kind_of_this_machine() if backend == "cpu" else None,
        "load_average_before": load,
        "workloads": workloads,
    }


def main(config: Config = Config()) -> None:
    """Measure, print, write the JSON and the picture, and bring the READMEs up to date."""
    out = config.out or (Path("runs", "bench") if config.quick else RESULTS)
    kind = kind_of_this_machine()
    kept = out / f"speed-{kind}.json"
    results = json.loads(kept.read_text()) if config.redraw else measured(config)
    on_cpu = results.get("backend", "cpu") == "cpu"
    in_use = results["instruction_set"]
    results["targets"] = targets(results["workloads"], in_use) if on_cpu else []

    console = Console()
    for name, workload in results["workloads"].items():
        report.show(console, f"{name}: {rates(workload)}", COLUMNS, cells(workload))
        report.show(console, f"{name}: programs", PROGRAM_COLUMNS, program_cells(workload))
    if results["targets"]:
        report.show(console, "Targets", TARGET_COLUMNS, target_cells(results))
    report.write_json(kept, results)
    shutil.rmtree(PARTS, ignore_errors=True)
    picture.write(draw(results), kept.with_suffix(""), dpi=150)
    console.print(f"written to {kept}, .png, .svg")
    if out == RESULTS and not config.quick:
        report.update_readme("speed", of_each(committed(), markdown))
        report.update_readme("speed-full", of_each(committed(), full_markdown), README)


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m experiments.bench.speed"))
