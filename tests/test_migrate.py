"""Migration: a trajectory goes on in another library as if nothing had happened, or an error.

torch's and Keras's states are recorded in tests/fixtures, with versions; where the libraries are
installed, they also go on where jadam stopped.
"""

import concurrent.futures
import contextlib
import copy
import functools
import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_drop_in
from fixtures import convolution, optimizer_states
from helpers import FAMILY, gradients_like
from hypothesis import given, settings
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from trajectories import generate

import jadam
from jadam import migrate
from jadam.migrate import _foreign

pytestmark = pytest.mark.usefixtures("quick_compilation")
STEPS = optimizer_states.STEPS
GRADIENTS = generate.gradients(2 * STEPS)
RECORDED = optimizer_states.recorded()
RATE = 1e-3
SMALL = {"mu_dtype": "int8", "nu_dtype": "uint8", "min_size": 0}
SMALLEST = {"mu_dtype": "int4", "nu_dtype": "uint4", "min_size": 0}


def assert_identical(found, expected):
    """The same tree with the same bits; of abstract ones the same shapes and dtypes."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, x), y in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        where = jax.tree_util.keystr(path)
        assert (x.shape, x.dtype) == (y.shape, y.dtype), where
        if not isinstance(x, jax.ShapeDtypeStruct):
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), where


def stepper(tx):
    """Parameters and state after gradients in a row: one compiled step, called for each."""

    @jax.jit
    def step(g, params, state):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    def steps(gradients, params, state):
        for g in gradients:
            params, state = step(g, params, state)
        return params, state

    return steps


# optax

# Each set of equations that optax has.
PEERS = [x for x in FAMILY if x.name in ("adamw", "nadam", "amsgrad_corrected", "adamax", "radam")]


@pytest.mark.parametrize("case", PEERS, ids=str)
def test_optax_and_jadam_go_on_where_the_other_stopped(x64, standard_promotion, case):
    """Half in one and half in the other is the whole in one, in a chain, with a schedule."""
    schedule = optax.exponential_decay(0.1, 3, 0.5)
    clip = optax.clip_by_global_norm(3.0)
    ours = optax.chain(clip, case(schedule))
    theirs = optax.chain(clip, case.optax(schedule))
    params = test_drop_in.problem()
    gradients = [gradients_like(params, seed) for seed in range(10)]
    in_jadam, in_optax, maximum = stepper(ours), stepper(theirs), case.options.get("maximum")
    expected, expected_state = in_optax(gradients, params, theirs.init(params))

    middle, state = in_optax(gradients[:5], params, theirs.init(params))
    migrated = migrate.from_optax(state, maximum=maximum)
    assert_identical(migrate.to_optax(migrated, maximum=maximum), state)
    end, end_state = in_jadam(gradients[5:], middle, migrated)
    test_drop_in.assert_same(end, expected)
    test_drop_in.assert_same(migrate.to_optax(end_state, maximum=maximum), expected_state)

    middle, state = in_jadam(gradients[:5], params, ours.init(params))
    end, _ = in_optax(gradients[5:], middle, migrate.to_optax(state, maximum=maximum))
    test_drop_in.assert_same(end, expected)


@test_drop_in.each_program
def test_a_state_of_any_program_is_optaxs(program):
    """Inside chains, masks, partitions and wrappers, also of abstract states."""
    params = jax.eval_shape(lambda: program.wrap(test_drop_in.problem()))
    ours, theirs = (jax.eval_shape(program.build(lib).init, params) for lib in (jadam, optax))
    assert_identical(migrate.to_optax(ours), theirs)
    assert_identical(migrate.from_optax(theirs), ours)


@pytest.mark.parametrize("abstract", [False, True])
def test_complex_parameters_have_a_real_second_moment_in_jadam(abstract):
    """optax keeps a zero imaginary part; one that is not zero is refused."""
    params = {"w": jnp.ones(3, jnp.complex64)}
    ours, theirs = jadam.adam(0.1).init(params), optax.adam(0.1).init(params)
    wrong = theirs[0]._replace(nu={"w": jnp.full(3, 1j, jnp.complex64)})
    if abstract:
        ours, theirs = jax.eval_shape(lambda: (ours, theirs))
    assert_identical(migrate.from_optax(theirs), ours)
    assert_identical(migrate.to_optax(ours), theirs)
    with pytest.raises(ValueError, match=r"^state\[0\].nu\['w'\]: expected .* no imaginary part"):
        migrate.from_optax((wrong,))


@pytest.mark.parametrize("said", [None, "raw", "Raw"])
def test_the_two_maxima_of_amsgrad_are_not_mixed(said):
    """optax keeps the maximum of the corrected v, torch and Keras that of the raw one."""
    ours, theirs = (lib.amsgrad(0.1).init(jnp.ones(3)) for lib in (jadam, optax))
    for convert, state in ((migrate.to_optax, ours), (migrate.from_optax, theirs)):
        with pytest.raises(ValueError, match=r"^maximum: expected .*corrected"):
            convert(state, maximum=said)
    if said != "raw":
        state_dict = RECORDED["torch"]["amsgrad"]["state"]
        with pytest.raises(ValueError, match=r"^maximum: expected .*raw"):
            migrate.from_torch(state_dict, ours, lambda path: "weight", maximum=said)


def test_a_tree_without_adam_is_refused():
    """A state of another optimizer comes with an error that says what was expected."""
    adam, sgd = jadam.adam(0.1).init(jnp.ones(3)), optax.sgd(0.1).init(jnp.ones(3))
    for convert, state, expected in [
        (migrate.from_optax, sgd, "ScaleByAdamState"),
        (migrate.to_optax, sgd, "ScaleByAdamState"),
        (lambda state: migrate.cast_like(adam, state), sgd, "ScaleByAdamState"),
    ]:
        with pytest.raises(ValueError, match=f"expected .*{expected}.* found none"):
            convert(state)


# torch and Keras

LIKE_TORCH = {
    "adam": (jadam.adam, {}),
    "amsgrad": (jadam.amsgrad, {}),
    "adamw": (jadam.adamw, {"weight_decay": 0.1}),
    "nadam": (jadam.nadam, {"momentum_decay": 4e-3}),
    "adamax": (jadam.adamax, {}),
    "radam": (jadam.radam, {"eps": 1e-30}),
}
LIKE_KERAS = {
    "adam": (jadam.adam, {"eps": 1e-30}),
    "amsgrad": (jadam.amsgrad, {"eps": 1e-30}),
    "adamw": (jadam.adamw, {"weight_decay": 0.1, "eps": 1e-30}),
    "nadam": (jadam.nadam, {"momentum_decay": 1.0, "eps": 1e-30}),
    "adamax": (jadam.adamax, {"eps": 1e-30}),
}


def torch_name(path):
    """Flax's path to torch's name and axes."""
    layer, name = path.split(".")
    assert layer == "fc"
    return ("weight", (1, 0)) if name == "kernel" else name


def keras_name(path):
    return path.replace(".", "/")


class Torch:
    library, recorder, like = "torch", optimizer_states.Torch, LIKE_TORCH
    arrive, depart = staticmethod(migrate.from_torch), staticmethod(migrate.to_torch)
    name = staticmethod(torch_name)

    @staticmethod
    def params(arrays):
        return {"fc": {"kernel": arrays["weight"].T, "bias": arrays["bias"]}}

    @staticmethod
    def arrays(params):
        return {
            "weight": np.array(params["fc"]["kernel"]).T,
            "bias": np.array(params["fc"]["bias"]),
        }

    @staticmethod
    def matrix(numbers):
        return numbers.reshape(-1, 2, 3).swapaxes(1, 2)


class Keras:
    library, recorder, like = "keras", optimizer_states.Keras, LIKE_KERAS
    arrive, depart = staticmethod(migrate.from_keras), staticmethod(migrate.to_keras)
    name = staticmethod(keras_name)

    @staticmethod
    def params(arrays):
        return {"fc": {"kernel": arrays["fc/kernel"], "bias": arrays["fc/bias"]}}

    @staticmethod
    def arrays(params):
        return {f"fc/{name}": np.array(p) for name, p in params["fc"].items()}

    @staticmethod
    def matrix(numbers):
        return numbers.reshape(-1, 3, 2)


each_case = pytest.mark.parametrize(
    ("side", "case"),
    [(side, case) for side in (Torch, Keras) for case in side.like],
    ids=lambda x: x if isinstance(x, str) else x.library,
)


def options_of(case):
    return {"adamax": case == "adamax", "maximum": "raw" if case == "amsgrad" else None}


@functools.cache
def same_algorithm(side, case):
    """jadam's transformation, with a schedule in its state, and its steps, compiled once."""
    member, options = side.like[case]
    tx = member(optax.constant_schedule(RATE), **options)
    return tx, stepper(tx)


def on_the_way(side, case, part):
    """In float64 the recording, its parameters in the middle and the gradients of a part."""
    recorded = RECORDED[side.library][case]
    numbers = jnp.asarray(GRADIENTS[part])
    gradients = [
        {"fc": {"kernel": kernel, "bias": bias}}
        for kernel, bias in zip(side.matrix(numbers[:, :6]), numbers[:, 6:], strict=True)
    ]
    start = {k: np.asarray(x) for k, x in recorded["middle"].items()}
    return recorded, jax.tree.map(jnp.asarray, side.params(start)), gradients


@each_case
def test_jadam_goes_on_where_the_other_stopped(x64, side, case):
    """20 steps of the other library, migrated, and 20 of jadam are its 40, which are recorded."""
    recorded, params, gradients = on_the_way(side, case, slice(STEPS, None))
    tx, steps = same_algorithm(side, case)
    state = side.arrive(recorded["state"], tx.init(params), side.name, **options_of(case))
    assert [int(x) for x in jax.tree.leaves(state) if x.dtype == jnp.int32] == [STEPS, STEPS]
    end, _ = steps(gradients, params, state)
    # 1e-13: rounding of 20 steps of 1e-3, measured at most 2e-15. A wrong step, moment or axis
    # shows at 1e-5 and above.
    for name, p in side.arrays(end).items():
        np.testing.assert_allclose(p, recorded["end"][name], rtol=0, atol=1e-13, err_msg=name)


@each_case
def test_the_other_goes_on_where_jadam_stopped(x64, side, case):
    """20 steps of jadam, migrated, and 20 of the installed library are its 40."""
    if importlib.util.find_spec(side.library) is None:
        pytest.skip(f"{side.library} is not installed: there and back stands for it")
    recorded, _, gradients = on_the_way(side, case, slice(STEPS))
    tx, steps = same_algorithm(side, case)
    numbers = jnp.asarray(generate.INITIAL)
    start = {"fc": {"kernel": side.matrix(numbers[:6])[0], "bias": numbers[6:]}}
    params, state = steps(gradients, start, tx.init(start))
    run = side.recorder(case)
    run.assign(side.arrays(params), side.depart(state, run.state(), side.name, **options_of(case)))
    end = run.steps(GRADIENTS[STEPS:])
    # As above; torch's product of momenta in float32 adds 1e-15.
    for name, p in end.items():
        np.testing.assert_allclose(p, recorded["end"][name], rtol=0, atol=1e-13, err_msg=name)


def flattened(value, where=""):
    """The values in nested mappings, by their keys."""
    if not isinstance(value, dict):
        return {where: value}
    parts = (flattened(x, f"{where}[{key!r}]") for key, x in value.items())
    return functools.reduce(dict.__or__, parts, {})


@each_case
def test_there_and_back_is_every_bit(x64, side, case):
    """What was recorded comes back, nothing that was given is changed."""
    recorded, params, _ = on_the_way(side, case, slice(STEPS))
    tx, _ = same_algorithm(side, case)
    given, options = copy.deepcopy(recorded["state"]), options_of(case)
    state = side.arrive(given, jax.eval_shape(tx.init, params), side.name, **options)
    back = side.depart(state, given, side.name, **options)
    assert given == recorded["state"]
    found, expected = flattened(back), flattened(given)
    assert list(found) == list(expected)
    for where, x in found.items():
        # torch keeps NAdam's product of momenta in float32; Keras rounded it 20 times.
        rtol = {"nadam": 1e-7}.get(case, 0) if np.ndim(x) == 0 and side is Torch else 0
        rtol = 1e-14 if "variable" in where else rtol
        if isinstance(x, np.ndarray):
            np.testing.assert_allclose(x, expected[where], rtol=rtol, atol=0, err_msg=where)
    assert_identical(side.arrive(back, tx.init(params), side.name, **options)[0], state[0])


@pytest.mark.parametrize("side", [Torch, Keras], ids=lambda side: side.library)
def test_a_convolution_keeps_the_order_of_its_axes(x64, side):
    """Four axes of four lengths, by a permutation that is not its own inverse, both ways.

    Torch's order into Flax's, and Keras's into Equinox's, which is torch's.
    """
    file = np.load(convolution.FILE)
    recorded = {name: file[f"{side.library}/{name}"] for name in ("middle", "m", "v", "end")}
    to_jadam = (2, 3, 1, 0) if side is Torch else (3, 2, 0, 1)
    back = np.argsort(to_jadam)
    assert tuple(back) != to_jadam

    def ours(array):
        """An array of the recording's library in the order of jadam's parameter."""
        return jnp.asarray(array.transpose(to_jadam))

    # As recorded, height, width, in and out.
    there = (3, 2, 0, 1) if side is Torch else (0, 1, 2, 3)
    gradients = [ours(g.transpose(there)) for g in convolution.GRADIENTS]
    start = ours(convolution.START.transpose(there))
    tx = jadam.adam(1e-3, eps=1e-8 if side is Torch else 1e-30)
    steps, like = stepper(tx), tx.init(start)
    moments = dict(zip(("exp_avg", "exp_avg_sq"), (recorded["m"], recorded["v"]), strict=True))
    count = convolution.STEPS
    if side is Torch:
        group = {"params": [0], "betas": (0.9, 0.999), "amsgrad": False}
        given = {"state": {0: {"step": float(count), **moments}}, "param_groups": [group]}
        name = {"": (0, to_jadam)}.get
    else:
        keys = ("adam/conv_kernel_momentum", "adam/conv_kernel_velocity")
        given = {"adam/iteration": count, **dict(zip(keys, moments.values(), strict=True))}
        name = {"": ("conv/kernel", to_jadam)}.get

    # 1e-13: rounding, as above.
    arrived = side.arrive(given, like, name)
    end, _ = steps(gradients[count:], ours(recorded["middle"]), arrived)
    np.testing.assert_allclose(end, ours(recorded["end"]), rtol=0, atol=1e-13)
    _, state = steps(gradients[:count], start, like)
    left = flattened(side.depart(state, given, name))
    for where, expected in flattened(given).items():
        if np.ndim(expected) == 4:
            np.testing.assert_allclose(left[where], expected, rtol=0, atol=1e-13, err_msg=where)


@pytest.mark.parametrize("names", [["weight", "bias"], "numbers", "given as keys"])
def test_torchs_parameters_are_named_in_every_way_that_torch_has(names):
    """By param_names, by the user's list, by number, and as torch.distributed.checkpoint does."""
    state_dict = copy.deepcopy(RECORDED["torch"]["adam"]["state"])
    like = jadam.adam(RATE).init({"fc": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}})
    expected = migrate.from_torch(state_dict, like, torch_name)
    name = torch_name
    for group, label in zip(state_dict["param_groups"], ("weight", "bias"), strict=True):
        del group["param_names"]
        if names == "given as keys":
            (number,) = group["params"]
            group["params"] = [label]
            state_dict["state"][label] = state_dict["state"].pop(number)
    if names == "numbers":
        name = {"fc.kernel": (0, (1, 0)), "fc.bias": 1}.get
    found = migrate.from_torch(
        state_dict, like, name, names=names if isinstance(names, list) else None
    )
    assert_identical(found, expected)


def test_arrays_may_be_torchs_own():
    """Tensors, also in bfloat16, which NumPy does not have; the state does not follow them."""
    torch = pytest.importorskip("torch")
    like = jadam.adam(RATE, mu_dtype=jnp.bfloat16).init(jnp.ones(3, jnp.bfloat16))
    entry = {
        "step": torch.tensor(7.0),
        "exp_avg": torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16),
        "exp_avg_sq": torch.tensor([1.0, 4.0, 9.0], dtype=torch.bfloat16),
    }
    group = {"params": [0], "betas": (0.9, 0.999), "amsgrad": False}
    state = migrate.from_torch({"state": {0: entry}, "param_groups": [group]}, like, lambda _: 0)
    for tensor in entry.values():
        tensor.zero_()
    assert int(state[0].count) == 7
    assert (state[0].mu.dtype, state[0].nu.dtype) == (jnp.bfloat16, jnp.float32)
    assert state[0].mu.tolist() == [1.0, 2.0, 3.0]
    assert state[0].nu.tolist() == [1.0, 4.0, 9.0]
    back = migrate.to_torch(state, {"state": {}, "param_groups": [group]}, lambda _: 0)
    assert {k: x.dtype for k, x in back["state"][0].items()} == dict.fromkeys(entry, np.float32)
    back["state"][0]["exp_avg"][:] = 0.0
    assert state[0].mu.tolist() == [1.0, 2.0, 3.0]


def test_only_the_moments_and_counts_of_a_chain_change(standard_promotion):
    """Several states, masks, schedules and injected hyperparameters; no leaves share a buffer."""

    halved, inject = test_drop_in.halved, optax.inject_hyperparams
    parts = {
        "decays": inject(jadam.adamw)(halved, weight_decay=0.1),
        "not": jadam.adam(halved, b1=0.8),
    }
    labels = {"fc": {"kernel": "decays", "bias": "not"}}
    params = {"fc": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
    like = optax.chain(optax.ema(0.9), optax.partition(parts, labels)).init(params)
    # One transformation for each group may have other betas, one for both may not.
    state_dict = copy.deepcopy(RECORDED["torch"]["adam"]["state"])
    state_dict["param_groups"][1]["betas"] = [0.8, 0.999]
    with pytest.raises(ValueError, match=r"\['param_groups'\]\[.\]: b1: expected 0"):
        migrate.from_torch(state_dict, jadam.init(params), torch_name)
    state = migrate.from_torch(state_dict, like, torch_name)
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, like)
    rows = zip(jax.tree.leaves_with_path(state), jax.tree.leaves(like), strict=True)
    changed = {jax.tree_util.keystr(path) for (path, x), y in rows if np.any(x != y)}
    decays = "[1].inner_states['decays'].inner_state"
    not_decays = "[1].inner_states['not'].inner_state"
    assert changed == {
        f"{decays}.count",
        f"{decays}.hyperparams_states['learning_rate'].count",
        f"{decays}.inner_state[0].count",
        f"{decays}.inner_state[0].mu['fc']['kernel']",
        f"{decays}.inner_state[0].nu['fc']['kernel']",
        f"{not_decays}[0].count",
        f"{not_decays}[0].mu['fc']['bias']",
        f"{not_decays}[0].nu['fc']['bias']",
        f"{not_decays}[1].count",
    }
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    assert len(set(pointers)) == len(pointers)


def test_arrays_go_where_like_is():
    """A sharded state's moments arrive sharded, also after a file."""
    mesh = Mesh(np.array(jax.devices()[:2]), "x")
    sharding = NamedSharding(mesh, P("x"))
    params = jax.device_put(jnp.ones(2), sharding)
    entry = {"step": 1, "exp_avg": np.ones(2), "exp_avg_sq": np.ones(2)}
    group = {"params": ["w"], "betas": (0.9, 0.999), "amsgrad": False}
    like = jadam.adam(RATE).init(params)
    state = migrate.from_torch(
        {"state": {"w": entry}, "param_groups": [group]}, like, lambda _: "w"
    )
    assert state[0].mu.sharding == state[0].nu.sharding == like[0].mu.sharding == sharding


# What does not fit

GROUP = {"params": [0, 1], "betas": [0.9, 0.999], "eps": 1e-8, "amsgrad": False, "lr": 0.1}


def torch_mapping():
    entries = {
        i: {"step": 7.0, "exp_avg": np.ones(shape), "exp_avg_sq": np.full(shape, 2.0)}
        for i, shape in enumerate([(2, 3), (2,)])
    }
    return {"state": entries, "param_groups": [{**GROUP, "param_names": ["weight", "bias"]}]}


def keras_mapping():
    return {
        "adam/iteration": np.int32(7),
        "adam/learning_rate": np.float32(0.1),
        "adam/fc_kernel_momentum": np.ones((3, 2)),
        "adam/fc_kernel_velocity": np.full((3, 2), 2.0),
        "adam/fc_bias_momentum": np.ones(2),
        "adam/fc_bias_velocity": np.full(2, 2.0),
    }


def layer_state(member=jadam.adam, **options):
    return member(RATE, **options).init({"fc": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}})


GONE = object()
STATE, FIRST = "state_dict['state']", "state_dict['param_groups'][0]"
TORCH_REFUSED = [
    (("state",), GONE, "state_dict: expected the keys 'state' and 'param_groups'"),
    (("more",), 1, "state_dict: expected the keys .* got .*'more'"),
    (("state",), [], f"{STATE}: expected a mapping, got list"),
    (("state",), {}, f"{STATE}[1]['step'] is missing"),
    (("state", 1), GONE, f"{STATE}[1]['step'] is missing"),
    (("state", 1), None, f"{STATE}[1]: expected a mapping, got NoneType"),
    (("state", 2), {"step": 7.0}, f"{STATE}[2]['step'] is not expected"),
    (("state", 0, "step"), GONE, f"{STATE}[0]['step'] is missing"),
    (("state", 0, "step"), 8.0, f"{STATE}[0]['step']: expected 7 as {STATE}[1]['step'] has, got 8"),
    (("state", 0, "step"), -1.0, f"{STATE}[0]['step']: expected a whole number >= 0"),
    (("state", 0, "step"), 7.5, f"{STATE}[0]['step']: expected a whole number"),
    (("state", 0, "step"), np.nan, f"{STATE}[0]['step']: expected a whole number"),
    (("state", 0, "step"), 2**31, f"{STATE}[0]['step']: expected a whole number"),
    (("state", 0, "step"), True, f"{STATE}[0]['step']: expected a number of updates"),
    (("state", 0, "step"), "7", f"{STATE}[0]['step']: expected a number of updates"),
    (("state", 0, "step"), [7.0], f"{STATE}[0]['step']: expected a number of updates"),
    (("state", 0, "exp_avg"), GONE, f"{STATE}[0]['exp_avg'] is missing"),
    (("state", 0, "exp_avg"), np.ones((3, 2)), f"{STATE}[0]['exp_avg']: expected shape (3, 2)"),
    (("state", 1, "exp_avg"), np.ones(3), f"{STATE}[1]['exp_avg']: expected shape (2,), got (3,)"),
    (("state", 1, "exp_avg"), np.ones(2, int), f"{STATE}[1]['exp_avg']: expected floating"),
    (("state", 1, "exp_avg"), np.ones(2) + 1j, f"{STATE}[1]['exp_avg']: expected floating"),
    (("state", 1, "exp_avg"), object(), f"{STATE}[1]['exp_avg']: expected floating"),
    (("state", 1, "exp_avg"), [[1.0], 2.0], f"{STATE}[1]['exp_avg']: expected an array"),
    (("state", 1, "exp_avg"), np.full(2, 1e39), f"{STATE}[1]['exp_avg']: expected numbers that"),
    (("state", 1, "exp_avg_sq"), -np.ones(2), f"{STATE}[1]['exp_avg_sq']: expected numbers >= 0"),
    (("state", 1, "exp_avg"), np.array([1.0, np.nan]), f"{STATE}[1]['exp_avg']: .*nan beside 2.0"),
    (("state", 1, "exp_avg_sq"), np.array([1.0, np.nan]), f"{STATE}[1]['exp_avg']: .* beside nan"),
    (("state", 1, "exp_avg"), np.array([1.0, np.inf]), f"{STATE}[1]['exp_avg']: .*inf beside 2.0"),
    # 5.8 times the root is the most after 7 steps, and ten times that is taken.
    (("state", 1, "exp_avg"), np.array([1.0, 99.0]), f"{STATE}[1]['exp_avg']: .* 99.0 beside 2.0"),
    (("state", 1, "max_exp_avg_sq"), np.ones(2), f"{STATE}[1]['max_exp_avg_sq'] is not expected"),
    (("state", 1, "exp_inf"), np.ones(2), f"{STATE}[1]['exp_inf'] is not expected"),
    (("param_groups",), {}, "state_dict['param_groups']: expected a list, got dict"),
    (("param_groups", 0), 1, f"{FIRST}: expected a mapping, got int"),
    (("param_groups", 0, "params"), GONE, f"{FIRST}['params'] is missing"),
    (("param_groups", 0, "params"), [0, 0], f"{FIRST}['params']: 0 is there twice"),
    (("param_groups", 0, "params"), [0, 1.5], f"{FIRST}['params'][1]: expected a name or a number"),
    (("param_groups", 0, "params"), [0], f"{FIRST}['param_names']: expected 1, got 2"),
    (("param_groups", 0, "params"), "01", f"{FIRST}['params']: expected a list, got str"),
    (("param_groups", 0, "param_names"), GONE, "name('fc.bias'): expected one of 0, 1, got 'bias'"),
    (("param_groups", 0, "betas"), GONE, f"{FIRST}['betas'] is missing"),
    (("param_groups", 0, "betas"), None, f"{FIRST}['betas']: expected a list, got NoneType"),
    (("param_groups", 0, "betas"), (0.9,), f"{FIRST}['betas']: expected 2, got 1"),
    (("param_groups", 0, "betas"), (0.9, 2.0), f"{FIRST}['betas'][1]: expected a number >= 0"),
    (("param_groups", 0, "amsgrad"), True, f"{FIRST}['amsgrad']: expected False, .* has no nu_max"),
    (("param_groups", 0, "amsgrad"), "no", f"{FIRST}['amsgrad']: expected True or False"),
    (("param_groups", 0, "amsgrad"), GONE, f"{FIRST}: expected a group of Adam, as adamax=False"),
    (("param_groups", 0, "maximize"), True, f"{FIRST}['maximize']: expected False"),
    (("param_groups", 0, "momentum_decay"), 0.0, f"{FIRST}['momentum_decay']: expected a number >"),
    (("param_groups", 0, "momentum_decay"), 0.004, f"{STATE}[1]['mu_product'] is missing"),
]
KERAS_REFUSED = [
    (("adam/iteration",), GONE, "variables: expected one key 'iteration'"),
    (("iteration",), 7, "variables: expected one key 'iteration'"),
    (("adam/iteration",), -1, "variables['adam/iteration']: expected a whole number >= 0"),
    (("adam/fc_bias_momentum",), GONE, "variables['adam/fc_bias_momentum'] is missing"),
    (("adam/fc_bias_momentum",), np.ones(3), "variables['adam/fc_bias_momentum']: expected shape"),
    (("adam/fc_bias_velocity",), -np.ones(2), "variables['adam/fc_bias_velocity']: expected .* 0"),
    (("adam/fc_bias_momentum",), np.full(2, 2e6), "variables['adam/fc_bias_momentum']: .* 2e+06"),
    (("adam/fc_bias_velocity_hat",), np.ones(2), "variables['adam/fc_bias_velocity_hat'] is not"),
    (("adam/fc_bias_average",), np.ones(2), "variables['adam/fc_bias_average'] is not expected"),
    (("variable_3",), 0.5, "variables['variable_3']: expected 0.0"),
    (("variable",), "x", "variables['variable']: expected a number"),
    ((3,), 0.5, "variables: expected the variables' paths as keys, got 3"),
]


def changed(mapping, keys, value):
    """The mapping with one entry, at nested keys, put in its place or gone."""
    mapping = copy.deepcopy(mapping)
    *outer, last = keys
    at = functools.reduce(lambda x, key: x[key], outer, mapping)
    if value is GONE:
        del at[last]
    else:
        at[last] = value
    return mapping


def pattern(text):
    """A regular expression that begins with the text; `.*` keeps its meaning."""
    return "^" + ".*".join(map(re.escape, text.split(".*")))


@pytest.mark.parametrize(("keys", "value", "message"), TORCH_REFUSED)
def test_what_is_not_torchs_is_refused_by_its_key(keys, value, message):
    """Each entry of a state dict that is missing, not expected, of a wrong type or out of range."""
    migrate.from_torch(torch_mapping(), layer_state(), torch_name)
    with pytest.raises((TypeError, ValueError), match=pattern(message)):
        migrate.from_torch(changed(torch_mapping(), keys, value), layer_state(), torch_name)


def test_a_first_step_of_torch_makes_less_than_later_ones():
    """After one step |m| is (1 - b1)/√(1 - b2) = 3.16 times √v. Ten times that is taken.

    A count that was set back to 0, with moments left, is as the first.
    """
    like, group = jadam.adam(RATE).init(jnp.ones(1)), {"params": [0], "betas": (0.9, 0.999)}
    for step, m, is_taken in ((1.0, 31.0, True), (1.0, 33.0, False), (0.0, 31.0, True)):
        entry = {"step": step, "exp_avg": np.array([m]), "exp_avg_sq": np.ones(1)}
        mapping = {"state": {0: entry}, "param_groups": [{**group, "amsgrad": False}]}
        refused = pytest.raises(ValueError, match=r"at most 31\.6 times")
        with contextlib.nullcontext() if is_taken else refused:
            migrate.from_torch(mapping, like, lambda _: 0)


def test_the_norms_of_torchs_adamax_bound_the_first_moment():
    """After one step |m| is 0.1 times u, itself and not its root. Ten times that is taken."""
    like, group = jadam.adamax(RATE).init(jnp.ones(1)), {"params": [0], "betas": (0.9, 0.999)}
    for m, is_taken in ((0.9e-6, True), (1.1e-6, False)):
        entry = {"step": 1.0, "exp_avg": np.array([m]), "exp_inf": np.full(1, 1e-6)}
        mapping = {"state": {0: entry}, "param_groups": [group]}
        refused = pytest.raises(ValueError, match=r"at most 1 times state_dict\['state'\]\[0\]")
        with contextlib.nullcontext() if is_taken else refused:
            migrate.from_torch(mapping, like, lambda _: 0, adamax=True)


def test_a_group_of_torch_without_amsgrad_is_none_with():
    """The state has a maximum, and the group says that there is none."""
    message = f"{FIRST}['amsgrad']: expected True, .* has a nu_max"
    with pytest.raises(ValueError, match=pattern(message)):
        migrate.from_torch(torch_mapping(), layer_state(jadam.amsgrad), torch_name, maximum="raw")


def test_a_group_of_torchs_adam_is_not_adamaxs():
    """Its v would become u, which is a root."""
    message = f"{FIRST}: expected a group of Adamax, as adamax=True says, got one of Adam"
    with pytest.raises(ValueError, match=pattern(message)):
        migrate.from_torch(torch_mapping(), layer_state(jadam.adamax), torch_name, adamax=True)


def test_codes_do_not_go_to_optax():
    """optax has floats alone: what converts them is named."""
    state = jadam.adam(RATE, mu_dtype="int8", nu_dtype="uint8").init(jnp.ones((64, 64)))
    with pytest.raises(TypeError, match=r"mu: expected moments in floats, .*cast_like"):
        migrate.to_optax(state)


def test_a_torch_state_of_no_parameters_has_made_no_step():
    """There is no step to read, and nothing to divide."""
    found = migrate.from_torch(
        {"state": {}, "param_groups": []}, jadam.adam(RATE).init({}), lambda _: 0
    )
    assert found[0].count == 0


def test_what_gradients_have_made_is_taken():
    """NaN and infinity in all moments, a v that underflowed, moments at Adam's own bound."""
    largest = 7.26  # of √v after many steps, at the default b1 and b2
    moments = {
        "exp_avg": np.array([np.nan, np.inf, 0.1, 1e-20, largest, -largest]),
        "exp_avg_sq": np.array([np.nan, np.inf, np.inf, 0.0, 1.0, 1.0]),
    }
    like = jadam.adam(RATE).init(jnp.ones(6))
    group = {"params": [0], "betas": (0.9, 0.999), "amsgrad": False}
    found = migrate.from_torch(
        {"state": {0: {"step": 3000.0, **moments}}, "param_groups": [group]}, like, lambda _: 0
    )
    for x, expected in zip(found[0][1:], moments.values(), strict=True):
        np.testing.assert_array_equal(x, expected.astype(np.float32))


def test_the_largest_ratio_is_attained():
    """By gradients that grow by b2/b1 a step; AdaMax's by b1/b2, as large as their norm allows.

    In float64 from the definitions of the moments; 1e-12 for rounding.
    """
    for b1, b2, t in [(0.9, 0.999, 1), (0.9, 0.999, 100), (0.9, 0.5, 9), (0.0, 0.9, 5)]:
        g = (b2 / max(b1, 1e-9)) ** np.arange(1.0, t + 1) if b1 else np.eye(t)[-1]
        ages = np.arange(t)[::-1]
        m, v = (1 - b1) * np.sum(b1**ages * g), (1 - b2) * np.sum(b2**ages * g**2)
        assert _foreign.largest_ratio(b1, b2, t, 2) == pytest.approx(m / np.sqrt(v), rel=1e-12)
        g = b2 ** -ages.astype(float)  # every one is the norm
        m, u = (1 - b1) * np.sum(b1**ages * g), 1.0
        assert _foreign.largest_ratio(b1, b2, t, 1) == pytest.approx(m / u, rel=1e-12)
    assert _foreign.largest_ratio(0.9, 0.0, 10, 2) == np.inf
    # m is g, and v is g² or u is |g|.
    assert [_foreign.largest_ratio(0.0, 0.0, 10, power) for power in (1, 2)] == [1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": jnp.int32(-1)}, "state[0].count: expected a number >= 0, got -1"),
        ({"nu": {"w": jnp.array([1.0, -1.0])}}, "state[0].nu['w']: expected numbers >= 0, got -1"),
        ({"mu": {"w": jnp.array([1e10, 1.0])}}, "state[0].mu['w']: .* 1e+10 beside 1e-10"),
        ({"mu": {"w": jnp.array([0.0, jnp.nan])}}, "state[0].mu['w']: .* nan beside 1.0"),
        ({"nu_max": {"w": jnp.array([1.0, 0.5])}}, "state[0].nu_max['w']: .* 0.5 beside 1.0"),
    ],
)
def test_what_no_gradients_have_made_is_not_taken_from_optax(change, message):
    """A negative count or second moment, a first far beyond it, NaN in one, a falling maximum."""
    ones = {"w": jnp.array([1e-10, 1.0])}
    tx = optax.amsgrad(RATE) if "nu_max" in change else optax.adam(RATE)
    state = tx.init({"w": jnp.ones(2)})
    adam = state[0]._replace(nu=ones)
    if "nu_max" in change:
        adam = adam._replace(nu_max=ones)
    maximum = "corrected" if "nu_max" in change else None
    migrate.from_optax((adam,), maximum=maximum)
    with pytest.raises(ValueError, match=pattern(message)):
        migrate.from_optax((adam._replace(**change),), maximum=maximum)


def test_optaxs_adamax_and_lost_elements_are_taken():
    """Norms beyond 1, whose roots are smaller; NaN and infinity in both moments; traced states."""
    numbers = jnp.array([1e20, jnp.nan, jnp.inf])
    state = optax.adamax(RATE).init(jnp.ones(3))
    state = (state[0]._replace(mu=numbers, nu=numbers), *state[1:])
    assert_identical(migrate.to_optax(migrate.from_optax(state)), state)
    assert_identical(jax.jit(migrate.from_optax)(state), migrate.from_optax(state))


@pytest.mark.parametrize("count", [2**24 - 1, 2**24, 2**24 + 1, 2**31 - 1])
def test_torchs_count_is_exact(count):
    """In float32, which torch has, as far as that counts; beyond in float64, which torch takes."""
    group = {"params": [0], "betas": (0.9, 0.999), "amsgrad": False}
    state = jadam.init(jnp.ones(2))._replace(count=jnp.int32(count))
    found = migrate.to_torch(state, {"state": {}, "param_groups": [group]}, lambda _: 0)
    step = found["state"][0]["step"]
    assert step == count
    assert step.dtype == (np.float32 if count <= 2**24 else np.float64)
    again = migrate.from_torch(found, jadam.init(jnp.ones(2)), lambda _: 0)
    assert again.count == count


def test_a_state_in_the_hosts_memory_is_migrated_as_any_other():
    """Its moments are compared with each other, which the device's memory alone can do."""
    state = jadam.init({"w": jnp.ones((2, 3))})
    lies = jax.tree.map(lambda x: x.sharding.with_memory_kind("pinned_host"), state)
    near, far = (migrate.from_optax(x) for x in (state, jax.device_put(state, lies)))
    assert_identical(near, far)


def test_nadams_product_without_momentum():
    """μ₁·…·μₜ is 1 before the first step, and 0 after it."""
    like = jadam.nadam(RATE, b1=0.0).init(jnp.ones(2))
    group = {"params": [0], "betas": (0.0, 0.999), "amsgrad": False, "momentum_decay": 0.004}

    def arrive(t, product):
        entry = {"step": float(t), "mu_product": np.float32(product)}
        entry |= {"exp_avg": np.zeros(2), "exp_avg_sq": np.zeros(2)}
        state_dict = {"state": {0: entry}, "param_groups": [group]}
        return migrate.from_torch(state_dict, like, lambda _: 0)

    for t, right, wrong in ((0, 1, 0), (3, 0, 1)):
        assert optax.tree.get(arrive(t, right), "count") == t
        with pytest.raises(ValueError, match=r"\['mu_product'\]: expected"):
            arrive(t, wrong)


@pytest.mark.parametrize(
    ("b1", "decay", "t"),
    [*((0.9, 0.004, t) for t in (1, 7, 100, 5000)), (0.999, 1.0, 50_000)],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nadams_product_may_be_rounded_but_not_be_another(b1, decay, t, dtype):
    """One multiplication at a time as torch has it, down to 0; of another b1, decay or t refused.

    A b1 that is off by 1e-6 changes the product by 8 units of float32 a step, rounding by half of
    one; the last case adds up to more than the 16 units that are allowed beside.
    """
    like = jadam.nadam(RATE, momentum_decay=decay).init(jnp.ones(2))
    ones = {"exp_avg": np.ones(2), "exp_avg_sq": np.ones(2)}
    group = {"params": [0], "betas": (b1, 0.999), "amsgrad": False, "momentum_decay": decay}

    def product(b1, decay, t):
        found = dtype(1)
        for mu in b1 * (1 - 0.5 * 0.96 ** (np.arange(1, t + 1) * decay)):
            found *= dtype(mu)
        return found

    def arrive(number):
        entry = {"step": float(t), "mu_product": number, **ones}
        state_dict = {"state": {0: entry}, "param_groups": [group]}
        return migrate.from_torch(state_dict, like, lambda _: 0)

    arrive(product(b1, decay, t))
    wrong = [product(b1 * (1 + 1e-6 * (1 + 16 / t)), decay, t)]
    if b1 == 0.9:  # else one more step is less than the rounding of 50,000
        wrong += [product(b1, decay, t + 1)]
        wrong += [product(b1, decay * 1.025, t)] if t > 1 else []
    for number in wrong:
        if number > 1e-30:
            with pytest.raises(ValueError, match=r"\['mu_product'\]: expected"):
                arrive(number)


@pytest.mark.parametrize(("keys", "value", "message"), KERAS_REFUSED)
def test_what_is_not_kerass_is_refused_by_its_key(keys, value, message):
    """Each variable that is missing, not expected, of a wrong type or out of range."""
    migrate.from_keras(keras_mapping(), layer_state(), keras_name)
    with pytest.raises(TypeError, match=r"expected the path of a variable, got \d+"):
        migrate.from_keras(keras_mapping(), layer_state(), len)
    with pytest.raises((TypeError, ValueError), match=pattern(message)):
        migrate.from_keras(changed(keras_mapping(), keys, value), layer_state(), keras_name)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({}, "name('fc.bias'): expected a name, a number or (name, axes), got None"),
        ({"fc.bias": 1.0}, "name('fc.bias'): expected a name, a number"),
        (
            {"fc.bias": "b", "fc.kernel": 0},
            "name('fc.bias'): expected one of 'weight', 0, 'bias', 1, got 'b'",
        ),
        ({"fc.bias": "bias", "fc.kernel": "bias"}, "name('fc.kernel'): 'bias' is what"),
        ({"fc.bias": "bias", "fc.kernel": "weight"}, f"{STATE}[0]['exp_avg']: expected shape"),
        ({"fc.bias": ("bias", (1, 0))}, "name('fc.bias'): expected an order of 1 axes"),
        ({"fc.bias": "bias", "fc.kernel": ("weight", (0, 0))}, "name('fc.kernel'): expected an"),
    ],
)
def test_a_wrong_name_is_refused(answer, message):
    """The user's function has to give each leaf a parameter of its own."""
    with pytest.raises((TypeError, ValueError), match=pattern(message)):
        migrate.from_torch(torch_mapping(), layer_state(), answer.get)


def departures():
    template = {"state": {}, "param_groups": torch_mapping()["param_groups"]}
    adam = layer_state()
    two = (adam[0], adam[0]._replace(count=jnp.int32(1)))
    complex_state = jadam.init(jnp.ones(2, jnp.complex64))
    one = {"state": {}, "param_groups": [{**GROUP, "params": ["w"]}]}
    codes = jadam.init(jnp.ones((64, 64)), mu_dtype="int8", nu_dtype="uint8")
    adamax = {"params": ["w"], "betas": (0.9, 0.999)}
    other = {**GROUP, "params": [1], "param_names": ["bias"], "betas": (0.8, 0.999)}
    first = {**GROUP, "params": [0], "param_names": ["weight"]}
    more = {**GROUP, "params": [0, 1, 2], "param_names": ["weight", "bias", "more"]}
    w = lambda path: "w"  # noqa: E731
    return [
        (adam[0], template | {"param_groups": []}, torch_name, "name('fc.bias'): expected one"),
        (adam, template | {"param_groups": [more]}, torch_name, f"{FIRST}['params']: no leaf"),
        (
            adam,
            template | {"param_groups": [first, other]},
            torch_name,
            "state_dict['param_groups'][0]: b1: expected 0.8",
        ),
        (two, template, torch_name, "state[1].count: expected 0 as state[0].count has, got 1"),
        (complex_state, one, w, "state.mu: expected real numbers, got complex64"),
        (codes, one, w, "state.mu: expected moments in floats, got 8-bit codes"),
        (
            jadam.init(jnp.ones(2)),
            one | {"param_groups": [adamax]},
            w,
            f"{FIRST}: expected a group",
        ),
    ]


@pytest.mark.parametrize(("state", "template", "name", "message"), departures())
def test_what_torch_cannot_take_is_refused(state, template, name, message):
    """Leaves or parameters without a partner, two counts or betas, codes, complex numbers."""
    with pytest.raises((TypeError, ValueError), match=pattern(message)):
        migrate.to_torch(state, template, name)


def test_what_keras_cannot_take_is_refused():
    """A variable without a leaf, and a leaf without a variable."""
    template = keras_mapping()
    without = changed(template, ("adam/fc_bias_momentum",), GONE)
    with pytest.raises(ValueError, match=r"variables\['adam/fc_bias_momentum'\] is missing"):
        migrate.to_keras(layer_state(), without, keras_name)
    with pytest.raises(ValueError, match=r"variables\['adam/more_momentum'\] is not expected"):
        migrate.to_keras(layer_state(), template | {"adam/more_momentum": 1.0}, keras_name)


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.floats(width=32), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from([np.ones((2, 3)), np.full(2, np.nan), np.ones(0), np.array("x"), 1j, b"", ()]),
)


def numbers_of(state):
    return {jax.tree_util.keystr(p): np.asarray(x) for p, x in jax.tree.leaves_with_path(state)}


@settings(max_examples=200)
@given(st.data())
def test_a_changed_mapping_is_refused_by_its_key_or_migrated_as_it_is(data):
    """Any entry of a torch or Keras state removed, replaced by anything, or added.

    Never a silent change: whatever is taken lies in the state bit for bit, all else is as before.
    """
    arrive, mapping, name = data.draw(
        st.sampled_from(
            [
                (migrate.from_torch, torch_mapping(), torch_name),
                (migrate.from_keras, keras_mapping(), keras_name),
            ]
        )
    )
    places = [(), *places_in(mapping)]
    keys = data.draw(st.sampled_from(places))
    if not keys:
        keys, value = (data.draw(st.text(max_size=3) | st.integers()),), data.draw(JUNK)
    else:
        value = data.draw(JUNK | st.just(GONE))
    before = numbers_of(arrive(mapping, layer_state(), name))
    named = [f"[{key!r}]" for key in keys[-2:]] + [
        "expected the keys",
        "['param_names']: expected",
        "expected one key",
        "name(",
        f"got {keys[-1]!r}",
        f"[{value!r}]",
    ]
    try:
        after = numbers_of(arrive(changed(mapping, keys, value), layer_state(), name))
    except (TypeError, ValueError) as error:
        message = str(error)
    else:
        message = None
    if message is not None:
        assert any(key in message for key in named)
        return
    different = [
        key for key in before if not np.array_equal(before[key], after[key], equal_nan=True)
    ]
    if different:
        # One moment alone, with the numbers that were given.
        (key,) = different
        given_numbers = np.asarray(value, after[key].dtype)
        found = after[key] if after[key].shape == given_numbers.shape else after[key].T
        np.testing.assert_array_equal(found, given_numbers)


def places_in(value, at=()):
    """The keys that lead to each part of nested mappings and lists."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return [at]
    return ([at] if at else []) + [place for k, x in items for place in places_in(x, (*at, k))]


# Storage

MEMBERS = {"adam": jadam.adam, "amsgrad": jadam.amsgrad, "adamax": jadam.adamax}
each_member = pytest.mark.parametrize("member", MEMBERS)


def hostile(steps):
    """Gradients over 14 decades, a fifth of them 0, one row dead, one element NaN."""
    rng = np.random.default_rng(0)
    scale = 10.0 ** rng.uniform(-12, 2, (8, 200))
    g = scale * rng.standard_normal((steps, 8, 200)) * (rng.random((steps, 8, 200)) < 0.8)
    g[:, 3] = 0
    g[-1, 5, 7] = np.nan
    return [{"w": jnp.asarray(x, jnp.float32), "b": jnp.asarray(x[0, :3], jnp.float32)} for x in g]


@each_member
def test_from_codes_to_floats_and_back_is_exact(member):
    """The numbers that codes stand for have codes: the nearest is their own."""
    adamax = member == "adamax"
    gradients = hostile(30)
    small, large = MEMBERS[member](RATE, **SMALL), MEMBERS[member](RATE)
    _, state = stepper(small)(gradients, gradients[0], small.init(gradients[0]))
    like = jax.eval_shape(large.init, gradients[0])
    floats = migrate.cast_like(state, like, adamax=adamax)
    assert jax.tree.map(jax.typeof, floats) == jax.tree.map(jax.typeof, like)
    again = migrate.cast_like(floats, state, adamax=adamax)
    assert jax.tree.map(jax.typeof, again) == jax.tree.map(jax.typeof, state)
    jax.tree.map(
        np.testing.assert_array_equal, migrate.cast_like(again, like, adamax=adamax), floats
    )
    assert_identical(migrate.cast_like(state, again), state)


@each_member
def test_floats_go_to_the_nearest_codes(member):
    """Half a level of √v or u, m no further than half of its 127 levels, within Adam's bound."""
    adamax = member == "adamax"
    gradients = [jax.tree.map(jnp.nan_to_num, g) for g in hostile(30)]
    small, large = MEMBERS[member](RATE, **SMALL), MEMBERS[member](RATE)
    _, state = stepper(large)(gradients, gradients[0], large.init(gradients[0]))
    codes = migrate.cast_like(state, small.init(gradients[0]), adamax=adamax)
    found = migrate.cast_like(codes, state, adamax=adamax)[0]
    assert found.count == state[0].count
    v, exact = (np.asarray(x.nu["w"], np.float64) for x in (found, state[0]))
    in_range = exact > 2.0 ** (-15 if adamax else -30) * exact.max(-1, keepdims=True)
    assert in_range.mean() > 0.25
    # Half of 1/32 of an octave, and 1e-5 for the polynomials of the code.
    factor = v[in_range] / exact[in_range]
    assert np.abs(np.log2(factor)).max() <= (1 if adamax else 2) / 64 + 1e-5
    np.testing.assert_array_equal(v[exact == 0], 0)
    m, expected = (np.asarray(x.mu["w"]) for x in (found, state[0]))
    # Levels are 3·noise/63 apart at 0, 1.1% of √v, and grow with m: half a level of m at its end.
    size = np.sqrt(exact) if not adamax else exact
    error = np.abs(m - expected)[in_range] / (size + np.abs(expected))[in_range]
    assert error.max() <= 0.05
    if member == "amsgrad":
        higher = (
            np.asarray(found.nu_max["w"])[in_range] / np.asarray(state[0].nu_max["w"])[in_range]
        )
        # Upwards, so that it does not fall: less than a level.
        assert higher.min() >= 1 - 1e-3
        assert higher.max() <= 2 ** (2 / 32) * (1 + 1e-3)


@pytest.mark.parametrize(
    # The error that codes may have: 60 steps with codes that are wrong by chance.
    ("codes", "most"),
    [(SMALL, 1), (SMALLEST, 6)],
    ids=["8 bits", "4 bits"],
)
def test_training_goes_on_in_the_other_storage(codes, most):
    """Half in float32 and half in codes, both ways, end where all in codes does."""
    rng = np.random.default_rng(0)
    scale = np.exp(rng.standard_normal((32, 128)))
    gradients = [
        jnp.asarray((0.3 + rng.standard_normal((32, 128))) * scale, jnp.float32) for _ in range(60)
    ]
    small, large = jadam.adam(RATE, **codes), jadam.adam(RATE)
    in_codes, in_floats = stepper(small), stepper(large)
    start = jnp.zeros((32, 128))
    exact, _ = in_floats(gradients, start, large.init(start))
    coded, _ = in_codes(gradients, start, small.init(start))

    def error(params):
        """In learning rates, root mean square: a step is about one."""
        return float(jnp.sqrt(jnp.mean((params - exact) ** 2))) / RATE

    def half(first, tx, second, other):
        params, state = first(gradients[:30], start, tx.init(start))
        return second(gradients[30:], params, migrate.cast_like(state, other.init(start)))[0]

    there, back = half(in_floats, large, in_codes, small), half(in_codes, small, in_floats, large)
    # The codes' own error, over all 60 steps, bounds that of 30 and one rounding.
    assert 0 < error(there) <= error(coded) < most
    assert 0 < error(back) <= error(coded)
    # Forgotten moments are another trajectory.
    params, _ = in_floats(gradients[:30], start, large.init(start))
    fresh, _ = in_codes(gradients[30:], params, small.init(start))
    assert error(fresh) > 3 * error(coded) / most


def test_floats_change_their_width():
    """float32 to bfloat16 to nearest, and back without a loss."""
    params = {"w": jnp.linspace(-3, 3, 50)}
    state = jadam.init(params)._replace(mu=params, nu={"w": params["w"] ** 2})
    narrow = jadam.init(params, mu_dtype=jnp.bfloat16, nu_dtype=jnp.bfloat16)
    cast = migrate.cast_like(state, narrow)
    assert_identical(cast.nu["w"], state.nu["w"].astype(jnp.bfloat16))
    back = migrate.cast_like(cast, state)
    assert jax.tree.map(jax.typeof, back) == jax.tree.map(jax.typeof, state)
    assert_identical(migrate.cast_like(back, cast), cast)


def test_what_the_other_storage_cannot_hold_is_refused():
    """Too large, complex, of other shapes or kinds: named, never infinite or cut."""
    one, many = jnp.ones(2), jnp.ones((64, 64))
    half = jadam.init(one, mu_dtype=jnp.float16)
    large = jadam.init(one)._replace(mu=jnp.array([1.0, 1e6]))
    codes = jadam.init(many, mu_dtype="int8", nu_dtype="uint8")
    beyond = jadam.init(many)._replace(nu=jnp.full((64, 64), 1e38))
    far = beyond._replace(mu=jnp.full((64, 64), 1.2e19), nu=jnp.full((64, 64), 8e37))
    for state, like, message in [
        (large, half, "state.mu: expected numbers that float16 has, got 1000000"),
        (beyond, codes, "state.nu: expected at most 8.51e"),
        (far, codes, "state.mu: expected at most 9.22e"),
        (
            jadam.init(jnp.ones(2, jnp.complex64)),
            jadam.init(one),
            "state.mu: expected a real dtype",
        ),
        (jadam.init(one), jadam.init(jnp.ones(3)), "state.mu: expected shape (3,)"),
        (jadam.init({"a": one}), jadam.init({"b": one}), "state.mu['b'] is missing"),
        (
            jadam.init(one),
            jadam.amsgrad(RATE).init(one),
            "state: expected ['AmsgradState'] as in like, got ['ScaleByAdamState']",
        ),
        (
            jadam.amsgrad(RATE).init(one),
            jadam.init(one),
            "state: expected ['ScaleByAdamState'] as in like",
        ),
        (
            jadam.init(one)._replace(nu=jnp.ones(3)),
            jadam.init(one),
            "state.nu: expected shape (2,)",
        ),
        (jadam.init(one)._replace(nu={"a": one}), jadam.init(one), "state.nu is missing"),
    ]:
        with pytest.raises((TypeError, ValueError), match=pattern(message)):
            migrate.cast_like(state, like)


@each_member
def test_a_first_moment_beyond_its_bound_is_not_cut(member):
    """Codes end at what b1 and b2 allow beside v: more would silently become that."""
    adamax = member == "adamax"
    like = jax.eval_shape(MEMBERS[member](RATE, **SMALL).init, jnp.ones((8, 200)))
    state = MEMBERS[member](RATE).init(jnp.ones((8, 200)))[0]
    nu = jnp.full((8, 200), 1e-10)
    state = state._replace(count=jnp.int32(1000), nu=nu)
    if member == "amsgrad":
        state = state._replace(nu_max=nu)
    root = 1e-10 if adamax else 1e-5
    # From the papers: the sum of (b1/b2)ᵏ, or the root of that of (b1²/b2)ᵏ over 1-b2.
    bound = 0.1 / (1 - 0.9 / 0.999) if adamax else np.sqrt(0.01 / 1e-3 / (1 - 0.81 / 0.999))
    for size, right in [(0.99, True), (1.2, False), (1e15, False)]:
        full = state._replace(mu=jnp.zeros((8, 200)).at[3, 5].set(size * bound * root))
        if right:
            found = migrate.cast_like(
                migrate.cast_like((full,), like[:1], adamax=adamax), (state,), adamax=adamax
            )
            # A level of m at its end is 5% (test_floats_go_to_the_nearest_codes).
            np.testing.assert_allclose(found[0].mu[3, 5], full.mu[3, 5], rtol=0.05)
        else:
            with pytest.raises(ValueError, match=r"^state\[0\].mu: expected a first moment"):
                migrate.cast_like((full,), like[:1], adamax=adamax)


@each_member
def test_the_moments_of_the_largest_gradients_have_codes(member):
    """2⁶³ and its square are what larger gradients count as: a state may have them for ever."""
    adamax = member == "adamax"
    like = jax.eval_shape(MEMBERS[member](RATE, **SMALL).init, jnp.ones((8, 200)))[:1]
    state = MEMBERS[member](RATE).init(jnp.ones((8, 200)))[0]
    state = jax.tree.map(lambda x: jnp.full_like(x, 2.0 ** (63 if adamax else 126)), state)
    state = state._replace(count=jnp.int32(100_000), mu=jnp.full((8, 200), 2.0**63))
    codes = migrate.cast_like((state,), like, adamax=adamax)
    found = migrate.cast_like(codes, (state,), adamax=adamax)[0]
    np.testing.assert_array_equal(found.nu, state.nu)
    # A level of m at its end is 5% (test_floats_go_to_the_nearest_codes).
    np.testing.assert_allclose(found.mu, state.mu, rtol=0.05)


@each_member
def test_nan_in_either_moment_is_nan_in_codes(member):
    """Alone in its element: m has no code for it, so that v's stands for both."""
    adamax = member == "adamax"
    like = jax.eval_shape(MEMBERS[member](RATE, **SMALL).init, jnp.ones((8, 200)))[:1]
    ones = MEMBERS[member](RATE).init(jnp.ones((8, 200)))[0]
    ones = jax.tree.map(jnp.ones_like, ones)._replace(mu=jnp.full((8, 200), 0.05))
    for field in ("mu", "nu"):
        state = ones._replace(**{field: getattr(ones, field).at[2, 150].set(jnp.nan)})
        codes = migrate.cast_like((state,), like, adamax=adamax)
        found = migrate.cast_like(codes, (ones,), adamax=adamax)[0]
        for x in (found.mu, found.nu):
            assert np.argwhere(~np.isfinite(x)).tolist() == [[2, 150]]


# Files

needs_safetensors = pytest.mark.skipif(
    importlib.util.find_spec("safetensors") is None, reason="safetensors is not installed"
)


def of_every_kind():
    """A state with every dtype and shape that a file has to hold, and any bits in it."""
    params = {
        "matrix": jnp.ones((64, 128)),
        "half": jnp.ones(3, jnp.bfloat16),
        "complex": jnp.ones(2, jnp.complex64),
        "none": None,
        "pair": (jnp.ones(()), jnp.ones((0, 4))),
    }
    tx = optax.chain(
        jadam.amsgrad(test_drop_in.halved, mu_dtype="int8", nu_dtype="uint8"),
        jadam.adam(RATE, mu_dtype=jnp.float16, nu_dtype=jnp.bfloat16),
    )
    rng = np.random.default_rng(0)

    def random(x):
        return jnp.asarray(np.frombuffer(rng.bytes(x.nbytes), x.dtype).reshape(x.shape))

    return jax.tree.map(random, tx.init(params))


@needs_safetensors
def test_a_file_holds_every_bit(tmp_path):
    """Codes, bfloat16, float16, complex, 0-d and empty arrays, under the names of their paths."""
    import safetensors

    state = of_every_kind()
    path = tmp_path / "state.safetensors"
    migrate.to_safetensors(path, state)
    found = migrate.from_safetensors(path, jax.eval_shape(lambda: state))
    assert_identical(found, state)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(found))
    with safetensors.safe_open(path, framework="np") as file:
        np.testing.assert_array_equal(file.get_tensor("0.0.mu.matrix"), state[0][0].mu["matrix"])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@needs_safetensors
def test_a_file_is_read_to_where_like_is(tmp_path):
    """A sharded state comes back sharded, and goes to another sharding, bit for bit."""
    meshes = [Mesh(np.array(jax.devices()[:n]), "x") for n in (2, 4)]
    shardings = [NamedSharding(mesh, P("x")) for mesh in meshes]
    params = jax.device_put(jnp.arange(8.0), shardings[0])
    state = jadam.init(params)
    state = state._replace(mu=params + 1, nu=params + 2)
    migrate.to_safetensors(tmp_path / "a", state)
    like = jadam.init(jax.device_put(params, shardings[1]))
    found = migrate.from_safetensors(tmp_path / "a", like)
    assert found.mu.sharding == like.mu.sharding == shardings[1]
    assert_identical(found, state)


@needs_safetensors
def test_a_damaged_file_is_refused(tmp_path):
    """Cut at any length, or with any byte changed, in the header or in the numbers."""
    path = tmp_path / "state"
    state = jadam.adam(RATE).init({"w": jnp.ones(5), "b": jnp.ones(())})
    migrate.to_safetensors(path, state)
    whole = path.read_bytes()
    for n in range(0, len(whole), 7):
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match=re.escape(str(path))):
            migrate.from_safetensors(path, state)
    for n in range(len(whole)):
        path.write_bytes(whole[:n] + bytes([whole[n] ^ 16]) + whole[n + 1 :])
        try:
            found = migrate.from_safetensors(path, state)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017
        else:
            assert_identical(found, state)  # padding, or what the header says twice
    path.write_bytes(whole[:-1] + b"\1")
    with pytest.raises(ValueError, match=r"0\..*: .* crc32 .* the file was changed"):
        migrate.from_safetensors(path, state)


@needs_safetensors
def test_a_state_in_the_place_of_the_path_is_refused_by_name(tmp_path):
    """The two arguments are easily exchanged."""
    state = jadam.adam(1e-3).init({"w": jnp.ones(3)})
    for call in (migrate.to_safetensors, migrate.from_safetensors):
        with pytest.raises(TypeError, match=r"^path: expected a str or os.PathLike, got tuple"):
            call(state, str(tmp_path / "state"))
    assert not list(tmp_path.iterdir())


@needs_safetensors
def test_a_file_of_another_tree_is_refused(tmp_path):
    """A leaf that is missing, not expected, of another shape or dtype; no file; no checksum."""
    import safetensors.numpy

    path = tmp_path / "state"
    tx = jadam.adam(RATE)
    migrate.to_safetensors(path, tx.init({"w": jnp.ones(5)}))
    for params, message in [
        ({"w": jnp.ones(5), "b": jnp.ones(1)}, "0.mu.b is missing"),
        ({}, "0..*.w is not expected"),
        ({"w": jnp.ones((5, 1))}, "0.mu.w: expected shape (5, 1) of like, got (5,)"),
        ({"w": jnp.ones(5, jnp.complex64)}, "0.mu.w: expected complex64 of like, got float32"),
    ]:
        with pytest.raises(ValueError, match=pattern(f"{path}: {message}")):
            migrate.from_safetensors(path, tx.init(params))
    with pytest.raises(FileNotFoundError):
        migrate.from_safetensors(tmp_path / "none", tx.init({}))
    safetensors.numpy.save_file({"w": np.ones(5)}, path)
    with pytest.raises(ValueError, match="w: expected float64 of like, got an array without"):
        migrate.from_safetensors(path, {"w": np.ones(5)})


@needs_safetensors
def test_what_a_file_cannot_hold_is_refused_and_the_old_file_stays(tmp_path, monkeypatch):
    """Names that collide, unknown dtypes, no array; an error while writing leaves no half file."""
    import safetensors.numpy

    path = tmp_path / "state"
    state = {"w": jnp.ones(5)}
    migrate.to_safetensors(path, state)
    for tree, error, message in [
        ({"a.b": 1.0, "a": {"b": 2.0}}, ValueError, "state['a']['b'] and state['a.b']: .*'a.b'"),
        ({"w": np.ones(2, np.complex128)}, ValueError, 'state: w: Unknown dtype "complex128"'),
        ({"w": "text"}, TypeError, "state: w: expected an array of numbers, got 'text'"),
        ({"w": jax.random.key(0)}, TypeError, "state: w: expected an array"),
        ({"__metadata__": 1.0}, ValueError, "state: expected leaves of other names than '__meta"),
    ]:
        with pytest.raises(error, match=pattern(message)):
            migrate.to_safetensors(path, tree)

    def full(tensors, filename, metadata=None):
        Path(filename).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        migrate.to_safetensors(path, {"w": jnp.zeros(5)})
    assert_identical(migrate.from_safetensors(path, state), state)
    assert list(tmp_path.iterdir()) == [path]


@needs_safetensors
@pytest.mark.parametrize(
    "tree",
    [
        {},
        (None, ()),
        np.ones(3),
        {"": np.ones(3)},
        {"a": {"__metadata__": np.ones(3)}},
        {"float": np.arange(3, dtype=">f4"), "int": np.arange(6, dtype=">i2").reshape(2, 3)},
    ],
    ids=["empty", "no leaves", "a leaf alone", "no name", "metadata below", "big-endian"],
)
def test_what_is_written_can_be_read(tree, tmp_path):
    """Trees and orders of bytes for which safetensors writes a file that it cannot read."""
    tree = jax.tree.map(lambda x: x if x.dtype.byteorder == ">" else np.float32(x), tree)
    migrate.to_safetensors(tmp_path / "a", tree)
    found = migrate.from_safetensors(tmp_path / "a", tree)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, found, tree)


@needs_safetensors
def test_a_file_has_the_mode_that_others_have(tmp_path):
    """The umask's if it is new, its own if it is replaced; safetensors' is 0600 always."""
    path = tmp_path / "state"
    before = os.umask(0o027)
    try:
        migrate.to_safetensors(path, {})
        assert path.stat().st_mode & 0o777 == 0o640
        path.chmod(0o604)
        migrate.to_safetensors(path, {})
        assert path.stat().st_mode & 0o777 == 0o604
    finally:
        os.umask(before)


@needs_safetensors
def test_a_link_stays_and_its_target_is_written(tmp_path):
    """In the target's folder, which may be another file system, whether it exists or not."""
    (tmp_path / "elsewhere").mkdir()
    link, target = tmp_path / "link", tmp_path / "elsewhere" / "state"
    link.symlink_to("elsewhere/state")
    for number in (1.0, 2.0):
        migrate.to_safetensors(link, {"w": jnp.float32(number)})
        assert link.is_symlink()
        assert not target.is_symlink()
        assert migrate.from_safetensors(target, {"w": jnp.zeros(())})["w"] == number
    assert {path.name for path in tmp_path.rglob("*")} == {"elsewhere", "link", "state"}


@needs_safetensors
def test_a_file_does_not_replace_what_is_none(tmp_path):
    """A folder, and what /dev/null stands for."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(OSError, match="expected a file to replace"):
            migrate.to_safetensors(path, {})


KILLED = """
import os, pathlib, signal, sys
import numpy as np
import safetensors.numpy
from jadam import migrate

def killed(tensors, filename, metadata=None):
    (pathlib.Path(filename).parent / ".tmpA1b2C3").write_bytes(b"half")  # safetensors' own
    os.kill(os.getpid(), signal.SIGKILL)

safetensors.numpy.save_file = killed
migrate.to_safetensors(sys.argv[1], {"w": np.ones(5)})
"""


@needs_safetensors
def test_what_a_killed_writer_leaves_is_removed_by_the_next(tmp_path, monkeypatch):
    """SIGKILL in mid-write: the old file is whole, the next write, of any name, sweeps.

    But not what another writer, in this or another process, is writing meanwhile.
    """
    import safetensors.numpy

    path, other = tmp_path / "state", tmp_path / "other"
    state = {"w": jnp.ones(5)}
    migrate.to_safetensors(path, state)
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], timeout=120)
    assert done.returncode == -signal.SIGKILL
    (left,) = (p for p in tmp_path.iterdir() if p != path)
    assert (left / ".tmpA1b2C3").exists()
    assert_identical(migrate.from_safetensors(path, state), state)

    save_file = safetensors.numpy.save_file

    def while_another_writes(tensors, filename, metadata=None):
        monkeypatch.setattr(safetensors.numpy, "save_file", save_file)
        assert not left.exists()
        migrate.to_safetensors(other, {"w": jnp.zeros(5)})
        assert Path(filename).parent.exists()
        save_file(tensors, filename, metadata)

    monkeypatch.setattr(safetensors.numpy, "save_file", while_another_writes)
    migrate.to_safetensors(path, state)
    assert_identical(migrate.from_safetensors(path, state), state)
    assert set(tmp_path.iterdir()) == {path, other}


@needs_safetensors
def test_writers_at_the_same_time_do_not_disturb_each_other(tmp_path):
    """Sweeps between the making and the locking of each other's folders; readers see one file."""
    path, like = tmp_path / "state", {"w": jax.ShapeDtypeStruct((5,), np.float32)}

    def write(number):
        migrate.to_safetensors(path, {"w": np.full(5, number, np.float32)})
        return set(np.asarray(migrate.from_safetensors(path, like)["w"]).tolist())

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(write, range(200)))
    assert all(len(numbers) == 1 for numbers in found)
    assert list(tmp_path.iterdir()) == [path]


# A state of optax, as it is


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("case", [*PEERS], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.complex64], ids=str)
def test_a_state_of_optax_goes_on_without_migration(case, dtype):
    """Class by class: `update` takes what optax made, keeps its types, and makes the same step.

    Tolerance: one step from the same moments; optax rounds in the parameter's dtype, and its
    bias correction is off by 7e-6 in float32.
    """
    if case.name == "adamax" and dtype == jnp.complex64:
        pytest.skip("optax's adamax has a complex u, and a maximum of complex numbers")
    params = {"w": jnp.asarray([1.0, -2.0, 0.5], dtype)}
    theirs, ours = case.optax(), case()
    assert jax.tree.structure(theirs.init(params)) == jax.tree.structure(ours.init(params))
    _, state = theirs.update(params, theirs.init(params), params)
    before = jax.tree.map(jnp.result_type, state)
    updates, after = ours.update(params, state, params)
    expected, _ = theirs.update(params, state, params)
    assert type(after[0]) is type(state[0])
    assert jax.tree.map(jnp.result_type, after) == before
    tolerance = 0.02 if dtype == jnp.bfloat16 else 2e-5
    np.testing.assert_allclose(
        np.asarray(updates["w"], complex), np.asarray(expected["w"], complex), rtol=tolerance
    )


def test_a_raw_and_a_corrected_maximum_do_not_go_on_as_each_other():
    """The classes say which it is, and the error what to make."""
    params = jnp.ones(3)
    raw, corrected = jadam.amsgrad(RATE), jadam.amsgrad(RATE, maximum="corrected")
    assert isinstance(raw.init(params)[0], optax.ScaleByAmsgradState)
    for tx, state in (
        (raw, optax.amsgrad(RATE).init(params)),
        (raw, corrected.init(params)),
        (corrected, raw.init(params)),
    ):
        with pytest.raises(TypeError, match=r"as it was made"):
            tx.update(params, state)
    with pytest.raises(ValueError, match="maximum: expected 'raw', that of AmsgradState"):
        migrate.to_optax(raw.init(params), maximum="corrected")
    state = corrected.init(params)
    with pytest.raises(ValueError, match="maximum: expected 'corrected', that of ScaleBy"):
        jadam.diagnostics(state, params, params, maximum="raw")
