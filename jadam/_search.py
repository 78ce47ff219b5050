"""jadam's states wherever they lie in a tree: found, taken apart by parameter, filled again."""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from jadam import _math, _validate
from jadam._members import MEMBERS, Member, State, is_state, member_of
from jadam._state import AmsgradState, CorrectedAmsgradState, RowsState
from jadam._storage import Codes, Storage, checked_storage_of, tops_shape
from jadam._traced import is_tracer
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
    """One of jadam's states, with its place in a tree, its member and its parameters.

    `last` is None, or the number of updates after which each row of the one parameter stands: of a
    table in `jadam.rows`.
    """

    where: str
    state: State
    member: Member
    parameters: list[Parameter]
    last: Any = None

    def numbers(
        self, parameter: Parameter, rates: Mapping[str, Any], eps: Any = 0.0
    ) -> tuple[Array, ...]:
        """A parameter's moments in float32 or wider. Rows have faded since their last update.

        eps: AdaMax's, below which u does not fade.
        """
        member, storage = self.member, parameter.storage
        wide = storage.wide(jnp.result_type(jnp.float32))
        real = jnp.finfo(wide).dtype
        count: Any = self.state.count
        # Codes mean what they do at the time at which they were stored.
        stored_at = count
        if self.last is not None:
            stored_at = self.last.reshape(-1, *(1,) * (len(parameter.shape) - 1))
        time = _math.Time.of(jnp.maximum(stored_at, 1), real)
        moments = storage.load(parameter.stored, lambda: member.relation_at(time, **rates), wide)
        if self.last is None:
            return moments
        missed = jnp.maximum(count - stored_at, 0).astype(real)
        return member.faded(moments, missed, {**rates, "eps": eps})


def states_in(argument: str, tree: PyTree, *, adamax: bool = False) -> list[Found]:
    """jadam's states in a tree, in its order. `adamax` says that they are AdaMax's.

    Raises:
        ValueError: there are none, or one has trees that do not match.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_ends_search)
    found: list[Found] = []
    for path, node in flat:
        where = argument + jax.tree_util.keystr(path)
        if isinstance(node, RowsState):
            dense = states_in(f"{where}.dense", node.dense, adamax=adamax)
            found += [state._replace(last=node.last) for state in dense]
        elif is_state(node):
            found.append(_found(where, node, adamax))
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
    rows = [_as_needed(row) for row in zip(*map(jax.tree.leaves, trees), strict=True)]
    parameters = []
    for path, row in zip(paths, rows, strict=True):
        key = jax.tree_util.keystr(path)
        storage = checked_storage_of(
            member.moments, row, lambda name, key=key: f"{where}.{name}{key}"
        )
        moments = dict(zip(names, row, strict=True))
        parameters.append(Parameter(where, path, moments, storage))
    for parameter in parameters:
        shapes = parameter.storage.shapes(parameter.shape)
        for (name, x), shape in zip(parameter.moments.items(), shapes, strict=True):
            if np.shape(x) != shape:
                raise ValueError(
                    f"{parameter.where(name)}: expected shape {shape}, got {np.shape(x)}"
                )
    return Found(where, node, member, parameters)


def _as_needed(row: Sequence[Any]) -> Sequence[Any]:
    """A parameter's arrays; of tops that `jadam.sharding.divisible` made longer those of blocks."""
    if not Codes.holds(row):
        return row
    tops = tops_shape(np.shape(row[0]))

    def needed(x: Any) -> Any:
        if not Codes.holds([x]) or np.shape(x) == tops:
            return x
        cut = functools.partial(jax.lax.slice_in_dim, start_index=0, limit_index=tops[-1], axis=-1)
        return jax.eval_shape(cut, x) if isinstance(x, jax.ShapeDtypeStruct) else cut(x)

    return [needed(x) for x in row]


def with_moments(tree: PyTree, moments: Iterator[Sequence[Any]]) -> PyTree:
    """The tree with other moments in jadam's states, given by parameter in their order."""

    def fill(node: Any) -> Any:
        if not is_state(node):
            return node
        member = member_of(node)
        leaves, structure = jax.tree.flatten(member.stored(node)[0])
        return member.state_of(node.count, structure, [next(moments) for _ in leaves])

    return jax.tree.map(fill, tree, is_leaf=is_state)


def dense_in(tree: PyTree) -> PyTree:
    """The tree with the dense state in place of each of `jadam.rows`."""

    def dense(node: Any) -> Any:
        return node.dense if isinstance(node, RowsState) else node

    return jax.tree.map(dense, tree, is_leaf=lambda node: isinstance(node, RowsState))


def check_flushed(states: Iterable[Found]) -> None:
    """All rows of tables in `jadam.rows` stand after the last update, as other states do.

    The missed updates move the table too, which a function of the state alone does not see.
    """
    for found in states:
        is_known = isinstance(found.last, (np.ndarray, jax.Array)) and not is_tracer(found.last)
        if is_known and bool(jnp.any(found.last != found.state.count)):
            raise ValueError(
                f"{found.where}: expected rows that all stand after update {found.state.count}, "
                f"got one after {jnp.min(found.last)}; flush the table and its state in jadam.rows"
            )


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
