"""The step of many leaves as one JAX primitive.

Where it is lowered, a platform's kernel takes it, or the leaves' form in XLA's operations: under
differentiation, `jax.vmap` and an export, and on a platform without a kernel.
"""

import functools
import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jadam._kernels import jax_internals, native, tiles
from jadam._kernels.jax_internals import Place
from jadam._kernels.partitioning import partitioned
from jadam._leaf import Options, Stepped, increment, leaf_step
from jadam._members import Rule
from jadam._storage import BLOCK
from jadam._types import Count, Scalar

GROUP = {"cpu": 32, "gpu": 256, "tpu": 32}
"""How many leaves there are in one call. XLA:CPU compiles more of them slowly; on a GPU a call is a
launch, which takes as many."""


class Leaf(NamedTuple):
    """A leaf's operands. p is None where it is not needed."""

    g: Any
    p: Any | None
    stored: tuple[Any, ...]
    extra: tuple[Any, ...]

    def in_order(self) -> list[Any]:
        """As the library takes them."""
        return [self.g, *self.stored, *([] if self.p is None else [self.p]), *self.extra]

    def like(self, options: Options) -> list[tuple[Any, np.dtype]]:
        """For each result its dtype and the operand whose shape and buffer it has if it can."""
        weights = options.weights
        moved: Any = self.p if options.to_params else self.g
        dtype = jnp.float32 if weights is not None and not options.to_params else moved.dtype
        kept = self.extra[: 0 if weights is None else weights.kept]
        return [(moved, jnp.dtype(dtype)), *((x, x.dtype) for x in (*self.stored, *kept))]


class Plan(NamedTuple):
    """What is known of a call while tracing.

    Attributes:
        structure: of the rule, the learning rate and the weight decay.
        known: their numbers, with None where an array comes as an operand.
        moments: the number of moments of each leaf.
        options: of each leaf.
        on: the platforms whose kernels have it, of each leaf.
    """

    structure: Any
    known: tuple[Any, ...]
    moments: int
    options: tuple[Options, ...]
    on: tuple[frozenset[str], ...]

    @property
    def arrays(self) -> int:
        """How many numbers come as operands."""
        return self.known.count(None)

    def leaves(self, operands: Sequence[Any]) -> list[Leaf]:
        """The operands of each leaf."""
        given = iter(operands)

        def leaf(options: Options) -> Leaf:
            g, *stored = (next(given) for _ in range(1 + self.moments))
            p = next(given) if options.needs_params else None
            taken = 0 if options.weights is None else options.weights.taken
            return Leaf(g, p, tuple(stored), tuple(next(given) for _ in range(taken)))

        return [leaf(options) for options in self.options]

    def like(self, operands: Sequence[Any]) -> list[tuple[Any, np.dtype]]:
        """`Leaf.like` of all results."""
        leaves = zip(self.leaves(operands), self.options, strict=True)
        return [like for leaf, options in leaves for like in leaf.like(options)]

    def of(self, places: Sequence[int]) -> "Plan":
        """That of some of the leaves."""
        options, on = (tuple(x[i] for i in places) for x in (self.options, self.on))
        return self._replace(options=options, on=on)

    def stepped(self, results: Sequence[Any]) -> list[Stepped]:
        """The results of each leaf."""
        given = iter(results)

        def leaf(options: Options) -> Stepped:
            moved, *stored = (next(given) for _ in range(1 + self.moments))
            kept = 0 if options.weights is None else options.weights.kept
            return Stepped(moved, tuple(stored), tuple(next(given) for _ in range(kept)))

        return [leaf(options) for options in self.options]


def through_kernel(
    rule: Rule,
    learning_rate: Scalar,
    weight_decay: Scalar,
    count: Count,
    rows: Sequence[tuple[Any, Any, Options, Any, Any]],
    on: Sequence[frozenset[str]],
) -> list[Stepped]:
    """`_leaf.leaf_step` of rows of its arguments, each by a kernel where the platform has one.

    `on` says for each which platforms.
    """
    numbers, structure = jax.tree.flatten((rule, learning_rate, weight_decay))
    arrays = [x for x in numbers if isinstance(x, jax.Array)]
    known = tuple(None if isinstance(x, jax.Array) else x for x in numbers)
    # What the library takes; of members that it has not, no leaf is lowered to it.
    packed = (
        jnp.zeros(len(native.NAMES))
        if rule.member.coefficients is None
        else native.numbers_of(rule, learning_rate, weight_decay, count)
    )
    operands = [
        [
            jnp.asarray(x)
            for x in Leaf(g, p if options.needs_params else None, stored, extra).in_order()
        ]
        for g, p, options, stored, extra in rows
    ]
    results: dict[int, Stepped] = {}
    for places in _calls(operands):
        options = tuple(rows[i][2] for i in places)
        platforms = tuple(on[i] for i in places)
        plan = Plan(structure, known, len(rule.member.moments), options, platforms)
        flat = [x for i in places for x in operands[i]]
        stepped = plan.stepped(_bind(plan, *_varying_alike(packed, count, *arrays, *flat)))
        results |= zip(places, stepped, strict=True)
    return [results[i] for i in range(len(rows))]


def _calls(operands: Sequence[Sequence[Array]]) -> list[list[int]]:
    """Which leaves go into one call: as many as there may be, that differ between the same devices.

    Otherwise a leaf that is the same on all devices would count as different after the call, where
    another one in it is (`_varying_alike`).
    """
    alike: dict[frozenset[str], list[int]] = {}
    for i, own in enumerate(operands):
        axes = frozenset[str]().union(*map(jax_internals.varying_axes, own))
        alike.setdefault(axes, []).append(i)
    size = GROUP.get(jax.default_backend(), 32)
    return [x[i : i + size] for x in alike.values() for i in range(0, len(x), size)]


def _varying_alike(*operands: Array) -> list[Array]:
    """The operands with one type under `jax.shard_map`, which is then that of the results.

    A result differs between devices if any operand does, not only the one that it is like.
    """
    axes = [jax_internals.varying_axes(x) for x in operands]
    joined = frozenset[str]().union(*axes)
    return [
        jax.lax.pcast(x, tuple(joined - own), to="varying") if joined - own else x
        for x, own in zip(operands, axes, strict=True)
    ]


def _in_xla(*operands: Any, plan: Plan) -> list[Any]:
    """The same step as XLA's operations."""
    return _leaf_by_leaf(plan, operands)


def _in_pallas(*operands: Any, plan: Plan) -> list[Any]:
    """The same step by the kernel for TPUs, of each leaf that it has.

    Where `jax.shard_map` checks how arrays vary, it makes what Pallas does not lower: XLA's form.
    """
    if any(jax_internals.varying_axes(x) for x in operands):
        return _in_tiles(*operands, plan=plan)
    # Imported where it is in use: Pallas takes a while.
    tpu = importlib.import_module("jadam._kernels.tpu")
    return _leaf_by_leaf(plan, operands, tpu.step, lambda leaf, on: "tpu" in on)


def _in_tiles(*operands: Any, plan: Plan, devices: int = 1) -> list[Any]:
    """The same step as XLA's operations, of codes in the order of a TPU's memory."""

    def has(leaf: Leaf, on: frozenset[str]) -> bool:
        del on
        # With a residual XLA would compile each leaf for a minute.
        return not leaf.extra and tiles.suits(leaf.stored, leaf.g.shape, devices)

    return _leaf_by_leaf(plan, operands, tiles.step, has)


def _leaf_by_leaf(
    plan: Plan,
    operands: Sequence[Any],
    form: Callable[..., Stepped] | None = None,
    has: Callable[[Leaf, frozenset[str]], bool] = lambda leaf, on: False,
) -> list[Any]:
    """The step of each leaf, by a form of `leaf_step` if that has it: it takes the leaf as one."""
    numbers, leaves = _numbers_and_leaves(plan, operands)
    in_xla = leaf_step(*numbers)
    return _flat(
        form(*numbers, tuple(leaf), options)
        if form is not None and has(leaf, on)
        else in_xla(leaf.g, leaf.p, options, leaf.stored, leaf.extra)
        for leaf, options, on in zip(leaves, plan.options, plan.on, strict=True)
    )


def _numbers_and_leaves(plan: Plan, operands: Sequence[Any]) -> tuple[tuple[Any, ...], list[Leaf]]:
    """The arguments of `leaf_step`, and the leaves."""
    _, count, *others = operands
    given = iter(others[: plan.arrays])
    numbers = [next(given) if x is None else x for x in plan.known]
    rule, learning_rate, weight_decay = jax.tree.unflatten(plan.structure, numbers)
    return (rule, learning_rate, weight_decay, count), plan.leaves(others[plan.arrays :])


def _flat(results: Iterable[Stepped]) -> list[Any]:
    """The results as the primitive has them."""
    return [x for moved, stored, extra in results for x in (moved, *stored, *extra)]


def _in_kernel(*operands: Any, plan: Plan, platform: str) -> Any:
    """One call of the library, for the leaves that it has; the others in XLA's form."""
    before, leaves = operands[: 2 + plan.arrays], plan.leaves(operands[2 + plan.arrays :])
    shared = _shared(*operands[:2], shards=1)
    results: dict[int, Stepped] = {}

    def take(places: Sequence[int], form: Callable[..., Any]) -> None:
        part = plan.of(places)
        flat = form(part, *(x for i in places for x in leaves[i].in_order()))
        results.update(zip(places, part.stepped(flat), strict=True))

    if ours := [i for i, on in enumerate(plan.on) if platform in on]:
        take(ours, lambda part, *own: _call(part, *shared, *own))
    if others := [i for i in range(len(leaves)) if i not in results]:
        take(others, lambda part, *own: _in_xla(*before, *own, plan=part))
    return _flat(results[i] for i in range(len(leaves)))


def _in_shards(*operands: Any, plan: Plan, platform: str, devices: int) -> Any:
    """A call for each leaf that the library has, by each device for its shard."""
    before, shared = operands[: 2 + plan.arrays], _shared(*operands[:2], shards=devices)
    results = []
    for i, leaf in enumerate(plan.leaves(operands[len(before) :])):
        alone, weights = plan.of([i]), plan.options[i].weights
        if platform in plan.on[i] and (weights is None or weights.divides):
            results += _divided(alone, *shared, *leaf.in_order())
        else:
            results += _in_xla(*before, *leaf.in_order(), plan=alone)
    return results


def _shared(packed: Array, count: Count, *, shards: int) -> tuple[Array, ...]:
    """What the library takes beside leaves, with a number for each shard that a row may have.

    Divided as the rows are, it tells a device where its shard begins.
    """
    tables, t = native.tables().view(np.float32), increment(count).astype(jnp.uint32)
    return packed, jnp.asarray(tables), t, jnp.arange(shards, dtype=jnp.uint32)


def _call(plan: Plan, *operands: Any) -> Any:
    (*shared, shards), operands = operands[:4], operands[4:]
    row = operands[0].shape[-1] if len(plan.options) == 1 and operands[0].shape else 0
    shared = (*shared, shards[0] // np.uint32(shards.size) * np.uint32(row % BLOCK) % BLOCK)
    like = plan.like(operands)
    place = {id(x): i for i, x in enumerate(operands, len(shared))}
    call = jax.ffi.ffi_call(
        native.TARGET,
        [jax.ShapeDtypeStruct(x.shape, dtype) for x, dtype in like],
        # A gradient is seldom needed afterwards: the update takes its place.
        input_output_aliases={
            place[id(x)]: out for out, (x, dtype) in enumerate(like) if dtype == x.dtype
        },
    )
    return call(
        *shared,
        *operands,
        decays=np.array([options.decays for options in plan.options], np.int32),
        writes_params=any(options.to_params for options in plan.options),
        **native.weights_attributes([options.weights for options in plan.options]),
    )


_divided = partitioned(_call)


def _abstract(*operands: Any, plan: Plan) -> list[Any]:
    like = plan.like(operands[2 + plan.arrays :])
    return [x.strip_weak_type().update(dtype=dtype) for x, dtype in like]


def _form_of_library(platform: str, place: Place, devices: int) -> Callable[..., Any]:
    """The kernel, in shards where arrays are divided; XLA's form where devices are unknown."""
    forms = {
        Place.ONE_DEVICE: functools.partial(_in_kernel, platform=platform),
        Place.DIVIDED: functools.partial(_in_shards, platform=platform, devices=devices),
        Place.UNKNOWN: _in_xla,
    }
    return forms[place]


def _form_on_tpu(place: Place, devices: int) -> Callable[..., Any]:
    """The kernel for a whole leaf or a device's own part: it is not divided over devices."""
    forms = {
        Place.ONE_DEVICE: _in_pallas,
        Place.DIVIDED: functools.partial(_in_tiles, devices=devices),
        Place.UNKNOWN: _in_xla,
    }
    return forms[place]


_bind = jax_internals.new_primitive(
    native.TARGET,
    abstract=_abstract,
    everywhere=_in_xla,
    on={
        "cpu": functools.partial(_form_of_library, "cpu"),
        "cuda": functools.partial(_form_of_library, "gpu"),
        "tpu": _form_on_tpu,
    },
)
