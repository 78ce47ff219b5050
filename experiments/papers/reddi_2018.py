"""Reddi, Kale & Kumar (2018), "On the Convergence of Adam and Beyond": Adam need not converge.

    python -m experiments.papers.reddi_2018

Section 5, figure 1, on x in [-1, 1] with the best fixed point x = -1:

- online:      f_t(x) = 1010·x where t mod 101 = 1, else -10·x
- stochastic:  f_t(x) = 1010·x with probability 0.01, else -10·x

The rare large gradient is the one that matters, and Adam's average of g² forgets it before the
next one comes. The claims: Adam's x goes to +1, the worst point, and its average regret R(T)/T
does not fall, R(T) = Σ f_t(x_t) - min over x of Σ f_t(x). AMSGrad's regret falls, its x goes to -1.

Theorem 1 proves it for f_t(x) = C·x where t mod 3 = 1, else -x, with b1 = 0, b2 = 1/(1 + C²), from
x = 1: Adam is at +1 again after every third step, though -1 is best. Here C = 4.

All take α_t = α/√t and put x back into [-1, 1] after every step. Adam is `jadam.adam`, with the
bias corrections that the paper leaves out of its analysis; AMSGrad is `jadam.amsgrad`, the maximum
of the raw v, corrected likewise. AMSGrad without corrections, the paper's algorithm 2 to the
letter, is measured beside them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.progress import track

import jadam
from experiments.common.palette import BLUE, GREY, RED
from experiments.papers.publish import RUNS, Claim, at_least, command_line, digits, publish

PERIOD, LARGE, SMALL, PROBABILITY = 101, 1010.0, -10.0, 0.01
Make = Callable[..., optax.GradientTransformation]
OPTIMIZERS: dict[str, Make] = {
    "Adam": jadam.adam,
    "AMSGrad": jadam.amsgrad,
    "AMSGrad, uncorrected": partial(
        jadam.amsgrad, bias_correction_mu=False, bias_correction_nu=False
    ),
}
COLOURS = {"Adam": RED, "AMSGrad": BLUE}


@dataclass(frozen=True)
class Config:
    """Adam and AMSGrad on the three examples of the paper."""

    steps: int = 1_000_000
    """T."""
    learning_rates: tuple[float, float] = (0.1, 0.5)
    """The α of α/√t."""
    b1: float = 0.9
    """Of the two forms of figure 1."""
    b2: float = 0.99
    """Of the two forms of figure 1."""
    start: float = 0.0
    """x at the first step of figure 1."""
    seeds: int = 3
    """Of the stochastic form: 0, 1, ..."""
    constant: float = 4.0
    """C of theorem 1."""
    theorem_steps: int = 3_000
    """T of theorem 1."""
    out: Path = RUNS
    """The folder for JSON and pictures."""

    def __post_init__(self) -> None:
        at_least(self, steps=10 * PERIOD, theorem_steps=3, seeds=1)
        if not self.constant > 2:
            raise ValueError(f"--constant: expected a number above 2, got {self.constant}")


def descend(
    make: Make, slopes: np.ndarray, rates: np.ndarray, start: float, chunks: int = 1
) -> np.ndarray:
    """x of projected steps on f_t(x) = slopes[lane, t]·x, float32[lanes, steps + 1]."""

    def optimizer(rate: jax.Array) -> optax.GradientTransformation:
        return make(lambda count: rate / jnp.sqrt(count + 1.0))

    def walk(rate: jax.Array, carry: Any, slopes: jax.Array) -> tuple[Any, jax.Array]:
        def step(carry: Any, slope: jax.Array) -> tuple[Any, jax.Array]:
            x, state = carry
            update, state = optimizer(rate).update(slope, state, x)
            x = jnp.clip(x + update, -1.0, 1.0)
            return (x, state), x

        return jax.lax.scan(step, carry, slopes)

    rates = jnp.asarray(rates, jnp.float32)
    x = jnp.full_like(rates, start)
    carry = x, jax.vmap(lambda rate, x: optimizer(rate).init(x))(rates, x)
    run, path = jax.jit(jax.vmap(walk)), [np.asarray(x)[:, None]]
    for part in track(np.array_split(slopes, chunks, axis=1), "reddi_2018", transient=True):
        carry, xs = run(rates, carry, jnp.asarray(part, jnp.float32))
        path.append(np.asarray(xs))
    return np.concatenate(path, axis=1)


def average_regret(slopes: np.ndarray, x: np.ndarray) -> np.ndarray:
    """R(t)/t in float64: what x cost, less what the best fixed point of [-1, 1] would have."""
    cost = np.cumsum(slopes * x[:, :-1].astype(np.float64), axis=1)
    best = -np.abs(np.cumsum(slopes, axis=1))
    return (cost - best) / np.arange(1, slopes.shape[1] + 1)


def periodic(large: float, small: float, period: int, steps: int) -> np.ndarray:
    """Slopes [1, steps] that are large where t mod period = 1."""
    return np.where(np.arange(steps) % period == 0, large, small)[None]


def tenth(config: Config) -> int:
    """T/10, after whole periods."""
    return config.steps // 10 // PERIOD * PERIOD


def figure_1(config: Config) -> dict[str, Any]:
    """Average regret and x of each optimizer: `online`, `stochastic`, a row for each α and seed."""
    online = periodic(LARGE, SMALL, PERIOD, config.steps)
    rare = np.random.default_rng(0).random((config.seeds, config.steps)) < PROBABILITY
    forms = {"online": online, "stochastic": np.where(rare, LARGE, SMALL)}
    slopes = np.concatenate([np.tile(s, (len(config.learning_rates), 1)) for s in forms.values()])
    rates = np.concatenate([np.repeat(config.learning_rates, len(s)) for s in forms.values()])
    split = len(config.learning_rates)
    # After whole periods, so that no curve saws.
    kept = np.geomspace(1, config.steps, 120).astype(int)
    kept = np.where(kept < PERIOD, kept, kept // PERIOD * PERIOD)
    kept = np.union1d(kept, [tenth(config), config.steps])
    found: dict[str, Any] = {"t": kept.tolist(), "online": {}, "stochastic": {}}
    for name, make in OPTIMIZERS.items():
        path = descend(
            partial(make, b1=config.b1, b2=config.b2), slopes, rates, config.start, chunks=100
        )
        regret = average_regret(slopes, path)
        for form, rows in {"online": slice(0, split), "stochastic": slice(split, None)}.items():
            found[form][name] = {
                "learning_rate": rates[rows].tolist(),
                "x": digits(path[rows, kept]),
                "average_regret": digits(regret[rows, kept - 1]),
            }
    return found


def theorem_1(config: Config) -> dict[str, Any]:
    """x in the first steps and after every third, and the average regret, for each α."""
    c = config.constant
    slopes = periodic(c, -1.0, 3, config.theorem_steps)
    slopes = np.tile(slopes, (len(config.learning_rates), 1))
    adam = partial(jadam.adam, b1=0.0, b2=1 / (1 + c * c))
    path = descend(adam, slopes, np.asarray(config.learning_rates), start=1.0)
    return {
        "learning_rate": list(config.learning_rates),
        "x": digits(path[:, :61]),
        "smallest_x_after_every_third_step": digits(path[:, ::3].min(1), 9),
        "average_regret": digits(average_regret(slopes, path)[:, -1]),
    }


def judge(numbers: dict[str, Any], config: Config) -> list[Claim]:
    """The paper's claims against the numbers.

    At +1: above 0.9. Not falling: over the last nine tenths no less than 98% of what +1 costs,
    since Adam is a little off it after each large gradient. Falling: to under 80% in the last
    decade of t, and to under half of Adam's. Towards -1: lower than at T/10, or at -0.95 and below.
    """
    early_place = numbers["t"].index(tenth(config))
    rates = " and ".join(f"{rate:g}" for rate in config.learning_rates)

    def at(form: str, name: str, quantity: str) -> tuple[np.ndarray, np.ndarray]:
        """A quantity at T/10 and at T, of each α and seed."""
        values = np.array(numbers[form][name][quantity])
        return values[:, early_place], values[:, -1]

    def shown(values: np.ndarray) -> str:
        return ", ".join(f"{value:.3f}" for value in values)

    claims = []
    for form in ("online", "stochastic"):
        _, end = at(form, "Adam", "x")
        claims.append(Claim(f"{form}: Adam goes to +1", f"x = {shown(end)} at T", all(end > 0.9)))
    worst = 2 * (LARGE + (PERIOD - 1) * SMALL) / PERIOD
    early, adam = at("online", "Adam", "average_regret")
    late = (adam - early / 10) / 0.9
    claims.append(
        Claim(
            f"online: Adam's average regret does not fall below that of +1, {worst:.3f}",
            f"{shown(adam)} at T for α = {rates}; {shown(late)} over the last nine tenths",
            all(late > 0.98 * worst),
        )
    )
    for name in ("AMSGrad", "AMSGrad, uncorrected"):
        early, end = at("online", name, "average_regret")
        claims.append(
            Claim(
                f"online: the average regret of {name} falls",
                f"{shown(end)} at T, {shown(early)} at T/10",
                all(end < 0.8 * early) and all(end < 0.5 * adam),
            )
        )
    for form in ("online", "stochastic"):
        early, end = at(form, "AMSGrad", "x")
        claims.append(
            Claim(
                f"{form}: AMSGrad moves towards -1",
                f"x = {shown(end)} at T, {shown(early)} at T/10",
                all((end < early) | (end < -0.95)),
            )
        )
    theorem = numbers["theorem 1"]
    thirds = np.array(theorem["smallest_x_after_every_third_step"])
    regrets = np.array(theorem["average_regret"])
    claims.append(
        Claim(
            f"theorem 1, C = {config.constant:g}: Adam is at +1 after every third step",
            f"x >= {thirds.min():.6f} there, average regret {shown(regrets)}",
            all(thirds == 1) and all(regrets >= (2 * config.constant - 4) / 3),
        )
    )
    return claims


def draw(numbers: dict[str, Any], config: Config) -> Figure:
    """Figure 1 of the paper, and theorem 1's x."""
    figure = Figure((10, 6.4), layout="constrained")
    (regret, online), (stochastic, theorem) = figure.subplots(2, 2)
    panels = {
        regret: ("online", "average_regret", "online: average regret R(t)/t"),
        online: ("online", "x", "online: x"),
        stochastic: ("stochastic", "x", f"stochastic: x, {config.seeds} seeds"),
    }
    styles = dict(zip(config.learning_rates, ("-", "--"), strict=True))
    for axes, (form, quantity, title) in panels.items():
        for name, colour in COLOURS.items():
            run = numbers[form][name]
            for rate, row in zip(run["learning_rate"], run[quantity], strict=True):
                axes.plot(
                    numbers["t"],
                    row,
                    styles[rate],
                    color=colour,
                    linewidth=1.5 if form == "online" else 0.8,
                    label=f"{name}, α = {rate:g}",
                )
        axes.set_xscale("log")
        axes.set_title(title, loc="left")
    regret.set_xlim(PERIOD, config.steps)
    regret.set_ylim(0, 1)
    run = numbers["theorem 1"]
    for rate, row in zip(run["learning_rate"], run["x"], strict=True):
        theorem.plot(range(len(row)), row, styles[rate], color=RED, marker=".", markersize=4)
    theorem.set_title(f"theorem 1, C = {config.constant:g}, b1 = 0: x of Adam", loc="left")
    for axes in (online, stochastic, theorem):
        axes.set_ylim(-1.1, 1.1)
        axes.set_yticks([-1, 0, 1], ["-1 (best)", "0", "+1 (worst)"])
        axes.axhline(-1, color=GREY, linewidth=0.8, zorder=0)
        axes.axhline(1, color=GREY, linewidth=0.8, zorder=0)
    for axes in figure.axes:
        axes.set_xlabel("t")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*regret.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def run(config: Config) -> tuple[dict[str, Any], list[Claim]]:
    """The numbers, and the claims that they decide on."""
    numbers = {**figure_1(config), "theorem 1": theorem_1(config)}
    return numbers, judge(numbers, config)


def main(config: Config) -> None:
    """Runs all examples, writes JSON and picture."""
    numbers, claims = run(config)
    publish("reddi_2018", config, numbers, claims, draw(numbers, config))


if __name__ == "__main__":
    command_line("reddi_2018", Config, main)
