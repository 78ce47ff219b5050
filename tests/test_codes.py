"""The codes of 8-bit moments and 16-bit floats, bit for bit as they are defined, in XLA's form.

`make check-native` holds the kernel to the same; what is here holds without a compiler. The oracle
is NumPy in float64, from the text at the head of jadam/_storage/codes.py and the formulas of the
paper's moments.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jadam

B1, B2 = 0.9, 0.99
TOP, ZERO, NAN = 510, 0, 511


def dither(t, salt):
    """The Weyl sequence in [0, 1) at step t: golden ratio over time, plastic over 128 lanes."""
    lanes = np.arange(128, dtype=np.uint64) * int(2**32 / 1.3247179572447460) % 2**32
    phase = (t * int(2**32 / ((1 + 5**0.5) / 2)) + salt * 0x85EBCA6B) % 2**32
    return ((lanes + phase) % 2**32 >> np.uint64(8)) / 2.0**24


def curve(t):
    """a and s of m's curve r = a·x/(s - |x|): half of the codes for up to three times noise."""
    powers = np.sum((B1 * B1 / B2) ** np.arange(t, dtype=np.float64))
    bound = (1 - B1) / np.sqrt(1 - B2) * np.sqrt(powers)
    noise = np.sqrt((1 - B1) / (1 + B1) * (1 - B1 ** (2 * t)) / (1 - B2**t))
    a = 3 * noise
    return a, 1 + a / min(bound, 200 * noise)


def decoded(both, tops, t):
    """m and v of codes that were stored at step t."""
    code, x = both & 511, ((both >> 9).astype(int) - 64) / 63
    root = np.where(code == ZERO, 0, 2.0 ** ((code.astype(int) - TOP + tops.astype(int)) / 32))
    root = np.where(code == NAN, np.nan, root)
    if t == 0:
        return np.zeros(both.shape), root**2
    a, s = curve(t)
    return root * a * x / (s - np.abs(x)), root**2


def encoded(m, v, tops, g, t):
    """The codes after step t, as numbers before they are rounded down: v's level and m's."""
    with np.errstate(divide="ignore", invalid="ignore"):
        level = 32 * np.log2(np.sqrt(v)) + dither(t, 0)
        raised = np.floor(level) - tops + TOP
        code = np.where(raised >= 1, np.minimum(raised, TOP), g != 0)
        code = np.where(v == 0, ZERO, np.where(np.isfinite(v), code, NAN))
        a, s = curve(t)
        r = np.abs(m) / 2.0 ** ((code - TOP + tops) / 32)
        size = np.minimum(np.floor(63 * s * r / (a + r) + dither(t, 1)), 63)
    return code, np.copysign(size, m)


@functools.lru_cache
def gradients():
    """[60, 6, 128]: noise, constants, small ones beside a large one, dead and special ones."""
    rng = np.random.default_rng(0)
    g = rng.standard_normal((60, 6, 128))
    g[:, 1] = np.linspace(-3, 3, 128)
    g[:, 2] = 1e-7 * rng.standard_normal((60, 128))  # 23 octaves below: the lowest code while fed
    g[:, 2, 0] = 1.0
    g[30:, 2, 64:] = 0
    g[20:, 3, ::2] = 0
    g[5, 4, 3], g[9, 4, 5], g[9, 4, 6] = np.nan, np.inf, -np.inf
    g[:, 5] = 10.0 ** rng.uniform(-6, 6, (60, 128))
    return g.astype(np.float32)


def test_codes_are_those_of_their_definition():
    """60 steps, each from the state that was stored: v's code, m's code, and the block's top.

    Guards what feeds a code from zero, the dithers of both codes, code 0, NaN and infinite v, the
    ends of both codes, and both constants of m's curve. In 2 of 1,000 the level is so near to an
    integer that float32 falls to the other side: 2e-5 levels by polynomials of 3e-7.
    """
    update = jax.jit(functools.partial(jadam.update, b1=B1, b2=B2, kernel="xla"))
    state = jadam.init(jnp.zeros((6, 128)), mu_dtype="int8", nu_dtype="uint8", min_size=0)
    wrong = total = 0
    for t, g in enumerate(gradients(), 1):
        m, v = decoded(np.asarray(state.mu), np.asarray(state.nu), t - 1)
        finite = np.where(np.isfinite(g), np.abs(g).astype(np.float64), 0)
        largest = B2 * np.nanmax(v, -1) + (1 - B2) * finite.max(-1) ** 2
        _, state = update(jnp.asarray(g), state)
        both, tops = np.asarray(state.mu), np.asarray(state.nu)
        np.testing.assert_array_equal(tops[:, 0], np.floor(16 * np.log2(largest)) + 1)
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g.astype(np.float64) ** 2
        code, size = encoded(m, v, tops, g, t)
        found, found_m = both & 511, (both >> 9).astype(int) - 64
        np.testing.assert_array_equal(found == NAN, code == NAN)
        np.testing.assert_array_equal(found == ZERO, code == ZERO)
        number = (code != NAN) & (code != ZERO)
        apart = np.maximum(np.abs(found - code), np.abs(found_m - size))[number]
        assert apart.max() <= 1
        wrong, total = wrong + np.sum(apart > 0), total + apart.size
    assert wrong <= 2e-3 * total


def test_m_is_read_to_float32s_digits():
    """Every code of m, beside its definition. 1e-6: a reciprocal, the power, some roundings."""
    both = jnp.asarray((np.arange(128, dtype=np.uint16) << 9) + 300).reshape(1, 128)
    for t in (1, 3, 1000):
        state = jadam.init(jnp.zeros((1, 128)))._replace(
            count=jnp.int32(t), mu=both, nu=jnp.zeros((1, 1), jnp.int16)
        )
        found = jadam.moments(state, b1=B1, b2=B2)
        m, v = decoded(np.asarray(both), np.zeros((1, 1), int), t)
        is_code = np.abs(np.arange(128) - 64) <= 63
        np.testing.assert_allclose(found.mu[0, is_code], m[0, is_code], rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(found.nu, v, rtol=1e-6)


def test_a_slow_first_moment_of_a_constant_gradient_is_not_cut():
    """b1 = .9999: |m|/√v becomes 141 times that of noise, which the limit of 200 has.

    A limit of 50 would leave at most 50/141/(1-b1ᵗ), half of an update at step 12,000. So far out a
    code of m is three quarters of it, and the curve is convex: dithered, m comes out up to 1.5
    times too long. At b1 = .999, 45 times noise, it is right to 2%, half of v's code.
    """
    for b1, least, most in ((0.9999, 0.95, 1.6), (0.999, 0.98, 1.02)):
        state = jadam.init(jnp.zeros((1, 128)), mu_dtype="int8", nu_dtype="uint8", min_size=0)

        def step(state, _, b1=b1):
            g = jnp.ones((1, 128))
            updates, state = jadam.update(g, state, learning_rate=1.0, b1=b1, b2=0.99, kernel="xla")
            return state, -jnp.mean(updates)

        _, sizes = jax.jit(lambda s, step=step: jax.lax.scan(step, s, length=12_000))(state)
        assert least <= sizes[-1000:].mean() <= most


@pytest.mark.parametrize("kernel", ["xla", "auto"])
def test_16_bit_moments_are_rounded_by_dithers_of_their_own(kernel):
    """Each to the neighbour that its dither says: m's has the salt 0, v's 1.

    From the moments that were stored, in float64. In 2 of 1,000 float32 falls to the other side:
    the dither has 16 bits, and the moments an error of some 2⁻²⁴ of 2⁻⁸.
    """
    state = jadam.init(jnp.zeros((4, 128)), mu_dtype="bfloat16", nu_dtype="bfloat16")
    update = jax.jit(functools.partial(jadam.update, b1=B1, b2=B2, kernel=kernel))

    def rounded(x, t, salt):
        u = np.floor(dither(t, salt) * 2**16) / 2**16
        s = 2.0 ** (np.floor(np.log2(np.abs(x))) - 7)
        return np.copysign(np.floor(np.abs(x) / s + u) * s, x)

    m = v = np.zeros((4, 128))
    wrong = np.zeros(2)
    for t, g in enumerate(gradients()[:, 0:1] * np.ones((4, 1), np.float32), 1):
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g.astype(np.float64) ** 2
        _, state = update(jnp.asarray(g), state)
        found = [np.asarray(x, np.float64) for x in (state.mu, state.nu)]
        if t > 5:  # m is at its bound in the first steps, and cut there
            pairs = zip(found, (m, v), (0, 1), strict=True)
            wrong += [np.mean(x != rounded(y, t, salt)) for x, y, salt in pairs]
        m, v = found
    assert np.all(wrong / (len(gradients()) - 5) <= 2e-3)


@pytest.mark.parametrize("name", ["EIGHT_BITS", "FOUR_BITS"])
def test_a_maximum_on_the_lattice_stays_and_one_above_it_goes_up(name):
    """AMSGrad's maximum is rounded up: it never falls, and does not creep while it stays.

    A level is read from float32, so one that is a hundredth above a level counts as on it.
    """
    lattice = getattr(jadam._storage.lattice, name).in_parts
    levels = np.arange(-60 * lattice.per_octave, 60 * lattice.per_octave)

    def above(part):
        v = np.exp2(2 * (levels + part) / lattice.per_octave).astype(np.float32)
        return np.asarray(lattice.level_above(jnp.asarray(v), 2))

    # The logarithm and float32's own rounding are off by 1e-4 of a level at most.
    for part in (0, 0.0095, -0.0095, -0.98):
        np.testing.assert_array_equal(above(part), levels)
    for part in (0.0105, 0.5):
        np.testing.assert_array_equal(above(part), levels + 1)
    root = np.asarray(lattice.power_of_two(jnp.asarray(levels)), np.float64)
    again = np.asarray(lattice.level_above(jnp.asarray(root**2, jnp.float32), 2))
    np.testing.assert_array_equal(again, levels)
