"""What every storage of the moments keeps, for every member and at both ends of its range.

Finite gradients give finite numbers, no step is beyond the member's bound, a bad element poisons
itself alone, and AMSGrad's maximum does not fall.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import jadam
from jadam._members import ADAM
from jadam._storage import storage_of

STORAGES = {
    "float32": {},
    "bfloat16": {"mu_dtype": "bfloat16", "nu_dtype": "bfloat16"},
    "bfloat16 m": {"mu_dtype": "bfloat16"},
    "bfloat16 v": {"nu_dtype": "bfloat16"},
    "float16 m": {"mu_dtype": "float16"},
    "8 bits": {"mu_dtype": "int8", "nu_dtype": "uint8", "min_size": 0},
    "4 bits": {"mu_dtype": "int4", "nu_dtype": "uint4", "min_size": 0},
}
# XLA's form: what holds here holds without a compiler.
MEMBERS = {
    "adam": functools.partial(jadam.adam, kernel="xla"),
    "nadam": functools.partial(jadam.nadam, kernel="xla"),
    "amsgrad": jadam.amsgrad,
    "amsgrad_corrected": functools.partial(jadam.amsgrad, maximum="corrected"),
    "adamax": jadam.adamax,
    "radam": jadam.radam,
    "ademamix": jadam.ademamix,
}
STEPS = 160
# float32 rounds m and v by an ulp or two in each step, as in test_math.
SLACK = 1 + 1e-5


@functools.cache
def hostile() -> np.ndarray:
    """[steps, 8, 128]: jumps over 76 decades, zeros, constant rows, and the largest numbers."""
    rng = np.random.default_rng(0)
    shape = (STEPS, 8, 128)
    scale = (10.0 ** rng.uniform(-38, 38, (STEPS // 20, 8, 128))).repeat(20, 0)
    gradients = np.where(rng.random(shape) < 0.7, scale * rng.standard_normal(shape), 0)
    gradients[:, 0] = 10.0 ** np.linspace(-38, 38, 128)
    gradients[:, 1] = np.where(np.arange(STEPS) % 7, 0, 3e38)[:, None]
    # The sequence for which Adam's bound is attained at the last step.
    gradients[:, 2] = reference.extremal_gradients(STEPS)[:, None] * 10.0 ** np.linspace(-3, 3, 128)
    return np.clip(gradients, -3.4e38, 3.4e38).astype(np.float32)


def directions(tx, gradients):
    """Along gradients, with a learning rate of 1: the updates, and the last state."""

    def step(state, g):
        updates, state = tx.update(g, state, g)
        return state, updates

    state, updates = jax.jit(lambda: jax.lax.scan(step, tx.init(gradients[0]), gradients))()
    return np.asarray(updates), state


def bound(member: str, t: int) -> float:
    """The largest |direction| at eps = 0, or infinity where no short formula says it.

    AdaMax: |m| <= (1-b1)·Σ b1ᵏ·|g| and u >= b2ᵏ·|g|. AMSGrad divides by more than Adam.
    """
    if member == "adamax":
        return 0.1 / reference.bias(0.9, t) * np.sum((0.9 / 0.999) ** np.arange(t))
    return reference.step_bound(t) if member in ("adam", "amsgrad") else np.inf


@pytest.mark.usefixtures("either_compilation")
@pytest.mark.parametrize(
    ("member", "storage"),
    [
        *((member, kind) for member in MEMBERS for kind in ("float32", "bfloat16", "8 bits")),
        # One of two moments alone; float16's range, where m is used in a way of its own.
        *(("adam", "bfloat16 m"), ("adam", "bfloat16 v"), ("adam", "float16 m")),
        *(("nadam", "float16 m"), ("radam", "float16 m"), ("ademamix", "float16 m")),
    ],
)
def test_no_gradients_give_nan_or_a_step_beyond_the_bound(member, storage):
    """From 1e-38 to 3e38, without eps: rounding moments takes no step past Adam's own bound.

    RAdam's first steps are m̂ itself, which is as large as the gradients.
    """
    updates, state = directions(MEMBERS[member](1.0, eps=0.0, **STORAGES[storage]), hostile())
    assert np.all(np.isfinite(updates))
    assert all(np.all(np.isfinite(x.astype(float))) for x in jax.tree.leaves(state[0]))
    largest = np.abs(updates).max(axis=(1, 2))
    assert np.all(largest <= [bound(member, t) * SLACK for t in range(1, STEPS + 1)])
    if member == "adam":  # The test can fail: the bound is nearly attained.
        assert largest[-1] >= 0.97 * bound(member, STEPS)


def least_gradients(b2: float) -> np.ndarray:
    """[2, 1024]: those that attain the bound in the second step, from 1e-17 to 1e-13."""
    gradients = reference.extremal_gradients(2, b2=b2)[:, None] * np.geomspace(1e-17, 1e-13, 1024)
    return gradients.astype(np.float32)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("b2", [0.999, 0.9998, 0.9999, 0.99999])
def test_no_second_step_is_beyond_the_bound_down_to_the_least_root(b2):
    """An m in bfloat16 is held to v wherever the direction is divided by v's own root.

    That is from gradients of 3e-16 on, which are 1e-34 or 2e-35 in the first v.
    """
    tx = MEMBERS["adam"](1.0, b2=b2, eps=0.0, **STORAGES["bfloat16 m"])
    updates, _ = directions(tx, least_gradients(b2))
    largest = np.abs(updates).max(axis=1)
    bounds = [reference.step_bound(t, b2=b2) for t in (1, 2)]
    assert np.all(largest <= np.array(bounds) * SLACK)
    assert np.all(largest >= np.array(bounds) * 0.999)


@pytest.mark.usefixtures("either_compilation")
@pytest.mark.parametrize("storage", ["bfloat16", "8 bits"])
def test_a_bad_element_poisons_itself_alone(storage):
    """NaN and infinities stay where they are, for every member, also in the block's codes."""
    gradients = np.ones((6, 2, 128), np.float32)
    gradients[1, 0, 3], gradients[2, 1, 5] = np.nan, np.inf
    expected = np.zeros(gradients.shape, bool)
    expected[1:, 0, 3] = expected[2:, 1, 5] = True
    for member in ("amsgrad", "adamax", "ademamix"):
        updates, _ = directions(MEMBERS[member](1.0, **STORAGES[storage]), gradients)
        np.testing.assert_array_equal(~np.isfinite(updates), expected)


# Ranges


@pytest.mark.usefixtures("either_compilation")
@pytest.mark.parametrize("g", [1e-38, 1.2e-38, 5e-38, 1.1e-37, 1.2e-37, 1e-30, 1.0, 1e18])
def test_adamax_without_eps_divides_by_no_flushed_product(g):
    """c1·u of gradients under 1.2e-37 is flushed to 0: they count as 0, and never give NaN."""
    gradients = np.full((40, 3), g, np.float32)
    updates, _ = directions(jadam.adamax(1.0, eps=0.0), gradients)
    # (1-b1)·g under the smallest normal number, 1.18e-38, is 0 on a CPU. 1e-6: some ulps.
    if g < 1.18e-37:
        np.testing.assert_array_equal(updates, 0)
    elif g > 1e-36:
        np.testing.assert_allclose(updates, -1.0, rtol=1e-6)
    else:
        # The next ones wait for what is flushed of m.
        np.testing.assert_allclose(updates[0], -1.0, rtol=1e-6)
        assert np.all((updates <= 0) & (updates >= -1 - 1e-6))


@pytest.mark.usefixtures("either_compilation")
def test_adamax_is_finite_where_u_falls_faster_than_m():
    """b1 > b2: after 2⁶³ the exact quotient grows past float32's largest number."""
    gradients = np.zeros((300, 3), np.float32)
    gradients[0] = 2.0**63
    updates, _ = directions(jadam.adamax(1.0, b1=0.99, b2=0.5, eps=0.0), gradients)
    assert np.all(np.isfinite(updates))


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz"])
def test_8_bit_floats_are_refused(member, dtype):
    """They have neither the range nor the digits of a moment; the codes have both."""
    for name in ("mu_dtype", "nu_dtype"):
        with pytest.raises(
            TypeError, match=rf"{name}: expected at least 16 bits, .*'int8'.*{dtype}"
        ):
            MEMBERS[member](1.0, **{name: dtype})


@pytest.mark.parametrize("member", MEMBERS)
def test_a_second_moment_in_float16_is_refused(member):
    """It has the squares of gradients from 2.4e-4 to 256 alone, and most are smaller."""
    with pytest.raises(TypeError, match=r"nu_dtype: .* under 2.4e-04 or over 256 float16 has"):
        MEMBERS[member](1.0, nu_dtype="float16")


def test_a_state_from_elsewhere_with_such_a_moment_is_refused():
    """An optax state of float16 parameters: the leaf, the reason and what to call."""
    p = {"w": jnp.ones(3, jnp.float16)}
    state = jadam.init(p)._replace(nu={"w": jnp.ones(3, jnp.float16)})
    with pytest.raises(TypeError, match=r"state.nu\['w'\]: expected bfloat16 .*cast_like"):
        jadam.update(p, state)


@pytest.mark.usefixtures("either_compilation")
def test_a_first_moment_in_float16_has_the_range_of_float16_gradients():
    """Constant gradients from 1e-6 to 65504 and beyond move by one learning rate.

    A gradient of 1e6 counts as 65504, in m and in v. Tolerance: m keeps 11 bits, and under 6e-5,
    where float16's numbers are 6e-8 apart, one of them is that much of m.
    """
    sizes = np.array([1e-6, 1e-5, 1e-3, 1.0, 6e4, 1e6, 3e38], np.float32)
    updates, state = directions(
        jadam.adam(1.0, eps=0.0, mu_dtype="float16"), np.broadcast_to(sizes, (200, 7))
    )
    assert state[0].mu.dtype == jnp.float16
    tolerance = 2 * (2.0**-11 + 6e-8 / np.minimum(sizes, 6e4))
    assert np.all(np.abs(updates[100:] + 1) <= tolerance)
    m = np.minimum(sizes, 65504) * reference.bias(0.9, 200)
    assert np.all(np.abs(state[0].mu.astype(float) - m) <= tolerance * m)


@pytest.mark.usefixtures("either_compilation")
def test_float32_moments_of_float64_gradients_stay_finite(x64):
    """The storage has no squares of 1e25, which float64 has, nor of 1e-25."""
    p = jnp.ones(4, jnp.float32)
    state = jadam.init(p)
    largest = []
    for g in ([1e25, 1e-22, 1.0, 1e300], [1.0, 1e-30, 1.0, 1e-300]):
        updates, state = jadam.update(jnp.asarray(g), state, learning_rate=1.0, eps=0.0)
        largest.append(np.max(np.abs(updates)))
    assert np.all(np.isfinite(jnp.stack([state.mu, state.nu])))
    assert largest <= [reference.step_bound(t) * SLACK for t in (1, 2)]


@pytest.mark.usefixtures("either_compilation")
def test_complex64_moments_of_complex128_gradients_follow_float64(x64):
    """A moment in fewer bits than the step has keeps its value where it is in bounds.

    Beside Adam in NumPy's complex128. 1e-5: float32's roundings of m and v in 50 steps.
    """
    rng = np.random.default_rng(0)
    gradients = rng.standard_normal((50, 6)) + 1j * rng.standard_normal((50, 6))
    state = jadam.init(jnp.zeros(6, jnp.complex64))
    update = jax.jit(functools.partial(jadam.update, learning_rate=1.0))
    for g, direction in zip(gradients, reference.directions(gradients), strict=True):
        updates, state = update(jnp.asarray(g), state)
        np.testing.assert_allclose(updates, -direction, rtol=1e-5, atol=1e-5)
    assert (updates.dtype, state.mu.dtype) == (jnp.complex128, jnp.complex64)


@pytest.mark.usefixtures("quick_compilation")
def test_complex64_moments_of_complex128_gradients_stay_within_their_bound(x64):
    """|m| is at most (1-b1)/√(1-b2)·√v, which the first step attains, as it is stored.

    2⁻²⁴ of |m|: the last rounding of its two parts. 2⁻²²: this, v's rounding and the way back from
    the bound.
    """
    rng = np.random.default_rng(0)
    g = rng.standard_normal(4000) + 1j * rng.standard_normal(4000)
    _, state = jadam.update(jnp.asarray(g), jadam.init(jnp.zeros(4000, jnp.complex64)))
    m, v = np.asarray(state.mu, np.complex128), np.asarray(state.nu, np.float64)
    np.testing.assert_allclose(m, 0.1 * g, rtol=2.0**-22)
    assert np.all(np.abs(m) <= 0.1 / np.sqrt(0.001) * np.sqrt(v) * (1 + 2.0**-24 + 1e-12))
    # m = g, v = |g|²/4 and a bound of 2·√v, without a rounding.
    at_bound, start = jnp.asarray([3 + 4j]), jadam.init(jnp.zeros(1, jnp.complex64))
    _, state = jadam.update(at_bound, start, b1=0.0, b2=0.75)
    assert state.mu[0] == 3 + 4j


@pytest.mark.usefixtures("quick_compilation")
def test_gradients_through_complex64_moments_are_finite(x64):
    """Through two steps, the second from what the first has stored: also of zeros."""

    def moved(g):
        _, state = jadam.update(g, jadam.init(jnp.zeros(3, jnp.complex64)))
        updates, _ = jadam.update(g, state, learning_rate=1.0)
        return jnp.sum(updates.real)

    slope = jax.jit(jax.grad(moved))(jnp.asarray([0, 1 - 2j, 1e-3j]))
    assert np.all(np.isfinite(slope))


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("mu_dtype", "nu_dtype", "largest"),
    [("float32", "float64", 1e36), ("float64", "float32", 1e15)],
)
def test_a_moment_wider_than_the_other_keeps_its_digits_at_its_bound(
    x64, mu_dtype, nu_dtype, largest
):
    """The first step attains (1-b1)/√(1-b2)·√v, for gradients of all sizes that both have.

    2⁻²³: a moment in float32 is rounded, and m cut to v and rounded again. 2⁻²⁴: only the latter.
    """
    g = np.geomspace(1 / largest, largest, 2001) * np.resize([1, -1], 2001)
    state = jadam.init(jnp.asarray(g), mu_dtype=mu_dtype, nu_dtype=nu_dtype)
    _, state = jadam.update(jnp.asarray(g), state)
    assert (state.mu.dtype, state.nu.dtype) == (mu_dtype, nu_dtype)
    m, v = (np.asarray(x, np.float64) for x in (state.mu, state.nu))
    np.testing.assert_allclose(m, 0.1 * g, rtol=2.0**-23)
    rounding = 2.0**-24 if mu_dtype == "float32" else 0
    assert np.all(np.abs(m) <= 0.1 / np.sqrt(0.001) * np.sqrt(v) * (1 + rounding + 1e-12))


def test_a_storage_is_called_by_its_dtypes():
    """As a kernel declares which it has; whatever it has not goes to XLA, right and slower."""
    names = {}
    for name, options in STORAGES.items():
        _, *stored = MEMBERS["adam"](1.0, **options).init(jnp.ones((2, 128)))[0]
        names[name] = storage_of(ADAM.moments, stored).name
    assert names == {
        "float32": "float32 float32",
        "bfloat16": "bfloat16 bfloat16",
        "bfloat16 m": "bfloat16 float32",
        "bfloat16 v": "float32 bfloat16",
        "float16 m": "float16 float32",
        "8 bits": "8-bit codes",
        "4 bits": "4-bit codes",
    }


@pytest.mark.usefixtures("quick_compilation")
def test_a_first_moment_lives_where_v_has_lost_its_squares():
    """(1-b2)·g² is under float32's numbers, so v stays 0, and does not say that m should.

    At b1 = 0.998, in the mean over the lanes to one bfloat16, 2⁻⁷ of m: the dithers of 2,000 steps
    do not cancel wholly.
    """
    gradients = np.full((2000, 128), 3.4e-18, np.float32)
    _, (state, *_) = directions(MEMBERS["adam"](1.0, b1=0.998, **STORAGES["bfloat16 m"]), gradients)
    np.testing.assert_array_equal(state.nu, 0)
    expected = reference.bias(0.998, 2000) * 3.4e-18
    assert np.mean(state.mu.astype(float)) == pytest.approx(expected, rel=2.0**-7, abs=0)


@pytest.mark.usefixtures("quick_compilation")
def test_a_first_moment_may_be_rounded_up_to_its_bound():
    """b1 = 0 and b2 = ¾: m = g and |m| <= 2·√v, here the bfloat16 above g.

    So m is g in the mean over the lanes, whose dithers are even to 8/128 of the two's distance.
    """
    above = 1 + 2.0**-7
    g = 1 + 2.0**-8
    v = np.float32((above**2 - g**2) / 3)  # ¾·v + ¼·g² is ¼·above²
    state = jadam.init(jnp.zeros(128), mu_dtype="bfloat16")._replace(nu=jnp.full(128, v))
    grads = jnp.full(128, g, jnp.float32)
    _, state = jadam.update(grads, state, b1=0.0, b2=0.75, kernel="xla")
    assert set(np.asarray(state.mu, np.float64)) == {1.0, above}
    assert abs(np.mean(np.asarray(state.mu, np.float64)) - g) <= 8 / 128 * 2.0**-7


@pytest.mark.usefixtures("either_compilation")
def test_a_first_moment_in_float16_stays_within_what_a_warm_up_allows():
    """AdEMAMix's slow moment of gradients under float16's numbers is not made large by rounding.

    6e-8, the smallest of float16, beside a root of 1e-8 was a step of 11 times the bound. While b3
    grows no bound has a formula: it is kept to a unit in float16's last place, 2⁻¹⁰, over what
    constant gradients give. 1e-5: float32's roundings of 100 steps.
    """
    gradients = np.tile(np.geomspace(1e-9, 1e-6, 128, dtype=np.float32), (100, 1))
    tx = jadam.ademamix(1.0, eps=0.0, warmup=40, b3=0.999, mu_dtype="float16")
    updates, (state, *_) = directions(tx, gradients)
    bounds = reference.ademamix_bounds(100, warmup=40, b3=0.999)
    assert np.all(np.abs(updates).max(axis=1) <= bounds * (1 + 2.0**-10 + 1e-5))
    member = reference.Member("ademamix", warmup=40, b3=0.999)
    for g in gradients:
        member(g)
    assert np.all(np.asarray(state.mu_slow, np.float64) <= member.slow * (1 + 2.0**-10 + 1e-5))


@pytest.mark.usefixtures("quick_compilation")
def test_a_slow_moment_in_bfloat16_goes_on_moving_in_a_warm_up():
    """A step is a thousandth of it, where a bfloat16 is a hundredth: in the mean it is float64's.

    1e-3: over 128 lanes the dithers of one step are even to 8/128 of a bfloat16, which is up to
    2⁻⁷ of m; those of many steps cancel.
    """
    gradients = np.ones((1000, 128), np.float32)
    _, (state, *_) = directions(jadam.ademamix(1.0, warmup=500, mu_dtype="bfloat16"), gradients)
    member = reference.Member("ademamix", warmup=500)
    for _ in gradients:
        member(1.0)
    assert np.mean(state.mu_slow.astype(float)) == pytest.approx(member.slow, rel=1e-3)


# AMSGrad's maximum


def maxima(state):
    """√v_max of an 8-bit state as its definition says: levels of 1/32 octave below the top."""
    code = np.asarray(state.mu & np.uint16(511)).astype(int)
    level = code - 510 + np.repeat(np.asarray(state.nu).astype(int), 128, axis=-1)
    return np.where(code == 0, 0.0, 2.0 ** ((level + np.asarray(state.nu_max).astype(int)) / 32))


@pytest.mark.usefixtures("either_compilation")
@pytest.mark.parametrize(
    ("maximum", "b2"),
    [
        ("raw", 0.999),
        ("corrected", 0.99),
        pytest.param("raw", 0.99, marks=pytest.mark.soak),
        pytest.param("corrected", 0.999, marks=pytest.mark.soak),
    ],
)
def test_amsgrads_maximum_never_falls_in_8_bits(maximum, b2):
    """Gradients fall by six decades, or to 0, beside a neighbour that stays or falls too.

    Against v in float64: after each step the stored maximum is at least the largest so far.
    """
    steps = 3000
    tx = jadam.amsgrad(1.0, b2=b2, maximum=maximum, **STORAGES["8 bits"])
    gradients = np.full((steps, 3, 128), 1e-6, np.float32)
    gradients[:50] = 1.0
    gradients[:50, 1] = 1e-3
    gradients[50:, 1] = 0
    gradients[:, 2, 0] = 1e4  # its block's range ends 16 octaves below
    gradients[:50, 2, 1:] = 1e-4
    gradients[50:, 2, 1:] = 0

    def step(state, g):
        updates, state = tx.update(g, state)
        return state, (updates, state[0])

    _, (updates, states) = jax.jit(lambda: jax.lax.scan(step, tx.init(gradients[0]), gradients))()
    stored = np.stack(
        [maxima(jax.tree.map(lambda x, t=t: x[t], states)) for t in range(0, steps, 50)]
    )
    assert np.all(stored[1:] >= stored[:-1])
    v = exact = np.zeros((3, 128))
    for t, g in enumerate(gradients.astype(np.float64), 1):
        v = b2 * v + (1 - b2) * g * g
        exact = np.maximum(exact, v / (reference.bias(b2, t) if maximum == "corrected" else 1))
    # A code is 2.2% of the root. v in codes is off by one or two while it grows, and its maximum
    # is rounded up by at most one more.
    ratio = stored[-1] / np.sqrt(exact)
    assert np.all((ratio[:2] > 0.978**2) & (ratio[:2] < 1.022**3))
    assert np.all(ratio[2] > 0.978**2)  # on the lowest code of its block
    # In float32 it is 1e-6/√v_max, 4.5e-6 and less. Were the maximum to fall, it would be 4e-3.
    assert np.abs(updates[-1, 0]).max() < 1e-4


@pytest.mark.usefixtures("either_compilation")
def test_amsgrads_maximum_stays_where_no_gradient_comes():
    """A number on the lattice is rounded up to itself, on every level of twelve octaves.

    Were its own rounding to take it to the next level, it would rise by 2.2% a step, wherever the
    powers and logarithms of float32 are a little too large.
    """
    gradients = np.zeros((200, 3, 128), np.float32)
    gradients[0] = 2.0 ** (np.arange(128) / 32 + np.array([[0], [55], [-45]]))
    tx = jadam.amsgrad(1.0, **STORAGES["8 bits"])

    def step(state, g):
        _, state = tx.update(g, state)
        return state, state[0]

    _, states = jax.jit(lambda: jax.lax.scan(step, tx.init(gradients[0]), gradients))()
    found = [maxima(jax.tree.map(lambda x, t=t: x[t], states)) for t in (0, 1, 50, 199)]
    for later in found[1:]:
        np.testing.assert_array_equal(later, found[0])


def test_amsgrads_maximum_outlives_v():
    """Where v has died of old age in the whole block, its maximum still says what it was."""
    gradients = np.zeros((40, 128), np.float32)
    gradients[0] = 2e-18 * 2.0 ** (np.arange(128) % 4)
    tx = jadam.amsgrad(1.0, b2=0.5, **STORAGES["8 bits"])

    def step(state, g):
        _, state = tx.update(g, state)
        return state, state[0]

    state, states = jax.jit(lambda: jax.lax.scan(step, tx.init(gradients[0]), gradients))()
    assert not np.any(np.asarray(jadam.moments(state)[1]))
    first, last = (maxima(jax.tree.map(lambda x, t=t: x[t], states)) for t in (0, -1))
    # A level is 2.2% of the root; a maximum is rounded up.
    np.testing.assert_allclose(last, 0.5**0.5 * gradients[0].astype(np.float64), rtol=0.023)
    np.testing.assert_array_equal(first, last)


@pytest.mark.usefixtures("either_compilation")
def test_amsgrads_maximum_never_falls_in_bfloat16():
    """It is rounded up: at least the largest v that was computed, from the v that was stored.

    In NumPy from the stored v of each step. 1e-6: v's own rounding and its dither in float32.
    """
    tx = jadam.amsgrad(1.0, mu_dtype="bfloat16", nu_dtype="bfloat16")
    gradients = np.full((300, 128), 0.01, np.float32)
    gradients[:60] = 1 + np.linspace(0, 0.3, 128)

    def step(state, g):
        _, state = tx.update(g, state)
        return state, (state[0].nu, state[0].nu_max)

    trajectory = jax.jit(lambda: jax.lax.scan(step, tx.init(gradients[0]), gradients)[1])()
    v, largest = (np.asarray(x, np.float64) for x in trajectory)
    before = np.concatenate([np.zeros((1, 128)), v[:-1]])
    computed = 0.999 * before + 0.001 * gradients.astype(np.float64) ** 2
    assert np.all(largest[1:] >= largest[:-1])
    assert np.all(largest >= computed * (1 - 1e-6))
    # Rounded up by at most one bfloat16, 2⁻⁷ of it, from the largest of all.
    assert np.all(largest <= np.maximum.accumulate(computed) * (1 + 2.0**-7 + 1e-6))


# Denominators that are 0 in the limit


@pytest.mark.usefixtures("either_compilation")
@pytest.mark.parametrize("b2", [0.6, 0.6 - 1e-9])
def test_radam_at_the_end_of_what_it_is_defined_for(b2):
    """b2 = 0.6 gives ρ∞ = 4, for which the paper has no variance: m̂ alone, and never NaN.

    A little below ρₜ is rounded up to 4.
    """
    gradients = np.full((120, 3), 0.5, np.float32)
    updates, _ = directions(jadam.radam(1.0, b2=b2, threshold=4.0), gradients)
    np.testing.assert_allclose(updates, -0.5, rtol=1e-6)  # some ulps


@pytest.mark.usefixtures("either_compilation")
def test_ademamix_warms_up_to_b1_itself():
    """b3 = b1 leaves the half-life as it is: in 8 bits the update of constant gradients is exact.

    After 200 steps both averages are the gradient, 1 + alpha in all. 5%: a code of m is 3%, and one
    of √v 2.2%.
    """
    tx = jadam.ademamix(1.0, b3=0.9, warmup=10, **STORAGES["8 bits"])
    updates, _ = directions(tx, np.full((200, 64), 0.5, np.float32))
    assert np.mean(updates[-50:]) == pytest.approx(-6, rel=0.05)
