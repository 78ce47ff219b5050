"""What the command does: the runs, the pictures, the figures, the README's tables."""

import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich.progress import track

import jadam
from experiments.common.objectives import FUNCTIONS, Point
from experiments.common.picture import write
from experiments.common.report import provenance, table, update_readme, write_json

from .animation import animate
from .choose import RATES, STARTS, Choice, choose
from .descend import OPTIMIZERS, TARGET, Runs, descend, outcomes
from .pictures import adam_figure, comparison_figure, losses_figure, planes_figure, readable
from .planes import LEARNING_RATES, PLANES, Planes, scan_planes
from .problem import Problem, problem

HERE = Path(__file__).parent
RESULTS = HERE / "results"
README = HERE / "README.md"
RUNS = HERE.parents[1] / "runs" / "trajectories"
MOST_STEPS, MOST_COMPARED = 10_000, 3000  # all paths of an optimizer are in memory at once


@dataclass(frozen=True)
class Config:
    """Draws how Adam and eleven other optimizers descend functions of two variables."""

    function: Literal["all", *FUNCTIONS] = "all"
    """What to descend."""
    start: Point | None = None
    """x and y where every run begins. Default: a point for each function."""
    learning_rate: float = 0.1
    """Adam's in its own pictures. In the comparison each optimizer has the best of a grid."""
    steps: int = 200
    """Of Adam in its own pictures."""
    compare_steps: int = 1000
    """Of each run in the comparison and in the planes of hyperparameters."""
    quick: bool = False
    """Adam's own pictures alone, in some seconds."""
    out: Path = RUNS
    """The folder for pictures and figures."""

    def __post_init__(self) -> None:
        numbers = self.start is None or all(math.isfinite(x) for x in self.start)
        checks = {
            "function": (
                self.function in ("all", *FUNCTIONS),
                f"all or one of {', '.join(FUNCTIONS)}",
                self.function,
            ),
            "start": (numbers, "two finite numbers", self.start),
            "learning-rate": (
                1e-37 <= self.learning_rate <= 1e38,
                "a number of float32 above 0",
                self.learning_rate,
            ),
            "steps": (1 <= self.steps <= MOST_STEPS, f"1 to {MOST_STEPS}", self.steps),
            "compare-steps": (
                1 <= self.compare_steps <= MOST_COMPARED,
                f"1 to {MOST_COMPARED}",
                self.compare_steps,
            ),
            "out": (
                self.out.is_dir() or not self.out.exists(),
                "a folder",
                f"the file {self.out}",
            ),
        }
        for name, (right, expected, got) in checks.items():
            if not right:
                raise ValueError(f"--{name}: expected {expected}, got {got}")

    @property
    def problems(self) -> list[Problem]:
        names = FUNCTIONS if self.function == "all" else [self.function]
        return [problem(name, self.start) for name in names]


def adam_runs(problems: Sequence[Problem], learning_rate: float, steps: int) -> Runs:
    """Adam's runs [problems, steps+1] with one learning rate."""
    functions = np.array([problem.index for problem in problems])
    starts = np.array([problem.start for problem in problems], np.float32)
    rate = {"learning_rate": np.array([learning_rate], np.float32)}
    runs = jax.device_get(descend(jadam.adam, steps, functions, starts, rate))
    return Runs(runs.points[:, 0], runs.losses[:, 0])


def around(problem: Problem, count: int = 12) -> list[Problem]:
    """The problem from its start and from others on the circle around 0, in a view of them all."""
    radius = float(np.hypot(*problem.start))
    first = math.atan2(*reversed(problem.start))
    reach = 1.1 * radius or 1.0
    angles = first + 2 * np.pi * np.arange(count) / count
    return [
        Problem(problem.name, (radius * math.cos(a), radius * math.sin(a)), ((-reach, reach),) * 2)
        for a in angles
    ]


def finite(x: float) -> float | None:
    """A number for JSON, which has none for infinities."""
    return float(x) if math.isfinite(x) else None


def number(x: float | None, form: str) -> str:
    return "not finite" if x is None else format(x, form)


def end(runs: Runs) -> dict[str, Any]:
    """Of one run the figures."""
    loss, arrived = outcomes(runs.losses)
    return {
        "point": [finite(x) for x in runs.points[-1]],
        "loss": finite(loss),
        "steps_to_target": int(arrived) if arrived < len(runs.losses) else None,
    }


def choice_figures(choice: Choice) -> dict[str, Any]:
    """Of an optimizer on a function."""
    diverged = RATES[~np.isfinite(choice.last_losses)]
    return {
        "learning_rate": choice.learning_rate,
        **end(choice.runs),
        "mean_steps": choice.mean_steps,
        "starts_arrived": choice.arrived,
        "diverges_from": float(diverged[0]) if len(diverged) else None,
    }


def plane_figures(planes: Planes, i: int) -> dict[str, Any]:
    """Of the settings on a function, how many arrived, and the b with which most rates did."""
    figures = {}
    for name, complements in PLANES.items():
        losses = getattr(planes, name)[i]
        arrived = losses < TARGET
        widest = np.argmax(arrived.sum(1))
        figures[name] = {
            "settings": losses.size,
            "arrived": int(arrived.sum()),
            "not_finite": int(np.sum(~np.isfinite(losses))),
            f"widest_{name}": float(1 - complements[widest]),
            "arrived_there": int(arrived[widest].sum()),
        }
    return figures


def markdown(results: Mapping[str, Any]) -> dict[str, str]:
    """The README's tables, by the names of their markers."""
    functions = results["functions"].values()

    def steps_to_target(found: Mapping[str, Any]) -> str:
        steps = found["steps_to_target"]
        return "not yet" if steps is None else str(steps)

    def cell(found: Mapping[str, Any]) -> str:
        all_arrived = found["starts_arrived"] == STARTS
        some = f"{found['starts_arrived']} of {STARTS}" if found["starts_arrived"] else "none"
        steps = f"**{found['mean_steps']:.0f}**" if all_arrived else some
        return f"{steps} ({readable(found['learning_rate'])})"

    def share(found: Mapping[str, Any], name: str) -> str:
        plane = found["planes"][name]
        there = (
            f"{plane['arrived_there']} of {len(LEARNING_RATES)} at {plane[f'widest_{name}']:.4g}"
        )
        return f"{plane['arrived'] / plane['settings']:.0%} of {plane['settings']:,}; {there}"

    lost = {
        name
        for found in functions
        for name, choice in found["optimizers"].items()
        if choice["diverges_from"] is not None
    }
    after = f"Adam after {results['steps']} steps"
    titles = [found["title"] for found in functions]
    return {
        "adam": table(
            ["function", "f(x, y)", "minima", "start", after, "loss", f"steps to {TARGET:g}"],
            [
                [
                    found["title"],
                    found["formula"],
                    "; ".join(f"({x:.4g}, {y:.4g})" for x, y in found["minima"]),
                    "({:g}, {:g})".format(*found["start"]),
                    "({}, {})".format(*(number(x, ".4f") for x in found["adam"]["point"])),
                    number(found["adam"]["loss"], ".1e"),
                    steps_to_target(found["adam"]),
                ]
                for found in functions
            ],
        ),
        "comparison": table(
            ["optimizer", *titles],
            [
                [name, *(cell(found["optimizers"][name]) for found in functions)]
                for name in OPTIMIZERS
            ],
        ),
        "diverging": (
            f"No longer finite at some rate on some function: "
            f"{', '.join(name for name in OPTIMIZERS if name in lost) or 'none'}. Finite at every "
            f"rate, up to {RATES[-1]:g}: "
            f"{', '.join(name for name in OPTIMIZERS if name not in lost) or 'none'}."
        ),
        "planes": table(
            ["function", *(f"learning rate with {name}" for name in PLANES)],
            [[found["title"], *(share(found, name) for name in PLANES)] for found in functions],
        ),
    }


def draw_adam(config: Config, adam: Runs) -> None:
    """Adam's own pictures."""
    one_each = [Runs(*(x[None] for x in run)) for run in zip(*adam, strict=True)]
    write(adam_figure(config.problems, one_each, config.learning_rate), config.out / "adam")
    for each in config.problems:
        if each.name == "sphere":
            ring = around(each)
            runs = adam_runs(ring, config.learning_rate, config.steps)
            write(adam_figure(ring[:1], [runs], config.learning_rate), config.out / "sphere")


def main(config: Config) -> dict[str, Any] | None:
    """Runs, draws and writes everything; returns what is in the JSON file, if there is one."""
    problems, out = config.problems, config.out
    adam = adam_runs(problems, config.learning_rate, config.steps)
    draw_adam(config, adam)
    if config.quick:
        print(f"pictures are in {out}")
        return None
    choices = {
        name: choose(optimizer, problems, config.compare_steps)
        for name, optimizer in track(OPTIMIZERS.items(), "comparison", transient=True)
    }
    planes = scan_planes(problems, config.compare_steps)

    write(comparison_figure(problems, choices, config.compare_steps), out / "comparison")
    write(losses_figure(problems, choices, config.compare_steps), out / "losses")
    write(planes_figure(problems, planes, config.compare_steps), out / "planes")
    animate(out / "animation.gif", problems, choices, config.compare_steps)

    results = {
        **provenance(shlex.join(["python", "-m", "experiments.trajectories", *sys.argv[1:]])),
        "target": TARGET,
        "learning_rate": config.learning_rate,
        "steps": config.steps,
        "compare_steps": config.compare_steps,
        "rates": [float(rate) for rate in RATES],
        "starts": STARTS,
        "functions": {
            each.name: {
                "title": each.function.title,
                "formula": each.function.formula,
                "minima": each.function.minima,
                "start": each.start,
                "adam": end(Runs(*run)),
                "optimizers": {name: choice_figures(choices[name][i]) for name in choices},
                "planes": plane_figures(planes, i),
            }
            for i, (each, *run) in enumerate(zip(problems, *adam, strict=True))
        },
    }
    write_json(out / "trajectories.json", results)
    blocks = markdown(results)
    if out.resolve() == RESULTS:
        for name, block in blocks.items():
            update_readme(name, block, README)
    print("\n\n".join([*blocks.values(), f"pictures and figures are in {out}"]))
    return results
