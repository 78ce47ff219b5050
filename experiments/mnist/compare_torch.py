"""Times the main job against PyTorch: `python -m experiments.mnist.compare_torch`."""

import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from experiments.common.mnist.dataset import load
from experiments.common.report import processor, update_readme, write_json

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Config:
    """Trains the CNN with jadam and with PyTorch in turn, and writes what each epoch took."""

    rounds: int = 3
    """Runs of each; the first of a round changes."""
    epochs: int = 2
    """Epochs of each run."""
    batch_size: int = 32
    """Images in a step, for both."""
    torch_python: Path = Path(sys.executable)
    """A Python that has torch."""
    out: Path = HERE / "results" / "compare_torch.json"
    """The JSON file for the numbers."""


def markdown(report: dict) -> str:
    """The result as the README shows it."""
    versions = report["versions"]
    names = {
        "jadam": f"jadam {versions['jadam']} (jax {versions['jax']})",
        "torch": f"PyTorch {versions['torch']}, fused Adam",
    }
    lines = ["| | epoch, s: median (all) | test accuracy |", "|---|---|---|"]
    for name, result in report["summary"].items():
        seconds, accuracy = result["epoch_seconds"], result["test_accuracy"]
        spread = f"{seconds['median']:.1f} ({seconds['min']:.1f} to {seconds['max']:.1f})"
        accuracies = ", ".join(f"{a:.2%}" for a in accuracy)
        lines.append(f"| {names[name]} | {spread} | {accuracies} |")
    return "\n".join(lines)


def main(config: Config) -> None:
    """Each run is a process of its own: the two thread pools would disturb each other."""
    runs: dict[str, list[dict]] = {"jadam": [], "torch": []}
    with tempfile.TemporaryDirectory() as folder:
        arrays, out = Path(folder, "mnist.npz"), Path(folder, "result.json")
        np.savez(arrays, **load()._asdict())
        for number in range(config.rounds):
            seed, epochs, batch = str(number), str(config.epochs), str(config.batch_size)
            # All images, as the other trains on.
            options = ["--validation", "0", "--epochs", epochs, "--batch-size", batch]
            options += ["--seed", seed, "--out", out.parent]
            script = [arrays, epochs, batch, seed, out]
            commands = {
                "jadam": [sys.executable, "-m", "experiments.mnist", *options],
                "torch": [config.torch_python, HERE / "torch_cnn.py", *script],
            }
            for name in sorted(commands, reverse=number % 2 == 1):
                load_average = os.getloadavg()[0]  # above the cores: disturbed by others
                subprocess.run(commands[name], cwd=HERE.parents[1], check=True)
                runs[name].append(json.loads(out.read_text()) | {"load_average": load_average})

    summary = {}
    for name, results in runs.items():
        seconds = [epoch["seconds"] for result in results for epoch in result["epochs"]]
        summary[name] = {
            "epoch_seconds": {
                "median": float(np.median(seconds)),
                "min": min(seconds),
                "max": max(seconds),
            },
            "test_accuracy": [result["test"]["accuracy"] for result in results],
        }
        print(name, summary[name])
    report = {
        "command": shlex.join([Path(sys.executable).name, "-m", __spec__.name, *sys.argv[1:]]),
        "machine": {
            "cpu": processor(),
            "cores": os.cpu_count(),
            "platform": platform.platform(),
        },
        "versions": runs["jadam"][0]["versions"] | runs["torch"][0]["versions"],
        "summary": summary,
        "runs": runs,
    }
    write_json(config.out, report)
    update_readme("torch", markdown(report), HERE / "README.md")


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m experiments.mnist.compare_torch"))
