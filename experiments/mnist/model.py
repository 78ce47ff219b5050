"""The models: images float32[n, 28, 28, 1] to logits float32[n, 10].

Each is called with a key while it is trained, for dropout, and without one to be used.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.common.mnist.cnn import CNN, conv_3x3, conv_max_pool, max_pool


class MLP(nnx.Module):
    """784 -> dense 128, ReLU -> dense 10: 101,770 parameters."""

    def __init__(self, *, rngs: nnx.Rngs, dropout: float = 0.0):
        self.hidden = nnx.Linear(784, 128, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)
        self.dense = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, images: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Images float32[n, 28, 28, 1] to logits float32[n, 10]."""
        x = nnx.relu(self.hidden(images.reshape(-1, 784)))
        return self.dense(self.dropout(x, deterministic=key is None, rngs=key))


class VGG(nnx.Module):
    """Four convolutions with batch norm, after Simonyan & Zisserman (2015): 151,178 parameters.

    32x32x1 -> conv 5x5x32, pool -> 16x16x32 -> conv 3x3x64, conv 3x3x64, pool -> 8x8x64
    -> conv 3x3x128, pool -> 4x4x128 -> dropout, dense 10; 20 million multiply-adds an image.
    """

    def __init__(self, *, rngs: nnx.Rngs, dropout: float = 0.0):
        def conv(inputs: int, outputs: int, size: int) -> nnx.Conv:
            return nnx.Conv(inputs, outputs, kernel_size=(size, size), rngs=rngs)

        def norm(features: int) -> nnx.BatchNorm:
            return nnx.BatchNorm(features, momentum=0.9, rngs=rngs)

        self.conv1, self.norm1 = conv(1, 32, 5), norm(32)
        self.conv2, self.norm2 = conv(32, 64, 3), norm(64)
        self.conv3, self.norm3 = conv(64, 64, 3), norm(64)
        self.conv4, self.norm4 = conv(64, 128, 3), norm(128)
        self.dropout = nnx.Dropout(dropout)
        self.dense = nnx.Linear(4 * 4 * 128, 10, rngs=rngs)

    def __call__(self, images: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Images float32[n, 28, 28, 1] to logits float32[n, 10]."""
        used = key is None

        def normed(norm: nnx.BatchNorm, x: jax.Array) -> jax.Array:
            return nnx.relu(norm(x, use_running_average=used))

        # 32x32 is cut into the tiles of all layers without a rest.
        x = jnp.pad(images.transpose(1, 2, 0, 3), ((2, 2), (2, 2), (0, 0), (0, 0)))
        x = normed(self.norm1, conv_max_pool(self.conv1, x))
        x = normed(self.norm2, conv_3x3(self.conv2, x))
        x = normed(self.norm3, max_pool(conv_3x3(self.conv3, x)))
        x = normed(self.norm4, max_pool(conv_3x3(self.conv4, x)))
        x = x.transpose(2, 0, 1, 3).reshape(images.shape[0], -1)
        return self.dense(self.dropout(x, deterministic=used, rngs=key))


MODELS = {"mlp": MLP, "cnn": CNN, "vgg": VGG}
