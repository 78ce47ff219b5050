"""Gradient streams float32[steps, blocks, 128]: recorded from training, and made to hurt.

A block is 128 neighbours of a leaf in row-major order. Recordings are kept in runs/streams.
"""

import math
import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

import jadam
from experiments.common.gpt import GPT, Shape, loss_fn
from experiments.common.mnist.cnn import CNN
from experiments.common.mnist.dataset import load

BLOCK = 128
STEPS = 1000
RUNS = Path(__file__).parents[3] / "runs" / "streams"

Stream = np.ndarray
"""float32[steps, blocks, 128]."""


def recorded(name: str) -> Stream:
    """The stream `mnist` or `gpt`, trained and written on first use: a minute or two."""
    path = RUNS / f"{name}.npz"
    if not path.exists():
        RUNS.mkdir(parents=True, exist_ok=True)
        np.savez(path, g={"mnist": record_mnist, "gpt": record_gpt}[name]())
    return np.load(path)["g"]


def record(
    loss: Callable[[PyTree, Array], Array], params: PyTree, batches: Array, where: PyTree
) -> Stream:
    """Trains with float32 Adam; of each leaf keeps the gradients at the blocks `where`."""
    optimizer = jadam.adam(1e-3)

    def sample(g: Array, blocks: np.ndarray) -> Array:
        return g.reshape(-1)[: g.size // BLOCK * BLOCK].reshape(-1, BLOCK)[blocks]

    @jax.jit
    def train(params: PyTree, batches: Array) -> Array:
        def step(carry: tuple, batch: Array) -> tuple[tuple, Array]:
            params, state = carry
            grads = jax.grad(loss)(params, batch)
            updates, state = optimizer.update(grads, state, params)
            kept = jnp.concatenate(jax.tree.leaves(jax.tree.map(sample, grads, where)))
            return (optax.apply_updates(params, updates), state), kept

        return lax.scan(step, (params, optimizer.init(params)), batches)[1]

    return np.asarray(train(params, batches))


def spread(size: int, count: int) -> np.ndarray:
    """`count` block numbers of a leaf with `size` elements, evenly spaced, none twice."""
    return np.unique(np.linspace(0, size // BLOCK - 1, count).astype(int))


# ------------------------------------------------------------------------------ MNIST CNN


def record_mnist() -> Stream:
    """The CNN of experiments.mnist, batches of 64; its three kernels."""
    loss, params, batches = mnist_problem(seed=0, steps=STEPS)
    counts = {800: 6, 51200: 29, 31360: 29}
    where = jax.tree.map(lambda p: spread(p.size, counts.get(p.size, 0)), params)
    return record(loss, params, batches, where)


def mnist_problem(seed: int, steps: int) -> tuple[Callable, PyTree, Array]:
    """The loss of parameters and image numbers, first parameters, image numbers [steps, 64]."""
    mnist = load()
    images, labels = jnp.asarray(mnist.train_images), jnp.asarray(mnist.train_labels)
    graphdef, params = nnx.split(CNN(rngs=nnx.Rngs(seed)), nnx.Param)
    params = nnx.to_pure_dict(params)

    def loss(params: PyTree, batch: Int[Array, " n"]) -> Float[Array, ""]:
        logits = nnx.merge(graphdef, params)(images[batch].astype(jnp.float32) / 255)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]).mean()

    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(len(images)) for _ in range(1 + steps * 64 // 60000)])
    return loss, params, jnp.asarray(order[: steps * 64].reshape(steps, 64))


# ---------------------------------------------------------------------- byte-level language model

GPT_SHAPE = Shape(layers=2, width=128, heads=4, context=64)


def gpt_params(key: Array, shape: Shape = GPT_SHAPE) -> PyTree:
    """The first parameters, under names whose order is that of the recorded blocks."""

    def normal(key: Array, *shape: int) -> Array:
        return 0.02 * jax.random.normal(key, shape)

    width = shape.width
    keys = iter(jax.random.split(key, 3 + 4 * shape.layers))
    scale = jnp.ones(width)
    layers = [
        {
            "attention_scale": scale,
            "qkv": normal(next(keys), width, 3 * width),
            "out": normal(next(keys), width, width),
            "mlp_scale": scale,
            "up": normal(next(keys), width, 4 * width),
            "down": normal(next(keys), 4 * width, width),
        }
        for _ in range(shape.layers)
    ]
    return {
        "embedding": normal(next(keys), 256, width),
        "position": normal(next(keys), shape.context, width),
        "layers": layers,
        "scale": scale,
        "head": normal(next(keys), width, 256),
    }


def in_gpt(params: PyTree) -> PyTree:
    """The parameters under the names that the GPT has for them."""
    blocks = {
        i: {
            "norm1": {"scale": layer["attention_scale"]},
            "norm2": {"scale": layer["mlp_scale"]},
            **{name: {"kernel": layer[name]} for name in ("qkv", "out", "up", "down")},
        }
        for i, layer in enumerate(params["layers"])
    }
    return {
        "bytes": {"embedding": params["embedding"]},
        "positions": params["position"],
        "blocks": blocks,
        "norm": {"scale": params["scale"]},
        "head": {"kernel": params["head"]},
    }


def record_gpt() -> Stream:
    """All kinds of leaves; of the embedding, rows of frequent, rare and absent bytes."""
    text = np.frombuffer("".join(pydoc_data.topics.topics.values()).encode(), np.uint8)
    context = GPT_SHAPE.context
    starts = np.random.default_rng(0).integers(0, len(text) - context - 1, (STEPS, 16, 1))
    batches = text[starts + np.arange(context + 1)].astype(np.int32)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: GPT(GPT_SHAPE, rngs=nnx.Rngs(0), epsilon=1e-5)))

    def loss(params: PyTree, batch: Int[Array, "n t+1"]) -> Float[Array, ""]:
        return loss_fn(nnx.merge(graphdef, in_gpt(params)), batch)

    params = gpt_params(jax.random.key(0))
    counts = {"embedding": 0, "position": 4, "head": 12, "qkv": 12, "out": 8, "up": 12, "down": 8}
    where = jax.tree.map_with_path(lambda p, x: spread(x.size, counts.get(p[-1].key, 1)), params)
    by_frequency = np.argsort(-np.bincount(text, minlength=256), kind="stable")
    where["embedding"] = by_frequency[np.linspace(0, 110, 24).astype(int)]
    return record(loss, params, jnp.asarray(batches), where)


# ------------------------------------------------------------------------------- made by hand

SHAPE = (STEPS, 8, BLOCK)


def adversarial(rng: np.random.Generator) -> Stream:
    """The first of each block ±1, the others 1e-3; in every 50th step every other one is 0."""
    g = np.full(SHAPE, 1e-3, np.float32)
    g[:, :, 0] = np.where(np.arange(STEPS) % 2, -1, 1)[:, None]
    g[::50, :, 1::2] = 0
    return g


def log_normal(rng: np.random.Generator) -> Stream:
    """Gaussian gradients whose scales within a block are log-normal(sd 2)."""
    scales = np.exp(2 * rng.standard_normal(SHAPE[1:]))
    return (scales * rng.standard_normal(SHAPE)).astype(np.float32)


def heavy_tails(rng: np.random.Generator) -> Stream:
    """Student's t with 1.5 degrees of freedom: no variance."""
    return rng.standard_t(1.5, SHAPE).astype(np.float32)


def sparse(rng: np.random.Generator) -> Stream:
    """Non-zero at 2% of the steps, scales log-normal(sd 1)."""
    g = rng.standard_normal(SHAPE) * np.exp(rng.standard_normal(SHAPE[1:]))
    return np.where(rng.random(SHAPE) < 0.02, g, 0).astype(np.float32)


def alternating(rng: np.random.Generator) -> Stream:
    """±a with a constant a, log-normal(sd 1): m is small beside √v."""
    sign = np.where(np.arange(STEPS) % 2, -1, 1)[:, None, None]
    return (sign * np.exp(rng.standard_normal(SHAPE[1:]))).astype(np.float32)


def small_mean(rng: np.random.Generator) -> Stream:
    """Mean 0.05, sd 1: what counts is small beside the noise."""
    return (0.05 + rng.standard_normal(SHAPE)).astype(np.float32)


def extremal(rng: np.random.Generator) -> Stream:
    """g proportional to (b2/b1)ˢ, which attains the step bound; half of the elements in steps."""
    s = np.arange(STEPS)[:, None, None] - STEPS + np.arange(8)[:, None] * 10
    g = np.exp(s * math.log(0.999 / 0.9) + np.log(1e3))
    g = np.where(np.arange(BLOCK) % 2, g, np.exp(np.ceil(np.log(g))))
    return np.maximum(g, 1e-12).astype(np.float32)


SYNTHETIC = (adversarial, log_normal, heavy_tails, sparse, alternating, small_mean, extremal)


def all_streams() -> dict[str, Stream]:
    """Every stream of STEPS steps."""
    made = {f.__name__: f(np.random.default_rng(i)) for i, f in enumerate(SYNTHETIC)}
    return {"mnist": recorded("mnist"), "gpt": recorded("gpt"), **made}


# ------------------------------------------------------------------------------- staleness

WARM, AFTER = 1000, 3000


def shrink(spread: float) -> Stream:
    """Mixed elements: one keeps its gradients, the others' shrink 100 times after 1,000 steps.

    Gaussian, with scales log-normal(sd `spread`) within a block. In the last two blocks half of
    the elements are dead after 1,000 steps: gradient 0.
    """
    rng = np.random.default_rng(100)
    scales = np.exp(spread * rng.standard_normal((8, BLOCK)))
    g = rng.standard_normal((WARM + AFTER, 8, BLOCK)) * scales
    g[WARM:, :6, 1:] /= 100
    g[WARM:, 6:, ::2] = 0
    return g.astype(np.float32)
