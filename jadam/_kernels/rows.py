"""The rows that a batch touches as two JAX primitives: as they are now, and stepped in place.

Where one is lowered for one CPU device, the library takes it. Elsewhere it is what the caller
makes of the same in XLA's operations: under differentiation and `jax.vmap`, in an export, and where
arrays are divided over devices along automatic axes.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jadam._kernels import jax_internals, native
from jadam._kernels.jax_internals import Place
from jadam._traced import Jaxpr, function_of

Rows = Float[Array, "rows *row"]
Places = Float[Array, "places *row"]


class TableArrays(NamedTuple):
    """A table, its moments, and after which update each row stands."""

    p: Rows
    m: Rows
    v: Rows
    last: Int[Array, "rows"]


class Batch(NamedTuple):
    """The rows of a batch, and what the steps that each has missed make of it: `_missed.Sums`."""

    ids: Int[Array, "places"]
    steps: Float[Array, "places"]
    plain: Float[Array, "places"]
    first: Float[Array, "places"]
    second: Float[Array, "places"]
    decay: Float[Array, "places"]
    factors: Float[Array, "nodes places"]
    scales: Float[Array, "nodes places"]


# Where a table is among the operands of a step.
_TABLE = 0, 1, 2, 3 + len(Batch._fields)


class _Call(NamedTuple):
    """What is known of a call while tracing.

    Attributes:
        target: the function of the library.
        given: how many operands it takes; the rest are those of `otherwise`.
        decays: whether a step decays the parameters.
        otherwise: the results in XLA's operations, a traced function of the rest.
    """

    target: str
    given: int
    decays: bool
    otherwise: Jaxpr


def now(
    table: TableArrays, batch: Batch, eps: Float[Array, ""], otherwise: Callable[[], Places]
) -> Places:
    """The rows of the batch after the steps that they have missed; 0 for what is no row.

    Args:
        table: what the rows are of, like `batch` in float32.
        batch: which rows.
        eps: of the steps.
        otherwise: makes the same in XLA's operations.
    """
    (rows,) = _called(native.ROWS_NOW, (*table[:3], *batch, eps), otherwise)
    return rows


def stepped(
    table: TableArrays,
    batch: Batch,
    g: Places,
    numbers: Float[Array, "numbers"],
    count: Int[Array, ""],
    *,
    decays: bool,
    otherwise: Callable[[], TableArrays],
) -> TableArrays:
    """The table after a step of these rows, which stand after update `count` then.

    Args:
        table: which is written in place.
        batch: which rows.
        g: the gradients. A row that comes again gets their sum.
        numbers: of the step, as `native.numbers_of` packs them.
        count: see above.
        decays: whether the parameters decay.
        otherwise: makes the same in XLA's operations.
    """
    operands = (*table[:3], *batch, table.last, g, numbers, count)
    return TableArrays(*_called(native.ROWS_STEP, operands, otherwise, decays=decays))


def _called(
    target: str, operands: Sequence[Array], otherwise: Callable[[], Any], *, decays: bool = False
) -> list[Array]:
    traced = jax.make_jaxpr(lambda: tuple(jax.tree.leaves(otherwise())))()
    call = _Call(target, len(operands), decays, traced.jaxpr)
    return _bind(call, *operands, *map(jnp.asarray, traced.consts))


def _in_xla(*operands: Any, plan: _Call) -> list[Any]:
    return function_of(plan.otherwise, operands[plan.given :])()


def _in_library(*operands: Any, plan: _Call) -> Any:
    operands, results = operands[: plan.given], _abstract(plan=plan)
    in_place = plan.target == native.ROWS_STEP
    ffi = jax.ffi.ffi_call(
        plan.target,
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
        input_output_aliases=dict(zip(_TABLE, range(4), strict=True)) if in_place else {},
    )
    return ffi(*operands, **({"decays": plan.decays} if in_place else {}))


def _abstract(*operands: Any, plan: _Call) -> list[Any]:
    del operands
    return [x.aval for x in plan.otherwise.outvars]


def _on_cpu(place: Place, devices: int) -> Callable[..., Any]:
    del devices
    return _in_library if place is Place.ONE_DEVICE else _in_xla


_bind = jax_internals.new_primitive(
    "jadam_rows",
    abstract=_abstract,
    everywhere=_in_xla,
    on={"cpu": _on_cpu},
)
