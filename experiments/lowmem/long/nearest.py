"""The negative control: jadam's own 8-bit codes without the dither, each rounded to nearest.

A stored moment that moves by less than half a level in a step rounds back to itself for ever, which
arXiv 2603.16731 describes of 8-bit Adams. A comparison that finds nothing here can find nothing.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import optax
from jaxtyping import Array, PyTree

import jadam
from experiments.common.gpt import is_matrix
from jadam._leaf import Options, increment, leaf_step
from jadam._members import ADAM
from jadam._storage import Codes, Storage
from jadam._storage import storage_of as dithered


class NearestCodes(Codes):
    """The same codes at the same places; without a count `_encode` rounds to nearest."""

    def _encode(
        self,
        moments: Sequence[Array],
        bounds: Mapping[int, Array],
        fed: Array,
        relation: Any,
        count: Array | None,
    ) -> tuple[Array, ...]:
        del count
        return super()._encode(moments, bounds, fed, relation, None)


def storage_of(moments: tuple[Any, ...], stored: Sequence[Any]) -> Storage:
    """As jadam's; leaves too small for codes are float32 in both."""
    return NearestCodes.of(moments, stored) if Codes.holds(stored) else dithered(moments, stored)


def adamw(
    schedule: optax.Schedule, decay: float, before: optax.GradientTransformation
) -> optax.GradientTransformation:
    """AdamW with jadam's equations and defaults, in these codes."""
    rule = ADAM.with_hyperparameters(b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0)

    def update(
        grads: PyTree, state: jadam.AdamState, params: PyTree
    ) -> tuple[PyTree, jadam.AdamState]:
        step = leaf_step(rule, schedule(state.count), decay, state.count, storage_of)
        leaves, structure = jax.tree.flatten(params)
        trees = map(structure.flatten_up_to, (grads, is_matrix(params), state.mu, state.nu))
        stepped = [
            step(g, p, Options(decays=decays, to_params=False), (mu, nu))
            for p, g, decays, mu, nu in zip(leaves, *trees, strict=True)
        ]
        updates = structure.unflatten([leaf.moved for leaf in stepped])
        rows = [leaf.stored for leaf in stepped]
        return updates, ADAM.state_of(increment(state.count), structure, rows)

    init = partial(jadam.init, mu_dtype="int8", nu_dtype="uint8")
    return optax.chain(before, optax.GradientTransformation(init, update))
