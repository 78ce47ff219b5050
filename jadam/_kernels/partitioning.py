"""A leaf's call divided over devices: each steps its own shard, without communication."""

import functools
from collections.abc import Callable
from typing import Any

from jax.sharding import NamedSharding, PartitionSpec

from jadam._kernels.jax_internals import custom_partitioning
from jadam._storage import BLOCK

# The operands are 3 that all leaves share, the gradient, the moments and, where it is needed, the
# parameter.
_SHARED = 3


def partitioned(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call(plan, *operands)` of one leaf, by each device for its shard."""
    divided = custom_partitioning(call, static_argnums=(0,))

    def partition(plan: Any, mesh: Any, operands: Any, results: Any) -> Any:
        """A leaf lies as its m does. Blocks stay whole where lanes or tops depend on them."""
        del results
        m, *others = operands[_SHARED + 1 : _SHARED + 1 + plan.moments]
        spec = [*m.sharding.spec, *[None] * (len(m.shape) - len(m.sharding.spec))]
        is_flat = all(x.dtype == "float32" for x in (m, *others))
        if m.shape and not is_flat and m.sharding.shard_shape(m.shape)[-1] % BLOCK:
            spec[-1] = None
        like_m = NamedSharding(mesh, PartitionSpec(*spec))
        everywhere = NamedSharding(mesh, PartitionSpec())
        places = (everywhere,) * _SHARED + (like_m,) * (len(operands) - _SHARED)
        return mesh, functools.partial(call, plan), [like_m] * (1 + plan.moments), places

    def sharding_rule(plan: Any, mesh: Any, operands: Any, results: Any) -> Any:
        """The axes of a leaf in their order; a code's top lies where its block lies."""
        del mesh, results
        m = tuple(operands[_SHARED + 1].shape)
        axes, sizes = [f"axis{i}" for i in range(len(m))], {}
        shapes = [tuple(x.shape) for x in operands[_SHARED:]]
        blocks = axes
        if any(shape != m for shape in shapes) and m[-1] % BLOCK == 0:
            axes, blocks = [*axes[:-1], "(blocks lanes)"], [*axes[:-1], "blocks"]
            sizes = {"lanes": BLOCK}
        elif any(shape != m for shape in shapes):
            blocks = [*axes[:-1], "blocks"]
        leaf = [" ".join(axes if shape == m else blocks) for shape in shapes]
        results = leaf[: 1 + plan.moments]
        return f"numbers, tables, , {', '.join(leaf)} -> {', '.join(results)}", sizes

    def places(plan: Any, mesh: Any, operands: Any, results: Any) -> Any:
        """Where the results lie: the same rule for XLA's older partitioner."""
        return partition(plan, mesh, operands, results)[2]

    divided.def_partition(partition, places, sharding_rule=sharding_rule)
    return divided
