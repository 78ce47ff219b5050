"""State that lies in the host's memory and comes to the device parameter by parameter."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from jadam._traced import ClosedJaxpr, Equation, function_of, is_literal
from jadam._types import PyTree
from jadam.sharding._rules import Path, owner_of

_AHEAD = 2  # parameters whose streamed state is on the device: one computes, another one moves


def streamed(tx: Any, shardings: PyTree) -> Any:
    """The transformation with an update that brings its state from the host leaf by leaf.

    The state of a parameter comes to the device when that of the parameter before the last has
    gone back, so that two are there at a time. (A state that is moved as a whole is there as a
    whole: XLA starts all transfers first.) Nothing else changes, for any transformation. Use it
    in a jitted step that donates parameters and state; of a state alone that is donated, JAX
    would take host memory for the updates.

    Args:
        tx: any optax transformation.
        shardings: from `state_shardings(tx, ..., memory_kind="pinned_host")`.

    Returns:
        A transformation of the type of tx.

    Raises:
        ValueError: in an update, the state is not the one that the shardings are for.

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
    homes, structure = jax.tree.flatten(shardings)
    near = [home.with_memory_kind(None) for home in homes]

    def update_fn(updates: PyTree, state: Any, params: PyTree = None, **extra: Any) -> Any:
        if jax.tree.structure(state) != structure:
            expected = f"the tree of shardings, {structure}"
            raise ValueError(f"state: expected {expected}, got {jax.tree.structure(state)}")
        program, results = jax.make_jaxpr(
            lambda state: tx.update(updates, state, params, **extra), return_shape=True
        )(jax.device_put(state, structure.unflatten(near)))  # for its types, and unused
        stored = jax.tree.leaves(state)
        moves = [None] * len(jax.tree.leaves(results[0])) + [
            home if home.memory_kind != there.memory_kind else None
            for home, there in zip(homes, near, strict=True)
        ]
        run, outputs, gone = _Program(program).run, {}, []

        def fetch(wanted: list[int]) -> list[Any]:
            arrays = [stored[i] for i in wanted]
            if arrays and len(gone) >= _AHEAD:
                arrays, _ = lax.optimization_barrier((arrays, gone[-_AHEAD]))
            return jax.device_put(arrays, [near[i] for i in wanted])

        for group in _by_parameter(*results):
            for place, output in zip(group, run(group, fetch), strict=True):
                move = moves[place]
                outputs[place] = output if move is None else jax.device_put(output, move)
            gone.append([outputs[place] for place in group if moves[place] is not None])
        return jax.tree.unflatten(
            jax.tree.structure(results), [outputs[place] for place in sorted(outputs)]
        )

    return tx._replace(update=update_fn)


def _by_parameter(updates: PyTree, state: PyTree) -> list[list[int]]:
    """The places of each parameter's update and state among all, then those of the rest."""
    parameters = [path for path, _ in jax.tree_util.tree_flatten_with_path(updates)[0]]
    groups: dict[Path | None, list[int]] = {path: [] for path in (*parameters, None)}
    flat, _ = jax.tree_util.tree_flatten_with_path((updates, state))
    for place, (path, _) in enumerate(flat):
        groups[owner_of(path, groups)].append(place)
    return list(groups.values())


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
