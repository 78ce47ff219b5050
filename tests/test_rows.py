"""jadam.rows: a table by its touched rows is the table of the dense transformation."""

import copy
import functools
import importlib.util
import json
import logging
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from fixtures import sparse_adam
from helpers import FAMILY
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jadam
from jadam.rows import _fading

CODES = {"mu_dtype": "int8", "nu_dtype": "uint8"}
SIZE, WIDTH, BATCH, STEPS = 12, 5, 3, 320
SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 50, STEPS)
ROWS, ROWS_OF_TABLE = jadam.rows.lazy(jadam.adam(1e-3)), 1_000_000
CASES = {case.name: case for case in FAMILY if not case.name.startswith("ademamix")}


def sgd_noise(seed, *, scale=1.0, batch=BATCH, rows=SIZE):
    """A table, and the ids and gradients of a history in which rows are absent for long.

    The last batch is of all rows, so that all are up to date after it; others are of `batch` of the
    first `rows`, padded with -1.
    """
    rng = np.random.default_rng(seed)
    # After step 60 the rows from 4 on are touched rarely; the last row never is.
    often = np.where(np.arange(STEPS)[:, None] < 60, SIZE - 1, 4)
    high = np.where(rng.random((STEPS, 1)) < 0.02, SIZE - 1, often)
    ids = (rng.random((STEPS, BATCH)) * high).astype(np.int32) % rows
    ids[:, batch:] = -1
    grads = scale * rng.standard_normal((STEPS, SIZE, WIDTH))
    table = 0.1 * rng.standard_normal((SIZE, WIDTH))
    return table.astype(np.float32), padded(ids), grads.astype(np.float32)


def padded(ids):
    rest = np.full((STEPS, SIZE - BATCH), -1, np.int32)
    ids = np.concatenate([ids, rest], axis=1)
    ids[-1] = np.arange(SIZE)
    return ids


def dense_gradients(ids, grads):
    whole = np.zeros((len(ids), SIZE, grads.shape[-1]), np.float32)
    for g, row, rows in zip(whole, ids, grads, strict=True):
        np.add.at(g, row[row >= 0], rows[row >= 0])
    return whole


def run_lazy(rows, flushes, table, ids, grads):
    """A history in one `lax.scan`, and all rows brought up to date."""
    if flushes:
        ids, grads = ids[:-1], grads[:-1]

    def body(carry, batch):
        return rows.scatter(batch[1], batch[0], *carry), None

    carry, _ = jax.lax.scan(body, (table, rows.init(table)), (ids, grads))
    return rows.flush(*carry) if flushes else carry


def run_dense(tx, flushes, table, gradients):
    gradients = gradients[:-1] if flushes else gradients

    def body(carry, g):
        return tx.step(g, carry[1], carry[0]), None

    return jax.lax.scan(body, (table, tx.init(table)), gradients)[0]


@functools.cache
def both(name, catch_up, scheduled=False, dtype=None, *, flushes=False, kernel="xla"):
    """The compiled histories of a member: by rows, and dense.

    They end with a batch of all rows, or before it and with `flush`.
    """
    codes = {"mu_dtype": "int8", "nu_dtype": "uint8", "min_size": 0}
    storage = codes if dtype == "codes" else {"mu_dtype": dtype, "nu_dtype": dtype}
    tx = CASES[name](SCHEDULE if scheduled else 1e-2, kernel=kernel, **storage)
    rows = jadam.rows.lazy(tx, catch_up=catch_up)
    lazily = jax.jit(functools.partial(run_lazy, rows, flushes))
    return lazily, jax.jit(functools.partial(run_dense, tx, flushes))


def exact_table(case, table, gradients, scheduled):
    """The same in NumPy's float64."""
    p = table.astype(np.float64)
    decay = case.weight_decay
    for t, direction in enumerate(reference.directions(gradients, **case.reference)):
        rate = float(SCHEDULE(t)) if scheduled else 1e-2
        p -= rate * (direction + decay * p)
    return p


HISTORIES = hypothesis.settings(max_examples=5)
SUMMED = [
    ("adam_eps_root", False, "xla"),
    pytest.param("adamw", False, "auto", marks=pytest.mark.soak),
    ("adamw", True, "auto"),
    ("adamw", True, "xla"),
    pytest.param("nadam", False, "auto", marks=pytest.mark.soak),
    ("nadam_dozat", False, "xla"),
    pytest.param("amsgrad", False, "xla", marks=pytest.mark.soak),
    ("amsgrad_corrected", False, "xla"),
    ("radam", False, "auto"),
]


@pytest.mark.usefixtures("either_compilation")
@pytest.mark.parametrize(("name", "scheduled", "kernel"), SUMMED)
def test_summed_steps_are_those_of_float64(name, scheduled, kernel, standard_promotion):
    """Any history, then flush: parameters to a few ulps of float64, moments of dense."""
    flushes = name == "adamw"
    lazily, densely = both(name, "sum", scheduled, flushes=flushes, kernel=kernel)

    @HISTORIES
    @hypothesis.given(
        seed=st.integers(0, 2**16),
        scale=st.sampled_from([1.0, 1e-4, 3e-8]),
        batch=st.integers(0, BATCH),
        rows=st.integers(1, SIZE),
    )
    def check(seed, scale, batch, rows):
        table, ids, grads = sgd_noise(seed, scale=scale, batch=batch, rows=rows)
        got, state = lazily(table, ids, grads)
        whole = dense_gradients(ids, grads)
        counted = whole[:-1] if flushes else whole
        expected = exact_table(CASES[name], table, counted, scheduled)
        # Each touch rounds p by half an ulp and makes a step that is some ulps of 7 learning rates
        # off, an absence 1e-5 of a learning rate. Dense steps round p in every step.
        ulp = np.spacing(np.float32(np.abs(expected).max()))
        assert np.abs(np.asarray(got) - expected).max() <= 8 * ulp + 2e-5 * 1e-2
        _, dense = densely(table, whole)
        for x, y in zip(jax.tree.leaves(state.dense), jax.tree.leaves(dense), strict=True):
            # Dense v is dithered by an ulp in each step, m rounded: after 260 of them, 3e-5 of the
            # largest moment is 500 ulps of itself.
            np.testing.assert_allclose(x, y, rtol=0, atol=2e-6 * np.abs(np.asarray(y)).max())

    check()


STEPPED = [
    pytest.param("adam", False, None, marks=pytest.mark.soak),
    ("adamw", True, None),
    ("amsgrad_corrected", False, None),
    pytest.param("adamaxw", True, None, marks=pytest.mark.soak),
    pytest.param("adamw", False, jnp.bfloat16, marks=pytest.mark.soak),
]


@pytest.mark.parametrize(("name", "scheduled", "dtype"), STEPPED)
def test_missed_steps_one_by_one_have_the_bits_of_dense(name, scheduled, dtype, standard_promotion):
    """Moments bit for bit, dithers and all; parameters to an ulp or two."""
    lazily, densely = both(name, "steps", scheduled, dtype)
    for seed in range(3):
        table, ids, grads = sgd_noise(seed)
        # No absence is longer than the horizon, 200 steps with these b1 and b2.
        ids[150:-1:100, :BATCH] = np.arange(BATCH)
        for row in range(SIZE):
            ids[row % 4 : -1 : 97, row % BATCH] = row
        got, state = lazily(table, ids, grads)
        expected, dense = densely(table, dense_gradients(ids, grads))
        jax.tree.map(np.testing.assert_array_equal, state.dense, dense)
        # A multiplication that XLA fuses with an addition in one of the programs alone.
        ulp = np.spacing(np.float32(np.abs(np.asarray(expected)).max()))
        assert np.abs(np.asarray(got) - np.asarray(expected)).max() <= 2 * ulp


def test_codes_of_8_bits_have_the_bits_of_dense():
    """Blocks lie along a row, and the dither depends on count and lane."""
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.standard_normal((6, 160)), jnp.float32)
    tx = jadam.adam(1e-2, mu_dtype="int8", nu_dtype="uint8", min_size=0, kernel="xla")
    rows = jadam.rows.lazy(tx)
    scatter, step = jax.jit(rows.scatter), jax.jit(tx.step)
    p, state, lazy_state = table, tx.init(table), rows.init(table)
    for i in range(40):
        # The last batch is of all rows.
        ids = rng.permutation(6)
        ids[2:] = ids[2:] if i == 39 else -1
        g = jnp.asarray(rng.standard_normal((6, 160)), jnp.float32)
        p, state = step(jnp.zeros_like(p).at[jnp.asarray(ids % 7)].set(g, mode="drop"), state, p)
        table, lazy_state = scatter(g, jnp.asarray(ids), table, lazy_state)
    jax.tree.map(np.testing.assert_array_equal, lazy_state.dense, state)
    np.testing.assert_allclose(table, p, rtol=0, atol=2 * np.spacing(np.float32(3)))


@pytest.mark.usefixtures("either_compilation")
@pytest.mark.parametrize("options", [CODES, {"mu_dtype": jnp.bfloat16, "nu_dtype": jnp.bfloat16}])
def test_missed_steps_of_fewer_bits_can_be_summed(options):
    """With catch_up="sum": p moves as in float64 from the moments as they are stored."""
    rng, absence = np.random.default_rng(0), 300
    tx = jadam.adam(1.0, min_size=0, **options)
    rows = jadam.rows.lazy(tx, catch_up="sum")
    table = jnp.zeros((4, 64), jnp.float32)
    state, scatter = rows.init(table), jax.jit(rows.scatter)
    for _ in range(3):
        table, state = scatter(rng.standard_normal(table.shape), np.arange(4), table, state)
    stored = jadam.moments(state.dense)[0]
    member = reference.Member(t=3, m=np.float64(stored.mu), v=np.float64(stored.nu))
    expected = -sum(member(np.zeros(table.shape)) for _ in range(absence))
    moments = state.dense[0]._replace(count=jnp.int32(3 + absence))
    got, after = jax.jit(rows.flush)(table, state._replace(dense=(moments, *state.dense[1:])))
    # 1e-5 learning rates, as the docstring says, and the last rounding of p.
    error = np.abs(np.float64(got) - np.float64(table) - expected)
    assert (error <= 1e-5 + 2 * np.spacing(np.abs(np.asarray(got)))).all()
    # v is rounded once, to a neighbouring code: 2^(1/16) apart, or 2⁻⁸.
    nu = jadam.moments(after.dense)[0].nu
    np.testing.assert_allclose(nu, member.v, rtol=2 ** (1 / 16) - 1)


def test_a_row_that_missed_nothing_has_the_bits_of_the_dense_kernel():
    """Batches of all rows in any order: the same equations in C++, so the same bits."""
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.standard_normal((40, 19)), jnp.float32)
    tx = jadam.adamw(1e-2, weight_decay=0.1)
    rows = jadam.rows.lazy(tx)
    scatter, step = jax.jit(rows.scatter), jax.jit(tx.step)
    p, dense, state = table, tx.init(table), rows.init(table)
    for _ in range(5):
        ids, g = rng.permutation(40), rng.standard_normal((40, 19)).astype(np.float32)
        table, state = scatter(g[ids], ids, table, state)
        p, dense = step(jnp.asarray(g), dense, p)
    jax.tree.map(np.testing.assert_array_equal, (table, state.dense), (p, dense))


@pytest.mark.usefixtures("either_compilation")
def test_many_equal_ids_in_the_kernel_are_as_in_xla():
    """Each row some ten times, padding among them, 3 jobs: sums in the order of the batch."""
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.standard_normal((30, 300)), jnp.float32)
    ids = rng.integers(-3, 33, 300)
    g = rng.standard_normal((300, 300)).astype(np.float32)
    results = []
    for kernel in ("native", "xla"):
        rows = jadam.rows.lazy(jadam.adam(1e-2, kernel=kernel))
        scatter, gather = jax.jit(rows.scatter), jax.jit(rows.gather)
        carry = scatter(g, ids, table, rows.init(table))
        carry = scatter(g[:5], ids[:5], *carry)
        results.append((carry, gather(*carry, ids)))
    # Adam's division magnifies where XLA fuses otherwise; m and v themselves are an ulp or two off.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
    jax.tree.map(close, *results)


@pytest.mark.usefixtures("either_compilation")
def test_the_kernel_gives_way_to_xla():
    """Under vmap, in derivatives and in an export: the same numbers, and no call of the library."""
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.standard_normal((2, 6, 4)), jnp.float32)
    g = jnp.asarray(rng.standard_normal((2, 3, 4)), jnp.float32)
    ids = jnp.asarray([[0, 2, 0], [5, 1, 2]])
    rows = jadam.rows.lazy(jadam.adam(1e-2))
    states = jax.vmap(rows.init)(table)
    args = g, ids, table, states
    first = jax.tree.map(lambda x: x[0], args)
    expected = jax.jit(rows.scatter)(*first)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
    got = jax.jit(jax.vmap(rows.scatter))(*args)
    jax.tree.map(lambda x, y: close(x[0], y), got, expected)

    def moved(g, ids, table, state, kernel):
        rows = jadam.rows.lazy(jadam.adam(1e-2, eps=1.0, kernel=kernel))
        return rows.scatter(g, ids, table, state)[0].sum()

    slope = jax.jit(jax.grad(moved), static_argnums=4)
    slopes = [slope(*first, kernel) for kernel in ("auto", "xla")]
    assert np.all(np.asarray(slopes[0]) != 0)
    close(*slopes)
    exported = jax.export.export(jax.jit(rows.scatter))(*first)
    assert "jadam_rows_step" not in exported.mlir_module()
    assert "jadam_rows_step" in jax.jit(rows.scatter).lower(*first).as_text()


@pytest.mark.usefixtures("either_compilation")
@pytest.mark.parametrize(
    ("b1", "b2"), [(0.9, 0.999), pytest.param(0.9, 0.9, marks=pytest.mark.soak), (0.0, 0.999)]
)
def test_an_absence_moves_a_row_as_far_as_float64(b1, b2):
    """After 1, 2, 20 or 1000 updates, for gradients around eps and far above."""
    sizes = (10.0 ** np.arange(-10, 1, 0.5)).astype(np.float32)
    rows = jadam.rows.lazy(jadam.adam(1.0, b1=b1, b2=b2), catch_up="sum")
    table = jnp.zeros((1, sizes.size), jnp.float32)
    start, flush = rows.init(table), jax.jit(rows.flush)
    for touch in (1, 2, 20, 1000):
        for absence in (1, 30, 1000):
            member = reference.Member(b1=b1, b2=b2, t=touch - 1)
            member(sizes)
            mu, nu = (jnp.asarray(x[None], jnp.float32) for x in (member.m, member.v))
            moments = start.dense[0]._replace(count=jnp.int32(touch + absence), mu=mu, nu=nu)
            state = start._replace(dense=(moments, *start.dense[1:]), last=jnp.full(1, touch))
            got, _ = flush(table, state)
            expected = -sum(member(np.zeros(sizes.size)) for _ in range(absence))
            # 1e-5 learning rates, as the docstring says, and the last rounding of p.
            error = np.abs(np.asarray(got[0], np.float64) - expected)
            assert (error <= 1e-5 + np.spacing(np.abs(np.asarray(got[0])))).all()


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("name", "b1", "rate", "decay", "count"),
    [
        ("adam", 0.9, 0.1, 0.1, 500),
        ("adam", 1e-3, lambda made: 0.1 / (1 + made), 0.0, 500),
        ("adam", 0.9, 0.1, 5.0, 500),  # within 160 steps p falls below 2^-128
        ("radam", 0.9, 0.1, 0.0, 402),  # one row stands before the third step, where nothing adapts
    ],
    ids=["decay", "schedule", "heavy decay", "radam"],
)
def test_absences_shorter_and_longer_than_a_row_moves(name, b1, rate, decay, count):
    """In one table: each row moves and decays in its own steps as in float64."""
    absences = np.array([0, 1, 2, 60, 150, 400])
    rng = np.random.default_rng(0)
    make = functools.partial(jadam.adamw, weight_decay=decay) if name == "adam" else jadam.radam
    rows = jadam.rows.lazy(make(rate, b1=b1, kernel="xla"), catch_up="sum")
    table, m = rng.standard_normal((2, absences.size, 4)).astype(np.float32)
    v = m**2 / 2
    state = rows.init(jnp.asarray(table))
    moments = state.dense[0]._replace(count=jnp.int32(count), mu=jnp.asarray(m), nu=jnp.asarray(v))
    state = state._replace(dense=(moments, *state.dense[1:]), last=jnp.asarray(count - absences))
    got, after = jax.jit(rows.flush)(table, state)
    for row, absence in enumerate(absences):
        member = reference.Member(name, b1, t=count - absence, m=np.float64(m[row]), v=v[row])
        p = table[row].astype(np.float64)
        for made in range(count - absence, count):
            p -= (rate(made) if callable(rate) else rate) * (member(np.zeros(4)) + decay * p)
        # 1e-5 learning rates, as the docstring says; 1e-6 of p: its decay is a power in float32.
        np.testing.assert_allclose(got[row], p, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(after.dense[0].mu[row], member.m, rtol=1e-5, atol=1e-30)
        np.testing.assert_allclose(after.dense[0].nu[row], member.v, rtol=1e-5)


def test_missed_steps_of_float64_are_not_summed(x64):
    """Their sums are in float32: they are refused, or taken one by one."""
    rows, table = jadam.rows.lazy(jadam.adam(0.1), catch_up="sum"), jnp.ones((1, 4), jnp.float64)
    with pytest.raises(ValueError, match=r"for moments of 32 bits or less .* in float64 float64"):
        rows.flush(table, rows.init(table))


@pytest.mark.usefixtures("quick_compilation")
def test_a_learning_rate_may_be_traced():
    """As one that is a number: the weights of the missed steps are then made in the program."""
    table = jnp.ones((3, 4))

    def flushed(rate):
        rows = jadam.rows.lazy(jadam.adam(rate), catch_up="sum")
        moments, *rest = rows.init(table).dense
        moments = moments._replace(count=jnp.int32(9), mu=table, nu=table)
        return rows.flush(table, rows.init(table)._replace(dense=(moments, *rest)))[0]

    member = reference.Member(m=np.ones(4), v=np.ones(4))
    expected = 1 - 0.01 * sum(member(np.zeros(4)) for _ in range(9))
    for found in (jax.jit(flushed)(jnp.float32(0.01)), jax.jit(lambda: flushed(0.01))()):
        # 1e-5 learning rates, as the docstring says, and a rounding of p.
        np.testing.assert_allclose(found[0], expected, rtol=1.2e-7, atol=1e-7)


@pytest.mark.usefixtures("either_compilation")
@pytest.mark.parametrize("kernel", ["xla", "auto"])
def test_an_absence_divides_by_no_root_of_zero(kernel):
    """Without eps, where no gradient has come and where its square is lost: nothing moves there."""
    rows = jadam.rows.lazy(jadam.adam(1e-2, eps=0.0, kernel=kernel), catch_up="sum")
    table = jnp.ones((3, 4))
    state = rows.init(table)
    g, scatter = jnp.asarray([[1.0, 0.0, 1e-30, -1.0]]), jax.jit(rows.scatter)
    table, state = scatter(g, jnp.asarray([0]), table, state)
    start = np.asarray(table)
    for _ in range(40):
        table, state = scatter(g, jnp.asarray([1]), table, state)
    found, _ = jax.jit(rows.flush)(table, state)
    assert np.all(np.isfinite(found))
    np.testing.assert_array_equal(found[0, 1:3], start[0, 1:3])
    np.testing.assert_array_equal(found[2], 1)
    assert abs(found[0, 0] - start[0, 0]) > 1e-2


@pytest.mark.parametrize("beyond", [0, 1, 2, 150])
def test_an_absence_about_as_long_as_a_row_moves(beyond):
    """One by one up to where m has ended, then at once: v fades and p decays in each of them."""
    tx = jadam.adamw(0.1, b1=0.5, b2=0.9, weight_decay=0.1)
    rows, table = jadam.rows.lazy(tx, catch_up="steps"), jnp.ones((1, 3))
    absent = _fading.horizon(rows.plan.rule, jnp.float32) + beyond
    state = rows.init(table)
    table, state = rows.scatter(jnp.ones((1, 3)), jnp.array([0]), table, state)
    moments = state.dense[0]._replace(count=state.dense[0].count + absent)
    table, state = rows.flush(table, state._replace(dense=(moments, *state.dense[1:])))
    p, m, v = 1.0, 0.5, 0.1
    for t in range(1, absent + 2):
        p -= 0.1 * (m / (1 - 0.5**t) / np.sqrt(v / (1 - 0.9**t)) + 0.1 * p)
        m, v = 0.5 * m, 0.9 * v
    # A step of decay is 1e-2. Each step rounds p and v.
    np.testing.assert_allclose(table, p, rtol=1e-5)
    np.testing.assert_allclose(state.dense[0].nu, v / 0.9, rtol=1e-5)


@pytest.mark.parametrize(("kernel", "eps_root"), [("xla", 0.0), ("auto", 0.0), ("xla", 1e-36)])
def test_an_absence_keeps_to_the_least_root(kernel, eps_root):
    """Without eps the root of v̂ is at least 2⁻⁵¹·⁵ in each missed step, by NumPy in float64.

    Also with an eps_root that is far below.
    """
    tx, absent = jadam.adam(1.0, eps=0.0, eps_root=eps_root, kernel=kernel), 40
    rows = jadam.rows.lazy(tx, catch_up="sum")
    gradients = np.array([1e-16, -2e-16, 3e-15, 1e-17])
    table = jnp.zeros((2, 4))
    state, scatter = rows.init(table), jax.jit(rows.scatter)
    table, state = scatter(jnp.asarray(gradients[None], jnp.float32), jnp.array([0]), table, state)
    for _ in range(absent):
        table, state = scatter(jnp.zeros((1, 4)), jnp.array([1]), table, state)
    found, _ = jax.jit(rows.flush)(table, state)
    p, m, v = np.zeros(4), 0.1 * gradients, 0.001 * gradients**2
    for t in range(1, absent + 2):
        p -= m / (1 - 0.9**t) / np.maximum(np.sqrt(v / (1 - 0.999**t)), 2**-51.5)
        m, v = 0.9 * m, 0.999 * v
    # 1e-5 learning rates, as the docstring says, and the roundings of p.
    np.testing.assert_allclose(found[0], p, rtol=2e-6, atol=1e-5)


@pytest.mark.usefixtures("either_compilation")
def test_a_gathered_row_is_the_flushed_one():
    """`gather` gives what dense has, `flush` changes nothing of it, also when made twice."""
    table, ids, grads = sgd_noise(3)
    rows = jadam.rows.lazy(jadam.adamw(1e-2, weight_decay=0.1))
    scatter, flush = jax.jit(rows.scatter), jax.jit(rows.flush)
    table, state = jnp.asarray(table), rows.init(jnp.asarray(table))
    for row, g in zip(ids[:20], grads[:20], strict=True):
        table, state = scatter(g, row, table, state)
    every = jnp.arange(SIZE).reshape(3, 4)
    gathered = jax.jit(rows.gather)(table, state, every)
    flushed, after = flush(table, state)
    assert gathered.shape == (3, 4, WIDTH)
    # The two programs may fuse differently.
    np.testing.assert_allclose(gathered.reshape(table.shape), flushed, rtol=2e-7, atol=1e-9)
    jax.tree.map(np.testing.assert_array_equal, flush(flushed, after), (flushed, after))
    assert (after.last == 20).all()


@pytest.mark.usefixtures("either_compilation")
def test_equal_ids_sum_and_ids_of_no_row_count_for_nothing():
    """In a batch: 3 twice is the sum of both; -1 and 99 are padding inside of jit."""
    rows = jadam.rows.lazy(jadam.adam(1e-2), catch_up=False)
    table = jnp.asarray(np.random.default_rng(0).standard_normal((5, 4)), jnp.float32)
    state, scatter, gather = rows.init(table), jax.jit(rows.scatter), jax.jit(rows.gather)
    g = jnp.asarray(np.random.default_rng(1).standard_normal((4, 4)), jnp.float32)
    expected = scatter((g[0] + g[2])[None], jnp.array([3]), table, state)
    for dtype in (jnp.int8, jnp.uint32):
        ids = jnp.asarray([3, 99, 3, 127 if dtype == jnp.uint32 else -1], dtype)
        got = scatter(g, ids, table, state)
        jax.tree.map(np.testing.assert_array_equal, got, expected)
        assert (gather(table, state, ids)[1::2] == 0).all()
    # A batch without ids is an update all the same.
    rows = jadam.rows.lazy(jadam.adam(1e-2))
    none = jax.jit(rows.scatter)(g[:0], jnp.zeros(0, jnp.int32), table, state)
    np.testing.assert_array_equal(none[0], table)
    assert none[1].dense[0].count == 1


@pytest.mark.usefixtures("either_compilation")
def test_it_goes_with_a_dense_transformation_in_one_step():
    """An embedding by rows and the layer above it dense learn as both dense do."""
    rng = np.random.default_rng(0)
    params = {
        "embedding": jnp.asarray(rng.standard_normal((50, 8)), jnp.float32),
        "layer": jnp.asarray(rng.standard_normal((8, 1)), jnp.float32),
    }
    tx = jadam.adamw(1e-2, weight_decay=0.1)
    rows = jadam.rows.lazy(tx)

    def loss(vectors, layer, targets):
        return jnp.mean((vectors @ layer - targets) ** 2)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def lazily(params, state, ids, targets):
        vectors = rows.gather(params["embedding"], state["embedding"], ids)
        grads = jax.grad(loss, argnums=(0, 1))(vectors, params["layer"], targets)
        table, rows_state = rows.scatter(grads[0], ids, params["embedding"], state["embedding"])
        layer, layer_state = tx.step(grads[1], state["layer"], params["layer"])
        params = {"embedding": table, "layer": layer}
        return params, {"embedding": rows_state, "layer": layer_state}

    @jax.jit
    def densely(params, state, ids, targets):
        def whole(params):
            return loss(params["embedding"][ids], params["layer"], targets)

        return tx.step(jax.grad(whole)(params), state, params)

    expected, dense = params, tx.init(params)
    got = jax.tree.map(jnp.array, params)
    state = {"embedding": rows.init(got["embedding"]), "layer": tx.init(got["layer"])}
    for _ in range(60):
        ids = jnp.asarray(rng.integers(0, 50, 6))
        targets = jnp.asarray(rng.standard_normal((6, 1)), jnp.float32)
        got, state = lazily(got, state, ids, targets)
        expected, dense = densely(expected, dense, ids, targets)
    table, flushed = jax.jit(rows.flush)(got["embedding"], state["embedding"])
    # Roundings of 60 steps, which Adam's division magnifies where a gradient is small.
    np.testing.assert_allclose(table, expected["embedding"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(got["layer"], expected["layer"], rtol=0, atol=1e-5)
    # And on, rows from dense.
    again = rows.init(table, flushed.dense)
    jax.tree.map(np.testing.assert_array_equal, again, flushed)


EDGES = [0.01, 0.03, 0.1, 0.3, 0.7, 2]


@pytest.mark.usefixtures("either_compilation")
@pytest.mark.parametrize(
    ("name", "kind"), [("adam", "adam"), ("amsgrad", "amsgrad"), ("adamax", "adamax")]
)
def test_diagnostics_and_moments_of_rows_are_of_dense_steps(name, kind):
    """While rows are behind: the numbers of float64 moments that all gradients have reached."""
    table, ids, grads = sgd_noise(5, scale=1e-7)
    ids, grads = ids[:100], grads[:100]
    member = reference.Member(kind=kind, eps=5e-8)
    for g in dense_gradients(ids, grads):
        member(g)
    rows = jadam.rows.lazy(CASES[name](1e-2, eps=5e-8), catch_up="steps")
    lazily = jax.jit(lambda *args: run_lazy(rows, False, *args))
    stepped, state = lazily(table, ids, grads)
    assert (state.last < 100).any()
    options = {"adamax": kind == "adamax"}
    # Roundings of 100 float32 steps.
    for moments in (jadam.moments(state, **options), jadam.moments({"e": state}, **options)["e"]):
        np.testing.assert_allclose(moments[0].mu, member.m, rtol=2e-5, atol=1e-30)
        if kind != "adamax":  # whose eps `moments` does not know
            np.testing.assert_allclose(moments[0].nu, member.v, rtol=2e-5)
    report = jadam.diagnostics(state, stepped - table, stepped, eps=5e-8, **options)["whole"]
    power = {"adam": 2, "amsgrad": 2, "adamax": 1}[kind]
    correction = 1 if power == 1 else 1 - member.b2**100
    root = (member.v_max if kind == "amsgrad" else member.v) / correction
    root = root ** (1 / power)
    v_hat = member.v if power == 1 else np.sqrt(member.v / correction)
    # Below: a share counts, a root mean square is of float32 moments.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    close(report["v_rms"], np.sqrt(np.mean(v_hat**2)))
    close(report["update_rms"], np.sqrt(np.mean(np.square(np.float64(stepped - table)))))
    close(report["eps_share"], np.mean(5e-8 * (2 if power == 1 else 1) > root))
    assert 0 < float(report["eps_share"]) < 1
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(member.m == 0, 0, np.abs(member.m) / (1 - member.b1**100) / root)
    counts = np.histogram(ratio, [-1, *np.nextafter(EDGES, 9), np.inf])[0]
    close(report["ratio_histogram"], counts / ratio.size)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(("steps", "absence"), [(1, 30), (5, 2)])
def test_moments_in_codes_mean_what_they_did_when_they_were_stored(steps, absence):
    """Codes refer to the time of their row; what they mean fades from there."""
    rng = np.random.default_rng(0)
    rows = jadam.rows.lazy(jadam.adam(1e-2, min_size=0, **CODES), catch_up="sum")
    table = jnp.asarray(rng.standard_normal((4, 128)), jnp.float32)
    g = rng.standard_normal((4, 128)).astype(np.float32)
    state, scatter = rows.init(table), jax.jit(rows.scatter)
    for _ in range(steps):
        table, state = scatter(g, np.arange(4), table, state)
    then = jadam.moments(state.dense)[0]
    later = state.dense[0]._replace(count=jnp.int32(steps + absence))
    now = jadam.moments(state._replace(dense=(later, *state.dense[1:])))[0]
    # The powers of b1 and b2 in float32.
    np.testing.assert_allclose(now.mu, 0.9**absence * np.float64(then.mu), rtol=1e-5)
    np.testing.assert_allclose(now.nu, 0.999**absence * np.float64(then.nu), rtol=1e-5)
    _, flushed = jax.jit(rows.flush)(table, state._replace(dense=(later, *state.dense[1:])))
    after = jadam.moments(flushed.dense)[0]
    # Rounded once more, to a neighbouring code: v by 2^(1/16), m by a 62nd of the bound of |m|/√v.
    np.testing.assert_allclose(after.nu, now.nu, rtol=2 ** (1 / 16) - 1)
    code = np.sqrt(10 * np.sum((0.81 / 0.999) ** np.arange(steps + absence))) / 62
    assert np.all(np.abs(after.mu - now.mu) <= code * np.sqrt(np.maximum(after.nu, now.nu)))


def test_diagnostics_of_rows_make_one_array_of_a_tables_size():
    """On a CPU v once, to be counted and summed; neither m nor the table as flush makes them."""
    table = jax.ShapeDtypeStruct((ROWS_OF_TABLE, 64), jnp.float32)
    state = jax.eval_shape(ROWS.init, table)
    compiled = jax.jit(jadam.diagnostics).lower(state, table, table).compile()
    # And two numbers of each row, the powers by which its moments have faded.
    most = (64 + 2) * 4 * ROWS_OF_TABLE
    assert compiled.memory_analysis().temp_size_in_bytes <= 1.01 * most


def flushed_rows():
    """A table and a state of rows, before and after `flush`, with decay that is scheduled."""
    rows = jadam.rows.lazy(jadam.adamw(SCHEDULE, weight_decay=0.1))
    table, ids, grads = sgd_noise(7)
    lazily = jax.jit(lambda *args: run_lazy(rows, False, *args))
    behind = lazily(table, ids[:40], grads[:40])
    return rows, behind, jax.jit(rows.flush)(*behind)


@pytest.mark.usefixtures("quick_compilation")
def test_states_of_rows_go_to_other_libraries_and_come_back():
    """torch and optax get moments of one time; what comes from there begins up to date."""
    rows, (_, behind), (table, state) = flushed_rows()
    group = {"params": [0], "betas": (0.9, 0.999), "amsgrad": False}
    to_torch = functools.partial(
        jadam.migrate.to_torch,
        state_dict={"state": {}, "param_groups": [group]},
        name=lambda path: 0,
    )
    found = to_torch(state)
    np.testing.assert_array_equal(found["state"][0]["exp_avg"], state.dense[0].mu)
    assert found["state"][0]["step"] == 40
    dense = jadam.migrate.to_optax({"table": state})["table"]
    assert jax.tree.structure(dense) == jax.tree.structure(rows.tx.init(table))
    jax.tree.map(np.testing.assert_array_equal, dense, state.dense)
    for like in (rows.init(table), jax.eval_shape(rows.init, table)):
        back = jadam.migrate.from_torch(found, like, lambda path: 0)
        jax.tree.map(np.testing.assert_array_equal, back, rows.init(table, state.dense))
    # It goes on as dense does.
    g, tx = np.ones(table.shape, np.float32), rows.tx
    expected, _ = jax.jit(tx.step)(g, dense, table)
    got, _ = jax.jit(rows.scatter)(g, np.arange(SIZE), table, back)
    np.testing.assert_array_equal(got, expected)
    for call in (to_torch, jadam.migrate.to_optax):
        with pytest.raises(ValueError, match=r"after update 40, got one after \d+; flush"):
            call(behind)


@pytest.mark.usefixtures("quick_compilation")
def test_states_of_rows_in_other_storage_and_in_files(tmp_path):
    """`cast_like` of a flushed state; a safetensors file holds any, bit for bit."""
    rows, (table, behind), (_, state) = flushed_rows()
    narrow = jadam.rows.lazy(
        jadam.adamw(SCHEDULE, weight_decay=0.1, mu_dtype=jnp.bfloat16, nu_dtype=jnp.bfloat16)
    )
    like = jax.eval_shape(narrow.init, table)
    cast = jadam.migrate.cast_like(state, like)
    assert jax.tree.map(lambda x: x.dtype, cast) == jax.tree.map(lambda x: x.dtype, like)
    np.testing.assert_array_equal(cast.dense[0].mu, state.dense[0].mu.astype(jnp.bfloat16))
    np.testing.assert_array_equal(cast.last, state.last)
    with pytest.raises(ValueError, match="flush"):
        jadam.migrate.cast_like(behind, like)
    file = tmp_path / "rows.safetensors"
    jadam.migrate.to_safetensors(file, behind)
    read = jadam.migrate.from_safetensors(file, jax.eval_shape(rows.init, table))
    jax.tree.map(np.testing.assert_array_equal, read, behind)


def by_rows_as_torch():
    start, ids, grads = sparse_adam.problem()
    tx = jadam.adam(1e-2, eps=1e-4)
    rows = jadam.rows.lazy(tx, catch_up=False)
    table, state, scatter = jnp.asarray(start), rows.init(jnp.asarray(start)), jax.jit(rows.scatter)
    for row, g in zip(ids, grads, strict=True):
        table, state = scatter(g, row, table, state)
    return np.asarray(table, np.float64)


@pytest.mark.usefixtures("either_compilation")
def test_without_catching_up_it_is_torchs_sparse_adam():
    """As recorded, and live where torch is installed."""
    recorded = np.array(json.loads(sparse_adam.FILE.read_text())["table"])
    # Some 25 touches a row, each rounds p of up to 3 by half an ulp of 2.4e-7.
    np.testing.assert_allclose(by_rows_as_torch(), recorded, rtol=0, atol=1e-6)
    # It is another algorithm.
    tx = jadam.adam(1e-2, eps=1e-4)
    start, ids, grads = sparse_adam.problem()
    scatter = jax.jit(jadam.rows.lazy(tx).scatter)
    table, state = jnp.asarray(start), jadam.rows.lazy(tx).init(jnp.asarray(start))
    for row, g in zip(ids, grads, strict=True):
        table, state = scatter(g, row, table, state)
    assert np.abs(np.asarray(table) - recorded).max() > 1e-2
    if importlib.util.find_spec("torch"):
        np.testing.assert_allclose(sparse_adam.by_torch(), recorded, rtol=0, atol=1e-12)


TABLE = np.ones((6, 4), np.float32)
TREE = (jadam.AdamState(np.int32(0), {"w": TABLE}, {"w": TABLE}),)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: jadam.rows.lazy(optax.adam(1e-3)), TypeError, "tx: .*jadam's family"),
        (lambda: jadam.rows.lazy(jadam.ademamix(1e-3)), ValueError, "tx: .*ademamix"),
        (lambda: jadam.rows.lazy(jadam.adamw(1e-3, mask=True)), ValueError, "tx: expected no mask"),
        (lambda: jadam.rows.lazy(jadam.adam(1e-3, b2=0.8)), ValueError, "b1, b2: .*√b2"),
        (lambda: jadam.rows.lazy(jadam.adam(1e-3, b1=jnp.float32(0.9))), TypeError, "b1: .*Python"),
        (
            lambda: jadam.rows.lazy(jadam.adam(1e-3), catch_up="all"),
            ValueError,
            "catch_up: .*'all'",
        ),
        (lambda: jadam.rows.lazy(jadam.radam(1e-3), catch_up=False), ValueError, "SparseAdam"),
        (lambda: ROWS.init(np.ones(3, np.float32)), ValueError, r"table: .*\(3,\)"),
        (lambda: ROWS.init(np.ones((3, 2), int)), TypeError, "table: .*int"),
        (lambda: ROWS.init(TABLE.astype(complex)), TypeError, "table: .*complex"),
        (lambda: ROWS.init(TABLE, ROWS.init(TABLE[1:]).dense), ValueError, "mu: .*6, 4.*5, 4"),
        (lambda: ROWS.gather(TABLE, jadam.init(TABLE), [0]), TypeError, "state: .*AdamState"),
        (lambda: ROWS.gather(TABLE, ROWS.init(TABLE[1:]), [0]), ValueError, "mu: .*6, 4"),
        (lambda: ROWS.gather(TABLE, ROWS.init(TABLE), [6]), ValueError, "ids: .*0 to 5 .*got 6"),
        (lambda: ROWS.gather(TABLE, ROWS.init(TABLE), [-1]), ValueError, "ids: .*got -1"),
        (lambda: ROWS.gather(TABLE, ROWS.init(TABLE), [0.5]), TypeError, "ids: .*float"),
        (
            lambda: ROWS.scatter(TABLE, [0, 1], TABLE, ROWS.init(TABLE)),
            ValueError,
            r"grads: expected shape \(2, 4\)",
        ),
        (
            lambda: ROWS.scatter(TABLE[:2] * 1j, [0, 1], TABLE, ROWS.init(TABLE)),
            TypeError,
            "grads: expected a real dtype, got complex64",
        ),
        (
            lambda: ROWS.gather(TABLE, ROWS.init(TABLE)._replace(dense=(1,)), [0]),
            TypeError,
            r"state\.dense: .*ScaleByAdamState first, got int",
        ),
        (
            lambda: ROWS.gather(TABLE, ROWS.init(TABLE)._replace(dense=TREE), [0]),
            TypeError,
            r"state\.dense\[0\]\.mu: expected an array, .*, got dict",
        ),
        (
            lambda: ROWS.gather(TABLE, ROWS.init(TABLE)._replace(last=np.zeros(5, int)), [0]),
            ValueError,
            r"state\.last: expected shape \(6,\) .*, got \(5,\)",
        ),
        (
            lambda: jadam.rows.lazy(jadam.adam(1e-3, b1=0.98), catch_up="sum").flush(
                TABLE, ROWS.init(TABLE)
            ),
            ValueError,
            "catch_up: .*b1/√b2 up to 0.95; got 'sum' for adam in float32",
        ),
        (
            lambda: jadam.rows.lazy(jadam.adamax(1e-3), catch_up="sum").flush(
                TABLE, jadam.rows.lazy(jadam.adamax(1e-3)).init(TABLE)
            ),
            ValueError,
            "catch_up: .*adamax",
        ),
    ],
)
def test_what_is_refused(call, error, message):
    """The argument's name, what was expected, and what came."""
    with pytest.raises(error, match=message):
        call()


@pytest.mark.usefixtures("quick_compilation")
def test_outside_of_jit_each_call_is_one_program(caplog):
    """Not an operation after another: each would be compiled, and many would copy the table."""
    rows = jadam.rows.lazy(jadam.adamw(1e-3, weight_decay=0.1))
    table, ids = jnp.asarray(TABLE), jnp.asarray([1, 2])
    state = rows.init(table)
    now = rows.gather(table, state, ids)  # finds out how steps are summed, once
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        table, state = rows.scatter(now, ids, table, state)
        rows.flush(*rows.scatter(now, ids, table, state))
    compiled = [x for x in caplog.messages if x.startswith("Finished XLA compilation of")]
    assert len(compiled) == 2
    # JAX's own account of what it compiles and keeps is not what a user passes on.
    copy.deepcopy(rows).flush(table, state)


SCHEDULED = jadam.adamw(SCHEDULE, weight_decay=0.1)
SPARSE = jadam.adam(1e-3)
IN_XLA = jadam.adamw(SCHEDULE, weight_decay=0.1, kernel="xla")
CODED = jadam.adam(1e-3, mu_dtype="int8", nu_dtype="uint8", min_size=0)


@pytest.mark.parametrize(
    ("tx", "catch_up"),
    [
        (SCHEDULED, True),
        (SPARSE, False),
        (jadam.adam(1e-3, kernel="xla"), True),
        pytest.param(IN_XLA, True, marks=pytest.mark.soak),
        pytest.param(CODED, True, marks=pytest.mark.soak),
    ],
    ids=["kernel", "kernel, SparseAdam", "sum", "scheduled", "codes"],
)
def test_a_step_costs_the_same_for_any_table(tx, catch_up):
    """Table and state are read by the touched rows, and written in place: no copy, no temporary.

    And what `gather` and `scatter` both need of the rows is computed once.
    """
    rows = jadam.rows.lazy(tx, catch_up=catch_up)

    def train_step(table, state, ids, targets):
        gathered = rows.gather(table, state, ids)
        grads = jax.grad(lambda x: jnp.sum((x - targets) ** 2))(gathered)
        return rows.scatter(grads, ids, table, state)

    table = jax.ShapeDtypeStruct((ROWS_OF_TABLE, 64), jnp.float32)
    state = jax.eval_shape(rows.init, table)
    ids = jax.ShapeDtypeStruct((32,), jnp.int32)
    targets = jax.ShapeDtypeStruct((32, 64), jnp.float32)
    step = jax.jit(train_step, donate_argnums=(0, 1))
    compiled = step.lower(table, state, ids, targets).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    # A temporary with a byte a row is larger.
    assert memory.temp_size_in_bytes < ROWS_OF_TABLE
    large = [x for x in jax.tree.leaves((table, state)) if x.shape[:1] == (ROWS_OF_TABLE,)]
    assert memory.alias_size_in_bytes >= sum(x.size * x.dtype.itemsize for x in large)
    calls = [text.count(f'custom_call_target="jadam_rows_{x}"') for x in ("now", "step")]
    assert calls == ([1, 1] if tx in (SCHEDULED, SPARSE) else [0, 0])
    assert text.count(" sort(") == 1 - calls[0]
    assert text.count(" conditional(") <= 2  # the reading; what `steps` leaves to the end
    uses = re.findall(r"= (.*?) ([\w-]+)\((.*)", text)
    named = set(re.findall(rf"(%[\w.-]+) = \(?\w+\[{ROWS_OF_TABLE}\b", text))
    assert named
    moved = {op for _, op, args in uses if named & set(re.findall(r"%[\w.-]+", args))}
    # What has the table's size is handed on, read by rows, or written in place by rows.
    handed = {"fusion", "tuple", "get-tuple-element", "conditional", "while", "call", "bitcast"}
    assert moved <= handed | {"gather", "scatter"} | ({"custom-call"} if calls[0] else set())


@pytest.mark.usefixtures("either_compilation")
@pytest.mark.parametrize(
    ("kind", "of_table", "of_batch"),
    [
        (AxisType.Explicit, P("data"), P("data")),
        (AxisType.Explicit, P(), P("data")),
        pytest.param(AxisType.Auto, P("data"), P("data"), marks=pytest.mark.soak),
    ],
    ids=["explicit", "replicated", "automatic"],
)
def test_a_table_on_several_devices(kind, of_table, of_batch):
    """By rows, each device steps its own; what is exchanged and copied is of the batch's size."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    # One of them in full, for the others what is quickly compiled.
    is_full = kind == AxisType.Explicit and of_table == of_batch
    tx = jadam.adamw(1e-2, weight_decay=0.1) if is_full else jadam.adam(1e-2)
    rows = jadam.rows.lazy(tx, catch_up=is_full)
    rng = np.random.default_rng(0)
    table = rng.standard_normal((8 * 512, 16)).astype(np.float32)
    ids = rng.integers(0, len(table), (4, 24))
    g = rng.standard_normal((4, 24, 16)).astype(np.float32)

    def steps(table, state, ids, g):
        def body(carry, batch):
            vectors = rows.gather(*carry, batch[0])
            return rows.scatter(batch[1] + vectors, batch[0], *carry), None

        return jax.lax.scan(body, (table, state), (ids, g))[0]

    expected = jax.jit(steps)(jnp.asarray(table), rows.init(jnp.asarray(table)), ids, g)
    placed = jax.device_put(table, NamedSharding(mesh, of_table))
    state = rows.init(placed)
    assert state.last.sharding.is_equivalent_to(placed.sharding, 1)
    batch = jax.device_put((ids, g), NamedSharding(mesh, P(None, *of_batch)))
    step = jax.jit(steps, donate_argnums=(0, 1))
    compiled = step.lower(placed, state, *batch).compile()
    got, text = compiled(placed, state, *batch), compiled.as_text()
    assert got[0].sharding.is_equivalent_to(placed.sharding, 2)
    # Another program may fuse differently.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
    jax.tree.map(close, got, expected)
    if is_full:
        jax.tree.map(close, *(jax.jit(rows.flush)(*x) for x in (got, expected)))
    exchange = r"= (.*?) (?:all-[\w-]+|collective-permute|reduce-scatter)\("
    found = re.findall(r"\[([\d,]*)\]", " ".join(re.findall(exchange, text)))
    sizes = [np.prod([int(n) for n in shape.split(",") if n]) for shape in found]
    assert sizes
    # Of the gradients of a batch, or of all four batches where they are gathered before the scan.
    assert max(sizes) <= 4 * 24 * 16
    assert not re.search(r"\[(?:512|4096)[^ ]* copy\(", text)


@pytest.mark.usefixtures("quick_compilation")
def test_state_and_table_are_divided_alike():
    """A state on one device, a table on eight: the leaf is named."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    table = jax.device_put(np.ones((16, 4), np.float32), NamedSharding(mesh, P("data")))
    state = ROWS.init(jax.device_put(table, NamedSharding(mesh, P())))
    with pytest.raises(ValueError, match=r"state\.dense\[0\]\.mu: .*data.*got"):
        ROWS.flush(table, state)
