"""Many descents at once: one scan over the steps, one vmap over all that differs.

A run is a function, a start and the hyperparameters of one optimizer. All three are axes of
arrays: the function is an index for `lax.switch`. Only the optimizer itself is Python's, since
the states of two optimizers are different trees: `OPTIMIZERS` is a table of transformations, and
each gets one compiled program for all of its runs.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int

import jadam
from experiments.common.objectives import FUNCTIONS

TARGET = 1e-3
"""The loss that counts as arrived."""

Optimizer = Callable[..., optax.GradientTransformation]

# Every argument beside the learning rate is the library's default, but for these.
JADAM: dict[str, Optimizer] = {
    "Adam": jadam.adam,
    "AdamW": partial(jadam.adamw, weight_decay=0.01),  # torch's; 1e-4 would be Adam to the eye
    "AMSGrad": jadam.amsgrad,
    "NAdam": jadam.nadam,
    "AdaMax": jadam.adamax,
    "RAdam": jadam.radam,
}
OPTAX: dict[str, Optimizer] = {
    "SGD": optax.sgd,
    "Momentum": partial(optax.sgd, momentum=0.9),
    "Nesterov": partial(optax.sgd, momentum=0.9, nesterov=True),
    "AdaGrad": optax.adagrad,
    "RMSProp": optax.rmsprop,
    "AdaDelta": optax.adadelta,
}
OPTIMIZERS = JADAM | OPTAX


class Runs(NamedTuple):
    """What happened: points and losses before the first step and after each."""

    points: Float[np.ndarray, "*runs steps+1 2"]
    losses: Float[np.ndarray, "*runs steps+1"]


class Outcomes(NamedTuple):
    """What came of it."""

    loss: Float[np.ndarray, "*runs"]
    """The last one; infinite where the run diverged."""
    steps: Int[np.ndarray, "*runs"]
    """Steps until the loss is under TARGET for good; one more than were made if it never is."""


@partial(jax.jit, static_argnums=(0, 1))
def descend(
    optimizer: Optimizer,
    steps: int,
    functions: Int[ArrayLike, " f"],
    starts: Float[ArrayLike, "f 2"],
    settings: Mapping[str, Float[ArrayLike, " s"]],
) -> Runs:
    """Runs [f, s]: each function (its index in FUNCTIONS) from its start, with each setting."""

    def run(
        function: Int[Array, ""], start: Float[Array, "2"], setting: Mapping[str, Float[Array, ""]]
    ) -> Runs:
        tx = optimizer(**setting)

        def loss_fn(point: Float[Array, "2"]) -> Float[Array, ""]:
            return lax.switch(function, [f.value for f in FUNCTIONS.values()], *point)

        def step(
            carry: tuple[Array, optax.OptState], _: None
        ) -> tuple[tuple[Array, optax.OptState], Runs]:
            point, state = carry
            loss, grad = jax.value_and_grad(loss_fn)(point)
            updates, state = tx.update(grad, state, point)
            return (optax.apply_updates(point, updates), state), Runs(point, loss)

        # One more than steps: what a scan puts out is where each step begins.
        return lax.scan(step, (start, tx.init(start)), length=steps + 1)[1]

    with_each_setting = jax.vmap(run, (None, None, 0))
    from_each_start = jax.vmap(with_each_setting, (0, 0, None))
    return from_each_start(jnp.asarray(functions), jnp.asarray(starts), settings)


def outcomes(losses: Float[ArrayLike, "*runs steps+1"]) -> Outcomes:
    """The last loss of each run, and when it had arrived."""
    losses = np.asarray(losses)
    away = ~(losses < TARGET)  # also NaN
    steps = np.max(np.where(away, np.arange(1, losses.shape[-1] + 1), 0), -1)
    last = losses[..., -1]
    return Outcomes(np.where(np.isfinite(last), last, np.inf), steps)
