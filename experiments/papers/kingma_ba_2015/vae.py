"""Figure 4: Adam with and without its bias corrections, on a variational auto-encoder."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, PyTree
from matplotlib.figure import Figure

import jadam
from experiments.common.mnist.dataset import Mnist
from experiments.common.palette import GREEN, RED
from experiments.papers.publish import Claim

from .training import Task, check, grid, kept, train


@dataclass(frozen=True)
class Vae:
    """The grid of figure 4, and the auto-encoder."""

    epochs: tuple[int, int] = (2, 20)
    """Passes over the images at which the losses are compared."""
    b1: tuple[float, ...] = (0.0, 0.9)
    b2: tuple[float, ...] = (0.99, 0.999, 0.9999)
    log_learning_rates: tuple[float, ...] = (-5.0, -4.5, -4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0)
    """log10 of alpha."""
    images: int = 60_000
    pooling: int = 2
    """Pixels of an image along each side of a square that becomes one."""
    hidden: int = 64
    """Softplus units, in the encoder and in the decoder."""
    latent: int = 10
    """Dimensions of the Gaussian."""
    batch_size: int = 100
    seed: int = 0
    """Of parameters, order and noise; the next one is used too, to see what a seed changes."""

    def __post_init__(self) -> None:
        check("vae", self)
        if self.pooling not in (1, 2, 4, 7, 14, 28):
            raise ValueError(f"--vae.pooling: expected a divisor of 28, got {self.pooling}")
        if not self.epochs[0] < self.epochs[1]:
            raise ValueError(f"--vae.epochs: expected few and then more, got {self.epochs}")


STYLES = ("without bias corrections", GREEN, "s"), ("with bias corrections", RED, "o")

# 1 - b^t is 1 in float32 for every b up to .9999999, and 2^30 more steps can be counted.
LONG_AGO = 2**30


def adam(
    learning_rate: Array, is_corrected: Array, *, b1: float, b2: float
) -> optax.GradientTransformation:
    """Adam with or without bias corrections: without, its count begins at 2^30, with m = v = 0."""
    adam = jadam.adam(learning_rate, b1, b2)

    def init(params: PyTree) -> PyTree:
        return optax.tree.set(adam.init(params), count=jnp.where(is_corrected, 0, LONG_AGO))

    return optax.GradientTransformation(init, adam.update)


def layer(key: Array, inputs: int, outputs: int) -> PyTree:
    kernel = jax.nn.initializers.lecun_normal()(key, (inputs, outputs))
    return {"kernel": kernel, "bias": jnp.zeros(outputs)}


def dense(layer: PyTree, x: Float[Array, "n i"]) -> Float[Array, "n o"]:
    return x @ layer["kernel"] + layer["bias"]


def init(key: Array, pixels: int, hidden: int, latent: int) -> PyTree:
    """Kingma & Welling (2013), appendix C: one hidden layer on each side."""
    shapes = {
        "encode": (pixels, hidden),
        "mean": (hidden, latent),
        "log_variance": (hidden, latent),
        "decode": (latent, hidden),
        "logits": (hidden, pixels),
    }
    keys = jax.random.split(key, len(shapes))
    return {name: layer(key, *shapes[name]) for name, key in zip(shapes, keys, strict=True)}


def divergence(
    mean: Float[Array, "n latent"], log_variance: Float[Array, "n latent"]
) -> Float[Array, " n"]:
    """KL of N(mean, variance) from N(0, 1): ½·Σ(mean² + variance - 1 - log variance)."""
    return 0.5 * jnp.sum(mean**2 + jnp.exp(log_variance) - 1 - log_variance, axis=1)


def negative_bound(
    params: PyTree, images: Float[Array, "n pixels"], key: Array
) -> Float[Array, ""]:
    """-ELBO in nats an image: -log p(x|z) for one z of q(z|x), and KL of q(z|x) from p(z)."""
    h = jax.nn.softplus(dense(params["encode"], images))
    mean, log_variance = dense(params["mean"], h), dense(params["log_variance"], h)
    z = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
    logits = dense(params["logits"], jax.nn.softplus(dense(params["decode"], z)))
    surprise = optax.sigmoid_binary_cross_entropy(logits, images).sum(axis=1)
    return jnp.mean(surprise + divergence(mean, log_variance))


def pooled(images: np.ndarray, size: int) -> Float[np.ndarray, "n pixels"]:
    """Means of squares of pixels, from 0 to 1."""
    n, side = len(images), 28 // size
    blocks = images.reshape(n, side, size, side, size).astype(np.float32)
    return blocks.mean(axis=(2, 4)).reshape(n, -1) / 255


def task(config: Vae, mnist: Mnist) -> Task:
    images = pooled(mnist.train_images[: config.images], config.pooling)
    key = jax.random.key(config.seed)
    params = init(key, images.shape[1], config.hidden, config.latent)
    return Task(negative_bound, params, jnp.asarray(images), config.batch_size)


def uninformed(images: Float[np.ndarray, "n pixels"]) -> float:
    """The loss of the best model without a latent variable: each pixel's mean."""
    p = images.mean(axis=0, dtype=np.float64).clip(1e-12, 1 - 1e-12)
    return float(-(p * np.log(p) + (1 - p) * np.log(1 - p)).sum())


Losses = Float[np.ndarray, "epochs b1 b2 alpha 2"]
"""Of each setting, last without and with corrections."""


def compare(config: Vae, task: Task, parts: Path) -> Losses:
    """The losses of the grid."""
    panels = [panel(config, task, parts, b1, b2) for b1, b2 in product(config.b1, config.b2)]
    losses = np.stack(panels, axis=1)
    return losses.reshape(-1, len(config.b1), len(config.b2), *losses.shape[2:])


def panel(
    config: Vae, task: Task, parts: Path, b1: float, b2: float
) -> Float[np.ndarray, "epochs alpha 2"]:
    """The losses of every α with one b1 and b2: a part."""
    rates = tuple(10.0**x for x in config.log_learning_rates)
    settings = grid(learning_rate=rates, is_corrected=(0.0, 1.0))
    make, label = partial(adam, b1=b1, b2=b2), f"b1 = {b1:g}, b2 = {b2:g}"
    run = partial(train, task, make, settings, config.epochs[-1], config.seed, label)
    path = parts / f"{b1:g}_{b2:g}_{config.seed}.json"
    return kept(path, {**asdict(config), "panel": [b1, b2]}, run).reshape(-1, len(rates), 2)


def noise(config: Vae, mnist: Mnist, parts: Path, losses: Losses) -> float:
    """How far the lowest losses of the last panel are from those with another seed, as a share."""
    other = replace(config, seed=config.seed + 1)
    again = panel(other, task(other, mnist), parts, config.b1[-1], config.b2[-1])
    at = np.array(config.epochs) - 1
    lowest, known = (np.nanmin(x[at], axis=1) for x in (again, losses[:, -1, -1]))
    return float(np.abs(lowest / known - 1).max())


def is_ruined(losses: Losses, uninformed: float) -> Bool[np.ndarray, "... alpha"]:
    """Where a setting learns with corrections, and without them not even the pixels' means."""
    without, corrected = np.nan_to_num(losses, nan=np.inf)[..., 0], losses[..., 1]
    return (corrected < uninformed) & (without >= uninformed)


def claims(config: Vae, losses: Losses, uninformed: float, noise: float) -> list[Claim]:
    """What section 6.4 says of the corrections; losses that differ by the noise count as equal."""
    few, more = at = np.nan_to_num(losses[np.array(config.epochs) - 1], nan=np.inf)
    ruined = is_ruined(at, uninformed).sum(axis=(1, 3)).tolist()
    of = len(config.b1) * len(config.log_learning_rates)
    b2 = f"b2 = {listing(config.b2)}"
    best = more.min(axis=(0, 2))
    place = np.unravel_index(more.argmin(), more.shape)
    lowest = at.min(axis=3)
    ahead = float((lowest[..., 1] / lowest[..., 0]).max()) - 1
    behind = (at[..., 1] > at[..., 0] * (1 + noise)).sum(axis=(1, 2, 3)).tolist()
    return [
        Claim(
            "Without corrections b2 close to 1 makes training unstable",
            f"settings that learn with corrections and nothing without, {b2}: "
            f"{listing(ruined[0])} of {of} each after {config.epochs[0]} passes",
            ruined[0][-1] > ruined[0][0],
        ),
        Claim(
            "... especially in the first passes",
            f"{listing(ruined[1])} after {config.epochs[1]} passes",
            ruined[0][-1] > ruined[1][-1],
        ),
        Claim(
            "The best result has corrections and b2 close to 1",
            f"lowest loss after {config.epochs[1]} passes, {b2}: with corrections "
            f"{listing(best[:, 1])}, without {listing(best[:, 0])}; another seed moves it by "
            f"{noise:.1%}",
            bool(place[-1] == 1 and place[1] > 0),
        ),
        Claim(
            "With corrections it is equal or better at every b1 and b2, each at its best α",
            f"the loss is at most {ahead:.1%} above that without",
            ahead <= noise,
        ),
        Claim(
            "... and at every α",
            f"it is more than {noise:.1%} above that without at {behind[0]} of {few[..., 0].size} "
            f"settings after {config.epochs[0]} passes, {behind[1]} after {config.epochs[1]}",
            not any(behind),
        ),
    ]


def listing(values: Iterable[float]) -> str:
    return ", ".join(f"{x:.4g}" for x in values)


def picture(config: Vae, losses: Losses, uninformed: float) -> Figure:
    """Losses over log10 α; what learns nothing or is not finite lies on the dotted line."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    floor = np.nanmin(losses)
    margin = 0.06 * (uninformed - floor)
    for part, epochs in zip(figure.subfigures(1, 2), config.epochs, strict=True):
        part.suptitle(f"after {epochs} passes", weight="bold")
        grid = part.subplots(len(config.b1), len(config.b2), sharex=True, sharey=True)
        for (i, b1), (j, b2) in product(enumerate(config.b1), enumerate(config.b2)):
            ax = grid[i, j]
            ax.axhline(uninformed, color="0.5", lw=1, ls=":")
            for corrected, (name, color, marker) in enumerate(STYLES):
                loss = np.nan_to_num(losses[epochs - 1, i, j, :, corrected], nan=np.inf)
                style = {"color": color, "marker": marker, "ms": 4, "lw": 1.6, "label": name}
                ax.plot(config.log_learning_rates, loss.clip(max=uninformed), **style)
            ax.set(ylim=(floor - margin, uninformed + margin))
            ax.set_title(f"β₁ = {b1:g}, β₂ = {b2:g}", fontsize=10)
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(alpha=0.25)
        for ax in grid[-1]:
            ax.set_xlabel("log₁₀ α")
        for ax in grid[:, 0]:
            ax.set_ylabel("loss in nats")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure
