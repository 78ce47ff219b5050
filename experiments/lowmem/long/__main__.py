"""Trains and fine-tunes with each setting, long enough for what is lost to show.

    python -m experiments.lowmem.long                       # two nights on two cores
    python -m experiments.lowmem.long --seeds 8 --together 4 --minutes 6    # on a GPU
    python -m experiments.lowmem.long --tiny --seeds 1      # a rehearsal, in two minutes

Each finished run is a file in `--folder`, so that a stopped command goes on where it was, and all
of them are one file, `--results`, which is written anew after each run. It needs jax, optax, flax,
jaxtyping and rich alone, and flashoptim-jax for the peer's row.
"""

import argparse
import json
import os
import shlex
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from experiments.common.gpt import Shape
from experiments.common.report import provenance, write_json
from experiments.common.text import load
from experiments.lowmem.runs import RUNS, finished, path_of
from experiments.lowmem.settings import REFERENCE

from .training import EVERY, LONG, Config, Done, Program, Task

EXPERIMENT = "long"
RESULTS = Path(__file__).parents[1] / "results" / "long.json"
TINY = Config(
    steps=100,
    warmup=10,
    chunk=50,
    batch_size=4,
    learning_rate=1e-2,
    fine_steps=50,
    shape=Shape(layers=2, width=64, heads=2, context=16),
)


class Runs:
    """The finished runs of one config, in their files."""

    def __init__(self, folder: Path, results: Path, config: dict[str, Any], origin: dict) -> None:
        self.folder, self.results, self.config, self.origin = folder, results, config, origin
        self.failed: dict[str, str] = {}

    def there(self, setting: str, seed: int) -> dict[str, Any] | None:
        """A run that is finished, with this config."""
        done = finished(self.folder, EXPERIMENT, setting, seed)
        return done if done is not None and done["config"] == self.config else None

    def keep(self, setting: str, seed: int, result: dict[str, Any]) -> None:
        """Writes a run's file."""
        content = {"experiment": EXPERIMENT, "setting": setting, "seed": seed}
        content |= {"config": self.config, **result, "origin": self.origin}
        write_json(path_of(self.folder, EXPERIMENT, setting, seed), content)

    def keep_weights(self, seed: int, **weights: PyTree) -> None:
        """Writes the weights with which every setting's fine-tuning starts and is compared."""
        path = path_of(self.folder, EXPERIMENT, REFERENCE, seed).with_suffix(".npz")
        path.parent.mkdir(parents=True, exist_ok=True)
        leaves = {name: jax.tree.leaves(tree) for name, tree in weights.items()}
        np.savez(path, **{f"{k}.{i}": x for k, xs in leaves.items() for i, x in enumerate(xs)})

    def weights(self, seeds: Sequence[int], name: str) -> list[np.ndarray]:
        """The leaves of float32's weights, with a first axis of seeds."""
        paths = [path_of(self.folder, EXPERIMENT, REFERENCE, seed) for seed in seeds]
        if missing := [str(path) for path in paths if not path.exists()]:
            raise ValueError(f"--settings: expected {REFERENCE!r} to have run, found no {missing}")
        files = [np.load(path.with_suffix(".npz")) for path in paths]
        count = sum(key.startswith(f"{name}.") for key in files[0])
        return [np.stack([file[f"{name}.{i}"] for file in files]) for i in range(count)]

    def write(self, seeds: int) -> None:
        """All runs as one file."""
        rows = [
            {key: run[key] for key in run.keys() - {"experiment", "config", "origin"}}
            for setting in LONG
            for seed in range(seeds)
            if (run := self.there(setting, seed)) is not None
        ]
        failed = {"failed": self.failed} if self.failed else {}
        write_json(self.results, {**self.origin, "config": self.config, **failed, "runs": rows})


def points(values: np.ndarray) -> list[float]:
    """A curve of steps, each point the mean of some."""
    return values.reshape(-1, EVERY).mean(1).tolist()


def row(trained: Done, tuned: Done, arrived: np.ndarray, place: int) -> dict[str, Any]:
    """What a seed's training and fine-tuning gave."""
    steps = trained.loss.shape[1]
    chunks = trained.validation.shape[1] - 1
    last = trained.loss[place, -max(1, steps // 10) :]
    return {
        "final": {
            "training loss": float(last.mean()),
            "validation loss": float(trained.validation[place, -1]),
        },
        "curve": {
            "steps": list(range(EVERY, steps + 1, EVERY)),
            "loss": points(trained.loss[place]),
            "moved": points(trained.moved[place]),
            "moved with rest": points(trained.moved_with_rest[place]),
        },
        "validation": {
            "steps": [i * steps // chunks for i in range(chunks + 1)],
            "loss": trained.validation[place].tolist(),
        },
        "fine-tuning": {
            "loss": points(tuned.loss[place]),
            "moved": float(tuned.moved[place].mean()),
            "moved with rest": float(tuned.moved_with_rest[place].mean()),
            "arrived": float(arrived[place]),
            "validation loss": tuned.validation[place].tolist(),
        },
    }


def share_arrived(
    start: Sequence[np.ndarray], reference: Sequence[np.ndarray], tuned: Sequence[np.ndarray]
) -> np.ndarray:
    """How much of float32's way was gone, for each seed: its part along that way."""

    def way(end: Sequence[np.ndarray]) -> np.ndarray:
        """As float64[seeds, parameters]."""
        moves = [np.asarray(b, np.float64) - a for a, b in zip(start, end, strict=True)]
        return np.concatenate([x.reshape(len(x), -1) for x in moves], 1)

    gone, whole = way(tuned), way(reference)
    return (gone * whole).sum(1) / (whole * whole).sum(1)


def run(setting: str, seeds: Sequence[int], program: Program, task: Task, runs: Runs) -> None:
    """A setting's training and fine-tuning for some seeds at once."""
    config = task.config
    clock = time.perf_counter()
    first = task.first_params(seeds)
    params, trained = program.run(first, seeds, 0, config.rates)
    if setting == REFERENCE:
        start = jax.device_get(params)
    else:
        start = jax.tree.unflatten(jax.tree.structure(first), runs.weights(seeds, "trained"))
    params, tuned = program.run(start, seeds, config.steps, config.fine_rates)
    end = jax.device_get(jax.tree.leaves(params))
    if setting == REFERENCE:
        for place, seed in enumerate(seeds):
            one = {"trained": start, "tuned": end}
            runs.keep_weights(seed, **jax.tree.map(lambda x: x[place], one))  # noqa: B023
    reference = end if setting == REFERENCE else runs.weights(seeds, "tuned")
    arrived = share_arrived(jax.tree.leaves(start), reference, end)
    seconds = (time.perf_counter() - clock) / len(seeds)
    for place, seed in enumerate(seeds):
        found = row(trained, tuned, arrived, place)
        runs.keep(setting, seed, {**found, "seconds": seconds, "seeds at once": len(seeds)})


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser("python -m experiments.lowmem.long", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--settings", nargs="+", choices=list(LONG), default=list(LONG))
    parser.add_argument("--seeds", type=int, default=3, help="of parameters and data: 0, 1, ...")
    parser.add_argument(
        "--together", type=int, help="seeds in one program; default: 1 on a CPU, else all"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="then no run is begun")
    parser.add_argument("--steps", type=int, help="of a training, in place of the config's")
    parser.add_argument("--folder", type=Path, default=RUNS, help="where finished runs are")
    parser.add_argument("--results", type=Path, help=f"all of them as one file; {RESULTS.name}")
    parser.add_argument("--commit", help="what is run, where there is no git")
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU trains at once")
    given = parser.parse_args()
    if given.results is None:
        given.results = given.folder / "tiny.json" if given.tiny else RESULTS
    if given.together is None:
        given.together = 1 if jax.default_backend() == "cpu" else given.seeds
    if given.seeds % given.together:
        parser.error(f"--seeds: expected a multiple of {given.together}, got {given.seeds}")
    return given


def main(given: argparse.Namespace) -> None:
    """Every run that is not there yet, the most important ones first."""
    end = time.monotonic() + 60 * given.minutes
    # A GPU's own choice for float32 is a product of 10 bits.
    jax.config.update("jax_default_matmul_precision", "float32")
    text = load(given.folder)
    config = TINY if given.tiny else Config()
    task = Task(replace(config, steps=given.steps or config.steps), text)
    origin = provenance(shlex.join(["python", "-m", "experiments.lowmem.long", *sys.argv[1:]]))
    origin |= {"commit": given.commit} if given.commit else {}
    described = json.loads(json.dumps({**asdict(task.config), "text": text.origin}))
    runs = Runs(given.folder, given.results, described, origin)
    groups = np.arange(given.seeds).reshape(-1, given.together).tolist()
    todo = [
        (setting, seeds)
        for seeds in groups
        for setting in given.settings
        if LONG[setting].is_installed and not all(runs.there(setting, seed) for seed in seeds)
    ]
    print(f"{len(todo)} trainings to do, {given.together} seeds in each", flush=True)
    longest = 0.0
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 4)) as pool:
        programs: dict[str, Future[Program]] = {
            setting: pool.submit(Program, setting, task, given.together)
            for setting in dict.fromkeys(setting for setting, _ in todo)
        }
        for i, (setting, seeds) in enumerate(todo):
            if time.monotonic() + longest > end:
                print(f"the time is up; {len(todo) - i} trainings are left")
                pool.shutdown(wait=False, cancel_futures=True)
                break
            try:
                program = programs[setting].result()
                clock = time.monotonic()
                run(setting, seeds, program, task, runs)
                longest = max(longest, time.monotonic() - clock)
            except Exception as error:  # one that fails takes no other with it
                traceback.print_exc()
                runs.failed[setting] = f"{type(error).__name__}: {error}"[:300]
            runs.write(given.seeds)
            say(setting, seeds, runs)


def say(setting: str, seeds: Sequence[int], runs: Runs) -> None:
    """A line for each run that ended just now."""
    for seed in seeds:
        if (found := runs.there(setting, seed)) is not None:
            losses = {k: round(v, 4) for k, v in found["final"].items()}
            fine = found["fine-tuning"]
            tuned = {k: round(fine[k], 4) for k in ("moved", "moved with rest", "arrived")}
            tuned["validation"] = [round(x, 4) for x in fine["validation loss"]]
            seconds = f"{found['seconds']:.1f} s"
            print(f"{setting}, seed {seed}: {seconds}", losses, tuned, flush=True)


if __name__ == "__main__":
    main(options())
