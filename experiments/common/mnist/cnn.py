"""The CNN that several experiments train, and convolutions as matrix products.

Images float32[n, 28, 28, 1] become logits float32[n, 10].
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax


class CNN(nnx.Module):
    """28x28x1 -> conv 32 -> 14x14x32 -> conv 64 -> 7x7x64 -> dense 10: 83,466 parameters.

    Two 5x5 convolutions, each with ReLU and 2x2 max pooling.
    """

    def __init__(self, *, rngs: nnx.Rngs, dropout: float = 0.0):
        self.conv1 = nnx.Conv(1, 32, kernel_size=(5, 5), rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, kernel_size=(5, 5), rngs=rngs)
        self.dropout = nnx.Dropout(dropout)
        self.dense = nnx.Linear(7 * 7 * 64, 10, rngs=rngs)

    def __call__(self, images: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Images float32[n, 28, 28, 1] to logits float32[n, 10]."""
        x = images.transpose(1, 2, 0, 3)  # conv_max_pool says why
        # ReLU and maximum commute: after the pooling ReLU has a quarter of the work.
        x = nnx.relu(conv_max_pool(self.conv1, x))
        x = nnx.relu(conv_max_pool(self.conv2, x))
        x = x.transpose(2, 0, 1, 3).reshape(images.shape[0], -1)
        return self.dense(self.dropout(x, deterministic=key is None, rngs=key))


def conv_max_pool(conv: nnx.Conv, x: jax.Array) -> jax.Array:
    """A 5x5 "SAME" convolution and its 2x2 maxima: [h, w, n, c] to [h/2, w/2, n, o].

    Equal to `nnx.max_pool(conv(x), (2, 2), (2, 2))`, but written as matrix products: on a CPU
    XLA's convolution gradients are slow, and inside a loop tens of times slower still.

    A maximum over 2x2 needs a 6x6 tile of the input; tiles start at every other pixel. One input
    channel: a tile's 36 pixels times the kernel, shifted to each of the four positions. More
    channels: `winograd`.

    Rows and columns come first, images and channels last, so that every product reads and writes
    memory in order. The gradient is JAX's own: the same products, transposed.
    """
    h, w, n, c = x.shape
    kernel, bias = conv.kernel[...], conv.bias[...]
    o = kernel.shape[-1]
    if c == 1:
        padded = jnp.pad(x[..., 0], ((2, 2), (2, 2), (0, 0)))
        pixels = [padded[i : i + h - 1 : 2, j : j + w - 1 : 2] for i in range(6) for j in range(6)]
        tiles = jnp.stack(pixels).reshape(36, -1)
        shifted = [
            jnp.pad(kernel, ((i, 1 - i), (j, 1 - j), (0, 0), (0, 0))) for i, j in np.ndindex(2, 2)
        ]
        y = jnp.stack([jnp.einsum("kp,ko->po", tiles, block.reshape(36, o)) for block in shifted])
    else:
        y = winograd(kernel, x)
    return _max_of_4(y.reshape(4, -1)).reshape(h // 2, w // 2, n, o) + bias.reshape(1, 1, 1, o)


def conv_3x3(conv: nnx.Conv, x: jax.Array) -> jax.Array:
    """A 3x3 "SAME" convolution of [h, w, n, c], h and w multiples of 4, as matrix products."""
    h, w, n, _ = x.shape
    y = winograd(conv.kernel[...], x).reshape(4, 4, h // 4, w // 4, n, -1)
    return y.transpose(2, 0, 3, 1, 4, 5).reshape(h, w, n, -1) + conv.bias[...].reshape(1, 1, 1, -1)


def max_pool(x: jax.Array) -> jax.Array:
    """The 2x2 maxima of [h, w, n, c], with the gradient of `nnx.max_pool`."""
    return _max_of_4(jnp.stack([x[i::2, j::2] for i, j in np.ndindex(2, 2)]))


def winograd(kernel: jax.Array, x: jax.Array) -> jax.Array:
    """A "SAME" convolution of [h, w, n, c] by kernel [r, r, c, o] in 6x6 tiles, r = 3 or 5.

    Winograd's minimal filtering F(m x m, r x r) with m = 7 - r (Lavin & Gray 2016, section 4),
    Y = Aᵀ[(G kernel Gᵀ) ⊙ (Bᵀ tile B)]A: 36 products for a pair of channels instead of m²r², 100
    or 144. The transforms are matrix products too, Bᵀ for all tiles along an axis at once.

    Returns:
        [m², h/m · w/m · n · o]: the positions in a tile come first.
    """
    h, w, n, c = x.shape
    r, o = kernel.shape[0], kernel.shape[-1]
    m = 7 - r
    g, a = _powers(r) / np.array([[4], [-6], [-6], [24], [24], [1]]), _powers(m).T
    u = np.kron(g, g).astype(np.float32) @ kernel.reshape(r * r, -1)
    v = jnp.asarray(_tile_transform(h, m)) @ x.reshape(h, -1)
    columns = jnp.broadcast_to(_tile_transform(w, m), (6 * h // m, 6 * w // m, w))
    v = jnp.einsum("rqw,rwz->rqz", columns, v.reshape(6 * h // m, w, n * c))
    v = v.reshape(6, h // m, 6, w // m, n * c).swapaxes(1, 2).reshape(36, -1, c)
    y = jnp.einsum("kpc,kco->kpo", v, u.reshape(36, c, o)).reshape(36, -1)
    return np.kron(a, a).astype(np.float32) @ y


@jax.custom_vjp
def _max_of_4(y: jax.Array) -> jax.Array:
    """`y.max(0)` for y[4, ...]; of equals the first gets the gradient, as in `nnx.max_pool`."""
    return _max_of_4_fwd(y)[0]


def _max_of_4_fwd(y: jax.Array) -> tuple[jax.Array, jax.Array]:
    ab, cd = jnp.maximum(y[0], y[1]), jnp.maximum(y[2], y[3])
    first = jnp.where(cd > ab, jnp.where(y[3] > y[2], 3, 2), jnp.where(y[1] > y[0], 1, 0))
    return jnp.maximum(ab, cd), first[None]


def _max_of_4_bwd(first: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    position = lax.broadcasted_iota(first.dtype, (4, *g.shape), 0)
    return (jnp.where(position == first, g[None], 0),)


_max_of_4.defvjp(_max_of_4_fwd, _max_of_4_bwd)


def _powers(count: int) -> np.ndarray:
    """Winograd's points 0, 1, -1, 2, -2 to the powers 0, 1, ...; infinity has the highest alone."""
    points = np.vander([0, 1, -1, 2, -2], count, increasing=True)
    return np.vstack([points, np.eye(count)[-1:]])


# For the same points.
_B = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
    np.float32,
)


def _tile_transform(size: int, m: int) -> np.ndarray:
    """Padding, cutting into tiles and Bᵀ along one axis as one matrix, [6 * size/m, size]."""
    padding = (6 - m) // 2
    matrix = np.zeros((6, size // m, size + 2 * padding), np.float32)
    for tile in range(size // m):
        matrix[:, tile, m * tile : m * tile + 6] = _B
    return matrix[:, :, padding:-padding].reshape(-1, size)
