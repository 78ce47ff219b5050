"""What goes wrong around a training ends in a clear error or the right answer, never in between."""

import itertools
import json
import resource
import signal

import compilation
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from hypothesis import example, given, settings
from jax.sharding import SingleDeviceSharding

import jadam
from experiments.common.mnist import dataset
from experiments.common.report import write_file
from tests.checkpoints.states import STATES, gradients, parameters
from tests.checkpoints.training import train
from tests.helpers import gradients_like, trees_of


def assert_identical(got, right):
    assert jax.tree.structure(got) == jax.tree.structure(right)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(right), strict=True):
        assert (np.shape(x), jnp.result_type(x)) == (np.shape(y), jnp.result_type(y))
        np.testing.assert_array_equal(x, y)


# Gradients that are not finite


@pytest.mark.usefixtures("either_compilation")
@pytest.mark.parametrize("name", ["adam_8_bits", "amsgrad", "adam_bfloat16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_that_is_not_finite_never_happened(name, bad):
    """Under optax.apply_if_finite: updates of 0, every bit of the state kept, and on it goes.

    A skip of jadam's own would cost the same: the step may be taken only after all gradients have
    been looked at, which is the one pass that optax makes, and `lax.cond` then skips the step.
    """
    tx = optax.apply_if_finite(STATES[name], max_consecutive_errors=3)
    params = parameters(name)
    update = jax.jit(tx.update)
    state = tx.init(params)
    _, state = update(gradients(params, 0), state, params)
    spoiled = gradients(params, 1)
    spoiled["bias"] = spoiled["bias"].at[2].set(bad)
    updates, skipped = update(spoiled, state, params)
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    assert_identical(skipped.inner_state, state.inner_state)
    assert skipped.total_notfinite == 1
    went_on, never = (update(gradients(params, 2), s, params) for s in (skipped, state))
    assert_identical(went_on[0], never[0])
    assert_identical(went_on[1].inner_state, never[1].inner_state)


def test_a_skip_copies_no_state():
    """With donated state and parameters the branches of apply_if_finite work in that memory."""
    params = [jnp.ones((512, 1024))] * 3

    def temporaries(tx):
        def train_step(grads, state, params):
            updates, state = tx.update(grads, state, params)
            return jax.tree.map(jnp.add, params, updates), state

        jitted = jax.jit(train_step, donate_argnums=(1, 2))
        compiled = jitted.lower(params, jax.eval_shape(tx.init, params), params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    tx = jadam.adam(1e-3)
    extra = temporaries(optax.apply_if_finite(tx, 3)) - temporaries(tx)
    assert extra < params[0].nbytes  # a copy of the state would be six


# A training that is killed, or that finds the disk full


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    with compilation.quickly():
        return train(tmp_path_factory.mktemp("uninterrupted"), 9)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("at", [5, *(pytest.param(n, marks=pytest.mark.soak) for n in range(1, 9))])
def test_a_killed_training_goes_on_bit_for_bit(at, tmp_path, uninterrupted):
    """kill -9 between steps or while a checkpoint is being written, then the same command again."""
    done = compilation.run_module("tests.checkpoints.training", tmp_path, 9, "kill", at)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert_identical(train(tmp_path, 9), uninterrupted)


@pytest.mark.usefixtures("quick_compilation")
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, uninterrupted):
    """The training ends with the file and the reason, and goes on when there is room again."""
    done = compilation.run_module("tests.checkpoints.training", tmp_path, 9, "full", 6)
    assert done.returncode == 1
    assert f"{tmp_path}/" in done.stderr
    assert "File too large" in done.stderr
    with ocp.CheckpointManager(tmp_path) as manager:
        assert manager.latest_step() in (2, 4)
    assert_identical(train(tmp_path, 9), uninterrupted)


def test_a_full_disk_leaves_the_last_numbers(tmp_path):
    """What an experiment writes is there whole, old or new; the error names the file."""
    path = tmp_path / "result.json"
    write_file(path, b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_file(path, b"new" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old"


# Damaged files


@pytest.fixture(scope="module")
def outcomes():
    done = compilation.run_module("tests.checkpoints.damage")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_damaged_checkpoint_is_not_restored_as_another(outcomes):
    """Each file cut or with one bit flipped: an error, or all bits right.

    What is right nevertheless are files that a restore does not need.
    """
    damaged = {k: v for k, v in outcomes.items() if k.endswith(("truncated", "flipped"))}
    assert "changed" not in damaged.values()
    for file in ("manifest.ocdbt", "_METADATA"):
        assert damaged[f"{file} truncated"] != "the same"
    arrays = {k: v for k, v in damaged.items() if k.startswith("d/")}
    assert arrays
    assert all("Error" in v and "/damaged/" in v for v in arrays.values())


def test_a_checkpoint_of_another_layout_is_refused(outcomes):
    """float32 never turns into codes, nor int16 residuals into int8; only its own layout fits."""
    crossed = {k: v for k, v in outcomes.items() if " into " in k}
    for done, came in crossed.items():
        saved, name = done.split(" into ")
        assert came == "the same" if saved == name else came.startswith("ValueError: "), done


def test_a_checkpoint_of_another_tree_is_refused(outcomes):
    """The error names the leaf, or both shapes."""
    assert "bias" in outcomes["a missing leaf"]
    assert "scale" in outcomes["another leaf"]
    assert "(7,)" in outcomes["another shape"]
    assert "(8,)" in outcomes["another shape"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A TFDS folder as that of all images, with a hundred of each file; it can be read."""
    whole, folder = dataset.MNIST._generate_examples, tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        few = lambda self, *files: itertools.islice(whole(self, *files), 100)  # noqa: E731
        patch.setattr(dataset.MNIST, "_generate_examples", few)
        dataset.prepare(data_dir=folder)
    with pytest.raises(ValueError, match=r"with \[100, 100\] images instead of"):
        dataset.load(folder)
    return folder / "mnist" / "3.0.1"


@pytest.mark.parametrize(
    ("file", "damaged"),
    [
        ("mnist-train.array_record-00000-of-00001", lambda content: content[: len(content) // 2]),
        ("mnist-train.array_record-00000-of-00001", lambda content: b""),
        ("mnist-train.array_record-00000-of-00001", None),
        ("dataset_info.json", lambda content: content[: len(content) // 2]),
    ],
    ids=["truncated", "empty", "missing", "truncated information"],
)
def test_damaged_mnist_is_named(file, damaged, tmp_path, prepared):
    """A prepared folder in which a file was cut or lost: the folder, and what the reader says."""
    folder = tmp_path / "mnist" / "3.0.1"
    folder.mkdir(parents=True)
    for path in prepared.iterdir():
        if path.name != file:
            (folder / path.name).symlink_to(path)
        elif damaged is not None:
            (folder / file).write_bytes(damaged(path.read_bytes()))
    with pytest.raises(
        ValueError, match=rf"--data-dir: expected a TFDS folder .*{tmp_path}.* says"
    ):
        dataset.load(tmp_path)


# Trees


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("name", STATES)
def test_a_state_of_another_tree_is_refused(name):
    """Every layout, under jit: an error that names a leaf, before anything is computed."""
    tx, params = STATES[name], parameters(name)
    state = jax.eval_shape(tx.init, params)
    others = {
        "a leaf less": {"kernel": params["kernel"]},
        "another name": {"kernel": params["kernel"], "scale": params["bias"]},
        "another shape": params | {"kernel": params["kernel"].T},
    }
    for other in others.values():
        with pytest.raises(ValueError, match=r"kernel|bias|scale"):
            jax.eval_shape(tx.update, other, state, other)


shapes = st.sampled_from([(), (1,), (0,), (3,), (2, 40), (0, 33), (1, 1, 1)])
leaves = st.builds(lambda shape, seed: (shape, seed), shapes, st.integers(0, 99)).map(
    lambda drawn: np.random.default_rng(drawn[1]).standard_normal(drawn[0]).astype(np.float32)
)
trees = trees_of(leaves)
TRANSFORMATIONS = {
    "8 bits": jadam.amsgrad(1e-2, mu_dtype="int8", nu_dtype="uint8", min_size=0),
    "compensated": jadam.compensated_weights(jadam.adam(1e-2)),
}


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("name", TRANSFORMATIONS)
@settings(max_examples=12)
@given(params=trees)
@example(params=np.zeros((0, 33), np.float32))
def test_any_tree_through_init_update_and_checkpoint(name, params, tmp_path_factory):
    """Nested, empty, None, 0-d and of size 0: Flax restores all bits; so does Orbax, or it refuses.

    Orbax refuses arrays of size 0, and a tree without any array.
    """
    tx, params = TRANSFORMATIONS[name], {"tree": params}
    if name == "compensated":
        params = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), params)
    grads = gradients_like(params, 1)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert all(np.all(np.isfinite(u)) for u in jax.tree.leaves(updates))
    assert jax.eval_shape(lambda: state) == jax.eval_shape(tx.init, params)
    restored = serialization.from_bytes(state, serialization.to_bytes(state))
    assert_identical(restored, state)
    path = tmp_path_factory.mktemp("orbax") / "state"
    with ocp.StandardCheckpointer() as checkpointer:
        if any(x.size == 0 for x in jax.tree.leaves(state)):
            with pytest.raises(ValueError, match=r"zero|size|empty"):
                checkpointer.save(path, state)
        else:
            checkpointer.save(path, state)
            checkpointer.wait_until_finished()
            device = SingleDeviceSharding(jax.devices()[0])
            target = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state
            )
            assert_identical(checkpointer.restore(path, target), state)
