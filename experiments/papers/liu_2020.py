"""Liu et al. (2020), "On the Variance of the Adaptive Learning Rate and Beyond": RAdam.

    python -m experiments.papers.liu_2020

The claims, and what is measured of each:

- Section 3, theorem 1, and section 5.3 with its figures of simulations: Adam's adaptive learning
  rate ψ_t = √((1-b2ᵗ)/((1-b2)·Σ b2ᵗ⁻ⁱ·g_i²)) of Gaussian gradients varies much in the first steps.
  It goes as 1/√χ² with ρ_t degrees of freedom, so that Var[ψ] = ρ/(ρ-2) - ρ·2^(2ρ-5)/π·B², with
  B = B((ρ-1)/2, (ρ-1)/2), about ρ/(2(ρ-2)(ρ-4)); infinite up to ρ = 4. Here: by simulation.
- Section 4: the rectification r_t makes Var[r_t·ψ_t] the same at every step. Here: r_t is what
  `jadam.radam` does along a constant gradient, times the simulated ψ_t.
- Figures 1 and 6: without warm-up Adam is caught in a bad optimum, with warm-up it is not, and
  RAdam needs none; RAdam is also less sensitive to the learning rate.

The training: the paper's case that fails is a Transformer with the normalization after the residual
sum, on translation. Here a small one (8 layers, width 32, 4 heads) reads the rows of MNIST's images
(14x14 pixels) and names the digit; 400 steps of 32 images, b2 = .999, a linear warm-up of 100 steps
for the Adam that has one.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree
from matplotlib.figure import Figure
from scipy.special import betaln

import jadam
from experiments.common.mnist.dataset import Mnist, load
from experiments.common.palette import BLACK, BLUE, GREEN, GREY, RED
from experiments.papers.grid import halved, orders, product, trained
from experiments.papers.publish import RUNS, Claim, at_least, command_line, digits, publish

B2 = 0.999
HEADS, ROWS, PIXELS = 4, 14, 14
COLOURS = {"Adam": RED, "Adam with warm-up": GREEN, "RAdam": BLUE}


@dataclass(frozen=True)
class Config:
    """RAdam without warm-up against Adam without and with."""

    steps: int = 400
    """Of a batch each."""
    batch_size: int = 32
    """Images in a step."""
    warmup: int = 100
    """Steps in which the learning rate of the one Adam rises."""
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3)
    """Learning rates, each after the warm-up."""
    layers: int = 8
    """Of the Transformer."""
    width: int = 32
    """Of the Transformer, a multiple of 4."""
    seeds: int = 3
    """Of parameters and the order of the images: 0, 1, ..."""
    samples: int = 20_000
    """Sequences of Gaussian gradients in the simulation of ψ."""
    last: int = 2_000
    """The last t of the simulation."""
    out: Path = RUNS
    """The folder for JSON and pictures."""

    def __post_init__(self) -> None:
        at_least(self, steps=10, batch_size=1, warmup=1, layers=1, seeds=1, samples=100, last=10)
        if self.width < HEADS or self.width % HEADS:
            raise ValueError(f"--width: expected a multiple of {HEADS}, got {self.width}")


# ------------------------------------------------------------------------ the variance of ψ


def sma_length(t: np.ndarray, b2: float = B2) -> np.ndarray:
    """ρ_t of algorithm 2, in float64."""
    return 2 / (1 - b2) - 1 - 2 * t * b2**t / (1 - b2**t)


def variance(rho: np.ndarray) -> np.ndarray:
    """Theorem 1's Var[ψ] for σ = 1 and ρ > 4."""
    log_mean = np.log(rho) / 2 + (rho - 2.5) * math.log(2) - math.log(math.pi) / 2
    mean = np.exp(log_mean + betaln((rho - 1) / 2, (rho - 1) / 2))
    return rho / (rho - 2) - mean**2


def approximate_variance(rho: np.ndarray) -> np.ndarray:
    """Section 3's first-order Var[ψ]."""
    return rho / (2 * (rho - 2) * (rho - 4))


def simulated_variance(config: Config, kept: np.ndarray) -> np.ndarray:
    """Var[ψ_t] of Gaussian gradients at the kept t."""
    rng = np.random.default_rng(0)
    v, found = np.zeros(config.samples), []
    for t in range(1, kept[-1] + 1):
        v = B2 * v + (1 - B2) * rng.standard_normal(config.samples) ** 2
        if t in kept:
            found.append(np.sqrt((1 - B2**t) / v).var())
    return np.array(found)


def rectifications(steps: int) -> np.ndarray:
    """r_t of `jadam.radam`, 0 where it leaves ψ out: its step along gradients of 2 is r_t, or 2."""
    tx = jadam.radam(1.0, b2=B2, eps=0.0)

    def step(state: Any, _: None) -> tuple[Any, Array]:
        updates, state = tx.update(jnp.float32(2), state)
        return state, -updates

    run = jax.jit(lambda state: jax.lax.scan(step, state, length=steps)[1])
    sizes = np.asarray(run(tx.init(jnp.float32(0))), np.float64)
    return np.where(sizes > 1.5, 0, sizes)


def adaptive_rate(config: Config) -> dict[str, Any]:
    """Var[ψ_t] by simulation and by both equations, and Var[r_t·ψ_t]."""
    kept = np.unique(np.geomspace(1, config.last, 80).astype(int))
    simulated, r = simulated_variance(config, kept), rectifications(config.last)[kept - 1]
    rho = sma_length(kept.astype(float))
    known = rho > 4.5  # below, the variance is infinite or all but
    nothing = np.full(len(kept), np.nan)
    exact, first_order = nothing.copy(), nothing.copy()
    exact[known] = variance(rho[known])
    first_order[known] = approximate_variance(rho[known])
    return {
        "t": kept.tolist(),
        "rho": digits(rho),
        "simulated": digits(simulated),
        "theorem_1": listed(exact),
        "first_order": listed(first_order),
        "r": digits(r),
        "rectified": listed(np.where(r > 0, r**2 * simulated, np.nan)),
        "limit": float(variance(np.array([2 / (1 - B2) - 1]))[0]),
    }


def listed(x: np.ndarray) -> list[float | None]:
    """For JSON, which has no NaN."""
    return [None if np.isnan(value) else value for value in digits(x)]


# ------------------------------------------------------------------------ the training


def initial(key: Array, config: Config) -> PyTree:
    """Glorot's uniform initialization."""
    glorot, width, layers = jax.nn.initializers.glorot_uniform(), config.width, config.layers
    keys = iter(jax.random.split(key, 7))

    def stacked(*shape: int) -> Array:
        return jax.vmap(lambda key: glorot(key, shape))(jax.random.split(next(keys), layers))

    return {
        "embed": glorot(next(keys), (PIXELS, width)),
        "position": 0.1 * jax.random.normal(next(keys), (ROWS, width)),
        "layers": {
            "qkv": stacked(width, 3 * width),
            "out": stacked(width, width),
            "up": stacked(width, 2 * width),
            "down": stacked(2 * width, width),
        },
        "head": glorot(next(keys), (width, 10)),
    }


def block(x: Float[Array, "n rows width"], layer: PyTree) -> tuple[Array, None]:
    """norm(x + attention(x)), then norm(x + mlp(x)): the normalization comes after the sum.

    It has no parameters of its own here.
    """
    n, rows, width = x.shape
    qkv = (x @ layer["qkv"]).reshape(n, rows, 3 * HEADS, width // HEADS)
    q, k, v = jnp.split(qkv, 3, axis=2)
    attention = jax.nn.dot_product_attention(q, k, v).reshape(n, rows, width)
    x = jax.nn.standardize(x + attention @ layer["out"])
    return jax.nn.standardize(x + jax.nn.relu(x @ layer["up"]) @ layer["down"]), None


def loss_of(params: PyTree, batch: PyTree) -> Float[Array, ""]:
    """The mean cross entropy."""
    x = batch["x"].reshape(-1, ROWS, PIXELS) @ params["embed"] + params["position"][None]
    x, _ = jax.lax.scan(block, x, params["layers"])
    logits = x.mean(1) @ params["head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()


def contender(number: Array, rate: Array, warmup: int) -> optax.GradientTransformation:
    """The optimizer that stands at this place in COLOURS: one program then trains all at once.

    Adam and RAdam have the same state, and make the same moments of it.
    """
    _, warm, rectified = (number == place for place in range(len(COLOURS)))

    def schedule(count: Array) -> Array:
        return rate * jnp.where(warm, jnp.minimum((count + 1.0) / warmup, 1.0), 1.0)

    adam, radam = jadam.adam(schedule), jadam.radam(schedule)

    def update(grads: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        ours, _ = radam.update(grads, state, params)
        theirs, state = adam.update(grads, state, params)
        return jax.tree.map(lambda x, y: jnp.where(rectified, x, y), ours, theirs), state

    return optax.GradientTransformation(adam.init, update)


def losses(config: Config, mnist: Mnist) -> dict[str, np.ndarray]:
    """Training losses of each optimizer, [steps, seeds, rates]."""
    examples = {"x": halved(mnist.train_images), "labels": jnp.asarray(mnist.train_labels)}
    count = len(examples["x"])
    parts = trained(
        loss_of,
        partial(contender, warmup=config.warmup),
        lambda key: initial(key, config),
        product(number=np.arange(len(COLOURS)), rate=np.array(config.rates)),
        examples,
        orders(config.seeds, config.steps, config.batch_size, count, count),
        "liu_2020",
    )
    found = np.concatenate([part for _, part in parts])
    return dict(zip(COLOURS, np.split(found, len(COLOURS), axis=2), strict=True))


def measure(config: Config, mnist: Mnist) -> dict[str, Any]:
    """The variance, the curves (means over fortieths of the training), and the final losses."""
    found = losses(config, mnist)
    pieces = np.array_split(np.arange(config.steps), min(40, config.steps))
    return {
        "adaptive_rate": adaptive_rate(config),
        "training": {
            "step": [int(piece[-1]) + 1 for piece in pieces],
            "rates": list(config.rates),
            **{
                name: {
                    "curve": digits(np.stack([run[piece].mean(0) for piece in pieces])),
                    "final": digits(run[-max(1, config.steps // 10) :].mean(0)),
                }
                for name, run in found.items()
            },
        },
    }


def largest_rate(training: dict[str, Any]) -> int:
    """The place of the largest learning rate at which Adam with warm-up ends near its best."""
    final = np.array(training["Adam with warm-up"]["final"]).mean(0)
    return int(np.flatnonzero(final <= 1.5 * final.min())[-1])


def judge(numbers: dict[str, Any]) -> list[Claim]:
    """The paper's claims against the numbers."""
    rate, training = numbers["adaptive_rate"], numbers["training"]
    t = np.array(rate["t"])
    exact = np.array(rate["theorem_1"], float)
    simulated, rectified = np.array(rate["simulated"]), np.array(rate["rectified"], float)
    # ψ⁴, and with it the spread of a simulated variance, has a mean from ρ > 4 on only.
    steady = np.array(rate["rho"]) >= 8
    known = steady & np.isfinite(exact)
    off = np.abs(simulated / exact - 1)[known].max()
    flat = rectified[known]
    fell = simulated[known]
    final = {name: np.array(training[name]["final"]).mean(0) for name in COLOURS}
    worst = {name: values.max() / values.min() for name, values in final.items()}
    large = largest_rate(training)

    def shown(values: dict[str, float]) -> str:
        return ", ".join(f"{name} {value:.2f}" for name, value in values.items())

    at_large = {name: values[large] for name, values in final.items()}
    best = {name: values.min() for name, values in final.items()}
    rate_words = (
        f"at {training['rates'][large]:g}, the largest rate at which warm-up lets Adam learn"
    )
    return [
        Claim(
            "Var[ψ_t] falls as theorem 1 says",
            f"from {fell[0]:.3f} at t = {t[known][0]} to {fell[-1]:.5f} at t = {t[-1]}; "
            f"simulation within {off:.0%} of theorem 1",
            bool(off < 0.25 and fell[0] > 10 * fell[-1]),
        ),
        Claim(
            "r_t makes it constant",
            f"Var[r_t·ψ_t] from {flat.min():.5f} to {flat.max():.5f}",
            bool(flat.max() < 2 * flat.min()),
        ),
        Claim(
            f"{rate_words}, Adam without is caught",
            f"training loss: {shown(at_large)}",
            bool(at_large["Adam with warm-up"] < 0.8 * at_large["Adam"]),
        ),
        Claim(
            "RAdam needs no warm-up there: its loss is at most a quarter more",
            f"training loss: {shown(at_large)}",
            bool(at_large["RAdam"] < 1.25 * at_large["Adam with warm-up"]),
        ),
        Claim(
            "each at its best learning rate: RAdam's loss is at most a tenth more",
            f"training loss: {shown(best)}",
            bool(best["RAdam"] < 1.1 * best["Adam with warm-up"]),
        ),
        Claim(
            "RAdam is less sensitive to the learning rate",
            f"worst over best loss of all rates: {shown(worst)}",
            bool(worst["RAdam"] < worst["Adam"] and worst["RAdam"] < worst["Adam with warm-up"]),
        ),
    ]


def draw(numbers: dict[str, Any]) -> Figure:
    """The variance, its rectification, loss curves and the loss over the learning rate."""
    figure = Figure((11, 7.2), layout="constrained")
    (variances, rectified), (curves, finals) = figure.subplots(2, 2)
    rate, training = numbers["adaptive_rate"], numbers["training"]
    t = rate["t"]

    def column(name: str) -> np.ndarray:
        return np.array(rate[name], float)

    variances.loglog(t, column("simulated"), "o", color=GREY, markersize=4, label="simulated")
    variances.loglog(t, column("theorem_1"), color=BLACK, label="theorem 1")
    variances.loglog(t, column("first_order"), "--", color=RED, label="first order")
    variances.set_title("Var[ψ_t], the adaptive learning rate's", loc="left")
    variances.set_ylim(1e-4, 10)
    rectified.loglog(t, column("simulated"), color=GREY, label="Adam: Var[ψ_t]")
    rectified.loglog(t, column("rectified"), color=BLUE, label="RAdam: Var[r_t·ψ_t]")
    rectified.axhline(rate["limit"], color=BLACK, linestyle=":", label="t without end")
    rectified.set_title("rectified by jadam.radam's r_t", loc="left")
    rectified.set_ylim(1e-4, 10)
    for axes in (variances, rectified):
        axes.set_xlabel("t")
        axes.legend()

    rates = training["rates"]
    large = largest_rate(training)
    for name, colour in COLOURS.items():
        curve = np.array(training[name]["curve"])[:, :, large]
        curves.plot(training["step"], curve, color=colour, linewidth=0.7, alpha=0.6)
        curves.plot(training["step"], curve.mean(1), color=colour, linewidth=2, label=name)
        final = np.array(training[name]["final"])
        finals.plot(rates, final.mean(0), "o-", color=colour, label=name)
        for place, values in zip(rates, final.T, strict=True):
            finals.plot(np.full(len(values), place), values, ".", color=colour, alpha=0.6)
    seeds = len(training["Adam"]["final"])
    curves.set_title(f"training loss, learning rate {rates[large]:g}, {seeds} seeds", loc="left")
    curves.set_xlabel("step")
    finals.set_title("training loss at the end", loc="left")
    finals.set_xscale("log")
    finals.set_xticks(rates, [f"{value:g}" for value in rates])
    finals.minorticks_off()
    finals.set_xlabel("learning rate")
    for axes in (curves, finals):
        axes.set_ylim(0)
        axes.legend()
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def run(config: Config, mnist: Mnist) -> tuple[dict[str, Any], list[Claim]]:
    """The numbers, and the claims that they decide on."""
    numbers = measure(config, mnist)
    return numbers, judge(numbers)


def main(config: Config) -> None:
    """Simulates, trains, writes JSON and picture."""
    numbers, claims = run(config, load())
    publish("liu_2020", config, numbers, claims, draw(numbers))


if __name__ == "__main__":
    command_line("liu_2020", Config, main)
