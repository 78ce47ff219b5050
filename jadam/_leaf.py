"""One step of one leaf in XLA's operations: moments from storage, the equations, and back."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jadam import _codec, _math
from jadam._types import Count, Leaf, Scalar

Rule = Callable[[_math.Step], _math.Equations]
"""A member of the family with its hyperparameters: the step ↦ its equations."""


def increment(count: Count) -> Count:
    """count + 1, which stays at 2³¹-1."""
    largest = np.iinfo(np.int32).max
    return jnp.where(count < largest, count + 1, largest)


def leaf_step(
    rule: Rule, learning_rate: Scalar, weight_decay: Scalar, count: Count, *, to_params: bool
) -> Callable[..., tuple[Leaf, ...]]:
    """The step after `count` updates: `(g, p, decays, *stored) -> (update, *stored)`.

    update = -learning_rate·(direction + weight_decay·p), without the decay where `decays` is
    false; `p` may be None there. With `to_params` p + update comes in its place, in p's dtype.
    """
    before, count = count, increment(count)
    equations = functools.cache(lambda dtype: rule(_math.Step.of(count, dtype)))

    @functools.cache
    def coded_equations() -> tuple[_math.Equations, _math.Equations]:
        """Those of the step that the codes were made in, and of this one."""
        float32 = jnp.dtype(jnp.float32)
        return rule(_math.Step.of(before, float32)), equations(float32)

    def float_moments(g: Leaf, *stored: Any) -> tuple[Leaf, list[Any]]:
        dtype = np.result_type(*(_math.widen(x.dtype) for x in (g, *stored)))
        real = jnp.finfo(dtype).dtype
        moments = (_codec.load(x, dtype if i == 0 else real) for i, x in enumerate(stored))
        gradient = _math.limit_range(g.astype(dtype))
        direction, moments = equations(real).step(gradient, *moments)
        kept = [
            _codec.store(x, like.dtype, count, salt)
            for salt, (x, like) in enumerate(zip(moments, stored, strict=True))
        ]
        return direction, kept

    def coded_moments(g: Leaf, *stored: Any) -> tuple[Leaf, list[Any]]:
        then, now = coded_equations()
        gradient = _math.limit_range(g.astype(jnp.float32))
        codes = _codec.Codes(*stored)
        direction, moments = now.step(gradient, *codes.decode(then))
        return direction, list(codes.encode(moments, g, now, count))[: len(stored)]

    def leaf(g: Any, p: Any, decays: bool, *stored: Any) -> tuple[Leaf, ...]:
        g = jnp.asarray(g)
        moved = coded_moments if _codec.is_coded(stored[0]) else float_moments
        direction, kept = moved(g, *stored)
        if decays:
            wide = jnp.asarray(p).astype(direction.dtype)
            direction += jnp.asarray(weight_decay, direction.dtype) * wide
        update = -jnp.asarray(learning_rate, direction.dtype) * direction
        if not jnp.iscomplexobj(g):
            update = update.real
        update = update.astype(g.dtype)
        return (_add(jnp.asarray(p), update) if to_params else update), *kept

    return leaf


def _add(p: Leaf, update: Leaf) -> Leaf:
    """What `optax.apply_updates` makes of a leaf: one rounding, to p's dtype."""
    dtype = np.result_type(_math.widen(p.dtype), _math.widen(update.dtype))
    return (p.astype(dtype) + update.astype(dtype)).astype(p.dtype)
