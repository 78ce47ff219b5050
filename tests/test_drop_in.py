"""jadam in the place of optax: an unchanged program around it does what it did.

Each program is written once and run twice, with `lib` jadam and with `lib` optax. In float64 both
must agree to the last digits, parameters and whole state, so that no rounding hides a difference.
In float32 under strict promotion jadam's state must keep its types and the step compile once.
"""

import copy
import functools
import inspect
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from helpers import FAMILY, gradients_like

import jadam
import jadam.sharding

pytestmark = pytest.mark.usefixtures("quick_compilation")
LR = 0.1
WEIGHTS = (1.0, 2.0, 0.5, 1.0, -1.0, 3.0, 0.1, 1.0, 1.0, 2.0)
NOT_FINITE_TWICE = (1.0, 2.0, 0.5, np.inf, -1.0, 3.0, np.nan, 1.0, 1.0, 2.0)


@dataclass(frozen=True)
class Program:
    """A transformation that a user builds from `lib`, and the training loop around it.

    `weights` scale the loss from step to step. `wrap` and `unwrap` are for parameters that are
    kept in another form. `extra` is what `update` is given beside the gradients. `not_strict`
    names the function of optax that mixes dtypes, so that the program needs JAX's default.
    """

    name: str
    build: Callable[[ModuleType], Any]
    weights: tuple[float, ...] = WEIGHTS
    wrap: Callable[[Any], Any] = lambda params: params
    unwrap: Callable[[Any], Any] = lambda params: params
    extra: Callable[..., dict[str, Any]] = lambda value, value_fn: {}
    not_strict: str | None = None

    def __str__(self) -> str:
        return self.name


def not_scalars(params: Any) -> Any:
    return jax.tree.map(lambda p: jnp.ndim(p) > 0, params)


def labels(params: Any) -> Any:
    return jax.tree.map(lambda p: "matrix" if jnp.ndim(p) > 1 else "other", params)


def halved(count: jax.Array) -> jax.Array:
    """A schedule that mixes no dtypes."""
    return jnp.asarray(LR, float) * jnp.asarray(0.5, float) ** (count // 4).astype(float)


NO_SCALE = {"dense": True, "scale": False}

PROGRAMS = [
    Program("alone", lambda lib: lib.adam(LR)),
    Program("positional", lambda lib: lib.adam(LR, 0.8, 0.95, 1e-3, 1e-4, None, nesterov=True)),
    Program("arrays", lambda lib: lib.adam(jnp.asarray(LR, float), b1=np.float64(0.8))),
    Program("schedule", lambda lib: lib.adam(halved)),
    Program("adamw", lambda lib: lib.adamw(halved, weight_decay=halved, mask=not_scalars)),
    Program("chain", lambda lib: optax.chain(optax.clip_by_global_norm(0.5), lib.adam(LR))),
    Program(
        "named_chain",
        lambda lib: optax.named_chain(("clip", optax.clip(0.5)), ("adam", lib.adam(LR))),
    ),
    Program(
        "scale_by_adam",
        lambda lib: optax.chain(lib.scale_by_adam(b2=0.9), optax.scale_by_learning_rate(halved)),
    ),
    Program(
        "lamb",
        lambda lib: optax.chain(
            lib.scale_by_adam(),
            optax.add_decayed_weights(0.1),
            optax.scale_by_trust_ratio(),
            optax.scale_by_learning_rate(LR),
        ),
    ),
    Program(
        "ema",
        lambda lib: optax.chain(lib.adam(LR), optax.ema(0.5)),
        not_strict="tree_bias_correction",
    ),
    Program("masked", lambda lib: optax.masked(lib.adam(LR), not_scalars)),
    Program("masked_adamw", lambda lib: optax.masked(lib.adamw(LR, mask=not_scalars), NO_SCALE)),
    Program(
        "partition",
        lambda lib: optax.partition({"matrix": lib.adam(LR), "other": optax.sgd(LR)}, labels),
    ),
    Program(
        "multi_transform",
        lambda lib: optax.multi_transform({"matrix": lib.adam(LR), "other": lib.adamw(LR)}, labels),
    ),
    Program(
        "selective_transform",
        lambda lib: optax.selective_transform(
            lib.adam(LR), freeze_mask={"dense": False, "scale": True}
        ),
    ),
    Program(
        "MultiSteps",
        lambda lib: optax.MultiSteps(lib.adam(LR), every_k_schedule=3, accumulator_dtype=float),
        not_strict="MultiSteps",
    ),
    Program(
        "MultiSteps_skip_not_finite",
        lambda lib: optax.MultiSteps(
            lib.adam(LR), 2, should_skip_update_fn=optax.skip_not_finite, accumulator_dtype=float
        ).gradient_transformation(),
        weights=NOT_FINITE_TWICE,
        not_strict="MultiSteps",
    ),
    Program(
        "apply_if_finite",
        lambda lib: optax.apply_if_finite(lib.adam(LR), 3),
        weights=NOT_FINITE_TWICE,
    ),
    Program(
        "conditionally_mask",
        lambda lib: optax.conditionally_mask(lib.adam(LR), lambda step, **_: step % 2 == 0),
    ),
    Program("flatten", lambda lib: optax.flatten(lib.adam(LR))),
    Program(
        "inject_hyperparams",
        lambda lib: optax.inject_hyperparams(lib.adam)(learning_rate=halved, b1=0.8),
    ),
    Program(
        "inject_adamw",
        lambda lib: optax.inject_hyperparams(lib.adamw, static_args=("mask",))(
            LR, weight_decay=0.1, mask=not_scalars
        ),
    ),
    Program(
        "lookahead",
        lambda lib: optax.lookahead(lib.adam(LR), 3, slow_step_size=0.5, reset_state=True),
        wrap=optax.LookaheadParams.init_synced,
        unwrap=lambda params: params.fast,
        not_strict="_lookahead_update",
    ),
    Program(
        "schedule_free",
        lambda lib: optax.contrib.schedule_free(lib.adam(LR, b1=0.0), learning_rate=LR),
    ),
    Program(
        "sam",
        lambda lib: optax.contrib.sam(
            lib.adam(LR), optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
        ),
        not_strict="sam",
    ),
    Program(
        "sam_opaque",
        lambda lib: optax.contrib.sam(lib.adam(LR), lib.adam(0.1), opaque_mode=True),
        extra=lambda value, value_fn: {"grad_fn": lambda params, _: jax.grad(value_fn)(params)},
    ),
    Program(
        "reduce_on_plateau",
        lambda lib: optax.chain(lib.adam(LR), optax.contrib.reduce_on_plateau(patience=2)),
        extra=lambda value, value_fn: {"value": value},
        not_strict="reduce_on_plateau",
    ),
    Program(
        "extra_args",
        lambda lib: optax.chain(optax.with_extra_args_support(lib.adam(LR)), optax.trace(0.5)),
        extra=lambda value, value_fn: {"value": value, "unknown": "ignored"},
    ),
]


def problem() -> dict[str, Any]:
    """Parameters of rank 2 and 0, few to compile, in the default float dtype."""
    rng = np.random.default_rng(0)
    return {
        "dense": {"kernel": jnp.asarray(rng.standard_normal((3, 2)), float)},
        "scale": jnp.asarray(rng.standard_normal(), float),
    }


def loss(params: Any, weight: Any) -> jax.Array:
    """Not convex, and each leaf's gradient depends on all leaves."""
    terms = [jnp.sum(jnp.square(p - 1) + jnp.sin(3 * p)) for p in jax.tree.leaves(params)]
    return weight * jnp.log1p(jnp.square(sum(terms)))


class Trained(NamedTuple):
    params: Any
    states: list[Any]
    compilations: int


def train(program: Program, lib: ModuleType) -> Trained:
    """The user's loop, one step for each weight."""
    tx = program.build(lib)

    @jax.jit
    def step(params: Any, state: Any, weight: Any) -> tuple[Any, Any]:
        def value_fn(params: Any) -> jax.Array:
            return loss(params, weight)

        value, grads = jax.value_and_grad(value_fn)(program.unwrap(params))
        updates, state = tx.update(grads, state, params, **program.extra(value, value_fn))
        return optax.apply_updates(params, updates), state

    params = program.wrap(problem())
    states = [tx.init(params)]
    for weight in program.weights:
        params, state = step(params, states[-1], jnp.asarray(weight, float))
        states.append(state)
    return Trained(params, states, step._cache_size())


def as_optax(state: Any) -> Any:
    """A state with optax's classes in the place of jadam's."""

    peers = {
        jadam.AdamState: optax.ScaleByAdamState,
        jadam.AmsgradState: optax.ScaleByAmsgradState,
    }

    def translate(node: Any) -> Any:
        return peers[type(node)](*node) if type(node) in peers else node

    return jax.tree.map(translate, state, is_leaf=lambda node: type(node) in peers)


def assert_same(ours: Any, theirs: Any) -> None:
    """The same tree of the same numbers, which are float64.

    1e-12: ten steps round at 1e-16 each, and optax's 1 - b2**t loses three digits at t = 1. A
    wrong constant, count or order of operations shows at 1e-8 (eps) or above.
    """
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, x), y in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        where = jax.tree_util.keystr(path)
        assert (x.shape, x.dtype) == (y.shape, y.dtype), where
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12, err_msg=where)


each_program = pytest.mark.parametrize("program", PROGRAMS, ids=str)
# optax.adam itself mixes dtypes, in tree_bias_correction.
beside_optax = pytest.mark.usefixtures("x64", "standard_promotion")


@beside_optax
@each_program
def test_a_program_does_with_jadam_what_it_did_with_optax(program):
    """Drop-in: the parameters and the whole state, the wrappers' included, are those of optax."""
    ours, theirs = train(program, jadam), train(program, optax)
    assert any(
        np.any(p != q)
        for p, q in zip(*map(jax.tree.leaves, (ours.params, program.wrap(problem()))), strict=True)
    )
    assert_same(ours.params, theirs.params)
    assert_same(as_optax(ours.states[-1]), theirs.states[-1])


@pytest.mark.soak
@beside_optax
@each_program
def test_a_program_with_a_vector_among_its_parameters_does_too(program, monkeypatch):
    """The long form: a leaf of rank 1 as well."""
    few = problem

    def more():
        params, bias = few(), np.random.default_rng(1).standard_normal(2)
        return {**params, "dense": {**params["dense"], "bias": jnp.asarray(bias, float)}}

    monkeypatch.setitem(globals(), "problem", more)
    test_a_program_does_with_jadam_what_it_did_with_optax(program)


@each_program
def test_a_program_compiles_once_and_its_state_keeps_its_types(program, request):
    """No aval of the state changes, weak types included; under strict promotion if optax can."""
    if program.not_strict:
        request.getfixturevalue("standard_promotion")
    trained = train(program, jadam)
    avals = [jax.tree.map(jax.typeof, state) for state in trained.states]
    assert all(later == avals[0] for later in avals)
    assert not any(aval.weak_type for aval in jax.tree.leaves(avals[0]))
    assert trained.compilations == 1


@pytest.mark.parametrize("program", [p for p in PROGRAMS if p.not_strict], ids=str)
def test_where_strict_promotion_fails_it_is_in_optax(program):
    """`not_strict` is true: it excuses a function of optax, and must go when optax mends it."""
    with pytest.raises(jax.dtypes.TypePromotionError) as error:
        train(program, jadam)
    codes = [entry.frame.code.raw for entry in error.traceback]
    raised_in = [code for code in codes if "/jax/" not in code.co_filename][-1]
    assert "/optax/" in raised_in.co_filename
    assert raised_in.co_qualname.split(".")[0] == program.not_strict


@beside_optax
@pytest.mark.parametrize(
    "schedule",
    [
        optax.constant_schedule(0.1),
        optax.cosine_decay_schedule(0.1, 8, alpha=0.1),
        optax.exponential_decay(0.1, 3, 0.5, staircase=True),
        optax.linear_onecycle_schedule(10, 0.1),
        optax.piecewise_constant_schedule(0.1, {3: 0.5, 7: 0.1}),
        optax.polynomial_schedule(0.1, 0.01, 2, 8),
        optax.warmup_cosine_decay_schedule(0.0, 0.1, 3, 9, 0.01),
        optax.sgdr_schedule(
            [
                {"init_value": 0.0, "peak_value": v, "decay_steps": 5, "warmup_steps": 2}
                for v in (0.1, 0.05)
            ]
        ),
        optax.join_schedules([optax.linear_schedule(0.0, 0.1, 4), lambda count: 0.1], [4]),
        lambda count: 0.1,
        lambda count: 1 - count % 2,
    ],
    ids=lambda schedule: schedule.__qualname__.split(".")[0].strip("<>"),
)
def test_a_schedule_is_asked_for_the_same_steps(schedule):
    """All of optax's schedules, a Python number and an integer, at counts from 0."""

    def updates(lib: ModuleType) -> tuple[Any, Any]:
        tx = lib.adamw(schedule, weight_decay=0.01)

        def step(state: Any, grads: jax.Array) -> tuple[Any, jax.Array]:
            updates, state = tx.update(grads, state, grads)
            return state, updates

        grads = jnp.asarray(np.random.default_rng(0).standard_normal((12, 4)))
        return jax.jit(lambda: jax.lax.scan(step, tx.init(grads[0]), grads))()

    (our_state, ours), (their_state, theirs) = updates(jadam), updates(optax)
    assert_same(ours, theirs)
    assert_same(as_optax(our_state), their_state)


# optax's AdEMAMix has its moments under other names.
LAID_OUT = [case for case in FAMILY if case.peer and case.make is not jadam.ademamix]


@pytest.mark.parametrize("case", LAID_OUT, ids=str)
@pytest.mark.parametrize("learning_rate", [LR, halved], ids=["number", "schedule"])
def test_the_state_is_laid_out_as_that_of_optax(case, learning_rate):
    """A program that reaches into the state finds everything in its place."""
    options = {"weight_decay": halved, "mask": not_scalars} if case.weight_decay else {}
    ours = jax.eval_shape(case.make(learning_rate, **case.options | options).init, problem())
    own = case.options if case.peer_options is None else case.peer_options
    theirs = jax.eval_shape(case.peer(learning_rate, **own | options).init, problem())
    assert as_optax(ours) == theirs


@pytest.mark.parametrize(
    "name",
    sorted(
        {case.make.__name__ for case in FAMILY if hasattr(optax, case.make.__name__)}
        | {"scale_by_adam", "scale_by_amsgrad", "scale_by_adamax", "scale_by_radam"}
    ),
)
def test_every_argument_of_optax_is_taken_with_its_place_and_default(name):
    """`optax.X(...)` and `jadam.X(...)` bind the same arguments to the same values."""
    ours = inspect.signature(getattr(jadam, name)).parameters
    peer = getattr(optax, name, None) or getattr(optax.contrib, name)
    theirs = inspect.signature(peer).parameters
    expected = list(theirs.values())
    found = [ours[p.name] for p in expected]
    assert [(p.default, p.kind) for p in found] == [(p.default, p.kind) for p in expected]
    positional = [p.name for p in expected if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert list(ours)[: len(positional)] == positional
    assert all(p.kind is p.KEYWORD_ONLY for p in list(ours.values())[len(positional) :])


def first_step(tx: Any, params: Any, grads: Any) -> tuple[Any, Any]:
    """Parameters and state after one step; the trees are constants of the compiled program."""

    @jax.jit
    def step() -> tuple[Any, Any]:
        updates, state = tx.update(grads, tx.init(params), params)
        return optax.apply_updates(params, updates), as_optax(state)

    return step()


def trained_state(tx: Any) -> Any:
    """The state after two steps."""

    @jax.jit
    def steps(params: Any) -> Any:
        _, state = tx.update(params, tx.init(params), params)
        return tx.update(params, state, params)[1]

    return steps(problem())


def test_the_state_is_read_and_changed_by_the_names_that_optax_has():
    """Indexing, unpacking, and optax.tree.get, set and get_all_with_path on a chain's state."""
    state = trained_state(optax.chain(optax.clip(1.0), jadam.adam(halved)))
    adam_state, schedule_state = state[1]
    assert int(adam_state.count) == int(schedule_state.count) == 2
    assert optax.tree.get(state, "mu") is adam_state.mu is state[1][0].mu
    assert optax.tree.get(state, "nu") is adam_state.nu
    of_mu = optax.tree.get(state, "kernel", filtering=lambda path, _: "mu" in str(path))
    assert of_mu is adam_state.mu["dense"]["kernel"]
    assert optax.tree.get(state, "ScaleByAdamState") is adam_state
    assert len(optax.tree.get_all_with_path(state, "count")) == 2

    changed = optax.tree.set(state, mu=None, count=jnp.int32(7))
    assert changed[1][0].mu is None
    assert int(changed[1][0].count) == int(changed[1][1].count) == 7
    assert changed[1][0].nu is adam_state.nu


@pytest.mark.parametrize("case", FAMILY, ids=str)
def test_map_params_reaches_every_moment(case):
    """optax.tree.map_params builds partition specs: moments get the parameters', the rest None."""
    tx = optax.masked(case(halved), {"dense": True, "scale": True})
    params = problem()
    specs = jax.tree.map(lambda p: f"spec of rank {p.ndim}", params)
    state = tx.init(params)
    found = optax.tree.map_params(
        tx, lambda _, spec: spec, state, specs, transform_non_params=lambda _: None
    )
    assert found.inner_state[0]._asdict() == {
        name: None if name == "count" else specs for name in state.inner_state[0]._fields
    }
    assert jax.tree.leaves(found.inner_state[1:]) == []


@pytest.mark.parametrize("case", [case for case in FAMILY if case.peer], ids=str)
def test_injected_hyperparameters_take_every_member(case):
    """inject_hyperparams passes each number as an array: it changes nothing but the rounding."""
    params = problem()
    grads = gradients_like(params, 0)
    plain, injected = case(LR), optax.inject_hyperparams(case.make)(LR, **case.options)
    expected, _ = jax.jit(plain.update)(grads, plain.init(params), params)
    updates, _ = jax.jit(injected.update)(grads, injected.init(params), params)
    # 1e-5: float32 roundings. That 1 - b2 of a float32 b2 is off by 3e-5 divides out at t = 1.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), updates, expected)


def test_an_injected_learning_rate_changes_without_compiling():
    """optax.tree.get and set, and the dictionary itself, on `learning_rate` between steps."""
    tx = optax.inject_hyperparams(jadam.adam)(learning_rate=LR)
    params, state = problem(), trained_state(tx)
    grads = gradients_like(params, 3)
    update = jax.jit(tx.update)
    first, _ = update(grads, state, params)
    assert float(optax.tree.get(state, "learning_rate")) == np.float32(LR)

    doubled, changed = update(
        grads, optax.tree.set(state, learning_rate=2 * state.hyperparams["learning_rate"]), params
    )
    state.hyperparams["learning_rate"] = jnp.zeros_like(state.hyperparams["learning_rate"])
    stopped, _ = update(grads, state, params)
    assert update._cache_size() == 1
    assert float(optax.tree.get(changed, "learning_rate")) == 2 * np.float32(LR)
    # Exact: multiplying by 2 and by 0 does not round.
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, 2 * y), doubled, first)
    assert not any(np.any(x) for x in jax.tree.leaves(stopped))


@jax.tree_util.register_dataclass
@dataclass
class Layer:
    kernel: Any
    bias: Any
    name: str = field(metadata={"static": True})


class Pair(NamedTuple):
    left: Any
    right: Any


def vector(seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(3), float)


TREES = {
    "array": lambda: vector(0),
    "scalar": lambda: vector(0)[0],
    "empty": dict,
    "nones": lambda: {"a": None, "b": (None, None)},
    "containers": lambda: {
        "dataclass": Layer(vector(1), None, "first"),
        "named": Pair((vector(2), None), [Layer(vector(3), {}, "second")]),
        "empty": [(), [], {}, None, Pair(None, ())],
        "no_elements": jnp.zeros((0, 4)),
    },
}


@beside_optax
@pytest.mark.parametrize("make", TREES.values(), ids=TREES.keys())
def test_any_tree_of_parameters(make):
    """None, tuples, dataclasses, empty containers, a bare array: whatever optax takes."""

    def run(lib: ModuleType) -> tuple[Any, Any]:
        tx = optax.chain(lib.adam(LR), lib.adamw(LR, weight_decay=0.1))

        def step(carry: Any, seed: Any) -> tuple[Any, None]:
            params, state = carry
            grads = jax.tree.map(lambda p: jnp.sin(3 * p + seed), params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        params = make()
        return jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), jnp.arange(5.0))[0])()

    (our_params, our_state), (their_params, their_state) = run(jadam), run(optax)
    assert_same(our_params, their_params)
    assert_same(as_optax(our_state), their_state)


@beside_optax
def test_no_parameters_at_all():
    """None as the whole tree, what equinox.filter leaves of a layer without parameters."""

    def run(lib: ModuleType) -> Any:
        tx = lib.adam(LR)
        return tx.update(None, tx.init(None))

    (our_updates, our_state), (their_updates, their_state) = run(jadam), run(optax)
    assert our_updates is their_updates is None
    assert as_optax(our_state) == their_state


@beside_optax
def test_leaves_that_are_no_jax_arrays():
    """Python numbers and NumPy arrays as parameters and as gradients."""
    params, grads = {"a": 1.0, "b": np.ones(2)}, {"a": 0.5, "b": np.array([2.0, -1.0])}
    assert_same(
        first_step(jadam.adam(LR), params, grads), first_step(optax.adam(LR), params, grads)
    )


@beside_optax
def test_integer_leaves_are_held_out_by_masked():
    """A tree with a step counter in it trains with its floating-point leaves only."""
    params = {"w": vector(0), "steps": jnp.int32(3)}
    grads = {"w": vector(1), "steps": jnp.int32(0)}
    ours, theirs = (
        optax.masked(lib.adam(LR), {"w": True, "steps": False}) for lib in (jadam, optax)
    )
    assert_same(first_step(ours, params, grads), first_step(theirs, params, grads))


@beside_optax
def test_a_population_under_vmap():
    """init and update mapped over an axis of members train each as optax does."""
    population = jax.tree.map(lambda p: jnp.stack([p, 2 * p, -p]), problem())
    ours, theirs = (
        optax.GradientTransformation(jax.vmap(tx.init), jax.vmap(tx.update))
        for tx in (jadam.adam(LR), optax.adam(LR))
    )
    assert_same(
        first_step(ours, population, population), first_step(theirs, population, population)
    )


@pytest.mark.parametrize("make", [jadam.adamw, jadam.amsgrad])
@pytest.mark.parametrize("jit_init", [False, True], ids=["eager_init", "jit_init"])
def test_parameters_and_state_can_be_donated(make, jit_init):
    """donate_argnums works from the first step: no two leaves share a buffer, all are reused."""
    tx = make(LR)

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = problem()
    state = (jax.jit(tx.init) if jit_init else tx.init)(params)
    grads = gradients_like(params, 0)
    kept = jax.jit(step)(params, state, grads)
    given = jax.jit(step, donate_argnums=(0, 1))(params, state, grads)
    assert all(x.is_deleted() for x in jax.tree.leaves((params, state)))
    jax.tree.map(np.testing.assert_array_equal, given, kept)


@pytest.mark.parametrize("case", FAMILY, ids=str)
def test_a_copied_or_pickled_state_is_the_state(case):
    """copy and pickle keep classes, types and every bit."""
    state = trained_state(case(halved))
    for through in (copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        restored = through(state)
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        assert jax.tree.map(jax.typeof, restored) == jax.tree.map(jax.typeof, state)
        jax.tree.map(np.testing.assert_array_equal, restored, state)


def by_module_level_init(params):
    return jadam.init(params)


@pytest.mark.parametrize("through", [copy.copy, copy.deepcopy], ids=["copy", "deepcopy"])
def test_a_copied_transformation_is_the_transformation(through):
    """With its `step`, which a tuple of two functions does not have."""
    tx = jadam.adamw(LR, weight_decay=0.1)
    copied, params = through(tx), problem()
    assert type(copied) is type(tx)
    grads = gradients_like(params, 0)
    state = tx.init(params)
    for name, arguments in {
        "update": (grads, state, params),
        "step": (grads, copied.init(params), params),
    }.items():
        jax.tree.map(
            np.testing.assert_array_equal,
            getattr(copied, name)(*arguments),
            getattr(tx, name)(*arguments),
        )


def test_a_pickled_transformation_has_its_step():
    """Of functions that pickle can name, as optax's: those that close over options it cannot."""
    tx = type(jadam.adam(LR))(by_module_level_init, jadam.update)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(tx, protocol))
        assert type(again) is type(tx)
        assert tuple(again) == tuple(tx)
        assert callable(again.step)


@pytest.mark.parametrize("way", ["update", "step"])
def test_the_counts_of_schedules_stay_at_their_largest(way):
    """2³¹-1 and not a negative number, of which a schedule would make another rate."""
    largest, params = 2**31 - 1, {"w": jnp.ones(2)}

    def schedule(count):
        return jnp.where(count >= 0, 0.1, 1e9)

    tx = jadam.adamw(schedule, weight_decay=schedule)
    state = jax.tree.map(
        lambda x: jnp.full_like(x, largest - 1) if x.dtype == jnp.int32 else x, tx.init(params)
    )
    for _ in range(3):
        moved, state = getattr(tx, way)({"w": jnp.ones(2)}, state, params)
        counts = [x for x in jax.tree.leaves(state) if x.dtype == jnp.int32]
        assert [int(x) for x in counts] == [largest] * 3
        assert jnp.max(jnp.abs(moved["w"])) < 2


def test_averaged_parameters():
    """optax.incremental_update on what apply_updates returns keeps the parameters' types."""
    average = problem()
    params, _ = first_step(jadam.adam(LR), average, gradients_like(average, 0))
    averaged = optax.incremental_update(params, average, step_size=0.25)
    assert jax.tree.map(jax.typeof, averaged) == jax.tree.map(jax.typeof, average)
    for a, p, q in zip(*map(jax.tree.leaves, (averaged, params, average)), strict=True):
        # Four float32 roundings of terms of size 1.
        np.testing.assert_allclose(a, 0.25 * p + 0.75 * q, rtol=0, atol=4 * 2.0**-24)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", ["adam", "adamw", "amsgrad"])
def test_injected_hyperparameters_of_complex_parameters(name):
    """optax gives them the parameters' dtype, complex64, and so they arrive; the same steps."""

    def trained(lib):
        options = {"maximum": "corrected"} if (lib, name) == (jadam, "amsgrad") else {}
        make = optax.inject_hyperparams(getattr(lib, name), static_args=tuple(options))
        tx = make(learning_rate=1e-2, **options)
        params = jnp.asarray([1 + 2j, -3j], jnp.complex64)
        state = tx.init(params)
        for _ in range(3):
            updates, state = jax.jit(tx.update)(params, state, params)
            params = optax.apply_updates(params, updates)
        return params

    # optax's float32 bias correction is off by 7e-6 in the first steps, of a step of 0.01.
    np.testing.assert_allclose(trained(jadam), trained(optax), rtol=0, atol=1e-6)


class Net(eqx.Module):
    """A model that is called, with a leaf that does not train and a function among its leaves."""

    weight: Any
    bias: Any
    steps: Any = None
    activation: Any = jax.nn.relu

    def __call__(self, x):
        return self.activation(self.weight @ x + self.bias)


@pytest.mark.usefixtures("standard_promotion")
def test_parameters_without_a_gradient_are_left_alone():
    """An Equinox model passed whole: functions, counters, frozen leaves have None as gradient."""
    model = Net(jnp.ones((2, 3)), jnp.ones(2), jnp.int32(7))
    trained = eqx.tree_at(lambda m: m.bias, eqx.filter(model, eqx.is_inexact_array), None)

    def after(lib):
        tx = lib.adamw(LR, weight_decay=0.1)
        updates, state = tx.update(trained, tx.init(trained), model)
        return eqx.apply_updates(model, updates), state

    (ours, _), (theirs, _) = after(jadam), after(optax)
    # optax's float32 bias correction is off by 7e-6 of a step of 0.1.
    np.testing.assert_allclose(ours.weight, theirs.weight, rtol=1e-6)
    tx = jadam.adamw(LR, weight_decay=0.1)
    stepped, _ = tx.step(trained, tx.init(trained), model)
    np.testing.assert_allclose(stepped.weight, theirs.weight, rtol=1e-6)
    assert (stepped.bias is model.bias, stepped.steps is model.steps) == (True, True)
    assert stepped.activation is jax.nn.relu


@pytest.mark.parametrize("wrap", [jadam.compensated_weights, jadam.stochastic_rounding])
def test_16_bit_weights_beside_leaves_without_a_gradient(wrap):
    """Likewise in the wrappers: the same updates as for the trained leaves alone."""
    model = Net(jnp.ones((2, 3), jnp.bfloat16), jnp.ones(2, jnp.bfloat16), jnp.int32(7))
    trained = eqx.tree_at(lambda m: m.bias, eqx.filter(model, eqx.is_inexact_array), None)
    tx = wrap(jadam.adamw(LR))
    state = tx.init(trained)
    jax.tree.map(
        np.testing.assert_array_equal,
        tx.update(trained, state, model),
        tx.update(trained, state, trained),
    )


@pytest.mark.parametrize("lib_mask", ["tree", "function", "partial"])
def test_a_mask_may_be_a_tree_that_can_be_called(lib_mask):
    """An Equinox module of booleans is a mask; a function in the form of a tree is a function."""
    params = Net(jnp.ones((2, 3)), jnp.ones(2), activation=None)
    tree = Net(True, False, activation=None)
    mask = {
        "tree": tree,
        "function": lambda p: tree,
        "partial": jax.tree_util.Partial(lambda flag, p: tree, True),
    }[lib_mask]
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = jadam.adamw(1.0, weight_decay=0.5, mask=mask)
    updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_array_equal(updates.weight, -0.5)
    np.testing.assert_array_equal(updates.bias, 0)
    updates, _ = jadam.update(
        zeros, jadam.init(params), params, learning_rate=1.0, weight_decay=0.5, mask=mask
    )
    np.testing.assert_array_equal(updates.bias, 0)


def test_a_wrong_mask_is_refused_when_the_state_is_made():
    """By its name, with the tree that was expected, where optax gives JAX's own error."""
    tx = jadam.adamw(LR, mask={"encoder": True})
    with pytest.raises(ValueError, match="mask: expected a tree like params or a prefix of it"):
        tx.init(problem())


# A transformation is a tree of its functions


def stepped(tx, params):
    return tx.step(params, tx.init(params), params)[0]


def test_a_transformation_goes_through_what_takes_trees():
    """eqx.filter_jit with it as an argument, a module's field, tree.map, _replace, deepcopy."""
    params, tx = problem(), jadam.adamw(LR, weight_decay=0.1)
    expected = stepped(tx, params)

    class Trainer(eqx.Module):
        tx: Any

    trainer = eqx.filter_jit(lambda trainer: trainer)(Trainer(tx))
    ways = {
        "map": jax.tree.map(lambda x: x, tx),
        "flatten": jax.tree.unflatten(*reversed(jax.tree.flatten(tx))),
        "replace": tx._replace(init=tx.init),
        "deepcopy": copy.deepcopy(tx),
        "field": trainer.tx,
    }
    for name, way in ways.items():
        assert type(way) is jadam.FusedTransformation, name
        jax.tree.map(np.testing.assert_array_equal, stepped(way, params), expected)
    # Compiled, XLA fuses products and sums: an ulp of the parameters, which are up to 3.
    compiled = eqx.filter_jit(stepped)(tx, params)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), compiled, expected
    )


@pytest.mark.usefixtures("standard_promotion")
def test_another_update_is_followed_by_its_own_step():
    """`step` follows from `update`, also in what jadam.sharding.streamed and _replace make."""
    params, tx = problem(), jadam.adam(LR)
    doubled = tx._replace(
        update=lambda g, s, p=None, **extra: (
            lambda out: (jax.tree.map(lambda u: 2 * u, out[0]), out[1])
        )(tx.update(g, s, p))
    )
    for p, new, twice in zip(
        *map(jax.tree.leaves, (params, stepped(tx, params), stepped(doubled, params))), strict=True
    ):
        np.testing.assert_allclose(twice - p, 2 * (new - p), rtol=0, atol=1e-6)  # ulps of p
    host = jadam.sharding.state_shardings(tx, params)
    moved = jax.jit(functools.partial(stepped, jadam.sharding.streamed(tx, host)))(params)
    for new, expected in zip(*map(jax.tree.leaves, (moved, stepped(tx, params))), strict=True):
        np.testing.assert_allclose(new, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["adam", "amsgrad", "adamax", "radam"])
def test_a_direction_alone_is_that_of_its_optimizer(name):
    """`scale_by_X` and a learning rate are `X`, state and all; the rate of 1 rounds nothing."""
    options = {"maximum": "corrected"} if name == "amsgrad" else {}
    alone = optax.chain(getattr(jadam, f"scale_by_{name}")(**options), optax.scale(-1.0))
    whole, params = getattr(jadam, name)(1.0, **options), problem()
    got, state = alone.update(params, alone.init(params), params)
    expected, right = whole.update(params, whole.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    jax.tree.map(np.testing.assert_array_equal, state[0], right[0])
    theirs = getattr(optax, f"scale_by_{name}")().init(params)
    assert jax.tree.structure(state[0]) == jax.tree.structure(theirs)


@beside_optax
@pytest.mark.parametrize("name", ["nadam", "nadamw"])
def test_nadam_without_nesterov_is_adam(name):
    """As in optax, where `nesterov=False` makes it so; a decay of the momentum has no meaning."""
    params = problem()
    ours, theirs = (getattr(lib, name)(LR, nesterov=False) for lib in (jadam, optax))
    got, expected = (tx.update(params, tx.init(params), params)[0] for tx in (ours, theirs))
    assert_same(got, expected)
    with pytest.raises(ValueError, match="momentum_decay: expected None without nesterov"):
        getattr(jadam, name)(LR, nesterov=False, momentum_decay=0.004)


@beside_optax
def test_a_negative_learning_rate_climbs():
    """As optax's does: the discriminator of a GAN, a Lagrangian's dual."""
    params = problem()
    for rate in (-LR, lambda count: -LR):
        ours, theirs = (lib.adamw(rate, weight_decay=0.1) for lib in (jadam, optax))
        got, expected = (tx.update(params, tx.init(params), params)[0] for tx in (ours, theirs))
        assert_same(got, expected)
    down, _ = jadam.step(params, jadam.init(params), params, learning_rate=LR)
    up, _ = jadam.step(params, jadam.init(params), params, learning_rate=-LR)
    for p, x, y in zip(*map(jax.tree.leaves, (params, down, up)), strict=True):
        np.testing.assert_allclose(y - p, p - x, rtol=1e-12, atol=1e-15)  # float64's rounding


@pytest.mark.usefixtures("standard_promotion")
def test_what_inject_hyperparams_needs_to_be_told_is_said():
    """A size cannot be traced, and bfloat16 parameters round b2 to 1: each with its argument."""
    codes = {"mu_dtype": "int8", "nu_dtype": "uint8"}
    tx = optax.inject_hyperparams(jadam.adam, static_args=tuple(codes))(1e-3, min_size=0, **codes)
    with pytest.raises(TypeError, match=r"min_size: .* name min_size in static_args"):
        jax.jit(tx.init)(problem())
    tx = optax.inject_hyperparams(jadam.adam)(1e-3)
    with pytest.raises(ValueError, match=r"b2: .* pass hyperparam_dtype=jnp.float32"):
        tx.init(jax.tree.map(lambda p: p.astype(jnp.bfloat16), problem()))


@pytest.mark.parametrize("wrap", [jadam.compensated_weights, jadam.stochastic_rounding])
def test_16_bit_weights_say_how_their_updates_are_applied(wrap):
    """eqx.apply_updates leaves parameters in float32: the second step says what to call."""
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    tx = wrap(jadam.adam(LR))
    updates, state = tx.update(params, tx.init(params), params)
    with jax.numpy_dtype_promotion("standard"):
        params = eqx.apply_updates(params, updates)
    with pytest.raises(TypeError, match=r"params\['w'\]: .*optax.apply_updates.*tx.step"):
        tx.update(params, state, params)


@pytest.mark.parametrize("wrap", [jadam.compensated_weights, jadam.stochastic_rounding])
def test_what_changes_the_updates_of_16_bit_weights_is_noticed(wrap):
    """`chain(wrap(tx), scale(.5))` left every weight where it was, without a word.

    The stack says it while the step is traced, in whatever the chain is; what comes before or
    inside is no matter, nor what runs the whole chain, nor what becomes of float32 parameters.
    """
    narrow = {"w": jnp.ones(3, jnp.bfloat16)}
    tx, half = wrap(jadam.adam(LR)), optax.scale(0.5)

    def step(outer, params=narrow):
        jax.eval_shape(outer.update, params, jax.eval_shape(outer.init, params), params)

    for outer in (
        optax.chain(half, tx),
        optax.chain(tx, optax.identity()),
        optax.chain(optax.chain(half, tx)),
        optax.chain(optax.masked(tx, {"w": True}), optax.masked(half, {"w": False})),
        wrap(optax.chain(jadam.adam(LR), half)),
        optax.named_chain(("half", half), ("tx", tx)),
    ):
        step(outer)  # warnings are errors here
    step(optax.chain(tx, half), {"w": jnp.ones(3)})
    for outer in (
        optax.chain(tx, half),
        optax.chain(half, optax.chain(tx, optax.identity()), half),
        optax.chain(optax.masked(tx, {"w": True}), half),
        optax.named_chain(("tx", tx), ("scale", half)),
    ):
        with pytest.warns(UserWarning, match=f"^{wrap.__name__}: .*, and scale after it") as found:
            step(outer)
        assert "optax" not in found[0].filename


@pytest.mark.parametrize("wrap", [jadam.compensated_weights, jadam.stochastic_rounding])
def test_what_chooses_between_updates_and_gradients_belongs_inside_16_bit_weights(wrap):
    """JAX's error of two branches of unequal dtypes says neither what is wrong nor what to do."""
    params = {"w": jnp.ones(3, jnp.bfloat16)}

    def often(step, **extra):
        return step % 2 == 0

    outers = {
        "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
        "conditionally_mask": lambda tx: optax.conditionally_mask(tx, often),
        "conditionally_transform": lambda tx: optax.conditionally_transform(tx, often),
    }
    for name, outer in outers.items():
        tx = outer(wrap(jadam.adam(LR)))
        with pytest.raises(TypeError, match=rf"^optax.{name}: .*{wrap.__name__}\(optax.{name}"):
            tx.update(params, tx.init(params), params)
        inside = wrap(outer(jadam.adam(LR)))
        jax.eval_shape(inside.update, params, jax.eval_shape(inside.init, params), params)
