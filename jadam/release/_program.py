"""A transformation's step in parts: each knows which gradients and which state it needs."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jadam._layers import on_slices
from jadam._traced import function_of, inside, part_of, without_constants
from jadam._transform import FusedTransformation
from jadam._types import PyTree
from jadam.sharding._rules import owner_of

MIXES = (
    "a released step makes each leaf's step when its gradient arrives, so that a transformation "
    "that joins the gradients of several leaves (clip_by_global_norm, apply_if_finite) "
    "cannot be released; clip each layer by its own norm, with per_layer, or each leaf, with "
    "optax.clip_by_block_rms, and skip steps with skip_if"
)


class Slot(NamedTuple):
    """A place among the inputs of a step or among its results.

    Attributes:
        kind: "grads", "params" or "state".
        place: which leaf of that tree.
        owner: the number of the released parameter that it is a stack for, or None.
    """

    kind: str
    place: int
    owner: int | None


class Program:
    """The step of one layer: of every stack a slice, of all other leaves the whole.

    A slice keeps its first axis, of length 1: masks see as many axes as the stack has.

    Args:
        tx: the transformation.
        params, state: the trees that it is for.
        released: the numbers of the leaves of params that are stacks.

    Raises:
        ValueError: the step of a released leaf needs more than its own gradient and state.
    """

    def __init__(self, tx: Any, params: PyTree, state: PyTree, released: Sequence[int]):
        flat, self._structure = jax.tree_util.tree_flatten_with_path(params)
        self.names = [f"params{jax.tree_util.keystr(path)}" for path, _ in flat]
        numbers = {path: number for number, (path, _) in enumerate(flat)}
        kept, state_structure = jax.tree_util.tree_flatten_with_path(state)
        self._released = set(released)
        owners = [self._stack_of(x, owner_of(path, numbers), numbers, flat) for path, x in kept]
        own = [number if number in self._released else None for number in range(len(flat))]
        self.state_slots = [Slot("state", i, owner) for i, owner in enumerate(owners)]
        self.param_slots = [Slot("params", i, owner) for i, owner in enumerate(own)]
        grads = [Slot("grads", i, owner) for i, owner in enumerate(own)]
        self._inputs = [*grads, *self.param_slots, *self.state_slots]
        self._outputs = [*self.param_slots, *self.state_slots]

        def step(*arrays: Any) -> list[Any]:
            given = dict(zip(self._inputs, arrays, strict=True))
            grads_in = self._structure.unflatten([given[slot] for slot in grads])
            params_in = self._structure.unflatten([given[slot] for slot in self.param_slots])
            state_in = state_structure.unflatten([given[slot] for slot in self.state_slots])
            return jax.tree.leaves(_step(tx, grads_in, state_in, params_in))

        leaves, kept = [x for _, x in flat], [x for _, x in kept]
        rows = [None if slot.owner is None else 1 for slot in self._inputs]
        closed, slices = on_slices(step, [*leaves, *leaves, *kept], rows)
        self._check_types(closed, slices[len(leaves) :], state)
        self.consts = [jnp.asarray(x) for x in closed.consts]
        self._jaxpr = without_constants(closed)
        self._check_apart(state)

    def _stack_of(self, x: Any, path: Any, numbers: Any, flat: Any) -> int | None:
        """The released parameter along whose first axis a leaf of the state is stacked."""
        if path is None or (number := numbers[path]) not in self._released:
            return None
        length = flat[number][1].shape[0]
        return number if jnp.ndim(x) and jnp.shape(x)[0] == length else None

    def slots_of(self, numbers: Sequence[int]) -> list[Slot]:
        """Where the released parameters of these numbers, and their state, are."""
        return [slot for slot in self._outputs if slot.owner in set(numbers)]

    @property
    def other_slots(self) -> list[Slot]:
        """All parameters and state that belong to no stack."""
        return [slot for slot in self._outputs if slot.owner is None]

    def part(self, outputs: Sequence[Slot]) -> Callable[..., list[Any]]:
        """`(consts, layer, arrays by slots) -> outputs`: the equations that they need alone."""
        jaxpr, used = self._part(outputs)
        run = function_of(jaxpr)

        def make(consts: Sequence[Any], layer: Any, arrays: dict[Slot, Any]) -> list[Any]:
            names = [*consts, layer, *self._inputs]
            wanted = [name for name, is_used in zip(names, used, strict=True) if is_used]
            return run(*(arrays[x] if isinstance(x, Slot) else x for x in wanted))

        return make

    def needs(self, outputs: Sequence[Slot]) -> list[Slot]:
        """Which inputs these outputs are made of."""
        _, used = self._part(outputs)
        rows = zip(self._inputs, used[-len(self._inputs) :], strict=True)
        return [slot for slot, is_used in rows if is_used]

    def _part(self, outputs: Sequence[Slot]) -> tuple[Any, list[bool]]:
        wanted = set(outputs)
        ordered = [slot in wanted for slot in self._outputs]
        assert [s for s in self._outputs if s in wanted] == list(outputs)
        return part_of(self._jaxpr, ordered)

    def _check_types(self, closed: Any, slices: Sequence[Any], state: PyTree) -> None:
        """Refuses a step that changes the dtype or the shape of a parameter or of the state."""
        for slot, before, after in zip(self._outputs, slices, closed.out_avals, strict=True):
            if (before.shape, before.dtype) != (after.shape, after.dtype):
                raise ValueError(
                    f"tx: expected {self._where(slot, state)} to stay {before.dtype} of shape "
                    f"{before.shape} in a step, got {after.dtype} of shape {after.shape}"
                )

    def _check_apart(self, state: PyTree) -> None:
        """Refuses a step of one parameter that needs the gradient or the state of another."""
        for number in sorted(self._released):
            self._check_draws(number)
            for slot in self.needs(self.slots_of([number])):
                of_another = slot.kind != "state" or slot.owner is not None
                if of_another and slot != slot._replace(owner=number):
                    raise ValueError(
                        f"tx: the step of {self.names[number]} needs {self._where(slot, state)}; "
                        f"{MIXES}"
                    )
        for output in self.other_slots:
            for slot in self.needs([output]):
                if slot.owner is not None:
                    raise ValueError(
                        f"tx: the step of {self._where(output, state)} needs "
                        f"{self._where(slot, state)}; {MIXES}"
                    )

    def _check_draws(self, number: int) -> None:
        """Refuses random numbers: each layer would get the same, other than the whole stack."""
        slot = self.param_slots[number]
        shape = self._jaxpr.outvars[self._outputs.index(slot)].aval.shape
        jaxpr, _ = self._part(self.slots_of([number]))
        if any(e.outvars[0].aval.shape[: len(shape)] == shape for e in _draws(jaxpr)):
            raise ValueError(
                f"tx: the step of {self.names[number]} draws random numbers, which would be the "
                "same for each layer; jadam.stochastic_rounding is the one that can be released"
            )

    def _where(self, slot: Slot, state: PyTree) -> str:
        if slot.kind == "state":
            path, _ = jax.tree_util.tree_flatten_with_path(state)[0][slot.place]
            return f"state{jax.tree_util.keystr(path)}"
        name = self.names[slot.place]
        return name if slot.kind == "params" else f"the gradient of {name}"


def _draws(jaxpr: Any) -> Iterator[Any]:
    """All equations that draw random bits."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "random_bits":
            yield equation
        for inner in inside(equation):
            yield from _draws(inner)


def _step(tx: Any, grads: PyTree, state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
    if isinstance(tx, FusedTransformation):
        return tx.step(grads, state, params)
    updates, state = tx.update(grads, state, params)
    with jax.numpy_dtype_promotion("standard"):
        return optax.apply_updates(params, updates), state
