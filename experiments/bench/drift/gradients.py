"""Gradients whose moments are known, float32[steps, blocks, 128]: several streams side by side."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float

BLOCKS, LANES = 4, 128
"""The blocks of each stream: an even number, since some codes have blocks of 256."""
MEAN = 0.1
"""Of a gradient, beside its standard deviation."""
FACTOR = 1000.0
RARE = 1e-3
OCTAVES = 24
NAMES = ("stationary", "up", "down", "rare", "wide", "alternating")
GROUPS = {
    "stationary": ("stationary", None),
    "after 1,000 times more": ("up", True),
    "their neighbours": ("up", False),
    "after 1,000 times less": ("down", True),
    "neighbours of these": ("down", False),
    "once in 1,000 steps": ("rare", None),
    "sizes over 24 octaves": ("wide", None),
    "alternating signs": ("alternating", None),
}
"""What the tables tell apart: a stream, and of one that changes the elements that do, or do not."""


@dataclass(frozen=True)
class Gradients:
    """All streams at once.

    A gradient is s·(±0.1 + z) with z normal: E[g] is ±0.1·s and E[g²] is 1.01·s². s is 1e-3 times
    log-normal(sd 1) within a block, and for `wide` spread evenly over 24 octaves. `up` and `down`
    change s of every other element by 1,000 at half of the steps. `rare` has a gradient once in
    1,000 steps, in the even blocks each element by itself and in the odd ones a block at once.
    `alternating` has no noise: ±s by turns.
    """

    steps: int
    seed: int = 0

    @cached_property
    def _drawn(self) -> tuple[Float[np.ndarray, "blocks 128"], Float[np.ndarray, "blocks 128"]]:
        rng = np.random.default_rng(self.seed)
        shape = len(NAMES) * BLOCKS, LANES
        scale = 1e-3 * np.exp(rng.standard_normal(shape))
        scale[self._place("wide")] = np.exp2(-np.linspace(0, OCTAVES, LANES))
        return scale, MEAN * rng.choice((-1.0, 1.0), shape)

    @staticmethod
    def _place(name: str) -> slice:
        place = NAMES.index(name)
        return slice(place * BLOCKS, (place + 1) * BLOCKS)

    def group(self, label: str) -> Bool[np.ndarray, "blocks 128"]:
        """Which elements a label of `GROUPS` stands for."""
        name, changed = GROUPS[label]
        chosen = np.zeros((len(NAMES) * BLOCKS, LANES), bool)
        lanes = slice(None) if changed is None else slice(int(changed), None, 2)
        chosen[self._place(name), lanes] = True
        return chosen

    def scale(self, t: int) -> Float[np.ndarray, "blocks 128"]:
        """s at step t."""
        scale = self._drawn[0].copy()
        late = t > self.steps // 2
        for name, is_large in (("up", late), ("down", not late)):
            scale[self._place(name), 1::2] *= FACTOR if is_large else 1
        return scale

    def root(self, t: int) -> Float[np.ndarray, "blocks 128"]:
        """√E[g²] at step t, which is the root of v's own expectation in the long run."""
        share = np.full((len(NAMES) * BLOCKS, 1), 1 + MEAN**2)
        share[self._place("rare")] *= RARE
        share[self._place("alternating")] = 1
        return self.scale(t) * np.sqrt(share)

    def at(self, first: int, count: int) -> Float[np.ndarray, "count blocks 128"]:
        """The gradients of steps first, first + 1, ...; the scale changes between such pieces."""
        rng = np.random.default_rng((self.seed, first))
        shape = count, len(NAMES) * BLOCKS, LANES
        g = rng.standard_normal(shape, np.float32) + self._drawn[1].astype(np.float32)
        place = self._place("rare")
        alone = rng.random((count, BLOCKS // 2, LANES), np.float32) < RARE
        together = rng.random((count, BLOCKS // 2, 1), np.float32) < RARE
        g[:, place][:, ::2] *= alone
        g[:, place][:, 1::2] *= together
        signs = 1 - 2 * (np.arange(first, first + count) % 2)
        g[:, self._place("alternating")] = signs[:, None, None]
        return g * self.scale(first).astype(np.float32)
