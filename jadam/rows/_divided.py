"""A table that lies on several devices along explicit mesh axes: each steps the rows that it has.

Along automatic axes XLA divides the same programs, and exchanges more: the touched rows.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Int

from jadam._state import RowsState


def gathered(local: Callable[..., Array], table: Array, state: RowsState, ids: Array) -> Array:
    """Rows of the table, `local(table, state, ids)`, collected from the devices that have them.

    The result is divided over devices as the ids are.
    """
    names = _explicit_axes(table)
    if not names:
        return local(table, state, ids)
    spec, place = _spec(table), _spec(ids)
    rows_over = _over(spec[0])

    def part(table: Array, state: RowsState, ids: Array) -> Array:
        # A row is 0 on all devices but the one that has it.
        return lax.psum(local(table, state, _of_part(ids, len(table), rows_over)), rows_over)

    whole = PartitionSpec(*[None] * ids.ndim, *spec[1:])
    found = _shard_map(part, names, whole, table, state, ids)
    taken = {name for entry in spec[1:] for name in _over(entry)}
    if any(taken.intersection(_over(entry)) for entry in place):
        return found
    return jax.sharding.reshard(found, _sharding(table, PartitionSpec(*place, *spec[1:])))


def stepped(
    local: Callable[..., tuple[Array, RowsState]], table: Array, state: RowsState, *batch: Array
) -> tuple[Array, RowsState]:
    """`local(table, state, *batch)` on each device, for its part of the rows; ids come first."""
    names = _explicit_axes(table)
    if not names:
        return local(table, state, *batch)
    rows_over = _over(_spec(table)[0])

    def part(table: Array, state: RowsState, *batch: Array) -> tuple[Array, RowsState]:
        if batch:
            batch = _of_part(batch[0], len(table), rows_over), *batch[1:]
        return local(table, state, *batch)

    specs = jax.tree.map(_spec, (table, state))
    return _shard_map(part, names, specs, table, state, *batch)


def _shard_map(
    part: Callable[..., Any], names: set[str], out: Any, table: Array, state: RowsState, *batch: Any
) -> Any:
    """A function of each device's part of table and state, and of all of the batch."""
    spec = _spec(table)
    for path, x in jax.tree.leaves_with_path(state):
        if jnp.ndim(x) and _spec(x)[0] != spec[0]:
            raise ValueError(
                f"state{jax.tree_util.keystr(path)}: expected rows that are divided as those of "
                f"the table, which are by {spec}, got {_spec(x)}"
            )
    along = [PartitionSpec(*[None] * (jnp.ndim(x) - table.ndim + 1), *spec[1:]) for x in batch[1:]]
    specs = [PartitionSpec(), *along][: len(batch)]
    batch = tuple(
        jax.sharding.reshard(x, _sharding(table, to)) for x, to in zip(batch, specs, strict=True)
    )
    return jax.shard_map(
        part,
        mesh=jax.typeof(table).sharding.mesh,
        in_specs=(*jax.tree.map(_spec, (table, state)), *specs),
        out_specs=out,
        axis_names=names,
        check_vma=False,
    )(table, state, *batch)


def _explicit_axes(x: Array) -> set[str]:
    mesh = jax.typeof(x).sharding.mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, kind in kinds if kind == AxisType.Explicit}


def _spec(x: Array) -> PartitionSpec:
    """By which axes an array is divided, with an entry for each of its own."""
    spec = jax.typeof(x).sharding.spec
    return PartitionSpec(*spec, *[None] * (jnp.ndim(x) - len(spec)))


def _sharding(like: Array, spec: PartitionSpec) -> jax.sharding.NamedSharding:
    return jax.sharding.NamedSharding(jax.typeof(like).sharding.mesh, spec)


def _over(entry: Any) -> tuple[str, ...]:
    """The mesh axes of an entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _of_part(ids: Int[Array, "..."], size: int, rows_over: tuple[str, ...]) -> Array:
    """The ids counted from the first row of a device's part; `size` for rows that it has not."""
    first = lax.axis_index(rows_over) * size if rows_over else 0
    ids = ids - first
    return jnp.where((ids >= 0) & (ids < size), ids, size)
