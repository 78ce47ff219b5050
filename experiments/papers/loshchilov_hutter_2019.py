"""Loshchilov & Hutter (2019), "Decoupled Weight Decay Regularization": AdamW against Adam with L2.

    python -m experiments.papers.loshchilov_hutter_2019

Figure 2: test error over the grid of learning rate α and decay λ. The claim: with the decay taken
out of the gradient (AdamW), the good λ do not depend on α, so that the basin of good settings is
parallel to the axes and the two can be searched one after the other; with L2 regularization they
do, and the basin lies askew. And the best setting of AdamW is no worse than that of L2.

The axes decide. Algorithm 2, with g = ∇f for AdamW and g = ∇f + λ·θ for L2, has

    θ = θ - η_t·(α·m̂/(√v̂ + eps) + λ·θ)     AdamW: λ is multiplied by the schedule η_t alone
    θ = θ - η_t·α·m̂/(√v̂ + eps)             L2

while the AdamW of torch, optax and jadam multiplies its `weight_decay` by the learning rate η_t·α.
So the paper's λ is α·weight_decay, and jadam gets λ/α here. The third column shows the same runs
over `weight_decay`: whatever is parallel to one pair of axes is askew in the other.

The numbers: in each row (α) the best λ, and the edge of the basin, which is the largest λ whose
error is within a tenth of the row's best; and how many octaves they move when α doubles, by least
squares over the rows whose best is within a quarter of the best of all: 0 where the two are
decoupled. "Decoupled" is, here, under half an octave and under half of what L2's moves.

Here: MLPs 196-64-64-10 on 1,000 images of MNIST (14x14 pixels, means of 2x2), cosine annealing
without restarts as in figure 2, tested on all 10,000 test images; the paper has a 26 2x64d ResNet
on CIFAR-10. Like the ResNet, whose batch normalization makes the size of its weights meaningless,
the first MLP normalizes (layer normalization). Such weights only turn, and in the long run AdamW's
λ alone says how fast, whatever α is: that is measured too, on weights whose gradient is noise at
right angles to them. The second MLP does not normalize. There the size of a weight has a meaning,
it settles near α/λ, and so it is the libraries' `weight_decay` that does not depend on α.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import jadam
from experiments.common.mnist.dataset import Mnist, load
from experiments.common.palette import ORANGE
from experiments.papers.grid import apply_mlp, halved, mlp, orders, product, trained
from experiments.papers.publish import RUNS, Claim, at_least, command_line, digits, publish

WITHIN = 1.1
"""The basin: an error up to this times the row's best."""
GOOD = 1.25
"""A row counts where its best is up to this times the best of all."""

TURNING = 2.0**-8
"""The λ at which the speed of turning is measured: 2,000 steps are several times 1/λ."""


@dataclass(frozen=True)
class Config:
    """AdamW against Adam with L2 regularization over learning rate and decay."""

    images: int = 1_000
    """To train on."""
    steps: int = 1_000
    """Of a batch each."""
    batch_size: int = 100
    """Images in a step."""
    hidden: int = 64
    """Units of both hidden layers."""
    rates: tuple[int, int] = (-12, -4)
    """The first and the last exponent of α = 2^k."""
    decays: tuple[int, int] = (-16, -2)
    """The first and the last exponent of λ = 2^k, in steps of 2."""
    seeds: int = 3
    """Of parameters, images and their order: 0, 1, ..."""
    out: Path = RUNS
    """The folder for JSON and pictures."""

    def __post_init__(self) -> None:
        at_least(self, steps=1, batch_size=1, hidden=1, seeds=1)
        if not self.batch_size <= self.images <= 60_000:
            raise ValueError(
                f"--images: expected {self.batch_size} (a batch) to 60000, got {self.images}"
            )
        for name, step in {"rates": 1, "decays": 2}.items():
            first, last = getattr(self, name)
            if last < first + 2 * step:
                raise ValueError(
                    f"--{name}: expected three values or more, of exponents from {first} to "
                    f"{first + 2 * step} or more, got {first} to {last}"
                )

    def grid(self) -> tuple[np.ndarray, np.ndarray]:
        """The exponents of α and of λ."""
        (first, last), (low, high) = self.rates, self.decays
        return np.arange(first, last + 1), np.arange(low, high + 1, 2)


def adam_l2(rate: Array, decay: Array, schedule: optax.Schedule) -> optax.GradientTransformation:
    """L2 regularization: λ·θ becomes a part of the gradient, and of its moments."""
    adam = jadam.adam(lambda count: rate * schedule(count))
    return optax.chain(optax.add_decayed_weights(decay), adam)


def adamw(rate: Array, decay: Array, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Algorithm 2: `weight_decay` will be multiplied by the learning rate, λ is not to be."""
    return jadam.adamw(lambda count: rate * schedule(count), weight_decay=decay / rate)


OPTIMIZERS = {"Adam with L2": adam_l2, "AdamW": adamw}
MODELS = {"normalized MLP": True, "plain MLP": False}


def final_errors(config: Config, mnist: Mnist, *, normalize: bool) -> dict[str, np.ndarray]:
    """Test error after training with each optimizer, [seeds, rates, decays]."""
    rates, decays = config.grid()
    x, labels = halved(mnist.test_images), jnp.asarray(mnist.test_labels)
    examples = {"x": halved(mnist.train_images), "labels": jnp.asarray(mnist.train_labels)}
    batches = orders(
        config.seeds, config.steps, config.batch_size, config.images, len(examples["x"])
    )
    logits = partial(apply_mlp, normalize=normalize)

    def loss(params: PyTree, batch: PyTree) -> Float[Array, ""]:
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits(params, batch["x"]), batch["labels"]
        )
        return losses.mean()

    def error(params: PyTree) -> Float[Array, ""]:
        return (logits(params, x).argmax(-1) != labels).astype(jnp.float32).mean()

    # One setting after the other: the activations of all would need gigabytes.
    test = jax.jit(lambda params: jax.lax.map(lambda seed: jax.lax.map(error, seed), params))
    found = {}
    for name, make in OPTIMIZERS.items():
        for params, _ in trained(
            loss,
            partial(make, schedule=optax.cosine_decay_schedule(1.0, config.steps)),
            lambda key: mlp(key, 196, config.hidden, config.hidden, 10),
            product(rate=2.0**rates, decay=2.0**decays),
            examples,
            batches,
            name,
        ):
            last = params
        found[name] = np.asarray(test(last)).reshape(-1, len(rates), len(decays))
    return found


def turning(name: str, rates: np.ndarray, decay: float, steps: int = 2_000) -> np.ndarray:
    """Radians a step, in the last quarter, of weights whose size has no meaning, for each α.

    The gradient of such a loss is at right angles to w and goes as 1/|w|. Here it is noise.
    """

    def walk(rate: Array) -> Float[Array, " steps"]:
        tx = OPTIMIZERS[name](rate, jnp.float32(decay), optax.constant_schedule(1.0))

        def step(state: Any, key: Array) -> tuple[Any, Array]:
            w, opt_state = state
            noise = jax.random.normal(key, w.shape)
            grads = (noise - (noise @ w) / (w @ w) * w) / jnp.linalg.norm(w)
            updates, opt_state = tx.update(grads, opt_state, w)
            moved = optax.apply_updates(w, updates)
            # |w|·|moved|·sin of the angle is exact for small angles, where arccos is not.
            cosine = w @ moved / jnp.linalg.norm(w)
            sine = jnp.linalg.norm(moved - cosine * w / jnp.linalg.norm(w))
            return (moved, opt_state), jnp.arctan2(sine, cosine)

        w = jax.random.normal(jax.random.key(0), (512,)) / jnp.sqrt(196.0)
        keys = jax.random.split(jax.random.key(1), steps)
        return jax.lax.scan(step, (w, tx.init(w)), keys)[1]

    angles = jax.jit(jax.vmap(walk))(jnp.asarray(2.0**rates, jnp.float32))
    return np.asarray(angles, np.float64)[:, -steps // 4 :].mean(1)


def best_decays(
    errors: Float[np.ndarray, "rates decays"], decays: np.ndarray
) -> Float[np.ndarray, " rates"]:
    """The exponent of the best λ of each row: the vertex of a parabola through three errors.

    They are the smallest and its neighbours; at an end of the axis it is the end itself.
    """
    found = []
    for row in errors:
        least = int(row.argmin())
        place = 0.0
        if 0 < least < len(row) - 1:
            left, middle, right = row[least - 1 : least + 2]
            place = 0.5 * (left - right) / (left - 2 * middle + right)
        found.append(decays[least] + place * (decays[1] - decays[0]))
    return np.array(found)


def edges(
    errors: Float[np.ndarray, "rates decays"], decays: np.ndarray
) -> Float[np.ndarray, " rates"]:
    """The exponent of λ up to which each row stays in the basin; NaN where it never leaves it."""
    found = []
    for row in errors:
        level = WITHIN * row.min()
        last = int(np.flatnonzero(row <= level)[-1])
        if last + 1 == len(row):
            found.append(np.nan)
            continue
        share = (level - row[last]) / (row[last + 1] - row[last])
        found.append(decays[last] + share * (decays[last + 1] - decays[last]))
    return np.array(found)


PLACES = {"best": best_decays, "edge": edges}


def octaves(errors: np.ndarray, rates: np.ndarray, places: np.ndarray) -> float:
    """By how many octaves the places move when α doubles; NaN where under three rows count."""
    counts = np.isfinite(places) & (errors.min(1) <= GOOD * errors.min())
    if counts.sum() < 3:
        return float("nan")
    return float(np.polyfit(rates[counts], places[counts], 1)[0])


def measure(config: Config, mnist: Mnist) -> dict[str, Any]:
    """Errors and the movement of the edge, of each model and optimizer."""
    rates, decays = config.grid()
    numbers: dict[str, Any] = {
        "log2_rate": rates.tolist(),
        "log2_decay": decays.tolist(),
        "turning": {name: digits(turning(name, rates, TURNING)) for name in OPTIMIZERS},
    }
    for model, normalize in MODELS.items():
        numbers[model] = {}
        for name, errors in final_errors(config, mnist, normalize=normalize).items():
            errors = np.array(digits(errors))
            mean = errors.mean(0)
            numbers[model][name] = {
                "error": errors.tolist(),
                "best_of_each_seed": digits(errors.min((1, 2))),
                "octaves": {
                    place: octaves(mean, rates, of_rows(mean, decays))
                    for place, of_rows in PLACES.items()
                },
                "octaves_by_seed": {
                    place: [octaves(seed, rates, of_rows(seed, decays)) for seed in errors]
                    for place, of_rows in PLACES.items()
                },
            }
    return numbers


def judge(numbers: dict[str, Any]) -> list[Claim]:
    """The claims of the docstring against the numbers."""
    moved = {model: {name: x["octaves"] for name, x in numbers[model].items()} for model in MODELS}
    normalized, plain = moved["normalized MLP"], moved["plain MLP"]["AdamW"]

    def decoupled(place: str, words: str) -> Claim:
        runs = numbers["normalized MLP"]
        ours, l2 = (normalized[name][place] for name in ("AdamW", "Adam with L2"))
        spread = {name: sorted(runs[name]["octaves_by_seed"][place]) for name in OPTIMIZERS}
        shown = (
            f"{name} {normalized[name][place]:+.2f} (single seeds {values[0]:+.2f} to "
            f"{values[-1]:+.2f})"
            for name, values in spread.items()
        )
        return Claim(
            f"normalized MLP: {words} does not depend on α with AdamW, and does with L2",
            f"octaves of λ for one of α: {', '.join(shown)}",
            abs(ours) < 0.5 and abs(ours) < 0.5 * abs(l2),
        )

    best = {
        name: np.array(numbers["normalized MLP"][name]["best_of_each_seed"]) for name in OPTIMIZERS
    }
    gain = best["Adam with L2"] - best["AdamW"]
    noise = 2 * gain.std(ddof=1) / np.sqrt(len(gain)) if len(gain) > 1 else 0.0
    speeds = {name: np.array(numbers["turning"][name]) for name in OPTIMIZERS}
    spread = {name: speed.max() / speed.min() for name, speed in speeds.items()}
    return [
        Claim(
            "weights whose size has no meaning: AdamW turns them at a speed that λ sets, not α",
            f"λ = 2^-8: AdamW {speeds['AdamW'].mean():.3f} radians a step; fastest over slowest "
            f"of all α: AdamW {spread['AdamW']:.2f}, L2 {spread['Adam with L2']:.1f}",
            bool(spread["AdamW"] < 1.2 and spread["Adam with L2"] > 2),
        ),
        decoupled("best", "the best λ"),
        decoupled("edge", "the edge of the good λ"),
        Claim(
            "normalized MLP: the best of AdamW is no worse than the best of L2",
            f"test error {best['AdamW'].mean():.2%} against {best['Adam with L2'].mean():.2%}, "
            f"mean of {len(gain)} seeds",
            bool(gain.mean() > -noise),
        ),
        Claim(
            "plain MLP: it is weight_decay = λ/α that does not depend on α",
            f"octaves for one of α: of AdamW's best λ {plain['best']:+.2f}, of the best "
            f"weight_decay {plain['best'] - 1:+.2f}; of the edges {plain['edge']:+.2f} and "
            f"{plain['edge'] - 1:+.2f}",
            abs(plain["best"] - 1) < 0.5 < abs(plain["best"]),
        ),
    ]


def heat(
    axes: Axes,
    errors: np.ndarray,
    rates: np.ndarray,
    decays: np.ndarray,
    shift: np.ndarray,
    **colours: Any,
) -> Any:
    """A heat map, each row moved to the right by its shift: its best, its edge, the best of all."""
    drawn = None
    for rate, row, moved in zip(rates, errors, shift, strict=True):
        ends = np.concatenate([decays - 1, decays[-1:] + 1]) + moved
        drawn = axes.pcolormesh(ends, [rate - 0.5, rate + 0.5], row[None], **colours)
    axes.plot(edges(errors, decays) + shift, rates, "o-", color="white", markeredgecolor="black")
    axes.plot(best_decays(errors, decays) + shift, rates, "d", color="black", markersize=5)
    row, column = np.unravel_index(errors.argmin(), errors.shape)
    axes.plot(
        *(decays[column] + shift[row], rates[row], "*"),
        color=ORANGE,
        markeredgecolor="black",
        markersize=16,
    )
    axes.set_yticks(rates[::2], [f"2$^{{{k}}}$" for k in rates[::2]])
    return drawn


def draw(numbers: dict[str, Any]) -> Figure:
    """A row for each model: L2, AdamW, and AdamW over the libraries' weight_decay."""
    rates, decays = (np.array(numbers[axis]) for axis in ("log2_rate", "log2_decay"))
    figure = Figure((12, 7.4), layout="constrained")
    grid = figure.subplots(2, 3, sharey=True)
    still = np.zeros(len(rates))
    for line, model in zip(grid, MODELS, strict=True):
        runs = numbers[model]
        least = min(np.mean(run["error"], 0).min() for run in runs.values())
        colours = {"cmap": "viridis_r", "vmin": 100 * least, "vmax": 200 * least}
        panels = {
            "Adam with L2, over λ": ("Adam with L2", still, 0, "λ (in the gradient)"),
            "AdamW, over the paper's λ": ("AdamW", still, 0, "λ"),
            "AdamW, over weight_decay": ("AdamW", -rates, -1, "weight_decay = λ/α"),
        }
        for axes, (title, (name, shift, less, label)) in zip(line, panels.items(), strict=True):
            errors = 100 * np.mean(runs[name]["error"], 0)
            drawn = heat(axes, errors, rates, decays, shift, **colours)
            best, edge = (runs[name]["octaves"][place] + less for place in PLACES)
            axes.set_title(
                f"{title}\noctaves for each of α: best {best:+.2f}, edge {edge:+.2f}", fontsize=11
            )
            axes.set_xlabel(label)
            ticks = np.arange(decays[0] + shift.min(), decays[-1] + shift.max() + 1, 4)
            axes.set_xticks(ticks, [f"2$^{{{int(k)}}}$" for k in ticks])
        line[0].set_ylabel(f"{model}\nlearning rate α")
        figure.colorbar(drawn, ax=line, label="test error [%]", extend="max", pad=0.01)
    return figure


def run(config: Config, mnist: Mnist) -> tuple[dict[str, Any], list[Claim]]:
    """The numbers, and the claims that they decide on."""
    numbers = measure(config, mnist)
    return numbers, judge(numbers)


def main(config: Config) -> None:
    """Trains the grids, writes JSON and picture."""
    numbers, claims = run(config, load())
    publish("loshchilov_hutter_2019", config, numbers, claims, draw(numbers))


if __name__ == "__main__":
    command_line("loshchilov_hutter_2019", Config, main)
