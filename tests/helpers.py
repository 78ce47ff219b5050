"""What several tests need: all optimizers, distances in ulps, programs compiled ahead of time."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import optax
import optax.contrib
from hypothesis import strategies as st

import jadam
from experiments.common import chips


@dataclass(frozen=True)
class Case:
    """A member of the family: jadam's, optax's of the same mathematics, the reference's options."""

    name: str
    make: Callable[..., optax.GradientTransformationExtraArgs]
    options: dict[str, Any] = field(default_factory=dict)
    peer: Callable[..., optax.GradientTransformation] | None = None
    peer_options: dict[str, Any] | None = None
    reference: dict[str, Any] = field(default_factory=dict)
    weight_decay: float = 0.0

    def __str__(self) -> str:
        return self.name

    def __call__(self, learning_rate: Any = 1e-2, **options: Any):
        return self.make(learning_rate, **self.options, **options)

    def optax(self, learning_rate: Any = 1e-2, **options: Any):
        assert self.peer is not None
        own = self.options if self.peer_options is None else self.peer_options
        return self.peer(learning_rate, **own, **options)


FAMILY = [
    Case("adam", jadam.adam, {}, optax.adam),
    Case("adam_eps_root", jadam.adam, {"eps_root": 1e-6}, optax.adam, None, {"eps_root": 1e-6}),
    Case(
        "adam_betas",
        jadam.adam,
        {"b1": 0.8, "b2": 0.99, "eps": 1e-6},
        optax.adam,
        None,
        {"b1": 0.8, "b2": 0.99, "eps": 1e-6},
    ),
    Case("adamw", jadam.adamw, {"weight_decay": 0.1}, optax.adamw, weight_decay=0.1),
    Case("nadam", jadam.nadam, {}, optax.nadam, None, {"kind": "nadam"}),
    Case(
        "nadamw",
        jadam.nadamw,
        {"weight_decay": 0.1},
        optax.nadamw,
        None,
        {"kind": "nadam"},
        weight_decay=0.1,
    ),
    Case("nadam_dozat", jadam.nadam, {"momentum_decay": 0.004}, reference={"kind": "dozat"}),
    Case("amsgrad", jadam.amsgrad, {}, reference={"kind": "amsgrad"}),
    Case(
        "amsgrad_corrected",
        jadam.amsgrad,
        {"maximum": "corrected"},
        optax.amsgrad,
        {},
        {"kind": "amsgrad-corrected"},
    ),
    Case("adamax", jadam.adamax, {}, optax.adamax, None, {"kind": "adamax"}),
    Case(
        "adamaxw",
        jadam.adamaxw,
        {"weight_decay": 0.1},
        optax.adamaxw,
        None,
        {"kind": "adamax"},
        weight_decay=0.1,
    ),
    Case("radam", jadam.radam, {}, optax.radam, None, {"kind": "radam"}),
    Case(
        "ademamix",
        jadam.ademamix,
        {"weight_decay": 0.1},
        optax.contrib.ademamix,
        None,
        {"kind": "ademamix"},
        weight_decay=0.1,
    ),
    Case(
        "ademamix_warmup",
        jadam.ademamix,
        {"warmup": 50, "b3": 0.999},
        reference={"kind": "ademamix", "warmup": 50, "b3": 0.999},
    ),
]

each_member = {"argvalues": FAMILY, "ids": str}
"""`@pytest.mark.parametrize("case", **each_member)`: the test holds for the whole family."""


def ulps(value: Any, reference: Any, dtype: Any = np.float32) -> np.ndarray:
    """|value - reference| in units of the spacing of `dtype` at the float64 reference."""
    value, reference = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    spacing = np.spacing(np.abs(reference).astype(dtype)).astype(np.float64)
    return np.abs(value - reference) / spacing


def tree_of_parameters(dtype: Any = np.float32) -> dict[str, Any]:
    """A small nested tree with matrices, vectors, a scalar, an empty array, None and a tuple."""
    rng = np.random.default_rng(0)

    def leaf(*shape: int) -> jax.Array:
        return jax.numpy.asarray(rng.standard_normal(shape), dtype)

    return {
        "dense": {"kernel": leaf(8, 16), "bias": leaf(16)},
        "scale": leaf(),
        "pair": (leaf(3), None),
        "empty": leaf(0, 4),
    }


def gradients_like(params: Any, seed: int, scale: float = 1.0) -> Any:
    """Random gradients for a tree of parameters, in their dtypes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jax.numpy.asarray(scale * rng.standard_normal(p.shape), p.dtype), params
    )


def trees_of(leaves: st.SearchStrategy) -> st.SearchStrategy:
    """Any tree: nested, empty, with `None`."""
    return st.recursive(
        leaves | st.none() | st.just({}) | st.just(()),
        lambda children: (
            st.lists(children, max_size=3)
            | st.tuples(children, children)
            | st.dictionaries(st.sampled_from("abc"), children, max_size=3)
        ),
        max_leaves=6,
    )


@functools.cache
def printed_ahead(code):
    """The JSON that code prints, in a process of its own: JAX starts its platforms once."""
    answer = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **chips.ENVIRONMENT},
    )
    return json.loads(answer.stdout.splitlines()[-1])
