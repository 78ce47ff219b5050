"""A loop over the layers of stacks that lie on the device or in the host's memory."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jadam._kernels.choice import apart
from jadam._rounding import as_layer
from jadam._storage import placed_like
from jadam._traced import ClosedJaxpr, in_order

Stacks = dict[Any, Any]
"""Stacks, or a slice of each, by their names: some rows of the first axis."""


def is_far(x: Any) -> bool:
    """Whether an array lies in the host's memory, as far as JAX's types say."""
    return jax.typeof(x).memory_space is jax.memory.Space.Host


def near(x: Any) -> Any:
    """The array on the device."""
    return jax.device_put(x, jax.memory.Space.Device) if is_far(x) else x


def back(x: Any, home: Any) -> Any:
    """The array in the memory where `home` lies."""
    return jax.device_put(x, jax.memory.Space.Host) if is_far(home) else x


def _as_it_lies(stack: Any) -> Any:
    """The stack, kept as it lies in memory, since it is read by slices only.

    XLA:TPU would copy it before the loop into the dtype or the order of axes that the body wants of
    a slice: 2 or 4 bytes a parameter.
    """
    if is_far(stack):
        return stack
    stack = lax.optimization_barrier(stack)
    return lax.platform_dependent(stack, tpu=in_order, default=lambda x: x)


def on_slices(
    step: Callable[..., Any], arrays: Sequence[Any], rows: Sequence[int | None]
) -> tuple[ClosedJaxpr, list[Any]]:
    """A step of one layer, traced so that each leaf is a call of its own, dithered as its layer is.

    Args:
        step: a function of the arrays.
        arrays: stacks, and others.
        rows: of each array how many rows of its first axis are there, or None: all.

    Returns:
        The equations, whose inputs are the layer's number and the arrays, and the arrays' types.
    """

    def numbered(layer: Any, *arrays: Any) -> Any:
        with apart(), as_layer(layer):
            return step(*arrays)

    slices = jax.eval_shape(
        lambda *arrays: [
            near(x if n is None else x[:n]) for x, n in zip(arrays, rows, strict=True)
        ],
        *arrays,
    )
    return jax.make_jaxpr(numbered)(jax.ShapeDtypeStruct((), jnp.uint32), *slices), slices


def over_layers(
    body: Callable[[Any, Stacks, Any], tuple[Any, Stacks, Any]],
    carry: Any,
    stacks: Stacks,
    xs: Any,
    length: int,
    *,
    rows: int = 1,
    writes: bool = True,
    reverse: bool = False,
    unroll: int | bool = 1,
) -> tuple[Any, Stacks, Any]:
    """`lax.scan` over slices of stacks, which are replaced in place.

    Of a stack in the host's memory no more is on the device than the slice that is computed and the
    one that comes or goes.

    Args:
        body: `(carry, slices [rows, ...], (i, x)) -> (carry, new slices, y)`, i counting slices.
        carry: the first carry.
        stacks: arrays [>= length * rows, ...].
        xs: as in `lax.scan`.
        length: the number of slices.
        rows: how many rows of the stacks' first axes one slice is.
        writes: whether there are new slices. The stacks that are returned are to be used in any
            case: of stacks that are wanted nowhere else XLA computes more than what is read here.
        reverse, unroll: as in `lax.scan`.

    Returns:
        The last carry, the stacks, and the stacked ys.
    """
    # XLA:TPU cannot compile the same of stacks that are written: there each slice is fetched when
    # its round begins, while the body computes what it does not need it for.
    ahead = {name: x for name, x in stacks.items() if is_far(x) and not writes}

    def slices(stacks: Stacks, i: Any) -> Stacks:
        return {
            name: near(lax.dynamic_slice_in_dim(x, i * rows, rows)) for name, x in stacks.items()
        }

    # A slice's number is counted by the loop, not read from an array: so XLA:GPU knows where a
    # slice lies. It fetches each when it is needed, or gives a kernel its place.
    def step(state: Any, x: Any) -> Any:
        carry, i, fetched, own = state
        own = own if writes else {name: _as_it_lies(x) for name, x in own.items()}
        following = jnp.where(i > 0, i - 1, i) if reverse else jnp.minimum(i + 1, length - 1)
        coming = slices(ahead, following)
        here = slices({name: x for name, x in own.items() if name not in ahead}, i)
        carry, new, y = body(carry, here | fetched, (i.astype(jnp.uint32), x))
        for name, slice_ in new.items():
            slice_ = back(placed_like(slice_, (here | fetched)[name]), own[name])
            own |= {name: lax.dynamic_update_slice_in_dim(own[name], slice_, i * rows, 0)}
        return (carry, i - 1 if reverse else i + 1, coming, own), y

    first = jnp.int32(length - 1 if reverse else 0)
    state = (carry, first, slices(ahead, first), stacks)
    options = {"length": length, "reverse": reverse, "unroll": unroll}
    (carry, _, _, own), ys = lax.scan(step, state, xs, **options)
    return carry, own, ys
