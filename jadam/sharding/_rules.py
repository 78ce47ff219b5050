"""Where each leaf of a state lies: like its parameter, or divided further."""

import math
from collections.abc import Container
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding

from jadam import _storage, _validate
from jadam._types import PyTree, Shape

Path = tuple[Any, ...]
Owners = dict[Path, tuple[Shape, Sharding]]


def state_shardings(
    tx: Any,
    params: PyTree,
    shardings: PyTree = None,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    axis: str | tuple[str, ...] | None = None,
    memory_kind: str | None = None,
) -> PyTree:
    """The shardings of a transformation's state, for `jax.jit(tx.init, out_shardings=...)`.

    An update of gradients that lie likewise needs no communication, and its bits do not depend on
    the number of devices. (Where a parameter's last axis is cut inside a block of 128, its codes
    do need some: gradient and codes are gathered along that axis.)

    Args:
        tx: any optax transformation: jadam's, a chain, a wrapper.
        params: arrays or `jax.ShapeDtypeStruct`s, also in Flax's boxes: `nnx.state(model,
            nnx.Param)`, Linen's variables with `nn.Partitioned`.
        shardings: a tree like params, or a prefix of it, of shardings or partition specs, None for
            whole on each device; so `nnx.get_partition_spec(params)` and Linen's
            `nn.get_partition_spec(params)`. Default: those of the params.
        mesh: the mesh of partition specs.
        axis: mesh axes to divide the state over besides, as `divided` does: ZeRO-1.
        memory_kind: "pinned_host" keeps what belongs to parameters in the host's memory, as
            `streamed` needs it. Default: the memory of the parameters.

    Returns:
        A tree like the state, of shardings. Put into the result of `jax.eval_shape(tx.init,
        params)` they make the target to restore a checkpoint to, on any number of devices.

    Raises:
        TypeError: a parameter has no sharding, or one that says nothing of other shapes.
        ValueError: a mesh, an axis or a memory does not exist, or a sharding does not fit its leaf.

    >>> import jax, jax.numpy as jnp, jadam.sharding
    >>> from jax.sharding import AbstractMesh, PartitionSpec as P
    >>> mesh = AbstractMesh((8, 4), ("data", "model"))
    >>> params = {"w": jax.ShapeDtypeStruct((64, 1024), jnp.float32)}
    >>> tx = jadam.adam(1e-3, mu_dtype="int8", nu_dtype="uint8")
    >>> s = jadam.sharding.state_shardings(tx, params, P(None, "model"), mesh=mesh, axis="data")
    >>> s[0].mu["w"].shard_shape((64, 1024)), s[0].nu["w"].shard_shape((64, 8))
    ((8, 256), (8, 2))
    """
    if axis is not None:
        shardings, mesh = divided(params, shardings, mesh=mesh, axis=axis), None
    owners = _owners(params, shardings, mesh)
    if not owners:
        raise ValueError("params: expected at least one array, got none")
    _, first = next(iter(owners.values()))
    whole = NamedSharding(first.mesh, PartitionSpec()) if _is_named(first) else first

    def place(path: Path, leaf: Any) -> Sharding:
        owner = owner_of(path, owners)
        there = None if owner is None else _like(leaf.shape, *owners[owner])
        if there is None:
            return whole
        try:
            return there.with_memory_kind(memory_kind) if memory_kind else there
        except ValueError as error:
            raise ValueError(f"memory_kind: {error}") from None

    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(np.shape(p), jnp.result_type(p)), params)
    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(tx.init, shapes))


def divided(
    params: PyTree,
    shardings: PyTree = None,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    axis: str | tuple[str, ...],
    min_size: int = _storage.MIN_SIZE,
    block: int = _storage.BLOCK,
) -> PyTree:
    """The parameters' shardings divided further over mesh axes: ZeRO-1 (Rajbhandari et al., 2020).

    Gradients, state and updates lie so; parameters keep their own shardings. Each of the mesh axes
    cuts the largest axis of a leaf that it divides evenly, but the last axis only where none else
    does, and in whole blocks of codes. A leaf stays as it is over a mesh axis that it lies on
    already or that divides none of its axes, and when it is small.

        def step(params, state, batch):
            grads = constrain(jax.grad(loss)(params, batch), zero)  # reduce-scatter
            part = constrain(params, zero)
            updates, state = tx.update(grads, state, part)
            return optax.apply_updates(part, updates), state        # all-gather

        step = jax.jit(step, donate_argnums=(0, 1), out_shardings=(shardings, state_shardings))

    with `zero = divided(...)` and `constrain = jax.lax.with_sharding_constraint`. On a mesh of
    explicit axes `jax.sharding.reshard` takes its place, also for the parameters that are returned.

    Args:
        params: as in `state_shardings`, like `shardings` and `mesh`.
        axis: one name or several, in the order in which they cut.
        min_size: leaves with fewer elements stay as they are.
        block: the last axis is cut at multiples of it. 1 will do for a state without codes.

    Returns:
        A tree like params, of shardings.

    Raises:
        TypeError: a parameter has no sharding, or none on a mesh.
        ValueError: an axis does not exist, or a sharding does not fit its leaf.

    >>> import jax, jax.numpy as jnp, jadam.sharding
    >>> from jax.sharding import AbstractMesh, PartitionSpec as P
    >>> params = {"vocabulary": (50257, 768), "kernel": (768, 3072), "bias": (3072,)}
    >>> params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in params.items()}
    >>> zero = jadam.sharding.divided(params, P(), mesh=AbstractMesh((6,), ("data",)), axis="data")
    >>> {k: s.shard_shape(params[k].shape) for k, s in zero.items()}
    {'bias': (3072,), 'kernel': (128, 3072), 'vocabulary': (50257, 128)}
    """
    least, block = _validate.size("min_size", min_size), max(1, _validate.size("block", block))
    names = (axis,) if isinstance(axis, str) else tuple(axis)

    def divide(path: Path, shape: Shape, sharding: Sharding) -> Sharding:
        if not _is_named(sharding):
            where = jax.tree_util.keystr(path)
            raise TypeError(
                f"params{where}: expected a NamedSharding to divide, got {sharding}; pass "
                "shardings or a mesh"
            )
        for name in names:
            if name not in sharding.mesh.shape:
                raise ValueError(
                    f"axis: expected an axis of the mesh, one of "
                    f"{', '.join(map(repr, sharding.mesh.shape))}; got {name!r}"
                )
            if math.prod(shape) >= least:
                sharding = _divided_over(name, shape, sharding, block)
        return sharding

    owners = _owners(params, shardings, mesh)
    leaves = [divide(path, *owner) for path, owner in owners.items()]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _divided_over(name: str, shape: Shape, sharding: NamedSharding, block: int) -> NamedSharding:
    entries = _entries(shape, sharding)
    local = sharding.shard_shape(shape)
    last = len(shape) - 1
    fitting = [
        (axis < last, local[axis], -axis)
        for axis in range(len(shape))
        if local[axis] % (sharding.mesh.shape[name] * (block if axis == last else 1)) == 0
    ]
    if not fitting or any(name in entry for entry in entries):
        return sharding
    entries[-max(fitting)[2]] += (name,)
    return _with_entries(sharding, entries)


def _owners(params: PyTree, shardings: PyTree, mesh: Mesh | AbstractMesh | None) -> Owners:
    """Each parameter's shape and sharding by its path."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    if shardings is None:
        name, given = "params", [_own(p, mesh) for _, p in flat]
    else:
        name, given = "shardings", _spread(shardings, params)
    return {
        path: (np.shape(p), _checked(name + jax.tree_util.keystr(path), s, np.shape(p), mesh))
        for (path, p), s in zip(flat, given, strict=True)
    }


def _own(p: Any, mesh: Mesh | AbstractMesh | None) -> Any:
    """A parameter's own sharding; whole on a mesh that is given where it lies on one device."""
    sharding = getattr(p, "sharding", None)
    on_one = sharding is None or (not _is_named(sharding) and sharding.is_fully_replicated)
    return PartitionSpec() if on_one and mesh is not None else sharding


def _spread(shardings: PyTree, params: PyTree) -> list[Any]:
    """A prefix of the tree of parameters as a list of one sharding for each."""

    def is_leaf(x: Any) -> bool:
        return x is None or isinstance(x, (Sharding, PartitionSpec))

    def spread(sharding: Any, part: PyTree) -> PyTree:
        return jax.tree.map(lambda _: PartitionSpec() if sharding is None else sharding, part)

    try:
        return jax.tree.leaves(jax.tree.map(spread, shardings, params, is_leaf=is_leaf))
    except ValueError as error:
        expected = "a tree like params or a prefix of it"
        raise ValueError(f"shardings: expected {expected}; {error}") from None


def _checked(where: str, given: Any, shape: Shape, mesh: Mesh | AbstractMesh | None) -> Sharding:
    """A sharding that fits a leaf of this shape, and says how leaves of other shapes lie."""
    if isinstance(given, PartitionSpec):
        if mesh is None:
            raise ValueError(f"mesh: expected a mesh, which {where} = {given} needs; got None")
        try:
            given = NamedSharding(mesh, given)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    if not isinstance(given, Sharding):
        expected = "a sharding or a PartitionSpec"
        raise TypeError(f"{where}: expected {expected}, got {given!r}; pass shardings")
    if not _is_named(given):
        if not given.is_fully_replicated:
            raise TypeError(f"{where}: expected a NamedSharding, got {given}")
        return given
    if len(given.spec) > len(shape):
        raise ValueError(f"{where}: expected a spec for shape {shape}, got {given.spec}")
    try:
        given.shard_shape(shape)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return given


def _is_named(sharding: Sharding) -> TypeGuard[NamedSharding]:
    return isinstance(sharding, NamedSharding)


def owner_of(path: Path, owners: Container[Path]) -> Path | None:
    """The longest of the parameters' paths that this path ends with."""
    ends = (path[start:] for start in range(len(path) + 1))
    return next((end for end in ends if end in owners), None)


def _like(shape: Shape, owner: Shape, sharding: Sharding) -> Sharding | None:
    """A parameter's sharding for a leaf of its shape or of its blocks' tops, None for others.

    Tops that are longer than they need to be (`divisible`) are whole along the last axis.
    """
    if shape == owner:
        return sharding
    tops = _storage.tops_shape(owner) if owner else ()
    if not owner or shape[:-1] != tops[:-1] or shape[-1:] < tops[-1:]:
        return None
    if not _is_named(sharding):
        return sharding
    entries = _entries(owner, sharding)
    if sharding.shard_shape(owner)[-1] % _storage.BLOCK or shape != tops:
        entries[-1] = ()
    return _with_entries(sharding, entries)


def _entries(shape: Shape, sharding: NamedSharding) -> list[tuple[str, ...]]:
    """The mesh axes that divide each axis of an array."""
    spec = (*sharding.spec, *(None,) * (len(shape) - len(sharding.spec)))
    return [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in spec]


def _with_entries(sharding: NamedSharding, entries: list[tuple[str, ...]]) -> NamedSharding:
    while entries and not entries[-1]:
        entries.pop()
    spec = PartitionSpec(*(e[0] if len(e) == 1 else e or None for e in entries))
    return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
