"""One contender at work in a process of its own, and the clock around its steps.

The parent calls `build`, `turn` and `drop` in a worker process, one worker at a time; between two
calls a worker waits on a pipe.
"""

import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Trial(NamedTuple):
    """A contender with its arrays.

    Attributes:
        run: starts a step.
        wait: returns when what `run` returned is computed.
        steps: of the optimizer in one run.
        program: figures of the compiled program, if there is one.
        compilations: how often it was compiled.
    """

    run: Callable[[], Any]
    wait: Callable[[Any], Any] = lambda _: None
    steps: int = 1
    program: dict[str, float] | None = None
    compilations: Callable[[], int] = lambda: 0

    def seconds(self) -> tuple[float, float]:
        """Wall time of a step: until the call returned, and until its results were there."""
        start = time.perf_counter()
        started = self.run()
        called = time.perf_counter()
        self.wait(started)
        end = time.perf_counter()
        return (called - start) / self.steps, (end - start) / self.steps


_trials: dict[str, Trial] = {}

# Seconds before a turn. Threads that have just worked spin for a while before they sleep: those of
# torch's OpenMP do so for milliseconds.
PAUSE = 0.02


XLAS_NAMES = {"avx2": "AVX2", "baseline": "SSE4_2"}


def begin(instruction_set: str) -> None:
    """What a worker does first: it ends with its parent, and keeps to an instruction set."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    force(instruction_set)


def _end_with_parent() -> None:
    """A worker of a parent that was killed would wait for ever, with all its arrays."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def force(instruction_set: str) -> None:
    """Jadam's kernel and XLA keep to an instruction set in this process, which has loaded neither.

    The kernel's baseline is SSE2, for which XLA has no name.
    """
    if instruction_set:
        os.environ["JADAM_INSTRUCTION_SET"] = instruction_set
        flag = f"--xla_cpu_max_isa={XLAS_NAMES[instruction_set]}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"


def build(name: str, make: Callable[..., Trial], shapes: Any) -> dict[str, float]:
    """Builds a trial; returns the figures of its program."""
    _trials[name] = make(shapes)
    return _trials[name].program or {}


def turn(name: str, steps: int) -> dict[str, float]:
    """Medians over some steps. A step before them wakes the threads, unless steps are long."""
    if name not in _trials:
        raise RuntimeError("its process ended")
    trial = _trials[name]
    time.sleep(PAUSE)
    if steps > 1:
        trial.seconds()
    dispatch, seconds = zip(*(trial.seconds() for _ in range(steps)), strict=True)
    return {"seconds": statistics.median(seconds), "dispatch": statistics.median(dispatch)}


def drop(name: str) -> int:
    """Frees a trial; returns how often its program was compiled."""
    return _trials.pop(name).compilations()
