"""jadam's states wherever they lie in a tree: found, taken apart by parameter, filled again."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import numpy as np
from jaxtyping import Shaped

from jadam import _validate
from jadam._members import MEMBERS, Member, State, is_state, member_of
from jadam._state import AmsgradState, CorrectedAmsgradState, RowsState
from jadam._storage import Storage, storage_of
from jadam._types import PyTree

Maximum: TypeAlias = Literal["raw", "corrected"] | None
"""What AMSGrad's `nu_max` is the maximum of; None where there is none."""


class Parameter(NamedTuple):
    """A parameter in one of jadam's states: the state's place, the path in it, its moments.

    The moments are stored arrays by their names, in the member's order.
    """

    state: str
    path: Any
    moments: dict[str, Any]
    storage: Storage

    def where(self, field: str) -> str:
        """The moment's name in an error."""
        return f"{self.state}.{field}{jax.tree_util.keystr(self.path)}"

    @property
    def stored(self) -> tuple[Any, ...]:
        """The arrays alone."""
        return tuple(self.moments.values())

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape, which that of its first moment is."""
        return np.shape(next(iter(self.moments.values())))


class Found(NamedTuple):
    """One of jadam's states, with its place in a tree, its member and its parameters."""

    where: str
    state: State
    member: Member
    parameters: list[Parameter]


def states_in(argument: str, tree: PyTree, *, adamax: bool = False) -> list[Found]:
    """jadam's states in a tree, in its order. `adamax` says that they are AdaMax's.

    Raises:
        TypeError: there is a state of `jadam.rows`, whose moments are of different times.
        ValueError: there are none, or one has trees that do not match.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_ends_search)
    places = [(argument + jax.tree_util.keystr(path), node) for path, node in flat]
    for where, node in places:
        if isinstance(node, RowsState):
            raise TypeError(
                f"{where}: expected states whose rows are all of one time, got that of a table in "
                "jadam.rows; flush it, and pass its field dense"
            )
    found = [_found(where, node, adamax) for where, node in places if is_state(node)]
    if not found:
        names = " or ".join(dict.fromkeys(member.state.__name__ for member in MEMBERS))
        raise ValueError(
            f"{argument}: expected one of jadam's states in it, {names}, found none in "
            f"{type(tree).__name__}"
        )
    return found


def _ends_search(node: Any) -> bool:
    return is_state(node) or isinstance(node, RowsState)


def _found(where: str, node: State, adamax: bool) -> Found:
    member = member_of(node, adamax=adamax)
    names, trees = [moment.name for moment in member.moments], member.stored(node)
    for name, tree in zip(names[1:], trees[1:], strict=True):
        _validate.same_nodes(f"{where}.{name}", tree, f"{where}.{names[0]}", trees[0])
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(trees[0])[0]]
    rows = zip(*map(jax.tree.leaves, trees), strict=True)
    parameters = [
        Parameter(where, path, dict(zip(names, row, strict=True)), storage_of(member.moments, row))
        for path, row in zip(paths, rows, strict=True)
    ]
    for parameter in parameters:
        shapes = parameter.storage.shapes(parameter.shape)
        for (name, x), shape in zip(parameter.moments.items(), shapes, strict=True):
            if np.shape(x) != shape:
                raise ValueError(
                    f"{parameter.where(name)}: expected shape {shape}, got {np.shape(x)}"
                )
    return Found(where, node, member, parameters)


def with_moments(tree: PyTree, moments: Iterator[Sequence[Any]]) -> PyTree:
    """The tree with other moments in jadam's states, given by parameter in their order."""

    def fill(node: Any) -> Any:
        if not is_state(node):
            return node
        member = member_of(node)
        leaves, structure = jax.tree.flatten(member.stored(node)[0])
        return member.state_of(node.count, structure, [next(moments) for _ in leaves])

    return jax.tree.map(fill, tree, is_leaf=is_state)


def maximum_of(state: Any) -> Maximum:
    """What an AMSGrad's `nu_max` is the maximum of, which its class says; None for others."""
    if not isinstance(state, CorrectedAmsgradState):
        return None
    return "raw" if isinstance(state, AmsgradState) else "corrected"


def check_class(states: Iterable[Any], said: Maximum) -> None:
    """No AMSGrad has another maximum than the user says."""
    for state in states:
        is_of = maximum_of(state)
        if None not in (said, is_of) and said != is_of:
            raise ValueError(
                f"maximum: expected {is_of!r}, that of {type(state).__name__}, got {said!r}"
            )


def check_maximum(nodes: Iterable[Any], said: Maximum, kept: str, by: str) -> None:
    """Where there is AMSGrad, the user says that its maximum is the one that `by` keeps."""
    nodes = list(nodes)
    if said is not None:
        _validate.choice("maximum", said, ("raw", "corrected"))
    if said != kept and any("nu_max" in node._fields for node in nodes):
        raise ValueError(
            f"maximum: expected {kept!r}, the maximum that {by}'s AMSGrad keeps, got {said!r}; "
            "jadam.amsgrad must be made with the same, since neither follows from the other"
        )
    check_class(nodes, said)


def refuse_codes(parameter: Parameter) -> None:
    """The moments are floats, which other libraries have."""
    if not parameter.storage.has_numbers:
        first = next(iter(parameter.moments))
        raise TypeError(
            f"{parameter.where(first)}: expected moments in floats, got {parameter.storage.name}; "
            "jadam.migrate.cast_like converts between them"
        )


def placed(array: Shaped[np.ndarray, "*shape"], like: Any) -> jax.Array:
    """An array on the devices of `like`, where that is committed to some."""
    committed = getattr(like, "committed", True)
    return jax.device_put(array, getattr(like, "sharding", None) if committed else None)
