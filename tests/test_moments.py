"""`jadam.moments`: a state's moments as numbers, whatever they are stored in."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import jadam

pytestmark = pytest.mark.usefixtures("quick_compilation")
EIGHT_BITS = {"mu_dtype": "int8", "nu_dtype": "uint8", "min_size": 0}


@pytest.mark.parametrize(
    ("make", "kind", "options"),
    [
        (jadam.adam, "adam", {}),
        (jadam.amsgrad, "amsgrad", {}),
        (jadam.adamax, "adamax", {"adamax": True}),
        (jadam.ademamix, "ademamix", {"b3": 0.9999, "warmup": None}),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_codes_are_the_moments_that_float64_has(make, kind, options):
    """Norms over a block: dithers cancel in the mean, so they are those of exact moments.

    Tolerance: a code is 2.2% of √v and up to 3% of m, over 256 elements and dithered.
    """
    rng = np.random.default_rng(0)
    gradients = rng.standard_normal((60, 2, 128)).astype(np.float32) + 0.3
    tx, member = make(1e-3, **EIGHT_BITS), reference.Member(kind)
    params = jnp.zeros((2, 128))
    state = tx.init(params)
    update = jax.jit(tx.update)
    for g in gradients:
        _, state = update(jnp.asarray(g), state, params)
        member(g)
    decoded = jax.jit(lambda state: jadam.moments(state, **options))(state)
    assert type(decoded[0]) is type(state[0])
    for field, exact in (("mu", member.m), ("nu", member.v)):
        got = optax.tree.get(decoded, field)
        assert (got.shape, got.dtype) == (params.shape, jnp.float32)
        # AdaMax divides by the norm, whose code is off by 2.2% in all elements of one size.
        np.testing.assert_allclose(np.linalg.norm(got), np.linalg.norm(exact), rtol=0.02)


def test_floats_are_widened_and_the_rest_stays():
    """bfloat16 moments become float32 of the same values; counts and schedules are untouched."""
    tx = optax.chain(optax.identity(), jadam.adam(lambda count: 0.1, mu_dtype="bfloat16"))
    params = {"w": jnp.asarray([1.0, -3.0]), "c": jnp.asarray([1 + 2j], jnp.complex64)}
    _, state = tx.update(params, tx.init(params), params)
    decoded = jadam.moments(state)
    assert jax.tree.structure(decoded) == jax.tree.structure(state)
    ours, numbers = state[1][0], decoded[1][0]
    assert (numbers.mu["w"].dtype, numbers.mu["c"].dtype) == (jnp.float32, jnp.complex64)
    np.testing.assert_array_equal(numbers.mu["w"], ours.mu["w"].astype(jnp.float32))
    np.testing.assert_array_equal(numbers.nu["c"], ours.nu["c"])
    assert numbers.count == ours.count == decoded[1][1].count == 1


def test_what_has_no_moments_is_refused():
    with pytest.raises(ValueError, match="state: expected one of jadam's states"):
        jadam.moments(optax.sgd(0.1).init(jnp.ones(2)))
    with pytest.raises(ValueError, match="b2: expected a number"):
        jadam.moments(jadam.init(jnp.ones(2)), b2=1.0)


def test_moments_in_the_dtype_of_the_parameters():
    """`mu_dtype="params"` says both: 4 bytes a bfloat16 parameter, dithered so that v moves on.

    float16 has not the squares of gradients: bfloat16 takes its place for v. optax's v sticks at
    0.5 where 0.95 is right. 5%: bfloat16's dither, as in test_update.
    """
    params = {
        "b": jnp.ones(64, jnp.bfloat16),
        "h": jnp.ones(4, jnp.float16),
        "f": jnp.ones(4),
        "c": jnp.ones(4, jnp.complex64),
    }
    tx = jadam.adam(1e-3, mu_dtype="params")
    state = tx.init(params)
    dtypes = [{k: v.dtype.name for k, v in tree.items()} for tree in (state[0].mu, state[0].nu)]
    assert dtypes[0] == {k: v.dtype.name for k, v in params.items()}
    assert dtypes[1] == {"b": "bfloat16", "h": "bfloat16", "f": "float32", "c": "float32"}

    def step(state, _):
        return tx.update(params, state)[1], None

    state, _ = jax.lax.scan(step, state, length=3000)
    np.testing.assert_allclose(state[0].nu["b"].astype(float), 1 - 0.999**3000, rtol=0.05)
    wide = jadam.init(params["b"], mu_dtype="params", nu_dtype="float32")
    assert (wide.mu.dtype, wide.nu.dtype) == (jnp.bfloat16, jnp.float32)
