"""Stored moments beside float64's, along the same gradients."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float
from rich.progress import track

from experiments.bench.codecs.adam import EPS

from .gradients import GROUPS, Gradients
from .storages import STORAGES, Rates, Storage

RATES: tuple[Rates, ...] = ((0.9, 0.999), (0.9, 0.9999), (0.95, 0.95))
STEPS, POINTS, EVERY = 200_000, 50, 20
"""The moments are looked at in every 20th step; a point of a curve is 200 such looks."""
FLOOR = 1 / 30
"""The least root, beside the stationary one, that an error is divided by."""
QUANTITIES = ("root bias", "root spread", "m bias", "m spread", "gain", "path error")


class Look(NamedTuple):
    """m, v and the updates' sum since the look before, each [looks, blocks, 128]."""

    m: Array | np.ndarray
    v: Array | np.ndarray
    path: Array | np.ndarray


def program(storage: Storage, rates: Rates, eps: float = EPS) -> Callable[..., tuple[Any, Look]]:
    """The jitted function from what is stored, the steps before and gradients to looks."""

    @partial(jax.jit, donate_argnums=0)
    def run(
        stored: Any, done: Array, g: Float[Array, "looks every blocks 128"]
    ) -> tuple[Any, Look]:
        def step(carry: tuple, g: Array) -> tuple:
            stored, t, path = carry
            stored, u = storage.step(stored, t + 1, g, rates, eps)
            return (stored, t + 1, path + u), None

        def look(carry: tuple, g: Array) -> tuple:
            start = (*carry, jnp.zeros(g.shape[1:], jnp.float32))
            (stored, t, path), _ = lax.scan(step, start, g)
            return (stored, t), Look(*storage.moments(stored, t, rates), path)

        (stored, _), looks = lax.scan(look, (stored, done), g)
        return stored, looks

    return run


class Exact:
    """Adam in float64."""

    def __init__(self, shape: Sequence[int], rates: Rates, eps: float = EPS) -> None:
        self.m, self.v, self.t = np.zeros(shape), np.zeros(shape), 0
        self.rates, self.eps = rates, eps

    def run(self, g: Float[np.ndarray, "looks every blocks 128"]) -> Look:
        """The looks along these gradients."""
        b1, b2 = self.rates
        looks = []
        for piece in g:
            path = np.zeros_like(self.m)
            for one in piece.astype(np.float64):
                self.t += 1
                self.m += (1 - b1) * (one - self.m)
                self.v += (1 - b2) * (one * one - self.v)
                root = np.sqrt(self.v / (1 - b2**self.t))
                path += self.m / (1 - b1**self.t) / (root + self.eps)
            looks.append((self.m.copy(), self.v.copy(), path))
        return Look(*map(np.stack, zip(*looks, strict=True)))


def compare(found: Look, exact: Look, root: np.ndarray, group: np.ndarray) -> dict[str, float]:
    """A group's errors.

    Those of m and of √v are relative to the exact √v; where v has all but died, to a thirtieth of
    its stationary root. m counts as too large where it is too large in size. The gain is that of
    the updates' sums along the exact ones, the path's error their root mean square difference.
    """
    m, v, path = (np.asarray(x, np.float64)[:, group] for x in found)
    m_exact, v_exact, path_exact = (x[:, group] for x in exact)
    divisor = np.maximum(np.sqrt(v_exact), FLOOR * root[group])
    root_error = (np.sqrt(v) - np.sqrt(v_exact)) / divisor
    m_error = (m - m_exact) * np.sign(m_exact) / divisor
    power = np.sum(path_exact**2)
    return {
        "root bias": float(root_error.mean()),
        "root spread": float(root_error.std()),
        "m bias": float(m_error.mean()),
        "m spread": float(m_error.std()),
        "gain": float(np.sum(path * path_exact) / power - 1),
        "path error": float(np.sqrt(np.sum((path - path_exact) ** 2) / power)),
    }


def curves(
    storages: Sequence[Storage] = STORAGES,
    rates: Sequence[Rates] = RATES,
    steps: int = STEPS,
    points: int = POINTS,
    every: int = EVERY,
) -> dict[str, Any]:
    """Of each storage, decay rates and group the quantities over time."""
    gradients = Gradients(steps)
    piece = steps // points
    shape = gradients.scale(1).shape
    groups = {label: gradients.group(label) for label in GROUPS}
    like = jnp.zeros(shape, jnp.float32)
    exact = {pair: Exact(shape, pair) for pair in rates}
    running = {
        (storage.name, pair): (program(storage, pair), storage.start(like, pair))
        for storage in storages
        for pair in rates
    }
    found: dict[str, Any] = {
        storage.name: {
            f"{b1:g}, {b2:g}": {label: {q: [] for q in QUANTITIES} for label in GROUPS}
            for b1, b2 in rates
        }
        for storage in storages
    }
    for first in track(range(0, steps, piece), "drift"):
        g = gradients.at(first + 1, piece).reshape(-1, every, *shape)
        root = gradients.root(first + 1)
        for pair in rates:
            there = exact[pair].run(g)
            for storage in storages:
                run, stored = running[storage.name, pair]
                stored, looks = run(stored, jnp.int32(first), g)
                running[storage.name, pair] = run, stored
                row = found[storage.name]["{:g}, {:g}".format(*pair)]
                for label, group in groups.items():
                    for quantity, x in compare(looks, there, root, group).items():
                        row[label][quantity].append(float(f"{x:.4g}"))
    return {"steps": list(range(piece, steps + 1, piece)), "storages": found}
