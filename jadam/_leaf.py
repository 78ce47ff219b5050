"""One step of one leaf in XLA's operations: moments from storage, the equations, and back."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jadam import _math
from jadam._masters import Weights
from jadam._members import Rule
from jadam._storage import Codes, Storage, is_cut, placed_like, storage_of, uncut
from jadam._types import Count, Number, Scalar


class Options(NamedTuple):
    """What else a leaf's step does. A kernel takes a leaf if it has each option that is set.

    Attributes:
        decays: the parameter decays.
        to_params: p + update is wanted in place of the update.
        weights: how the parameter lies, if it stands for more than its 16 bits.
    """

    decays: bool
    to_params: bool
    weights: Weights | None = None

    @property
    def needs_params(self) -> bool:
        """Whether the step reads the parameter."""
        return self.decays or self.to_params or self.weights is not None


class Stepped(NamedTuple):
    """A leaf after its step: the update or the parameter, its moments, what belongs to it."""

    moved: Number
    stored: tuple[Number, ...]
    extra: tuple[Any, ...]


def increment(count: Count) -> Count:
    """count + 1, which stays at 2³¹-1."""
    largest = np.iinfo(np.int32).max
    return jnp.where(count < largest, count + 1, largest)


def leaf_step(
    rule: Rule,
    learning_rate: Scalar,
    weight_decay: Scalar,
    count: Count,
    storage_of: Callable[..., Storage] = storage_of,
) -> Callable[..., Stepped]:
    """The step after `count` updates: `(g, p, options, stored, extra) -> Stepped`.

    update = -learning_rate·(direction + weight_decay·p), the decay where the leaf decays. With
    `to_params` p + update comes in its place, in p's dtype. `p` may be None if it is not needed.
    `extra` is what belongs to p where its weights say so; the step is then made in float32, of the
    weight that p stands for. `storage_of` says how a kernel finds the moments that it has loaded.
    """
    now = increment(count)

    @functools.cache
    def equations(dtype: np.dtype) -> _math.Equations:
        return rule.at(_math.Time.of(now, dtype))

    @functools.cache
    def relation(dtype: np.dtype, *, before: bool) -> _math.Relation:
        """That of this step, or of the one before it, which stored the moments."""
        return rule.relation_at(_math.Time.of(count if before else now, dtype))

    def leaf(
        g: Any, p: Any, options: Options, stored: Sequence[Any], extra: tuple[Any, ...] = ()
    ) -> Stepped:
        if Codes.holds(stored) and is_cut(g):
            return _gathered(leaf, g, p, options, stored, extra)
        g, weights, start = jnp.asarray(g), options.weights, p
        if weights is not None:
            g, p = g.astype(jnp.float32), weights.load(jnp.asarray(start), extra)
        storage = storage_of(rule.member.moments, stored)
        wide = storage.wide(g.dtype)
        real = jnp.finfo(wide).dtype
        gradient = _math.limit_range(g.astype(wide), storage.largest_gradient)
        moments = storage.load(stored, lambda: relation(real, before=True), wide)
        direction, moments = equations(real)(gradient, *moments)
        kept = storage.store(
            moments, stored, g, equations(real), lambda: relation(real, before=False), now
        )
        if options.decays:
            param = jnp.asarray(p).astype(direction.dtype)
            direction += jnp.asarray(weight_decay, direction.dtype) * param
        update = -jnp.asarray(learning_rate, direction.dtype) * direction
        if not jnp.iscomplexobj(g):
            update = update.real
        update = update.astype(g.dtype)
        if weights is not None:
            update, extra = weights.store(_add(p, update), jnp.asarray(start), extra)
        moved = _add(jnp.asarray(start), update) if options.to_params else update
        return Stepped(moved, kept, extra)

    return leaf


def _gathered(
    leaf: Callable[..., Stepped],
    g: Any,
    p: Any,
    options: Options,
    stored: Sequence[Any],
    extra: tuple[Any, ...],
) -> Stepped:
    """The step of a leaf whose blocks are cut, and its results where its arrays lay."""
    g_whole, p_whole, *others = jax.tree.map(uncut, (g, p, stored, extra))
    stepped = leaf(g_whole, p_whole, options, *others)
    places = Stepped(p if options.to_params else g, tuple(stored), extra[: len(stepped.extra)])
    return jax.tree.map(placed_like, stepped, places)


def _add(p: Number, update: Number) -> Number:
    """What `optax.apply_updates` makes of a leaf: one rounding, to p's dtype."""
    dtype = np.result_type(_math.widen(p.dtype), _math.widen(update.dtype))
    return (p.astype(dtype) + update.astype(dtype)).astype(p.dtype)
