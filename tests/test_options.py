"""Every option of a member does what its equation says, in steps where it matters.

Oracles: optax 0.2.8 in float64, whose options have the same meaning, and NumPy.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import jadam
from jadam import _rounding

GRADIENTS = np.random.default_rng(0).standard_normal((30, 5))
GRADIENTS[:, 1] *= 1e-3  # beside an eps_root of 1e-3
GRADIENTS[10:, 2] *= 0.1  # AMSGrad's maximum stays where it was


def updates(tx):
    """Along the gradients, in float64."""

    def step(state, g):
        moved, state = tx.update(g, state)
        return state, moved

    gradients = jnp.asarray(GRADIENTS)
    return np.asarray(jax.jit(lambda: jax.lax.scan(step, tx.init(gradients[0]), gradients)[1])())


OPTIONS = [
    ("amsgrad", {"bias_correction_mu": True, "bias_correction_nu": False}),
    ("amsgrad", {"bias_correction_mu": False, "bias_correction_nu": True}),
    ("amsgrad", {"bias_correction_mu": False, "bias_correction_nu": False}),
    ("amsgrad", {"eps_root": 1e-3}),
    ("radam", {"nesterov": True}),
    ("radam", {"threshold": 4.0}),
    ("radam", {"threshold": 9.0}),
    ("radam", {"threshold": 4.0, "b2": 0.65}),  # ρ∞ is 4.7
    ("radam", {"eps_root": 1e-3, "eps": 1e-2}),
    ("radam", {"nesterov": True, "b2": 0.9, "b1": 0.5}),
    ("nadam", {"eps_root": 1e-3}),
]


@pytest.mark.usefixtures("either_compilation")
@pytest.mark.usefixtures("x64", "standard_promotion")
@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_an_option_is_optaxs(name, options):
    """And it matters: without it the updates are others.

    1e-11: thirty steps at 1e-16, and optax's 1 - b2**t loses three digits at t = 1, of which
    RAdam's r makes one more.
    """
    own = {"maximum": "corrected"} if name == "amsgrad" else {}
    ours = updates(getattr(jadam, name)(1.0, **own, **options))
    np.testing.assert_allclose(
        ours, updates(getattr(optax, name)(1.0, **options)), rtol=1e-11, atol=1e-11
    )
    default = updates(getattr(jadam, name)(1.0, **own))
    assert np.max(np.abs(ours - default)) > 1e-3


@pytest.mark.usefixtures("either_compilation")
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mu", [True, False])
@pytest.mark.parametrize("nu", [True, False])
def test_the_corrections_of_amsgrads_raw_maximum(mu, nu):
    """Each corrects its own moment, the maximum being taken before. 1e-12: float64, 30 steps."""
    m = v = largest = np.zeros(5)
    expected = []
    for t, g in enumerate(GRADIENTS, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        largest = np.maximum(largest, v)
        c1 = reference.bias(0.9, t) if mu else 1
        c2 = reference.bias(0.999, t) if nu else 1
        expected.append(-(m / c1) / (np.sqrt(largest / c2 + 1e-3) + 1e-8))
    options = {"bias_correction_mu": mu, "bias_correction_nu": nu, "eps_root": 1e-3}
    np.testing.assert_allclose(updates(jadam.amsgrad(1.0, **options)), expected, rtol=1e-12)


@pytest.mark.usefixtures("either_compilation")
@pytest.mark.parametrize("b2", [0.0, 0.25, 0.49, 0.51])
def test_a_fast_second_moment_is_not_dithered_below_zero(b2):
    """Under b2 = ½ the dither of a unit in v's last place could take more than v has.

    From large gradients to zeros, v falls to b2 of itself a step, and is never negative. 1e-6: the
    dither, of which each step keeps b2 at most, and rounding.
    """
    gradients = np.zeros((40, 64), np.float32)
    gradients[:20] = 10.0 ** np.linspace(-15, 15, 64)
    state, v = jadam.init(gradients[0]), np.zeros(64)
    update = jax.jit(lambda g, state: jadam.update(g, state, b2=b2))
    for g in gradients:
        _, state = update(jnp.asarray(g), state)
        v = b2 * v + (1 - b2) * g.astype(np.float64) ** 2
        assert np.all(state.nu >= 0)
        # Under 1e-36 float32's numbers lose digits.
        np.testing.assert_allclose(state.nu, v, rtol=1e-6, atol=1e-36)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("shape", "coded"),
    [
        ((256, 31), False),  # a last axis under 32
        ((128, 32), True),  # exactly 4,096 elements
        ((4096,), True),
        ((4095,), False),
        ((63, 65), False),  # 4,095
        ((2, 2048), True),
        ((32, 128, 0), False),
        ((), False),
    ],
)
def test_which_leaves_have_codes(shape, coded):
    """At least 4,096 elements, and at least 32 in the last axis, where codes begin to pay."""
    state = jadam.init(jnp.ones(shape), mu_dtype="int8", nu_dtype="uint8")
    assert (state.mu.dtype == jnp.uint16) == coded
    exact = jadam.init(jnp.ones((3, 40)), mu_dtype="int8", nu_dtype="uint8", min_size=120)
    fewer = jadam.init(jnp.ones((3, 40)), mu_dtype="int8", nu_dtype="uint8", min_size=121)
    empty = jadam.init(jnp.ones((0, 40)), mu_dtype="int8", nu_dtype="uint8", min_size=0)
    dtypes = [state.mu.dtype for state in (exact, fewer, empty)]
    assert dtypes == [jnp.uint16, jnp.float32, jnp.float32]


@pytest.mark.usefixtures("either_compilation")
def test_adamax_without_eps_where_no_gradient_has_come():
    """u = m = 0 gives an update of 0 in every storage, and the first gradient one of 1."""
    for options in ({}, {"mu_dtype": "int8", "nu_dtype": "uint8", "min_size": 0}):
        tx = jadam.adamax(1.0, eps=0.0, **options)
        state = tx.init(jnp.zeros(64))
        for _ in range(3):
            moved, state = tx.update(jnp.zeros(64), state)
            np.testing.assert_array_equal(moved, 0)
        moved, _ = tx.update(jnp.full(64, 2.0), state)
        # At t = 4: m̂ = (1-b1)·g/(1-b1⁴), u = g. 1e-6: ulps.
        np.testing.assert_allclose(moved, -0.1 / (1 - 0.9**4), rtol=1e-6)


def test_adamax_without_eps_stands_still_where_u_has_died_before_m():
    """A root of 0 says that no gradient comes any more: m is not divided by the smallest number."""
    tx = jadam.adamax(1.0, b1=0.999, b2=0.1, eps=0.0)
    state = tx.init(jnp.zeros(2))
    for t in range(20):
        moved, state = tx.update(jnp.full(2, 1e-30 if t == 0 else 0.0), state)
    assert float(state[0].mu[0]) > 0
    assert float(state[0].nu[0]) == 0
    assert float(jnp.abs(moved).max()) <= 1e-30


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_to_16_bits_at_the_largest_number(dtype):
    """Finite stays finite up to float32's largest, and the largest number of the dtype stays."""
    info = jnp.finfo(dtype)
    largest = float(info.max)
    x = jnp.asarray([largest, np.nextafter(np.float32(largest), np.float32(0)), 3.4e38], "float32")
    below = largest - float(info.eps) / 2 * 2.0 ** np.ceil(np.log2(largest))
    for t in range(40):
        for sign in (1, -1):
            rounded = _rounding.round_dithered(sign * x, jnp.dtype(dtype), jnp.int32(t))
            rounded = sign * np.asarray(rounded, np.float64)
            assert rounded[0] == rounded[2] == largest
            assert rounded[1] in (largest, below)
    for function, expected in (
        (_rounding.round_to_zero, [largest, below, largest]),
        (_rounding.round_from_zero, [largest, largest, largest]),
    ):
        rounded = function(x, jnp.dtype(dtype))
        np.testing.assert_array_equal(np.asarray(rounded, np.float64), expected)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("kernel", ["auto", "xla"])
def test_a_step_rounds_once_where_the_update_is_wider(kernel):
    """bfloat16 parameters, float32 gradients: p + update is rounded to bfloat16 once.

    An update of 1/256 + 2⁻²⁰ is above half the distance from 1 to the next number, 1/128; rounded
    to bfloat16 first it is a tie, which goes to the even 1.
    """
    params, g = jnp.ones(256, jnp.bfloat16), -jnp.ones(256, jnp.float32)
    rate = 2.0**-8 + 2.0**-20
    params, _ = jadam.step(
        g, jadam.init(params), params, learning_rate=rate, eps=0.0, kernel=kernel
    )
    np.testing.assert_array_equal(params.astype(jnp.float32), 1 + 2.0**-7)


@pytest.mark.usefixtures("either_compilation")
def test_leaves_of_one_shape_are_dithered_apart_in_compensated_weights():
    """The salt is a leaf's place: equal leaves, equal gradients, residuals that differ."""
    leaf = jnp.ones(512, jnp.bfloat16)
    params, grads = [leaf, leaf], [jnp.full(512, 1e-5, jnp.bfloat16)] * 2
    tx = jadam.compensated_weights(optax.sgd(1.0))
    _, state = tx.update(grads, tx.init(params), params)
    first, second = (np.asarray(r) for r in state.residual)
    assert np.mean(first != second) > 0.1
    # Both round the same number: to the two neighbours in 2⁻¹⁵ of the weight, and none else.
    assert set(np.unique([first, second])) == set(np.unique(first)) == set(np.unique(second))
