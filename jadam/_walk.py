"""jadam's states wherever they lie in a tree: found, taken apart leaf by leaf, filled again."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import numpy as np
from jaxtyping import Shaped

from jadam import _codec, _validate
from jadam._state import AdamState, AmsgradState
from jadam._types import PyTree

Maximum: TypeAlias = Literal["raw", "corrected"] | None
"""What AMSGrad's `nu_max` is the maximum of; None where there is none."""


class Leaf(NamedTuple):
    """A parameter in one of jadam's states: the state's place, the path in it, the moments."""

    state: str
    path: Any
    moments: dict[str, Any]

    def where(self, field: str) -> str:
        """The moment's name in an error."""
        return f"{self.state}.{field}{jax.tree_util.keystr(self.path)}"


class Found(NamedTuple):
    """One of jadam's states, with its place in a tree and its leaves."""

    where: str
    state: AdamState | AmsgradState
    leaves: list[Leaf]


def _is_adam(node: Any) -> bool:
    return isinstance(node, (AdamState, AmsgradState))


def adam_states(argument: str, tree: PyTree) -> list[Found]:
    """jadam's states in a tree, in its order.

    Raises:
        ValueError: there are none, or one has trees that do not match.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_adam)
    places = [(argument + jax.tree_util.keystr(path), node) for path, node in flat]
    found = [Found(where, node, _leaves(where, node)) for where, node in places if _is_adam(node)]
    if not found:
        raise ValueError(f"{argument}: expected an AdamState or AmsgradState in it, found none")
    return found


def _leaves(where: str, node: AdamState | AmsgradState) -> list[Leaf]:
    first, *others = (jax.tree.map(lambda _: 0, moment) for moment in node[1:])
    for field, structure in zip(node._fields[2:], others, strict=True):
        _validate.same_structure(f"{where}.{field}", structure, f"{where}.mu", first)
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(node.mu)[0]]
    rows = zip(*map(jax.tree.leaves, node[1:]), strict=True)
    leaves = [
        Leaf(where, path, dict(zip(node._fields[1:], row, strict=True)))
        for path, row in zip(paths, rows, strict=True)
    ]
    for leaf in leaves:
        mu = leaf.moments["mu"]
        for field, x in leaf.moments.items():
            blocks = field == "nu" and _codec.is_coded(mu)
            shape = _codec.tops_shape(np.shape(mu)) if blocks else np.shape(mu)
            if np.shape(x) != shape:
                raise ValueError(f"{leaf.where(field)}: expected shape {shape}, got {np.shape(x)}")
    return leaves


def with_moments(tree: PyTree, moments: Iterator[Sequence[Any]]) -> PyTree:
    """The tree with other moments in jadam's states, given leaf by leaf in their order."""

    def fill(node: Any) -> Any:
        if not _is_adam(node):
            return node
        leaves, structure = jax.tree.flatten(node.mu)
        rows = [next(moments) for _ in leaves]
        columns = zip(*rows, strict=True) if rows else [()] * (len(node) - 1)
        return type(node)(node.count, *map(structure.unflatten, columns))

    return jax.tree.map(fill, tree, is_leaf=_is_adam)


def check_maximum(nodes: Iterable[Any], said: Maximum, kept: str, by: str) -> None:
    """Where there is AMSGrad, the user says that its maximum is the one that `by` keeps."""
    if said is not None:
        _validate.choice("maximum", said, ("raw", "corrected"))
    if said != kept and any("nu_max" in node._fields for node in nodes):
        raise ValueError(
            f"maximum: expected {kept!r}, the maximum that {by}'s AMSGrad keeps, got {said!r}; "
            "jadam.amsgrad must be made with the same, since neither follows from the other"
        )


def refuse_codes(leaf: Leaf) -> None:
    """The moments are floats, which other libraries have."""
    if _codec.is_coded(leaf.moments["mu"]):
        raise TypeError(
            f"{leaf.where('mu')}: expected moments in floats, got 8-bit codes; "
            "jadam.migrate.cast_like converts between them"
        )


def placed(array: Shaped[np.ndarray, "*shape"], like: Any) -> jax.Array:
    """An array on the devices of `like`, where that is committed to some."""
    committed = getattr(like, "committed", True)
    return jax.device_put(array, getattr(like, "sharding", None) if committed else None)
