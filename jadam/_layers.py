"""A loop over the layers of stacks that lie on the device or in the host's memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Rows = dict[Any, Any]
"""Of each stack some rows of its first axis, by the stacks' names."""


def is_far(x: Any) -> bool:
    """Whether an array lies in the host's memory, as far as JAX's types say."""
    return jax.typeof(x).memory_space is jax.memory.Space.Host


def near(x: Any) -> Any:
    """The array on the device."""
    return jax.device_put(x, jax.memory.Space.Device) if is_far(x) else x


def back(x: Any, home: Any) -> Any:
    """The array in the memory where `home` lies."""
    return jax.device_put(x, jax.memory.Space.Host) if is_far(home) else x


def over_layers(
    body: Callable[[Any, Rows, Any], tuple[Any, Rows, Any]],
    carry: Any,
    stacks: Rows,
    xs: Any,
    length: int,
    *,
    rows: int = 1,
    writes: bool = True,
    reverse: bool = False,
    unroll: int | bool = 1,
) -> tuple[Any, Rows, Any]:
    """`lax.scan` over slices of stacks, which are replaced in place.

    Of a stack in the host's memory the next slice is fetched while this one is computed, so that
    two are on the device.

    Args:
        body: `(carry, slices [rows, ...], (i, x)) -> (carry, new slices, y)`, i counting slices.
        carry: the first carry.
        stacks: arrays [>= length * rows, ...].
        xs: as in `lax.scan`.
        length: the number of slices.
        rows: how many rows of the stacks' first axes one slice is.
        writes: whether there are new slices.
        reverse, unroll: as in `lax.scan`.

    Returns:
        The last carry, the stacks, and the stacked ys.
    """
    far = {name: x for name, x in stacks.items() if is_far(x)}

    def slices(stacks: Rows, i: Any) -> Rows:
        return {
            name: near(lax.dynamic_slice_in_dim(x, i * rows, rows)) for name, x in stacks.items()
        }

    def step(state: Any, x: Any) -> Any:
        carry, ahead, own = state
        own = own if writes else stacks
        i, _ = x
        following = jnp.where(i > 0, i - 1, i) if reverse else jnp.minimum(i + 1, length - 1)
        fetched = slices({name: own[name] for name in far}, following)
        here = slices({name: x for name, x in own.items() if name not in far}, i)
        carry, new, y = body(carry, here | ahead, x)
        for name, slice_ in new.items():
            slice_ = back(slice_, own[name])
            own = own | {name: lax.dynamic_update_slice_in_dim(own[name], slice_, i * rows, 0)}
        return (carry, fetched, own if writes else {}), y

    first = jnp.uint32(length - 1 if reverse else 0)
    state = (carry, slices(far, first), stacks if writes else {})
    index = jnp.arange(length, dtype=jnp.uint32)
    (carry, _, own), ys = lax.scan(step, state, (index, xs), reverse=reverse, unroll=unroll)
    return carry, own if writes else stacks, ys
