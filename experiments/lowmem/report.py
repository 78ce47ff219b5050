"""What the finished runs say: means, intervals, paired differences, memory; table and picture."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.progress import track

from experiments.common import palette, picture
from experiments.common.gpt import Shape
from experiments.common.intervals import interval
from experiments.common.report import NUMBERS, provenance, table, update_readme, write_json

from .lm import Lm
from .memory import measure
from .mnist import Mnist
from .runs import RUNS, finished
from .settings import REFERENCE, SETTINGS

HERE = Path(__file__).parent
TITLES = {"mnist": "MNIST, CNN", "lm": "Language model of bytes"}
SEEDS = {"mnist": Mnist.seeds, "lm": Lm.seeds}
WINDOWS = {"mnist": 1, "lm": 10}
"""Neighbours of a curve that are averaged; those of MNIST are means of 12 steps already."""
PERCENT = "test accuracy"
NOT_RUN = "not run"
# Bytes a parameter with AdamW that others publish: weights, gradient, state.
PUBLISHED = {
    "[torch.optim](https://docs.pytorch.org/docs/stable/optim.html), float32": (4, 4, 8),
    "[bitsandbytes](https://arxiv.org/abs/2110.02861) 8-bit, float32 weights": (4, 4, 2),
    "[torchao](https://github.com/pytorch/ao) 8-bit, float32 weights": (4, 4, 2),
    "[FlashOptim](https://arxiv.org/abs/2602.23349) for PyTorch": (2, 2, 3),
}
# Peers are dashed, 4 bits dotted.
STYLES = {
    "float32": (palette.BLACK, "-"),
    "bf16 moments": (palette.SKY, "-"),
    "8-bit moments": (palette.BLUE, "-"),
    "4-bit moments": (palette.BLUE, ":"),
    "bf16 weights, compensated": (palette.GREEN, "-"),
    "bf16 weights, compensated + 8-bit moments": (palette.RED, "-"),
    "bf16 weights, compensated + 4-bit moments": (palette.RED, ":"),
    "bf16 weights, stochastic": (palette.PINK, "-"),
    "bf16 weights, stochastic + 4-bit moments": (palette.PINK, ":"),
    "bf16 weights, plain": (palette.ORANGE, "-"),
    "optax.adamw float32": (palette.GREY, "--"),
    "flashoptim-jax": (palette.PURPLE, "--"),
}


@dataclass(frozen=True)
class Report:
    """Writes results/lowmem.json, the picture and the README's table from the finished runs."""

    folder: Path = RUNS
    """Where finished runs are."""
    results: Path = HERE / "results"
    """Where the JSON file and the picture go."""
    readme: Path = HERE / "README.md"
    """The file whose table is replaced."""
    numbers: Path = NUMBERS
    """The page whose table of bytes is replaced."""


@dataclass(frozen=True)
class Memory(Report):
    """Measures bytes a parameter anew, beside the trainings that results/lowmem.json has."""


def runs_of(folder: Path, experiment: str) -> dict[str, list[dict[str, Any]]]:
    """The finished runs of each setting, by seed; all with one config."""
    runs = {
        setting: [
            run
            for seed in range(SEEDS[experiment])
            if (run := finished(folder, experiment, setting, seed)) is not None
        ]
        for setting in SETTINGS
    }
    configs = {json.dumps(run["config"], sort_keys=True) for row in runs.values() for run in row}
    if len(configs) > 1:
        raise ValueError(f"{folder / experiment}: runs of {len(configs)} configs, expected one")
    return runs


def summarize(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Of each setting and quantity the interval, and that of the difference to float32."""
    finals = {name: {run["seed"]: run["final"] for run in row} for name, row in runs.items() if row}
    reference = finals.get(REFERENCE, {})
    summary = {}
    for name, row in finals.items():
        summary[name] = {"seeds": list(row), "quantities": {}}
        paired = [seed for seed in row if seed in reference]
        for quantity in next(iter(row.values())):
            values = [final[quantity] for final in row.values()]
            entry: dict[str, Any] = {"values": values}
            if len(values) > 1:
                entry |= interval(values)._asdict()
            if name != REFERENCE and len(paired) > 1:
                difference = interval(
                    [row[seed][quantity] - reference[seed][quantity] for seed in paired]
                )
                entry["difference"] = {**difference._asdict(), "verdict": difference.verdict}
            summary[name]["quantities"][quantity] = entry
    return summary


def commits(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Of the code that ran."""
    return sorted({run["origin"]["commit"] for row in runs.values() for run in row})


def median_seconds(runs: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """What one run of each setting took."""
    return {
        name: float(np.median([run["seconds"] for run in row])) for name, row in runs.items() if row
    }


def final_table(experiment: str, summary: dict[str, Any]) -> str:
    """Each quantity with its interval; below the first row also the difference to float32's."""
    quantities = list(next(iter(summary.values()))["quantities"])
    header = [
        "setting",
        "seeds",
        *(x for q in quantities[1:] for x in (q, "minus float32's")),
        quantities[0],
    ]
    rows = []
    for name in SETTINGS:
        if name not in summary:
            rows.append([name, "0", NOT_RUN, *[""] * (len(header) - 3)])
            continue
        found = summary[name]["quantities"]
        cells = [name, str(len(summary[name]["seeds"]))]
        for quantity in quantities[1:]:
            cells += [mean(quantity, found[quantity]), difference(quantity, found[quantity])]
        rows.append([*cells, mean(quantities[0], found[quantities[0]])])
    return f"**{TITLES[experiment]}**\n\n{table(header, rows)}"


def number(quantity: str, x: float, sign: str = "") -> str:
    return f"{100 * x:{sign}.2f}%" if quantity == PERCENT else f"{x:{sign}.4f}"


def mean(quantity: str, entry: dict[str, Any]) -> str:
    """A mean ± half of its interval."""
    if "mean" not in entry:
        return number(quantity, entry["values"][0])
    half = number(quantity, entry["high"] - entry["mean"])
    return f"{number(quantity, entry['mean'])} ± {half}"


def difference(quantity: str, entry: dict[str, Any]) -> str:
    """A difference, its interval, and what that allows to say."""
    if (found := entry.get("difference")) is None:
        return ""
    middle, low, high = (number(quantity, found[key], "+") for key in ("mean", "low", "high"))
    return f"{found['verdict']}: {middle} ({low} to {high})"


def memory_table(memory: dict[str, dict[str, float]]) -> str:
    """Bytes a parameter."""
    keys = ["weights", "gradient", "state", "live", "temporary"]
    header = ["setting", *keys[:3], "**together, live after a step**", "temporary in a step"]
    rows = [
        [name, *(f"{memory[name][key]:.3f}" for key in keys)]
        if name in memory
        else [name, NOT_RUN, *[""] * (len(keys) - 1)]
        for name in SETTINGS
    ]
    return f"**Bytes a parameter, measured**\n\n{table(header, rows)}"


def peers_table(memory: dict[str, dict[str, float]]) -> str:
    """Bytes a parameter beside those that others publish, for the page of numbers."""
    header = ["AdamW, bytes a parameter", "weights", "gradient", "state", "together"]
    measured = {
        name if name == "flashoptim-jax" or name.startswith("optax") else f"jadam, {name}": x
        for name, x in memory.items()
        if not name.endswith("plain")
    }
    rows = [
        [name, *(f"{x[key]:.2f}" for key in ("weights", "gradient", "state", "live"))]
        for name, x in measured.items()
    ]
    rows += [
        [f"{name} (published)", *map(str, parts), str(sum(parts))]
        for name, parts in PUBLISHED.items()
    ]
    return table(header, rows)


def markdown(results: dict[str, Any]) -> str:
    """All tables of results/lowmem.json."""
    tables = [final_table(name, results[name]["settings"]) for name in TITLES if name in results]
    return "\n\n".join([memory_table(results["memory"]), *tables])


def smooth(x: np.ndarray, window: int) -> np.ndarray:
    """The mean of each `window` neighbours along the last axis, without overlap."""
    return x[..., : x.shape[-1] // window * window].reshape(*x.shape[:-1], -1, window).mean(-1)


LOOK = {
    **{"font.size": 9, "axes.grid": True, "grid.alpha": 0.25},
    **{"axes.spines.top": False, "axes.spines.right": False},
}


@mpl.rc_context(LOOK)
def draw(all_runs: dict[str, dict[str, list[dict[str, Any]]]]) -> Figure:
    """Above the loss, below its difference to float32's with the same seed; means and intervals."""
    figure = Figure((6 * len(all_runs), 7), layout="constrained")
    axes = figure.subplots(2, len(all_runs), squeeze=False)
    for (experiment, runs), (above, below) in zip(all_runs.items(), axes.T, strict=True):
        window = WINDOWS[experiment]
        curves = {
            name: {run["seed"]: smooth(np.array(run["curve"]["loss"]), window) for run in row}
            for name, row in runs.items()
            if row
        }
        steps = smooth(np.array(runs[REFERENCE][0]["curve"]["steps"]), window)
        for name, row in curves.items():
            paired = row.keys() & curves[REFERENCE].keys()
            losses = np.stack(list(row.values()))
            line(above, name, steps, losses)
            if name == REFERENCE:  # the other bands would lie on this one
                band(above, name, steps, losses)
            elif paired:
                gaps = np.stack([row[seed] - curves[REFERENCE][seed] for seed in sorted(paired)])
                line(below, name, steps, gaps)
                band(below, name, steps, gaps)
        above.set(title=TITLES[experiment], ylabel="training loss [nats]", yscale="log")
        above.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
        above.yaxis.set_major_formatter("{x:g}")
        above.yaxis.set_minor_formatter("")
        below.axhline(0, color=STYLES[REFERENCE][0], linewidth=1)
        below.set(xlabel="step", ylabel="loss minus float32's, same seed [nats]")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def line(axis: Axes, name: str, steps: np.ndarray, curves: np.ndarray) -> None:
    """The mean over seeds."""
    color, style = STYLES[name]
    axis.plot(steps, curves.mean(0), style, color=color, linewidth=1.2, label=name)


def band(axis: Axes, name: str, steps: np.ndarray, curves: np.ndarray) -> None:
    """The interval of the mean over seeds."""
    if len(curves) > 1:
        _, low, high = np.transpose([interval(values) for values in curves.T])
        axis.fill_between(steps, low, high, color=STYLES[name][0], alpha=0.12, linewidth=0)


def main(config: Report) -> None:
    """Measures memory, reads the runs, writes everything."""
    all_runs = {experiment: runs_of(config.folder, experiment) for experiment in TITLES}
    all_runs = {experiment: runs for experiment, runs in all_runs.items() if runs[REFERENCE]}
    if not all_runs:
        raise ValueError(f"{config.folder}: no finished run of {REFERENCE}")
    summaries = {experiment: summarize(runs) for experiment, runs in all_runs.items()}
    results = {
        **provenance("python -m experiments.lowmem report"),
        "memory": measured(),
        **{
            experiment: {
                "config": runs[REFERENCE][0]["config"],
                "commits": commits(runs),
                "seconds": median_seconds(runs),
                "settings": summaries[experiment],
            }
            for experiment, runs in all_runs.items()
        },
    }
    picture.write(draw(all_runs), config.results / "lowmem", dpi=150)
    publish(results, config)


def measured() -> dict[str, dict[str, float]]:
    """Bytes a parameter of each setting that is installed."""
    return {
        name: measure(setting, Shape())
        for name, setting in track(SETTINGS.items(), "memory")
        if setting.is_installed
    }


def main_of_memory(config: Memory) -> None:
    """Measures memory alone; the trainings stay those of the JSON file."""
    results = json.loads((config.results / "lowmem.json").read_text())
    results |= {
        "memory": measured(),
        "memory's origin": provenance("python -m experiments.lowmem memory"),
    }
    publish(results, config)


def publish(results: dict[str, Any], config: Report) -> None:
    """Writes the JSON file and all tables."""
    write_json(config.results / "lowmem.json", results)
    block = markdown(results)
    update_readme("lowmem", block, config.readme)
    update_readme("memory", peers_table(results["memory"]), config.numbers)
    print(f"{block}\n\nwritten to {config.results} and {config.readme}")
