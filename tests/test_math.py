"""The numerical contract of one step: exact against NumPy float64 written from the papers."""

import decimal
import fractions
import functools

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import FAMILY, each_member, ulps
from hypothesis import given, settings

import jadam
from jadam import _math

B1 = (0.0, 0.5, 0.9, 0.99)
B2 = (0.9, 0.99, 0.999, 0.9999, 0.99999)
STEPS = (1, 2, 10, 1000, 100_000, 2**31 - 1)


def spread(rng: np.random.Generator, n: int) -> np.ndarray:
    """Numbers of both signs over 30 orders of magnitude, 1e-15 to 1e15, float32."""
    return (10.0 ** rng.uniform(-15, 15, n) * rng.choice([-1, 1], n)).astype(np.float32)


@pytest.mark.parametrize(
    ("b1", "b2"),
    [  # the rows and columns of the defaults, in `make soak` the whole grid
        pytest.param(b1, b2, marks=[pytest.mark.soak] * (b1 != 0.9 and b2 != 0.999))
        for b1 in B1
        for b2 in B2
    ],
)
def test_direction_from_given_moments_is_exact_to_five_ulps(b1, b2):
    """The direction is float64's for the moments that the state holds, at any b1, b2 and t.

    Measured maximum over this grid: 4.3 ulps (jax 0.10.2), 3.5 (0.12.0). It is the sum of the
    roundings of c1, c2, 1/c2, v̂, √, the product and the quotient, and of XLA's expm1 (up to 4 ulps
    on jax 0.10's CPU, halved where it goes through the root).
    """
    rng = np.random.default_rng(0)
    n = 4000

    @jax.jit
    def step(g, state):
        return jadam.update(g, state, learning_rate=1.0, b1=b1, b2=b2, eps=0.0)

    for t in STEPS:
        m, v, g = spread(rng, n), spread(rng, n) ** 2, spread(rng, n)
        if t == 1:
            m, v = np.zeros_like(m), np.zeros_like(v)
        state = jadam.AdamState(jnp.int32(t - 1), jnp.asarray(m), jnp.asarray(v))
        updates, state = step(jnp.asarray(g), state)
        assert state.count == t
        m, v = (np.asarray(x, np.float64) for x in (state.mu, state.nu))
        # Below the normal numbers the CPU flushes to 0: then the direction is 0 by definition.
        normal = v > 0
        expected = -reference.direction(m[normal], v[normal], t, b1=b1, b2=b2, eps=0.0)
        assert ulps(updates[normal], expected).max() <= 5


@pytest.mark.parametrize("b", [*B1, *B2])
def test_bias_correction_is_exact_to_five_ulps(b):
    """1 - bᵗ to 5 ulps at every t, where `1 - b**t` in float32 loses up to half its digits."""
    t = np.unique(np.geomspace(1, 2**31 - 1, 3000).astype(np.int64))
    value = jax.jit(lambda t: _math.bias_correction(_math.Decay.of(b, jnp.dtype(jnp.float32)), t))(
        jnp.asarray(t, jnp.float32)
    )
    # 4 ulps are those of XLA's expm1 on jax 0.10's CPU, 1 the rounding of t·log b.
    assert ulps(value, [reference.bias(b, x) for x in t]).max() <= 5


def test_the_dither_of_a_step_is_within_half_a_unit():
    """24 bits of Weyl's multiples of 2³²/φ: the midpoints of 2²⁴ parts of (-½, ½), exactly."""
    golden = 0x9E3779B9
    # The steps with the least and the largest multiples, mod 2³².
    ends = np.arange(-256, 256) * pow(golden, -1, 2**32) % 2**32
    counts = np.array([*range(20), 2**31 - 1, *ends[ends < 2**31]])
    parts = counts * golden % 2**32 // 256
    time = _math.Time.of(jnp.asarray(counts, jnp.int32), jnp.dtype(jnp.float32))
    np.testing.assert_array_equal(np.float64(time.dither), (parts + 0.5) / 2**24 - 0.5)
    assert {0, 2**24 - 1} <= set(parts)
    np.testing.assert_array_equal(time.made, np.maximum(counts - 1, 0))
    for b2, complement in ((0.75, 0.25), (0.5, 0.5), (0.25, np.inf)):
        found = _math.dither_of_v(_math.Decay.of(b2, jnp.dtype(jnp.float32)), time)
        np.testing.assert_array_equal(found, np.float64(time.dither) / complement)
    with jax.enable_x64(True):
        time = _math.Time.of(jnp.asarray(counts, jnp.int32), jnp.dtype(jnp.float64))
    np.testing.assert_array_equal(time.dither, 0)


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_a_decay_rate_is_taken_as_it_is_given(dtype):
    """1 - b, log b and powers of a Python number from float64, of an array from its own value."""
    for b in (0.0, 0.25, 0.9, 0.999):
        given = b if dtype is None else jnp.asarray(b, dtype)
        exact = float(given)
        decay = _math.Decay.of(given, jnp.dtype(jnp.float32))
        assert decay.rate == exact
        # Half an ulp of a float32 near 1 for an array, and none for a number.
        assert decay.complement == pytest.approx(1 - exact, rel=1e-15 if dtype is None else 1e-7)
        if exact:
            assert decay.log == pytest.approx(np.log(exact), rel=1e-15 if dtype is None else 1e-6)
        steps = np.arange(5.0)
        # Some ulps of exp; 0 has a finite logarithm, from which powers are 1e-7 at most.
        close = {"rtol": 1e-6, "atol": 2e-7 if b == 0 else 0}
        np.testing.assert_allclose(
            decay.power(jnp.asarray(steps, "float32")), exact**steps, **close
        )


@pytest.mark.parametrize("b2", B2)
@pytest.mark.parametrize("learning_rate", [1.0, 0.1, 3e-4])
def test_first_step_of_a_constant_gradient_is_the_learning_rate(b2, learning_rate):
    """-lr·sign(g) to 2 ulps at eps = 0 for gradients over 30 orders of magnitude."""
    g = spread(np.random.default_rng(1), 20_000)
    step = jax.jit(lambda g, s: jadam.update(g, s, learning_rate=learning_rate, b2=b2, eps=0.0)[0])
    # The learning rate that float32 holds: its own rounding is no error of Adam's.
    expected = -float(np.float32(learning_rate)) * np.sign(g)
    assert ulps(step(jnp.asarray(g), jadam.init(g)), expected).max() <= 2


@pytest.mark.parametrize("b2", B2)
def test_a_constant_gradient_keeps_the_step_at_the_learning_rate(b2):
    """-lr·sign(g) for 100,000 steps at eps = 0, at any b2.

    A float32 accumulator rounded to nearest stops 2⁻²⁴/(1-b2) short: 2.7e-4 at b2 = .9999 here,
    2.9e-3 after a million steps at .99999. With the dither what is left is 1,000 or so dithered
    roundings that mostly cancel, measured at most 6e-6 (b2 = .9999 and .99999).
    """
    rng = np.random.default_rng(2)
    g = jnp.asarray(
        np.concatenate([10.0 ** np.arange(-15, 16), rng.uniform(0.5, 2, 97)]), "float32"
    )

    def step(state, _):
        updates, state = jadam.update(g, state, learning_rate=1.0, b2=b2, eps=0.0)
        return state, jnp.max(jnp.abs(updates + 1))

    _, error = jax.jit(lambda s: jax.lax.scan(step, s, length=100_000))(jadam.init(g))
    assert error.max() <= 1e-5


STEPS_OF_BOUND = 48


@jax.jit
def _run_without_eps(gradients):
    def step(state, g):
        updates, state = jadam.update(g, state, learning_rate=1.0, eps=0.0)
        return state, jnp.abs(updates)

    return jax.lax.scan(step, jadam.init(gradients[0]), gradients)[1]


@settings(max_examples=200)
@given(
    hnp.arrays(
        np.float32,
        (STEPS_OF_BOUND, 4),
        elements=st.floats(-(2.0**60), 2.0**60, width=32) | st.sampled_from([0.0, 1.0, -1e-3]),
        fill=st.just(np.float32(0)),
    )
)
def test_no_step_is_beyond_the_bound(gradients):
    """|update| <= lr·bound(t) for every gradient sequence, by Cauchy and Schwarz."""
    bounds = np.array([reference.step_bound(t) for t in range(1, STEPS_OF_BOUND + 1)])
    # 1e-5: each of up to 48 steps rounds m and v by an ulp or two of float32.
    assert np.all(_run_without_eps(jnp.asarray(gradients)) <= bounds[:, None] * (1 + 1e-5))


@pytest.mark.parametrize("t", [1, 100, 1000])
def test_the_bound_is_attained_by_the_extremal_sequence(t):
    """1.0, 2.243, 5.781: the bound is no loose one, and jadam reaches it."""
    gradients = jnp.asarray(reference.extremal_gradients(t), jnp.float32)

    @jax.jit
    def run(gradients):
        def step(state, g):
            updates, state = jadam.update(g, state, learning_rate=1.0, eps=0.0)
            return state, updates

        return jax.lax.scan(step, jadam.init(gradients[0]), gradients)[1]

    expected = {1: 1.0, 100: 2.243, 1000: 5.781}[t]
    assert reference.step_bound(t) == pytest.approx(expected, abs=5e-4)  # three digits are given
    # The gradients grow by b2/b1 = 1.11 a step: what float32 rounds matters for few steps only.
    assert -run(gradients)[-1] == pytest.approx(reference.step_bound(t), rel=1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("b1", "b2"), [(0.9, 0.999), (0.0, 0.9), (0.9, 0.9), (0.99, 0.5), (0.99, 0.99**2)]
)
def test_how_large_first_moments_are_beside_second_ones(b1, b2):
    """Of noise in the root mean square, and at most: sums of all weights, written out.

    For Adam's v and AdaMax's u. Codes end at the bound, or at 200 times the noise.
    """
    steps = [0, 1, 2, 3, 100, 1000]
    time = _math.Time.of(jnp.asarray(steps, jnp.int32), jnp.dtype(jnp.float64))
    (by_root,), (by_norm,) = (
        f(time, b1=b1, b2=b2) for f in (_math.moment_ratios, _math.norm_ratios)
    )
    for i, t in enumerate(max(t, 1) for t in steps):
        past = np.arange(t)
        variance = np.sum((1 - b1) ** 2 * b1 ** (2.0 * past))
        largest = np.sum((1 - b1) ** 2 / (1 - b2) * (b1 * b1 / b2) ** past)
        for found, noise, bound in (
            (by_root, np.sqrt(variance / reference.bias(b2, t)), np.sqrt(largest)),
            (by_norm, np.sqrt(variance) / 3, np.sum((1 - b1) * (b1 / b2) ** past)),
        ):
            assert found.noise[i] == pytest.approx(noise, rel=1e-12)
            # A ρ of 1 is taken 1e-6 beside it; else roundings of powers up to 1e150.
            is_one = b1 == b2 or b1 * b1 == b2
            assert found.bound[i] == pytest.approx(bound, rel=1e-6 * t if is_one else 1e-11)
            assert found.limit[i] == np.minimum(found.bound[i], 200 * found.noise[i])


def test_the_bound_of_first_moments_ends_in_infinity():
    """For b2 = 0 the second moment is the last gradient alone: never NaN, and codes have an end."""
    time = _math.Time.of(jnp.arange(1, 5, dtype=jnp.int32), jnp.dtype(jnp.float32))
    for ratios in (_math.moment_ratios, _math.norm_ratios):
        (found,) = ratios(time, b1=0.5, b2=0.0)
        np.testing.assert_array_equal(found.bound, [0.5, np.inf, np.inf, np.inf])
        np.testing.assert_allclose(found.limit[1:], 200 * found.noise[1:], rtol=1e-6)


@pytest.mark.parametrize("b1", [0.9, 0.99])
@pytest.mark.parametrize("momentum_decay", [0.004, 1.0])
def test_dozats_products_need_no_state(x64, b1, momentum_decay):
    """The closed form of μ₁·…·μₜ equals the product, to float64's rounding of t factors."""
    decay = _math.Decay.of(b1, jnp.dtype(jnp.float64))
    for t in (1, 2, 3, 10, 100, 1000, 10_000):
        momentum = _math.dozat(decay, jnp.float64(t), momentum_decay)
        m_weight = reference.dozat_momentum(1.0, 0.0, t, b1=b1, momentum_decay=momentum_decay)
        g_weight = reference.dozat_momentum(0.0, 1.0, t, b1=b1, momentum_decay=momentum_decay)
        # 1e-12: the reference's product of 10,000 rounded factors.
        np.testing.assert_allclose(momentum, [m_weight, g_weight], rtol=1e-12)


@pytest.mark.parametrize("b2", [*B2, 0.5])
@pytest.mark.parametrize("traced", [False, True])
def test_the_length_of_the_moving_average_does_not_cancel(b2, traced):
    """RAdam's ρₜ in float32, where ρ∞ - 2t·b2ᵗ/(1-b2ᵗ) is 278 for ρ₄ = 4 at b2 = .99999."""
    dtype = jnp.dtype(jnp.float32)

    def length(b2, t):
        return _math.sma_length(_math.Decay.of(b2, dtype), t)

    for t in (1, 2, 4, 5, 6, 10, 100, 1000, 10_000):
        t32 = jnp.float32(t)
        value = jax.jit(length)(jnp.float32(b2), t32) if traced else length(b2, t32)
        expected = reference.sma_length(t, float(np.float32(b2)) if traced else b2)
        # 8 = 2/y at y = .25, where the closed form, which cancels, takes over; 8 ulps of it, and
        # 1e-5 for the series in 1-b2 that ends after five terms when b2 is traced.
        tolerance = 2e-5 if traced else 64 * 2**-24
        assert value == pytest.approx(expected, rel=tolerance)


def test_the_length_of_the_moving_average_has_four_terms_of_its_series():
    """In float64, by decimals of 50 digits: the next term is 2e-13 of t where the series ends."""
    with jax.enable_x64(True):
        decay = _math.Decay.of(0.999, jnp.dtype(jnp.float64))
        for t in (1, 10, 100, 200, 249):
            with decimal.localcontext(prec=50):
                b2, steps = decimal.Decimal("0.999"), decimal.Decimal(t)
                exact = 2 / (1 - b2) - 1 - 2 * steps * b2**t / (1 - b2**t)
            length = float(_math.sma_length(decay, jnp.float64(t)))
            # And the roundings of 2/(1-b2) and of 2/log b2, which are 2,000 each.
            assert length == pytest.approx(float(exact), abs=2e-12 + 2e-13 * t)


def test_the_length_of_the_moving_average_has_five_terms_in_a_traced_decay():
    """At t = 0 it is 2/d - 1 + 2/log(1-d) with d = 1-b2: Gregory's series of x/log(1+x) at -d."""
    numbers = [fractions.Fraction(1)]
    for n in range(1, 7):
        numbers.append(-sum(g * (-1) ** (n - k) / (n - k + 1) for k, g in enumerate(numbers)))
    assert numbers[2:4] == [fractions.Fraction(-1, 12), fractions.Fraction(1, 24)]
    with jax.enable_x64(True):
        b2 = jnp.float64(0.75)
        found = _math.sma_length(_math.Decay.of(b2, jnp.dtype(jnp.float64)), jnp.float64(0))
    expected = sum(2 * abs(numbers[n]) * fractions.Fraction(1, 4) ** (n - 1) for n in range(2, 7))
    # Ten roundings.
    assert float(found) == pytest.approx(float(expected), rel=1e-15)


@pytest.mark.parametrize("b2", [0.999, 0.9999, 0.99999])
def test_radam_starts_to_adapt_at_the_sixth_step(b2):
    """ρ₅ is just below 5 and ρ₆ just below 6: the first five steps are m̂, as in float64."""
    g = jnp.asarray([1.0, 1e-3], jnp.float32)
    tx = jadam.radam(1.0, b2=b2, eps=0.0)
    state, member = tx.init(g), reference.Member("radam", b2=b2, eps=0.0)
    for _ in range(8):
        updates, state = tx.update(g, state)
        # 1e-5: rₜ takes the root of (ρₜ-4)/(ρ∞-4), where ρₜ - 4 keeps 22 bits.
        np.testing.assert_allclose(-updates, member(g), rtol=1e-5)


def test_radam_adapts_at_the_threshold_itself():
    """Where ρₜ >= threshold, as Liu et al. write it: also at the very number."""
    decay, t = _math.Decay.of(0.999, jnp.dtype(jnp.float32)), jnp.float32(8)
    rho = float(_math.sma_length(decay, t))
    assert rho == pytest.approx(reference.sma_length(8, 0.999), rel=1e-6)  # some ulps
    tractable, r = _math.rectification(decay, t, rho)
    assert tractable
    # 1e-5: as above.
    assert r == pytest.approx(reference.rectification(8, 0.999), rel=1e-5)
    above = float(np.nextafter(np.float32(rho), np.float32(9)))
    tractable, r = _math.rectification(decay, t, above)
    assert not tractable
    assert r == 1


@pytest.mark.parametrize("case", **each_member)
def test_the_family_follows_float64(case):
    """Forty float32 steps of every member against the reference in float64."""
    rng = np.random.default_rng(3)
    gradients = spread(rng, 40 * 64).reshape(40, 64)
    params = jnp.asarray(rng.standard_normal(64), jnp.float32)
    tx = case(1.0)
    step = jax.jit(tx.update)
    state, member = tx.init(params), reference.Member(**{"kind": "adam", **case.reference})
    for g in gradients:
        updates, state = step(jnp.asarray(g), state, params)
        expected = -(member(g) + case.weight_decay * np.asarray(params, np.float64))
        # An update is a sum of 40 rounded terms that may cancel, so it is measured against the
        # step's size: 40 terms of 1 ulp, some doubled.
        np.testing.assert_allclose(updates, expected, rtol=5e-6, atol=5e-6)


def small_rates(make, kind, kernel, *, traced, **options):
    """That a member follows float64 with rates under ½ where a small gradient follows a large one.

    The rates are numbers of bfloat16: no rounding of them is in what is measured. Gradients are
    positive, so that no sum cancels.
    """
    gradients = np.array([1, 1e-5, 1e-3, 1e3, 1e-2, 1e-12], np.float32)[:, None] * np.ones(128)
    g = jnp.asarray(gradients, jnp.float32)

    def run(b1, b2):
        tx = make(1.0, b1=b1, b2=b2, kernel=kernel, **options)
        return jax.lax.scan(lambda state, g: tx.update(g, state)[::-1], tx.init(g[0]), g)[1]

    for b1, b2 in [(0, 0), (0, 2.0**-30), (2.0**-20, 0), (0.25, 0.375), (0.4375, 0.498046875)]:
        found = jax.jit(run)(b1, b2) if traced else jax.jit(functools.partial(run, b1, b2))()
        expected = reference.directions(gradients, kind=kind, b1=b1, b2=b2, **options)
        # A dozen roundings, each of half a unit.
        np.testing.assert_allclose(-found, list(expected), rtol=12 * 2.0**-24)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(
    ("make", "kind", "options"),
    [
        (jadam.adam, "adam", {}),
        (jadam.nadam, "nadam", {}),
        (jadam.amsgrad, "amsgrad", {}),
        (jadam.adamax, "adamax", {}),
        (jadam.ademamix, "ademamix", {"b3": 0.125, "alpha": 2.0}),
    ],
)
def test_small_rates_lose_no_small_gradient_after_a_large_one(make, kind, options, traced):
    """At b1 = b2 = 0 m is g and v is g²: v + (g² - v) has lost all of g² beside a large v."""
    small_rates(make, kind, "xla", traced=traced, **options)


def test_the_table_covers_the_family():
    """Every public member is in FAMILY, so that the tests over it hold for all of them."""
    members = {name for name in dir(jadam) if name.startswith(("ad", "ams", "nad", "rad"))}
    assert members == {case.make.__name__ for case in FAMILY}
