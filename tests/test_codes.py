"""The codes of 8-bit and 4-bit moments and 16-bit floats, as they are defined, in XLA's form.

`make check-native` holds the kernel to the same; what is here holds without a compiler. The oracle
is NumPy in float64, from the text at the head of jadam/_storage/codes.py and the formulas of the
paper's moments.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jadam

B1, B2, B3 = 0.9, 0.99, 0.9999
ZERO = 0


@dataclass(frozen=True)
class Kind:
    """What a storage in codes is: levels of √v, codes of m, where half of these lie."""

    options: dict[str, Any]
    per_octave: int
    top: int
    sizes: int
    dense: float
    parts: int

    @property
    def nan(self):
        return self.top + 1

    def split(self, both):
        """v's code and m's: bits of 16, or digits to the base 21 of a byte."""
        both = np.asarray(both).astype(int)
        if self.sizes == 63:
            return both & 511, (both >> 9) - 64
        code = -(-both // 21)
        return code, both - 21 * code + 10

    def rounded(self, level, u):
        """An octave is rounded so that the mean of v^¼ stays, a part of one as it is."""
        if self.per_octave > 1:
            return np.floor(level + u)
        lower = np.floor(level)
        part = np.where(np.isfinite(level), level - lower, 0)
        return lower + np.floor((2 ** (part / 2) - 1) / (2**0.5 - 1) + u)


EIGHT = Kind({"mu_dtype": "int8", "nu_dtype": "uint8", "min_size": 0}, 32, 510, 63, 3.0, 1)
FOUR = Kind({"mu_dtype": "int4", "nu_dtype": "uint4", "min_size": 0}, 1, 12, 10, 2.0, 16)
KINDS = {"8 bits": EIGHT, "4 bits": FOUR}


def dither(t, salt, step=(5**0.5 - 1) / 2):
    """The Weyl sequence in [0, 1) at step t: golden ratio over time, plastic over 128 lanes."""
    lanes = np.arange(128, dtype=np.uint64) * int(2**32 / 1.3247179572447460) % 2**32
    phase = (t * int(2**32 * step) + salt * 0x85EBCA6B) % 2**32
    return ((lanes + phase) % 2**32 >> np.uint64(8)) / 2.0**24


@dataclass(frozen=True)
class Curve:
    """r = a·x/(s - |x|) up to a limit: half of the codes for up to `dense` times the noise."""

    noise: float
    limit: float
    dense: float

    @property
    def a(self):
        return self.dense * self.noise

    @property
    def s(self):
        return 1 + self.a / self.limit

    def expand(self, x):
        return self.a * x / (self.s - np.abs(x))

    def compress(self, r, u, levels, unbiased):
        """The code, rounded so that the mean of x stays, or that of r."""
        y = levels * self.s * np.abs(r) / (self.a + np.abs(r))
        below, above = np.floor(y), np.minimum(np.floor(y) + 1, levels)
        if unbiased:
            low, high = (self.expand(k / levels) for k in (below, above))
            y = below + np.where(above > below, (np.abs(r) - low) / (high - low), 0)
        return np.copysign(np.minimum(np.floor(y + u), levels), r)


@dataclass(frozen=True)
class Case:
    """A member: its equations in float64, and how large its first moments are beside √v."""

    name: str
    make: Callable[..., optax.GradientTransformation]
    options: dict[str, Any] = field(default_factory=dict)
    b1: float = B1
    b2: float = B2

    def __str__(self):
        return self.name

    @property
    def power(self):
        return 1 if self.name == "adamax" else 2

    @property
    def has_maximum(self):
        return self.name.startswith("amsgrad")

    def transformation(self, **options):
        rates = {"b1": self.b1, "b2": self.b2}
        return self.make(1e-3, **rates, **self.options, **options)

    def curves(self, t, dense):
        """Of m, and of a slow average."""
        b1, b2, b3, power = self.b1, self.b2, B3, self.power
        c2 = 1 - b2**t if power == 2 else 9  # the largest of many is three times the mean square

        def noise(b):
            return np.sqrt((1 - b) / (1 + b) * (1 - b ** (2 * t)))

        def bound(b):
            powers = np.sum((b**power / b2) ** np.arange(t, dtype=np.float64))
            return (1 - b) * (np.sqrt(powers / (1 - b2)) if power == 2 else powers)

        root = np.sqrt(c2)
        found = [Curve(noise(b1) / root, min(bound(b1), 200 * noise(b1) / root), dense)]
        if self.name == "ademamix":
            weight = 1 - b3**t
            of_slow = max(noise(b3), weight / np.sqrt(t)) / root
            found.append(Curve(of_slow, min(bound(b3), 4 * weight / root), dense))
        return found

    def moments(self, g, t, m, v, *further):
        """After step t with gradient g."""
        g, c2 = g.astype(np.float64), 1 - self.b2**t
        m = self.b1 * m + (1 - self.b1) * g
        if self.power == 1:
            return m, np.maximum(self.b2 * v, np.abs(g))
        v = self.b2 * v + (1 - self.b2) * g * g
        v = np.where(v < 2.0**-126, 0, v)
        if self.name == "ademamix":
            return m, v, B3 * further[0] + (1 - B3) * g
        corrected = self.name == "amsgrad_corrected"
        return m, v, *(np.maximum(x, v / c2 if corrected else v) for x in further)


CASES = [
    Case("adam", jadam.adam),
    # √v falls by 15 octaves a step, past what a byte says of its maximum, and past float32's end.
    Case("amsgrad", jadam.amsgrad, b1=2.0**-16, b2=2.0**-30),
    # The first maxima are 1e5 times v.
    Case("amsgrad_corrected", jadam.amsgrad, {"maximum": "corrected"}, b2=0.99999),
    Case("adamax", jadam.adamax, {"eps": 0.0}),
    Case("ademamix", jadam.ademamix),
]


def decoded(case, kind, stored, t):
    """The moments of codes that were stored at step t."""
    code, size = kind.split(stored[0])
    level = code - kind.top + np.asarray(stored[1]).astype(int)

    def root(octaves):
        return np.where(code == ZERO, 0, np.where(code == kind.nan, np.nan, 2.0**octaves))

    curves = case.curves(max(t, 1), kind.dense)
    m = root(level / kind.per_octave) * curves[0].expand(np.clip(size / kind.sizes, -1, 1))
    found = [m, root(level / kind.per_octave) ** case.power]
    for x in (np.asarray(x).astype(int) for x in stored[2:]):
        if case.name == "ademamix":
            found.append(root(level / kind.per_octave) * curves[1].expand(x / 127))
        else:
            octaves = (level * kind.parts + x) / (kind.per_octave * kind.parts)
            found.append(root(octaves) ** case.power)
    return found


def level_of(case, per_octave, x):
    return per_octave / case.power * np.log2(x)


def check_tops(case, kind, tops, largest, shift=0.0):
    """The level above the largest root, or the least from which a byte reaches its maximum.

    What lies on a level is read from float32, to either side of it: 1e-4 of a level.
    """
    v, *maxima = largest[1:] if case.has_maximum else largest[1:2]
    dead = np.max([v, *maxima], 0) == 0
    for sign, within in ((-1, np.less_equal), (1, np.greater_equal)):
        wanted = np.floor(level_of(case, kind.per_octave, v) + shift + sign * 1e-4) + 1
        for x in maxima:
            above = np.floor(level_of(case, kind.per_octave * kind.parts, x) + sign * 1e-4) + 1
            wanted = np.maximum(wanted, np.ceil((above - 255) / kind.parts))
        assert np.all(within(np.where(dead, 0, wanted), tops[:, 0]))


def check_codes(case, kind, stored, moments, fed, t, dithers):
    """The codes of moments below the tops that are stored.

    In 1 of 1,000 the level is so near to an integer that float32 falls to the other side: 2e-5
    levels by polynomials of 3e-7, and 4e-4 in the chance of an octave.
    """
    m, v, *further = moments
    curves = case.curves(t, kind.dense)
    found, size = kind.split(stored[0])
    tops = np.asarray(stored[1]).astype(int)
    level = level_of(case, kind.per_octave, v)
    wanted, alive = kind.rounded(level, dithers[0]), v > 0
    if case.name == "ademamix":  # upwards, where the slow average would be cut
        needs = np.abs(further[0]) > curves[1].limit * 2.0 ** (wanted / kind.per_octave)
        wanted = np.where(needs, np.ceil(level), wanted)
    if case.has_maximum:
        above = np.ceil(level_of(case, kind.per_octave * kind.parts, further[0]) - 0.01)
        wanted = np.maximum(wanted, np.ceil((above - 255) / kind.parts))
        fed, alive = fed | (further[0] > 0), alive | (further[0] > 0)
    code = np.maximum(np.minimum(wanted - tops + kind.top, kind.top), fed)
    code = np.where(np.isfinite(v), np.where(alive, code, ZERO), kind.nan)
    np.testing.assert_array_equal(found == kind.nan, code == kind.nan)
    np.testing.assert_array_equal(found == ZERO, code == ZERO)
    level = found - kind.top + tops
    r = m / 2.0 ** (level / kind.per_octave)
    pairs = [(found, code), (size, curves[0].compress(r, dithers[1], kind.sizes, kind is FOUR))]
    for x, y in zip(further, stored[2:], strict=True):
        if case.has_maximum:
            wanted = np.clip(above - kind.parts * level, 0, 255)
        else:
            r = x / 2.0 ** (level / kind.per_octave)
            wanted = curves[1].compress(r, dithers[2], 127, unbiased=False)
        pairs.append((np.asarray(y).astype(int), wanted))
    number = (code != kind.nan) & (code != ZERO)
    apart = np.max([np.abs(x - y)[number] for x, y in pairs], axis=0)
    assert apart.max() <= 1
    return np.sum(apart > 0), apart.size


@functools.lru_cache
def gradients():
    """[60, 8, 128]: noise, constants, small ones beside a large one, dead and special ones."""
    rng = np.random.default_rng(0)
    g = rng.standard_normal((60, 8, 128))
    g[:, 1] = np.linspace(-3, 3, 128)
    g[:, 2] = 1e-7 * rng.standard_normal((60, 128))  # 23 octaves below: the lowest code while fed
    g[:, 2, 0] = 1.0
    g[30:, 2, 64:] = 0
    g[20:, 3, ::2] = 0
    g[5, 4, 3], g[9, 4, 5], g[9, 4, 6] = np.nan, np.inf, -np.inf
    g[40:, 4] *= 1e-9
    g[:, 5] = 10.0 ** rng.uniform(-6, 6, (60, 128))
    g[8:10, 6] = 1
    g[8, 6, 0], g[9, 6, 0] = 32.0, 0.0  # the block's largest maximum, beside its smallest v
    g[10:, 6] = 0
    g[:, 7] = 0
    g[30:, 7] = 1e-30  # its square is under float32's smallest number
    return g.astype(np.float32)


each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_kind = pytest.mark.parametrize("bits", KINDS)


def in_blocks(stored):
    """A block a row, its top beside it."""
    return [np.asarray(x).reshape(8, -1) for x in stored]


@pytest.mark.usefixtures("quick_compilation")
@each_kind
@each_case
@np.errstate(divide="ignore", invalid="ignore")
def test_codes_are_those_of_their_definition(case, bits):
    """60 steps, each from the state that was stored: every code, and the block's top.

    Guards what feeds a code from zero, the dithers, code 0, NaN and infinite v, the ends of the
    codes, the constants of the curves, and how far a maximum is from its v.
    """
    kind = KINDS[bits]
    tx = case.transformation(kernel="xla", **kind.options)
    params = jnp.zeros((2, 2, 256))
    state, update = tx.init(params), jax.jit(tx.update)
    wrong = total = 0
    for t, g in enumerate(gradients(), 1):
        before = decoded(case, kind, in_blocks(state[0][1:]), t - 1)
        _, state = update(jnp.asarray(g.reshape(2, 2, 256)), state, params)
        stored = in_blocks(state[0][1:])
        finite = np.where(np.isfinite(g), np.abs(g), 0).max(-1)
        largest = case.moments(finite, t, *(np.nanmax(np.abs(x), -1) for x in before))
        check_tops(case, kind, stored[1], largest)
        moments = case.moments(g, t, *before)
        dithers = dither(t, 0), dither(t, 1), dither(t, 2, 2**0.5 - 1)
        off, of = check_codes(case, kind, stored, moments, g != 0, t, dithers)
        wrong, total = wrong + off, total + of
    assert wrong <= 1e-3 * total


@pytest.mark.usefixtures("quick_compilation")
@each_kind
@each_case
@np.errstate(divide="ignore", invalid="ignore")
def test_moments_from_elsewhere_have_the_codes_nearest_to_them(case, bits):
    """The same rounding with a dither of ½, and for a block's top the level nearest to its largest.

    No second moment but 0 becomes 0: what is below the block's range has its lowest level.
    """
    kind, steps = KINDS[bits], 25
    g = np.where(np.isinf(gradients()), np.nan, gradients())
    moments = [np.zeros((8, 128))] * (2 if case.name in ("adam", "adamax") else 3)
    for t in range(1, steps + 1):
        moments = case.moments(g[t - 1], t, *moments)
    moments = [x.astype(np.float32) for x in moments]
    params = jnp.zeros((2, 4, 128))
    state, like = (
        jax.eval_shape(case.transformation(**options).init, params)[0]
        for options in ({}, kind.options)
    )
    state = type(state)(jnp.int32(steps), *(jnp.asarray(x.reshape(2, 4, 128)) for x in moments))
    rates = {"b3": B3} if case.name == "ademamix" else {"adamax": case.name == "adamax"}
    codes = jadam.migrate.cast_like(state, like, b1=case.b1, b2=case.b2, **rates)
    stored = in_blocks(codes[1:])
    moments = [x.astype(np.float64) for x in moments]
    largest = [np.nanmax(np.abs(x), -1) for x in moments]
    check_tops(case, kind, stored[1], largest, shift=-0.5)
    off, of = check_codes(case, kind, stored, moments, moments[1] != 0, steps, [0.5] * 3)
    assert off <= 1e-3 * of


@pytest.mark.usefixtures("quick_compilation")
def test_v_is_rounded_up_where_the_slow_average_needs_it():
    """At its limit it does not yet: a hundredth more does, and the upper level holds it.

    After one step with b3 = ½ and b2 = ¾ the limit is (1-b3)/√(1-b2) = 1, exactly.
    """
    tx, params = jadam.ademamix(1e-3, b2=0.75, b3=0.5), jnp.zeros((1, 128))
    state = jax.eval_shape(tx.init, params)[0]
    like = jax.eval_shape(jadam.ademamix(1e-3, **EIGHT.options).init, params)[0]
    # A quarter of a level above 1, and a larger one, under whose level all others are.
    v = jnp.full((1, 128), 2.0 ** (2 * 0.25 / 32)).at[0, 0].set(4.0)
    slow = jnp.where(jnp.arange(128) < 64, 1.0, 1.01)[None]
    state = type(state)(jnp.int32(1), mu=jnp.zeros((1, 128)), nu=v, mu_slow=slow)
    codes = jadam.migrate.cast_like(state, like, b2=0.75, b3=0.5)
    level = EIGHT.split(codes.mu)[0] - EIGHT.top + np.asarray(codes.nu)
    np.testing.assert_array_equal(level[0, 1:], np.arange(1, 128) >= 64)


@each_kind
def test_m_is_read_to_float32s_digits(bits):
    """Every code of m, beside its definition. 1e-6: a reciprocal, the power, some roundings.

    In 4 bits v is a power of two, to the last bit.
    """
    kind, case = KINDS[bits], CASES[0]
    both = np.arange(253, dtype=np.uint8)
    if kind is EIGHT:
        both = ((np.arange(1, 128) << 9) + 300).astype(np.uint16)
    tops = jnp.zeros((1, -(-both.size // 128)), jnp.int16)
    for t in (1, 3, 1000):
        state = jadam.init(jnp.zeros((1, both.size)))._replace(
            count=jnp.int32(t), mu=jnp.asarray(both)[None], nu=tops
        )
        found = jadam.moments(state, b1=B1, b2=B2)
        m, v = decoded(case, kind, (both, 0), t)
        np.testing.assert_allclose(found.mu[0], m, rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(found.nu[0], v, rtol=0 if kind is FOUR else 1e-6)


@each_kind
def test_powers_and_logarithms_have_float32s_digits(bits):
    """To 2e-7 and 3e-7 of an octave, the polynomials' own error and float32's roundings."""
    kind = KINDS[bits]
    lattice = jadam._storage.lattice.LATTICES[kind is FOUR].in_parts
    x = np.linspace(1, 2, 10_001, dtype=np.float32)[:-1]
    for power in (1, 2):
        octaves = np.asarray(lattice.level(jnp.asarray(x), power)) / lattice.per_octave
        assert np.max(np.abs(octaves - np.log2(x.astype(np.float64)) / power)) <= 3e-7
    levels = np.arange(-100 * lattice.per_octave, 100 * lattice.per_octave)
    found = np.asarray(lattice.power_of_two(jnp.asarray(levels)), np.float64)
    np.testing.assert_allclose(found, 2.0 ** (levels / lattice.per_octave), rtol=2e-7)


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


@pytest.mark.parametrize("kernel", ["xla", "auto"])
@pytest.mark.parametrize("bits", KINDS)
def test_a_block_whose_largest_v_is_on_the_lowest_level_keeps_it(bits, kernel):
    """As where NaN takes away a block's only large v: the others are still numbers, and fade."""
    kind = KINDS[bits]
    tx = jadam.adam(1.0, kernel=kernel, **kind.options)
    g = jnp.zeros((1, 128))
    state, *rest = tx.init(g)
    # v's code 1 and m's 0.
    both = jnp.full_like(state.mu, 1 + (64 << 9) if kind.sizes == 63 else 11)
    assert [int(x[0, 0]) for x in kind.split(both)] == [1, 0]
    for top in (-200, 0, 200) if kind.per_octave > 1 else (-9, 0, 9):
        tops = jnp.full_like(state.nu, top)
        _, (after, *_) = tx.update(g, (state._replace(mu=both, nu=tops), *rest))
        code, _ = kind.split(after.mu)
        # Without a gradient a v falls by at most a level in a step, and one that has faded is 0.
        level = code - kind.top + np.asarray(after.nu)[0, 0]
        before = 1 - kind.top + top
        assert np.all((code == 0) | ((level >= before - 1) & (level <= before)))
        assert np.any(code > 0)
