"""The language model's training, once for a setting and a seed."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, PyTree
from rich.progress import track

from experiments.common.gpt import GPT, Shape, loss_fn
from experiments.common.text import Text, load

from .runs import Comparison
from .settings import SETTINGS, in_dtype


@dataclass(frozen=True)
class Lm(Comparison):
    """Trains a small GPT on the documentation inside Python's library, with each setting."""

    steps: int = 200
    """Batches to train on."""
    warmup: int = 20
    """Steps in which the learning rate rises; then it falls as a cosine to a tenth."""
    batch_size: int = 16
    """Pieces of text in a step, each as long as the context."""
    learning_rate: float = 1e-3
    """The highest learning rate."""
    weight_decay: float = 0.1
    """The weight decay of matrices; other leaves have none."""
    clip: float = 1.0
    """The largest norm that a gradient keeps."""
    shape: Shape = field(default_factory=Shape)
    """The model's size."""


def train(setting: str, seed: int, config: Lm, text: Text) -> dict[str, Any]:
    """Final losses and the loss of each step."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup, config.steps, config.learning_rate / 10
    )
    clip = optax.clip_by_global_norm(config.clip)
    optimizer = SETTINGS[setting].build(schedule, config.weight_decay, clip)
    graphdef, params = nnx.split(GPT(config.shape, rngs=nnx.Rngs(seed)), nnx.Param)
    params = in_dtype(nnx.to_pure_dict(params), SETTINGS[setting].param_dtype)
    state = optimizer.init(params)

    def loss(params: PyTree, batch: Array) -> Float[Array, ""]:
        return loss_fn(nnx.merge(graphdef, params), batch)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(
        params: PyTree, state: optax.OptState, batch: Array
    ) -> tuple[PyTree, optax.OptState, Float[Array, ""]]:
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    rng = np.random.default_rng(seed)  # the same batches for every setting
    window = np.arange(config.shape.context + 1)
    last = len(text.train) - len(window)
    losses = []
    for _ in track(range(config.steps), f"  {setting}, seed {seed}", transient=True):
        starts = rng.integers(0, last, (config.batch_size, 1))
        batch = jnp.asarray(text.train[starts + window], jnp.int32)
        params, state, value = step(params, state, batch)
        losses.append(float(value))

    starts = np.arange(0, len(text.validation) - len(window), 2 * config.shape.context)
    starts = starts[: len(starts) // config.batch_size * config.batch_size]
    evaluate = jax.jit(loss)
    values = [
        float(evaluate(params, jnp.asarray(text.validation[batch + window], jnp.int32)))
        for batch in starts.reshape(-1, config.batch_size, 1)
    ]
    tenth = max(1, config.steps // 10)
    return {
        "final": {
            "training loss": float(np.mean(losses[-tenth:])),
            "validation loss": float(np.mean(values)),
        },
        "curve": {"steps": list(range(1, config.steps + 1)), "loss": losses},
    }


def main(config: Lm) -> None:
    """Every run that is not there yet."""
    text = load(config.folder)

    def run(setting: str, seed: int) -> dict[str, Any]:
        return train(setting, seed, config, text)

    config.run_all("lm", run, guess=120, text=text.origin)
