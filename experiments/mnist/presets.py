"""What the presets reach: `python -m experiments.mnist.presets`.

Each seed is a run of its own in runs/presets/PRESET-SEED: one that is finished is taken as it is,
one that was interrupted goes on.
"""

import json
import math
import shlex
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from scipy import stats

from experiments.common.report import provenance, table, update_readme, write_json

from .config import PRESETS, RUNS, Config

HERE = Path(__file__).parent
SEEDS = {"mlp": (0, 1, 2, 3, 4), "cnn": (0, 1, 2), "best": (0,)}
PLACES = ("seed", "out", "data_dir", "resume")
PICTURES = ("curves", "mistakes", "confusion")


@dataclass(frozen=True)
class Presets:
    """Trains the presets with several seeds, and writes their accuracies down."""

    presets: tuple[str, ...] = tuple(SEEDS)
    """Which of mlp, cnn and best."""
    seeds: tuple[int, ...] = ()
    """The seeds of each; by default 0 to 4 for mlp, 0 to 2 for cnn, 0 for best."""
    collect: bool = False
    """Takes what is finished, and trains nothing."""
    runs: Path = RUNS / "presets"
    """The folder of the runs."""
    out: Path = HERE / "results"
    """The folder for presets.json and the pictures of the first seed of best."""
    readme: Path = HERE / "README.md"
    """Where the table is put between its markers."""

    def __post_init__(self) -> None:
        for preset in self.presets:
            if preset not in SEEDS:
                raise ValueError(f"--presets: expected some of {', '.join(SEEDS)}, got {preset}")


def finished(config: Config) -> dict[str, Any] | None:
    """The numbers of a run that is finished, if it is."""
    path = config.out / "result.json"
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    expected = config.as_json()
    for name in expected.keys() - {"out", "resume"}:
        if result["config"].get(name) != expected[name]:
            raise ValueError(
                f"{path}: made with --{name.replace('_', '-')} {result['config'].get(name)}, the "
                f"preset has {expected[name]}; delete its folder"
            )
    return result


def train(config: Config) -> None:
    """A run in a process of its own, from its last checkpoint if it has one."""
    options = ["--preset", config.preset, "--seed", str(config.seed), "--out", str(config.out)]
    if any((config.out / "checkpoints").glob("[0-9]*")):
        options.append("--resume")
    subprocess.run(
        [sys.executable, "-m", "experiments.mnist", *options], cwd=HERE.parents[1], check=True
    )


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean test accuracy, with the 95% interval of Student's t where there are several seeds."""
    accuracies = [result["test"]["accuracy"] for result in results]
    mean = statistics.mean(accuracies)
    interval = None
    if len(accuracies) > 1:
        error = statistics.stdev(accuracies) / math.sqrt(len(accuracies))
        half = stats.t.ppf(0.975, len(accuracies) - 1) * error
        interval = [mean - half, mean + half]
    return {
        "seeds": [result["config"]["seed"] for result in results],
        "test_accuracy": accuracies,
        "mean": mean,
        "interval_95": interval,
        "validation_accuracy": [r["epochs"][-1]["validation/accuracy"] for r in results],
        "parameters": results[0]["parameters"],
        "epochs": len(results[0]["epochs"]),
        "config": {k: v for k, v in results[0]["config"].items() if k not in PLACES},
        "machine": results[0]["machine"],
        "versions": results[0]["versions"],
    }


def markdown(presets: dict[str, dict[str, Any]]) -> str:
    """The table of the README."""
    rows = []
    for name, found in presets.items():
        interval = "one seed"
        if found["interval_95"]:
            interval = "{:.2%} to {:.2%}".format(*found["interval_95"])
        rows.append(
            [
                f"`--preset {name}`",
                f"{found['parameters']:,}",
                str(found["epochs"]),
                f"{found['mean']:.2%}",
                interval,
                ", ".join(f"{accuracy:.2%}" for accuracy in found["test_accuracy"]),
                f"{statistics.mean(found['validation_accuracy']):.2%}",
            ]
        )
    columns = ("", "parameters", "epochs", "test accuracy", "95% interval", "each seed")
    return table((*columns, "validation"), rows)


def main(asked: Presets) -> None:
    """Trains what is missing, and writes the JSON file, the table and the pictures."""
    found = {}
    for preset in asked.presets:
        results = []
        for seed in asked.seeds or SEEDS[preset]:
            out = asked.runs / f"{preset}-{seed}"
            config = replace(PRESETS[preset], seed=seed, out=out)
            if finished(config) is None and not asked.collect:
                train(config)
            if (result := finished(config)) is not None:
                results.append(result)
        if results:
            found[preset] = summary(results)
            print(f"{preset}: {found[preset]['mean']:.2%} of {found[preset]['test_accuracy']}")
    command = shlex.join(["python", "-m", __spec__.name, *sys.argv[1:]])
    write_json(asked.out / "presets.json", {**provenance(command), "presets": found})
    update_readme("presets", markdown(found), asked.readme)
    if "best" in found:
        run = asked.runs / f"best-{found['best']['seeds'][0]}"
        for name in (f"{picture}.{kind}" for picture in PICTURES for kind in ("png", "svg")):
            shutil.copyfile(run / name, asked.out / name)


if __name__ == "__main__":
    try:
        main(tyro.cli(Presets, prog="python -m experiments.mnist.presets"))
    except ValueError as error:
        sys.exit(f"error: {error}")
