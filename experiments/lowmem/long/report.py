"""What the long trainings say: `python -m experiments.lowmem.long.report`, from results/long.json.

Two float32 rows differ in nothing but roundings; so what parts them is chance, of which each row
has its own draw. A comparison with one of them has that row's draw in every difference. So the
settings are compared with the mean of both, and the size of chance is taken from all rows: what is
left of a loss when its setting's mean and its seed's are taken away.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from experiments.common import palette, picture
from experiments.common.report import table, update_readme
from experiments.lowmem.report import HERE, LOOK, STYLES, mean, summarize
from experiments.lowmem.settings import REFERENCE

from .training import LONG, NEAREST, STOCHASTIC

RESULTS = HERE / "results" / "long.json"
README = HERE / "README.md"
BOTH = (REFERENCE, "optax.adamw float32")
"""The same algorithm twice."""
EIGHT_BITS = ("8-bit moments", "bf16 weights, compensated + 8-bit moments", STOCHASTIC)
ALL_CODES = "the three rows of dithered 8-bit codes together"
LOSSES = ("validation loss", "training loss")
WITH_REST = ("bf16 weights, compensated + 8-bit moments", "flashoptim-jax")
"""Settings that keep a residual of each weight."""
POWER = 0.9
COLORS = {name: color for name, (color, _) in STYLES.items()}
COLORS |= {NEAREST: palette.ORANGE, STOCHASTIC: palette.PINK, "bf16 weights, plain": palette.GREY}
COLORS |= {BOTH[1]: palette.BLACK}
Rows = dict[str, list[dict[str, Any]]]


class Gap(NamedTuple):
    """A setting's loss minus the mean of both float32 rows, seed by seed.

    Attributes:
        values: of each seed.
        half: of the interval, from the chance of all rows; all gaps of a table are at once in their
            intervals in 95% of such studies (Bonferroni).
        found: the true difference that would have been told from 0 in nine studies of ten.
    """

    values: np.ndarray
    half: float
    found: float

    @property
    def mean(self) -> float:
        return float(self.values.mean())

    @property
    def differs(self) -> bool:
        return abs(self.mean) > self.half


def by_setting(results: dict[str, Any]) -> Rows:
    """The runs of each setting, by seed."""
    rows: Rows = {name: [] for name in LONG}
    for run in results["runs"]:
        rows[run["setting"]].append(run)
    return {name: sorted(row, key=lambda run: run["seed"]) for name, row in rows.items() if row}


def is_void(name: str, row: list[dict[str, Any]]) -> bool:
    """Whether a setting's residuals never changed in any of its runs: then it did not run."""
    tuned = [run["fine-tuning"] for run in row]
    return name in WITH_REST and all(x["moved"] == x["moved with rest"] for x in tuned)


def valid(rows: Rows) -> Rows:
    return {name: row for name, row in rows.items() if not is_void(name, row)}


def of_float32s(losses: dict[str, np.ndarray]) -> np.ndarray:
    """The mean of both float32 rows, for each seed."""
    return np.mean([losses[name] for name in BOTH], 0)


def chance(losses: dict[str, np.ndarray]) -> tuple[float, int]:
    """The standard deviation of one run about its setting and seed, and its degrees of freedom."""
    y = np.stack(list(losses.values()))
    rest = y - y.mean(0) - y.mean(1, keepdims=True) + y.mean()
    degrees = (y.shape[0] - 1) * (y.shape[1] - 1)
    return float(np.sqrt((rest**2).sum() / degrees)), degrees


def gaps(rows: Rows, quantity: str) -> dict[str, Gap]:
    """Of each valid setting but the float32 rows, and of the rows with 8-bit codes together."""
    losses = {
        name: np.array([run["final"][quantity] for run in row]) for name, row in valid(rows).items()
    }
    sd, degrees = chance(losses)
    base, seeds = of_float32s(losses), len(next(iter(losses.values())))
    compared = [name for name in losses if name not in BOTH]
    groups = {name: [name] for name in compared} | {ALL_CODES: list(EIGHT_BITS)}
    limit = stats.t.ppf(1 - 0.025 / len(groups), degrees)
    found = {}
    for name, members in groups.items():
        error = sd * np.sqrt((1 / len(members) + 1 / len(BOTH)) / seeds)
        values = np.mean([losses[member] for member in members], 0) - base
        half = float(limit * error)
        found[name] = Gap(values, half, half + float(stats.t.ppf(POWER, degrees) * error))
    return found


def between_float32s(rows: Rows, quantity: str) -> str:
    """The null: optax's float32 minus jadam's, with Student's interval of the pairs alone."""
    found = summarize(rows)[BOTH[1]]["quantities"][quantity]["difference"]
    return "{mean:+.4f} ({low:+.4f} to {high:+.4f})".format(**found)


def loss_table(rows: Rows) -> str:
    """The losses after training, and their differences to float32."""
    summary = summarize(rows)
    by_loss = {quantity: gaps(rows, quantity) for quantity in LOSSES}
    header = ["setting", "seeds", "validation loss", "minus float32's", "training, minus float32's"]
    lines = []
    for name in (*rows, ALL_CODES):
        if name in summary:
            entry = summary[name]["quantities"]["validation loss"]
            cells = [name, str(len(summary[name]["seeds"])), mean("validation loss", entry)]
        else:
            cells = [name, "", ""]
        if name in BOTH:
            lines.append([*cells, "", ""])
        elif name in rows and is_void(name, rows[name]):
            lines.append([name, cells[1], "void: its residuals never changed", "", ""])
        else:
            lines.append([*cells, *(gap_cell(by_loss[q][name]) for q in LOSSES)])
    return table(header, lines)


def gap_cell(gap: Gap) -> str:
    verdict = "differs" if gap.differs else "no difference found"
    return f"{verdict}: {gap.mean:+.4f} ± {gap.half:.4f}"


def tuned(rows: Rows) -> Rows:
    """The end of fine-tuning as what a run's final figures are."""
    return {
        name: [
            {
                "seed": run["seed"],
                "final": {
                    "validation loss": run["fine-tuning"]["validation loss"][-1],
                    **{
                        key: run["fine-tuning"][key]
                        for key in ("moved", "moved with rest", "arrived")
                    },
                },
            }
            for run in row
        ]
        for name, row in rows.items()
    }


def tuning_table(rows: Rows) -> str:
    """What of fine-tuning's updates reached the weights, and what the loss says."""
    summary = summarize(tuned(valid(rows)))
    header = [
        *("setting", "weights that a step changes", "with what is kept beside them"),
        *("of float32's way", "validation loss minus float32's"),
    ]
    lines = []
    for name, found in summary.items():
        quantities = found["quantities"]
        shares = [
            f"{100 * quantities[key]['mean']:.1f}%"
            for key in ("moved", "moved with rest", "arrived")
        ]
        gap = quantities["validation loss"].get("difference")
        cell = (
            "" if gap is None else f"{gap['mean']:+.5f} ({gap['low']:+.5f} to {gap['high']:+.5f})"
        )
        lines.append([name, *shares, cell])
    return table(header, lines)


def measured(results: dict[str, Any]) -> dict[str, str]:
    """Each setting's validation loss minus float32's, for the tables of others."""
    found = gaps(by_setting(results), LOSSES[0])
    cells = {name: f"{gap.mean:+.4f} ± {gap.half:.4f}" for name, gap in found.items()}
    return cells | dict.fromkeys(BOTH, "the reference")


def markdown(results: dict[str, Any]) -> str:
    """Both tables, and what would have been found."""
    rows = by_setting(results)
    validation, training = (gaps(rows, quantity) for quantity in LOSSES)
    losses = {
        name: np.array([run["final"]["validation loss"] for run in row])
        for name, row in valid(rows).items()
    }
    sd, degrees = chance(losses)
    one = validation[EIGHT_BITS[0]]
    config = results["config"]
    start = [run["fine-tuning"]["validation loss"] for run in rows[REFERENCE]]
    before, after = np.mean([x[0] for x in start]), np.mean([x[-1] for x in start])
    return "\n\n".join(
        [
            f"**After {config['steps']:,} steps** [nats a byte]",
            loss_table(rows),
            f"Chance parts two runs of one setting and seed by {sd:.4f} (standard deviation, "
            f"{degrees} degrees of freedom). Where a difference has an interval, all of a column "
            "are in theirs at once in 95% of such studies. A higher validation loss would have "
            f"been found in nine studies of ten if it were {one.found:.4f} for a row, "
            f"{validation[ALL_CODES].found:.4f} for the three rows of codes together "
            f"({training[EIGHT_BITS[0]].found:.4f} and {training[ALL_CODES].found:.4f} of "
            "training). A smaller one may be there. The two float32 rows compute the same but for "
            "roundings; by their own pairs optax's validation loss minus jadam's would be "
            f"{between_float32s(rows, 'validation loss')}, a difference where there is none to "
            "find. So no row is judged by its own pairs with one float32 row.",
            f"**After {config['fine_steps']} steps of fine-tuning**",
            tuning_table(rows),
            "All settings start from float32's trained weights, with a learning rate "
            f"{1 / config['fine_share']:.0f} times smaller than the highest of training; float32 "
            f"goes from {before:.4f} to {after:.4f}. These runs are too short to part by chance, "
            "which the row of optax shows; so the intervals are those of the pairs with jadam's "
            "float32.",
        ]
    )


@mpl.rc_context(LOOK)
def draw(rows: Rows) -> Figure:
    """The validation losses over the steps, and the differences of both losses at the end."""
    rows = valid(rows)
    figure = Figure((12, 7.5), layout="constrained")
    (curves, apart), (validation, training) = figure.subplots(2, 2)
    steps = np.array(rows[REFERENCE][0]["validation"]["steps"])[1:]
    losses = {
        name: np.array([run["validation"]["loss"] for run in row])[:, 1:]
        for name, row in rows.items()
    }
    base = of_float32s(losses)
    for name, values in losses.items():
        style = {"color": COLORS[name], "linewidth": 1.3, "label": name}
        style["linestyle"] = "--" if name == BOTH[1] else "-"
        curves.plot(steps, values.mean(0), **style)
        apart.plot(steps, (values - base).mean(0), **style)
    curves.set(title="validation loss [nats a byte]", xlabel="step")
    apart.set(title="validation loss minus the mean of both float32 rows", xlabel="step")
    curves.legend(frameon=False)
    forest(validation, gaps(rows, LOSSES[0]), "validation loss at the end, minus float32's")
    forest(training, gaps(rows, LOSSES[1]), "training loss at the end, minus float32's")
    training.tick_params(labelleft=False)
    return figure


def forest(axis: Axes, found: dict[str, Gap], title: str) -> None:
    """Each setting's seeds as points, and the interval of its mean."""
    for place, (name, gap) in enumerate(reversed(found.items())):
        color = COLORS.get(name, palette.BLACK)
        heights = np.full(len(gap.values), place - 0.2)
        axis.plot(gap.values, heights, ".", color=color, alpha=0.45, markersize=4)
        axis.errorbar(gap.mean, place, xerr=gap.half, fmt="o", color=color, capsize=3, markersize=4)
    axis.axvline(0, color=palette.BLACK, linewidth=1)
    axis.set_yticks(range(len(found)), list(reversed(found)))
    axis.set_ylim(-0.6, len(found) - 0.4)
    axis.xaxis.set_major_locator(ticker.MultipleLocator(0.005))
    axis.set(title=title, xlabel="nats a byte")


def main(readme: Path = README) -> None:
    """Writes the README's tables and the picture."""
    results = json.loads(RESULTS.read_text())
    block = markdown(results)
    picture.write(draw(by_setting(results)), RESULTS.with_suffix(""), dpi=110)
    update_readme("long", block, readme)
    print(block)


if __name__ == "__main__":
    main()
