"""A small GPT of bytes: pre-norm, causal attention, GELU, learned positions, an untied head.

Parameters may be stored in 16 bits, but all arithmetic is float32: two optimizers differ in what
they store, and in nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

import jadam

normal = nnx.initializers.normal(0.02)
Linear = partial(nnx.Linear, use_bias=False, kernel_init=normal, dtype=jnp.float32)
Norm = partial(nnx.LayerNorm, use_bias=False, dtype=jnp.float32)


@dataclass(frozen=True)
class Shape:
    """The model's size; by default it has 3.3 million parameters."""

    layers: int = 4
    width: int = 256
    heads: int = 4
    context: int = 128


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, shape: Shape, *, rngs: nnx.Rngs, epsilon: float):
        self.heads = shape.heads
        self.norm1 = Norm(shape.width, epsilon=epsilon, rngs=rngs)
        self.qkv = Linear(shape.width, 3 * shape.width, rngs=rngs)
        self.out = Linear(shape.width, shape.width, rngs=rngs)
        self.norm2 = Norm(shape.width, epsilon=epsilon, rngs=rngs)
        self.up = Linear(shape.width, 4 * shape.width, rngs=rngs)
        self.down = Linear(4 * shape.width, shape.width, rngs=rngs)

    def __call__(self, x: Float[Array, "n t width"]) -> Float[Array, "n t width"]:
        n, t, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(n, t, 3 * self.heads, width // self.heads)
        q, k, v = jnp.split(qkv, 3, axis=2)
        attention = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attention.reshape(n, t, width))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class GPT(nnx.Module):
    """Bytes [n, t] to the logits of each next byte [n, t, 256].

    Args:
        epsilon: what the layer norms add to a variance.
    """

    def __init__(self, shape: Shape, *, rngs: nnx.Rngs, epsilon: float = 1e-6):
        self.bytes = nnx.Embed(
            256, shape.width, embedding_init=normal, dtype=jnp.float32, rngs=rngs
        )
        self.positions = nnx.Param(normal(rngs.params(), (shape.context, shape.width)))
        blocks = [Block(shape, rngs=rngs, epsilon=epsilon) for _ in range(shape.layers)]
        self.blocks = nnx.List(blocks)
        self.norm = Norm(shape.width, epsilon=epsilon, rngs=rngs)
        self.head = Linear(shape.width, 256, rngs=rngs)

    def __call__(self, text: Int[Array, "n t"]) -> Float[Array, "n t 256"]:
        x = self.embed(text)
        for block in self.blocks:
            x = block(x)
        return self.logits(x)

    def embed(self, text: Int[Array, "n t"]) -> Float[Array, "n t width"]:
        """What the first block gets."""
        positions = self.positions[: text.shape[1]].astype(jnp.float32)
        return self.bytes(text) + positions[None]

    def logits(self, x: Float[Array, "n t width"]) -> Float[Array, "n t 256"]:
        """Of what the last block gives."""
        return self.head(self.norm(x))


def loss_fn(model: GPT, text: Int[Array, "n t+1"]) -> Float[Array, ""]:
    """The mean cross entropy of the next byte, in nats."""
    return cross_entropy(model(text[:, :-1]), text)


def cross_entropy(logits: Float[Array, "n t 256"], text: Int[Array, "n t+1"]) -> Float[Array, ""]:
    """Of the next byte, the mean in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean()


def is_matrix(params: PyTree) -> PyTree:
    """Which leaves decay: not biases, nor the scales of norms, those of stacked blocks included."""

    def decays(path: tuple, p: Array) -> bool:
        return p.ndim > 1 and not jax.tree_util.keystr(path).endswith("['scale']")

    return jax.tree_util.tree_map_with_path(decays, params)


def scanned(model: GPT) -> tuple[PyTree, Callable[[PyTree, Array], Array]]:
    """The same model with its blocks stacked: `(params, loss)`, whose layers can be released.

    The model gives its blocks away.
    """
    blocks = [nnx.to_pure_dict(nnx.state(block, nnx.Param)) for block in model.blocks]
    block_graph = nnx.graphdef(model.blocks[0])
    model.blocks = nnx.List([])
    graph, others = nnx.split(model, nnx.Param)
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)

    def loss(params: PyTree, text: Int[Array, "n t+1"]) -> Float[Array, ""]:
        model = nnx.merge(graph, params["others"])
        layer = jax.checkpoint(lambda x, p: (nnx.merge(block_graph, p)(x), None))
        x, _ = jadam.release.scan(layer, model.embed(text[:, :-1]), params["blocks"])
        return cross_entropy(model.logits(x), text)

    return {"others": nnx.to_pure_dict(others), "blocks": stack}, loss
