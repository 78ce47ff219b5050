"""How contenders are timed in turn: processes, groups that fit into memory, rounds, ratios."""

import multiprocessing
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import jax
from rich.progress import track

from experiments.bench import trials
from experiments.bench.contenders import (
    BUFFERS,
    COMPENSATED_8,
    CONTENDERS,
    JADAM,
    JADAM_8,
    JADAM_16,
    JADAM_SCAN,
    JADAM_UPDATE,
    LIMIT,
    OPTAX,
    REFERENCES,
    TORCH_FUSED,
    Contender,
)
from experiments.bench.workloads import (
    GPT2,
    IN_CACHE,
    LLAMA3_LAYER,
    MANY_LEAVES,
    ONE_LEAF,
    TINY_LEAVES,
    Workload,
)
from experiments.common import report

TURN_SECONDS = 0.2
"""How long a turn should take: it has from 1 to 20 steps."""
GROUP_SHARE = 0.6
"""The share of the memory that a group of contenders may hold."""
LARGEST_SHARE = 0.8
"""The share that the references and one contender may hold."""
COMPILE_SECONDS = 60
"""A contender is left out if, at its pace in an earlier workload, it would compile for longer."""

Round = dict[str, dict[str, float]]
"""One turn of each contender, by name."""


class Workers:
    """Processes that make and time contenders, one call at a time."""

    def __init__(self) -> None:
        self._pools: dict[str, ProcessPoolExecutor] = {}

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self._pools.values():
            pool.shutdown(cancel_futures=True)

    def call(self, process: str, function: Any, *arguments: Any) -> Any:
        """The result of `function(*arguments)` in a process."""
        if process not in self._pools:
            context = multiprocessing.get_context("spawn")
            self._pools[process] = ProcessPoolExecutor(
                1, context, trials.begin, (process.partition("jax ")[2],)
            )
        try:
            return self._pools[process].submit(function, *arguments).result()
        except BrokenProcessPool:
            # The next call finds a new process, without the contenders of this one.
            del self._pools[process]
            raise


def memory() -> int:
    """Bytes of the device's memory, or of the machine's."""
    stats = jax.devices()[0].memory_stats()
    if stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def groups(contenders: Sequence[Contender], parameters: int, budget: int) -> list[list[Contender]]:
    """Contenders that fit into memory together, each group with the references first."""
    references = [c for c in contenders if c in REFERENCES]
    free = budget - parameters * sum(c.bytes for c in references)
    packed: list[list[Contender]] = [[]]
    for contender in contenders:
        if contender in references:
            continue
        held = parameters * sum(c.bytes for c in (contender, *packed[-1]))
        if packed[-1] and held > free:
            packed.append([])
        packed[-1].append(contender)
    return [[*references, *group] for group in packed]


class Measurement:
    """The contenders of one workload: who is ready, and what was found.

    `pace` is what compiling took in earlier workloads, in seconds a leaf.
    """

    def __init__(self, workload: Workload, workers: Workers, pace: dict[str, float]) -> None:
        self.workload, self.workers, self.pace = workload, workers, pace
        self.found: dict[str, dict[str, Any]] = {}
        self.steps: dict[str, int] = {}

    def missing(self, contender: Contender, backend: str) -> str | None:
        """Why a contender is not timed on this workload, if it is not."""
        if reason := contender.missing(backend):
            return reason
        held = {*REFERENCES, contender}
        if self.workload.parameters * sum(c.bytes for c in held) > LARGEST_SHARE * memory():
            return "does not fit into memory"
        expected = self.pace.get(contender.name, 0) * len(self.workload.shapes)
        if expected > COMPILE_SECONDS:
            return f"not run: it would compile for {expected:.0f} s"
        return None

    def attempt(self, contender: Contender, function: Any, *arguments: Any) -> Any:
        """The result of a call in the contender's process; None, and a reason, if it fails."""
        try:
            return self.workers.call(contender.process, function, contender.name, *arguments)
        except Exception as error:  # a peer's failure is a row of the table, whatever it is
            line = str(error).partition("\n")[0]
            self.found[contender.name] = {"missing": f"{type(error).__name__}: {line}"}
            return None

    def make(self, contender: Contender) -> None:
        """Builds a contender and chooses the steps of its turns."""
        name, leaves = contender.name, len(self.workload.shapes)
        program = self.attempt(contender, trials.build, contender.make, self.workload.shapes)
        if program is None or (turn := self.attempt(contender, trials.turn, 2)) is None:
            return
        if program:
            self.found[name]["program"] = program
            if leaves > 100:
                took = program["lowering_seconds"] + program["compile_seconds"]
                self.pace[name] = took / leaves
        self.steps[name] = min(max(int(TURN_SECONDS / turn["seconds"]), 1), 20)

    def round(self, contenders: Iterable[Contender]) -> Round:
        """A turn of each."""
        turns = {}
        for contender in filter(self.lives, contenders):
            turn = self.attempt(contender, trials.turn, self.steps[contender.name])
            if turn is not None:
                turns[contender.name] = turn
        return turns

    def lives(self, contender: Contender) -> bool:
        """Whether the contender was built and has not failed since."""
        return contender.name in self.steps and "missing" not in self.found[contender.name]

    def drop(self, contender: Contender) -> None:
        """Frees a contender's arrays."""
        if compilations := self.attempt(contender, trials.drop):
            self.found[contender.name]["compilations"] = compilations


def measure(workload: Workload, rounds: int, pace: dict[str, float]) -> dict[str, Any]:
    """Every contender's times, or why it has none."""
    present, timed = [], []
    with Workers() as workers:
        measurement = Measurement(workload, workers, pace)
        for contender in CONTENDERS:
            if contender.many_leaves and not workload.many_leaves:
                continue
            if contender.few_leaves and len(workload.shapes) > 1:
                continue
            reason = measurement.missing(contender, jax.default_backend())
            measurement.found[contender.name] = {"missing": reason} if reason else {}
            if not reason:
                present.append(contender)
        packed = groups(present, workload.parameters, int(GROUP_SHARE * memory()))
        for number, group in enumerate(packed, 1):
            title = f"{workload.name}, group {number} of {len(packed)}"
            for contender in track(group, f"{title}: compiling"):
                if contender.name not in measurement.steps:
                    measurement.make(contender)
            for _ in track(range(rounds), f"{title}: timing"):
                timed.append(measurement.round(group))
            for contender in filter(measurement.lives, group):
                if number == len(packed) or contender not in REFERENCES:
                    measurement.drop(contender)
        for contender in filter(measurement.lives, present):
            measurement.found[contender.name] |= summary(contender.name, timed)
    return {
        "parameters": workload.parameters,
        "leaves": len(workload.shapes),
        "contenders": measurement.found,
    }


def summary(name: str, rounds: Iterable[Round]) -> dict[str, Any]:
    """Seconds of a step and of its call, and ratios to the references in the same round."""
    own = [r for r in rounds if name in r]
    figures: dict[str, Any] = {
        "seconds": report.quartiles([r[name]["seconds"] for r in own]),
        "dispatch_seconds": report.quartiles([r[name]["dispatch"] for r in own]),
    }
    for reference in (LIMIT.name, TORCH_FUSED.name, OPTAX.name, BUFFERS.name):
        ratios = [r[name]["seconds"] / r[reference]["seconds"] for r in own if reference in r]
        if len(ratios) > 1:
            figures[f"over {reference}"] = report.quartiles(ratios)
    return figures


class Target(NamedTuple):
    """The largest ratio of a contender's time to a reference's that we aim at."""

    workload: Workload
    contender: Contender
    reference: Contender
    at_most: float


LARGE = (ONE_LEAF, GPT2, LLAMA3_LAYER)
ON_A_CPU = (
    *(Target(w, JADAM, LIMIT, 1.05) for w in LARGE),
    *(Target(w, JADAM_UPDATE, OPTAX, 0.9) for w in (ONE_LEAF, GPT2)),
    Target(IN_CACHE, JADAM, TORCH_FUSED, 1.2),
    Target(MANY_LEAVES, JADAM, LIMIT, 1.15),
    Target(TINY_LEAVES, JADAM, BUFFERS, 1.1),
    Target(TINY_LEAVES, JADAM_SCAN, TORCH_FUSED, 1.0),
)
"""On every CPU."""
SMALL_STATE = {"avx512": (0.75, 0.8, 0.9), "avx2": (0.8, 1.0, 1.1)}
"""Over torch's float32: moments in bfloat16 and in 8 bits, and 8 bits with compensated weights."""


def targets_of(instruction_set: str) -> tuple[Target, ...]:
    """Those of a processor whose best instruction set this is."""
    contenders = (JADAM_16, JADAM_8, COMPENSATED_8)
    small = zip(contenders, SMALL_STATE.get(instruction_set, ()), strict=False)
    return (*ON_A_CPU, *(Target(w, c, TORCH_FUSED, most) for c, most in small for w in LARGE))


def targets(workloads: dict[str, Any], instruction_set: str) -> list[dict[str, Any]]:
    """Each target with what was measured."""
    return [
        {
            "workload": workload.name,
            "contender": contender.name,
            "reference": reference.name,
            "at_most": at_most,
            "measured": workloads[workload.name]["contenders"]
            .get(contender.name, {})
            .get(f"over {reference.name}"),
        }
        for workload, contender, reference, at_most in targets_of(instruction_set)
        if workload.name in workloads
    ]
