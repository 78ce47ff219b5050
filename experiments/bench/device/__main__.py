"""All that has to be known on a GPU, in one command of at most 6 minutes.

    python -m experiments.bench.device                  # on the device, from the repository's root
    python -m experiments.bench.device --tables         # the README's tables from the JSON
    python -m experiments.bench.device --tiny --out F   # a rehearsal on a CPU, in a minute

It runs from the source tree. The machine needs Python 3.11 or later, jax with CUDA, optax, flax,
jaxtyping and rich, PyTorch for its optimizers, and jadam's library beside the sources:

    cmake -S jadam/_kernels/native -B build/k -DCMAKE_BUILD_TYPE=Release
    cmake --build build/k && cp build/k/_kernel.so jadam/_kernel.so

Peers take part where they are installed: flashoptim-jax, flashoptim, bitsandbytes, torchao, whose
wheels need nothing more (`pip install --no-deps`). Without git, `--commit` says what is measured.

Four parts, in this order: `numbers` beside XLA's form and NumPy; `speed`, and what a first step
takes; `memory` at the peak; a `training`. Each runs in processes of its own, JAX and PyTorch never
in one, and each row that a process says is written to device-PART.json at once: what a stop, a
crash or the end of the time leaves is what was found until then.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from experiments.bench.device import programs, tables
from experiments.bench.device.rows import ABOUT, Order, heard
from experiments.bench.device.training import SETTINGS
from experiments.bench.publish import README, RESULTS
from experiments.common.report import update_readme, write_json

ROOT = Path(__file__).parents[3]
MINUTES = 6.0
"""For all parts together, if nothing else is said; the limits of the processes go with it."""
GRACE_SECONDS = 5.0
"""After the end of its time a process is killed."""


class Process(NamedTuple):
    """A process of a part.

    Attributes:
        module: of this package.
        function: of the module, where it has several.
        limit: seconds that it may take, of MINUTES in all.
        names: what it does.
        needs: a module without which it is not started.
        rehearsed: whether `--tiny` has it: of several that differ in a name only, one.
    """

    module: str
    function: str
    limit: float
    names: tuple[str, ...] = ()
    needs: str = "jax"
    rehearsed: bool = True

    def __str__(self) -> str:
        return " ".join(filter(None, (self.module, self.function, *self.names)))


PARTS: dict[str, tuple[Process, ...]] = {
    "numbers": (Process("numbers", "", 60),),
    "speed": (Process("in_jax", "speed", 110), Process("in_torch", "speed", 45, needs="torch")),
    "memory": (
        *(
            Process("in_jax", "memory", 30, (name,), rehearsed=name == programs.SMALLEST)
            for name in programs.MEMORY
        ),
        Process("in_torch", "memory", 30, needs="torch"),
    ),
    "training": tuple(Process("training", "", 90, (name,)) for name in SETTINGS),
}


class Part:
    """What is known of a part, in a file that is always up to date."""

    def __init__(self, name: str, out: Path, about: dict[str, Any], add: bool) -> None:
        self.path = out / f"device-{name}.json"
        self.about, self.rows, self.versions = about, {}, {}
        self._lock = threading.Lock()
        if add and self.path.exists():
            known = json.loads(self.path.read_text())
            if known.get("driver") != about["driver"]:
                raise SystemExit(f"{self.path} is of another device or driver: {known['driver']}")
            self.rows, self.versions = known["rows"], known["versions"]
            commits = dict.fromkeys((known.get("commit"), about.get("commit")))
            self.about = {**about, "commit": ", ".join(filter(None, commits))}

    def keep(self, key: str, row: dict[str, Any]) -> None:
        """Keeps a row, in the file too."""
        with self._lock:
            if key == ABOUT:
                # Of a peer that is not measured again, the one that was there.
                versions = {**self.versions, **row["versions"]}
                self.about = {**row, **self.about, "versions": versions}
            else:
                self.rows[key] = row
                print(f"{key}: {json.dumps(row)[:160]}", flush=True)
            write_json(self.path, {**self.about, "rows": self.rows})


def run(process: Process, part: Part, order: Order) -> None:
    """Starts a process and keeps its rows until it ends or its time does."""
    if order.left <= 0 or importlib.util.find_spec(process.needs) is None:
        reason = "no time was left" if order.left <= 0 else f"{process.needs} is not installed"
        part.keep(f"process {process}", {"missing": reason})
        return
    module = f"experiments.bench.device.{process.module}"
    function = (process.function,) if process.function else ()
    command = [sys.executable, "-m", module, *function, json.dumps(order._asdict())]
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if process.module == "training":
        # The second setting finds the kernels that XLA chose for the first one's products.
        environment["JAX_COMPILATION_CACHE_DIR"] = order.cache
    started = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    timer = threading.Timer(order.left + GRACE_SECONDS, started.kill)
    timer.start()
    try:
        assert started.stdout is not None
        for line in started.stdout:
            row = heard(line)
            if row is None:
                print(line, end="", flush=True)
            else:
                part.keep(*row)
        if (code := started.wait()) != 0:
            part.keep(f"process {process}", {"failed": f"it ended with {code}"})
    finally:
        timer.cancel()
        started.kill()


def run_part(name: str, given: argparse.Namespace, until: float, cache: str) -> None:
    """All processes of a part: those that are not timed at once, the others one by one."""
    about = {"driver": driver(), **({"commit": given.commit} if given.commit else {})}
    part = Part(name, given.out, about, given.add)

    def one(process: Process, share: int) -> None:
        left = (until - time.time()) / share
        limit = min(process.limit * given.minutes / MINUTES, left)
        seconds = 0.5 if given.tiny else given.seconds
        names = process.names or tuple(given.workloads)
        run(process, part, Order(given.tiny, time.time() + limit, seconds, names, cache))

    processes = [
        process
        for process in PARTS[name]
        if process.needs in given.frameworks and (process.rehearsed or not given.tiny)
    ]
    if name == "memory":
        with ThreadPoolExecutor(len(processes)) as pool:
            list(pool.map(lambda process: one(process, 1), processes))
    else:
        for place, process in enumerate(processes):
            one(process, len(processes) - place if name == "training" else 1)


def driver() -> str | None:
    """The GPU, its driver and its memory, as nvidia-smi has them."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or None


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line: the device may lack what the other commands read theirs with."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.bench.device", description="Measures jadam on a GPU."
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--frameworks", nargs="+", default=["jax", "torch"], metavar="NAME")
    parser.add_argument(
        "--workloads", nargs="+", default=[], metavar="NAME", help="of the speed, all if none"
    )
    parser.add_argument(
        "--add", action="store_true", help="keep the rows of the JSON that are not measured again"
    )
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder for the JSON")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts together")
    parser.add_argument("--seconds", type=float, default=45.0, help="of each training")
    parser.add_argument("--commit", help="of the source tree, where there is no git")
    parser.add_argument("--tables", action="store_true", help="only the tables, from the JSON")
    return parser.parse_args(given)


def main(given: argparse.Namespace) -> None:
    """Measure, write, and print the tables; those of the README if the JSON is its."""
    until = time.time() + 60 * given.minutes
    if not given.tables:
        with tempfile.TemporaryDirectory() as cache:
            for name in given.parts:
                started = time.time()
                run_part(name, given, until, cache)
                print(f"{name}: {time.time() - started:.0f} s", flush=True)
    text = tables.markdown(given.out)
    print(text)
    if given.out == RESULTS and not given.tiny:
        update_readme("device", text, README)


if __name__ == "__main__":
    main(arguments())
