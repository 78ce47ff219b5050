"""The tests of a mutant in a forked process, which has imported all that the fault does not touch.

A start of Python, JAX and the tests takes longer than most tests that find a fault. A fault in a
function is put into the function where it was imported (`Warm`); one in what runs at import is
imported by a process that has everything but jadam and the tests (`Cold`). JAX starts no backend
before a fork: its threads would be lost. What a test starts as a process has no fault in it.
"""

import contextlib
import functools
import gc
import importlib
import inspect
import json
import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, Protocol

import pytest

OTHERS = [
    *("jax", "jax.experimental.pallas", "optax", "flax.linen", "flax.nnx", "orbax.checkpoint"),
    *("equinox", "beartype", "jaxtyping", "hypothesis.extra.numpy", "scipy.stats", "safetensors"),
]
OPTIONS = [
    *("-q", "-x", "--no-header", "-p", "no:cacheprovider"),
    # A second pytest in a process finds its plugins imported.
    *("-W", "ignore::pytest.PytestAssertRewriteWarning"),
]
STOPPED = {signal.SIGKILL, signal.SIGXCPU, signal.SIGALRM}


@dataclass(frozen=True)
class Job:
    """A module of the package, its text, its text with a fault, and tests that run its lines."""

    key: int
    module: str
    was: str
    now: str
    tests: dict[str, float]  # the seconds that each takes


class Place(Protocol):
    """Where a process is forked, and how a fault comes into it."""

    def put(self, job: Job) -> None: ...


class Cold:
    """Neither jadam nor a test is imported."""

    def __init__(self, tree: Path) -> None:
        self.tree = tree
        for name in OTHERS:
            importlib.import_module(name)
        gc.freeze()

    def put(self, job: Job) -> None:
        """The import system reads the fault's text, and no compiled file of the right one."""
        path, get_data = str(self.tree / job.module), SourceFileLoader.get_data
        path_stats = SourceFileLoader.path_stats
        sys.dont_write_bytecode = True
        SourceFileLoader.get_data = lambda self, name: (  # pyright: ignore
            job.now.encode() if name == path else get_data(self, name)
        )
        SourceFileLoader.path_stats = lambda self, name: (  # pyright: ignore
            {"mtime": 0, "size": 0} if name == path else path_stats(self, name)
        )


class Warm:
    """jadam and the tests are imported, but for those that make arrays while they are."""

    def __init__(self, tree: Path, files: Iterable[str]) -> None:
        self.tree = tree
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
            if code := pytest.main([*OPTIONS, "--collect-only", *files]):
                raise SystemExit(f"the tests cannot be imported: pytest ends with {code}")
        import jax._src.xla_bridge as bridge

        if bridge._backends:
            raise SystemExit("a test makes an array where it is imported: tests.toml, `late`")
        self.functions: dict[tuple[object, ...], list[FunctionType]] = {}
        for found in gc.get_objects():
            if type(found) is FunctionType:
                self.functions.setdefault(identity(found.__code__), []).append(found)
        gc.freeze()

    def put(self, job: Job) -> None:
        """The functions get the fault's code."""
        name = job.module.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        loader, path = sys.modules[name].__spec__.loader, str(self.tree / job.module)  # pyright: ignore
        was, now = (loader.source_to_code(x.encode(), path) for x in (job.was, job.now))  # pyright: ignore
        for old, new in changed(was, now) or []:
            for function in self.functions[identity(old)]:
                function.__code__ = new


def identity(code: CodeType) -> tuple[object, ...]:
    return code.co_filename, code.co_qualname, code.co_firstlineno


def is_at_import(was: str, now: str) -> bool:
    """Whether what a fault changes runs when the module is imported."""
    return changed(compiled(was), compiled(now)) is None


@functools.lru_cache(64)
def compiled(code: str) -> CodeType:
    return compile(code, "", "exec")


def changed(was: CodeType, now: CodeType) -> list[tuple[CodeType, CodeType]] | None:
    """The outermost functions whose code differs, or None if the body around them does."""
    if shape(was) == shape(now):
        return []
    if was.co_flags & inspect.CO_OPTIMIZED:
        return [(was, now)]
    inner = [[x for x in code.co_consts if isinstance(x, CodeType)] for code in (was, now)]
    if shape(was, inner=False) != shape(now, inner=False) or len(inner[0]) != len(inner[1]):
        return None
    found: list[tuple[CodeType, CodeType]] = []
    for pair in zip(*inner, strict=True):
        if (changes := changed(*pair)) is None:
            return None
        found += changes
    return found


def shape(code: CodeType, inner: bool = True) -> tuple[Any, ...]:
    """What code does, without where it stands."""
    constants = tuple(
        (shape(x) if inner else None) if isinstance(x, CodeType) else (type(x), repr(x))
        for x in code.co_consts
    )
    names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    return code.co_code, code.co_exceptiontable, constants, *names


class Chosen:
    """A plugin of pytest: some tests, in the order given, until one fails or time is over."""

    def __init__(self, tests: list[str], budget: float) -> None:
        self.rank = {test: rank for rank, test in enumerate(tests)}
        self.budget, self.ran = budget, 0
        self.failed: str | None = None
        self.session: pytest.Session | None = None

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, session: pytest.Session, items: list[Any]) -> None:
        import jax

        # What a fault makes JAX compile is of no use to anyone else.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
        self.session = session
        items[:] = [x for x in items if x.nodeid in self.rank]
        items.sort(key=lambda x: self.rank[x.nodeid])

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed = report.nodeid

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed = report.nodeid

    def pytest_runtest_logfinish(self) -> None:
        self.ran += 1
        if time.process_time() > self.budget and self.session is not None:
            self.session.shouldstop = "time is over"


def tested(tests: list[str], budget: float) -> dict[str, object]:
    """What the tests say here. The first few come alone: each file of tests takes time to read."""
    ran = 0
    for some in (tests[:6], tests[6:40], tests[40:]):
        if not some or time.process_time() > budget:
            continue
        chosen = Chosen(some, budget)
        files = list(dict.fromkeys(test.split("::")[0] for test in some))
        # Once imported, the package has its annotations checked or not.
        again = ["--jaxtyping-packages="] if "jadam" in sys.modules else []
        code = pytest.main([*OPTIONS, *again, *files], plugins=[chosen])
        ran += chosen.ran
        failed = chosen.failed or (f"exit code {code}" if code in (3, 4) else None)
        if failed is None and not chosen.ran:
            raise RuntimeError(f"no test ran: {some}")
        if failed is not None:
            return {"found": True, "by": failed, "ran": ran}
    return {"found": False, "by": None, "ran": ran, "of": len(tests)}


def child(place: Place, job: Job, tests: list[str], budget: float, pipe: int) -> None:
    """In the forked process."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    seconds = int(2 * budget + 60)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    signal.alarm(10 * seconds)
    try:
        place.put(job)
        outcome = tested(tests, budget)
    except BaseException as error:
        outcome = {"error": repr(error)}
    outcome["seconds"] = round(time.process_time(), 1)
    os.write(pipe, json.dumps(outcome).encode())
    os._exit(0)


def ended(status: int, written: str) -> dict[str, Any]:
    """A forked process's outcome, which may have died of the fault."""
    if written:
        return json.loads(written)
    ending = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    why = "it did not end" if ending in STOPPED else f"signal {ending}, status {status}"
    return {"found": True, "by": why}


def ordered(tests: dict[str, float], found: Counter[str]) -> list[str]:
    """Those that found faults of this module by what they take for it, then each file's fastest."""
    seen: Counter[str] = Counter()
    rank: dict[str, int] = {}
    for test in sorted(tests, key=tests.__getitem__):
        file = test.split("::")[0]
        rank[test] = seen[file]
        seen[file] += 1
    return sorted(tests, key=lambda x: (-found[x] / (tests[x] + 0.2), rank[x], tests[x]))


def run(
    place: Place,
    jobs: list[Job],
    kills: dict[str, Counter[str]],
    budget: float,
    processes: int,
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Each job's outcome, as they come."""
    running: dict[int, tuple[Job, int]] = {}
    waiting = jobs[::-1]
    while waiting or running:
        if waiting and len(running) < processes:
            job = waiting.pop()
            tests, (reading, writing) = ordered(job.tests, kills[job.module]), os.pipe()
            if (process := os.fork()) == 0:
                child(place, job, tests, budget, writing)
            os.close(writing)
            running[process] = job, reading
            continue
        process, status = os.wait()
        job, reading = running.pop(process)
        with os.fdopen(reading) as pipe:
            outcome = ended(status, pipe.read())
        if outcome.get("found"):
            kills[job.module][outcome["by"]] += 1
        yield job, outcome


def main() -> None:
    """Reads what to do from the standard input, a line each; writes outcomes as they come."""
    setup, *jobs = map(json.loads, sys.stdin)
    out = os.fdopen(os.dup(1), "w")
    place = Warm(Path.cwd(), setup["files"]) if setup["warm"] else Cold(Path.cwd())
    kills = {module: Counter(found) for module, found in setup["kills"].items()}
    jobs = [Job(**x) for x in jobs]
    for job, outcome in run(place, jobs, kills, setup["budget"], setup["processes"]):
        print(json.dumps({"key": job.key} | outcome), file=out, flush=True)


if __name__ == "__main__":
    main()
