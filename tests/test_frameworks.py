"""jadam under Flax, Equinox and Orbax: the same program as with optax, compared.

As in test_drop_in.py each program is written once, for `lib` jadam and optax, and compared in
float64; then run in float32 under strict promotion.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from flax.training.train_state import TrainState
from helpers import FAMILY, gradients_like, tree_of_parameters

import jadam

pytestmark = pytest.mark.usefixtures("quick_compilation")
STEPS = 5


def data() -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    return (
        jnp.asarray(rng.standard_normal((8, 3)), float),
        jnp.asarray(rng.standard_normal((8, 2)), float),
    )


def error(prediction: jax.Array, target: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(prediction - target))


def transformation(lib: ModuleType) -> Any:
    """What a training script has: clipping, decay of matrices alone, a schedule."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        lib.adamw(
            lambda count: jnp.where(count < 3, 0.1, 0.01),
            weight_decay=0.1,
            mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        ),
    )


def nnx_optimizer(lib: ModuleType) -> Any:
    """nnx.Optimizer in nnx.jit, on a model with Dropout, whose state is no parameter."""

    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.hidden = nnx.Linear(3, 4, param_dtype=float, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.out = nnx.Linear(4, 2, param_dtype=float, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.out(self.dropout(nnx.tanh(self.hidden(x))))

    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, transformation(lib), wrt=nnx.Param)
    x, y = data()

    @nnx.jit
    def step(model: Model, optimizer: nnx.Optimizer) -> None:
        optimizer.update(model, nnx.grad(lambda model: error(model(x), y))(model))

    before = jax.tree.map(jax.typeof, nnx.to_pure_dict(nnx.state(optimizer)))
    for _ in range(STEPS):
        step(model, optimizer)
    assert jax.tree.map(jax.typeof, nnx.to_pure_dict(nnx.state(optimizer))) == before
    return nnx.to_pure_dict(nnx.state(model, nnx.Param)), jax.tree.leaves(nnx.state(optimizer))


def linen_train_state(lib: ModuleType) -> Any:
    """TrainState.create and apply_gradients in jax.jit."""
    model = nn.Sequential([nn.Dense(4, param_dtype=float), nn.tanh, nn.Dense(2, param_dtype=float)])
    x, y = data()
    state = TrainState.create(
        apply_fn=model.apply, params=model.init(jax.random.key(0), x), tx=transformation(lib)
    )

    @jax.jit
    def step(state: TrainState) -> TrainState:
        grads = jax.grad(lambda params: error(state.apply_fn(params, x), y))(state.params)
        return state.apply_gradients(grads=grads)

    before = jax.tree.map(jax.typeof, state.opt_state)
    for _ in range(STEPS):
        state = step(state)
    assert jax.tree.map(jax.typeof, state.opt_state) == before
    return state.params, jax.tree.leaves(state.opt_state)


def equinox_partition(lib: ModuleType) -> Any:
    """eqx.partition: the model's activations and sizes are no leaves, None stands for them."""
    x, y = data()
    model = eqx.nn.MLP(3, 2, 4, 1, activation=jnp.tanh, dtype=x.dtype, key=jax.random.key(0))
    tx = transformation(lib)
    params, static = eqx.partition(model, eqx.is_inexact_array)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        grads = jax.grad(lambda params: error(jax.vmap(eqx.combine(params, static))(x), y))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    before = jax.tree.map(jax.typeof, state)
    for _ in range(STEPS):
        params, state = step(params, state)
    assert jax.tree.map(jax.typeof, state) == before
    return params, jax.tree.leaves(state)


def equinox_filter(lib: ModuleType) -> Any:
    """The documented Equinox loop: eqx.filter, filter_jit, filter_grad, eqx.apply_updates."""
    x, y = data()
    model = eqx.nn.MLP(3, 2, 4, 1, activation=jnp.tanh, dtype=x.dtype, key=jax.random.key(0))
    tx = transformation(lib)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model: Any, state: Any) -> Any:
        grads = eqx.filter_grad(lambda model: error(jax.vmap(model)(x), y))(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = tx.update(grads, state, params)
        return eqx.apply_updates(model, updates), state

    before = jax.tree.map(jax.typeof, state)
    for _ in range(STEPS):
        model, state = step(model, state)
    assert jax.tree.map(jax.typeof, state) == before
    return eqx.filter(model, eqx.is_inexact_array), jax.tree.leaves(state)


PROGRAMS = [nnx_optimizer, linen_train_state, equinox_partition, equinox_filter]
each_program = pytest.mark.parametrize("program", PROGRAMS)


@pytest.mark.usefixtures("x64", "standard_promotion")  # optax.adam's tree_bias_correction
@each_program
def test_a_framework_trains_with_jadam_as_it_did_with_optax(program):
    """Drop-in: the parameters and every array of the state are those of optax.

    1e-12: five steps round at 1e-16 each, and optax's 1 - b2**t loses three digits at t = 1.
    """
    ours, theirs = program(jadam), program(optax)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12)


@each_program
def test_a_framework_trains_under_strict_promotion(program):
    """float32, strict promotion, no rank promotion; the state's types are checked inside."""
    params, _ = program(jadam)
    assert all(np.all(np.isfinite(p)) for p in jax.tree.leaves(params))


LAYOUTS = ("adam", "adamw", "amsgrad")  # count, mu and nu; with decay's state; with nu_max
each_layout = pytest.mark.parametrize("case", [c for c in FAMILY if c.name in LAYOUTS], ids=str)


def state_of(case: Any, without: Sequence[str] = ()) -> tuple[Any, Any, Any]:
    """A transformation, parameters of every kind, and the state after a step in bfloat16 mu."""
    tx = case(lambda count: jnp.where(count < 3, 0.1, 0.01), mu_dtype=jnp.bfloat16)
    params = {k: p for k, p in tree_of_parameters().items() if k not in without}
    grads = gradients_like(params, 0)
    _, state = jax.jit(tx.update)(grads, tx.init(params), params)
    return tx, params, state


def assert_identical(restored: Any, state: Any) -> None:
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        np.testing.assert_array_equal(x, y)


@each_layout
def test_flax_serialization_restores_the_state(case):
    """to_bytes and from_bytes, with None and empty nodes in the tree."""
    tx, params, state = state_of(case)
    assert_identical(
        serialization.from_bytes(tx.init(params), serialization.to_bytes(state)), state
    )


@each_layout
def test_equinox_serialisation_restores_the_state(case, tmp_path):
    """tree_serialise_leaves and tree_deserialise_leaves."""
    tx, params, state = state_of(case)
    eqx.tree_serialise_leaves(tmp_path / "state.eqx", state)
    assert_identical(eqx.tree_deserialise_leaves(tmp_path / "state.eqx", tx.init(params)), state)


@each_layout
def test_orbax_restores_the_state(case, tmp_path):
    """StandardCheckpointer to a target made by eval_shape."""
    tx, params, state = state_of(case, without=["empty"])  # Orbax saves no array of size 0
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        target = jax.eval_shape(tx.init, params)
        assert_identical(checkpointer.restore(tmp_path / "state", target), state)


@pytest.mark.parametrize("case", [c for c in FAMILY if c.name in ("adam", "adamw")], ids=str)
def test_a_checkpoint_of_optax_goes_on_under_jadam(case, tmp_path, standard_promotion):
    """Orbax and Flax: what optax.adam wrote, jadam.adam restores, and the other way round."""
    params = {k: p for k, p in tree_of_parameters().items() if k != "empty"}
    ours, theirs = case(1e-2), case.optax(1e-2)
    _, state = theirs.update(gradients_like(params, 0), theirs.init(params), params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "optax", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "optax", jax.eval_shape(ours.init, params))
    assert isinstance(restored[0], jadam.AdamState)
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(x, y)
    back = serialization.from_bytes(theirs.init(params), serialization.to_bytes(restored))
    assert_identical(back, jax.tree.map(np.asarray, state))
