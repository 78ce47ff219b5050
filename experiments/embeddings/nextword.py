"""The next word from hashed n-grams, on the documentation of Python."""

import functools
import re
import zlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from experiments.common import text

WIDTH, PAIRS, ORDERS, NEGATIVES = 64, 512, 4, 3
IDS = PAIRS * (ORDERS + 1 + NEGATIVES)


@functools.cache
def ngrams(size: int) -> tuple[Int[np.ndarray, "words orders"], Int[np.ndarray, "words"]]:
    """Of each word of the text the rows of the 1 to 4 words before it, and its own as a target.

    A row is a hash: n-grams may share one.
    """
    words = re.findall(r"[a-z]+", text.collect().decode(errors="ignore").lower())

    def row(kind: str, of: list[str]) -> int:
        return zlib.crc32(f"{kind} {' '.join(of)}".encode()) % size

    contexts = [
        [row("after", words[i - n : i]) for n in range(1, ORDERS + 1)]
        for i in range(ORDERS, len(words))
    ]
    targets = [row("word", [word]) for word in words[ORDERS:]]
    return np.array(contexts, np.int32), np.array(targets, np.int32)


def batches(size: int, seed: int) -> Iterator[Int[np.ndarray, "pairs columns"]]:
    """The n-grams before a word, the word, and words from anywhere, for each of some places."""
    rng, (contexts, targets) = np.random.default_rng(seed), ngrams(size)
    while True:
        place = rng.integers(0, len(targets), PAIRS)
        others = rng.integers(0, len(targets), (PAIRS, NEGATIVES))
        yield np.column_stack([contexts[place], targets[place], targets[others]])


def loss(vectors: Float[Array, "pairs columns width"]) -> Float[Array, ""]:
    """Negative samples as in Mikolov et al. (2013), equation 4; a context is a sum of rows."""
    context = jnp.sum(vectors[:, :ORDERS], axis=1)
    scores = jnp.einsum("pw,pcw->pc", context, vectors[:, ORDERS:])
    signs = jnp.where(jnp.arange(scores.shape[1]) == 0, 1.0, -1.0)
    return -jnp.mean(jnp.sum(jax.nn.log_sigmoid(signs * scores), axis=1))


def table(size: int) -> Float[Array, "size width"]:
    """The table before the first update."""
    return 0.1 * jax.random.normal(jax.random.key(0), (size, WIDTH))
