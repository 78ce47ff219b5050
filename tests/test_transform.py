"""The family against other libraries, and each member's behaviour as a transformation."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import FAMILY, each_member, gradients_like, tree_of_parameters
from trajectories import generate

import jadam

RECORDED = Path(generate.__file__).parent


def trajectory(tx, gradients, params):
    """The parameters after each of the given gradients, in one scan."""

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return jax.jit(lambda c, g: jax.lax.scan(step, c, g))((params, tx.init(params)), gradients)[1]


# Parity in float64


@pytest.mark.usefixtures("either_compilation")
@pytest.mark.parametrize("case", [case for case in FAMILY if case.peer], ids=str)
def test_a_thousand_steps_are_optax_in_float64(x64, standard_promotion, case):
    """Where optax has the member, both compute the same numbers when rounding is out of the way.

    (optax's members raise under strict promotion.)
    """
    recorded = np.load(RECORDED / "recorded.npz")
    gradients, params = jnp.asarray(recorded["gradients"]), jnp.asarray(recorded["initial"])
    ours = trajectory(case(1e-3), gradients, params)
    theirs = trajectory(case.optax(1e-3), gradients, params)
    # Parameters of size 1 after 1,000 sums: 1,000 roundings of 1e-16, and optax's 1 - b**t, which
    # loses three digits in the first steps (RAdam's length three more).
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


def corrected_eps(eps, b2=0.999):
    """Keras's Adam and torch's RAdam add eps before the bias correction: the paper's ε̂."""
    return lambda t: eps / jnp.sqrt(-jnp.expm1(t * jnp.log(b2)))


def pure(member, learning_rate, weight_decay=0.0, eps_of_t=None, **options):
    """A member as (init, update) on plain arrays, with an eps that may depend on t."""

    def make(t):
        if eps_of_t is not None:
            options["eps"] = eps_of_t(t)
        return member(learning_rate, **options)

    def update(g, state, params):
        t = state[0].count.astype("float64") + 1
        updates, state = make(t).update(g, state, params)
        return updates - learning_rate * weight_decay * params, state

    return optax.GradientTransformation(make(jnp.float64(1)).init, update)


TORCH = {
    "torch_adam": (jadam.adam, {}),
    "torch_adam_b_0.8_0.99": (jadam.adam, {"b1": 0.8, "b2": 0.99}),
    "torch_adam_b2_0.99999": (jadam.adam, {"b2": 0.99999}),
    "torch_adam_eps_1e-6": (jadam.adam, {"eps": 1e-6}),
    "torch_amsgrad": (jadam.amsgrad, {}),
    "torch_adamw": (jadam.adamw, {"weight_decay": 1e-2}),
    "torch_nadam": (jadam.nadam, {"learning_rate": 2e-3, "momentum_decay": 4e-3}),
    "torch_nadamw": (
        jadam.nadamw,
        {"learning_rate": 2e-3, "momentum_decay": 4e-3, "weight_decay": 1e-2},
    ),
    "torch_adamax": (jadam.adamax, {"learning_rate": 2e-3}),
    "torch_adamax_eps_1e-6": (jadam.adamax, {"learning_rate": 2e-3, "eps": 1e-6}),
    "keras_nadam": (jadam.nadam, {"momentum_decay": 1.0, "eps": 1e-7}),
}
PURE = {
    "torch_adam_l2": None,
    "torch_adamw_amsgrad": {"member": jadam.amsgrad, "weight_decay": 1e-2},
    "torch_radam": {"member": jadam.radam, "eps_of_t": corrected_eps(1e-8)},
    "torch_radam_eps_1e-6": {"member": jadam.radam, "eps_of_t": corrected_eps(1e-6)},
    "torch_radamw": {
        "member": jadam.radam,
        "eps_of_t": corrected_eps(1e-8),
        "weight_decay": 1e-2,
    },
    "keras_adam": {"member": jadam.adam, "eps_of_t": corrected_eps(1e-7)},
    "keras_amsgrad": {"member": jadam.amsgrad, "eps_of_t": corrected_eps(1e-7)},
    "keras_adamw": {
        "member": jadam.adam,
        "eps_of_t": corrected_eps(1e-7),
        "weight_decay": 4e-3,
    },
}


def transformation_like(name):
    """jadam's transformation for a recorded case of torch or Keras."""
    if name in TORCH:
        member, options = TORCH[name]
        return member(**{"learning_rate": 1e-3, **options})
    if name == "torch_adam_l2":
        return optax.chain(optax.add_decayed_weights(1e-2), jadam.adam(1e-3))
    return pure(learning_rate=1e-3, **PURE[name])


@pytest.mark.usefixtures("either_compilation")
@pytest.mark.parametrize("name", [*TORCH, *PURE])
def test_a_thousand_steps_are_torchs_and_kerass(x64, name):
    """Against the recorded trajectories of torch and Keras, versions in recorded.json."""
    recorded = np.load(RECORDED / "recorded.npz")
    gradients, params = jnp.asarray(recorded["gradients"]), jnp.asarray(recorded["initial"])
    ours = trajectory(transformation_like(name), gradients, params)[recorded["steps"] - 1]
    # 1e-12: the recordings agree with the formulas to 1.1e-14, with b2 = .99999 to 2.7e-15, and
    # decay in another order of operations (p - lr·wd·p) adds 1.3e-13.
    np.testing.assert_allclose(ours, recorded[name], rtol=0, atol=1e-12)


def test_every_recorded_trajectory_is_compared():
    """A recording is either in the tables above or known to be another algorithm."""
    cases = set(json.loads((RECORDED / "recorded.json").read_text())["cases"])
    # Keras's AdaMax adds eps to u, outside the maximum.
    assert cases - set(TORCH) - set(PURE) == {"keras_adamax"}
    assert cases == set(generate.CASES)


@pytest.mark.parametrize("library", ["torch", "keras"])
def test_the_recordings_are_what_the_installed_library_computes(library):
    """The live comparison, where the library is installed."""
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed: the recorded trajectories stand for it")
    recorded = generate.recorded()
    for name in generate.CASES:
        if name.startswith(library):
            live = generate.trajectory(name, recorded["gradients"])
            # Another version or backend may sum in another order: 1,000 roundings of 1e-16.
            np.testing.assert_allclose(live, recorded[name], rtol=0, atol=1e-12, err_msg=name)


# The two definitions of AMSGrad


@pytest.mark.usefixtures("quick_compilation")
def test_the_definitions_of_amsgrad_differ_and_are_named():
    """After a large first gradient the corrected maximum stays large, the raw one is outgrown."""
    gradients = jnp.asarray([[1.0], *[[0.1]] * 200])
    raw = trajectory(jadam.amsgrad(1e-3), gradients, jnp.zeros(1))
    corrected = trajectory(jadam.amsgrad(1e-3, maximum="corrected"), gradients, jnp.zeros(1))
    assert float(jnp.abs(raw[-1] - corrected[-1])[0]) > 1e-2


@pytest.mark.usefixtures("quick_compilation")
def test_amsgrad_as_the_paper_has_it():
    """Without corrections: m/(√max(v) + eps), Reddi, Kale & Kumar (2018), Algorithm 2."""
    g = jnp.asarray([0.5, -2.0])
    tx = jadam.amsgrad(1.0, bias_correction_mu=False, bias_correction_nu=False)
    updates, _ = tx.update(g, tx.init(g))
    # 1e-6: a handful of float32 roundings; (1-b1)/√(1-b2) is the first step of the paper.
    np.testing.assert_allclose(updates, -np.sign(g) * 0.1 / np.sqrt(0.001), rtol=1e-6)


def test_nesterov_is_nadam():
    """`nesterov=True` on adam and adamw, and on scale_by_adam, is nadam and nadamw."""
    g = jnp.asarray([0.5, -2.0])
    chains = [
        jadam.nadam(1e-3),
        jadam.adam(1e-3, nesterov=True),
        optax.chain(jadam.scale_by_adam(nesterov=True), optax.scale(-1e-3)),
    ]
    gradients = jnp.stack([g, -g, 2 * g])
    first, *others = (trajectory(tx, gradients, g) for tx in chains)
    for other in others:
        # The chain rounds the direction before the learning rate: an ulp of float32.
        np.testing.assert_allclose(other, first, rtol=2**-22)
    for decay in (0.0, 0.1):
        np.testing.assert_array_equal(
            trajectory(jadam.nadamw(1e-3, weight_decay=decay), gradients, g),
            trajectory(jadam.adamw(1e-3, weight_decay=decay, nesterov=True), gradients, g),
        )


# Behaviour of every member


# A matrix and a scalar, for programs that are compiled for each member.
SMALL = {name: tree_of_parameters()[name] for name in ("dense", "scale")}
SMALL["dense"].pop("bias")
# Other numbers in the same program are another member only to the tests of values.
each_structure = {
    "argvalues": [case for case in FAMILY if case.name not in ("adam_eps_root", "adam_betas")],
    "ids": str,
}


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("case", **each_structure)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
def test_avals_never_change(case, dtype):
    """The state of step n has the avals of init: lax.scan accepts it."""
    params = tree_of_parameters(dtype)
    tx = case()
    state = tx.init(params)
    before = jax.tree.map(jax.typeof, state)
    updates, state = jax.eval_shape(tx.update, gradients_like(params, 0), state, params)
    assert jax.tree.map(jax.typeof, state) == before
    assert jax.tree.map(lambda x: (x.shape, x.dtype), updates) == jax.tree.map(
        lambda x: (x.shape, x.dtype), params
    )
    assert jax.tree.map(jax.typeof, jax.eval_shape(tx.init, params)) == before


@pytest.mark.usefixtures("either_compilation")
@pytest.mark.parametrize("case", **each_structure)
def test_learning_rate_and_decay_by_schedule(case):
    """A schedule is asked for the number of updates made, 0 first, as optax asks it."""
    params = SMALL
    grads = gradients_like(params, 0)
    schedule = optax.piecewise_constant_schedule(0.5, {1: 0.5})  # 0.5, then 0.25
    scheduled, constant = case(schedule), case(0.5)
    state, constant_state = scheduled.init(params), constant.init(params)
    update, constant_update = jax.jit(scheduled.update), jax.jit(constant.update)
    for factor in (1.0, 0.5, 0.5):
        updates, state = update(grads, state, params)
        expected, constant_state = constant_update(grads, constant_state, params)
        # Powers of two, so the product with the learning rate is exact.
        jax.tree.map(
            lambda u, e, f=factor: np.testing.assert_array_equal(u, f * np.asarray(e)),
            updates,
            expected,
        )


@pytest.mark.usefixtures("quick_compilation")
def test_weight_decay_by_schedule_and_mask():
    """Decay by schedule, and a mask as a tree, as a prefix and as a function."""
    params = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "scale": jnp.ones(())}
    zeros = jax.tree.map(jnp.zeros_like, params)
    masks = [
        {"dense": {"kernel": True, "bias": False}, "scale": False},
        lambda p: jax.tree.map(lambda x: x.ndim > 1, p),
    ]
    for mask in masks:
        tx = jadam.adamw(1.0, weight_decay=lambda count: 0.5 / (1 + count), mask=mask)
        state = tx.init(params)
        for decay in (0.5, 0.25):
            updates, state = jax.jit(tx.update)(zeros, state, params)
            np.testing.assert_array_equal(updates["dense"]["kernel"], -decay)
            np.testing.assert_array_equal(jnp.abs(updates["dense"]["bias"]), 0)
            assert updates["scale"] == 0
    tx = jadam.adamw(1.0, weight_decay=0.5, mask={"dense": True, "scale": False})
    updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_array_equal(updates["dense"]["bias"], -0.5)


EIGHT_BITS = {"mu_dtype": "int8", "nu_dtype": "uint8", "min_size": 0}
PLAIN = [case for case in each_structure["argvalues"] if "w" not in case.make.__name__]


@pytest.mark.usefixtures("either_compilation")
@pytest.mark.parametrize(
    ("case", "storage"),
    [
        # Other numbers and a decay of the parameters change nothing here.
        *((case, {}) for case in FAMILY if case in PLAIN),
        (FAMILY[0], EIGHT_BITS),
        *(pytest.param(case, {}, marks=pytest.mark.soak) for case in FAMILY if case not in PLAIN),
    ],
    ids=str,
)
def test_decay_rates_of_zero_in_a_vmap(case, storage):
    """b1 = 0 or b2 = 0 in a grid of rates is what the number 0 is: once it was NaN.

    The other rate is .5, whose logarithm is good to an ulp in both; a step has a few more.
    """
    g = jnp.asarray([np.linspace(-2, 3, 64)] * 2, jnp.float32)

    def three_steps(b1, b2):
        tx = case.make(0.1, **{**case.options, "b1": b1, "b2": b2}, **storage)
        state = tx.init(g)
        for _ in range(3):
            updates, state = tx.update(g, state, g)
        return updates

    rates = [(0.0, 0.5), (0.5, 0.0), (0.0, 0.0)]
    found = jax.jit(jax.vmap(three_steps))(*jnp.asarray(rates, jnp.float32).T)
    for ours, (b1, b2) in zip(found, rates, strict=True):
        np.testing.assert_allclose(ours, three_steps(b1, b2), rtol=8 * 2**-23)


@pytest.mark.usefixtures("either_compilation")
@pytest.mark.parametrize("case", **each_member)
def test_learning_rates_in_a_vmap(case):
    """A batch of learning rates in one program: the members take traced arrays."""
    params = jnp.asarray([1.0, -2.0, 0.5])
    grads = jnp.asarray([0.1, 3.0, -1e-3])

    def first_step(learning_rate):
        tx = case(learning_rate)
        return tx.update(grads, tx.init(params), params)[0]

    rates = jnp.asarray([1e-3, 0.5])
    for rate, updates in zip(rates, jax.vmap(first_step)(rates), strict=True):
        expected = first_step(float(rate))
        np.testing.assert_allclose(updates, expected, rtol=4 * 2**-23)  # contraction into FMAs


UNDECAYED = ("adam", "nadam", "adamax")


def update_and_apply(tx):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def fused(tx):
    return lambda params, state, grads: tx.step(grads, state, params)


WAYS = {
    "update-xla": (update_and_apply, "xla"),
    "step-xla": (fused, "xla"),
    "step-auto": (fused, "auto"),
}
# A step in XLA's form has the bits of an update (the next test): here one of each kind of state,
# and where there is a kernel that one.
SHORT = {
    "update-xla": {case.name for case in each_structure["argvalues"]},
    "step-xla": {"amsgrad", "adamax", "ademamix"},
    "step-auto": {"adamw", "nadam", "radam"},
}


@pytest.mark.parametrize(
    ("way", "case"),
    [
        pytest.param(
            way, case, marks=[] if case.name in SHORT[way] else pytest.mark.soak, id=f"{case}-{way}"
        )
        for way in WAYS
        for case in each_structure["argvalues"]
    ],
)
def test_the_compiled_step_needs_no_temporaries(way, case):
    """Donated, every member updates parameters and moments in place, without a copy."""
    params = {"w": jnp.ones((512, 1024))}
    make, kernel = WAYS[way]
    tx = case(kernel=kernel)
    state = tx.init(params)
    program = jax.jit(make(tx), donate_argnums=(0, 1)).lower(params, state, params).compile()
    memory = program.memory_analysis()
    held = sum(x.nbytes for x in jax.tree.leaves((params, state)))
    assert memory.alias_size_in_bytes == held
    # Scalars, and what XLA reserves for its own; a copy of a moment is 4 bytes a parameter.
    assert memory.temp_size_in_bytes <= 0.01 * params["w"].nbytes


@pytest.mark.parametrize(
    ("case", "names"),
    [
        *(
            # What decays does as its member without.
            pytest.param(case, ("dense",), marks=[pytest.mark.soak] * (case.name in UNDECAYED))
            for case in each_structure["argvalues"]
        ),
        *(
            pytest.param(case, ("dense", "scale"), marks=pytest.mark.soak)
            for case in each_structure["argvalues"]
        ),
    ],
    ids=str,
)
def test_step_is_update_and_apply_updates(case, names):
    """`tx.step` and the two calls give the same bits on the XLA path; each is compiled once."""
    tx, params = case(kernel="xla"), {name: SMALL[name] for name in names}
    in_two, in_one = jax.jit(update_and_apply(tx)), jax.jit(fused(tx))
    two_calls = one_call = (params, tx.init(params))
    for seed in range(3):
        grads = gradients_like(params, seed)
        two_calls, one_call = in_two(*two_calls, grads), in_one(*one_call, grads)
    assert in_two._cache_size() == in_one._cache_size() == 1
    jax.tree.map(np.testing.assert_array_equal, one_call, two_calls)
    assert jax.tree.map(jnp.result_type, one_call) == jax.tree.map(jnp.result_type, two_calls)


def test_transformations_are_optax_transformations():
    """Real GradientTransformationExtraArgs, which take and ignore extra arguments."""
    params = tree_of_parameters()
    for tx in (*(case() for case in FAMILY), jadam.scale_by_adam()):
        assert isinstance(tx, optax.GradientTransformationExtraArgs)
        jax.eval_shape(
            lambda tx=tx: tx.update(
                params, tx.init(params), params, value=jnp.float32(1.0), unknown="ignored"
            )
        )
