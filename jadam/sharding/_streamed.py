"""State that lies in the host's memory and comes to the device by parameters and slices of them."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax

from jadam import _validate
from jadam._layers import near, on_slices, over_layers
from jadam._traced import (
    ClosedJaxpr,
    Equation,
    function_of,
    is_literal,
    part_of,
    without_constants,
)
from jadam._transform import FusedTransformation, steps_in_slices
from jadam._types import PyTree
from jadam.sharding._rules import Path, owner_of

_AHEAD = 2  # parameters whose streamed state is on the device: one computes, another one moves
_LEAST = 16  # slices that are smaller than a 16th of what they may be are not worth a round


def streamed(tx: Any, shardings: PyTree, *, slice_size: int = 2**26) -> Any:
    """The transformation with an update that brings its state from the host in parts.

    The state of a parameter comes to the device when that of the parameter before the last has
    gone back, so that two are there at a time. (A state that is moved as a whole is there as a
    whole: XLA starts all transfers first.) A large leaf, such as a stack of layers, comes in slices
    of its first axis: so do jadam's own transformations and their wrappers for 16-bit weights.
    Others come by whole leaves, since they may join elements; in a chain put this around jadam's
    part, with the part of the shardings that belongs to it.

    Nothing else changes. Use it in a jitted step that donates parameters and state; of a state
    alone that is donated, JAX would take host memory for the updates.

    Args:
        tx: any optax transformation.
        shardings: from `state_shardings(tx, ..., memory_kind="pinned_host")`.
        slice_size: the largest slice of a parameter's state, in bytes on each device; a slice has
            at least one row of the first axis. A leaf whose first axis is divided over devices
            comes as a whole, and all slices are equal: so does one with no fitting divisor.

    Returns:
        A transformation of the type of tx.

    Raises:
        TypeError, ValueError: `slice_size` is no positive integer; in an update, the state is not
            the one that the shardings are for.

    >>> import jax, jax.numpy as jnp, jadam.sharding
    >>> tx = jadam.adam(1e-3)
    >>> params = {"w": jnp.ones(8)}
    >>> host = jadam.sharding.state_shardings(tx, params, memory_kind="pinned_host")
    >>> state = jax.jit(tx.init, out_shardings=host)(params)
    >>> update = jax.jit(jadam.sharding.streamed(tx, host).update)
    >>> updates, state = update(params, state)
    >>> state[0].mu["w"].sharding.memory_kind, updates["w"].sharding.memory_kind
    ('pinned_host', 'device')
    """
    return tx._replace(update=_Streamed(tx, shardings, _validate.size("slice_size", slice_size)))


class _Streamed:
    """An update, and a step if the transformation has one, whose state lies on the host."""

    def __init__(self, tx: Any, shardings: PyTree, slice_size: int):
        self._tx = tx
        self._homes, self._structure = jax.tree.flatten(shardings)
        self._near = [home.with_memory_kind(None) for home in self._homes]
        self._slice_size = slice_size
        if isinstance(tx, FusedTransformation):
            self.step = self._step

    def __call__(self, updates: PyTree, state: Any, params: PyTree = None, **extra: Any) -> Any:
        return self._in_parts(self._tx.update, 0, updates, state, params, extra)

    def _step(self, grads: PyTree, state: Any, params: PyTree, **extra: Any) -> Any:
        return self._in_parts(self._tx.step, 2, grads, state, params, extra)

    def _in_parts(
        self, make: Any, moved: int, grads: PyTree, state: Any, params: PyTree, extra: Any
    ) -> Any:
        """`make(grads, state, params)`, whose first result may lie where its input `moved` lay."""
        if jax.tree.structure(state) != self._structure:
            expected = f"the tree of shardings, {self._structure}"
            raise ValueError(f"state: expected {expected}, got {jax.tree.structure(state)}")
        trees = (grads, state, params)
        program, results = jax.make_jaxpr(
            lambda state: make(grads, state, params, **extra), return_shape=True
        )(jax.device_put(state, self._structure.unflatten(self._near)))  # for its types, and unused
        stored = jax.tree.leaves(state)
        moves = [None] * len(jax.tree.leaves(results[0])) + [
            home if home.memory_kind != there.memory_kind else None
            for home, there in zip(self._homes, self._near, strict=True)
        ]
        run, outputs, gone = _Program(program).run, {}, []

        def fetch(wanted: list[int]) -> list[Any]:
            arrays = [stored[i] for i in wanted]
            if arrays and len(gone) >= _AHEAD:
                arrays, _ = lax.optimization_barrier((arrays, gone[-_AHEAD]))
            return jax.device_put(arrays, [self._near[i] for i in wanted])

        groups = _by_parameter(*results)
        rows = {path: self._rows(path, grads, state) for path in groups}
        rows = {path: count for path, count in rows.items() if count}
        sliced = _Sliced(make, trees, extra, rows, moved) if rows else None
        for path, group in groups.items():
            if sliced is not None and path in rows:
                outputs |= zip(group, sliced.run(path, group), strict=True)
            else:
                for place, output in zip(group, run(group, fetch), strict=True):
                    move = moves[place]
                    outputs[place] = output if move is None else jax.device_put(output, move)
            gone.append([outputs[place] for place in group if moves[place] is not None])
        return jax.tree.unflatten(
            jax.tree.structure(results), [outputs[place] for place in sorted(outputs)]
        )

    def _rows(self, path: Path | None, grads: PyTree, state: Any) -> int:
        """How many rows of the first axis are a slice of this parameter; 0 for a whole leaf."""
        if path is None or not steps_in_slices(self._tx):
            return 0
        g = dict(jax.tree_util.tree_flatten_with_path(grads)[0])[path]
        kept = jax.tree_util.tree_flatten_with_path(state)[0]
        pairs = zip(kept, self._homes, self._near, strict=True)
        far = [
            (x, home)
            for (where, x), home, there in pairs
            if home.memory_kind != there.memory_kind and owner_of(where, {path: None}) == path
        ]
        if not far or np.ndim(g) < 2:
            return 0
        count = np.shape(g)[0]
        parts = [(home.shard_shape(np.shape(x)), x.dtype.itemsize) for x, home in far]
        if any(shape[0] != count for shape, _ in parts):
            return 0
        size = sum(math.prod(shape) * itemsize for shape, itemsize in parts)
        fitting = max(1, count * self._slice_size // size)
        rows = max(d for d in range(1, count + 1) if count % d == 0 and d <= fitting)
        return rows if rows < count and rows > fitting // _LEAST else 0


class _Sliced:
    """A step whose large leaves are slices of their first axes."""

    def __init__(self, make: Any, trees: Any, extra: Any, rows: dict[Path | None, int], moved: int):
        self._rows, self._moved = rows, moved
        flat, structure = jax.tree_util.tree_flatten_with_path(trees)
        self._arrays = [x for _, x in flat]
        self._owners = [owner_of(path, rows) for path, _ in flat]
        self._tree_of = [path[0].idx for path, _ in flat]

        def step(*arrays: Any) -> Any:
            grads, state, params = structure.unflatten(arrays)
            return make(grads, state, params, **extra)

        parts = [None if owner is None else rows[owner] for owner in self._owners]
        closed, _ = on_slices(step, self._arrays, parts)
        self._consts, self._jaxpr = closed.consts, without_constants(closed)

    def run(self, path: Path | None, group: list[int]) -> list[Any]:
        """The outputs at these places, which belong to the parameter at this path."""
        rows = self._rows[path]
        # Constants, the slice's number, and the arrays, which go by their places: the others by
        # numbers below 0.
        names = [*range(-1 - len(self._consts), 0), *range(len(self._arrays))]
        wanted = [place in group for place in range(len(self._jaxpr.outvars))]
        part, used = part_of(self._jaxpr, wanted)
        inputs = [name for name, is_used in zip(names, used, strict=True) if is_used]
        step = function_of(part)
        mine = [i for i, owner in enumerate(self._owners) if owner == path]
        others = [i for i in inputs if i >= 0 and i not in mine]
        assert all(self._owners[i] is None for i in others), "a slice that needs other leaves"
        # The first result is a tree like the parameters, the others are the state's.
        source = [i for i in mine if self._tree_of[i] == self._moved]
        homes = [*source, *(i for i in mine if self._tree_of[i] == 1)]
        # An update of another dtype than its gradient's cannot take its place.
        fits = part.outvars[0].aval.dtype == self._arrays[homes[0]].dtype
        own = [*homes, *inputs] if fits else [*homes[1:], *inputs]
        stacks = {i: self._arrays[i] for i in mine if i in own}
        values = dict(zip(names, self._consts, strict=False))
        values |= {i: near(self._arrays[i]) for i in others}

        def body(carry: Any, slices: Any, x: Any) -> Any:
            given = values | slices | {-1: x[0]}
            made = step(*(given[name] for name in inputs))
            new = dict(zip(homes[not fits :], made[not fits :], strict=True))
            return carry, new, [] if fits else made[0]

        length = self._arrays[homes[0]].shape[0] // rows
        _, stacks, first = over_layers(body, None, stacks, None, length, rows=rows)
        kept = [stacks[i] for i in homes[1:]]
        if fits:
            return [stacks[homes[0]], *kept]
        return [first.reshape(self._arrays[homes[0]].shape), *kept]


def _by_parameter(updates: PyTree, state: PyTree) -> dict[Path | None, list[int]]:
    """The places of each parameter's update and state among all, then those of the rest."""
    parameters = [path for path, _ in jax.tree_util.tree_flatten_with_path(updates)[0]]
    groups: dict[Path | None, list[int]] = {path: [] for path in (*parameters, None)}
    flat, _ = jax.tree_util.tree_flatten_with_path((updates, state))
    for place, (path, _) in enumerate(flat):
        groups[owner_of(path, groups)].append(place)
    return groups


class _Program:
    """A traced function whose outputs are computed in turn, each when it is asked for."""

    def __init__(self, closed: ClosedJaxpr):
        self._jaxpr = closed.jaxpr
        self._values: dict[Any, Any] = dict(zip(self._jaxpr.constvars, closed.consts, strict=True))
        self._inputs = {v: i for i, v in enumerate(self._jaxpr.invars)}
        self._maker = {v: i for i, e in enumerate(self._jaxpr.eqns) for v in e.outvars}

    def run(self, outputs: list[int], fetch: Callable[[list[int]], list[Any]]) -> list[Any]:
        """The outputs at these places; `fetch` gives the inputs at the places that they need."""
        wanted = [self._jaxpr.outvars[i] for i in outputs]
        equations, starts = self._needed(wanted)
        new = [v for v in starts if v not in self._values]
        self._values |= dict(zip(new, fetch([self._inputs[v] for v in new]), strict=True))
        made = [v for equation in equations for v in equation.outvars]
        part = self._jaxpr.replace(constvars=[], invars=starts, outvars=made, eqns=equations)
        results = function_of(part)(*(self._values[v] for v in starts))
        self._values |= dict(zip(made, results, strict=True))
        return [v.val if is_literal(v) else self._values[v] for v in wanted]

    def _needed(self, wanted: list[Any]) -> tuple[list[Equation], list[Any]]:
        """The equations still to compute for these variables, and what they start from."""
        equations, starts, pending, seen = [], [], list(wanted), set()
        while pending:
            variable = pending.pop()
            if is_literal(variable) or variable in seen:
                continue
            seen.add(variable)
            if variable in self._values or variable in self._inputs:
                starts.append(variable)
            elif (place := self._maker[variable]) not in seen:
                seen.add(place)
                equations.append(place)
                pending.extend(self._jaxpr.eqns[place].invars)
        return [self._jaxpr.eqns[place] for place in sorted(equations)], starts
