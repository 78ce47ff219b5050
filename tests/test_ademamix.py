"""AdEMAMix beyond what the tables of all optimizers hold: its warm-up, its bound, its storage."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import jadam
from jadam import _math

EIGHT_BITS = {"mu_dtype": "int8", "nu_dtype": "uint8", "min_size": 0}
# float32 rounds m, v and the slow moment by an ulp or two in each step, as in test_math.
SLACK = 1 + 1e-5


def directions(tx, gradients):
    """The directions along a sequence of gradients, and the state after it."""
    tx_step = jax.jit(
        lambda state, gradients: jax.lax.scan(
            lambda state, g: tx.update(g, state, g)[::-1], state, gradients
        )
    )
    state, updates = tx_step(tx.init(gradients[0]), gradients)
    return -np.asarray(updates, np.float64), state


@pytest.mark.parametrize(
    "options",
    [{}, {"warmup": 40}, {"b3": 0.99999, "warmup": 1000.0}, {"b3": 0.99, "b1": 0.0, "warmup": 7}],
    ids=str,
)
def test_the_schedules_are_the_papers(options):
    """alpha grows linearly, the half-life of the slow average linearly: 100 steps in float64."""
    rng = np.random.default_rng(0)
    gradients = rng.standard_normal((100, 64)) + 0.3
    found, _ = directions(jadam.ademamix(1.0, **options), jnp.asarray(gradients, jnp.float32))
    member = reference.Member("ademamix", **options)
    expected = np.stack([member(g) for g in gradients])
    # 100 steps of an ulp or two each, measured against the step's size; see test_math.
    np.testing.assert_allclose(found, expected, rtol=5e-6, atol=5e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("b1", "b3", "warmup"),
    [
        *((0.9, 0.9999, 400.0), (0.9, 0.9, 10.0), (0.9, 0.5, 20.0)),
        *((0.0, 0.99, 7.0), (0.5, 0.999, None)),
    ],
)
def test_the_product_of_all_slow_decays_needs_no_state(b1, b3, warmup):
    """Within the warm-up and after it: the rate, and the sum of the logarithms of all before.

    No NaN comes up on the way, of which a derivative would be one too.
    """
    float64 = jnp.dtype(jnp.float64)
    for t in (1, 2, 7, 10, 11, 399, 400, 1000):
        steps = range(1, t + 1)
        rates = [reference.ademamix_warmup(s, b1=b1, b3=b3, warmup=warmup)[0] for s in steps]
        with jax.debug_nans(True):
            found = _math.SlowDecay.of(b3, _math.Decay.of(b1, float64), jnp.float64(t), warmup)
        # Roundings of float64 in differences of digamma and in sums of 1000 logarithms.
        np.testing.assert_allclose(found.log_product, np.sum(np.log(rates)), rtol=1e-11)
        now = rates[-1], 1 - rates[-1], np.log(rates[-1])
        np.testing.assert_allclose(found.now, now, rtol=1e-11)
        assert found.share == (min(t / warmup, 1) if warmup else 1)


@pytest.mark.usefixtures("either_compilation")
def test_schedules_of_ones_own_are_functions_of_the_updates_made():
    """As optax.contrib.ademamix (0.2.8) takes them, for alpha and for b3."""
    alpha = optax.linear_schedule(0.0, 5.0, 30)
    b3 = optax.linear_schedule(0.9, 0.999, 30)
    rng = np.random.default_rng(1)
    gradients = jnp.asarray(rng.standard_normal((60, 50)), jnp.float32)
    with jax.numpy_dtype_promotion("standard"):
        theirs, _ = directions(optax.contrib.ademamix(1.0, alpha=alpha, b3=b3), gradients)
    ours, _ = directions(jadam.ademamix(1.0, alpha=alpha, b3=b3), gradients)
    # optax's 1 - b2**t in float32 is off by 7e-6 in the first steps.
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.usefixtures("either_compilation")
@pytest.mark.parametrize(
    ("options", "storage"),
    [  # each of the options here with one storage, in `make soak` with both
        pytest.param(
            options,
            storage,
            marks=[pytest.mark.soak] * ((storage == EIGHT_BITS) != bool(i % 2)),
            id=f"{options}-{'8 bits' if storage else 'float32'}",
        )
        for i, options in enumerate(
            ({}, {"warmup": 100}, {"b3": 0.99999, "warmup": 3}, {"b3": 0.99, "b2": 0.95})
        )
        for storage in ({}, EIGHT_BITS)
    ],
)
def test_no_update_is_beyond_the_bound(options, storage):
    """Jumps over 30 decades, zeros, heavy tails: the bound that follows from the equations."""
    rng = np.random.default_rng(0)
    shape = (300, 16, 128)
    scale = (10.0 ** rng.uniform(-12, 17, (6, 16, 128))).repeat(50, 0)
    gradients = np.where(rng.random(shape) < 0.7, scale * rng.standard_t(1, shape), 0)
    gradients[:, 0] = np.abs(gradients[:, 0])
    gradients[:, 1] = 1.0
    tx = jadam.ademamix(1.0, eps=0.0, **options, **storage)
    found, _ = directions(tx, jnp.asarray(gradients, jnp.float32))
    largest = np.abs(found).max(axis=(1, 2))
    assert np.all(largest <= reference.ademamix_bounds(300, **options) * SLACK)


def test_the_bound_is_attained():
    """By gradients that grow as the slow average weighs them: the reference's bound is no guess."""
    steps, b2, b3 = 200, 0.999, 0.9999
    fast, slow = (reference.extremal_gradients(steps, b, b2) for b in (0.9, b3))
    best = 0.0
    for share in np.linspace(0, 1, 101):
        g = share * fast / np.abs(fast).max() + (1 - share) * slow / np.abs(slow).max()
        member = reference.Member("ademamix", eps=0.0)
        best = max(best, *(abs(member(x)) for x in g[-1:]), abs([member(x) for x in g][-1]))
    bound = reference.ademamix_bounds(steps)[-1]
    # The two moments cannot both be at their bounds: their sum comes within a fifth of it.
    assert 0.8 * bound <= best <= bound * SLACK


@pytest.mark.usefixtures("either_compilation")
@pytest.mark.parametrize(
    "options", [{}, pytest.param({"warmup": 2000}, marks=pytest.mark.soak)], ids=str
)
def test_eight_bits_take_three_bytes_and_a_constant_gradient_keeps_its_size(options):
    """2.02 bytes for m and v, one for the slow average, which its limit does not cut."""
    g = jnp.ones((16, 128))
    tx = jadam.ademamix(1.0, eps=0.0, **options, **EIGHT_BITS)
    found, state = directions(tx, jnp.broadcast_to(g, (3000, *g.shape)))
    stored = sum(x.nbytes for x in jax.tree.leaves(state[0][1:]))
    assert stored <= 3.02 * g.size
    member = reference.Member("ademamix", eps=0.0, **options)
    expected = np.array([member(1.0) for _ in range(3000)])
    # Near its limit a code of the slow average is 13% of it, and v is rounded up to keep the bound:
    # measured 10%. The dither of m, which moves as that of v does, made it 40%.
    assert np.abs(found.mean(axis=(1, 2)) / expected - 1).max() <= 0.12


@pytest.mark.usefixtures("either_compilation")
def test_codes_go_to_floats_and_back():
    """`cast_like` with b3: the numbers that codes stand for have codes, their own."""
    rng = np.random.default_rng(0)
    gradients = jnp.asarray(rng.standard_normal((30, 8, 256)), jnp.float32)
    small, large = (jadam.ademamix(1.0, warmup=50, **kw) for kw in (EIGHT_BITS, {}))
    _, state = directions(small, gradients)
    like = jax.eval_shape(large.init, gradients[0])
    cast = functools.partial(jadam.migrate.cast_like, b3=0.9999, warmup=50)
    floats = cast(state, like)
    assert jax.tree.map(jax.typeof, floats) == jax.tree.map(jax.typeof, like)
    again = cast(cast(floats, state), like)
    jax.tree.map(np.testing.assert_array_equal, again, floats)
    with pytest.raises(TypeError, match="b3: expected a real number"):
        jadam.migrate.cast_like(state, like)
    with pytest.raises(TypeError, match="b4: expected b1, b2, b3, warmup for ademamix, got b1, "):
        cast(state, like, b4=0.5)


@pytest.mark.usefixtures("either_compilation")
def test_diagnostics_know_its_codes():
    """The report of a state in 8 bits is that of the moments that it stands for."""
    rng = np.random.default_rng(0)
    params = jnp.ones((8, 256))
    gradients = jnp.asarray(rng.standard_normal((20, 8, 256)), jnp.float32)
    tx = jadam.ademamix(1.0, **EIGHT_BITS)
    _, state = directions(tx, gradients)
    floats = jadam.migrate.cast_like(
        state, jax.eval_shape(jadam.ademamix(1.0).init, params), b3=0.9999
    )
    coded = jadam.diagnostics(state, params, params, b3=0.9999)["whole"]
    plain = jadam.diagnostics(floats, params, params)["whole"]
    for name in plain:
        # The two are summed in another order.
        np.testing.assert_allclose(coded[name], plain[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"b3": 1.0}, r"b3: expected a number >= 0 and < 1, got 1.0"),
        ({"b3": "slow"}, r"b3: expected a real number or a scalar array, got 'slow'"),
        ({"alpha": -1.0}, r"alpha: expected a number >= 0, got -1.0"),
        ({"warmup": 0}, r"warmup: expected a number > 0, got 0.0"),
    ],
)
def test_wrong_hyperparameters_are_refused(options, message):
    """The argument's name, what was expected, what came."""
    with pytest.raises((TypeError, ValueError), match=message):
        jadam.ademamix(1e-3, **options)


def simulated(gradients, b2, rates):
    """The slow average over the root of v, both uncorrected, after these gradients in float64."""
    slow = v = 0.0
    for g, b3 in zip(gradients, rates, strict=True):
        slow, v = b3 * slow + (1 - b3) * g, b2 * v + (1 - b2) * g * g
    return slow / np.sqrt(v)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("b3", "warmup", "is_cut"),
    [
        *((0.9999, None, True), (0.99, None, False)),
        *((0.9999, 400.0, True), (0.99, 400.0, False), (0.9, 400.0, False)),
    ],
)
def test_the_codes_of_the_slow_average_reach_as_far_as_gradients_take_it(b3, warmup, is_cut):
    """To C, or with a warm-up to a ratio that gradients give, and never beyond 4·S.

    S is what constant gradients give. Codes that reached C, which has no end, would be too coarse
    where slow averages are.
    """
    b2, cut = 0.999, []
    for t in (1, 10, 300, 4001, 12000):
        rates = [reference.ademamix_warmup(s, b3=b3, warmup=warmup)[0] for s in range(1, t + 1)]
        constant = simulated(np.ones(t), b2, rates)
        if warmup is None:
            # Cauchy and Schwarz: the gradients with which slow/√v is largest.
            within = np.sqrt(np.sum((1 - b3) ** 2 / (1 - b2) * (b3 * b3 / b2) ** np.arange(t)))
        else:
            stopped = np.arange(t) < -(-t // 2)
            within = max(constant, simulated(stopped, b2, rates))
        time = jadam._math.Time.of(jnp.int32(t), jnp.dtype(jnp.float64))
        options = {"b1": 0.9, "b2": b2, "b3": b3, "warmup": warmup}
        _, slow = jadam._math.ademamix_ratios(time, **options)
        # Sums and powers of thousands of steps, and digamma.
        np.testing.assert_allclose(slow.limit, min(within, 4 * constant), rtol=1e-9)
        # Noise as if b3 had always been what it is, or a mean of all gradients.
        deviation = (1 - rates[-1]) * np.sqrt(np.sum(rates[-1] ** (2.0 * np.arange(t))))
        deviation = max(deviation, (1 - np.prod(rates)) / np.sqrt(t))
        noise = deviation / np.sqrt(reference.bias(b2, t))
        np.testing.assert_allclose(slow.noise, noise, rtol=1e-9)
        cut.append(within > 4 * constant)
    assert any(cut) == is_cut
