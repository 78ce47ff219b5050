"""Figure 1 (left): multi-class logistic regression on MNIST, with α/√t."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree
from matplotlib.figure import Figure

import jadam
from experiments.common.mnist.dataset import Mnist
from experiments.common.palette import BLUE, GREEN, RED
from experiments.papers.publish import Claim

from .comparison import Contender, Found, draw
from .training import Task, check, grid


@dataclass(frozen=True)
class Logistic:
    """784-10 with L2 decay."""

    epochs: int = 45
    images: int = 60_000
    decay: float = 1e-4
    """λ of the penalty λ/2·|w|²; the paper has one, and does not say which."""
    batch_size: int = 128
    seed: int = 0
    """Of the images' order: the problem is convex, and starts at 0."""

    def __post_init__(self) -> None:
        check("logistic", self)


Make = Callable[..., optax.GradientTransformation]


def annealed(make: Make) -> Make:
    """The same with α/√t."""

    def annealed_make(learning_rate: Array, **options: Array) -> optax.GradientTransformation:
        return make(lambda count: learning_rate / jnp.sqrt(count + 1.0), **options)

    return annealed_make


RATES = tuple(10 ** (k / 4) for k in range(-8, 5))
adagrad = partial(optax.adagrad, initial_accumulator_value=0.0)
CONTENDERS = {
    "AdaGrad": Contender(annealed(adagrad), grid(learning_rate=RATES), GREEN),
    "AdaGrad, α constant": Contender(adagrad, grid(learning_rate=RATES), GREEN, ":"),
    "SGD Nesterov": Contender(
        annealed(partial(optax.sgd, nesterov=True)),
        grid(learning_rate=RATES, momentum=(0.9, 0.99)),
        BLUE,
        "--",
    ),
    "Adam": Contender(annealed(jadam.adam), grid(learning_rate=RATES), RED),
}


def loss(params: PyTree, batch: tuple[Array, Array], key: Array, decay: float) -> Array:
    """Cross-entropy and penalty."""
    del key
    pixels, labels = batch
    logits = pixels @ params["kernel"] + params["bias"]
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return cross_entropy.mean() + decay / 2 * jnp.sum(params["kernel"] ** 2)


def task(config: Logistic, mnist: Mnist) -> Task:
    images = mnist.train_images[: config.images].reshape(config.images, -1)
    examples = (
        jnp.asarray(images / np.float32(255)),
        jnp.asarray(mnist.train_labels[: config.images]),
    )
    params = {"kernel": jnp.zeros((784, 10)), "bias": jnp.zeros(10)}
    return Task(partial(loss, decay=config.decay), params, examples, config.batch_size)


def claims(curves: Mapping[str, Float[np.ndarray, " epochs"]]) -> list[Claim]:
    """Section 6.1, also against the AdaGrad that is annealed by its own sum alone."""
    adam, nesterov = curves["Adam"], curves["SGD Nesterov"]
    found = []
    for name in ("AdaGrad", "AdaGrad, α constant"):
        peer = curves[name]
        apart = abs(adam[-1] - nesterov[-1])
        ahead = peer[-1] - max(adam[-1], nesterov[-1])
        found.append(
            Claim(
                f"Adam and SGD Nesterov converge alike: they end nearer to each other than to "
                f"{name}",
                f"last cost: Adam {adam[-1]:.4f}, SGD Nesterov {nesterov[-1]:.4f}, {name} "
                f"{peer[-1]:.4f}",
                bool(apart < ahead),
            )
        )
        passes = [passes_to(curve, peer[-1]) for curve in (adam, nesterov)]
        found.append(
            Claim(
                f"Both converge faster than {name}: they need half its passes at most",
                f"{peer[-1]:.4f}, {name}'s cost in pass {len(peer)}, is reached in pass "
                f"{passes[0] or '-'} by Adam and {passes[1] or '-'} by SGD Nesterov",
                all(p is not None and p <= len(peer) / 2 for p in passes),
            )
        )
    return found


def passes_to(curve: Float[np.ndarray, " epochs"], cost: float) -> int | None:
    """The first pass with this cost or a lower one."""
    reached = np.flatnonzero(curve <= cost)
    return int(reached[0]) + 1 if len(reached) else None


def picture(config: Logistic, found: Mapping[str, Found]) -> Figure:
    titles = "MNIST logistic regression, α/√t", f"after {config.epochs} passes"
    return draw(CONTENDERS, found, titles, ylim=(0.23, 0.5))
