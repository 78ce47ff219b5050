"""Parameters in 16 bits: exact reconstruction, float32's trajectory, rounding without bias."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jadam
from jadam import _masters, _rounding
from jadam._weights import compensated_weights, master_weights, stochastic_rounding

# optax.apply_updates adds float32 updates to bfloat16 parameters, which strict promotion refuses.
pytestmark = pytest.mark.usefixtures("standard_promotion")

BF16 = jnp.bfloat16
SMALLEST = 2.0**-126  # of the normal numbers; CPUs count what is below as 0
LARGEST = float(jnp.finfo(BF16).max)


def bits(x):
    return np.asarray(x, np.float32).view(np.int32)


def ordered(x):
    """Which float32 number x is, counted from 0."""
    found = bits(x).astype(np.int64)
    return np.where(found < 0, -(found & 0x7FFFFFFF), found)


def same_bits(x, y):
    np.testing.assert_array_equal(bits(x), bits(y))


def applied(p, update):
    return optax.apply_updates(p, update)


def trained(tx, params, gradients, *, jit=True):
    """Parameters and state after one step for each gradient."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    if jit:
        step = jax.jit(step)
    for grads in gradients:
        params, state = step(params, state, grads)
    return params, state


def constant_run(tx, dtype, steps=1000, n=1024, scale=1.0):
    """Parameters at 1.0, pushed down by the same gradient in each step: the parameters' mean."""

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jnp.full(n, scale, jnp.float32), state, params)
        return (optax.apply_updates(params, updates), state), None

    params = jnp.ones(n, dtype)
    run = jax.jit(lambda *carry: jax.lax.scan(step, carry, length=steps)[0])
    params, state = run(params, tx.init(params))
    return np.asarray(params, np.float64), state


def tree(dtype, seed=0):
    """A matrix, the first row of it 0 as biases are, a scalar and None."""
    rng = np.random.default_rng(seed)
    kernel = 0.3 * rng.standard_normal((16, 24))
    kernel[0] = 0
    return {
        "kernel": jnp.asarray(kernel, dtype),
        "pair": (jnp.asarray(rng.standard_normal(()), dtype), None),
    }


def bf16_gradients(params, steps):
    rng = np.random.default_rng(1)
    return [
        jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), BF16), params)
        for _ in range(steps)
    ]


# One array


def all_bfloat16():
    return jax.lax.bitcast_convert_type(jnp.arange(2**16, dtype=jnp.uint32).astype("uint16"), BF16)


@np.errstate(invalid="ignore")  # signalling NaN are among them
def test_every_bfloat16_with_every_int8_residual():
    """16.7 million pairs: join gives what arithmetic gives, split gives the pair back.

    From p itself and from 0. Not from subnormal numbers, which arithmetic flushes to 0 on a CPU.
    """
    codes = jnp.arange(-128, 128, dtype=jnp.int8)

    @jax.jit
    def both(p):
        p, r = jnp.broadcast_arrays(p[:, None], codes)
        master = _masters.join(p, r)
        stay, r_stay = _masters.split(master, p, jnp.int8)
        jump, r_jump = _masters.split(master, jnp.zeros_like(p), jnp.int8)
        return master, applied(p, stay), r_stay, applied(jnp.zeros_like(p), jump), r_jump

    r = np.arange(-128, 128)
    for chunk in all_bfloat16().reshape(16, -1):
        value = np.asarray(chunk.astype(jnp.float32)).astype(float)
        tested = np.isfinite(value) & ((np.abs(value) >= SMALLEST) | (value == 0))
        master, stayed, r_stay, jumped, r_jump = (np.asarray(x) for x in both(chunk))
        wide = value[:, None] * np.ones(256)
        np.testing.assert_array_equal(stayed.astype(float)[tested], wide[tested])
        np.testing.assert_array_equal(jumped.astype(float)[tested], wide[tested])
        for found in (r_stay, r_jump):
            np.testing.assert_array_equal(found[tested], np.broadcast_to(r, wide.shape)[tested])
        # In the binade of p a step is 2⁸ float32 ulps.
        normal = tested & (value != 0)
        exponent = np.frexp(np.where(normal, value, 1))[1]
        expected = wide + r * 2.0 ** (exponent - 24 + 8)[:, None]
        inside = normal[:, None] & (np.frexp(expected)[1] == exponent[:, None])
        np.testing.assert_array_equal(master.astype(float)[inside], expected[inside])
        assert inside[normal].mean() > 0.99
        assert np.all(np.isfinite(master[np.isfinite(value)]))
        # Infinities and NaN stay what they are, whatever the residual says.
        np.testing.assert_array_equal(
            master[~np.isfinite(value)].astype(float), wide[~np.isfinite(value)]
        )


def special_masters():
    """Random float32 numbers, and the neighbours of ties, powers of two and the extremes."""
    rng = np.random.default_rng(0)
    edges = rng.integers(0x0080, 0x7F7F, 2000).astype(np.int64) << 16
    powers = np.arange(1, 255) << 23
    near = np.concatenate([(e + d) for e in (edges, edges + 0x8000, powers) for d in range(-2, 3)])
    random = rng.integers(0x00800000, 0x7F7F7FFF, 2**20)
    patterns = np.concatenate([near, random, [0, 0x7F7F7FFF, 0x7F7F7FFE]])
    patterns = patterns[(patterns == 0) | (patterns >= 0x00800000)]
    x = patterns.astype(np.uint32).view(np.float32)
    return np.concatenate([x, -x])


def test_a_bfloat16_and_an_int16_are_one_float32_number():
    """A bijection: each float32 comes back bit for bit, p is a nearest bfloat16 to it."""
    masters = special_masters()

    @jax.jit
    def there_and_back(master):
        zero = jnp.zeros(master.shape, BF16)
        update, r = _masters.split(master, zero, jnp.int16)
        p = applied(zero, update)
        return p, _masters.join(p, r)

    p, back = there_and_back(masters)
    np.testing.assert_array_equal(back, masters)  # 0 of either sign from +0 is +0
    nearest = np.abs(masters.astype(float) - np.asarray(jnp.asarray(masters).astype(BF16), float))
    np.testing.assert_array_equal(np.abs(masters.astype(float) - np.asarray(p, float)), nearest)


@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_from_anywhere_to_anywhere(dtype):
    """What p + update really rounds to has the residual: nothing is lost where p is not huge.

    Past |p| = 2¹⁶·|master| the update has no digits left for it: the error is 2⁻²⁴ of p, which is
    the rounding of any float32 sum p + update.
    """
    rng = np.random.default_rng(2)
    n = 2**20
    masters = rng.choice(special_masters(), n)
    masters = np.where(np.abs(masters) > 2.0**-60, masters, np.float32(1.7))
    ratio = 2.0 ** rng.uniform(-60, 60, n) * rng.choice([-1, 1], n)
    p = jnp.asarray(np.clip(masters * ratio, -LARGEST, LARGEST), BF16)

    @jax.jit
    def go(master, p):
        update, r = _masters.split(master, p, jnp.dtype(dtype))
        landed = applied(p, update)
        return update, landed, _masters.join(landed, r), r

    update, landed, back, r = (np.asarray(x, np.float64) for x in go(masters, p))
    # Of the number where it landed, however far off: as near to the master as a residual can.
    counted = ordered(masters) - ordered(landed)
    step = 1 if dtype == "int16" else 256
    closest = np.clip(counted, -(2**15), 2**15 - 1) // step
    masters, p = masters.astype(float), np.asarray(p, np.float64)
    assert np.all(np.isfinite(update))
    assert np.all(np.isfinite(landed))
    resolution = 0 if dtype == "int16" else 2.0**-15  # the undithered int8 code rounds down
    # From one end of float32 to the other the difference overflows; then it is only finite.
    subtractable = np.abs(masters - p) < 0.999 * float(jnp.finfo(jnp.float32).max)
    np.testing.assert_array_equal(r, closest)
    near = subtractable & (np.abs(p) < 2.0**15 * np.abs(masters))
    assert np.all(np.abs(back - masters)[near] <= resolution * np.abs(masters)[near])
    bound = resolution * np.abs(masters) + 2.0**-24 * np.abs(p) + SMALLEST
    assert np.all(np.abs(back - masters)[subtractable] <= bound[subtractable])


@pytest.mark.usefixtures("either_compilation")
@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_the_edges_of_float32(dtype):
    """Overflow to infinity stays one, a finite master stays finite, NaN stays NaN, -0 stays -0."""
    tx = compensated_weights(optax.identity(), residual_dtype=dtype)

    def step(p, update, r=0):
        p = jnp.asarray([p], BF16)
        state = tx.init(p)._replace(residual=jnp.full(1, r, dtype))
        updates, state = tx.update(jnp.asarray([update], jnp.float32), state, p)
        p = applied(p, updates)
        return float(p[0]), float(master_weights(p, state)[0]), int(state.residual[0])

    inf, nan = np.inf, np.nan
    for p in (1.0, -3.0, 0.0, inf, -inf, nan):
        assert np.isnan(step(p, nan)[:2]).all()
    assert np.isnan(step(inf, -inf)[:2]).all()
    assert np.isnan(step(nan, 1.0, r=5)[:2]).all()
    for p, update in [(1.0, inf), (inf, 1.0), (inf, inf), (inf, -1e38), (3.3e38, 1e38)]:
        for sign in (1, -1):
            assert step(sign * p, sign * update) == (sign * inf, sign * inf, 0)
    # Past the middle to infinity: float32 has such numbers, bfloat16 would round them to infinity.
    for sign in (1, -1):
        p, master, _ = step(sign * LARGEST, sign * 1.3e36)
        assert p == sign * LARGEST
        assert LARGEST <= sign * master < float(jnp.finfo(jnp.float32).max)
        # From one end to the other the difference itself overflows.
        p, master, _ = step(sign * 2.0**127, sign * -1.9999 * 2.0**127)
        assert sign * p < -1.69e38
        assert np.isfinite(master)
    for zero in (0.0, -0.0):
        p, master, _ = step(zero, -0.0)
        assert np.copysign(1, [p, master]).tolist() == [np.copysign(1, zero)] * 2
    assert step(-0.0, 0.0) == (0, 0, 0)
    assert step(1.0, -1.0) == (0, 0, 0)
    # Across zero with the residual alone.
    assert step(SMALLEST, -SMALLEST)[:2] == (0, 0)


# Float32's trajectory


INNERS = {
    # One kernel for both: the native one rounds an update's last bit in another way.
    "jadam.adamw": lambda: jadam.adamw(1e-2, weight_decay=0.1, kernel="xla"),
    "jadam.amsgrad": lambda: jadam.amsgrad(1e-2),
    "optax.adamw": lambda: optax.adamw(optax.cosine_decay_schedule(1e-2, 100), weight_decay=0.1),
    "optax.lion": lambda: optax.lion(1e-3, weight_decay=0.1),
    "optax.sgd": lambda: optax.sgd(1e-3, momentum=0.9),
    "muon": lambda: optax.contrib.muon(1e-2, weight_decay=0.1),
    "lamb": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.lamb(1e-2)),
}


def both_trained(inner, steps, *, jit):
    """Weights of 16 bits and of 32, by the same gradients, of bfloat16 as differentiation's."""
    narrow = tree(BF16)
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), narrow)
    gradients = bf16_gradients(narrow, steps)
    tx = compensated_weights(INNERS[inner](), residual_dtype="int16")
    params, state = trained(tx, narrow, gradients, jit=jit)
    in_float32 = [jax.tree.map(lambda g: g.astype(jnp.float32), grads) for grads in gradients]
    expected, _ = trained(INNERS[inner](), wide, in_float32, jit=jit)
    assert np.any(params["kernel"] != narrow["kernel"])
    assert jax.tree.map(jax.typeof, params) == jax.tree.map(jax.typeof, narrow)
    return master_weights(params, state), expected


@pytest.mark.usefixtures("either_compilation")
@pytest.mark.parametrize("inner", INNERS)
def test_with_an_int16_residual_training_is_float32_training(inner):
    """The same gradients: the same weights, to the bit, operation by operation."""
    jax.tree.map(same_bits, *both_trained(inner, 4, jit=False))


@pytest.mark.parametrize(
    "inner",
    [
        name if name == "jadam.adamw" else pytest.param(name, marks=pytest.mark.soak)
        for name in INNERS
    ],
)
def test_with_an_int16_residual_a_compiled_training_is_float32_training(inner):
    """To the bit as well, but for the members excepted here.

    In one program XLA may contract a product and a sum, or order a norm's terms, otherwise than in
    the other program.
    """
    found = both_trained(inner, 40, jit=True)
    if inner in ("muon", "lamb", "optax.adamw"):
        # Forty steps with a last bit or two of the update each.
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
        jax.tree.map(close, *found)
    else:
        jax.tree.map(same_bits, *found)


@pytest.mark.parametrize(
    ("dtype", "lr", "tolerance"),
    [
        ("int16", 1e-7, 0.0),
        ("int16", 1e-3, 0.0),
        # Two steps of 2⁻¹⁵. Without dither the run at 1e-7 does not move, that at 1e-5 goes half
        # as far again; with random instead of Weyl dither the spread is 5 to 20 times as wide.
        ("int8", 1e-7, 2 * 2.0**-15),
        ("int8", 1e-5, 2 * 2.0**-15),
        ("int8", 1e-3, 2 * 2.0**-15),
    ],
)
def test_compensated_weights_move_as_float32_does(dtype, lr, tolerance):
    """A parameter at 1.0, 1,000 steps of lr: bfloat16 alone never moves."""
    expected, _ = constant_run(optax.sgd(lr), jnp.float32)
    params, state = constant_run(compensated_weights(optax.sgd(lr), residual_dtype=dtype), BF16)
    masters = np.asarray(master_weights(jnp.asarray(params, BF16), state), np.float64)
    assert np.abs(masters - expected).max() <= tolerance
    # Over lanes the dither is even: 1,024 elements leave a tenth of a step.
    assert abs(masters.mean() - expected.mean()) <= tolerance / 20


@pytest.mark.usefixtures("either_compilation")
@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_adam_moves_a_bfloat16_parameter_as_a_float32_one(dtype):
    """The run of the README with Adam: 1.0, learning rate 1e-3, 1,000 steps."""
    expected, _ = constant_run(jadam.adam(1e-3), jnp.float32)
    stuck, _ = constant_run(jadam.adam(1e-3), BF16)
    params, _ = constant_run(compensated_weights(jadam.adam(1e-3), residual_dtype=dtype), BF16)
    assert np.all(stuck == 1)
    assert np.abs(params - expected).max() <= 2 * 2.0**-15  # near 0 by then


# Stochastic rounding


@pytest.mark.usefixtures("either_compilation")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("x", [1.003, -0.7391, 3.14159e-3, 1.9999, 1e-6])
def test_stochastic_rounding_is_unbiased(dtype, x):
    """Only the two neighbours, and the mean of n within 5 sigma, sigma = s·√(f(1-f)/n)."""
    n = 2**20
    p = jnp.zeros(n, dtype)
    tx = stochastic_rounding(optax.identity(), 3)
    updates, _ = jax.jit(tx.update)(jnp.full(n, x, jnp.float32), tx.init(p), p)
    rounded = np.asarray(applied(p, updates), np.float64)
    x = float(np.float32(x))
    s = 2.0 ** (np.floor(np.log2(abs(x))) - jnp.finfo(dtype).nmant)
    s = max(s, float(jnp.finfo(dtype).smallest_subnormal))
    lower = np.floor(x / s) * s
    assert set(np.unique(rounded)) == {lower, lower + s}
    f = (x - lower) / s
    assert abs(rounded.mean() - x) < 5 * s * np.sqrt(f * (1 - f) / n)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("lr", [1e-7, 1e-5, 1e-3])
def test_stochastically_rounded_weights_move_as_float32_does(dtype, lr):
    """In the mean over n elements within 5 sigma, sigma the measured spread over √n."""
    n = 2**14
    expected, _ = constant_run(optax.sgd(lr), jnp.float32, n=1)
    params, _ = constant_run(stochastic_rounding(optax.sgd(lr)), dtype, n=n)
    assert params.std() > 0
    # float32's own rounding of 1 - 1e-7 is 2·10⁻⁵ off after 1,000 steps and not random.
    own = abs(expected[0] - (1 - 1000 * lr))
    assert abs(params.mean() - (1 - 1000 * lr)) < 5 * params.std() / np.sqrt(n) + own


@pytest.mark.usefixtures("either_compilation")
def test_random_bits_are_independent_in_every_direction():
    """Each of 32 bits, along both axes, between steps and between leaves: within 5 sigma of 0."""
    n = 256
    keys = jax.random.bits(jax.random.key(0), (8, 2), jnp.uint32)
    draws = np.stack([_masters.random_bits(key, (n, n)) for key in keys])
    signs = 1.0 - 2.0 * ((draws[..., None] >> np.arange(32, dtype=np.uint32)) & 1)
    sigma = 1 / n
    assert np.abs(signs.mean((1, 2))).max() < 5 * sigma
    pairs = [
        signs[:, 1:] * signs[:, :-1],
        signs[:, :, 1:] * signs[:, :, :-1],
        signs[:, :, 128:] * signs[:, :, :128],
        signs[1:] * signs[:-1],
        signs[..., 1:] * signs[..., :-1],
    ]
    for pair in pairs:
        assert np.abs(pair.mean((1, 2))).max() < 5.5 * sigma
    # 256 equal boxes of n²·8 draws of the upper byte: chi² has mean 255 and sigma 22.6.
    counts = np.bincount((draws >> 24).ravel(), minlength=256)
    chi2 = np.sum((counts - counts.mean()) ** 2 / counts.mean())
    assert abs(chi2 - 255) < 5 * 22.6


def lowbias32(x):
    """Wellons' hash of 32 bits, nullprogram.com/blog/2018/07/31."""
    x = np.asarray(x, np.uint64)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor) % 2**32
    return x ^ (x >> np.uint64(16))


@pytest.mark.usefixtures("quick_compilation")
def test_random_bits_are_a_hash_of_the_place_and_two_words():
    """To the bit: in each element of a leaf, in a slice of a stack, and past 2³² elements."""
    words = jnp.asarray([0x12345678, 0x9ABCDEF0], jnp.uint32)

    def expected(place):
        return lowbias32(lowbias32(place ^ 0x12345678) ^ 0x9ABCDEF0)

    places = np.arange(3 * 5 * 7).reshape(3, 5, 7)
    np.testing.assert_array_equal(_masters.random_bits(words, (3, 5, 7)), expected(places))
    assert _masters.random_bits(words, ()) == expected(0)
    for i in range(3):
        with _rounding.as_layer(jnp.uint32(i)):
            found = _masters.random_bits(words, (1, 5, 7))
        np.testing.assert_array_equal(found, expected(places)[i : i + 1])
    first = jax.jit(lambda words: _masters.random_bits(words, (2, 2, 2**15, 2**16))[:, :, 0, :3])
    # No array of 32 GiB is made.
    assert first.lower(words).compile().memory_analysis().temp_size_in_bytes < 1000
    rows = 2**31 * np.arange(4).reshape(2, 2, 1) % 2**32
    np.testing.assert_array_equal(first(words), expected(rows + np.arange(3)))


@pytest.mark.parametrize(
    ("dtype", "digits", "smallest"), [("bfloat16", 7, 2.0**-126), ("float16", 10, 2.0**-24)]
)
def test_a_random_rounding_goes_up_by_chance(dtype, digits, smallest):
    """|x| = (n + f)·s goes to n + 1 where 24 random bits, a number in [0, 1), are less than f.

    So what the dtype has stays, with any bits. Past its largest number it is a conversion.
    """
    rng = np.random.default_rng(0)
    x = (rng.choice([-1, 1], 4000) * 2.0 ** rng.uniform(-30, 15, 4000)).astype(np.float32)
    s = np.maximum(2.0 ** (np.floor(np.log2(np.abs(x.astype(float)))) - digits), smallest)
    x[:1000] = np.round(x[:1000] / s[:1000]) * s[:1000]
    bits = rng.integers(0, 2**32, 4000).astype(np.uint32)
    bits[:500] = 0
    n, f = np.divmod(np.abs(x.astype(float)) / s, 1)
    near = np.clip(f * 2**24 + rng.integers(-1, 2, 4000), 0, 2**24 - 1)
    bits[2000:] = near[2000:] * 2**8
    expected = np.copysign((n + ((bits >> 8) / 2**24 < f)) * s, x)
    found = _masters.round_randomly(jnp.asarray(x), jnp.dtype(dtype), jnp.asarray(bits))
    np.testing.assert_array_equal(found, expected)
    largest = float(jnp.finfo(dtype).max)
    half = largest * 2.0 ** -(digits + 2)  # nearly, of the distance to the next number
    past = jnp.asarray([largest, largest + 0.9 * half, largest + 1.1 * half], jnp.float32)
    for bits in (0, 2**32 - 1):
        found = _masters.round_randomly(past, jnp.dtype(dtype), jnp.full(3, bits, jnp.uint32))
        np.testing.assert_array_equal(found, [largest, largest, np.inf])


@pytest.mark.usefixtures("either_compilation")
def test_the_key_decides():
    """A seed gives the same bits again; seeds, steps and leaves differ."""
    p = {"a": jnp.ones(4096, BF16), "b": jnp.ones(4096, BF16)}
    g = jax.tree.map(lambda p: jnp.full(p.shape, -(2.0**-9), jnp.float32), p)

    def draw(*key, steps=1):
        tx = stochastic_rounding(optax.identity(), *key)
        state = tx.init(p)
        for _ in range(steps):
            updates, state = tx.update(g, state, p)
        return updates

    first = draw(0)
    jax.tree.map(same_bits, first, draw(0))
    jax.tree.map(same_bits, first, draw())
    for other in (
        draw(1)["a"],
        draw(0, steps=2)["a"],
        first["b"],
        draw(jax.random.key(0, impl="rbg"))["a"],
    ):
        agree = np.mean(np.asarray(other) == np.asarray(first["a"]))
        assert abs(agree - 0.5) < 5 * 0.5 / 64  # 5 sigma of a coin thrown 4,096 times
    same_bits(draw(jax.random.key(7))["a"], draw(jax.random.PRNGKey(7))["a"])
    same_bits(draw(7)["a"], draw(np.int64(7))["a"])


@pytest.mark.usefixtures("either_compilation")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_edges_with_stochastic_rounding(dtype):
    """NaN and infinities stay, representable numbers stay, the largest does not overflow."""
    largest = float(jnp.finfo(dtype).max)
    p = jnp.asarray([np.nan, np.inf, -np.inf, 1, -0.0, 0, largest, -largest, 0.5, 1, 1], dtype)
    u = jnp.asarray([1, 1, 1, 0, -0.0, 0, 0, 0, 0.25, np.nan, np.inf], jnp.float32)
    tx = stochastic_rounding(optax.identity())
    updates, _ = tx.update(u, tx.init(p), p)
    expected = [np.nan, np.inf, -np.inf, 1, -0.0, 0, largest, -largest, 0.75, np.nan, np.inf]
    got = np.asarray(applied(p, updates), np.float64)
    np.testing.assert_array_equal(got, expected)
    assert np.signbit(got[4])
    assert not np.signbit(got[5])
    over = jnp.asarray([largest], dtype), jnp.asarray([largest], jnp.float32)
    updates, _ = tx.update(over[1], tx.init(over[0]), over[0])
    assert np.isinf(np.asarray(applied(over[0], updates), np.float64)).all()


# Both


WRAPPERS = {
    "int8": compensated_weights,
    "int16": lambda inner: compensated_weights(inner, residual_dtype="int16"),
    "stochastic": stochastic_rounding,
}
each_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


def not_scalars(params):
    return jax.tree.map(lambda p: jnp.ndim(p) > 0, params)


COMPOSITIONS = {
    "chain": lambda wrap: optax.chain(optax.clip_by_global_norm(1.0), wrap(jadam.adamw(1e-2))),
    "inner_chain": lambda wrap: wrap(optax.chain(optax.clip(1.0), jadam.adam(1e-2))),
    "MultiSteps": lambda wrap: optax.MultiSteps(wrap(jadam.adam(1e-2)), 2),
    "inner_MultiSteps": lambda wrap: wrap(optax.MultiSteps(jadam.adam(1e-2), 2)),
    "inject": lambda wrap: optax.inject_hyperparams(lambda lr: wrap(optax.adam(lr)))(lr=1e-2),
    "inner_inject": lambda wrap: wrap(optax.inject_hyperparams(optax.lion)(learning_rate=1e-2)),
    "masked": lambda wrap: optax.chain(
        optax.masked(wrap(jadam.adam(1e-2)), not_scalars),
        optax.masked(optax.sgd(1e-2), lambda p: jax.tree.map(lambda x: jnp.ndim(x) == 0, p)),
    ),
    "inner_masked": lambda wrap: wrap(optax.masked(jadam.adam(1e-2), not_scalars)),
    "inner_apply_if_finite": lambda wrap: wrap(optax.apply_if_finite(jadam.adam(1e-2), 2)),
    "partition": lambda wrap: optax.partition(
        {"narrow": wrap(jadam.adam(1e-2)), "other": optax.sgd(1e-2)},
        lambda params: jax.tree.map(lambda p: "narrow" if jnp.ndim(p) else "other", params),
    ),
    "schedule": lambda wrap: wrap(jadam.adam(optax.linear_schedule(1e-2, 0.0, 100))),
    "schedule_free": lambda wrap: wrap(optax.contrib.schedule_free_adamw(1e-2)),
}


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("composition", "wrap"),
    [  # in turns with one of two wrappers; of int16 and int8 the states have one form
        *(
            pytest.param(name, wrap, marks=[pytest.mark.soak] * (i % 2 != (wrap == "int8")))
            for i, name in enumerate(COMPOSITIONS)
            for wrap in ("int8", "stochastic")
        ),
        ("chain", "int16"),
    ],
)
def test_it_composes_and_its_state_keeps_its_types(composition, wrap):
    """All of optax around it and inside it: constant avals, one compilation, a scan."""
    tx = COMPOSITIONS[composition](WRAPPERS[wrap])
    params = tree(BF16)
    params["wide"] = jnp.ones(3)
    rng = np.random.default_rng(0)
    grads = [
        jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), params)
        for _ in range(4)
    ]

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    before = jax.tree.map(jax.typeof, (params, state))
    assert not any(aval.weak_type for aval in jax.tree.leaves(before))
    assert jax.tree.map(jax.typeof, jax.eval_shape(tx.init, params)) == before[1]
    moved = params
    for g in grads:
        moved, state = step(moved, state, g)
        assert jax.tree.map(jax.typeof, (moved, state)) == before
    assert step._cache_size() == 1
    carry = (params, tx.init(params))
    after = jax.eval_shape(
        lambda carry, g: jax.lax.scan(lambda c, _: (step(*c, g), None), carry, length=4)[0],
        carry,
        grads[0],
    )
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), carry
    )
    changed = jax.tree.map(lambda p, q: bool(np.any(p != q)), moved, params)
    assert all(jax.tree.leaves(changed)) or composition == "inner_masked"


@pytest.mark.usefixtures("either_compilation")
@each_wrapper
def test_wide_and_complex_leaves_are_let_through(wrap, x64):
    """float32, float64 and complex parameters get the inner update and no residual."""
    params = {
        "f32": jnp.ones(3, jnp.float32),
        "f64": jnp.ones(3, jnp.float64),
        "c64": jnp.ones(3, jnp.complex64),
        "bf16": jnp.ones(3, BF16),
    }
    wide = {name: p for name, p in params.items() if name != "bf16"}
    tx, plain = wrap(jadam.adamw(1e-2)), jadam.adamw(1e-2)
    state = tx.init(params)
    updates, state = jax.jit(tx.update)(params, state, params)
    expected, _ = jax.jit(plain.update)(wide, plain.init(wide), wide)
    for name, update in expected.items():
        np.testing.assert_array_equal(updates[name], update)
        assert updates[name].dtype == update.dtype
    if hasattr(state, "residual"):
        assert [x.shape for x in jax.tree.leaves(state.residual)] == [(3,)]
        assert optax.tree.get(state, "residual") is state.residual
    assert optax.tree.get(state, "mu")["bf16"].dtype == jnp.float32
    assert optax.tree.get(state, "count") == 1


@pytest.mark.usefixtures("quick_compilation")
@each_wrapper
def test_extra_arguments_reach_the_inner_transformation(wrap):
    seen = {}

    def update(updates, state, params=None, **extra):
        seen.update(extra, params=params, grads=updates)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = wrap(inner)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    p = jnp.ones(3, BF16)
    tx.update(p, tx.init(p), p, value=3.0)
    assert seen["value"] == 3.0
    assert seen["params"].dtype == seen["grads"].dtype == jnp.float32
    plain = wrap(optax.sgd(0.1))
    plain.update(p, plain.init(p), p, value=3.0)


@pytest.mark.usefixtures("quick_compilation")
@each_wrapper
def test_under_strict_promotion(wrap):
    """The update works; optax.apply_updates does not, so the sum is written out."""
    p = {"w": jnp.ones(3, BF16)}
    tx = wrap(jadam.adamw(0.5))
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        updates, _ = jax.jit(tx.update)(p, tx.init(p), p)
        with pytest.raises(jax.dtypes.TypePromotionError):
            optax.apply_updates(p, updates)
        summed = jax.tree.map(lambda p, u: (p.astype(u.dtype) + u).astype(p.dtype), p, updates)
    np.testing.assert_array_equal(summed["w"], optax.apply_updates(p, updates)["w"])


@each_wrapper
def test_sharding_is_kept_and_changes_no_bit(wrap):
    """Eight devices, both axes: the residual lies where its parameter lies."""
    mesh = Mesh(np.asarray(jax.devices()[:8]).reshape(2, 4), ("x", "y"))
    sharding = NamedSharding(mesh, P("x", "y"))
    rng = np.random.default_rng(0)
    p = jnp.asarray(rng.standard_normal((64, 512)), BF16)
    grads = [jnp.asarray(rng.standard_normal(p.shape), BF16) for _ in range(3)]
    tx = wrap(jadam.adamw(1e-3))
    whole, state = trained(tx, p, grads)
    there = jax.device_put(p, sharding)
    assert all(
        x.sharding == sharding for x in jax.tree.leaves(tx.init(there)) if x.shape == p.shape
    )
    cut, cut_state = trained(tx, there, [jax.device_put(g, sharding) for g in grads])
    assert cut.sharding.is_equivalent_to(sharding, 2)
    for x, y in zip(
        jax.tree.leaves((whole, state)), jax.tree.leaves((cut, cut_state)), strict=True
    ):
        np.testing.assert_array_equal(x, y)
        assert y.shape != p.shape or y.sharding.is_equivalent_to(sharding, 2)


@pytest.mark.usefixtures("either_compilation")
@each_wrapper
def test_vmap_and_donation(wrap):
    """Members of an ensemble do what they do alone; donated buffers are taken."""
    params = jnp.asarray(np.random.default_rng(0).standard_normal((3, 8)), BF16)
    tx = wrap(jadam.adamw(1e-2))

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    states = jax.vmap(tx.init)(params)
    together, _ = jax.jit(jax.vmap(step))(params, states, params)
    one = jax.jit(step)
    alone = np.stack([one(p, tx.init(p), p)[0] for p in params])
    np.testing.assert_array_equal(together, alone)
    state = tx.init(params[0])
    donated = jax.tree.map(jnp.copy, (params[0], state))
    jax.jit(step, donate_argnums=(0, 1))(*donated, params[0])
    assert all(x.is_deleted() for x in jax.tree.leaves(donated))


@pytest.mark.usefixtures("quick_compilation")
def test_the_state_takes_one_or_two_bytes_a_parameter():
    p = jnp.ones((64, 64), BF16)
    for dtype, size in (("int8", 1), ("int16", 2)):
        state = compensated_weights(optax.sgd(0.1), residual_dtype=dtype).init(p)
        assert sum(x.nbytes for x in jax.tree.leaves(state)) <= size * p.size + 4
    state = stochastic_rounding(optax.sgd(0.1)).init(p)
    assert sum(x.nbytes for x in jax.tree.leaves(state)) == 8


@pytest.mark.usefixtures("quick_compilation")
@each_wrapper
@pytest.mark.parametrize("moments", [{}, {"mu_dtype": "int8", "nu_dtype": "uint8", "min_size": 0}])
def test_a_state_is_made_without_a_copy_of_the_parameters(wrap, moments):
    """Also without jit: a float32 copy would be twice the model. Who reads a deleted array fails.

    Each leaf of the state lies where its parameter lies.
    """
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    lies = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    params = {"w": jax.device_put(jnp.ones((8, 256), BF16), lies)}
    tx = wrap(jadam.adamw(1e-2, mask={"w": True}, **moments))
    expected = tx.init(params)
    params["w"].delete()
    state = tx.init(params)
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    moments = [optax.tree.get(state, name)["w"] for name in ("mu", "nu")]
    assert all(x.sharding.is_equivalent_to(lies, 2) for x in moments)


@pytest.mark.usefixtures("quick_compilation")
def test_a_state_with_parameter_shaped_leaves_is_found_by_optax():
    """optax.tree_map_params sees the residuals, so that a sharding can be given to each."""
    p = tree(BF16)
    tx = compensated_weights(jadam.adam(0.1))
    names = optax.tree_map_params(tx, lambda _: "like a parameter", tx.init(p))
    assert jax.tree.leaves(names.residual) == ["like a parameter"] * 2
    assert not isinstance(names.dither, str)


@pytest.mark.usefixtures("quick_compilation")
@each_wrapper
def test_what_is_refused(wrap):
    p = {"a": jnp.ones(3, BF16), "b": [jnp.ones(2)]}
    tx = wrap(optax.sgd(0.1))
    state = tx.init(p)
    with pytest.raises(ValueError, match=r"^params: expected the parameters"):
        tx.update(p, state)
    with pytest.raises(ValueError, match=r"^grads\['b'\]\[0\] is missing"):
        tx.update({"a": p["a"], "b": []}, state, p)
    with pytest.raises(TypeError, match=r"^params\['n'\]: .*int32"):
        tx.init({"n": jnp.ones(3, jnp.int32)})
    with pytest.raises(TypeError, match=r"^params\['n'\]: .* expects .*, got float8_e4m3fn"):
        tx.init({"n": jnp.ones(3, jnp.float8_e4m3fn)})
    with pytest.raises(TypeError, match=r"^grads\['a'\]: expected a real dtype"):
        tx.update({"a": jnp.ones(3, jnp.complex64), "b": p["b"]}, state, p)
    with pytest.raises(TypeError, match=r"^inner: expected an optax.GradientTransformation"):
        wrap(optax.sgd)
    with pytest.raises(TypeError, match=r"^inner: expected an optax.GradientTransformation"):
        wrap(types.SimpleNamespace(init=tx.init))


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_parameters_other_than_at_init_are_refused(dtype):
    p = {"N": None, "a": jnp.ones(3, BF16), "b": [jnp.ones(2)]}
    tx = compensated_weights(optax.sgd(0.1), residual_dtype=dtype)
    state = tx.init(p)
    others = [
        ({"a": jnp.ones(3)}, TypeError, r"^params\['a'\]: expected bfloat16 .*, got float32;"),
        ({"a": None}, TypeError, r"^params\['a'\]: expected bfloat16 .*, got None;"),
        ({"b": [p["a"]]}, TypeError, r"^params\['b'\]\[0\]: expected float32 .*, got bfloat16;"),
        ({"a": jnp.ones(4, BF16)}, ValueError, r"^params\['a'\]: expected shape"),
        ({"a": jnp.ones(2, BF16)}, ValueError, r"^params\['a'\]: expected shape"),
        ({"b": []}, ValueError, r"^params\['b'\]\[0\] is missing"),
        ({"a": jnp.ones(3, jnp.float16)}, TypeError, r"^params\['a'\]: .*float16"),
    ]
    others = [(p | other, error, message) for other, error, message in others]
    for params, error, message in others:
        with pytest.raises(error, match=message):
            tx.update(params, state, params)
    with pytest.raises(ValueError, match=r"^state: expected one CompensatedWeightsState"):
        master_weights(p, optax.EmptyState())
    with pytest.raises(ValueError, match=r"^state: expected one .* found 2 in tuple"):
        master_weights(p, (state, state))
    with pytest.raises(ValueError, match=r"^residual_dtype: expected int8 or int16"):
        compensated_weights(optax.sgd(0.1), residual_dtype="int32")
    for bad in (True, 0.5, "0", jnp.ones(2)):
        with pytest.raises(TypeError, match=r"^key: expected"):
            stochastic_rounding(optax.sgd(0.1), bad)


@pytest.mark.usefixtures("quick_compilation")
def test_the_dither_counts_the_roundings():
    """One more in each update, and after 2³² of them from 0 again."""
    p = jnp.ones(3, BF16)
    tx = compensated_weights(optax.sgd(0.1))
    state = tx.init(p)
    for made in (0, 1, 2):
        assert state.dither == made
        _, state = tx.update(p, state, p)
    _, state = tx.update(p, state._replace(dither=jnp.uint32(2**32 - 1)), p)
    assert state.dither == 0


@pytest.mark.usefixtures("quick_compilation")
def test_a_state_from_elsewhere_goes_on_without_init():
    """As one from a checkpoint does, also with parameters in float32; NumPy's arrays are taken."""
    p = {"narrow": np.ones(3, BF16), "wide": np.ones(3, np.float32)}
    state = stochastic_rounding(jadam.adam(1.0)).init(p)
    updates, _ = stochastic_rounding(jadam.adam(1.0)).update(p, state, p)
    # The first step is one learning rate. 1e-6: float32's roundings.
    np.testing.assert_allclose(updates["wide"], -1, rtol=1e-6)
    np.testing.assert_allclose(updates["narrow"], -1, rtol=1e-6)
