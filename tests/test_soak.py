"""What only shows after many steps: memory that grows, threads that wait for each other.

`make soak` runs them.
"""

import gc
import os
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jadam

pytestmark = pytest.mark.soak

STORAGES = {
    "float32": {},
    "bfloat16": {"mu_dtype": "bfloat16", "nu_dtype": "bfloat16"},
    "8 bits": {"mu_dtype": "int8", "nu_dtype": "uint8", "min_size": 0},
    "4 bits": {"mu_dtype": "int4", "nu_dtype": "uint4", "min_size": 0},
}
each_storage = pytest.mark.parametrize("storage", STORAGES)


def problem():
    rng = np.random.default_rng(0)
    return {"w": jnp.asarray(rng.standard_normal((64, 256)), jnp.float32), "b": jnp.ones(3)}


def resident():
    """Bytes of this process in memory."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("kernel", ["auto", "xla"])
@each_storage
def test_memory_does_not_grow(storage, kernel):
    """In three times 20,000 steps and updates, each a call of its own.

    The allocator's pools grow by up to 4 MB in some 20,000, by 0.2 MB at most in the least of
    three; what is kept of every call grows in all of them. 1 MB is 50 bytes a call.
    """
    tx = jadam.adamw(1e-3, kernel=kernel, **STORAGES[storage])

    @jax.jit
    def step(params, state):
        params, state = tx.step(params, state, params)
        updates, state = tx.update(params, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    params, state = problem(), tx.init(problem())
    grown, arrays = [], []
    for steps in (2_000, 20_000, 20_000, 20_000):
        before = resident()
        for _ in range(steps):
            params, state = step(params, state)
        jax.block_until_ready(params)
        grown.append(resident() - before)
        arrays.append(len(jax.live_arrays()))
    assert arrays == arrays[:1] * 4
    assert min(grown[1:]) < 1e6
    assert all(np.all(np.isfinite(p)) for p in jax.tree.leaves(params))


@pytest.mark.parametrize("callback", [False, True], ids=["", "pure_callback"])
@each_storage
def test_eight_threads_do_not_wait_for_each_other(storage, callback):
    """1,000 steps in each of eight threads end, and give what each gives alone.

    With gradients from `jax.pure_callback` a step needs one of XLA's threads and Python's lock.
    """
    tx = jadam.adamw(1e-2, **STORAGES[storage])

    def on_host(params):
        return jax.tree.map(lambda p: 2 * np.asarray(p), params)

    @jax.jit
    def step(params, state):
        shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
        if callback:
            grads = jax.pure_callback(on_host, shapes, params)
        else:
            grads = jax.tree.map(lambda p: 2 * p, params)
        return tx.step(grads, state, params)

    def trained(seed):
        params = jax.tree.map(lambda p: p * (1 + seed), problem())
        state = tx.init(params)
        for _ in range(1_000):
            params, state = step(params, state)
        return jax.tree.map(np.asarray, params)

    found = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: trained(i)}), daemon=True)
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)  # a bound for what hangs, not a measurement
    assert not any(thread.is_alive() for thread in threads)
    for seed in (0, 7):
        jax.tree.map(np.testing.assert_array_equal, found[seed], trained(seed))
