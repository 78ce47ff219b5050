"""Figure 2 (a): a multilayer network with dropout on MNIST."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree
from matplotlib.figure import Figure

import jadam
from experiments.common.mnist.dataset import Mnist
from experiments.common.palette import BLUE, GREEN, ORANGE, PINK, RED
from experiments.papers.publish import Claim

from .comparison import Contender, Found, draw
from .training import Task, check, grid


@dataclass(frozen=True)
class Mlp:
    """784-1000-1000-10 with ReLU and dropout."""

    epochs: int = 12
    images: int = 60_000
    hidden: int = 1000
    dropout: float = 0.5
    """The share of hidden units that is left out."""
    batch_size: int = 128
    seed: int = 0
    """Of parameters, order and dropout."""

    def __post_init__(self) -> None:
        check("mlp", self)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--mlp.dropout: expected a share in [0, 1), got {self.dropout}")


CONTENDERS = {
    "AdaGrad": Contender(
        partial(optax.adagrad, initial_accumulator_value=0.0),
        grid(learning_rate=(0.003, 0.01, 0.03)),
        GREEN,
    ),
    "RMSProp": Contender(optax.rmsprop, grid(learning_rate=(1e-4, 3e-4, 1e-3)), PINK),
    "SGD Nesterov": Contender(
        partial(optax.sgd, momentum=0.9, nesterov=True),
        grid(learning_rate=(0.01, 0.03, 0.1)),
        BLUE,
    ),
    "AdaDelta": Contender(
        partial(optax.adadelta, rho=0.95), grid(learning_rate=(0.3, 1.0, 3.0)), ORANGE
    ),
    "Adam": Contender(jadam.adam, grid(learning_rate=(1e-4, 3e-4, 1e-3)), RED),
}


def init(key: Array, widths: tuple[int, ...]) -> PyTree:
    keys = jax.random.split(key, len(widths) - 1)
    he = jax.nn.initializers.he_normal()
    return [
        {"kernel": he(key, (inputs, outputs)), "bias": jnp.zeros(outputs)}
        for key, inputs, outputs in zip(keys, widths, widths[1:], strict=False)
    ]


def loss(params: PyTree, batch: tuple[Array, Array], key: Array, dropout: float) -> Array:
    x, labels = batch
    x = x.astype(jnp.float32) / 255
    *hidden, last = params
    for i, layer in enumerate(hidden):
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
        keep = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - dropout, x.shape)
        x = jnp.where(keep, x / (1 - dropout), 0)
    logits = x @ last["kernel"] + last["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def task(config: Mlp, mnist: Mnist) -> Task:
    images = mnist.train_images[: config.images].reshape(config.images, -1)
    params = init(jax.random.key(config.seed), (784, config.hidden, config.hidden, 10))
    examples = jnp.asarray(images), jnp.asarray(mnist.train_labels[: config.images])
    return Task(partial(loss, dropout=config.dropout), params, examples, config.batch_size)


def claims(curves: Mapping[str, Float[np.ndarray, " epochs"]]) -> list[Claim]:
    """Section 6.2: "Adam shows better convergence than other methods"."""
    adam = curves["Adam"]
    found = []
    for name, curve in curves.items():
        if name != "Adam":
            found.append(
                Claim(
                    f"Adam converges better than {name}: a lower cost in the last pass",
                    f"training cost of the last pass {adam[-1]:.4f} and {curve[-1]:.4f}; mean of "
                    f"all {adam.mean():.4f} and {curve.mean():.4f}",
                    bool(adam[-1] < curve[-1]),
                )
            )
    return found


def picture(config: Mlp, found: Mapping[str, Found]) -> Figure:
    titles = "MNIST multilayer network + dropout", f"after {config.epochs} passes"
    return draw(CONTENDERS, found, titles, yscale="log")
