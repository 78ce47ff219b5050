"""Moments in 8 and 4 bits: never beyond Adam's bound, never stale, at home wherever float32 is."""

import functools
from types import SimpleNamespace

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import reference
import test_drop_in
from helpers import FAMILY, gradients_like
from hypothesis import given, settings
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jadam
from jadam._storage import storage_of
from jadam._storage.curve import Curve

EIGHT_BITS = {"mu_dtype": "int8", "nu_dtype": "uint8", "min_size": 0}
FOUR_BITS = {"mu_dtype": "int4", "nu_dtype": "uint4", "min_size": 0}
CODES = {"8 bits": EIGHT_BITS, "4 bits": FOUR_BITS}
BOTH = {"8 bits": jnp.uint16, "4 bits": jnp.uint8}
each_code = pytest.mark.parametrize("codes", CODES)


@functools.partial(jax.jit, static_argnames=("codes", "b1", "b2", "eps", "kernel"))
def run(gradients, codes="8 bits", b1=0.9, b2=0.999, eps=0.0, kernel="auto"):
    """The updates over lr along gradients [steps, ...], and the last state."""
    rates = {"b1": b1, "b2": b2, "eps": eps}

    def step(state, g):
        updates, state = jadam.update(g, state, learning_rate=1.0, kernel=kernel, **rates)
        return state, updates

    state, updates = jax.lax.scan(step, jadam.init(gradients[0], **CODES[codes]), gradients)
    return updates, state


def moments(state, b1=0.9, b2=0.999):
    """m and v, decoded as the next update would."""
    member, float32 = jadam._members.ADAM, jnp.dtype("float32")
    relation = member.relation_at(jadam._math.Time.of(state.count, float32), b1=b1, b2=b2)
    stored = (state.mu, state.nu)
    return storage_of(member.moments, stored).load(stored, lambda: relation, float32)


def bounds(steps, b1=0.9, b2=0.999):
    """Adam's own bound for steps 1 to `steps`, as a column."""
    return np.array([reference.step_bound(t, b1, b2) for t in range(1, steps + 1)])


# 1e-5: float32 rounds m and v by an ulp or two in each step, as in test_math.
SLACK = 1 + 1e-5


@each_code
@settings(max_examples=100)
@given(
    gradients=hnp.arrays(
        np.float32,
        (48, 32),
        elements=st.floats(-(2.0**60), 2.0**60, width=32) | st.sampled_from([0.0, 1.0, -1e-3]),
        fill=st.just(np.float32(0)),
    )
)
def test_no_update_is_beyond_adams_bound(codes, gradients):
    """For every gradient sequence: m is stored as a share of what √v allows."""
    updates, _ = run(jnp.asarray(gradients), codes)
    assert np.all(np.abs(updates) <= bounds(48)[:, None] * SLACK)


RATES = [(0.9, 0.999), (0.9, 0.95), (0.95, 0.99999), (0.5, 0.9)]


@pytest.mark.parametrize(
    ("codes", "b1", "b2"),
    [  # each pair of rates and each code; in `make soak` all together
        ("8 bits", *RATES[0]),
        ("4 bits", *RATES[1]),
        ("8 bits", *RATES[2]),
        ("4 bits", *RATES[3]),
        *(
            pytest.param(codes, *rates, marks=pytest.mark.soak)
            for codes, own in (("8 bits", RATES[1::2]), ("4 bits", RATES[::2]))
            for rates in own
        ),
    ],
)
def test_no_update_is_beyond_the_bound_with_hostile_gradients(codes, b1, b2):
    """Jumps over 40 decades, zeros and heavy tails, 300 steps of 4,096 elements."""
    rng = np.random.default_rng(0)
    shape = (300, 32, 128)
    scale = (10.0 ** rng.uniform(-17, 17, (6, 32, 128))).repeat(50, 0)
    gradients = np.where(rng.random(shape) < 0.7, scale * rng.standard_t(1, shape), 0)
    updates, _ = run(jnp.asarray(gradients, jnp.float32), codes, b1=b1, b2=b2)
    largest = np.abs(np.asarray(updates)).max(axis=(1, 2))
    assert np.all(largest <= bounds(300, b1, b2) * SLACK)


def test_no_update_is_beyond_the_bound_where_flashoptims_is_96129():
    """One block, one gradient alternating ±1, the others 1e-3 with one at 0 each 50 steps."""
    t = np.arange(2000)
    gradients = np.full((2000, 32), 1e-3, np.float32)
    gradients[:, 0] = np.where(t % 2, -1, 1)
    gradients[::50, 1] = 0
    updates, _ = run(jnp.asarray(gradients), eps=1e-8)
    updates = np.abs(np.asarray(updates))
    assert np.all(updates <= bounds(2000)[:, None] * SLACK)
    # Exact Adam never leaves 1.0 for the constant ones; the codes' errors are 6% for v, 3% for m.
    assert updates[:, 2:].max() <= 1.3


@pytest.mark.usefixtures("either_compilation")
@each_code
def test_shrunken_gradients_leave_nothing_stale(codes):
    """One element of a block keeps its gradient, the others shrink 100x for 3,000 steps."""
    rng = np.random.default_rng(0)
    gradients = rng.standard_normal((4000, 8, 128)) * np.exp(rng.standard_normal((8, 128)))
    gradients[1000:, :, 1:] *= 0.01
    gradients = gradients.astype(np.float32)
    _, state = run(jnp.asarray(gradients), codes)
    exact = np.zeros((8, 128))
    for g in gradients.astype(np.float64):
        exact += 0.001 * (g * g - exact)
    stored = np.sqrt(np.asarray(moments(state)[1], np.float64) / exact)[:, 1:]
    if codes == "8 bits":
        # The requirement on the code; measured 1.004, .88 and 1.14 (experiments/bench).
        assert abs(stored.mean() - 1) <= 0.02
        assert np.all(np.abs(np.quantile(stored, [0.01, 0.99]) - 1) <= 0.15)
    else:
        # Measured .968, and percentiles of .25 and 2.7. A lattice to nearest has a mean over 2.
        assert abs(stored.mean() - 1) <= 0.1
        assert np.all(np.abs(np.log2(np.quantile(stored, [0.01, 0.99]))) <= 2.1)  # two levels


@pytest.mark.usefixtures("either_compilation")
@each_code
@pytest.mark.parametrize("neighbour", [0.0, 1.0])
def test_a_dead_gradients_moments_go_to_zero(codes, neighbour):
    """Alone in its block, and beside one that lives."""
    g = np.zeros((2, 128), np.float32)
    g[:, 0] = neighbour
    state = run(jnp.ones((3, 2, 128)), codes)[1]

    def step(state, _):
        return jadam.update(jnp.asarray(g), state, b2=0.99)[1], None

    # √v halves in 138 steps at b2 = .99; 16 octaves, or 126 down to float32's smallest.
    state, _ = jax.lax.scan(step, state, length=25_000)
    m, v = moments(state, b2=0.99)
    dead = g == 0
    assert np.abs(np.asarray(m)[dead]).max() < 1e-17
    assert np.asarray(v)[dead].max() < 1e-34
    if neighbour:
        # A code is 4% of v in 8 bits, a factor of 4 in 4 bits.
        of_v = 1.1 if codes == "8 bits" else 4.4
        assert np.all(np.abs(np.log(np.asarray(v)[~dead])) <= np.log(of_v))


@pytest.mark.usefixtures("either_compilation")
@each_code
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_gradient_poisons_its_own_element_only(codes, bad):
    """As in exact Adam: the block's other elements go on."""
    gradients = np.ones((20, 2, 128), np.float32)
    gradients[5, 0, 3] = bad
    updates, _ = run(jnp.asarray(gradients), codes)
    poisoned = ~np.isfinite(np.asarray(updates))
    expected = np.zeros_like(poisoned)
    expected[5:, 0, 3] = True
    np.testing.assert_array_equal(poisoned, expected)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(("codes", "most"), [("8 bits", 2.1), ("4 bits", 1.1)])
@pytest.mark.parametrize(
    "shape", [(64, 128), (3, 257), (5000,), (5, 5, 32, 64), (2, 1000), (100, 33)]
)
def test_both_moments_take_few_bytes(shape, codes, most):
    """Scales included, also where the last axis is no multiple of a block."""
    tx = jadam.adam(1e-3, **CODES[codes])
    params = jnp.ones(shape)
    state = tx.init(params)
    assert sum(x.nbytes for x in jax.tree.leaves(state[0][1:])) <= most * params.size
    _, after = jax.eval_shape(tx.update, params, state)
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)


@pytest.mark.usefixtures("quick_compilation")
def test_small_narrow_and_wide_leaves_keep_floats():
    """Under min_size, under 32 along the last axis, float64 and complex: no codes."""
    with jax.enable_x64(True):
        params = {
            "small": jnp.ones((10, 100), "float32"),
            "narrow": jnp.ones((1000, 10), "float32"),
            "double": jnp.ones((100, 100), "float64"),
            "complex": jnp.ones((100, 100), "complex64"),
            "coded": jnp.ones((100, 100), "bfloat16"),
        }
        state = jadam.init(params, mu_dtype="int8", nu_dtype="uint8")
        dtypes = {name: str(leaf.dtype) for name, leaf in state.mu.items()}
    assert dtypes == {
        "small": "float32",
        "narrow": "float32",
        "double": "float64",
        "complex": "complex64",
        "coded": "uint16",
    }


PLAIN = ("adam", "nadam", "nadam_dozat", "amsgrad", "amsgrad_corrected", "adamax", "radam")
PLAIN += ("ademamix", "ademamix_warmup")
FEW = ("adam", "amsgrad", "adamax", "radam", "ademamix")  # a kind of state each


@pytest.mark.usefixtures("either_compilation")
@pytest.mark.parametrize(
    ("case", "codes"),
    [  # parameters are 0 here, and so is their decay
        pytest.param(
            case,
            codes,
            marks=[pytest.mark.soak] * (case.name not in (PLAIN if codes == "8 bits" else FEW)),
            id=f"{case}-{codes}",
        )
        for case in FAMILY
        for codes in CODES
    ],
)
def test_the_family_follows_float64(case, codes):
    """150 steps of every member: the normalized mean squared error of its updates."""
    rng = np.random.default_rng(1)
    gradients = (rng.standard_normal((150, 4, 200)) + 0.2) * np.exp(rng.standard_normal((4, 200)))
    gradients = gradients.astype(np.float32)
    params = jnp.zeros((4, 200))
    tx = case(1.0, **CODES[codes])
    state = tx.init(params)
    before = jax.tree.map(jax.typeof, state)

    def step(state, g):
        updates, state = tx.update(g, state, params)
        return state, updates

    state, updates = jax.jit(lambda s, g: jax.lax.scan(step, s, g))(state, jnp.asarray(gradients))
    assert jax.tree.map(jax.typeof, state) == before
    assert state[0].mu.dtype == BOTH[codes]
    member = reference.Member(**{"kind": "adam", **case.reference})
    exact = np.stack([-member(g) for g in gradients])
    error = np.sum((np.asarray(updates, np.float64) - exact) ** 2) / np.sum(exact**2)
    # Measured 1.2e-3 (AdaMax) to 3.9e-3 (AMSGrad) over 300 steps, in 4 bits 0.017 (RAdam) to 0.22
    # (AMSGrad); v's dither gives most of it, in 4 bits with m's.
    assert error <= {"8 bits": 6e-3, "4 bits": 0.3}[codes]


@pytest.mark.usefixtures("either_compilation")
@each_code
@pytest.mark.parametrize("kernel", ["auto", "xla"])
def test_the_mean_update_is_adams(codes, kernel):
    """Codes are wrong by chance, not on average: stationary gradients, 3,000 steps."""
    rng = np.random.default_rng(3)
    gradients = (rng.standard_normal((3000, 4, 128)) + 0.1) * np.exp(rng.standard_normal((4, 128)))
    gradients = gradients.astype(np.float32)
    updates, _ = run(jnp.asarray(gradients), codes, b2=0.95, kernel=kernel)
    exact = -np.stack(list(reference.directions(gradients, b1=0.9, b2=0.95, eps=0.0)))
    gain = np.sum(np.asarray(updates, np.float64) * exact) / np.sum(exact**2)
    # The rounding of a coarse lattice that keeps the mean of log v is short by 8% here.
    assert abs(gain - 1) <= {"8 bits": 0.01, "4 bits": 0.025}[codes]


@pytest.mark.usefixtures("either_compilation")
@pytest.mark.parametrize(("b1", "b2"), [(0.9, 0.95), (0.95, 0.99999), (0.99, 0.9), (0.0, 0.999)])
def test_other_decay_rates_follow_float64(b1, b2):
    """The curve of m's code follows b1, b2 and t: early at b2 = .99999 m/√v is 100 times larger."""
    rng = np.random.default_rng(2)
    gradients = (rng.standard_normal((300, 4, 128)) + 0.2) * np.exp(rng.standard_normal((4, 128)))
    updates, _ = run(jnp.asarray(gradients, jnp.float32), b1=b1, b2=b2)
    gradients = gradients.astype(np.float32)
    exact = np.stack([-d for d in reference.directions(gradients, b1=b1, b2=b2, eps=0.0)])
    error = np.sum((np.asarray(updates, np.float64) - exact) ** 2) / np.sum(exact**2)
    # As for the defaults above; at b1 = .99 a rounding of m stays for 100 steps.
    assert error <= (2e-2 if b1 == 0.99 else 6e-3)


@pytest.mark.usefixtures("quick_compilation")
def test_a_first_moment_past_the_limit_has_the_last_code():
    """With few codes the one below stands for a third of it: a cut m is cut to the limit."""
    curve, dither = Curve(0.458, 1 + 0.458 / 7.27), jnp.linspace(0, 1 - 2.0**-24, 1001)
    for r in (7.28, 8.0, 14.0, 1e6):
        codes = curve.compress(jnp.full_like(dither, r), dither, 10, unbiased=True)
        np.testing.assert_array_equal(codes, 10)


@pytest.mark.usefixtures("either_compilation")
def test_amsgrads_maximum_never_falls():
    """Also in codes: while gradients shrink, v_max stays to a code, 2.2% of √v."""
    gradients = np.ones((600, 2, 64), np.float32)
    gradients[100:] = 0.1
    tx = jadam.amsgrad(1.0, **EIGHT_BITS)

    def step(state, g):
        updates, state = tx.update(g, state)
        return state, updates

    _, updates = jax.lax.scan(step, tx.init(gradients[0]), jnp.asarray(gradients))
    member = reference.Member("amsgrad")
    exact = np.stack([-member(g) for g in gradients])
    # m's error is a few percent of the update, v_max's at most one code more than exact.
    np.testing.assert_allclose(np.asarray(updates)[200:], exact[200:], rtol=0.15)
    assert np.mean(np.asarray(updates)[200:] / exact[200:]) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("codes", ["8 bits", pytest.param("4 bits", marks=pytest.mark.soak)])
def test_the_same_bits_on_every_run_and_under_any_sharding(codes):
    """Deterministic: rows or whole blocks on eight devices give the codes of one, no collective."""
    rng = np.random.default_rng(0)
    g = jnp.asarray(rng.standard_normal((16, 1024)), jnp.float32)
    step = jax.jit(jadam.update)

    def three(g):
        state = jadam.init(g, **CODES[codes])
        for _ in range(3):
            updates, state = step(g, state)
        return updates, state

    expected = three(g)
    jax.tree.map(np.testing.assert_array_equal, three(g), expected)
    mesh = Mesh(np.array(jax.devices()), "x")
    for spec in (P("x"), P(None, "x")):
        sharded = jax.device_put(g, NamedSharding(mesh, spec))
        updates, state = three(sharded)
        jax.tree.map(np.testing.assert_array_equal, (updates, state), expected)
        for leaf in (state.mu, state.nu):
            assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
            assert leaf.addressable_shards[0].data.size == leaf.size // 8
        program = step.lower(sharded, state).compile().as_text()
        for collective in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
            assert collective not in program


@each_code
def test_the_compiled_step_holds_no_float32_copy_of_the_state(codes):
    """Under donation: parameters and codes are updated in place, temporaries stay small."""
    params = {"w": jnp.ones((1024, 1024))}
    tx = jadam.adam(1e-3, **CODES[codes], kernel="xla")
    state = tx.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    memory = step.lower(params, state, params).compile().memory_analysis()
    held = sum(x.nbytes for x in jax.tree.leaves((params, state)))
    assert memory.alias_size_in_bytes == held
    # Two float32 moments would be 8 bytes a parameter. XLA:CPU makes parameters and codes in two
    # loops, so the second one reads a copy of the old codes: 2 bytes or 1, and those of the blocks.
    assert memory.temp_size_in_bytes < {"8 bits": 2.2, "4 bits": 1.2}[codes] * params["w"].size


@pytest.mark.usefixtures("either_compilation")
@each_code
def test_a_checkpoint_keeps_every_bit(tmp_path, codes):
    """Orbax, with codes, tops and AMSGrad's maximum."""
    params = {"kernel": jnp.ones((8, 160)), "bias": jnp.ones(8)}
    for make in (jadam.adamw, jadam.amsgrad):
        tx = make(1e-3, **CODES[codes])
        state, update = tx.init(params), jax.jit(tx.update)
        for seed in range(3):
            _, state = update(gradients_like(params, seed), state, params)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / make.__name__, state)
            checkpointer.wait_until_finished()
            abstract = jax.eval_shape(tx.init, params)
            restored = checkpointer.restore(tmp_path / make.__name__, abstract)
        jax.tree.map(np.testing.assert_array_equal, restored, state)
        assert jax.tree.structure(restored) == jax.tree.structure(state)


IN_EIGHT_BITS = SimpleNamespace(
    adam=functools.partial(jadam.adam, **EIGHT_BITS),
    adamw=functools.partial(jadam.adamw, **EIGHT_BITS),
    scale_by_adam=functools.partial(jadam.scale_by_adam, **EIGHT_BITS),
    **{name: getattr(jadam, name) for name in ("nadam", "amsgrad", "adamax", "radam")},
)


narrow_problem = test_drop_in.problem


def wide_problem():
    """test_drop_in's parameters with axes wide enough for codes."""
    return jax.tree.map(
        lambda p: p if jnp.ndim(p) == 0 else jnp.tile(p, (1,) * (p.ndim - 1) + (32,)),
        narrow_problem(),
    )


# One for each thing that a wrapper does with a state; the others are in `make soak`.
SHORT = {"schedule", "lamb", "masked_adamw", "partition", "MultiSteps", "apply_if_finite"}
SHORT |= {"conditionally_mask", "flatten", "lookahead", "schedule_free", "sam_opaque", "extra_args"}


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    "program",
    # inject_hyperparams takes the factory itself, see the next test; one passes mu_dtype by place.
    [
        p if p.name in SHORT else pytest.param(p, marks=pytest.mark.soak)
        for p in test_drop_in.PROGRAMS
        if "inject" not in p.name and p.name != "positional"
    ],
    ids=str,
)
def test_every_composition_of_the_drop_in_list_works_in_8_bits(program, monkeypatch, request):
    """The loss falls as in float32, nothing changes its type, nothing compiles twice."""
    request.getfixturevalue("standard_promotion")
    monkeypatch.setattr(test_drop_in, "problem", wide_problem)
    trained = test_drop_in.train(program, IN_EIGHT_BITS)
    avals = [jax.tree.map(jax.typeof, state) for state in trained.states]
    assert all(later == avals[0] for later in avals)
    assert trained.compilations == 1
    full = test_drop_in.train(program, jadam)
    for ours, theirs, start in zip(
        *map(jax.tree.leaves, (trained.params, full.params, program.wrap(wide_problem()))),
        strict=True,
    ):
        moved = np.sqrt(np.mean((np.asarray(theirs) - np.asarray(start)) ** 2))
        difference = np.sqrt(np.mean((np.asarray(ours) - np.asarray(theirs)) ** 2))
        # Updates differ by 6% rms; ten steps of a loop that is not convex amplify it somewhat.
        assert difference <= 0.3 * moved + 1e-6


@pytest.mark.usefixtures("quick_compilation")
def test_injected_hyperparameters_in_8_bits():
    """Traced b1 and b2: the codes' curve follows them."""
    make = optax.inject_hyperparams(jadam.adam, static_args=("mu_dtype", "nu_dtype", "min_size"))
    tx = make(1e-2, **EIGHT_BITS)
    params = {"w": jnp.ones((4, 64))}
    state = tx.init(params)
    step = jax.jit(tx.update)
    for seed in range(5):
        updates, state = step(gradients_like(params, seed), state, params)
    assert step._cache_size() == 1
    assert np.all(np.isfinite(updates["w"]))
    assert optax.tree.get(state, "mu")["w"].dtype == jnp.uint16


@pytest.mark.usefixtures("quick_compilation")
def test_codes_for_one_moment_alone_are_refused():
    """m is stored relative to v, so there is one code for both."""
    for options in (
        {"mu_dtype": "int8"},
        {"nu_dtype": "uint8"},
        {"mu_dtype": "int8", "nu_dtype": "float32"},
        {"mu_dtype": "int4"},
        {"mu_dtype": "int4", "nu_dtype": "uint8"},
    ):
        with pytest.raises(ValueError, match="mu_dtype, nu_dtype: expected both codes"):
            jadam.adam(1e-3, **options)
    for value in (-1, 1.5, "all", True):
        with pytest.raises((ValueError, TypeError), match="min_size: expected a"):
            jadam.adam(1e-3, mu_dtype="int8", nu_dtype="uint8", min_size=value)


@pytest.mark.usefixtures("quick_compilation")
def test_codes_of_another_shape_are_refused():
    """A state whose tops do not belong to its codes is named."""
    g = {"w": jnp.ones((4, 256))}
    state = jadam.init(g, **EIGHT_BITS)
    with pytest.raises(ValueError, match=r"expected shape \(4, 1\) of state.nu\['w'\]"):
        jadam.update(g, state._replace(nu={"w": state.nu["w"][:, :1]}))
