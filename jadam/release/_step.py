"""The train step: forward, then a backward pass in which every layer is stepped."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jadam import _validate
from jadam._layers import back, near, over_layers
from jadam._traced import function_of, is_tracer, without_constants
from jadam._types import PyTree
from jadam.release import _scan
from jadam.release._program import Program, Slot
from jadam.release._survey import INSTEAD, survey


def train_step(
    loss: Callable[..., Any],
    tx: Any,
    *,
    has_aux: bool = False,
    skip_if: Callable[[Any], Any] | None = None,
    per_layer: Any = None,
) -> Callable[..., tuple[PyTree, PyTree, Any]]:
    """A step in which the gradients of scanned layers are never whole.

    grads = ∂loss/∂params, updates, state = tx.update(grads, state, params), params + updates: what
    each layer of a stack that the loss gives to `jadam.release.scan` gets as soon as its own
    gradient is there, in the backward pass, in place. All other parameters are stepped after it.
    The states are those of `tx.init(params)`, and so are checkpoints.

        step = jax.jit(jadam.release.train_step(loss, tx), donate_argnums=(0, 1))
        params, state, value = step(params, state, batch)

    The loss is traced twice; it has to be a function of its arguments.

    Args:
        loss: `(params, *args, **kwargs) -> loss`, a real scalar.
        tx: any optax transformation that treats leaves one by one: jadam's with any storage and
            wrapper, masks, schedules, chains. What it does with a whole leaf, such as a norm, it
            does with each layer of a stack.
        has_aux: the loss returns `(loss, aux)`; the third result is this pair.
        skip_if: a function of the loss, decided before the backward pass. Where it is true, params
            and state stay as they are: `lambda loss: ~jnp.isfinite(loss)`.
        per_layer: an optax transformation without a state that changes the gradients of a layer,
            all those that a scan releases together, before tx gets them:
            `optax.clip_by_global_norm(1.0)` clips each layer by its own norm, where that of all
            layers is not known yet. The gradients of all other parameters are one layer more.

    Returns:
        `(params, state, *args, **kwargs) -> (params, state, loss)`, to be jitted with params and
        state donated: else they are copied first.

    Raises:
        TypeError: `loss`, `tx` or `per_layer` is of a wrong type, or the loss is no real scalar.
        ValueError: `per_layer` has a state; tx joins gradients of several leaves, such as a global
            norm does or the accumulation of gradients; or the loss releases nothing, or uses a
            released parameter again, elsewhere, or inside of another transformation.

    >>> import jax, jax.numpy as jnp, jadam
    >>> def loss(params, x):
    ...     layer = lambda x, p: (x + jnp.tanh(x @ p["w"]), None)
    ...     x, _ = jadam.release.scan(jax.checkpoint(layer), x, params["layers"])
    ...     return jnp.mean((x @ params["head"]) ** 2)
    >>> params = {"layers": {"w": jnp.zeros((12, 8, 8))}, "head": jnp.ones((8, 1))}
    >>> tx = jadam.adamw(1e-3, weight_decay=0.1)
    >>> step = jax.jit(jadam.release.train_step(loss, tx), donate_argnums=(0, 1))
    >>> params, state, value = step(params, tx.init(params), jnp.ones((4, 8)))
    >>> float(value), int(state[0].count)
    (64.0, 1)
    """
    if not callable(loss):
        raise TypeError(f"loss: expected a function of the parameters, got {loss!r}")
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(f"tx: expected an optax.GradientTransformation, got {tx!r}")
    has_aux = _validate.flag("has_aux", has_aux)
    change = _without_state(per_layer)

    def step(params: PyTree, state: PyTree, *args: Any, **kwargs: Any) -> Any:
        _validate.inexact_leaves("params", params)
        leaves, structure = jax.tree.flatten(params)
        leaves = [x if is_tracer(x) else jnp.array(x) for x in leaves]
        kept, state_structure = jax.tree.flatten(state)
        numbers = survey(loss, structure.unflatten(leaves), args, kwargs)
        if not numbers:
            raise ValueError(
                "loss: expected parameters, as they come, among the xs of a jadam.release.scan, "
                f"got none; cast or transpose them in the function that it scans, and {INSTEAD}"
            )
        program = Program(tx, structure.unflatten(leaves), state, numbers)
        arrays = {**dict(zip(program.param_slots, leaves, strict=True))}
        arrays |= dict(zip(program.state_slots, map(jnp.asarray, kept), strict=True))
        stacks = {slot: arrays[slot] for slot in program.slots_of(numbers)}
        homes = {slot: x for slot, x in arrays.items() if slot not in stacks}
        others = {slot: near(x) for slot, x in homes.items()}
        run = Released(program, leaves, stacks, others, change, always=skip_if is None)

        def forward(outside: dict[int, Any], probe: Any) -> Any:
            run.begin(probe)
            token = _scan.current.set(run)
            try:
                result = loss(
                    structure.unflatten([outside.get(i, x) for i, x in enumerate(leaves)]),
                    *args,
                    **kwargs,
                )
            finally:
                _scan.current.reset(token)
            value, aux = result if has_aux else (result, None)
            _check_value(value)
            return (value, run.arrived), aux

        slots = enumerate(program.param_slots)
        outside = {i: others[slot] for i, slot in slots if i not in numbers}
        (value, arrived), backward, aux = jax.vjp(forward, outside, jnp.zeros(()), has_aux=True)
        if run.made != set(numbers):
            raise ValueError("loss: expected the same scans each time that it is traced")
        goes = jnp.asarray(True) if skip_if is None else ~jnp.asarray(skip_if(value))
        grads, _ = backward((jnp.ones_like(value), goes.astype(arrived.dtype)))
        if run.new.keys() != stacks.keys():
            raise AssertionError("a layer's step was not made; please report this to jadam")

        grads = change(grads, outside)
        gradients = {Slot("grads", i, None): g for i, g in grads.items()}
        outputs = program.other_slots
        make = program.part(outputs)
        results = make(program.consts, jnp.uint32(0), gradients | others)
        new = dict(zip(outputs, results, strict=True))
        if skip_if is not None:
            new = {slot: jnp.where(goes, x, others[slot]) for slot, x in new.items()}
        new = {slot: back(x, homes[slot]) for slot, x in new.items()} | run.new
        params = structure.unflatten([new[slot] for slot in program.param_slots])
        state = state_structure.unflatten([new[slot] for slot in program.state_slots])
        return params, state, (value, aux) if has_aux else value

    return step


def _without_state(tx: Any) -> Callable[[PyTree, PyTree], PyTree]:
    """`(grads, params) -> grads`: a transformation that remembers nothing, or none."""
    if tx is None:
        return lambda grads, params: grads
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(f"per_layer: expected an optax.GradientTransformation, got {tx!r}")

    def change(grads: PyTree, params: PyTree) -> PyTree:
        state = tx.init(params)
        if jax.tree.leaves(state):
            got = type(state).__name__
            raise ValueError(
                f"per_layer: expected a transformation without a state, got one with {got}; what "
                "remembers something for each parameter goes into tx"
            )
        changed, _ = tx.update(grads, state, params)
        return jax.tree.map(lambda new, old: new.astype(old.dtype), changed, grads)

    return change


def _without_closure(f: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], list[Any]]:
    """`(values, *args) -> result`, and the values: whatever f closes over as an argument."""
    closed, shapes = jax.make_jaxpr(f, return_shape=True)(*args)
    run = function_of(without_constants(closed))

    def pure(values: Sequence[Any], *args: Any) -> Any:
        return jax.tree.unflatten(jax.tree.structure(shapes), run(*values, *jax.tree.leaves(args)))

    return pure, list(map(jnp.asarray, closed.consts))


def _first_of(stacks: PyTree) -> PyTree:
    """The type of each stack's first layer, on the device."""
    return jax.eval_shape(lambda tree: jax.tree.map(lambda x: near(x[0]), tree), stacks)


def _check_value(value: Any) -> None:
    if jnp.shape(value) or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        got = f"{jnp.result_type(value)} of shape {jnp.shape(value)}"
        raise TypeError(f"loss: expected a real scalar, got {got}")


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Again:
    """Takes the place of a residual that the backward pass can read where it lies."""

    place: int


def _has_gradient(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _moving(cotangents: PyTree) -> list[Any]:
    """Those of the cotangents that a loop can carry: not the empty ones of integers and keys."""
    return [x for x in jax.tree.leaves(cotangents) if x.dtype != jax.dtypes.float0]


def _with_empty(moving: Sequence[Any], primals: PyTree) -> PyTree:
    """The tree of cotangents again, for primal values of these types."""
    leaves, structure = jax.tree.flatten(primals)
    rest = iter(moving)
    return structure.unflatten(
        next(rest) if _has_gradient(x) else np.zeros(jnp.shape(x), jax.dtypes.float0)
        for x in leaves
    )


class Released:
    """The scans of a train step: their backward passes step the parameters that they scan.

    Attributes:
        new: the stacks that were stepped, by their slots.
    """

    def __init__(
        self,
        program: Program,
        leaves: Sequence[Any],
        stacks: dict[Slot, Any],
        others: dict[Slot, Any],
        change: Callable[[PyTree, PyTree], PyTree],
        *,
        always: bool,
    ):
        self._program = program
        self._leaves = leaves
        self._numbers = {
            id(leaf): slot.place
            for leaf, slot in zip(leaves, program.param_slots, strict=True)
            if slot.owner is not None
        }
        self._stacks = stacks
        self._others = others
        self._change = change
        self._always = always
        self.new: dict[Slot, Any] = {}

    def begin(self, probe: Any) -> None:
        """To be called before the loss is traced.

        The probe changes nothing. The loss is differentiated by it as well, so that each scan has
        a backward pass to run, and with it the steps.
        """
        self._probe = probe
        self.arrived = probe
        self.made: set[int] = set()

    def scan(
        self,
        f: Callable[..., Any],
        init: PyTree,
        xs: PyTree,
        *,
        length: int | None = None,
        reverse: bool = False,
        unroll: int | bool = 1,
    ) -> tuple[PyTree, PyTree]:
        """The scan, whose backward pass steps the released parameters among xs."""
        arrays, structure = jax.tree.flatten(xs)
        numbers = [self._numbers.get(id(x)) for x in arrays]
        mine = [number for number in numbers if number is not None]
        if not mine:
            return lax.scan(f, init, xs, length, reverse=reverse, unroll=unroll)
        self.made |= set(mine)
        others = [x for x, number in zip(arrays, numbers, strict=True) if number is None]

        def merged(slices: Sequence[Any], carry: PyTree, others: Sequence[Any]) -> Any:
            mine, rest = iter(slices), iter(others)
            x = [next(rest) if number is None else next(mine) for number in numbers]
            return f(carry, structure.unflatten(x))

        init = jax.tree.map(jnp.asarray, init)
        whole = ([self._leaves[number] for number in mine], others)
        example, rest = _first_of(whole)
        pure, closed = _without_closure(merged, example, init, rest)
        run = self._run(pure, mine, reverse=reverse, unroll=unroll)
        slots = self._program.slots_of(mine)
        stacks = {slot: self._stacks[slot] for slot in slots}
        fixed = (stacks, self._others, self._program.consts)
        result, token = run(self._probe, closed, init, others, fixed)
        self.arrived = self.arrived + token
        return result

    def _run(self, f: Callable[..., Any], mine: Sequence[int], **options: Any) -> Any:
        """The scan over all layers as one function, with a derivative of its own.

        It makes no gradient of a stack.
        """
        program = self._program
        params = [program.param_slots[number] for number in mine]
        slots = program.slots_of(mine)
        make = program.part(slots)
        length = self._leaves[mine[0]].shape[0]

        def forward(probe: Any, closed: Any, init: Any, others: Any, fixed: Any) -> Any:
            stacks, *_ = fixed

            def body(carry: Any, rows: Any, x: Any) -> Any:
                _, other = x
                slices = [rows[slot][0] for slot in params]
                result, pull = jax.vjp(f, closed, slices, carry, other)
                # Neither parameters nor what is the same for all layers is kept for each layer.
                again = {id(x): _Again(k) for k, x in enumerate([*slices, *closed, *other])}
                (carry, y), pull = result, jax.tree.map(lambda x: again.get(id(x), x), pull)
                return carry, {}, (y, pull)

            read = {slot: stacks[slot] for slot in params}
            carry, read, (ys, pulls) = over_layers(
                body, init, read, others, length, writes=False, **options
            )
            fixed = (stacks | read, *fixed[1:])
            return ((carry, ys), jnp.zeros_like(probe)), (pulls, closed, init, ys, others, fixed)

        def backward(residuals: Any, cotangents: Any) -> Any:
            pulls, closed, init, ys, others, (stacks, rest, consts) = residuals
            (last, of_ys), goes = cotangents
            of_y_to = _first_of(ys)

            def body(carry: Any, rows: Any, x: Any) -> Any:
                of_carry, of_closed = carry
                i, (other, pull, of_y) = x
                slices = [rows[slot][0] for slot in params]
                given = [*slices, *closed, *other]
                pull = jax.tree.map(
                    lambda x: given[x.place] if isinstance(x, _Again) else x,
                    pull,
                    is_leaf=lambda x: isinstance(x, _Again),
                )
                in_closed, grads, in_carry, in_others = pull(
                    (_with_empty(of_carry, init), _with_empty(of_y, of_y_to))
                )
                grads = self._change(grads, slices)
                gradients = {Slot("grads", n, n): g[None] for n, g in zip(mine, grads, strict=True)}
                results = make(consts, i, gradients | rows | rest)
                new = dict(zip(slots, results, strict=True))
                if not self._always:
                    new = {slot: jnp.where(goes > 0, x, rows[slot]) for slot, x in new.items()}
                of_closed = [x + y for x, y in zip(of_closed, _moving(in_closed), strict=True)]
                return (_moving(in_carry), of_closed), new, _moving(in_others)

            zeros = [jnp.zeros_like(x) for x in closed if _has_gradient(x)]
            (of_init, of_closed), new, of_others = over_layers(
                body,
                (_moving(last), zeros),
                stacks,
                (others, pulls, _moving(of_ys)),
                length,
                **options | {"reverse": not options["reverse"]},
            )
            self.new |= new
            return (
                jnp.zeros_like(goes),
                _with_empty(of_closed, closed),
                _with_empty(of_init, init),
                _with_empty(of_others, others),
                None,
            )

        run = jax.custom_vjp(lambda *args: forward(*args)[0])
        run.defvjp(forward, backward)
        return run
