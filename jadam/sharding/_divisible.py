"""Tops of blocks that divide wherever their parameters do."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jadam import _validate
from jadam._storage import Codes, placed_like, tops_shape, whole_rows
from jadam._transform import FusedTransformation
from jadam._types import PyTree, Shape
from jadam.sharding._rules import owner_of


def divisible(tx: Any, parts: int) -> Any:
    """The transformation with a state whose every leaf divides as its parameter does.

    Moments of 8 and 4 bits keep one number for each block of 128 along a parameter's last axis, 4
    for an axis of 512. Eight devices divide 512, and not 4: JAX refuses a state that a program lays
    exactly like the parameters, as Flax does from annotations, MaxText and tunix with it, and
    `optax.tree_map_params`. Here these arrays end in zeros, up to a number that `parts` divides,
    and such a program runs as it is:

        tx = divisible(jadam.adamw(1e-3, mu_dtype="int8", nu_dtype="uint8"), jax.device_count())

    Updates and codes are those of tx, bit for bit. A program that says itself where the state lies
    does not need this: `state_shardings` has places that fit.

    Args:
        tx: any optax transformation, the whole one: 16-bit weights and chains belong inside.
        parts: a multiple of the number of parts into which any last axis is divided. A state can
            be restored where `parts` is the same, on any number of devices. It costs at most
            2·parts/n bytes a parameter for a last axis of n.

    Returns:
        A transformation of the type of tx. `jadam.moments` and `jadam.diagnostics` read its state.

    Raises:
        TypeError, ValueError: `parts` is no positive integer.

    >>> import jax, jax.numpy as jnp, jadam
    >>> from jadam.sharding import divisible
    >>> tx = divisible(jadam.adam(1e-3, mu_dtype="int8", nu_dtype="uint8"), 8)
    >>> state, *_ = jax.eval_shape(tx.init, {"w": jnp.ones((64, 512))})
    >>> state.mu["w"].shape, state.nu["w"].shape
    ((64, 512), (64, 8))
    """
    if _validate.size("parts", parts) < 1:
        raise ValueError(f"parts: expected a number >= 1, got {parts}")

    def init_fn(params: PyTree) -> Any:
        return _each(_longer, tx.init(params), params, parts)

    return tx._replace(init=init_fn, update=_Divisible(tx, parts))


class _Divisible:
    """An update, and a step if the transformation has one, whose tops are longer outside."""

    def __init__(self, tx: Any, parts: int):
        self._tx, self._parts = tx, parts
        if isinstance(tx, FusedTransformation):
            self.step = self._step

    def __call__(self, updates: PyTree, state: Any, params: PyTree = None, **extra: Any) -> Any:
        return self._inside(self._tx.update, updates, state, params, extra)

    def _step(self, grads: PyTree, state: Any, params: PyTree, **extra: Any) -> Any:
        return self._inside(self._tx.step, grads, state, params, extra)

    def _inside(self, make: Any, grads: PyTree, state: Any, params: PyTree, extra: Any) -> Any:
        within = _each(_shorter, state, grads, self._parts)
        moved, after = make(grads, within, params, **extra)
        longer = _each(_longer, after, grads, self._parts)
        return moved, jax.tree.map(placed_like, longer, state)


def _each(change: Callable[..., Any], state: PyTree, params: PyTree, parts: int) -> PyTree:
    """A state with other tops; `change` takes an array, its length as it is needed and longer."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    owners: dict[Any, Shape] = {path: np.shape(p) for path, p in flat}

    def at(path: Any, x: Any) -> Any:
        owner = owners.get(owner_of(path, owners), ())
        if not owner or not hasattr(x, "dtype") or not Codes.holds([x]):
            return x
        needed, step = tops_shape(owner)[-1], math.gcd(owner[-1], parts)
        longer = -(-needed // step) * step
        return x if np.shape(x)[:-1] != owner[:-1] else change(x, needed, longer)

    return jax.tree_util.tree_map_with_path(at, state)


def _longer(tops: Array, needed: int, longer: int) -> Array:
    if tops.shape[-1] != needed:
        return tops
    return jnp.pad(tops, [(0, 0)] * (tops.ndim - 1) + [(0, longer - needed)])


def _shorter(tops: Array, needed: int, longer: int) -> Array:
    if tops.shape[-1] != longer:
        return tops
    return whole_rows(tops)[..., :needed]
