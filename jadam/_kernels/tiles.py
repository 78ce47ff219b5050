"""The step of a leaf's codes in XLA's operations, in the order in which a TPU's memory has them.

An array lies there as tiles of 8 rows and 128 columns: a block of 128 elements is a row of a tile.
XLA:TPU does not see this, and copies a leaf into another layout to find the largest element of each
block. Where rows and columns are cut into tiles first, all stays where it is.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType
from jaxtyping import Array

from jadam._leaf import Options, Stepped, leaf_step
from jadam._members import Rule
from jadam._storage import BLOCK, Codes, Storage, block_max, storage_of
from jadam._types import Count, Scalar, Shape

_ROWS = 8


def suits(stored: tuple[Any, ...], shape: Shape, devices: int) -> bool:
    """Whether a leaf is codes that are whole tiles, in each part if either axis is divided."""
    if len(shape) < 2 or not Codes.holds(stored):
        return False
    # Where axes are explicit, JAX itself asks how those of a tile are divided.
    is_explicit = AxisType.Explicit in jax.typeof(stored[0]).sharding.mesh.axis_types
    *_, rows, n = shape
    return not is_explicit and rows % (_ROWS * devices) == 0 and n % (BLOCK * devices) == 0


def step(
    rule: Rule,
    learning_rate: Scalar,
    weight_decay: Scalar,
    count: Count,
    leaf: tuple[Any, Any, tuple[Any, ...], tuple[Any, ...]],
    options: Options,
) -> Stepped:
    """`leaf_step` of a leaf (g, p, stored, ()) of codes."""
    *stack, rows, n = leaf[0].shape

    def in_tiles(x: Array) -> Array:
        """[stack, rows, n] as [stack, rows/8, n/128, 8, 128]; a top stands for 128 columns."""
        return x.reshape(*stack, rows // _ROWS, _ROWS, n // BLOCK, -1).swapaxes(-3, -2)

    def in_rows(x: Array) -> Array:
        return x.swapaxes(-3, -2).reshape(*stack, rows, -1)

    # Without barriers XLA mixes both orders in its loops, and compiles ten times as long.
    g, p, stored, _ = lax.optimization_barrier(jax.tree.map(in_tiles, leaf))
    step_of_tiles = leaf_step(rule, learning_rate, weight_decay, count, _of_whole_blocks)
    stepped = step_of_tiles(g, p, options, stored)
    return jax.tree.map(in_rows, lax.optimization_barrier(stepped))


def _of_whole_blocks(*moments_and_stored: Any) -> Storage:
    """`storage_of` codes whose blocks no device divides."""
    storage = storage_of(*moments_and_stored)
    assert isinstance(storage, Codes)
    return dataclasses.replace(storage, block_max=functools.partial(block_max, together=BLOCK))
