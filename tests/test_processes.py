"""Several processes: equal to one, an end when one of them dies, and a restart with fewer.

Each is `tests/worker.py` with one CPU device, on loopback. `-m soak` runs the longer forms.
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from tests.worker import Training

ROOT = Path(__file__).parent.parent
# Seconds for processes to end by themselves. Generous, since other work on the machine makes four
# Pythons slow to start; a test that passes does not wait for it.
DEADLINE = 300
# The same for the others once one was killed: a test's bound, not a measurement.
BOUND = 120
# A sum over devices differs by rounding, and parameters then by 3e-8 after six steps (measured).
# But an 8-bit code goes to its neighbour with it, 3e-4. A wrong sum or a lost state is a wrong
# step: 1e-3.
TOLERANCE = {"float32": 1e-6, "8-bit": 5e-4}


@dataclass(frozen=True)
class Worker:
    """A process and its output."""

    process: subprocess.Popen[bytes]
    log: Path

    def code(self, within: float = DEADLINE) -> int:
        return self.process.wait(within)


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., list[Worker]]]:
    """Starts the processes of a training. None outlives the test."""
    started: list[Worker] = []
    # One device each: the flags of conftest.py are not for them.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["JAX_PLATFORMS"] = "cpu"

    def start(processes: int, *options: str) -> list[Worker]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        for process in range(processes):
            log = tmp_path / f"{len(started)}.log"
            command = [sys.executable, "-m", "tests.worker", *options, f"--port={port}"]
            command += [f"--process={process}", f"--processes={processes}"]
            with log.open("wb") as output:
                popen = subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
                )
            started.append(Worker(popen, log))
        return started[-processes:]

    try:
        yield start
    finally:
        for worker in started:
            worker.process.kill()
            worker.process.wait()


def alone(optimizer: str, checkpoints: Path | None = None) -> Training:
    """The same training with one device of this process."""
    return Training(Mesh(np.array(jax.devices()[:1]), "data"), optimizer, checkpoints)


def assert_equal_to_one_process(checkpoints: Path, counts: list[int], optimizer: str) -> None:
    """The parameters in the checkpoints are those of one process."""
    training, saved = alone(optimizer), alone(optimizer, checkpoints)
    for count in counts:
        while training.count < count:
            training.step()
        saved.restore(count)
        for x, y in zip(saved.params, training.params, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=TOLERANCE[optimizer])


@pytest.mark.parametrize(
    ("optimizer", "processes", "dies", "steps"),
    [
        ("float32", (2, 1), 1, (5, 6)),
        pytest.param("float32", (4, 2), 3, (5, 6), marks=pytest.mark.soak),
        pytest.param("8-bit", (4, 2), 1, (5, 8), marks=pytest.mark.soak),
        pytest.param("8-bit", (2, 4), 1, (5, 8), marks=pytest.mark.soak),
        pytest.param("float32", (4, 1), 0, (7, 10), marks=pytest.mark.soak),  # the coordinator
    ],
)
def test_one_of_several_processes_is_killed_and_others_go_on(
    launch, tmp_path, optimizer, processes, dies, steps
):
    """They train as one does; all end when one dies; others take up their last checkpoint.

    SIGKILL leaves no time to tell the others, which are waiting for its gradients.
    """
    (many, few), (last, end) = processes, steps
    checkpoints = tmp_path / "checkpoints"
    options = (f"--checkpoints={checkpoints}", f"--optimizer={optimizer}")
    workers = launch(many, *options, "--steps=1000", f"--dies={dies}", f"--after={last}")
    killed = workers.pop(dies)
    assert killed.code() == -signal.SIGKILL, killed.log.read_text()
    for survivor in workers:
        assert survivor.code(BOUND) != 0
        assert f"step {last + 2}" not in survivor.log.read_text()

    for worker in launch(few, *options, f"--steps={end}"):
        assert worker.code() == 0, worker.log.read_text()
        assert f"step {last - 1}\n" not in worker.log.read_text()
        assert f"step {last}\n" in worker.log.read_text()
    assert_equal_to_one_process(checkpoints, [last - 1, end], optimizer)
