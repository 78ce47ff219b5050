"""Runs that a killed program goes on with: one file for each (experiment, setting, seed)."""

import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.common.report import provenance, write_json

from .settings import SETTINGS

RUNS = Path(__file__).parents[2] / "runs" / "lowmem"


Run = Callable[[str, int], dict[str, Any]]
"""Trains with a setting and a seed: the final figures and the curve."""


@dataclass(frozen=True)
class Comparison:
    """What every comparison of the settings is asked for; its own options follow."""

    settings: tuple[str, ...] = tuple(SETTINGS)
    """Rows of the table to run."""
    seeds: int = 3
    """Of parameters and of the data's order: 0, 1, ..."""
    folder: Path = RUNS
    """Where finished runs are."""

    def run_all(self, experiment: str, run: Run, guess: float, **origin: Any) -> None:
        """Every run that is not there yet; `origin` says on what data, and `guess` is as below."""
        config = asdict(self) | origin
        for name in ("settings", "seeds", "folder"):  # they choose runs, and change none
            del config[name]
        run_all(experiment, self.settings, self.seeds, self.folder, config, run, guess)


def path_of(folder: Path, experiment: str, setting: str, seed: int) -> Path:
    """Where a finished run is."""
    name = "".join(c if c.isalnum() else "-" for c in setting)
    return folder / experiment / f"{name}.{seed}.json"


def finished(folder: Path, experiment: str, setting: str, seed: int) -> dict[str, Any] | None:
    """A run's file, if there is one."""
    path = path_of(folder, experiment, setting, seed)
    return json.loads(path.read_text()) if path.exists() else None


def run_all(
    experiment: str,
    settings: Sequence[str],
    seeds: int,
    folder: Path,
    config: dict[str, Any],
    run: Run,
    guess: float,
) -> None:
    """Runs what is not there yet with this config, seed by seed; `guess` is in seconds a run.

    Raises:
        ValueError: there is no such setting.
    """
    if unknown := set(settings) - SETTINGS.keys():
        raise ValueError(f"--settings: expected some of {list(SETTINGS)}, got {sorted(unknown)}")
    todo, seconds = [], []
    for seed in range(seeds):
        for setting in settings:
            if not SETTINGS[setting].is_installed:
                if seed == 0:
                    print(f"left out: {setting}, {SETTINGS[setting].package} is not installed")
                continue
            done = finished(folder, experiment, setting, seed)
            if done is not None and done["config"] == config:
                seconds.append(done["seconds"])
            else:
                todo.append((setting, seed))
    print(f"{experiment}: {len(seconds)} runs are there, {len(todo)} to do")
    origin = provenance(shlex.join(["python", "-m", "experiments.lowmem", *sys.argv[1:]]))
    for i, (setting, seed) in enumerate(todo):
        left = (len(todo) - i) * (statistics.median(seconds) if seconds else guess)
        print(f"{i + 1}/{len(todo)} {setting}, seed {seed}; about {left / 60:.0f} min left")
        clock = time.perf_counter()
        result = run(setting, seed)
        seconds.append(time.perf_counter() - clock)
        print(f"  {seconds[-1]:.0f} s", {k: round(v, 5) for k, v in result["final"].items()})
        content = {
            "experiment": experiment,
            "setting": setting,
            "seed": seed,
            "config": config,
            **result,
            "seconds": seconds[-1],
            "origin": origin,
        }
        write_json(path_of(folder, experiment, setting, seed), content)
