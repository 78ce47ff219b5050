"""How long a step of Adam can be: the bound of Cauchy and Schwarz, attained.

    python -m experiments.papers.step_bound

Kingma & Ba (2015), section 2.1, give |update| <= α·(1-b1)/√(1-b2), 3.162·α at the default b1 and
b2, "in the most severe case of sparsity": one gradient after many zeros. For m and v as they are,
without eps and for every sequence of gradients, Cauchy and Schwarz give

    |update_t|/α <= (1-b1)/(1-b1ᵗ) · √((1-b2ᵗ)/(1-b2)) · √(Σ_{k<t} (b1²/b2)ᵏ)

since m = (1-b1)·Σ b1ᵏ·g = (1-b1)·Σ (b1/√b2)ᵏ · √b2ᵏ·g. It is 1 at t = 1 and 7.270 in the limit,
and is attained by gradients that grow as g_s = (b2/b1)ˢ: 3.162 is not a maximum.

Claims: `jadam.adam` attains the bound along that sequence to float32's rounding; along no sequence
tried, of noise, of heavy tails, sparse ones, over 30 decades, is it above; nor with moments in 8
bits.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from rich.progress import track

import jadam
from experiments.common.palette import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY
from experiments.papers.publish import RUNS, Claim, at_least, command_line, digits, publish

B1, B2 = 0.9, 0.999
BLOCK = 128
ATTAINING = "gradients ∝ (b2/b1)ˢ"
STORAGES = {
    "float32 moments": {},
    "8-bit moments": {"mu_dtype": "int8", "nu_dtype": "uint8", "min_size": 0},
}
# float32 rounds m and v by an ulp or two in each step.
SLACK = 1 + 1e-5


@dataclass(frozen=True)
class Config:
    """Adam's longest steps."""

    steps: int = 10_000
    """The last t."""
    points: int = 10
    """Values of t in each decade, for which the attaining sequence is run."""
    rows: int = 8
    """Of 128 random sequences each, of every kind."""
    seed: int = 0
    """Of the random sequences."""
    out: Path = RUNS
    """The folder for JSON and pictures."""

    def __post_init__(self) -> None:
        at_least(self, steps=10, points=1, rows=1)


def bound(t: np.ndarray, b1: float = B1, b2: float = B2) -> np.ndarray:
    """The largest |update|/α at step t, in float64."""
    powers = (1 - (b1 * b1 / b2) ** t) / (1 - b1 * b1 / b2)
    return (1 - b1) / (1 - b1**t) * np.sqrt((1 - b2**t) / (1 - b2) * powers)


def limit(b1: float = B1, b2: float = B2) -> float:
    """The bound for t without end."""
    return (1 - b1) / math.sqrt((1 - b2) * (1 - b1 * b1 / b2))


Gradients = Callable[[jax.Array], jax.Array]
"""From a step t = 1, 2, ... to gradients float32[rows, 128]."""


def attaining(goals: np.ndarray) -> Gradients:
    """(b2/b1)^(t - goal), a row for each goal: 1 when it gets there, and not larger after."""
    goals = jnp.repeat(jnp.asarray(goals, jnp.int32)[:, None], BLOCK, axis=1)
    growth = math.log(B2 / B1)
    return lambda t: jnp.exp(jnp.minimum(t - goals, 0).astype(jnp.float32) * growth)


def fixed_sequences(rows: int) -> dict[str, Gradients]:
    """Constant gradients, and one gradient after many zeros, at another step in each element."""
    first = np.unique(np.geomspace(1, 10_000, rows * BLOCK).astype(int))
    first = jnp.asarray(np.resize(first, (rows, BLOCK)))
    return {
        "constant": lambda t: jnp.ones((rows, BLOCK)),
        "one gradient after zeros": lambda t: (t == first).astype(jnp.float32),
    }


def random_sequences(rows: int, seed: int) -> dict[str, Gradients]:
    """Noise of several kinds."""
    shape, key = (rows, BLOCK), jax.random.key(seed)

    def draw(sample: Callable[..., jax.Array]) -> Gradients:
        return lambda t: sample(jax.random.fold_in(key, t), shape)

    def sizes(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        size, sign = jax.random.split(key)
        decades = jax.random.uniform(size, shape, minval=-15, maxval=15)
        return 10.0**decades * jax.random.rademacher(sign, shape, jnp.float32)

    def sparse(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        there, value = jax.random.split(key)
        present = jax.random.bernoulli(there, 0.003, shape)
        return jnp.where(present, jax.random.normal(value, shape), 0)

    return {
        "normal": draw(jax.random.normal),
        "Cauchy": draw(jax.random.cauchy),
        "sparse": draw(sparse),
        "over 30 decades": draw(sizes),
    }


def sizes_of_updates(
    sequences: dict[str, Gradients], steps: int, storage: dict[str, Any]
) -> dict[str, np.ndarray]:
    """|update|/α of each row's longest, [steps, rows], by jadam without eps, all in one scan."""
    tx = jadam.adam(1.0, B1, B2, eps=0.0, **storage)
    first = {name: gradients(jnp.int32(1)) for name, gradients in sequences.items()}
    ends = np.cumsum([len(rows) for rows in first.values()])[:-1]

    def step(state: Any, t: jax.Array) -> tuple[Any, jax.Array]:
        grads = jnp.concatenate([gradients(t) for gradients in sequences.values()])
        updates, state = tx.update(grads, state)
        return state, jnp.abs(updates).max(1)

    state = tx.init(jnp.concatenate(list(first.values())))
    run = jax.jit(lambda state: jax.lax.scan(step, state, jnp.arange(1, steps + 1))[1])
    sizes = np.asarray(run(state), np.float64)
    return dict(zip(sequences, np.split(sizes, ends, axis=1), strict=True))


def measure(config: Config) -> dict[str, Any]:
    """The bound at the goals, what attains it, and the largest step of each kind between them."""
    exponents = np.arange(0, math.log10(config.steps), 1 / config.points)
    goals = np.union1d((10**exponents).round().astype(int), [config.steps])
    bounds = bound(np.arange(1, config.steps + 1))
    numbers: dict[str, Any] = {
        "t": goals.tolist(),
        "bound": digits(bounds[goals - 1], 7),
        "limit": limit(),
        "kingma_ba_section_2_1": (1 - B1) / math.sqrt(1 - B2),
    }
    sequences = {
        ATTAINING: attaining(goals),
        **fixed_sequences(config.rows),
        **random_sequences(config.rows, config.seed),
    }
    for name, storage in track(STORAGES.items(), "step_bound", transient=True):
        sizes = sizes_of_updates(sequences, config.steps, storage)
        numbers[name] = {
            kind: {
                # The largest since the goal before, so that no peak is lost in the picture.
                "largest": digits([part.max() for part in np.split(found, goals[:-1])], 7),
                "largest_over_bound": float((found.max(1) / bounds).max()),
            }
            for kind, found in sizes.items()
        }
        at_goals = sizes[ATTAINING][goals - 1, np.arange(len(goals))]
        numbers[name][ATTAINING]["at_goal"] = digits(at_goals, 7)
    return numbers


def judge(numbers: dict[str, Any]) -> list[Claim]:
    """The claims of the docstring against the numbers."""
    goals, bounds = np.array(numbers["t"]), np.array(numbers["bound"])
    attained = np.array(numbers["float32 moments"][ATTAINING]["at_goal"])
    named = np.flatnonzero(np.isin(goals, (1, 100, 1000)))
    short = float(np.abs(attained / bounds - 1).max())
    claims = [
        Claim(
            "the growing gradients attain the bound at every t, in float32",
            ", ".join(f"{attained[i]:.3f} at t = {goals[i]}" for i in named)
            + f"; off by {short:.0e} at most; {numbers['limit']:.3f} in the limit",
            short < 1e-5,
        ),
        Claim(
            "so (1-b1)/√(1-b2) of section 2.1 is not the largest step",
            f"{numbers['kingma_ba_section_2_1']:.3f} against {attained.max():.3f}",
            bool(attained.max() > numbers["kingma_ba_section_2_1"]),
        ),
    ]
    for name in STORAGES:
        over = {kind: run["largest_over_bound"] for kind, run in numbers[name].items()}
        worst = max(over, key=over.__getitem__)
        claims.append(
            Claim(
                f"{name}: no step is above the bound",
                f"largest step over bound {over[worst]:.6f} ({worst})",
                over[worst] <= SLACK,
            )
        )
    return claims


COLOURS = {
    "constant": GREY,
    "one gradient after zeros": ORANGE,
    "normal": BLUE,
    "Cauchy": GREEN,
    "sparse": PINK,
    "over 30 decades": SKY,
}


def draw(numbers: dict[str, Any]) -> Figure:
    """The bound, what attains it, and the largest steps of the other sequences."""
    figure = Figure((10, 4.8), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2, sharey=True), STORAGES, strict=True):
        t, found = numbers["t"], numbers[name]
        axes.plot(t, numbers["bound"], color=BLACK, label="bound", zorder=3)
        axes.plot(
            *(t, found[ATTAINING]["at_goal"], "o"),
            color=RED,
            markersize=4,
            label=ATTAINING,
            zorder=4,
        )
        for kind, colour in COLOURS.items():
            axes.plot(t, found[kind]["largest"], color=colour, label=kind)
        axes.axhline(numbers["limit"], color=BLACK, linestyle=":", linewidth=1)
        axes.axhline(numbers["kingma_ba_section_2_1"], color=ORANGE, linestyle=":", linewidth=1)
        axes.set_xscale("log")
        axes.set_title(f"jadam, {name}", loc="left")
        axes.set_xlabel("step t")
        axes.spines[["top", "right"]].set_visible(False)
    first = figure.axes[0]
    first.set_ylim(0, 7.8)
    first.set_ylabel("|update| / learning rate")
    first.annotate(
        f"limit {numbers['limit']:.3f}", (1, numbers["limit"]), (2, 3), textcoords="offset points"
    )
    quoted = numbers["kingma_ba_section_2_1"]
    first.annotate(
        f"(1-b1)/√(1-b2) = {quoted:.3f}", (1, quoted), (2, 3), textcoords="offset points"
    )
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def run(config: Config) -> tuple[dict[str, Any], list[Claim]]:
    """The numbers, and the claims that they decide on."""
    numbers = measure(config)
    return numbers, judge(numbers)


def main(config: Config) -> None:
    """Runs every sequence, writes JSON and picture."""
    numbers, claims = run(config)
    publish("step_bound", config, numbers, claims, draw(numbers))


if __name__ == "__main__":
    command_line("step_bound", Config, main)
