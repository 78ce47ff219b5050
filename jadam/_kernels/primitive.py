"""The step of many leaves as one JAX primitive.

Where it is lowered, a platform's kernel takes it, or the leaves' form in XLA's operations: under
differentiation, `jax.vmap` and an export, and on a platform without a kernel.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jadam._kernels import cpu, jax_internals
from jadam._kernels.jax_internals import Place
from jadam._kernels.partitioning import partitioned
from jadam._leaf import Options, increment, leaf_step
from jadam._members import Rule
from jadam._types import Count, Number, Scalar

# More leaves in one call compile slowly, fewer cost a call each.
GROUP = 32


class Leaf(NamedTuple):
    """A leaf's operands. p is None where it is not needed."""

    g: Any
    stored: tuple[Any, ...]
    p: Any | None

    def moved(self, options: Options) -> Any:
        """The operand that becomes the first result: p, or the gradient that the update is like."""
        return self.p if options.to_params else self.g


class Plan(NamedTuple):
    """What is known of a call while tracing.

    Attributes:
        structure: of the rule, the learning rate and the weight decay.
        known: their numbers, with None where an array comes as an operand.
        moments: the number of moments of each leaf.
        options: of each leaf.
    """

    structure: Any
    known: tuple[Any, ...]
    moments: int
    options: tuple[Options, ...]

    @property
    def arrays(self) -> int:
        """How many numbers come as operands."""
        return self.known.count(None)

    def leaves(self, operands: Sequence[Any]) -> list[Leaf]:
        """The operands of each leaf: g, the stored moments and, where it is needed, p."""
        given = iter(operands)
        return [
            Leaf(
                next(given),
                tuple(next(given) for _ in range(self.moments)),
                next(given) if options.needs_params else None,
            )
            for options in self.options
        ]

    def like(self, operands: Sequence[Any]) -> list[Any]:
        """The operands whose shapes, dtypes and buffers the results have."""
        leaves = zip(self.leaves(operands), self.options, strict=True)
        return [x for leaf, options in leaves for x in (leaf.moved(options), *leaf.stored)]


def through_kernel(
    rule: Rule,
    learning_rate: Scalar,
    weight_decay: Scalar,
    count: Count,
    leaves: Sequence[tuple[Leaf, Options]],
) -> list[tuple[Number, ...]]:
    """`_leaf.leaf_step` of many leaves, each by a kernel where the platform has one."""
    numbers, structure = jax.tree.flatten((rule, learning_rate, weight_decay))
    arrays = [x for x in numbers if isinstance(x, jax.Array)]
    known = tuple(None if isinstance(x, jax.Array) else x for x in numbers)
    packed = cpu.numbers_of(rule, learning_rate, weight_decay, count)
    moments = len(rule.member.moments)
    results = []
    for first in range(0, len(leaves), GROUP):
        group = leaves[first : first + GROUP]
        plan = Plan(structure, known, moments, tuple(options for _, options in group))
        operands = [
            jnp.asarray(x)
            for leaf, options in group
            for x in (leaf.g, *leaf.stored, *([leaf.p] if options.needs_params else []))
        ]
        flat = _bind(plan, *_varying_alike(packed, count, *arrays, *operands))
        results += [tuple(flat[i : i + 1 + moments]) for i in range(0, len(flat), 1 + moments)]
    return results


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


def _in_xla(*operands: Any, plan: Plan) -> list[Number]:
    """The same step as XLA's operations."""
    _, count, *others = operands
    given = iter(others[: plan.arrays])
    numbers = [next(given) if x is None else x for x in plan.known]
    rule, learning_rate, weight_decay = jax.tree.unflatten(plan.structure, numbers)
    step = leaf_step(rule, learning_rate, weight_decay, count)
    results = []
    leaves = plan.leaves(others[plan.arrays :])
    for leaf, options in zip(leaves, plan.options, strict=True):
        results += step(leaf.g, leaf.p, options, *leaf.stored)
    return results


def _in_kernel(*operands: Any, plan: Plan) -> Any:
    """The call of the library."""
    return _call(plan, *_shared(*operands[:2]), *operands[2 + plan.arrays :])


def _in_shards(*operands: Any, plan: Plan) -> Any:
    """A call for each leaf, by each device for its shard."""
    shared = _shared(*operands[:2])
    results = []
    leaves = plan.leaves(operands[2 + plan.arrays :])
    for (g, stored, p), options in zip(leaves, plan.options, strict=True):
        params = () if p is None else (p,)
        results += _divided(plan._replace(options=(options,)), *shared, g, *stored, *params)
    return results


def _shared(packed: Array, count: Count) -> tuple[Array, ...]:
    """What the library takes beside leaves."""
    return packed, jnp.asarray(cpu.tables()), increment(count).astype(jnp.uint32)


def _call(plan: Plan, *operands: Any) -> Any:
    shared, operands = operands[:3], operands[3:]
    # A gradient is seldom needed afterwards: the update takes its place.
    like = plan.like(operands)
    place = {id(x): i for i, x in enumerate(operands, len(shared))}
    call = jax.ffi.ffi_call(
        cpu.TARGET,
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like],
        input_output_aliases={place[id(x)]: out for out, x in enumerate(like)},
    )
    return call(
        *shared,
        *operands,
        decays=np.array([options.decays for options in plan.options], np.int32),
        writes_params=any(options.to_params for options in plan.options),
    )


_divided = partitioned(_call)


def _abstract(*operands: Any, plan: Plan) -> list[Any]:
    return [x.strip_weak_type() for x in plan.like(operands[2 + plan.arrays :])]


def _batched(operands: Any, axes: Any, *, plan: Plan) -> Any:
    results = jax.vmap(functools.partial(_in_xla, plan=plan), in_axes=axes)(*operands)
    return results, (0,) * len(results)


def _form_on_cpu(place: Place) -> Callable[..., Any]:
    """The kernel, in shards where arrays are divided; XLA's form where devices are unknown."""
    forms = {Place.ONE_DEVICE: _in_kernel, Place.DIVIDED: _in_shards, Place.UNKNOWN: _in_xla}
    return forms[place]


_step_p = jax_internals.new_primitive(
    cpu.TARGET, abstract=_abstract, batched=_batched, everywhere=_in_xla, on_cpu=_form_on_cpu
)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _bind(plan: Plan, *operands: Any) -> Any:
    return _step_p.bind(*operands, plan=plan)


@_bind.defjvp
def _jvp(plan: Plan, primals: Any, tangents: Any) -> Any:
    return jax.jvp(functools.partial(_in_xla, plan=plan), primals, tangents)
