"""The rows that a batch touches, each once, whatever the ids are."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from jadam._traced import is_tracer


class Touched(NamedTuple):
    """The distinct rows of a batch, in order, with room for as many as there are ids.

    Attributes:
        rows: their ids, then numbers that are no rows of the table for the rest of the room.
        place: where the id of each place of the batch is in `rows`.
    """

    rows: Int[Array, "n"]
    place: Int[Array, "n"]

    @classmethod
    def by(cls, ids: Int[Array, "n"], size: int) -> "Touched":
        """The rows of ids in which `size` stands for no row."""
        by_id = jnp.sort(ids)
        is_new = jnp.concatenate([jnp.zeros(1, bool), by_id[1:] != by_id[:-1]])[: ids.size]
        place = jnp.cumsum(is_new.astype(jnp.int32))
        none = size + jnp.arange(ids.size, dtype=jnp.int32)
        rows = none.at[place].set(by_id, indices_are_sorted=True)
        return cls(rows, place[jnp.searchsorted(by_id, ids)])

    def sums(self, x: Array) -> Array:
        """The sum over the places of each row, in float32 or wider, in the dtype of x."""
        wide = x.astype(np.promote_types(x.dtype, np.float32))
        return jax.ops.segment_sum(wide, self.place, self.rows.size).astype(x.dtype)


def checked_ids(ids: Any, size: int) -> Int[Array, "*batch"]:
    """The ids as int32, with `size` in place of those that are no rows.

    Raises:
        TypeError: they are no integers.
        ValueError: one that is known is no row.
    """
    dtype = getattr(ids, "dtype", None) or np.asarray(ids).dtype
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"ids: expected integers, got dtype {dtype}")
    if not is_tracer(ids) and np.size(ids):
        least, largest = np.min(np.asarray(ids)), np.max(np.asarray(ids))
        for id in (least, largest):
            if not 0 <= id < size:
                raise ValueError(f"ids: expected rows 0 to {size - 1} of the table, got {id}")
    ids = jnp.asarray(ids)
    is_row = ids >= 0
    if jnp.iinfo(ids.dtype).max >= size:
        is_row &= ids < jnp.asarray(size, ids.dtype)
    return jnp.where(is_row, ids.astype(jnp.int32), size)


def after_writing(rows: Int[Array, "n"], table: Array) -> Int[Array, "n"]:
    """The same rows, in a form that XLA has only once the table has been written.

    To write the table, all that is read has been read. So arrays that are written at these rows are
    no longer needed as they were, and XLA writes them in place.
    """
    first = table.at[(rows, *(0,) * (table.ndim - 1))].get(mode="fill", fill_value=0)
    # Rows are not negative, which XLA does not know.
    return jnp.maximum(rows, jnp.isnan(first).astype(jnp.int32) - 1)


def take(arrays: Sequence[Array], rows: Int[Array, "n"]) -> tuple[Array, ...]:
    """Some rows of arrays; 0 in the place of what is no row."""
    is_row = rows < len(arrays[0])

    def ones(x: Array) -> Array:
        return is_row.astype(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))

    def some(x: Array) -> Array:
        found = x.at[rows].get(mode="clip", indices_are_sorted=True, wrap_negative_indices=False)
        # Multiplied, not selected: LLVM makes vectors of it, which is four times as fast.
        return found * ones(x)

    # A branch, since XLA else reads again wherever a row is used, one number at a time.
    return lax.cond(
        jnp.any(is_row),
        lambda: tuple(some(x) for x in arrays),
        lambda: tuple(jnp.broadcast_to(ones(x), (rows.size, *x.shape[1:])) for x in arrays),
    )


def put(x: Array, touched: Touched, values: Array) -> Array:
    """The array with other values in the touched rows."""
    return x.at[touched.rows].set(
        values.astype(x.dtype),
        mode="drop",
        indices_are_sorted=True,
        unique_indices=True,
        wrap_negative_indices=False,
    )
