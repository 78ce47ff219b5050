"""Training on MNIST under many settings and seeds at once: one scan over steps, one vmap."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree
from rich.progress import track

Settings = Mapping[str, Float[np.ndarray, " settings"]]
"""Hyperparameters by name; the i-th entries together are the i-th setting."""


def product(**values: Any) -> Settings:
    """Every combination of the values, the last one's changing fastest."""
    axes = np.meshgrid(*values.values(), indexing="ij")
    return {name: axis.ravel() for name, axis in zip(values, axes, strict=True)}


def halved(images: np.ndarray) -> Float[Array, "n 196"]:
    """Means of 2x2 pixels of uint8[n, 28, 28, 1], from 0 to 1."""
    quarters = (images[:, i::2, j::2].astype(np.float32) for i, j in np.ndindex(2, 2))
    return jnp.asarray(sum(quarters).reshape(-1, 196) / (4 * 255))


def mlp(key: Array, *widths: int) -> list[dict[str, Array]]:
    """Dense layers of these widths, He's normal initialization."""
    he = jax.nn.initializers.he_normal()
    keys = jax.random.split(key, len(widths) - 1)
    shapes = pairwise(widths)
    return [
        {"kernel": he(key, shape), "bias": jnp.zeros(shape[1])}
        for key, shape in zip(keys, shapes, strict=True)
    ]


def dense(layer: dict[str, Array], x: Float[Array, "n i"]) -> Float[Array, "n o"]:
    return x @ layer["kernel"] + layer["bias"][None]


def apply_mlp(
    layers: list[dict[str, Array]], x: Float[Array, "n i"], *, normalize: bool = False
) -> Float[Array, "n o"]:
    """ReLU between the layers, after a layer normalization without parameters if wanted."""
    for layer in layers[:-1]:
        x = dense(layer, x)
        x = jax.nn.relu(jax.nn.standardize(x, axis=-1) if normalize else x)
    return dense(layers[-1], x)


def orders(
    seeds: int, steps: int, batch_size: int, images: int, available: int
) -> Int[np.ndarray, "steps seeds batch"]:
    """Indices of each step's batch: whole epochs, reshuffled, of `images` images of each seed."""
    found = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        own = rng.choice(available, images, replace=False)
        epochs = -(-steps * batch_size // images)
        order = np.concatenate([rng.permutation(own) for _ in range(epochs)])
        found.append(order[: steps * batch_size].reshape(steps, batch_size))
    return np.stack(found, axis=1).astype(np.int32)


def trained(
    loss: Callable[[PyTree, PyTree], Float[Array, ""]],
    make: Callable[..., optax.GradientTransformation],
    initial: Callable[[Array], PyTree],
    settings: Settings,
    examples: PyTree,
    batches: Int[np.ndarray, "steps seeds batch"],
    label: str,
    parts: int = 20,
) -> Iterator[tuple[PyTree, Float[np.ndarray, "steps seeds settings"]]]:
    """Parameters [seeds, settings, ...] and the losses since, after each of at most `parts` parts.

    A seed decides on the parameters and the batches; all its settings get the same.

    Args:
        loss: of parameters and a batch of the examples.
        make: the optimizer of a setting, `make(name=value, ...)`.
        initial: parameters from a key.
    """
    values = {name: jnp.asarray(value, jnp.float32) for name, value in settings.items()}

    def step(state: Any, setting: dict[str, Array], batch: PyTree) -> tuple[Any, Array]:
        params, opt_state = state
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = make(**setting).update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    of_settings = jax.vmap(step, in_axes=(0, 0, None))
    of_seeds = jax.vmap(of_settings, in_axes=(0, None, 0))

    def start(key: Array) -> tuple[PyTree, Any]:
        params = initial(key)
        return jax.vmap(lambda setting: (params, make(**setting).init(params)))(values)

    # The examples are an argument: as a constant they would be compiled into the program.
    @partial(jax.jit, donate_argnums=0)
    def train(state: Any, examples: PyTree, batches: Array) -> tuple[Any, Array]:
        def body(state: Any, batch: Array) -> tuple[Any, Array]:
            return of_seeds(state, values, jax.tree.map(lambda x: x[batch], examples))

        return jax.lax.scan(body, state, batches)

    keys = jnp.stack([jax.random.key(seed) for seed in range(batches.shape[1])])
    state = jax.jit(jax.vmap(start))(keys)
    # Parts of one length: another length would be another compilation.
    parts = max(count for count in range(1, parts + 1) if len(batches) % count == 0)
    for piece in track(np.split(batches, parts), label, transient=True):
        state, losses = train(state, examples, jnp.asarray(piece))
        yield state[0], np.asarray(losses, np.float64)
