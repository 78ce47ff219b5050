"""Whatever is wrong is said: the argument or the leaf's path, what was expected, what came."""

import functools
import re

import equinox as eqx
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import trees_of
from hypothesis import given
from hypothesis import settings as hypothesis_settings

import jadam
import jadam.sharding
from jadam import _validate

pytestmark = pytest.mark.usefixtures("quick_compilation")
PARAMS = {"encoder": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
GRADS = jax.tree.map(jnp.ones_like, PARAMS)
MEMBERS = [
    jadam.adam,
    jadam.adamw,
    jadam.nadam,
    jadam.nadamw,
    jadam.amsgrad,
    jadam.adamax,
    jadam.adamaxw,
    jadam.radam,
]
each_factory = pytest.mark.parametrize("factory", MEMBERS, ids=lambda f: f.__name__)


def one_step(**options):
    return jadam.update(GRADS, jadam.init(PARAMS), PARAMS, **options)


@pytest.mark.parametrize("name", ["b1", "b2"])
@pytest.mark.parametrize(
    "value", [-0.1, 1.0, 1.5, float("nan"), np.float32(1), jnp.float32(2), np.array(-1.0)]
)
def test_a_decay_rate_out_of_range(name, value):
    """In the pure pair when tracing, in the family already when it is made."""
    with pytest.raises(ValueError, match=rf"{name}: expected a number >= 0 and < 1, got"):
        one_step(**{name: value})
    for factory in MEMBERS:
        with pytest.raises(ValueError, match=rf"{name}: expected a number >= 0 and < 1, got"):
            factory(1e-3, **{name: value})


def test_a_decay_rate_that_bfloat16_rounds_to_one():
    """inject_hyperparams casts .999 to the parameters' bfloat16, which is 1: said, not NaN."""
    with pytest.raises(
        ValueError, match=r"b2: expected a number >= 0 and < 1, got 1.0 in bfloat16"
    ):
        jadam.adam(1e-3, b2=jnp.bfloat16(0.999))


def test_a_decay_rate_that_was_not_rounded_to_one(x64):
    """The hint at inject_hyperparams is for arrays of under 32 bits: these are 1 themselves."""
    for dtype in ("float32", "float64"):
        with pytest.raises(ValueError, match=rf"b2: expected .* < 1, got 1.0 in {dtype}$"):
            jadam.adam(1e-3, b2=jnp.asarray(1.0, dtype))


def test_a_real_hyperparameter_is_not_read(monkeypatch):
    """It may lie on devices of other processes: the dtype alone says that it is real."""
    monkeypatch.setattr(_validate, "_is_real", None)
    value = jnp.float32(0.5)
    assert _validate.scalar("b1", value) is value


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_learning_rate_that_is_not_finite(value):
    """A negative one climbs, as in optax."""
    for make in (lambda: one_step(learning_rate=value), lambda: jadam.adamw(value)):
        with pytest.raises(ValueError, match="learning_rate: expected a finite number, got"):
            make()


@pytest.mark.parametrize("name", ["eps", "eps_root", "weight_decay"])
@pytest.mark.parametrize("value", [-1e-3, float("inf"), float("nan"), jnp.float32(-1)])
def test_a_negative_or_infinite_hyperparameter(name, value):
    """None of them may be negative."""
    with pytest.raises(ValueError, match=rf"{name}: expected a number >= 0, got"):
        one_step(**{name: value})
    with pytest.raises(ValueError, match=rf"{name}: expected a number >= 0, got"):
        jadam.adamw(**{"learning_rate": 1e-3, name: value})


@pytest.mark.parametrize("name", ["learning_rate", "b1", "b2", "eps", "eps_root", "weight_decay"])
@pytest.mark.parametrize("value", ["0.1", None, True, 1j, [0.1], jnp.array(True), jnp.array(1j)])
def test_a_hyperparameter_that_is_no_number(name, value):
    """Strings, None, booleans, lists and complex numbers are refused by name."""
    with pytest.raises(TypeError, match=rf"{name}: expected a real number"):
        one_step(**{name: value})


@pytest.mark.parametrize("name", ["learning_rate", "b1", "b2", "eps", "eps_root", "weight_decay"])
def test_a_hyperparameter_that_is_a_vector(name):
    """Also while it is being traced."""
    for value in (np.full(3, 0.1), jnp.full((1,), 0.1)):
        with pytest.raises(ValueError, match=rf"{name}: expected a scalar, got an array of shape"):
            one_step(**{name: value})
    with pytest.raises(ValueError, match=rf"{name}: expected a scalar, got an array of shape \(3,"):
        jax.jit(lambda value: one_step(**{name: value}))(jnp.full(3, 0.1))


def test_a_schedule_that_returns_a_vector_or_nothing():
    """The schedule is named, and the shape that it returned."""
    tx = jadam.adam(lambda count: jnp.ones(3))
    with pytest.raises(
        ValueError, match=r"learning_rate\(count\): expected a scalar, got an array of shape \(3,\)"
    ):
        tx.update(GRADS, tx.init(PARAMS))
    tx = jadam.adamw(1e-3, weight_decay=lambda count: None)
    with pytest.raises(TypeError, match=r"weight_decay\(count\): expected a real number"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS)


@each_factory
@pytest.mark.parametrize("name", ["mu_dtype", "nu_dtype"])
@pytest.mark.parametrize(
    ("value", "came"),
    [
        *((jnp.int32, "int32"), (bool, "bool"), ("complex64", "complex64"), (3, "3")),
        *(("no dtype", "'no dtype'"), ("what dtype", "'what dtype'")),
    ],
)
def test_a_storage_dtype_that_is_not_floating_point(factory, name, value, came):
    """A complex one is a first moment's of complex parameters, which optax takes too."""
    if (name, value) == ("mu_dtype", "complex64"):
        params = {"c": jnp.ones(2, jnp.complex64), "r": jnp.ones(2)}
        mu = factory(1e-3, mu_dtype=value).init(params)[0].mu
        assert (mu["c"].dtype, mu["r"].dtype) == (jnp.complex64, jnp.float32)
        return
    with pytest.raises(
        TypeError,
        match=rf"{name}: expected a floating-point dtype or 'u?int8' or 'u?int4', got {came}$",
    ):
        factory(1e-3, **{name: value})


def test_options_of_single_members():
    with pytest.raises(ValueError, match="maximum: expected one of 'raw', 'corrected', got 'hat'"):
        jadam.amsgrad(1e-3, maximum="hat")
    for value in (0.0, -1.0):
        message = f"momentum_decay: expected a number > 0, got {value}"
        with pytest.raises(ValueError, match=message):
            jadam.nadam(1e-3, momentum_decay=value)
    with pytest.raises(ValueError, match=r"threshold: expected a number >= 4, got 3.0"):
        jadam.radam(1e-3, threshold=3.0)
    with pytest.raises(TypeError, match=r"momentum_decay: expected a real number"):
        jadam.nadam(1e-3, momentum_decay="fast")


@pytest.mark.parametrize(
    ("leaf", "came"),
    [
        (jnp.ones(3, jnp.int32), r"got int32 of shape \(3,\)"),
        (jnp.ones(3, bool), r"got bool of shape \(3,\)"),
        (np.ones(2, np.uint8), r"got uint8 of shape \(2,\)"),
        (jax.random.key(0), r"got key<fry>"),
        (7, r"got int32"),
        ("text", r"expected an array, got str"),
    ],
)
def test_a_parameter_that_is_no_number_with_a_fraction(leaf, came):
    """Integer, boolean and key leaves: named with their path, as is the way to keep them out."""
    params = {"encoder": {"kernel": jnp.ones(3), "table": leaf}}
    with pytest.raises(TypeError, match=rf"params\['encoder'\]\['table'\]: .*{came}"):
        jadam.init(params)
    for factory in MEMBERS:
        with pytest.raises(TypeError, match=rf"params\['encoder'\]\['table'\]: .*{came}"):
            factory(1e-3).init(params)


def test_the_path_of_an_attribute():
    """Equinox modules and dataclasses are named by attribute."""

    class Model(eqx.Module):
        weight: jax.Array
        steps: jax.Array

    with pytest.raises(TypeError, match=r"params\.steps: expected a floating-point"):
        jadam.init(Model(jnp.ones(2), jnp.zeros(2, int)))


def test_a_float0_gradient():
    """What jax.grad(allow_int=True) gives for an integer is no gradient."""
    grads = jax.grad(lambda p: jnp.sum(p["w"].astype(float)), allow_int=True)({"w": jnp.arange(3)})
    state = jadam.init({"w": jnp.ones(3)})
    with pytest.raises(TypeError, match=r"grads\['w'\]: expected .* got float0, the gradient with"):
        jadam.update(grads, state)


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ({"encoder": {"kernel": jnp.ones((2, 3))}}, r"grads\['encoder'\]\['bias'\] is missing: "),
        (
            {"encoder": {**GRADS["encoder"], "scale": jnp.ones(3)}},
            r"grads\['encoder'\]\['scale'\] is not expected: no state.mu\['encoder'\]\['scale'\]",
        ),
        (
            {"encoder": {**GRADS["encoder"], "bias": jnp.ones((1, 3))}},
            r"grads\['encoder'\]\['bias'\]: expected shape \(3,\) of state.mu.*, got \(1, 3\)",
        ),
        (
            {"encoder": {**GRADS["encoder"], "bias": jnp.ones(4)}},
            r"grads\['encoder'\]\['bias'\]: expected shape \(3,\) of state.mu.*, got \(4,\)",
        ),
        (
            {"encoder": {**GRADS["encoder"], "bias": None}},
            r"grads\['encoder'\]\['bias'\] is missing",
        ),
        (None, r"grads\['encoder'\]\['bias'\] is missing"),
        (
            {"encoder": {**GRADS["encoder"], "bias": jnp.ones(3, complex)}},
            r"grads\['encoder'\]\['bias'\]: expected a real dtype like state.mu.*, got c",
        ),
    ],
)
@pytest.mark.parametrize("jit", [False, True])
def test_gradients_that_do_not_fit_the_state(grads, message, jit):
    """Another structure, another shape or a complex gradient, by hand and while tracing."""
    update = jax.jit(jadam.update) if jit else jadam.update
    with pytest.raises((ValueError, TypeError), match=message):
        update(grads, jadam.init(PARAMS))


def test_gradients_in_other_nodes():
    """The same paths in other containers are another tree."""
    state = jadam.init([jnp.ones(2), jnp.ones(3)])
    with pytest.raises(ValueError, match=r"grads: expected the tree structure of state.mu"):
        jadam.update((jnp.ones(2), jnp.ones(3)), state)


def test_params_that_are_missing_or_do_not_fit():
    """Decay needs the parameters, of the gradients' shape."""
    state = jadam.init(PARAMS)
    for call in (
        lambda params: jadam.update(GRADS, state, params, weight_decay=0.1),
        lambda params: jadam.adamw(1e-3).update(GRADS, jadam.adamw(1e-3).init(PARAMS), params),
    ):
        with pytest.raises(
            ValueError, match=r"params: expected the parameters, which weight_decay"
        ):
            call(None)
        with pytest.raises(ValueError, match=r"params\['encoder'\]\['bias'\] is missing"):
            call({"encoder": {"kernel": jnp.ones((2, 3))}})
        with pytest.raises(ValueError, match=r"params\['encoder'\]\['bias'\]: expected shape \(3,"):
            call({"encoder": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(4)}})
        with pytest.raises(ValueError, match=r"params\['encoder'\]\['bias'\]: expected shape \(3,"):
            call({"encoder": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(2)}})
    with pytest.raises(ValueError, match="params: expected the parameters, which step moves"):
        jadam.step(GRADS, state, None)


def test_a_mask_that_does_not_fit():
    """A mask for another tree is refused by name, and so is one that holds no booleans."""
    for mask in ({"decoder": True}, lambda p: {"encoder": {"kernel": True}}):
        with pytest.raises(ValueError, match="mask: expected a tree like params or a prefix"):
            one_step(weight_decay=0.1, mask=mask)
    with pytest.raises(TypeError, match=r"mask\['encoder'\]: expected True or False, got 'all'"):
        one_step(weight_decay=0.1, mask={"encoder": "all"})
    with pytest.raises(TypeError, match=r"mask\['encoder'\]: expected True or False, got np.datet"):
        one_step(weight_decay=0.1, mask={"encoder": np.datetime64(1, "s")})


def test_a_state_that_is_not_adams():
    """Another optimizer's state, or a chain's where a single one is expected."""
    tx = jadam.adam(1e-3)
    with pytest.raises(
        TypeError, match="state: expected the ScaleByAdamState that init made, got t"
    ):
        jadam.update(GRADS, tx.init(PARAMS))
    with pytest.raises(TypeError, match="state: expected the tuple of 2 states that init made"):
        tx.update(GRADS, jadam.init(PARAMS)[:1])
    with pytest.raises(
        TypeError, match="state: expected the ScaleByAdamState that init made, got E"
    ):
        tx.update(GRADS, tx.init(PARAMS)[::-1])
    with pytest.raises(
        TypeError, match=r"state: expected the AmsgradState .* got ScaleByAdamState$"
    ):
        jadam.amsgrad(1e-3).update(GRADS, tx.init(PARAMS))
    with pytest.raises(
        TypeError, match=r"state: expected the ScaleByAdamState .* got AmsgradState$"
    ):
        tx.update(GRADS, jadam.amsgrad(1e-3).init(PARAMS))


@pytest.mark.parametrize(
    ("coded", "plain", "message"),
    [
        (
            ("nu",),
            ("mu",),
            "mu['w']: expected uint16 or uint8 beside the other moments, got float",
        ),
        (
            ("mu",),
            ("nu",),
            "mu['w']: expected a floating-point dtype beside the other moments, ",
        ),
        (("mu", "nu"), ("nu_max",), "nu_max['w']: expected uint8 beside the other moments, got fl"),
        (
            ("nu_max",),
            ("mu", "nu"),
            "nu_max['w']: expected a floating-point dtype beside the oth",
        ),
    ],
)
def test_moments_of_two_storages(coded, plain, message):
    """Trees of a state with codes beside those of one without: no bare StopIteration."""
    params = {"b": jnp.ones(3), "w": jnp.ones((2, 128))}
    txs = jadam.amsgrad(1e-3, mu_dtype="int8", nu_dtype="uint8", min_size=0), jadam.amsgrad(1e-3)
    (codes, *rest), (floats, *_) = (tx.init(params) for tx in txs)
    mixed = floats._replace(**{name: getattr(codes, name) for name in coded})
    mixed = mixed._replace(**{name: getattr(floats, name) for name in plain})
    with pytest.raises(TypeError, match=re.escape(f"state.{message}")):
        txs[0].update(params, (mixed, *rest), params)
    with pytest.raises(TypeError, match=re.escape(f"state.{message}")):
        jadam.migrate.cast_like(mixed, floats)


leaves = st.sampled_from([(), (1,), (0,), (2, 3), (0, 2)]).map(lambda s: np.ones(s, np.float32))
trees = trees_of(leaves)


@hypothesis_settings(max_examples=60)
@given(params=trees, other=trees)
def test_any_tree_works_and_any_other_tree_is_refused(params, other):
    """Nested, empty, None, 0-d and zero-size: a step with its own tree, an error with another."""
    state = jadam.init(params)
    updates, new = jadam.update(params, state, params, weight_decay=0.1)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    shapes = functools.partial(jax.tree.map, np.shape)
    fits = jax.tree.structure(other) == jax.tree.structure(params) and shapes(other) == shapes(
        params
    )
    if not fits:
        with pytest.raises(ValueError, match="grads"):
            jadam.update(other, state)


@pytest.mark.parametrize("value", [True, np.True_, 1.0, "1", jnp.ones(())], ids=repr)
def test_a_size_that_is_no_whole_number(value):
    """Booleans are integers in Python: `min_size=True` would mean 1, and codes for every leaf."""
    eight_bits = {"mu_dtype": "int8", "nu_dtype": "uint8"}
    calls = [
        lambda: jadam.init(PARAMS, **eight_bits, min_size=value),
        *(lambda f=f: f(1e-3, **eight_bits, min_size=value).init(PARAMS) for f in MEMBERS),
        lambda: jadam.scale_by_adam(**eight_bits, min_size=value).init(PARAMS),
        lambda: jadam.sharding.divided(PARAMS, axis="data", min_size=value),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"^min_size: expected a whole number, got"):
            call()
    with pytest.raises(TypeError, match=r"^block: expected a whole number, got"):
        jadam.sharding.divided(PARAMS, axis="data", block=value)
