"""Lazy Adam on the rows that are touched, beside the dense transformation of the same table."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jadam
from jadam import rows

SHAPE = (40, 16)


def batches(steps, n=6, seed=0):
    """Ids that come often and seldom, some of them twice in a batch, with gradients."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        ids = np.minimum(rng.geometric(0.15, n) - 1, SHAPE[0] - 1)
        yield jnp.asarray(ids), jnp.asarray(rng.standard_normal((n, SHAPE[1])), jnp.float32)


def dense_and_lazy(tx, steps=60):
    """The table after the same batches, and the moments."""
    table = jnp.asarray(np.random.default_rng(1).standard_normal(SHAPE), jnp.float32)
    part = rows.lazy(tx)
    state, lazy_state, lazy_table = tx.init(table), part.init(table), table
    scatter, step = jax.jit(part.scatter), jax.jit(tx.step)
    for ids, g in batches(steps):
        whole = jnp.zeros(SHAPE).at[ids].add(g)
        table, state = step(whole, state, table)
        lazy_table, lazy_state = scatter(g, ids, lazy_table, lazy_state)
    lazy_table, lazy_state = part.flush(lazy_table, lazy_state)
    return (table, state), (lazy_table, lazy_state.dense)


MEMBERS = {
    "adam": lambda: jadam.adam(1e-2),
    "adamw": lambda: jadam.adamw(1e-2, weight_decay=0.1),
    "adamw schedule": lambda: jadam.adamw(
        optax.linear_schedule(1e-2, 1e-3, 40), weight_decay=0.1, b2=0.99
    ),
    "nadam": lambda: jadam.nadam(1e-2),
    "amsgrad": lambda: jadam.amsgrad(1e-2),
    "adamax": lambda: jadam.adamax(1e-2),
    "radam": lambda: jadam.radam(1e-2),
}


@pytest.mark.parametrize("member", MEMBERS)
def test_lazy_rows_are_those_of_dense_adam(member):
    """Rows that were missed for many steps, and once brought up to date, are the dense ones."""
    (table, state), (lazy_table, lazy_state) = dense_and_lazy(MEMBERS[member]())
    # Sixty steps of up to 1e-2, each off by some ulps of float32 in its own way.
    np.testing.assert_allclose(lazy_table, table, rtol=1e-5, atol=5e-6)
    dense, kept = (jax.tree.leaves(x) for x in (state, lazy_state))
    for x, y in zip(kept, dense, strict=True):
        # Powers in place of up to sixty roundings of an ulp each; m is a sum that may cancel, so it
        # is measured beside its largest.
        slack = 60 * 2.0**-23
        np.testing.assert_allclose(x, y, rtol=slack, atol=slack * np.max(np.abs(y), initial=0))


def test_gather_gives_the_rows_as_they_are_now():
    """Before the next gradient: the motion and the decay that the row has missed are made."""
    tx = jadam.adamw(1e-2, weight_decay=0.1)
    table = jnp.ones(SHAPE)
    part = rows.lazy(tx)
    state, dense = part.init(table), tx.init(table)
    whole = table
    for t in range(5):
        g = jnp.full((1, SHAPE[1]), float(t + 1))
        ids = jnp.asarray([3 if t == 0 else 5])
        table, state = part.scatter(g, ids, table, state)
        whole, dense = tx.step(jnp.zeros(SHAPE).at[ids].add(g), dense, whole)
    # Some ulps a step.
    np.testing.assert_allclose(
        part.gather(table, state, jnp.asarray([3, 5, 7])), whole[jnp.asarray([3, 5, 7])], rtol=1e-6
    )


def test_a_step_moves_the_rows_that_are_touched_alone():
    """Donated: nothing of the table's size is copied or held, whatever the number of rows."""
    part = rows.lazy(jadam.adam(1e-2))

    def step(table, state, grads, ids):
        return part.scatter(grads, ids, table, state)

    sizes = []
    for n in (4096, 16384):
        table, ids = jnp.zeros((n, 64)), jnp.arange(32)
        program = jax.jit(step, donate_argnums=(0, 1)).lower(
            table, part.init(table), jnp.ones((32, 64)), ids
        )
        sizes.append(program.compile().memory_analysis().temp_size_in_bytes)
    assert sizes[1] <= sizes[0] + 1024 < 4096 * 64


@pytest.mark.parametrize("bad", [40, -1])
def test_an_id_that_is_no_row_is_refused_where_it_is_known(bad):
    """Never another row's gradient, and never one that is dropped without a word."""
    table = jnp.ones(SHAPE)
    part = rows.lazy(jadam.adam(1e-2))
    with pytest.raises(ValueError, match="ids"):
        part.gather(table, part.init(table), jnp.asarray([0, bad]))
