"""Skip-gram with negative samples on the documentation of Python, words hashed to rows."""

import re
import zlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from experiments.common import text

WIDTH, PAIRS, NEGATIVES, WINDOW = 64, 512, 6, 4
IDS = PAIRS * (2 + NEGATIVES)


def words(size: int) -> Int[np.ndarray, "words"]:
    """The text's words, each as a row of a table of this size."""
    found = re.findall(r"[a-z]+", text.collect().decode(errors="ignore").lower())
    return np.array([zlib.crc32(word.encode()) % size for word in found], np.int32)


def batches(size: int, seed: int) -> Iterator[Int[np.ndarray, "pairs columns"]]:
    """A word, one near it, and words from anywhere, for each of some pairs."""
    rng, ids = np.random.default_rng(seed), words(size)
    while True:
        centre = rng.integers(WINDOW, len(ids) - WINDOW, PAIRS)
        near = centre + rng.integers(1, WINDOW + 1, PAIRS) * rng.choice([-1, 1], PAIRS)
        others = rng.integers(0, len(ids), (PAIRS, NEGATIVES))
        yield ids[np.column_stack([centre, near, others])]


def loss(vectors: Float[Array, "pairs columns width"]) -> Float[Array, ""]:
    """Mikolov et al. (2013), equation 4, with one table for words and contexts."""
    scores = jnp.einsum("pw,pcw->pc", vectors[:, 0], vectors[:, 1:])
    signs = jnp.where(jnp.arange(scores.shape[1]) == 0, 1.0, -1.0)
    return -jnp.mean(jnp.sum(jax.nn.log_sigmoid(signs * scores), axis=1))


def table(size: int) -> Float[Array, "size width"]:
    """The table before the first update."""
    return 0.1 * jax.random.normal(jax.random.key(0), (size, WIDTH))
