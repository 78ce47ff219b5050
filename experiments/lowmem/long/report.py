"""What the long trainings say: `python -m experiments.lowmem.long.report`, from results/long*.json.

Each file is what one command found: a study. Runs in float32, by jadam or by optax, in any study,
differ in nothing but roundings; so what parts two of one seed is chance, of which each run has its
own draw. A comparison with one row of them has that row's draw in every difference. So a loss is
taken to be the sum of its setting's, its seed's and chance, with one setting for all of float32,
and these are fitted to all runs by least squares. What is left says how large chance is.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from experiments.common import palette, picture
from experiments.common.intervals import interval
from experiments.common.report import table, update_readme
from experiments.lowmem.report import HERE, LOOK, STYLES, mean, summarize
from experiments.lowmem.settings import REFERENCE

from .training import LONG, NEAREST, SLOWER, STOCHASTIC

PICTURE = HERE / "results" / "long"
README = HERE / "README.md"
BOTH = (REFERENCE, "optax.adamw float32")
"""The same algorithm twice."""
EIGHT_BITS = ("8-bit moments", "bf16 weights, compensated + 8-bit moments", STOCHASTIC)
FOUR_BITS = tuple(name for name in LONG if "4-bit" in name)
TOGETHER = {
    "the three rows of dithered 8-bit codes together": EIGHT_BITS,
    "the three rows of 4-bit codes together": FOUR_BITS,
}
ALL_CODES, _ = TOGETHER
LOSSES = ("validation loss", "training loss")
WITH_REST = (*(name for name in LONG if "compensated" in name), "flashoptim-jax")
"""Settings that keep a residual of each weight."""
POWER = 0.9
LINES = STYLES | {
    NEAREST: (palette.ORANGE, "--"),
    STOCHASTIC: (palette.PINK, "--"),
    SLOWER: (palette.BLACK, ":"),
}
Rows = dict[str, list[dict[str, Any]]]
"""The runs of each setting."""


class Gap(NamedTuple):
    """A setting's loss minus float32's.

    Attributes:
        mean: as fitted.
        values: of each run, from the mean of its seed's float32 runs.
        half: of the interval, from the chance of all rows; all gaps of a table are at once in their
            intervals in 95% of such studies (Bonferroni).
        found: the true difference that would have been told from 0 in nine studies of ten.
    """

    mean: float
    values: np.ndarray
    half: float
    found: float

    @property
    def differs(self) -> bool:
        return abs(self.mean) > self.half


class Fit(NamedTuple):
    """Losses as the sum of a setting's, a seed's and chance.

    Attributes:
        names: of the settings, all of float32 as one.
        levels: the loss of each, but for a constant.
        covariance: of the levels, for chance of size 1.
        sd: the standard deviation of chance, by which two runs of one setting and seed are parted.
        degrees: of freedom, by which it is known.
    """

    names: list[str]
    levels: np.ndarray
    covariance: np.ndarray
    sd: float
    degrees: int

    def contrast(self, members: Sequence[str]) -> tuple[float, float]:
        """The mean of some settings minus float32, and its standard error."""
        weights = np.zeros(len(self.names))
        weights[[self.names.index(name) for name in members]] = 1 / len(members)
        weights[self.names.index(REFERENCE)] -= 1
        return float(weights @ self.levels), self.sd * float(
            np.sqrt(weights @ self.covariance @ weights)
        )


def committed() -> list[dict[str, Any]]:
    """All results, which are of one config."""
    found = [
        json.loads(path.read_text())
        for path in sorted(PICTURE.parent.glob("long*.json"), key=lambda path: path.stem)
    ]
    if any(study["config"] != found[0]["config"] for study in found):
        raise ValueError("results/long*.json: expected one config, got several")
    return found


def by_setting(study: dict[str, Any]) -> Rows:
    """The runs of each setting, by seed."""
    rows: Rows = {name: [] for name in LONG}
    for run in study["runs"]:
        rows[run["setting"]].append(run)
    return {name: sorted(row, key=lambda run: run["seed"]) for name, row in rows.items() if row}


def is_void(name: str, row: list[dict[str, Any]]) -> bool:
    """Whether a setting's residuals never changed in any of its runs: then it did not run."""
    tuned = [run["fine-tuning"] for run in row]
    return name in WITH_REST and all(x["moved"] == x["moved with rest"] for x in tuned)


def valid(rows: Rows) -> Rows:
    return {name: row for name, row in rows.items() if not is_void(name, row)}


def joined(each: Sequence[Rows]) -> Rows:
    """The valid runs of several studies."""
    kept = [valid(rows) for rows in each]
    joint = {name: [run for rows in kept for run in rows.get(name, [])] for name in LONG}
    return {name: row for name, row in joint.items() if row}


def fit(rows: Rows, quantity: str) -> Fit:
    """Of all runs, by least squares."""
    runs = [(level_of(name), run) for name, row in rows.items() for run in row]
    names = list(dict.fromkeys(name for name, _ in runs))
    seeds = sorted({run["seed"] for _, run in runs})
    design = np.zeros((len(runs), len(names) + len(seeds)))
    for i, (name, run) in enumerate(runs):
        design[i, [names.index(name), len(names) + seeds.index(run["seed"])]] = 1
    losses = np.array([run["final"][quantity] for _, run in runs])
    levels, _, rank, _ = np.linalg.lstsq(design, losses)
    degrees = len(runs) - int(rank)
    rest = losses - design @ levels
    covariance = np.linalg.pinv(design.T @ design)[: len(names), : len(names)]
    sd = float(np.sqrt((rest**2).sum() / degrees))
    return Fit(names, levels[: len(names)], covariance, sd, degrees)


def level_of(name: str) -> str:
    """The setting as which it counts."""
    return REFERENCE if name in BOTH else name


def from_float32(
    rows: Rows, name: str, quantity: Callable[[dict[str, Any]], Any]
) -> list[np.ndarray]:
    """Of each run of a setting a quantity, minus the mean of it in its seed's float32 runs."""
    base: dict[int, list[np.ndarray]] = {}
    for run in (run for both in BOTH for run in rows.get(both, [])):
        base.setdefault(run["seed"], []).append(np.asarray(quantity(run)))
    return [np.asarray(quantity(run)) - np.mean(base[run["seed"]], 0) for run in rows[name]]


def gaps(rows: Rows, quantity: str) -> dict[str, Gap]:
    """Of each setting but float32, and of the rows with codes of as many bits together."""
    fitted = fit(rows, quantity)
    groups = {name: (name,) for name in rows if name not in BOTH}
    groups |= {name: these for name, these in TOGETHER.items() if set(these) <= set(rows)}
    limit = stats.t.ppf(1 - 0.025 / len(groups), fitted.degrees)
    found = {}
    for name, members in groups.items():
        mean, error = fitted.contrast(members)
        values = [
            from_float32(rows, member, lambda run: run["final"][quantity]) for member in members
        ]
        half = float(limit * error)
        power = float(stats.t.ppf(POWER, fitted.degrees) * error)
        found[name] = Gap(mean, np.mean(values, 0), half, half + power)
    return found


def between_float32s(rows: Rows, quantity: str) -> str:
    """The null: optax's float32 minus jadam's, with Student's interval of the pairs alone."""
    found = summarize(rows)[BOTH[1]]["quantities"][quantity]["difference"]
    return "{mean:+.4f} ({low:+.4f} to {high:+.4f})".format(**found)


def loss_table(rows: Rows) -> str:
    """The losses after training, and their differences to float32."""
    by_loss = {quantity: gaps(rows, quantity) for quantity in LOSSES}
    header = ["setting", "runs", "validation loss", "minus float32's", "training, minus float32's"]
    lines = []
    for name in (*rows, *TOGETHER):
        cells = [name, "", ""]
        if name in rows:
            losses = [run["final"][LOSSES[0]] for run in rows[name]]
            cells = [name, str(len(losses)), mean(LOSSES[0], interval(losses)._asdict())]
        apart = [by_loss[q][name] for q in LOSSES if name in by_loss[q]]
        lines.append([*cells, *(map(gap_cell, apart) if apart else ("", ""))])
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


def tuning_table(each: Sequence[Rows]) -> str:
    """What of fine-tuning's updates reached the weights, and what the loss says.

    A study has its own weights to start from, so a setting is compared with its study's float32.
    """
    summaries = [summarize(tuned(valid(rows))) for rows in each]
    summary = {
        name: next(found[name] for found in summaries if name in found)
        for name in LONG
        if any(name in found for found in summaries)
    }
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


def measured(studies: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Each setting's validation loss minus float32's, for the tables of others."""
    found = gaps(joined([by_setting(study) for study in studies]), LOSSES[0])
    cells = {name: f"{gap.mean:+.4f} ± {gap.half:.4f}" for name, gap in found.items()}
    return cells | dict.fromkeys(BOTH, "the reference")


def markdown(studies: Sequence[dict[str, Any]]) -> str:
    """Both tables, and what would have been found."""
    each, config = [by_setting(study) for study in studies], studies[0]["config"]
    rows = joined(each)
    validation, training = (gaps(rows, quantity) for quantity in LOSSES)
    fitted = fit(rows, LOSSES[0])
    one = validation[EIGHT_BITS[0]]
    start = [run["fine-tuning"]["validation loss"] for run in rows[REFERENCE]]
    before, after = np.mean([x[0] for x in start]), np.mean([x[-1] for x in start])
    return "\n\n".join(
        [
            f"**After {config['steps']:,} steps** [nats a byte]",
            loss_table(rows),
            f"Chance parts two runs of one setting and seed by {fitted.sd:.4f} (standard "
            f"deviation, {fitted.degrees} degrees of freedom). Where a difference has an interval, "
            "all of a column are in theirs at once in 95% of such studies. A higher validation "
            "loss would have been found in nine studies of ten if it were "
            f"{one.found:.4f} for a row with eight runs, {validation[ALL_CODES].found:.4f} for "
            f"three such rows together ({training[EIGHT_BITS[0]].found:.4f} and "
            f"{training[ALL_CODES].found:.4f} of training). A smaller one may be there. jadam's "
            "and optax's float32 compute the same but for roundings; by the pairs of the first "
            "study alone optax's validation loss minus jadam's would be "
            f"{between_float32s(each[0], LOSSES[0])}, a difference where there is none to find. So "
            "no row is judged by its own pairs with one float32 row.",
            f"**After {config['fine_steps']} steps of fine-tuning**",
            tuning_table(each),
            "All settings start from their study's trained float32 weights, with a learning rate "
            f"{1 / config['fine_share']:.0f} times smaller than the highest of training; float32 "
            f"goes from {before:.4f} to {after:.4f}. These runs are too short to part by chance, "
            "which the row of optax shows; so the intervals are those of the pairs with jadam's "
            "float32.",
        ]
    )


@mpl.rc_context(LOOK)
def draw(rows: Rows) -> Figure:
    """The validation losses over the steps, and the differences of both losses at the end."""
    figure = Figure((12, 8.5), layout="constrained")
    (curves, apart), (validation, training) = figure.subplots(2, 2)
    steps = np.array(rows[REFERENCE][0]["validation"]["steps"])[1:]

    def losses(run: dict[str, Any]) -> list[float]:
        return run["validation"]["loss"][1:]

    for name, row in rows.items():
        color, dashes = LINES[name]
        style = {"color": color, "linestyle": dashes, "linewidth": 1.3, "label": name}
        curves.plot(steps, np.mean([losses(run) for run in row], 0), **style)
        apart.plot(steps, np.mean(from_float32(rows, name, losses), 0), **style)
    curves.set(title="validation loss [nats a byte]", xlabel="step")
    apart.set(title="the same minus the seed's float32 runs", xlabel="step")
    handles, labels = curves.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    forest(validation, gaps(rows, LOSSES[0]), "validation loss at the end, minus float32's")
    forest(training, gaps(rows, LOSSES[1]), "training loss at the end, minus float32's")
    training.tick_params(labelleft=False)
    return figure


def forest(axis: Axes, found: dict[str, Gap], title: str) -> None:
    """Each setting's seeds as points, and the interval of its mean."""
    for place, (name, gap) in enumerate(reversed(found.items())):
        color, _ = LINES.get(name, (palette.BLACK, ""))
        heights = np.full(len(gap.values), place - 0.2)
        axis.plot(gap.values, heights, ".", color=color, alpha=0.45, markersize=4)
        axis.errorbar(gap.mean, place, xerr=gap.half, fmt="o", color=color, capsize=3, markersize=4)
    axis.axvline(0, color=palette.BLACK, linewidth=1)
    axis.set_yticks(range(len(found)), list(reversed(found)))
    axis.set_ylim(-0.6, len(found) - 0.4)
    axis.xaxis.set_major_locator(ticker.MaxNLocator(6))
    axis.set(title=title, xlabel="nats a byte")


def main(readme: Path = README) -> None:
    """Writes the README's tables and the picture."""
    studies = committed()
    block = markdown(studies)
    picture.write(draw(joined([by_setting(study) for study in studies])), PICTURE, dpi=110)
    update_readme("long", block, readme)
    print(block)


if __name__ == "__main__":
    main()
