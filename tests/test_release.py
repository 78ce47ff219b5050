"""Released steps: the plain step's bits, its errors, its memory, and what it may not skip."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jadam
from jadam import release

LAYERS, WIDTH, HIDDEN, WORDS = 4, 64, 128, 32
EIGHT_BITS = {"mu_dtype": "int8", "nu_dtype": "uint8", "min_size": 0}
SIXTEEN_BITS = {"mu_dtype": jnp.bfloat16, "nu_dtype": jnp.bfloat16}
XLA: dict[str, Any] = {"kernel": "xla"}  # a plain step would take the CPU's kernel, where it is


def matrices(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


SCHEDULE = optax.linear_schedule(1e-2, 1e-3, 10)
TRANSFORMATIONS = {
    "adamw": jadam.adamw(SCHEDULE, weight_decay=0.1, mask=matrices, **XLA),
    "bf16 moments": jadam.adam(1e-2, **SIXTEEN_BITS, **XLA),
    "8 bits": jadam.nadamw(1e-2, **EIGHT_BITS, **XLA),
    "amsgrad": jadam.amsgrad(1e-2, **EIGHT_BITS, **XLA),
    "adamax": jadam.adamaxw(1e-2, **XLA),
    "radam": jadam.radam(1e-2, **XLA),
    "ademamix": jadam.ademamix(1e-2, weight_decay=0.1, warmup=50, **EIGHT_BITS, **XLA),
    "compensated": jadam.compensated_weights(
        jadam.adamw(SCHEDULE, weight_decay=0.1, mask=matrices, **EIGHT_BITS, **XLA)
    ),
    "stochastic": jadam.stochastic_rounding(jadam.adamw(1e-2, **SIXTEEN_BITS, **XLA), 3),
    "optax": optax.chain(optax.clip(0.1), optax.adamw(SCHEDULE), optax.add_decayed_weights(-1e-3)),
    "partitioned": optax.partition(
        {"matrices": jadam.adamw(1e-2, **XLA), "others": optax.sgd(1e-2, 0.9)},
        lambda params: jax.tree.map(lambda p: "matrices" if p.ndim > 1 else "others", params),
    ),
    "hyperparameters": optax.inject_hyperparams(jadam.adam, static_args=("kernel",))(
        SCHEDULE, **XLA
    ),
}


def parameters(dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)

    def leaf(*shape):
        return jnp.asarray(rng.standard_normal(shape) / 8, dtype)

    layers = {
        "up": leaf(LAYERS, WIDTH, HIDDEN),
        "down": leaf(LAYERS, HIDDEN, WIDTH),
        "bias": leaf(LAYERS, HIDDEN),
        "scale": leaf(LAYERS),
    }
    return {"words": leaf(WORDS, WIDTH), "layers": layers, "norm": leaf(WIDTH), "unused": leaf(3)}


def layer(x, p):
    p = jax.tree.map(lambda p: p.astype(jnp.float32), p)
    hidden = jax.nn.relu(x @ p["up"] + p["bias"][None])
    return x + p["scale"] * (hidden @ p["down"]), jnp.mean(x)


def loss_fn(params, text, wrap=jax.checkpoint, **options):
    """The words are embedding and head: their gradient is a sum of two."""
    words = params["words"].astype(jnp.float32)
    x, _ = release.scan(wrap(layer), words[text[:, 0]], params["layers"], **options)
    logits = x * params["norm"].astype(jnp.float32)[None] @ words.T
    return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1]).mean()


TEXT = jnp.asarray(np.random.default_rng(1).integers(0, WORDS, (3, 16, 2)))


def plain_step(loss, tx):
    def step(params, state, *args):
        value, grads = jax.value_and_grad(loss)(params, *args)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


# LLVM may join a product and a sum into one rounding in one program and not in another. Without
# that, the two programs have to agree in every bit.
AS_WRITTEN = {"xla_backend_optimization_level": 0}


def trained(step, tx, params, batches=TEXT):
    state, losses = tx.init(params), []
    step = jax.jit(step, compiler_options=AS_WRITTEN)
    for batch in batches:
        params, state, value = step(params, state, batch)
        losses.append(value)
    return params, state, losses


def assert_equal(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    flat, _ = jax.tree_util.tree_flatten_with_path(got)
    for (path, x), y in zip(flat, jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        x, y = (np.asarray(a.astype(jnp.float32)) for a in (x, y))
        np.testing.assert_array_equal(x, y, jax.tree_util.keystr(path))


@pytest.mark.usefixtures("standard_promotion")  # optax.apply_updates of bfloat16 parameters
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_the_plain_steps_bits(name):
    """Parameters, state and losses of three steps, for members, storages, wrappers and optax's."""
    tx = TRANSFORMATIONS[name]
    params = parameters(jnp.bfloat16 if name in ("compensated", "stochastic") else jnp.float32)
    expected = trained(plain_step(loss_fn, tx), tx, params)
    assert_equal(trained(release.train_step(loss_fn, tx), tx, params), expected)
