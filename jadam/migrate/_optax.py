"""optax's states of Adam and AMSGrad, which are jadam's too."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jadam._search import (
    Maximum,
    check_flushed,
    check_maximum,
    dense_in,
    refuse_codes,
    states_in,
)
from jadam._traced import is_tracer
from jadam._types import PyTree
from jadam.migrate._foreign import check_possible

_keystr = jax.tree_util.keystr


def from_optax(state: PyTree, *, maximum: Maximum = None) -> PyTree:
    """A state of optax as jadam's own namesake would have it, checked, every bit as it was.

    It goes on without this too, since the classes are the same. This makes `nu` of complex
    parameters real, and refuses what no Adam has made. Go on with jadam's namesake of what made it.
    Moments keep their dtypes: bfloat16 for bfloat16 parameters, where jadam's own have float32
    (`cast_like` changes that).

    Args:
        state: the state of any chain, mask, partition or wrapper, also an abstract one.
        maximum: must be "corrected" where AMSGrad is in it, the maximum that optax keeps. Go on
            with `jadam.amsgrad(..., maximum="corrected")`.

    Raises:
        ValueError: there is no Adam of optax in it, or `maximum` is not said; a count is negative,
            or a moment is one that no gradients make beside another (a negative second, NaN in
            one alone, a first beyond a million times the root of the second).

    >>> import jax.numpy as jnp, jadam, optax
    >>> state = optax.chain(optax.clip(1.0), optax.adam(1e-3)).init(jnp.ones(3))
    >>> type(jadam.migrate.from_optax(state)[1][0]).__name__
    'ScaleByAdamState'
    """

    def real(where: str, v: Any, m: Any) -> Any:
        del m
        if not jnp.iscomplexobj(v):
            return v
        if isinstance(v, jax.ShapeDtypeStruct):
            return v.update(dtype=jnp.finfo(v.dtype).dtype)
        if np.any(v.imag):
            raise ValueError(f"{where}: expected second moments with no imaginary part")
        return v.real

    swapped = _swapped(state, real, maximum)
    for found in states_in("state", swapped):
        count = found.state.count
        if _known(count) and bool(jnp.any(jnp.asarray(count) < 0)):
            raise ValueError(f"{found.where}.count: expected a number >= 0, got {count}")
        for parameter in found.parameters:
            if all(map(_known, parameter.stored)):
                places = {field: parameter.where(field) for field in parameter.moments}
                check_possible(places, parameter.moments)
    return swapped


def _known(x: Any) -> bool:
    """Whether an array has values here: neither abstract nor traced."""
    return not (isinstance(x, jax.ShapeDtypeStruct) or is_tracer(x))


def to_optax(state: PyTree, *, maximum: Maximum = None) -> PyTree:
    """A state as optax's namesake would have it: `from_optax` the other way.

    Args:
        state: as in `from_optax`. From `jax.eval_shape(tx.init, params)` it makes the target to
            restore optax's checkpoint to.
        maximum: must be "corrected" where AMSGrad is in it, and be that of its `jadam.amsgrad`.

    Raises:
        TypeError: moments are codes.
        ValueError: there is no Adam of jadam in it, or `maximum` is not said.

    >>> import jax.numpy as jnp, jadam
    >>> type(jadam.migrate.to_optax(jadam.adam(1e-3).init(jnp.ones(3)))[0]).__name__
    'ScaleByAdamState'
    """
    states = states_in("state", state)
    check_flushed(states)
    for found in states:
        for parameter in found.parameters:
            refuse_codes(parameter)

    def like_first(where: str, v: Any, m: Any) -> Any:
        del where
        if not jnp.iscomplexobj(m):
            return v
        return v.update(dtype=m.dtype) if isinstance(v, jax.ShapeDtypeStruct) else v.astype(m.dtype)

    return _swapped(dense_in(state), like_first, maximum)


def _swapped(
    state: PyTree,
    second: Callable[[str, Any, Any], Any],
    maximum: Maximum,
) -> PyTree:
    """The tree with other second moments: `second` makes one of it and the first."""
    kinds = (optax.ScaleByAdamState, optax.ScaleByAmsgradState)
    nodes = []

    def swap(path: Any, node: Any) -> Any:
        if not isinstance(node, kinds):
            return node
        nodes.append(node)

        def moments(field: str) -> PyTree:
            where = f"state{_keystr(path)}.{field}"
            return jax.tree_util.tree_map_with_path(
                lambda p, v, m: second(where + _keystr(p), v, m), getattr(node, field), node.mu
            )

        return type(node)(node.count, node.mu, *map(moments, node._fields[2:]))

    swapped = jax.tree_util.tree_map_with_path(swap, state, is_leaf=lambda x: isinstance(x, kinds))
    if not nodes:
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"state: expected {expected} in it, found none")
    check_maximum(nodes, maximum, "corrected", "optax")
    return swapped
