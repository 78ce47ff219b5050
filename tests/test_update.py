"""The pure pair on trees: extreme gradients, dtypes, derivatives, and state that never drifts."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from helpers import gradients_like, tree_of_parameters, ulps
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jadam

update = jax.jit(jadam.update)


def avals(tree):
    """Shape, dtype and weak type of every leaf: what a recompilation or a scan looks at."""
    return jax.tree.map(jax.typeof, tree)


@pytest.mark.parametrize("function", [jadam.update, jadam.step])
def test_what_is_not_said_is_as_in_the_paper(x64, function):
    """Kingma & Ba's Algorithm 1: α = 0.001, β₁ = 0.9, β₂ = 0.999, ε = 1e-8; and nothing beside.

    1e-12: float64's roundings of three steps.
    """
    said = {"learning_rate": 1e-3, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "eps_root": 0.0}
    said |= {"weight_decay": 0.0, "mask": None, "nesterov": False, "kernel": "auto"}
    given = inspect.signature(function).parameters.values()
    assert {x.name: x.default for x in given if x.kind is x.KEYWORD_ONLY} == said
    params, member = jnp.asarray([1.0, -2.0, 3.0]), reference.Member()
    state = jadam.init(params)
    for g in ([0.5, -3.0, 1e-8], [-0.25, -3.0, 1e-9], [2.0, 1.0, 0.0]):
        moved, state = function(jnp.asarray(g), state, params)
        expected = -1e-3 * member(g) + (params if function is jadam.step else 0)
        np.testing.assert_allclose(moved, expected, rtol=1e-12)


# Extreme gradients


@pytest.mark.parametrize(
    ("g", "dtype"),
    [
        (0.0, "float32"),
        (1e-42, "float32"),
        (1e-30, "float32"),
        (1e-8, "float32"),
        (1e20, "float32"),
        (-3e38, "float32"),
        (0.0, "float16"),
        (6e-8, "float16"),
        (65504.0, "float16"),
        (1e20, "bfloat16"),
        (0.0, "bfloat16"),
    ],
)
def test_extreme_gradients_give_the_right_update(g, dtype):
    """optax: NaN for a float16 zero, 0 for |g| = 1e20. jadam: float64's answer, in every step."""
    gradient = jnp.asarray([g], dtype)
    state, member = jadam.init(gradient), reference.Member()
    for _ in range(50):
        updates, state = update(gradient, state)
        expected = -1e-3 * member(np.asarray(gradient, np.float64))
        # Half an ulp of a 16-bit dtype; for float32 eight ulps for m, v, direction and product.
        tolerance = max(float(jnp.finfo(dtype).eps) / 2, 8 * 2**-24)
        # A subnormal counts as 0 on a CPU: 1e-42/eps is 0 to any precision that matters.
        np.testing.assert_allclose(
            np.asarray(updates, np.float64), expected, rtol=tolerance, atol=1e-30
        )
        assert updates.dtype == gradient.dtype


@pytest.mark.parametrize("g", [0.0, 1e-42, 1e-30, 1e20])
def test_extreme_gradients_stay_finite_without_eps(g):
    """At eps = 0 a zero (or too small to square) gradient moves nothing; none gives a NaN."""
    gradient = jnp.asarray([g, 1.0], jnp.float32)
    state = jadam.init(gradient)
    for _ in range(20):
        updates, state = update(gradient, state, learning_rate=1.0, eps=0.0)
    assert updates[1] == pytest.approx(-1, rel=1e-6)  # twenty steps of an ulp or two
    # Under 3e-16 a gradient's square is lost: its update is the smaller, the smaller it is.
    assert updates[0] == pytest.approx(-1 if g > 1 else 0, rel=1e-6, abs=1e-14)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_non_finite_gradient_poisons_its_own_element_only(bad):
    """An overflow is not hidden: exact Adam's update is NaN there, and only there."""
    gradient = jnp.asarray([1.0, bad, 2.0], jnp.float32)
    updates, state = update(gradient, jadam.init(gradient))
    updates, _ = update(jnp.ones(3), state)
    assert np.isnan(updates[1])
    assert np.all(np.isfinite(updates[np.array([0, 2])]))


def test_huge_and_small_gradients_after_each_other():
    """1e20 is limited to 2⁶³, so what follows stays within the bound and comes back to normal."""
    gradients = [1e20, 1.0, 1e20, -1e20, 1e18] + [1.0] * 8
    state = jadam.init(jnp.zeros(1))
    for t, g in enumerate(gradients, 1):
        updates, state = update(jnp.asarray([g], jnp.float32), state, learning_rate=1.0, eps=0.0)
        assert np.abs(updates[0]) <= reference.step_bound(t) * (1 + 1e-5)  # as in test_math
    assert np.all(np.isfinite(state.nu))


@pytest.mark.parametrize(("dtype", "largest"), [("float32", 2.0**63), ("float64", 2.0**511)])
def test_gradients_are_limited_where_their_squares_would_not_be_finite(x64, dtype, largest):
    """At 2⁶³ and 2⁵¹¹, the largest powers of two with a finite square. Infinities pass."""
    g = jnp.asarray([0.9 * largest, largest, -largest, 2 * largest, -np.inf], dtype)
    _, state = jadam.update(g, jadam.init(g))
    close = functools.partial(np.testing.assert_allclose, rtol=2 * float(jnp.finfo(dtype).eps))
    # Roundings of 1 - b and of a product.
    close(state.mu[:4] / largest, (1 - 0.9) * np.array([0.9, 1, -1, 1]))
    close(state.nu[1:4] / largest / largest, 1 - 0.999)
    assert state.mu[4] == -np.inf


# Derivatives through the update


@pytest.mark.usefixtures("either_compilation")
@pytest.mark.parametrize("eps_root", [0.0, 1e-8])
def test_gradients_through_the_update_are_finite(eps_root):
    """Meta-learning: optax's derivative at g = 0 is NaN; here it is 1/eps, as the limit is."""

    def moved(g):
        updates, _ = jadam.update(g, jadam.init(g), learning_rate=1.0, eps_root=eps_root)
        return -jnp.sum(updates)

    g = jnp.asarray([0.0, 1.0, -1e-3], jnp.float32)
    first = jax.jit(jax.grad(moved))
    second = jax.jit(jax.grad(lambda g: jnp.sum(first(g))))
    assert np.all(np.isfinite(first(g)))
    assert np.all(np.isfinite(second(g)))
    # The first step is g/(√(g² + eps_root) + eps): slope 1/(√eps_root + eps) at 0. 1e-5: ulps.
    np.testing.assert_allclose(first(g)[0], 1 / (eps_root**0.5 + 1e-8), rtol=1e-5)


@pytest.mark.usefixtures("either_compilation")
def test_gradients_through_many_steps_and_hyperparameters_are_finite():
    """Zero gradients among others, and derivatives by learning rate, b1, b2, eps and decay."""
    gradients = jnp.asarray(np.random.default_rng(0).standard_normal((10, 5)), jnp.float32)
    gradients = gradients.at[:, 0].set(0).at[:5, 1].set(0)

    def end(hyperparameters, gradients):
        def step(carry, g):
            params, state = carry
            updates, state = jadam.update(g, state, params, **hyperparameters)
            return (optax.apply_updates(params, updates), state), None

        params = jnp.ones(5)
        (params, _), _ = jax.lax.scan(step, (params, jadam.init(params)), gradients)
        return jnp.sum(params**2)

    numbers = {"learning_rate": 0.1, "b1": 0.9, "b2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
    hyperparameters = {name: jnp.float32(value) for name, value in numbers.items()}
    by_both = jax.jit(jax.grad(end, (0, 1)))
    by_hyperparameters, by_gradients = by_both(hyperparameters, gradients)
    for name, value in by_hyperparameters.items():
        assert np.isfinite(value), name
    assert np.all(np.isfinite(by_gradients))

    # A central difference in float32 keeps about three digits of the derivative.
    def at(learning_rate):
        return end({**hyperparameters, "learning_rate": jnp.float32(learning_rate)}, gradients)

    difference = float(at(0.101) - at(0.099)) / 0.002
    assert by_hyperparameters["learning_rate"] == pytest.approx(difference, rel=5e-3)


def test_hyperparameters_given_as_arrays_are_the_same_mathematics():
    """Traced b1, b2: exact for the number that the array holds, here one float32 can hold."""
    g = jnp.asarray([0.5, -2.0], jnp.float32)
    numbers = {"learning_rate": 0.25, "b1": 0.875, "b2": 0.99609375, "eps": 2.0**-20}
    arrays = {name: jnp.float32(value) for name, value in numbers.items()}
    state_a = state_b = jadam.init(g)
    by_numbers = jax.jit(functools.partial(jadam.update, **numbers))
    for _ in range(5):
        a, state_a = by_numbers(g, state_a)
        b, state_b = update(g, state_b, **arrays)
        # log b is rounded from float64 in one, computed in float32 in the other: an ulp or two.
        np.testing.assert_allclose(a, b, rtol=4 * 2**-23)


# Dtypes


DTYPES = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
# Of the rates' dtypes all with one dtype of each kind of parameters, the others in `make soak`.
SHORT = ("bfloat16", "float32", "complex128")
COMBINATIONS = [
    *((p, "same", "number") for p in DTYPES),
    *((p, g, "number") for p in DTYPES for g in DTYPES[:4] if p != g),
    *(
        pytest.param(p, "same", r, marks=[] if p in SHORT else pytest.mark.soak)
        for p in DTYPES
        for r in ("schedule", *DTYPES[:4])
    ),
]


@pytest.mark.usefixtures("either_compilation")
@pytest.mark.parametrize(("param", "gradient", "rate"), COMBINATIONS)
def test_every_combination_of_dtypes(x64, param, gradient, rate):
    """Updates in the gradient's dtype, state of constant avals, computed in float32 or wider."""
    value = 2.0**-10  # exact in each dtype
    params = jnp.asarray([1.0, -2.0], param)
    g = jnp.asarray([0.5, -3.0], param if gradient == "same" else gradient)
    learning_rate = {"number": value, "schedule": lambda count: jnp.float32(value)}.get(rate)
    options = {} if learning_rate is None else {"learning_rate": learning_rate}
    # The decay of a complex parameter does not fit into the real update of a real gradient.
    decay = 0.0 if jnp.iscomplexobj(params) and not jnp.iscomplexobj(g) else 0.5
    arrays = {"learning_rate": jnp.asarray(value, rate)} if learning_rate is None else {}

    @jax.jit
    def step(g, state, params, arrays):
        return jadam.update(g, state, params, weight_decay=decay, **options, **arrays)

    state = jadam.init(params)
    before = avals(state)
    updates, state = step(g, state, params, arrays)
    assert avals(state) == before
    assert updates.dtype == g.dtype
    assert jnp.finfo(state.nu.dtype).bits >= 32
    assert not jnp.iscomplexobj(state.nu)
    expected = -value * (np.sign([0.5, -3.0]) + decay * np.array([1.0, -2.0]))
    # Computed in at least float32 and rounded once to the gradient's dtype.
    tolerance = max(float(jnp.finfo(g.dtype).eps) / 2, 1e-7)
    np.testing.assert_allclose(updates.astype("complex128"), expected, rtol=tolerance)


@pytest.mark.usefixtures("either_compilation")
def test_a_complex_parameter_has_one_real_second_moment():
    """|g|² as in optax: the step of a complex coordinate turns with its gradient's phase."""
    g = jnp.asarray([3 + 4j, -1e-3j, 0], jnp.complex64)
    updates, state = update(g, jadam.init(g), learning_rate=1.0)
    assert state.nu.dtype == jnp.float32
    expected = [-(0.6 + 0.8j), 1j, 0]
    np.testing.assert_allclose(updates, expected, rtol=2e-5)  # eps is 1e-5 of the second gradient


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_moments_of_16_bit_parameters_are_float32(dtype):
    """By default neither moment is stored with 8 or 11 bits."""
    state = jadam.init(jnp.ones(3, dtype))
    assert state.mu.dtype == state.nu.dtype == jnp.float32


@pytest.mark.usefixtures("either_compilation")
@pytest.mark.parametrize("nu_dtype", [None, "bfloat16"])
def test_the_second_moment_does_not_stick_where_bfloat16_does(nu_dtype):
    """bf16 parameters, 3,000 steps at |g| = 1, then 3,000 at .01: optax ends at .5 and .338.

    Exact: 1 - .999³⁰⁰⁰ = .950, then .95·.999³⁰⁰⁰ + ... = .047.
    """
    shape = (256,)
    state = jadam.init(jnp.ones(shape, jnp.bfloat16), nu_dtype=nu_dtype)

    def run(state, g):
        def step(state, _):
            return jadam.update(jnp.full(shape, g, jnp.bfloat16), state)[1], None

        return jax.lax.scan(step, state, length=3000)[0]

    run = jax.jit(run)
    state = run(state, 1.0)
    grown = 1 - 0.999**3000
    # float32: the accumulator's own rounding, 3e-5 (see test_math). bfloat16: an ulp is up to .8%;
    # the dither's count of steps is off by an ulp or two in each of the 4 binades on the way down,
    # measured 3% (random rounding: √(3000·.15) = 21 ulps).
    tolerance = 3e-5 if nu_dtype is None else 0.05
    np.testing.assert_allclose(state.nu.astype("float32"), grown, rtol=tolerance)
    state = run(state, 0.01)
    small = float(jnp.bfloat16(0.01)) ** 2
    shrunk = grown * 0.999**3000 + small * grown
    np.testing.assert_allclose(state.nu.astype("float32"), shrunk, rtol=tolerance)
    # Averaged over elements the dither leaves no bias: 0.02/√256 and a little.
    np.testing.assert_allclose(
        np.mean(np.asarray(state.nu, np.float32)), shrunk, rtol=tolerance / 8
    )


@pytest.mark.usefixtures("either_compilation")
def test_moments_in_16_bits_decay_to_zero():
    """A dead gradient's moments die out instead of rounding back to themselves."""
    g = jnp.ones(128)
    state = jadam.init(g, mu_dtype=jnp.bfloat16, nu_dtype=jnp.bfloat16)

    def step(state, _):
        return jadam.update(jnp.zeros(128), state, b1=0.99, b2=0.99)[1], None

    _, state = update(g, state)
    state, _ = jax.lax.scan(step, state, length=9000)
    # .99⁹⁰⁰⁰ = 5e-40, below float32's normal numbers; a few steps of slack for the last bits.
    assert jnp.max(jnp.abs(state.mu)) < 1e-35
    assert jnp.max(state.nu) < 1e-35


# Count, and what is known when


def test_count_saturates_and_the_update_stays_right():
    """At 2³¹-1 the count stops; Adam there has no bias left to correct."""
    g = jnp.asarray([2.0])
    largest = 2**31 - 1
    for count in (largest - 2, largest - 1, largest):
        state = jadam.AdamState(jnp.int32(count), 2.0 * jnp.ones(1), 4.0 * jnp.ones(1))
        updates, state = update(g, state, learning_rate=1.0, eps=0.0)
        assert state.count == min(count + 1, largest)
        assert state.count.dtype == jnp.int32
        assert ulps(updates, [-1.0]) <= 2  # m = 2 and √v = 2 stay what they are


@pytest.mark.usefixtures("quick_compilation")
def test_update_alone_is_adam_with_the_papers_defaults(standard_promotion):
    """`jadam.update(grads, state)` needs nothing else; optax fails under strict promotion."""
    params = tree_of_parameters()
    state, tx = jadam.init(params), optax.adam(1e-3)
    peer_state = tx.init(params)
    update, peer_update = jax.jit(jadam.update), jax.jit(tx.update)
    for seed in range(3):
        grads = gradients_like(params, seed)
        updates, state = update(grads, state)
        expected, peer_state = peer_update(grads, peer_state)
        # optax's float32 bias correction is off by 7e-6 in the first steps.
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5), updates, expected)


@pytest.mark.usefixtures("quick_compilation")
def test_state_has_optax_field_names():
    """`optax.tree.get(state, "mu")`, and a tuple whose first three are ScaleByAdamState's."""
    state = jadam.init(tree_of_parameters())
    assert state._fields[:3] == optax.ScaleByAdamState._fields
    for name in ("count", "mu", "nu"):
        assert optax.tree.get(state, name) is getattr(state, name)
    assert len(jax.tree.leaves(state)) == 1 + 2 * len(jax.tree.leaves(tree_of_parameters()))


@pytest.mark.usefixtures("quick_compilation")
def test_update_is_pure():
    """Nothing that was passed in changes, also when an error stops the update half-way."""
    params = tree_of_parameters()
    state, grads = jadam.init(params), gradients_like(params, 0)
    before = jax.tree.map(np.array, (params, state, grads))
    jax.jit(jadam.update)(grads, state, params, weight_decay=0.1)
    with pytest.raises(ValueError, match="shape"):
        jadam.update({**grads, "empty": jnp.ones(3)}, state)
    jax.tree.map(np.testing.assert_array_equal, before, (params, state, grads))


# Transformations of JAX


def test_nothing_recompiles_and_donation_aliases_everything():
    """One compilation for all steps and learning rates; moments are updated in place."""
    params = tree_of_parameters()

    @functools.partial(jax.jit, donate_argnums=(0, 2))
    def step(params, grads, state, learning_rate):
        updates, state = jadam.update(grads, state, learning_rate=learning_rate)
        return optax.apply_updates(params, updates), state

    state = jadam.init(params)
    lowered = step.lower(params, gradients_like(params, 0), state, 1e-3)
    leaves = jax.tree.leaves((params, state))
    memory = lowered.compile().memory_analysis()
    assert memory.alias_size_in_bytes == sum(x.nbytes for x in leaves)
    for seed in range(3):
        grads = gradients_like(params, seed)
        params, state = step(params, grads, state, 1e-3 * (seed + 1))
    assert step._cache_size() == 1


def test_scan_cond_vmap_and_ahead_of_time_agree_with_a_loop():
    """Every way that JAX has of running the update gives the same numbers."""
    rng = np.random.default_rng(0)
    gradients = jnp.asarray(rng.standard_normal((6, 4)), jnp.float32)
    state = jadam.init(gradients[0])
    compiled = update.lower(gradients[0], state).compile()
    looped = []
    for g in gradients:
        updates, state = compiled(g, state)
        looped.append(updates)

    def step(state, g):
        updates, new = jax.lax.cond(jnp.any(g != 0), jadam.update, lambda g, s: (g, s), g, state)
        return new, updates

    scanned, updates = jax.lax.scan(step, jadam.init(gradients[0]), gradients)
    # 4 ulps: XLA may contract a product and a sum in one of the programs and not in the other.
    close = functools.partial(np.testing.assert_allclose, rtol=4 * 2**-23)
    close(updates, np.stack(looped))
    jax.tree.map(close, scanned, state)

    rates = jnp.asarray([1e-3, 1e-2, 1.0])
    batched = jax.vmap(
        lambda lr: jadam.update(gradients[0], jadam.init(gradients[0]), learning_rate=lr)
    )
    close(batched(rates)[0], np.outer(rates, looped[0] / 1e-3))
    abstract = jax.eval_shape(jadam.update, gradients[0], state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract[1]) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )


def test_update_under_debug_nans():
    """No hidden NaN is computed and masked away, also not at 0, and not at eps = 0."""
    with jax.debug_nans(True):
        g = jnp.asarray([0.0, 1.0, 1e20], jnp.float32)
        state = jadam.init(g)
        for eps in (0.0, 1e-8):
            updates, state = update(g, state, eps=eps)
            jax.block_until_ready(updates)


def test_sharded_updates_equal_those_of_one_device():
    """jit over a mesh, shard_map and pmap: bit for bit, and no collective in the program."""
    rng = np.random.default_rng(0)
    g = jnp.asarray(rng.standard_normal((16, 128)), jnp.float32)
    init = functools.partial(jadam.init, nu_dtype=jnp.bfloat16)
    _, once = update(g, init(g))
    expected, _ = update(g, once)

    mesh = Mesh(np.array(jax.devices()), "data")
    sharding = NamedSharding(mesh, P("data"))
    g_sharded = jax.device_put(g, sharding)
    state = init(g_sharded)
    assert state.mu.sharding == state.nu.sharding == sharding
    _, state = update(g_sharded, state)
    updates, _ = update(g_sharded, state)
    np.testing.assert_array_equal(updates, expected)
    assert updates.sharding.is_equivalent_to(sharding, 2)
    program = update.lower(g_sharded, state).compile().as_text()
    for collective in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
        assert collective not in program

    specs = jadam.AdamState(P(), P("data"), P("data"))
    mapped = jax.jit(
        jax.shard_map(
            jadam.update, mesh=mesh, in_specs=(P("data"), specs), out_specs=(P("data"), specs)
        )
    )
    np.testing.assert_array_equal(mapped(g_sharded, state)[0], expected)

    rows = g.reshape(8, 2, 128)
    counts = jnp.broadcast_to(once.count, (8,))
    split = jadam.AdamState(counts, once.mu.reshape(rows.shape), once.nu.reshape(rows.shape))
    updates, _ = jax.pmap(jadam.update)(rows, split)
    np.testing.assert_array_equal(updates.reshape(g.shape), expected)


@pytest.mark.parametrize("flags", ["standard", "strict"])
def test_promotion_modes_and_x64_give_the_same_numbers(flags):
    """float32 training is bit for bit the same whatever JAX is configured to."""
    g = np.asarray([0.5, -2.0, 0.0], np.float32)

    def run():
        state = jadam.init(jnp.asarray(g))
        for _ in range(3):
            updates, state = update(jnp.asarray(g), state, jnp.asarray(g), weight_decay=0.1)
        return np.asarray(updates), jax.tree.map(np.asarray, state)

    expected = run()
    with jax.numpy_dtype_promotion(flags), jax.enable_x64(True):
        jax.tree.map(np.testing.assert_array_equal, run(), expected)
