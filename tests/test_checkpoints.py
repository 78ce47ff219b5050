"""Orbax saves and restores every state: to any sharding, and from every earlier version."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from tests.checkpoints.states import HERE, STATES, parameters, step

pytestmark = pytest.mark.usefixtures("quick_compilation")
FIXTURES = sorted(path.parent for path in HERE.glob("*/step.npz"))


def mesh(*shape):
    axes = ("rows", "columns")[: len(shape)]
    return jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(shape))


def placed(tree, mesh):
    """A kernel's two rows on two devices, a bias on all, the rest everywhere."""

    def place(path, x):
        place = jax.tree_util.keystr(path)
        spec = ["rows"] if "kernel" in place else [mesh.axis_names] if "bias" in place else []
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree_util.tree_map_with_path(place, tree)


def abstract(tree, sharding=None):
    def like(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding)

    return jax.tree.map(like, tree)


def restore(path, target):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, target)


def old(folder):
    """What an earlier version wrote, as the states of this one, on one device."""
    targets = {name: jax.eval_shape(tx.init, parameters(name)) for name, tx in STATES.items()}
    device = SingleDeviceSharding(jax.devices()[0])
    return restore(folder / "states", abstract(targets, device))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A state of each layout after three steps, in one checkpoint written from eight devices."""
    states = placed(old(FIXTURES[-1]), mesh(2, 4))
    path = tmp_path_factory.mktemp("orbax") / "states"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, states)
    return path, states


TARGETS = {
    "the same sharding": lambda states: states,
    "another mesh": lambda states: placed(states, mesh(2, 2)),
    "one device": lambda states: jax.device_put(states, SingleDeviceSharding(jax.devices()[5])),
}


@pytest.mark.parametrize("target", TARGETS)
def test_every_state_restores_bit_for_bit(target, saved):
    """To abstract targets with shardings: the values saved, in the dtypes and places asked for."""
    path, states = saved
    expected = abstract(TARGETS[target](states))
    restored = restore(path, expected)
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    for got, like, value in zip(*map(jax.tree.leaves, (restored, expected, states)), strict=True):
        assert got.dtype == like.dtype
        assert got.sharding.is_equivalent_to(like.sharding, got.ndim)
        np.testing.assert_array_equal(got, value)


@pytest.fixture(scope="module", params=FIXTURES, ids=lambda folder: folder.name)
def fixture(request):
    """What an earlier version wrote, and what it went on to do."""
    return old(request.param), np.load(request.param / "step.npz")


@pytest.mark.parametrize("name", STATES)
def test_an_old_checkpoint_goes_on_where_it_stopped(name, fixture):
    """The step after a restore is the one that the writing version made.

    Tolerance: another machine or order of operations gives a few ulps of float32, and an update
    that is small because m's two terms cancel has those of the terms: 1e-6 of the rate of 0.01.
    The updates of 16-bit weights are differences of numbers on their grid, hence the same.
    """
    states, recorded = fixture

    def tree(role):
        leaves = {leaf: recorded[f"{name}/{role}/{leaf}"] for leaf in ("kernel", "bias")}
        return jax.tree.map(lambda x, p: jnp.asarray(x, p.dtype), leaves, parameters(name))

    updates, _, _ = step(STATES[name], tree("grads"), states[name], tree("params"))
    for leaf, update in updates.items():
        expected = recorded[f"{name}/updates/{leaf}"]
        update = np.asarray(update, np.float32)
        np.testing.assert_allclose(update, expected, rtol=1e-6, atol=1e-8)


def test_the_fixtures_are_small_and_say_who_wrote_them():
    """Under 300 kB each; the folder's version is the one that wrote it."""
    assert FIXTURES
    for folder in FIXTURES:
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) < 300_000
        assert str(np.load(folder / "step.npz")["versions"]).startswith(f"jadam {folder.name}, ")
