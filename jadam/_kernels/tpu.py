"""The kernel in Pallas for TPUs: one leaf's step in one pass over memory.

XLA:TPU copies codes and gradients into other layouts around the blocks of 128 elements, and reads
what it copied in three passes. A block of 128 is also a row of the registers, so a kernel can leave
it where it is: it takes a tile of rows and columns, and steps 128 columns at a time by `leaf_step`
itself, as it is traced for that shape. No equation stands here.

What of the traced step depends on no element (the time, bias corrections, the curve of a code, the
phases of dithers) is computed once, by XLA; the kernel gets it as numbers.

Pallas is experimental. Its names are imported one by one: where one is gone, the import of this
module fails, `choice` leaves all to XLA and says so in `jadam.kernels()`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import (
    BlockSpec,
    CostEstimate,
    ds,
    multiple_of,
    pallas_call,
    program_id,
)
from jax.experimental.pallas.tpu import HBM, SMEM, CompilerParams, with_memory_space_constraint
from jaxtyping import Array

from jadam._kernels import jax_internals
from jadam._leaf import Options, Stepped, leaf_step
from jadam._members import Rule
from jadam._storage import BLOCK, Codes, storage_of, tops_shape
from jadam._types import Count, Scalar, Shape

# Memory is cut at 128 lanes, so a tile holds 128 tops of each row or all of them. Without tops it
# may be narrower.
_COLUMNS = BLOCK * BLOCK
_COLUMNS_OF_FLOATS = 16 * BLOCK
# More rows are more than a loop over their blocks can hold in registers.
_MAX_ROWS = 512
# The rows of a tile as memory has it, for integers of 8 bits; wider ones have fewer.
_SUBLANES = 32
# Operands and results of a tile. Twice of it lies in the fast memory of 16 MB, to be copied while
# another one is computed.
_TILE_BYTES = 2**22


class _Tiling(NamedTuple):
    """A leaf as rows, and the tiles that it is cut into.

    Attributes:
        rows: of the leaf.
        n: the elements of a row.
        tile_rows: the rows of a tile.
        columns: the most elements of a row of a tile.
    """

    rows: int
    n: int
    tile_rows: int
    columns: int

    @classmethod
    def of(cls, shape: Shape, arrays: Sequence[Array]) -> "_Tiling":
        """That of a leaf of this shape with these operands."""
        rows, n = math.prod(shape[:-1]), shape[-1]
        has_tops = any(x.shape[1] != n for x in arrays)
        columns = _COLUMNS if has_tops else _COLUMNS_OF_FLOATS
        bytes_of = [x.dtype.itemsize for x in arrays]
        # Each operand has a result of its size, or nearly so.
        fitting = max(_TILE_BYTES // (2 * sum(bytes_of) * min(n, columns)), 1)
        least = _SUBLANES // min(bytes_of)
        tile_rows = min(max(2 ** int(math.log2(fitting)), least), _MAX_ROWS, rows)
        return cls(rows, n, tile_rows, columns)

    @property
    def blocks(self) -> int:
        """The blocks of a row."""
        return tops_shape((self.n,))[-1]

    @property
    def tile_blocks(self) -> int:
        """The blocks of a row of a tile."""
        return min(self.blocks, self.columns // BLOCK)

    @property
    def grid(self) -> tuple[int, int]:
        """The tiles along rows and along a row."""
        return -(-self.rows // self.tile_rows), -(-self.blocks // self.tile_blocks)

    def block(self, x: Array) -> jax.ShapeDtypeStruct:
        """What the kernel steps at once of an operand.

        Tops and codes of 16 bits are integers of 32 bits in its registers.
        """
        if x.shape[1] != self.n:
            return jax.ShapeDtypeStruct((self.tile_rows, 1), jnp.int32)
        dtype = jnp.dtype(jnp.int32) if x.dtype == jnp.uint16 else x.dtype
        return jax.ShapeDtypeStruct((self.tile_rows, BLOCK), dtype)

    def spec(self, width: int) -> BlockSpec:
        """The tiles of an array with rows of n elements, or of a top for each block."""
        columns = self.tile_blocks * (BLOCK if width == self.n else 1)
        return BlockSpec((self.tile_rows, columns), lambda i, j: (i, j))


def step(
    rule: Rule,
    learning_rate: Scalar,
    weight_decay: Scalar,
    count: Count,
    leaf: tuple[Any, Any, tuple[Any, ...], tuple[Any, ...]],
    options: Options,
    *,
    interpret: bool = False,
) -> Stepped:
    """`leaf_step` of a leaf (g, p, stored, extra); p is None where it is not needed.

    Args:
        rule: as `leaf_step` takes it, like all before `leaf`.
        interpret: runs anywhere, slowly.
    """
    g, _, stored, _ = leaf
    operands, structure = jax.tree.flatten(leaf)
    # What belongs to a parameter may be a number, as the count of the dither of its residual.
    is_array = [x.ndim == g.ndim for x in operands]
    arrays = [
        x.reshape(-1, x.shape[-1]) for x, array in zip(operands, is_array, strict=True) if array
    ]
    scalars = [x for x, array in zip(operands, is_array, strict=True) if not array]
    tiling = _Tiling.of(g.shape, arrays)
    # A Python number stays one, exact and known.
    numbers, form = jax.tree.flatten((rule, learning_rate, weight_decay, count))
    is_traced = [isinstance(x, jax.Array) for x in numbers]
    scalars += [x for x, traced in zip(numbers, is_traced, strict=True) if traced]
    storage = storage_of(rule.member.moments, stored)
    if isinstance(storage, Codes):
        storage = dataclasses.replace(storage, block_max=_row_max)

    def of_block(scalars: Sequence[Any], *tiles: Any) -> Stepped:
        """The step of rows of one block each."""
        given = {True: iter(tiles), False: iter(scalars)}
        leaf = structure.unflatten([next(given[array]) for array in is_array])
        known = [
            next(given[False]) if traced else x
            for x, traced in zip(numbers, is_traced, strict=True)
        ]
        g, p, stored, extra = leaf
        rule, learning_rate, weight_decay, count = form.unflatten(known)
        one = leaf_step(rule, learning_rate, weight_decay, count, lambda *_: storage)
        return one(g, p, options, stored, extra)

    blocks = [tiling.block(x) for x in arrays]
    traced, shapes = jax.make_jaxpr(of_block, return_shape=True)(scalars, *blocks)
    hoisted = jax_internals.Hoisted(traced, scalars)
    # The first result takes the place of the parameter; the others those of what they replace.
    places = structure.unflatten(range(len(operands)))
    moved = [places[1]] if options.to_params else [None]
    kept = places[3][: 0 if options.weights is None else options.weights.kept]
    results = _call(
        tiling, arrays, hoisted, jax.tree.leaves(shapes), [*moved, *places[2], *kept], interpret
    )
    whole = [x.reshape(*g.shape[:-1], x.shape[1]) for x in results]
    return jax.tree.unflatten(jax.tree.structure(shapes), whole)


def _call(
    tiling: _Tiling,
    arrays: Sequence[Array],
    hoisted: jax_internals.Hoisted,
    tiles: Sequence[Any],
    places: Sequence[int | None],
    interpret: bool,
) -> Sequence[Array]:
    """The kernel on all tiles. Result i is like the operand at places[i], if it has one."""
    widths = [tiling.n if tile.shape[1] == BLOCK else tiling.blocks for tile in tiles]
    results = [
        jax_internals.shaped_like(arrays[0], (tiling.rows, width), tile.dtype)
        for width, tile in zip(widths, tiles, strict=True)
    ]
    moved = [*arrays, *results]
    call = pallas_call(
        _kernel(tiling, [x.shape[1] for x in arrays], widths, hoisted),
        grid=tiling.grid,
        in_specs=[
            BlockSpec(memory_space=SMEM),
            *(tiling.spec(x.shape[1]) for x in arrays),
        ],
        out_specs=[tiling.spec(width) for width in widths],
        out_shape=results,
        input_output_aliases={1 + x: i for i, x in enumerate(places) if x is not None},
        interpret=interpret,
        name="jadam_step",
        cost_estimate=CostEstimate(
            flops=hoisted.operations * tiling.rows * tiling.n,
            transcendentals=0,
            bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in moved),
        ),
        compiler_params=CompilerParams(dimension_semantics=("parallel", "parallel")),
    )
    if not interpret:
        arrays = [_left_there(x) if x.shape[1] == tiling.n else x for x in arrays]
    return call(_packed(hoisted.numbers), *arrays)


def _left_there(x: Array) -> Array:
    """An operand that stays in the chip's large memory, and with it the result that replaces it.

    The kernel moves tiles to the fast memory itself. XLA would copy small arrays there before, and
    their results back.
    """
    return with_memory_space_constraint(x, HBM)


def _kernel(
    tiling: _Tiling,
    widths: Sequence[int],
    out_widths: Sequence[int],
    hoisted: jax_internals.Hoisted,
) -> Callable[..., None]:
    """The body of the kernel: `(numbers, *operands, *results)`, references to a tile."""

    def kernel(packed: Any, *refs: Any) -> None:
        ins, outs = refs[: len(widths)], refs[len(widths) :]
        numbers = [_unpacked(packed[i], x.dtype) for i, x in enumerate(hoisted.numbers)]
        lanes = lax.broadcasted_iota(jnp.int32, (tiling.tile_rows, tiling.tile_blocks), 1)
        tops = {i: ref[...].astype(jnp.int32) for i, ref in enumerate(ins) if widths[i] != tiling.n}
        first = program_id(1) * tiling.tile_blocks * BLOCK

        def block(j: Any, new_tops: dict[int, Array]) -> dict[int, Array]:
            at = ds(multiple_of(j * BLOCK, BLOCK), BLOCK)
            inside = None
            if tiling.n % BLOCK:
                lane = lax.broadcasted_iota(jnp.int32, (tiling.tile_rows, BLOCK), 1)
                inside = first + j * BLOCK + lane < tiling.n
            tiles = [
                _at_lane(tops[i], lanes, j) if i in tops else _whole_block(ref[:, at], inside)
                for i, ref in enumerate(ins)
            ]
            results = hoisted(numbers, tiles, _INSTEAD)
            for i, (ref, x) in enumerate(zip(outs, results, strict=True)):
                if i in new_tops:
                    new_tops = new_tops | {
                        i: jnp.where(lanes == j, x.astype(jnp.int32), new_tops[i])
                    }
                else:
                    ref[:, at] = x
            return new_tops

        start = {
            i: jnp.zeros(lanes.shape, jnp.int32) for i, w in enumerate(out_widths) if w != tiling.n
        }
        for i, x in lax.fori_loop(0, tiling.tile_blocks, block, start).items():
            outs[i][...] = x.astype(outs[i].dtype)

    return kernel


def _whole_block(x: Array, inside: Array | None) -> Array:
    """A block of an operand, 0 beyond the end of a row, where memory may hold anything.

    An element acts on others of its block by its gradient and its code, and with 0 it does not. Not
    all chips can select among narrow floats, or among integers of 16 bits: these are widened first.
    """
    wide = x.astype(jnp.int32) if x.dtype == jnp.uint16 else x
    if inside is None:
        return wide
    if jnp.issubdtype(wide.dtype, jnp.floating):
        return jnp.where(inside, wide.astype(jnp.float32), 0).astype(x.dtype)
    return jnp.where(inside, wide.astype(jnp.int32), 0).astype(wide.dtype)


def _at_lane(tops: Array, lanes: Array, j: Any) -> Array:
    """The tops of block j, by a sum along lanes. It is of floats, exact for integers under 2²⁴."""
    chosen = jnp.where(lanes == j, tops, 0).astype(jnp.float32)
    return jnp.sum(chosen, axis=1, keepdims=True).astype(jnp.int32)


def _row_max(x: Array, seen: Callable[[Array], Array]) -> Array:
    """`codes.block_max` of rows of one block each, as a maximum of floats, which registers have."""
    wide = jnp.int32 if jnp.issubdtype(x.dtype, jnp.integer) else jnp.float32
    return jnp.max(seen(x.astype(wide)).astype(jnp.float32), axis=1, keepdims=True)


def _packed(numbers: Sequence[Array]) -> Array:
    """Numbers of several dtypes of at most 32 bits in one array, to be in the scalars' memory."""

    def word(x: Array) -> Array:
        if x.dtype.itemsize == 4:
            return lax.bitcast_convert_type(x, jnp.int32)
        return x.astype(jnp.int32)

    return jnp.stack([word(x) for x in numbers])


def _unpacked(word: Any, dtype: np.dtype) -> Any:
    """One of them."""
    if dtype.itemsize == 4:
        return lax.bitcast_convert_type(word, dtype)
    return word.astype(dtype)


def _as_bfloat16(x: Array, *, exponent_bits: int, mantissa_bits: int) -> Array:
    """`lax.reduce_precision` to bfloat16, half to even, in integers."""
    assert (exponent_bits, mantissa_bits) == (8, 7)
    bits = lax.bitcast_convert_type(x, jnp.int32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.int32(-(2**16))
    # Near the ends of the integers the sum of a NaN's bits would become another number.
    kept = jnp.where(jnp.isnan(x), bits, rounded)
    return lax.bitcast_convert_type(kept, jnp.float32)


# What Pallas does not lower for TPUs. Nothing is computed twice in a kernel.
_INSTEAD = {
    "optimization_barrier": lambda *operands: operands,
    "reduce_precision": _as_bfloat16,
}
