"""How a candidate is judged: errors along streams, training, time, and what must never happen."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, PyTree
from rich.progress import track

from experiments.common import report

from .adam import EPS, Betas, Moment
from .blocks import Stored, safe
from .candidates import FLOAT32, Codec
from .streams import BLOCK, Stream, all_streams, mnist_problem, shrink

BETAS = [(0.9, 0.999), (0.9, 0.95), (0.95, 0.99999)]


def reference(g: Stream, b1: float, b2: float) -> tuple[np.ndarray, np.ndarray]:
    """Adam in float64: the updates as float32 and the last √v."""
    m, v = np.zeros(g.shape[1:]), np.zeros(g.shape[1:])
    updates = np.empty_like(g)
    for t, g_t in enumerate(g, 1):
        m = b1 * m + (1 - b1) * g_t
        v = b2 * v + (1 - b2) * np.square(g_t, dtype=np.float64)
        updates[t - 1] = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + EPS)
    return updates, np.sqrt(v)


class Replay(NamedTuple):
    """What a run of one codec along a stream gives: u are its updates."""

    error: Array  # Σ(u - exact)², [steps, blocks]
    power: Array  # Σ exact²
    excess: Array  # largest |u|/bound(t)
    sample: Array  # |u - exact| of every 16th element
    drift: Array  # |Σₜ u - exact|², [blocks]
    path: Array  # |Σₜ exact|²
    m: Array
    root: Array


def advance(
    codec: Codec, stored: Stored, t: Array, g: Moment, betas: Betas, eps: float = EPS
) -> tuple[Stored, Moment, Float[Array, ""]]:
    """One step: the stored moments after it, the update, and the bound of its size."""
    m, v = codec.decode(stored, t - 1, betas)
    m, v = betas.step(m, v, g)
    c1, c2 = betas.corrections(t)
    u = safe(m, c1 * (jnp.sqrt(v / c2) + eps))
    bound = betas.largest_ratio(t) * jnp.sqrt(c2) / c1
    return codec.encode(m, v, g, t, betas), u, bound


def first(codec: Codec, like: Array, betas: Betas) -> Stored:
    """What is stored before the first step: moments of 0."""
    zero = jnp.zeros(like.shape)
    return codec.encode(zero, zero + 0, zero, jnp.int32(0), betas)


@partial(jax.jit, static_argnums=(0, 4))
def replay(codec: Codec, g: Array, exact: Array, betas: Betas, eps: float = EPS) -> Replay:
    """A run of the codec along gradients [steps, blocks, 128], beside the exact updates."""

    def step(carry: tuple, x: tuple) -> tuple:
        stored, drift, path = carry
        t, g, exact = x
        stored, u, bound = advance(codec, stored, t, g, betas, eps)
        d = u - exact
        out = (d * d).sum(1), (exact * exact).sum(1), jnp.abs(u).max(1) / bound, jnp.abs(d[:, ::16])
        return (stored, drift + d, path + exact), out

    zero = jnp.zeros(g.shape[1:])
    t = jnp.arange(1, len(g) + 1)
    (stored, drift, path), out = lax.scan(
        step, (first(codec, g[0], betas), zero, zero), (t, g, exact)
    )
    m, v = codec.decode(stored, t[-1], betas)
    return Replay(*out, (drift**2).sum(1), (path**2).sum(1), m, jnp.sqrt(v))


def accuracy(r: Replay, blocks: slice) -> dict[str, float]:
    """Errors of the updates: of one step, relative to the root mean square, and of their sum."""
    error, power = r.error[:, blocks].astype(float), r.power[:, blocks].astype(float)
    rms = np.sqrt(power.mean() / BLOCK)
    sample = np.asarray(r.sample[:, blocks])
    return {
        "nmse": float(error.sum() / power.sum()),
        "median": float(np.median(sample) / rms),
        "p99": float(np.quantile(sample, 0.99) / rms),
        "drift": float(np.sqrt(r.drift[blocks].sum() / r.path[blocks].sum())),
        "bound": float(np.max(r.excess[:, blocks])),
    }


def staleness(r: Replay, exact_root: np.ndarray) -> dict[str, float]:
    """Stored over exact √v after the gradients have shrunk, and what is left where they died."""
    ratio = np.asarray(r.root, float) / exact_root
    shrunk, dead = ratio[:6, 1:], ratio[6:, ::2]
    return {
        "mean": float(shrunk.mean()),
        "sd": float(shrunk.std()),
        "p1": float(np.quantile(shrunk, 0.01)),
        "p99": float(np.quantile(shrunk, 0.99)),
        "alive_sd": float(ratio[6:, 1::2].std()),
        "dead_mean": float(dead.mean()),
        "dead_m": float(np.abs(np.asarray(r.m)[6:, ::2]).max()),
    }


# ---------------------------------------------------------------------------- training, time


def train_loss(codec: Codec, seeds: int = 2, steps: int = 400) -> list[float]:
    """The MNIST CNN's mean loss over the last 100 of 400 steps."""
    betas = Betas.of(0.9, 0.999)

    def blocks(x: Array) -> Array:
        return jnp.pad(x.reshape(-1), (0, -x.size % BLOCK)).reshape(-1, BLOCK)

    loss, *_ = mnist_problem(0, steps)

    @jax.jit
    def run(params: PyTree, batches: Array) -> Array:
        def step(carry: tuple, x: tuple) -> tuple:
            params, stored = carry
            t, batch = x
            value, grads = jax.value_and_grad(loss)(params, batch)
            leaves, treedef = jax.tree.flatten(grads)
            updates = []
            for i, g in enumerate(leaves):
                stored[i], u, _ = advance(codec, stored[i], t, blocks(g), betas)
                updates.append(-1e-3 * u.reshape(-1)[: g.size].reshape(g.shape))
            return (optax.apply_updates(params, treedef.unflatten(updates)), stored), value

        stored = [first(codec, blocks(p), betas) for p in jax.tree.leaves(params)]
        return lax.scan(step, (params, stored), (jnp.arange(1, steps + 1), batches))[1]

    return [float(run(*mnist_problem(seed, steps)[1:])[-100:].mean()) for seed in range(seeds)]


def nanoseconds(codec: Codec) -> float:
    """An element's share of a jitted decode, step and encode of 2²⁰ elements: the least of 20."""
    betas = Betas.of(0.9, 0.999)
    g = jax.random.normal(jax.random.key(0), (2**13, BLOCK))
    step = jax.jit(lambda stored, t, g: advance(codec, stored, t, g, betas)[:2], donate_argnums=0)
    stored, times = first(codec, g, betas), []
    for t in range(1, 22):
        clock = time.perf_counter()
        stored, _ = jax.block_until_ready(step(stored, jnp.int32(t), g))
        times.append(time.perf_counter() - clock)
    return min(times[1:]) / g.size * 1e9


# ------------------------------------------------------------------------------ requirements


def hostile(codec: Codec, b1: float, b2: float) -> float:
    """The largest |update|/bound without eps, over gradients of 40 decades with zeros and jumps."""
    rng = np.random.default_rng(0)
    shape = (400, 32, BLOCK)
    scale = 10 ** rng.uniform(-15, 15, (8, 32, BLOCK)).repeat(50, 0)
    g = np.where(rng.random(shape) < 0.7, scale * rng.standard_t(1, shape), 0).astype(np.float32)
    r = replay(codec, g, np.zeros_like(g), Betas.of(b1, b2), 0.0)
    return float(jnp.max(r.excess))


def dies(codec: Codec, steps: int = 200_000) -> dict[str, float]:
    """√v and |m| of elements without a gradient for 200,000 steps; one block has one that lives."""
    betas = Betas.of(0.9, 0.999)

    @jax.jit
    def run(g: Array) -> tuple[Array, Array]:
        def step(stored: Stored, t: Array) -> tuple[Stored, None]:
            alive = (t <= 100) | (jnp.arange(g.size).reshape(g.shape) == 0)
            return advance(codec, stored, t, jnp.where(alive, g, 0), betas)[0], None

        stored, _ = lax.scan(step, first(codec, g, betas), jnp.arange(1, steps + 1))
        return codec.decode(stored, jnp.int32(steps), betas)

    m, v = run(jax.random.normal(jax.random.key(1), (2, BLOCK)))
    dead = np.ones(m.shape, bool)
    dead[0, 0] = False
    return {"root": float(jnp.sqrt(v)[dead].max()), "m": float(jnp.abs(m)[dead].max())}


def poisoned(codec: Codec) -> list[list[int]]:
    """Which elements are not finite in the end, after one gradient of NaN and one of infinity."""
    betas = Betas.of(0.9, 0.999)
    stored = first(codec, jnp.zeros((2, BLOCK)), betas)
    for t in range(1, 30):
        g = jax.random.normal(jax.random.key(t), (2, BLOCK))
        if t == 10:
            g = g.at[0, 3].set(jnp.nan).at[1, 5].set(jnp.inf)
        stored, u, _ = advance(codec, stored, jnp.int32(t), g, betas)
    finite = [jnp.isfinite(x) for x in (u, *codec.decode(stored, jnp.int32(29), betas))]
    return np.argwhere(~(finite[0] & finite[1] & finite[2])).tolist()


# ---------------------------------------------------------------------------- the comparison


def compare(candidates: Sequence[Codec], winner: Codec, command: str) -> dict[str, Any]:
    """All numbers that go to JSON."""
    streams = all_streams()
    edges = np.cumsum([0] + [s.shape[1] for s in streams.values()])
    places = {name: slice(*edges[i : i + 2]) for i, name in enumerate(streams)}
    g = np.concatenate(list(streams.values()), 1)
    stale = {"equal scales": shrink(0), "mixed scales": shrink(1)}
    rows: dict[str, Any] = {}
    for b1, b2 in BETAS:
        betas, exact = Betas.of(b1, b2), reference(g, b1, b2)[0]
        stale_exact = {name: reference(x, b1, b2) for name, x in stale.items()}
        for codec in track(candidates, f"b1={b1} b2={b2}"):
            row = rows.setdefault(codec.name, {"bytes": codec.bytes_per_parameter})
            r = jax.device_get(replay(codec, g, exact, betas))
            row[f"{b1},{b2}"] = {
                "streams": {name: accuracy(r, place) for name, place in places.items()},
                "shrink": {
                    name: staleness(jax.device_get(replay(codec, x, exact, betas)), root)
                    for (name, x), (exact, root) in zip(
                        stale.items(), stale_exact.values(), strict=True
                    )
                },
            }
    for codec in track(candidates, "nanoseconds"):
        rows[codec.name]["nanoseconds"] = nanoseconds(codec)
    rows[FLOAT32.name] = {"bytes": 8.0, "nanoseconds": nanoseconds(FLOAT32)}
    return {
        **report.provenance(command),
        "winner": {
            "name": winner.name,
            "bound, 40 decades, no eps": {str(b): hostile(winner, *b) for b in BETAS},
            "after 200,000 steps without gradient": dies(winner),
            "not finite after NaN at [0, 3], infinity at [1, 5]": poisoned(winner),
        },
        "rows": rows,
    }
