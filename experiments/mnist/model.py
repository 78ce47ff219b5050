"""The CNN: two 5x5 convolutions, each with ReLU and 2x2 max pooling, and a dense layer."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax


class CNN(nnx.Module):
    """28x28x1 -> conv 32 -> 14x14x32 -> conv 64 -> 7x7x64 -> dense 10: 83,466 parameters."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 32, kernel_size=(5, 5), rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, kernel_size=(5, 5), rngs=rngs)
        self.dense = nnx.Linear(7 * 7 * 64, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Images float32[n, 28, 28, 1] to logits float32[n, 10]."""
        x = images.transpose(1, 2, 0, 3)  # conv_max_pool says why
        # ReLU and maximum commute: after the pooling ReLU has a quarter of the work.
        x = nnx.relu(conv_max_pool(self.conv1, x))
        x = nnx.relu(conv_max_pool(self.conv2, x))
        return self.dense(x.transpose(2, 0, 1, 3).reshape(images.shape[0], -1))


def conv_max_pool(conv: nnx.Conv, x: jax.Array) -> jax.Array:
    """A 5x5 "SAME" convolution and its 2x2 maxima: [h, w, n, c] to [h/2, w/2, n, o].

    Equal to `nnx.max_pool(conv(x), (2, 2), (2, 2))`, but written as matrix products: on a CPU
    XLA's convolution gradients are slow, and inside a loop tens of times slower still.

    A maximum over 2x2 needs a 6x6 tile of the input; tiles start at every other pixel. Per tile:

    - One input channel: its 36 pixels times the kernel, shifted to each of the four positions.
    - More channels: Winograd's minimal filtering F(2x2, 5x5) (Lavin & Gray 2016, section 4),
      Y = Aᵀ[(G kernel Gᵀ) ⊙ (Bᵀ tile B)]A: 36 products for a pair of channels instead of 100.
      The transforms are matrix products too, Bᵀ for all tiles along an axis at once.

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
        u = (np.kron(_G, _G) @ kernel.reshape(25, -1)).reshape(36, c, o)
        v = jnp.asarray(_tile_transform(h)) @ x.reshape(h, -1)
        columns = jnp.broadcast_to(_tile_transform(w), (3 * h, 3 * w, w))
        v = jnp.einsum("rqw,rwz->rqz", columns, v.reshape(3 * h, w, n * c))
        v = v.reshape(6, h // 2, 6, w // 2, n * c).swapaxes(1, 2).reshape(36, -1, c)
        y = np.kron(_A, _A) @ jnp.einsum("kpc,kco->kpo", v, u).reshape(36, -1)
    return _max_of_4(y).reshape(h // 2, w // 2, n, o) + bias.reshape(1, 1, 1, o)


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


# F(2, 5) at the points 0, 1, -1, 2, -2, infinity.
_A = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 1]], np.float32)
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
_G = np.array(
    [
        [1 / 4, 0, 0, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6, 1 / 3, 2 / 3],
        [1 / 24, -1 / 12, 1 / 6, -1 / 3, 2 / 3],
        [0, 0, 0, 0, 1],
    ],
    np.float32,
)


def _tile_transform(size: int) -> np.ndarray:
    """Padding, cutting into tiles and Bᵀ along one axis as one matrix, [6 * size/2, size]."""
    matrix = np.zeros((6, size // 2, size + 4), np.float32)
    for tile in range(size // 2):
        matrix[:, tile, 2 * tile : 2 * tile + 6] = _B
    return matrix[:, :, 2:-2].reshape(-1, size)
