"""The kernel in C++ against the same step in XLA's operations, and the ways around it."""

import ctypes
import functools
import importlib.machinery
import importlib.util
import platform
import re
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import test_math
import test_storage
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from test_codec import bounds

import jadam
from jadam import _math, _rounding
from jadam._kernels import choice, native
from jadam._storage import codes, lattice

EIGHT_BITS = {"mu_dtype": "int8", "nu_dtype": "uint8"}
FOUR_BITS = {"mu_dtype": "int4", "nu_dtype": "uint4"}
STORAGE = {
    "float32": {},
    "bfloat16": {"mu_dtype": "bfloat16", "nu_dtype": "bfloat16"},
    "bfloat16 m": {"mu_dtype": "bfloat16"},
    "8 bits": EIGHT_BITS,
    "4 bits": FOUR_BITS,
}
CODES = {x.dtype: x for x in lattice.LATTICES}
DTYPES = {
    "float32": (jnp.float32, jnp.float32),
    "bfloat16 gradients": (jnp.bfloat16, jnp.float32),
    "bfloat16": (jnp.bfloat16, jnp.bfloat16),
}
# Rows that end within a vector and within a block of 128, no row, no element, one number.
SHAPES = [(70, 300), (4099,), (33, 7, 20), (0, 5), (), (4, 2048)]
MASK = [True, False, True, True, True, False]  # which of them decay
TWO = slice(0, None, 5)  # the first and the last: a row that ends within a block, and whole blocks

needs_kernel = pytest.mark.skipif(choice.why_not() is not None, reason=str(choice.why_not()))


def kernel_library():
    return ctypes.CDLL(importlib.util.find_spec("jadam._kernel").origin)


def instruction_sets():
    """The names of those that the library has and this processor too, the best first."""
    return list(native.library().available)


def use(name):
    """That instruction set makes every step from now on, in programs compiled before too."""
    use_set = kernel_library().jadam_use_instruction_set
    use_set.restype = ctypes.c_bool
    assert use_set(name.encode())


def fuses(name):
    """Whether an instruction set has products that are rounded with their sums alone, as XLA's."""
    return name != "baseline" or platform.machine() != "x86_64"


@pytest.fixture(autouse=True)
def _the_set_of_before():
    yield
    if found := native.library().instruction_set:
        use(found)


def leaves(dtype, seed, scale=1.0, which=slice(None)):
    rng = np.random.default_rng(seed)
    return [
        jnp.asarray(scale * rng.standard_normal(s) * np.exp(2 * rng.standard_normal(s)), dtype)
        for s in SHAPES[which]
    ]


def has_kernel(function, *args):
    return "jadam_step" in jax.jit(function).lower(*args).as_text()


# RAdam's variance is tractable from the fifth step on.
MEMBERS = {
    "adam": jadam.adamw,
    "nadam": functools.partial(jadam.adamw, nesterov=True),
    "radam": functools.partial(jadam.radam, b1=0.8, b2=0.8, threshold=4.0),
    "radam, nesterov": functools.partial(jadam.radam, b1=0.8, b2=0.8, threshold=4.0, nesterov=True),
}
# All shapes in the widest and the narrowest storage; then two of them in each pair of a storage,
# dtypes and a way, and for the other members, whose difference from Adam is a few numbers of a
# step: each storage, dtypes, way and member here, the other pairs in `make soak`. `make
# check-native` has every combination, without XLA's form beside it.
STEPS = [
    ("adam", "float32", "float32", "step", "all"),
    ("adam", "8 bits", "float32", "step", "all"),
    ("adam", "bfloat16", "float32", "step", "two"),
    pytest.param("adam", "bfloat16", "float32", "step", "all", marks=pytest.mark.soak),
    pytest.param("adam", "bfloat16 m", "float32", "step", "all", marks=pytest.mark.soak),
    ("adam", "float32", "bfloat16 gradients", "step", "two"),
    pytest.param("adam", "float32", "bfloat16", "update", "two", marks=pytest.mark.soak),
    pytest.param("adam", "bfloat16", "float32", "update", "two", marks=pytest.mark.soak),
    pytest.param("adam", "bfloat16", "bfloat16 gradients", "step", "two", marks=pytest.mark.soak),
    ("adam", "bfloat16", "bfloat16", "step", "two"),
    ("adam", "bfloat16 m", "bfloat16 gradients", "update", "two"),
    pytest.param("adam", "bfloat16 m", "bfloat16", "step", "two", marks=pytest.mark.soak),
    pytest.param("adam", "8 bits", "float32", "update", "two", marks=pytest.mark.soak),
    pytest.param("adam", "8 bits", "bfloat16 gradients", "step", "two", marks=pytest.mark.soak),
    ("adam", "8 bits", "bfloat16", "update", "two"),
    ("adam", "4 bits", "bfloat16 gradients", "update", "two"),
    pytest.param("adam", "4 bits", "bfloat16", "step", "two", marks=pytest.mark.soak),
    pytest.param("nadam", "bfloat16", "float32", "step", "two", marks=pytest.mark.soak),
    ("nadam", "8 bits", "float32", "step", "two"),
    ("radam", "float32", "float32", "step", "two"),
    pytest.param("radam", "8 bits", "float32", "step", "two", marks=pytest.mark.soak),
    pytest.param("radam, nesterov", "bfloat16 m", "float32", "step", "two", marks=pytest.mark.soak),
    ("radam, nesterov", "8 bits", "float32", "step", "two"),
    ("radam, nesterov", "4 bits", "float32", "step", "two"),
]


@needs_kernel
@pytest.mark.parametrize(("member", "storage", "dtypes", "way", "shapes"), STEPS)
def test_the_kernel_is_the_same_step(member, storage, dtypes, way, shapes):
    """Every dtype, storage and instruction set: from the same state, what XLA's form gives."""
    g_dtype, p_dtype = DTYPES[dtypes]
    which = TWO if shapes == "two" else slice(None)
    params = leaves(p_dtype, 0, which=which)
    decay = {"weight_decay": 0.1, "mask": MASK[which]}
    make = functools.partial(
        MEMBERS[member],
        optax.linear_schedule(1e-2, 1e-3, 10),
        eps_root=1e-12,
        min_size=0,
        **({} if member.startswith("radam") else decay),
        **STORAGE[storage],
    )
    kernel, xla = make(kernel="native"), make(kernel="xla")
    call = (lambda tx: tx.step) if way == "step" else (lambda tx: tx.update)
    in_kernel, in_xla = jax.jit(call(kernel)), jax.jit(call(xla))
    state = kernel.init(params)
    grads = leaves(g_dtype, 1, which=which)
    assert "jadam_step" in in_kernel.lower(grads, state, params).as_text()
    assert "jadam_step" not in in_xla.lower(grads, state, params).as_text()
    for t in range(5):
        grads = leaves(g_dtype, t + 1, scale=10.0**-t, which=which)
        before = state
        expected, state = in_xla(grads, before, params)
        of_m, _ = in_xla(jax.tree.map(jnp.zeros_like, grads), before, params)
        for name in instruction_sets():
            use(name)
            moved, after = in_kernel(grads, before, params)
            assert jax.tree.map(jnp.result_type, (moved, after)) == jax.tree.map(
                jnp.result_type, (expected, state)
            )
            for x, y, z, p in zip(moved, expected, of_m, params, strict=True):
                start = p if way == "step" else None
                compare_moved(x, y, z, start, p, grads[0].dtype, storage, fuses(name))
            for x, y, start in zip(*map(jax.tree.leaves, (after, state, before)), strict=True):
                x, y, start = map(np.asarray, (x, y, start))
                if jnp.issubdtype(x.dtype, jnp.floating) and not fuses(name):
                    compare_unfused(x, y, start)
                else:
                    compare_stored(x, y)


def compare_unfused(x, y, start):
    """Moments in floats of which one was made without fused products.

    The product in m + (1 - b1)(g - m) is rounded before the sum, in which it may cancel m: two
    units in the last place of the larger term. What is dithered may fall to either neighbour then.
    """
    is_dithered = x.dtype != np.float32
    if is_dithered:
        assert np.sum(x != y) <= 1e-3 * x.size
    x, y, start = (a.astype(np.float32) for a in (x, y, start))
    allowed = 2 * 2.0**-23 * np.maximum(np.abs(start), np.abs(y))
    allowed += 2.0**-7 * np.abs(y) if is_dithered else 0
    # 2^-126: a subnormal number counts as 0.
    np.testing.assert_array_less(np.abs(x - y), allowed + 2.0**-126)


def compare_moved(x, y, of_m, start, p, g_dtype, storage, is_fused):
    """Updates, or parameters that were at `start`, of a rate of 1e-2 and a decay of 0.1.

    `of_m` is what comes of m without a gradient: Nesterov's sum of both may be shorter than either.
    """
    unit_of_p = float(jnp.finfo(p.dtype).eps)
    x, y, of_m, p = (np.asarray(a, np.float64) for a in (x, y, of_m, p))
    update, still = (np.abs(a if start is None else a - p) for a in (y, of_m))
    update = np.maximum(update, still) + 1e-2 * 0.1 * np.abs(p)
    # Three units in the last place of what is added, the direction and the decay, which may cancel,
    # as may m and g in a direction under 1: XLA's fused sum with the decay is up to 2.3 off. One
    # more for codes, from which XLA's own step is up to 3.2 off, and the kernel's 1.8. Half a unit
    # for each product that is rounded before its sum where none is fused: in m, in Nesterov's sum,
    # of the decay. And one of the update's own dtype, and one of the result.
    update = np.maximum(update, 1e-2)
    unit = float(jnp.finfo(g_dtype).eps)
    ulps = (4 if storage in ("8 bits", "4 bits") else 3) + (0 if is_fused else 1.5)
    allowed = ulps * 2.0**-23 * update + (unit if unit > 1e-3 else 0) * update
    if start is not None:
        allowed += unit_of_p * np.abs(y)
    np.testing.assert_array_less(np.abs(x - y) - allowed, 1e-30)


def compare_stored(x, y):
    """Two moments in storage: 2 ulps in float32; what is dithered may fall to either neighbour."""
    if x.dtype in CODES:
        code, size = (
            np.abs(np.asarray(of(jnp.asarray(x))) - np.asarray(of(jnp.asarray(y))))
            for of in (CODES[x.dtype].code_of, CODES[x.dtype].size_of)
        )
        if CODES[x.dtype].is_coarse:  # beside the next power of two m is twice or half as large
            size = np.where(code > 0, 0, size)
        assert max(code.max(initial=0), size.max(initial=0)) <= 1
        # The logarithm of the kernel is within 2e-5 levels of that of XLA's form; of 4 bits it is
        # exact.
        assert np.sum(x != y) <= 1e-3 * x.size
    elif x.dtype in (np.int16, np.int32):
        np.testing.assert_array_equal(x, y)
    elif x.dtype == np.float32:
        np.testing.assert_array_max_ulp(x, y, maxulp=2)
    else:
        bits = np.abs(x.view(np.int16).astype(int) - y.view(np.int16))
        assert bits.max(initial=0) <= 1
        assert np.sum(bits != 0) <= 1e-3 * x.size


WRAPPERS = {
    "int8": jadam.compensated_weights,
    "int16": functools.partial(jadam.compensated_weights, residual_dtype="int16"),
    "stochastic": jadam.stochastic_rounding,
}


master_weights = jax.jit(jadam.master_weights)


def weights_of(wrapper, params, state):
    """What is trained, in float64."""
    if wrapper != "stochastic":
        params = master_weights(params, state)
    return [np.asarray(p, np.float64) for p in params]


@needs_kernel
@pytest.mark.parametrize(
    ("wrapper", "storage", "g_dtype", "way"),
    [  # each pair of two factors' values
        pytest.param("int8", "float32", "bfloat16", "update", marks=pytest.mark.soak),
        ("int8", "8 bits", "float32", "step"),
        pytest.param("int16", "float32", "float32", "step", marks=pytest.mark.soak),
        ("int16", "8 bits", "bfloat16", "update"),
        ("stochastic", "float32", "float32", "update"),
        pytest.param("stochastic", "8 bits", "bfloat16", "step", marks=pytest.mark.soak),
        ("int8", "4 bits", "bfloat16", "step"),
        pytest.param("stochastic", "4 bits", "float32", "update", marks=pytest.mark.soak),
    ],
)
def test_weights_of_16_bits_take_the_same_step(wrapper, storage, g_dtype, way):
    """Compensated and stochastic weights, in `update` and in `step`: what XLA's form trains."""
    options = {"eps_root": 1e-12, "weight_decay": 0.1, "min_size": 0, **STORAGE[storage]}
    which = TWO if storage in ("8 bits", "4 bits") else slice(None)
    rate = optax.linear_schedule(1e-2, 1e-3, 10)
    kernel, xla = (
        WRAPPERS[wrapper](jadam.adamw(rate, mask=MASK[which], kernel=kernel, **options))
        for kernel in ("native", "xla")
    )
    in_kernel, in_xla = jax.jit(getattr(kernel, way)), jax.jit(getattr(xla, way))
    params = leaves(jnp.bfloat16, 0, which=which)
    state = kernel.init(params)
    grads = leaves(g_dtype, 1, which=which)
    assert "jadam_step" in in_kernel.lower(grads, state, params).as_text()
    for t in range(3):
        grads = leaves(g_dtype, t + 1, scale=10.0**-t, which=which)
        (moved, after), (expected, state) = (f(grads, state, params) for f in (in_kernel, in_xla))
        assert jax.tree.map(jax.typeof, (moved, after)) == jax.tree.map(
            jax.typeof, (expected, state)
        )
        if way == "update":
            moved, expected = (
                [
                    jnp.asarray((np.asarray(p, u.dtype) + np.asarray(u)).astype(p.dtype))
                    for p, u in zip(params, x, strict=True)
                ]
                for x in (moved, expected)
            )
        for x, y in zip(
            weights_of(wrapper, moved, after), weights_of(wrapper, expected, state), strict=True
        ):
            # The steps differ by 4 units of an ulp (as above), and the weight by one of its own.
            ulp = 4 * 2.0**-23 * 1e-2 + 2.0**-23 * np.abs(y)
            if wrapper == "int16":
                np.testing.assert_array_less(np.abs(x - y) - ulp, 1e-30)
            else:
                # Rounded the other way by that, to the neighbour: 2⁻¹⁵ of the weight, or 2⁻⁷. With
                # 8-bit moments 27 of 21,000 were.
                coarse = np.abs(y) * (2.0**-14 if wrapper == "int8" else 2.0**-7)
                np.testing.assert_array_less(np.abs(x - y) - ulp - coarse, 1e-30)
                assert np.sum(np.abs(x - y) > ulp) <= 3e-3 * x.size + 1
        params = expected
        inner = (s.inner_state[0] for s in (after, state))
        for x, y in zip(*map(jax.tree.leaves, inner), strict=True):
            compare_stored(np.asarray(x), np.asarray(y))


@needs_kernel
def test_special_weights_are_those_of_xla():
    """NaN, infinities, zeros, the largest and the smallest bfloat16: the same bits in all three."""
    special = [np.nan, np.inf, -np.inf, 0.0, -0.0, 3.38e38, -3.38e38, 1e-38, 9.2e-41, 1.0, -1e-20]
    params = jnp.asarray(np.resize(np.array(special), (4, 130)), jnp.bfloat16)
    grads = jnp.asarray(np.resize(np.array([1.0, -1.0, 0.0, 1e3]), (4, 130)), jnp.bfloat16)
    for wrapper in WRAPPERS.values():
        found = []
        for kernel in ("native", "xla"):
            tx = wrapper(jadam.adam(2.0**-3, eps=0.0, kernel=kernel))
            found.append(jax.jit(tx.step)(grads, tx.init(params), params))
        (x, s), (y, r) = found
        np.testing.assert_array_equal(np.isnan(x), np.isnan(y))
        keep = ~np.isnan(np.asarray(x, np.float32))
        np.testing.assert_array_equal(
            np.asarray(x).view(np.int16)[keep], np.asarray(y).view(np.int16)[keep]
        )
        jax.tree.map(np.testing.assert_array_equal, s[0], r[0])


@needs_kernel
@pytest.mark.parametrize(
    ("dtype", "ends"), [(jnp.int8, (127, -128)), (jnp.int16, (2**15 - 1, -(2**15)))]
)
def test_weights_past_the_largest_bfloat16_are_brought_back(dtype, ends):
    """Past the middle between it and infinity: the largest of its sign, the residual cut."""
    largest = float(jnp.finfo(jnp.bfloat16).max)
    for kernel in ("native", "xla"):
        tx = jadam.adam(1e36, kernel=kernel)  # between half a unit of the largest and float32's end
        tx = jadam.compensated_weights(tx, residual_dtype=dtype)
        params = jnp.asarray(np.resize([largest, -largest], 256), jnp.bfloat16)
        moved, state = jax.jit(tx.step)(-jnp.sign(params), tx.init(params), params)
        np.testing.assert_array_equal(moved, params)
        (residual,) = jax.tree.leaves(state.residual)
        np.testing.assert_array_equal(residual, np.resize(ends, 256))


@needs_kernel
@pytest.mark.parametrize("storage", ["8 bits", "4 bits"])
def test_the_code_of_zero_is_zero_beside_the_smallest_numbers(storage):
    """Where a block's largest v is near 2⁻¹²⁶, and its range reaches below all floats."""
    g = jnp.asarray(np.resize([1e-17, 0.0], 256), jnp.float32)
    for name in instruction_sets():
        use(name)
        tx = jadam.adam(1.0, kernel="native", min_size=0, **STORAGE[storage])
        _, state = jax.jit(tx.update)(g, tx.init(g))
        codes = CODES[state[0].mu.dtype].code_of(state[0].mu)
        assert np.all(np.asarray(codes[1::2]) == 0)
        assert np.all(np.asarray(codes[::2]) > 0)


@needs_kernel
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int16])
def test_the_sign_of_a_zero_does_not_hang_on_its_neighbours(dtype):
    """+0 whose weight is just below it stays +0, as +0 + -0 is, whatever is beside it."""
    tx = jadam.compensated_weights(jadam.adam(1e-3, kernel="native"), residual_dtype=dtype)
    for beside in (1.0, np.inf, 0.0):
        params = jnp.asarray(np.resize([0.0, beside], 256), jnp.bfloat16)
        start = tx.init(params)
        state = start._replace(residual=jax.tree.map(lambda x: x - 100, start.residual))
        moved, _ = jax.jit(tx.step)(jnp.zeros_like(params), state, params)
        assert set(np.asarray(moved).view(np.int16)[::2]) == {0}


@needs_kernel
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_weights_of_16_bits_take_one_pass_in_place_and_in_shards(wrapper):
    """No temporary of a leaf's size, all donated; each device steps its shard, same bits.

    Of a shard with random bits, which are those of the place among all, the form is XLA's.
    """
    tx = WRAPPERS[wrapper](jadam.adamw(1e-3, **EIGHT_BITS))
    params = jnp.asarray(np.random.default_rng(0).standard_normal((256, 1024)), jnp.bfloat16)

    def step(params, state, grads):
        return tx.step(grads, state, params)

    state = tx.init(params)
    one = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    memory = one.memory_analysis()
    assert memory.temp_size_in_bytes <= 0.1 * params.size
    assert memory.alias_size_in_bytes >= sum(x.nbytes for x in (params, state.inner_state[0].mu))
    whole = (
        tx
        if wrapper != "stochastic"
        else WRAPPERS[wrapper](jadam.adamw(1e-3, kernel="xla", **EIGHT_BITS))
    )
    mesh = Mesh(np.array(jax.devices()), "x")
    sharded = jax.device_put(params, NamedSharding(mesh, P("x")))
    expected = jax.jit(whole.step)(params, state, params)
    many = jax.jit(step).lower(sharded, tx.init(sharded), sharded).compile()
    for collective in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
        assert collective not in many.as_text()
    found = jax.jit(step)(sharded, tx.init(sharded), sharded)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@needs_kernel
@pytest.mark.parametrize("storage", STORAGE)
def test_special_numbers_poison_what_they_poison_in_xla(storage):
    """NaN, infinities, zeros, huge and tiny gradients: the same element by element."""
    special = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e30, -1e30, 1e20, 1e-30, 1e-42, 1e-20, 1.0]
    g = np.ones((40, 256), np.float32)
    g[::3, : len(special)] = special
    g = jnp.asarray(g)
    txs = [jadam.adam(1e-2, **STORAGE[storage], kernel=kernel) for kernel in ("native", "xla")]
    results = []
    for tx in txs:
        state = tx.init(g)
        for x in (g, jnp.ones_like(g), jnp.zeros_like(g)):
            updates, state = jax.jit(tx.update)(x, state)
        results.append((updates, state))
    for x, y in zip(*map(jax.tree.leaves, results), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        if x.dtype.kind in "iu":
            np.testing.assert_array_equal(x, y)
        else:
            np.testing.assert_allclose(x, y, rtol=1e-6, equal_nan=True)  # 8 float32 roundings


@needs_kernel
def test_no_update_of_the_kernel_is_beyond_adams_bound():
    """The gradients on which another 8-bit Adam makes steps of 96,129 learning rates."""
    tx = jadam.adam(1.0, **EIGHT_BITS, min_size=0, kernel="native")
    params = jnp.zeros((2, 128))
    state = tx.init(params)
    update = jax.jit(tx.update)
    base = np.full((2, 128), 1e-3, np.float32)
    bound = bounds(301)
    for t in range(1, 301):
        g = base.copy()
        g[:, 0] = (-1.0) ** t
        if t % 50 == 0:
            g[:, 1] = 0
        updates, state = update(jnp.asarray(g), state)
        # 1e-6: the roundings of the direction, under 4 ulps.
        assert np.max(np.abs(updates)) <= bound[t - 1] * (1 + 1e-6)


@needs_kernel
@pytest.mark.parametrize("storage", ["bfloat16", "bfloat16 m"])
def test_no_rounding_of_16_bits_takes_the_kernel_beyond_adams_bound(storage):
    """The gradients of test_storage, 1e-38 to 3e38, among them those that attain the bound."""
    tx = jadam.adam(1.0, eps=0.0, **STORAGE[storage], kernel="native")
    for name in instruction_sets():
        use(name)
        updates, _ = test_storage.directions(tx, test_storage.hostile())
        largest = np.abs(updates).max(axis=(1, 2))
        bound = bounds(len(largest))
        assert np.all(largest <= bound * test_storage.SLACK)
        assert largest[-1] >= 0.97 * bound[-1]


@needs_kernel
@pytest.mark.parametrize("b2", [0.999, 0.9998, 0.9999, 0.99999])
def test_no_second_step_of_the_kernel_is_beyond_the_bound_down_to_the_least_root(b2):
    """As test_storage says it of XLA's form."""
    gradients = test_storage.least_gradients(b2)
    tx = jadam.adam(1.0, b2=b2, eps=0.0, **STORAGE["bfloat16 m"], kernel="native")
    bounds_of_both = [reference.step_bound(t, b2=b2) for t in (1, 2)]
    for name in instruction_sets():
        use(name)
        largest = np.abs(test_storage.directions(tx, gradients)[0]).max(axis=1)
        assert np.all(largest <= np.array(bounds_of_both) * test_storage.SLACK)
        assert np.all(largest >= np.array(bounds_of_both) * 0.999)


@needs_kernel
def test_the_kernels_m_lives_where_v_has_lost_its_squares():
    """At 2e-18 each (1-b2)·g² is under float32's numbers: v stays 0, and bounds no m."""
    tx = jadam.adam(1.0, **STORAGE["bfloat16 m"], kernel="native")
    for name in instruction_sets():
        use(name)
        _, (state, *_) = test_storage.directions(tx, np.full((100, 128), 2e-18, np.float32))
        np.testing.assert_array_equal(state.nu, 0)
        # What is left of ten roundings, each of up to 2⁻⁷, in a lane by itself.
        np.testing.assert_allclose(state.mu.astype(np.float32), 2e-18, rtol=2.0**-5)


@needs_kernel
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(("make", "kind"), [(jadam.adam, "adam"), (jadam.nadam, "nadam")])
def test_the_kernel_loses_no_small_gradient_after_a_large_one(make, kind, traced):
    """As test_math says it of XLA's form."""
    for name in instruction_sets():
        use(name)
        test_math.small_rates(make, kind, "native", traced=traced)


@needs_kernel
def test_ties_go_to_the_even_bfloat16():
    """1 + 1/256 is in the middle of two numbers of bfloat16, as is 1 + 3/256: as in IEEE 754."""
    params = jnp.tile(jnp.asarray([1, 1 + 2.0**-7], jnp.bfloat16), 128)
    g = -jnp.ones(256, jnp.bfloat16)
    step = jax.jit(functools.partial(jadam.step, learning_rate=2.0**-8, eps=0.0, kernel="native"))
    for name in instruction_sets():
        use(name)
        moved, _ = step(g, jadam.init(params), params)
        expected = np.tile([1, 1 + 2.0**-6], 128)
        np.testing.assert_array_equal(moved.astype(jnp.float32), expected)


@pytest.mark.usefixtures("quick_compilation")
@needs_kernel
def test_by_itself_the_kernel_is_taken_where_it_is_faster():
    """`step`, and moments of fewer bits; an update of float32 moments is XLA's, unless asked."""
    g = jnp.ones((64, 128))
    for storage, options in STORAGE.items():
        tx = jadam.adam(1e-2, **options)
        state = tx.init(g)
        assert has_kernel(tx.step, g, state, g)
        assert has_kernel(tx.update, g, state) == (storage != "float32")
        assert has_kernel(jadam.adam(1e-2, **options, kernel="native").update, g, state)


@needs_kernel
def test_differentiation_and_vmap_take_the_form_of_xla():
    """The kernel has no derivative of its own: gradients through it are those without it."""
    g = jnp.asarray(np.random.default_rng(0).standard_normal((3, 50)), jnp.float32)

    def loss(g, rate, kernel):
        updates, _ = jadam.update(g, jadam.init(g), learning_rate=rate, kernel=kernel)
        return jnp.sum(updates**2)

    derivatives = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
    of_kernel, of_xla = (derivatives(g, jnp.float32(0.1), kernel) for kernel in ("native", "xla"))
    jax.tree.map(np.testing.assert_array_equal, of_kernel, of_xla)

    def update(g):
        return jadam.update(g, jadam.init(g), kernel="native")

    one, many = jax.jit(update), jax.jit(jax.vmap(update))(g)
    for i in range(3):
        jax.tree.map(
            lambda x, y, i=i: np.testing.assert_array_max_ulp(np.asarray(x)[i], y, 2),
            many,
            one(g[i]),
        )


@needs_kernel
def test_a_scan_and_single_calls_give_the_same_bits():
    """The kernel is in both; outside of jit the step's numbers may be rounded in another way."""
    tx = jadam.adamw(1e-2, kernel="native")
    params = jnp.ones((8, 200))
    grads = jnp.asarray(np.random.default_rng(0).standard_normal((4, 8, 200)), jnp.float32)
    start = (params, tx.init(params))

    def all_steps(carry):
        return jax.lax.scan(lambda c, g: (tx.step(g, c[1], c[0]), None), carry, grads)[0]

    assert has_kernel(all_steps, start)
    scanned = jax.jit(all_steps)(start)
    eager = jitted = start
    for g in grads:
        eager = tx.step(g, eager[1], eager[0])
        jitted = jax.jit(tx.step)(g, jitted[1], jitted[0])
    jax.tree.map(np.testing.assert_array_equal, jitted, scanned)
    # 1e-6: a few ulps of the step's numbers.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-6), eager, scanned)


@pytest.mark.usefixtures("either_compilation")
@needs_kernel
@pytest.mark.parametrize(
    ("spec", "storage"),
    [  # rows of a shard are rows; where they are cut, the storage matters
        *((P(None, "x"), storage) for storage in STORAGE),
        pytest.param(P("x"), "bfloat16", marks=pytest.mark.soak),
        (P("x"), "8 bits"),
        pytest.param(P("x"), "4 bits", marks=pytest.mark.soak),
        pytest.param(P("x", None), "float32", marks=pytest.mark.soak),
        (P(), "bfloat16 m"),
    ],
    ids=str,
)
def test_each_device_steps_its_own_shard(spec, storage):
    """No collective, nothing gathered, and the bits of one device."""
    mesh = Mesh(np.array(jax.devices()), "x")
    g = jnp.asarray(np.random.default_rng(0).standard_normal((16, 1024)), jnp.float32)
    tx = jadam.adamw(1e-2, **STORAGE[storage], kernel="native")
    step = jax.jit(tx.step)
    one, many = ((x, tx.init(x)) for x in (g, jax.device_put(g, NamedSharding(mesh, spec))))
    program = step.lower(many[0], many[1], many[0]).compile().as_text()
    assert "jadam_step" in program
    for collective in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
        assert collective not in program
    for _ in range(2):
        one, many = step(g, one[1], one[0]), step(many[0] * 0 + g, many[1], many[0])
    jax.tree.map(np.testing.assert_array_equal, many, one)


@pytest.mark.usefixtures("either_compilation")
@needs_kernel
@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P()], ids=str)
def test_a_row_of_one_block_is_divided_as_any_other(spec):
    """A last axis of exactly 128: its tops have an axis of size 1."""
    mesh = Mesh(np.array(jax.devices()), "x")
    g = jnp.asarray(np.random.default_rng(0).standard_normal((16, 128)), jnp.float32)
    tx = jadam.adam(1e-2, **EIGHT_BITS, min_size=0, kernel="native")
    state = tx.init(g)
    sharded = jax.device_put(g, NamedSharding(mesh, spec))
    found = jax.jit(tx.step)(sharded, tx.init(sharded), sharded)
    jax.tree.map(np.testing.assert_array_equal, found, jax.jit(tx.step)(g, state, g))


@pytest.mark.usefixtures("either_compilation")
@needs_kernel
def test_blocks_that_a_sharding_divides_are_put_together():
    """A last axis in shards of 125: right, if not without communication."""
    mesh = Mesh(np.array(jax.devices()), "x")
    g = jnp.asarray(np.random.default_rng(0).standard_normal((16, 1000)), jnp.float32)
    sharded = jax.device_put(g, NamedSharding(mesh, P(None, "x")))
    tx = jadam.adam(1e-2, **EIGHT_BITS, kernel="native")
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.jit(tx.update)(sharded, tx.init(sharded)),
        jax.jit(tx.update)(g, tx.init(g)),
    )


@pytest.mark.usefixtures("either_compilation")
@needs_kernel
def test_inside_shard_map_each_device_calls_the_kernel():
    """Under manual sharding the arrays are whole."""
    mesh = Mesh(np.array(jax.devices()), "x")
    g = jnp.asarray(np.random.default_rng(0).standard_normal((16, 64)), jnp.float32)
    update = jax.shard_map(
        lambda g: jadam.update(g, jadam.init(g), kernel="native")[0],
        mesh=mesh,
        in_specs=P("x"),
        out_specs=P("x"),
    )
    assert has_kernel(update, g)
    expected, _ = jax.jit(functools.partial(jadam.update, kernel="native"))(g, jadam.init(g))
    np.testing.assert_array_equal(jax.jit(update)(g), expected)


@needs_kernel
def test_an_exported_program_needs_no_kernel():
    """jax.export refuses calls of a library that the reader may not have: it gets XLA's form."""
    g = jnp.ones((64, 64))
    state = jadam.init(g)
    update = jax.jit(functools.partial(jadam.update, kernel="native"))
    exported = jax.export.export(update)(g, state)
    assert "custom_call" not in exported.mlir_module()
    expected = jax.jit(functools.partial(jadam.update, kernel="xla"))(g, state)
    jax.tree.map(np.testing.assert_array_equal, exported.call(g, state), expected)


@needs_kernel
@pytest.mark.parametrize("storage", STORAGE)
def test_under_donation_the_step_is_in_place_in_one_pass(storage):
    """The compiled step: nothing is copied, one call for 32 leaves, no loop over a leaf."""
    params = [jnp.ones((256, 512)) for _ in range(40)]
    tx = jadam.adamw(1e-3, **STORAGE[storage], kernel="native")
    state = tx.init(params)

    def step(params, state, grads):
        return tx.step(grads, state, params)

    program = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes == sum(x.nbytes for x in jax.tree.leaves((params, state)))
    assert memory.temp_size_in_bytes <= 0.01 * params[0].nbytes
    text = program.as_text()
    assert text.count('custom_call_target="jadam_step"') == 2
    assert "f32[256,512]{1,0} fusion" not in text


@needs_kernel
def test_without_donation_the_inputs_stay_as_they_were():
    """The kernel writes in place; a buffer that somebody holds is copied before."""
    params = jnp.ones((64, 64))
    tx = jadam.adam(1e-2, kernel="native")
    state = tx.init(params)
    before = jax.tree.map(np.array, (params, state))
    jax.jit(tx.step)(params, state, params)
    jax.jit(tx.update)(params, state, params)
    jax.tree.map(np.testing.assert_array_equal, (params, state), before)


@needs_kernel
def test_several_threads_at_once():
    """Programs that run side by side share XLA's threads, and give what each gives alone."""
    g = [
        jnp.asarray(np.random.default_rng(i).standard_normal(100_000), jnp.float32)
        for i in range(4)
    ]
    step = jax.jit(functools.partial(jadam.update, kernel="native"))
    expected = [step(x, jadam.init(x)) for x in g]
    results = [[] for _ in g]

    def work(i):
        for _ in range(20):
            results[i].append(step(g[i], jadam.init(g[i])))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, result in enumerate(results):
        assert len(result) == 20
        for x in result:
            jax.tree.map(np.testing.assert_array_equal, x, expected[i])


@pytest.mark.usefixtures("quick_compilation")
@needs_kernel
def test_other_members_and_dtypes_fall_back():
    """ "native" asks for the kernel where it has the equations and the dtypes, and for no more."""
    params = {
        "w": jnp.ones((4, 64)),
        "h": jnp.ones(3, jnp.float16),
        "z": jnp.ones(3, jnp.complex64),
    }
    for make in (jadam.amsgrad, jadam.adamax):
        tx = make(1e-2, kernel="native")
        assert not has_kernel(tx.update, params, tx.init(params))
    tx = jadam.adam(1e-2, kernel="native")
    state = tx.init(params)
    assert has_kernel(tx.update, params, state)
    updates, _ = jax.jit(tx.update)(params, state)
    assert jax.tree.map(jnp.result_type, updates) == jax.tree.map(jnp.result_type, params)


@needs_kernel
def test_every_instruction_set_of_the_processor_is_there_and_runs():
    """None is left out in silence: the library has what the processor says that it has.

    Baseline fuses no product with a sum on x86-64, the others do: were the kernel that is asked for
    not the one that runs, the bits would be the same.
    """
    assert instruction_sets()[-1] == "baseline"
    if platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists():
        pytest.skip("only Linux on x86-64 says what the processor has")
    flags = re.search(r"flags\s*:(.*)", Path("/proc/cpuinfo").read_text())[1].split()
    needs = {
        "avx512": {"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
        "avx2": {"avx2", "fma"},
        "baseline": set(),
    }
    assert instruction_sets() == [name for name, need in needs.items() if need <= set(flags)]
    g = jnp.asarray(np.random.default_rng(0).standard_normal(4096), jnp.float32)
    step = jax.jit(functools.partial(jadam.update, kernel="native"))
    bits = {}
    for name in instruction_sets():
        use(name)
        updates = g
        state = jadam.init(g)
        for _ in range(3):
            updates, state = step(g + updates, state)
        bits[name] = np.asarray(updates).tobytes()
    assert bits["baseline"] not in [x for name, x in bits.items() if name != "baseline"]
    # In float32 nothing but the fusing may differ.
    assert len(set(bits.values())) == min(len(bits), 2)


def forget():
    """What is known of the library is asked again."""
    native.library.cache_clear()
    choice.why_not.cache_clear()


@pytest.fixture
def loaded_again():
    """`library()` as it is when a process asks for the first time."""
    forget()
    yield native.library
    forget()


@needs_kernel
@pytest.mark.parametrize("name", instruction_sets())
def test_an_environment_variable_forces_the_instruction_set(monkeypatch, loaded_again, name):
    """`jadam.kernels()` says which one runs, and that it was forced."""
    monkeypatch.setenv("JADAM_INSTRUCTION_SET", name)
    expected = f"native ({name}): loaded, forced by JADAM_INSTRUCTION_SET; "
    assert jadam.kernels()["cpu"].startswith(expected)
    assert loaded_again().instruction_set == name


@needs_kernel
def test_a_forced_set_that_is_not_there_is_refused_in_words(monkeypatch, loaded_again):
    """A misspelt name is not the default: the kernel is not used, and the reason says why."""
    there = ", ".join(instruction_sets())
    monkeypatch.setenv("JADAM_INSTRUCTION_SET", "avx9")
    loaded_again.cache_clear()
    expected = f"xla: not used: JADAM_INSTRUCTION_SET is 'avx9', this processor has {there}"
    assert jadam.kernels()["cpu"] == expected
    with pytest.raises(RuntimeError, match="JADAM_INSTRUCTION_SET is 'avx9'"):
        jadam.adam(1e-3, kernel="native")


def test_kernels_says_what_is_in_use_and_why():
    """A name and a reason for each platform."""
    assert jadam.kernels().keys() == {"cpu", "gpu", "tpu"}
    for text in jadam.kernels().values():
        kind, reason = text.split(": ", 1)
        assert kind.split(" ")[0] in ("native", "cuda", "pallas", "xla")
        assert reason


@pytest.mark.usefixtures("quick_compilation")
def test_without_the_library_jadam_runs_in_xla(monkeypatch):
    """No compiler at installation: the same results, and an error for who insists on the kernel."""
    g = jnp.ones((4, 64))
    expected = jadam.update(g, jadam.init(g), kernel="xla")
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: None)
    forget()
    try:
        assert jadam.kernels()["cpu"].startswith("xla: not built")
        jax.tree.map(np.testing.assert_array_equal, jadam.update(g, jadam.init(g)), expected)
        assert not has_kernel(jadam.step, g, jadam.init(g), g)
        with pytest.raises(RuntimeError, match='kernel: expected one for "native", got none: not'):
            jadam.adam(1e-3, kernel="native")
    finally:
        monkeypatch.undo()
        forget()


@needs_kernel
@pytest.mark.parametrize("left", [0, 10, 4096, 0.5, -5000, -1])
def test_a_library_that_is_cut_short_is_not_loaded(monkeypatch, tmp_path, loaded_again, left):
    """As a full disk or a broken download leaves it; the loader would die of SIGBUS."""
    whole = Path(importlib.util.find_spec("jadam._kernel").origin).read_bytes()
    left = int(left * len(whole)) if isinstance(left, float) else left
    path = tmp_path / "_kernel.so"
    path.write_bytes(whole[:left])
    spec = importlib.machinery.ModuleSpec("jadam._kernel", None, origin=str(path))
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: spec)
    assert loaded_again().instruction_set is None
    assert jadam.kernels()["cpu"].startswith("xla: not loaded: ")
    assert str(path) in loaded_again().reason
    g = jnp.ones((4, 64))
    assert not has_kernel(jadam.step, g, jadam.init(g), g)


@needs_kernel
def test_a_library_without_the_kernels_symbols_is_not_used(monkeypatch, loaded_again):
    """Another file under that name, or another version's: XLA's form, and the reason."""
    ctypes_library = importlib.util.find_spec("_ctypes")
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: ctypes_library)
    assert loaded_again().instruction_set is None
    assert "undefined symbol: jadam_" in jadam.kernels()["cpu"]


SOURCES = {path.name: path.read_text() for path in Path(jadam.__file__).parent.rglob("*.[ch]*")}


def fields(struct):
    """The names and lengths of a struct of float32 in step.h."""
    body = re.search(rf"struct {struct} {{(.*?)\n}};", SOURCES["step.h"], re.DOTALL)[1]
    return [
        (name, int(n or 1)) for name, n in re.findall(r"^  float (\w+)(?:\[(\d+)\])?;", body, re.M)
    ]


def test_python_fills_the_structs_of_the_kernel_by_name():
    """The kernel reads numbers by position: names, order and lengths are those of Python."""
    assert [(name, 1) for name in native.NAMES] == fields("Numbers")
    dtype = native.tables().dtype
    assert [(name, dtype[name].shape[0]) for name in dtype.names] == fields("Tables")


def test_the_kernel_has_pythons_constants():
    """What both sides state is stated alike."""
    constants = dict(
        re.findall(r"\b(k\w+) = (0x\w+?|\d+)u?[,;]", SOURCES["step.h"] + SOURCES["work.h"])
        + re.findall(r"\b(k\w+) = (\d+)[,;]", SOURCES["equations.h"] + SOURCES["codecs.h"])
    )
    expected = {
        "kBlock": codes.BLOCK,
        "kTop": lattice.EIGHT_BITS.top,
        "kNaN": lattice.EIGHT_BITS.nan,
        "kM": lattice.EIGHT_BITS.sizes,
        "kHighest": lattice.FOUR_BITS.top,
        "kSizes": lattice.FOUR_BITS.sizes,
        "kStep": _rounding.STEP,
        "kLane": _rounding._LANE,
        "kSalt": _rounding._SALT,
    }
    assert {name: int(constants[name], 0) for name in expected} == expected
    assert _rounding._LANES == codes.BLOCK
    # 16 levels of the root an octave of v: in `kBias` and in the shifts of Codec::biased_level.
    assert lattice.EIGHT_BITS.per_octave == 32
    assert f"kBend = {lattice.FOUR_BITS.bend}f" in SOURCES["step.h"]
    # The integer of a coarse NaN is the largest, that of a fine one has m's code 0.
    for name, of in (("Codec", lattice.EIGHT_BITS), ("CoarseCodec", lattice.FOUR_BITS)):
        pattern = rf"class {name}\b.*?kOfNaN = ([^;]+);"
        text = re.search(pattern, SOURCES["equations.h"], re.DOTALL)[1]
        value = eval(text, {"kNaN": lattice.EIGHT_BITS.nan})
        assert value == int(of.both_of(jnp.int32(of.nan), jnp.int32(0)))
    largest = _math.largest_gradient(jnp.dtype(jnp.float32))
    assert largest == float.fromhex("0x1p63")
    assert "all(-0x1p63f)), all(0x1p63f)" in SOURCES["equations.h"]
    assert int(re.search(r"kLargestG = (\w+)", SOURCES["block.h"])[1], 0) == np.float32(
        largest
    ).view(np.int32)
    least = float(jnp.finfo(jnp.float32).tiny / jnp.finfo(jnp.float32).eps)
    floor = float.fromhex(re.search(r"kFloor = (\S+)f;", SOURCES["equations.h"])[1])
    assert np.float32(floor) == np.float32(least**0.5)
    assert least == float.fromhex("0x1p-103")
    assert "all(0x1p-103f)" in SOURCES["equations.h"]


def test_comments_in_the_kernel_name_python_that_exists():
    """A reader who follows one finds it."""
    for text in SOURCES.values():
        comments = "\n".join(re.findall(r"//.*", text))
        where = {
            "codes": codes,
            "lattice": lattice,
            "Lattice": lattice.Lattice,
            "native": native,
            "_masters": jadam._masters,
            "_math": _math,
            "_missed": jadam.rows._missed,
            "_rounding": _rounding,
        }
        for module, name in re.findall(rf"\b({'|'.join(where)})\.(?!py\b)(\w+)", comments):
            assert hasattr(where[module], name), (module, name)


def test_a_wrong_kernel_is_refused():
    """The name of the argument, what was expected, what came."""
    with pytest.raises(
        ValueError, match="kernel: expected one of 'auto', 'xla', 'native', got 'c'"
    ):
        jadam.adam(1e-3, kernel="c")


@pytest.mark.usefixtures("either_compilation")
@needs_kernel
@pytest.mark.parametrize(
    ("shape", "wrapper"), [((64, 768), None), ((16,), None), ((8, 200), "int8")], ids=str
)
def test_rows_that_are_cut_within_a_block_need_no_communication(shape, wrapper):
    """Dithers go by the place in the row: each device knows where its shard of it begins."""
    tx = jadam.adamw(1e-2, mu_dtype="bfloat16", nu_dtype="bfloat16", kernel="native")
    dtype = jnp.float32
    if wrapper:
        tx, dtype = WRAPPERS[wrapper](tx), jnp.bfloat16
    mesh = Mesh(np.array(jax.devices()), "x")
    where = NamedSharding(mesh, P(*[None] * (len(shape) - 1), "x"))
    g = jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)
    sharded = jax.device_put(g, where)
    shardings = jadam.sharding.state_shardings(tx, sharded)
    state = jax.jit(tx.init, out_shardings=shardings)(sharded)
    step = jax.jit(tx.step)
    program = step.lower(sharded, state, sharded).compile().as_text()
    assert "jadam_step" in program
    for collective in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
        assert collective not in program
    one, many = (g, tx.init(g)), (sharded, state)
    for _ in range(2):
        one, many = step(g, one[1], one[0]), step(sharded, many[1], many[0])
    jax.tree.map(np.testing.assert_array_equal, many, one)
