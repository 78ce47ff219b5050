"""A leaf's call divided over devices: each steps its own shard, without communication."""

import functools
from collections.abc import Callable
from typing import Any

from jax.sharding import NamedSharding, PartitionSpec

from jadam._kernels.jax_internals import custom_partitioning
from jadam._storage import BLOCK, uncut_lanes

# The operands are 4 that all leaves share, the last of them to be divided as rows are, then the
# gradient, the moments and, where it is needed, the parameter with what belongs to it.
_SHARED = 4


def partitioned(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call(plan, *operands)` of one leaf, by each device for its shard."""
    divided = custom_partitioning(call, static_argnums=(0,))

    def partition(plan: Any, mesh: Any, operands: Any, results: Any) -> Any:
        """A leaf lies as its m does. Blocks of codes stay whole."""
        del results
        (options,) = plan.options
        m, *others = operands[_SHARED + 1 : _SHARED + 1 + plan.moments]
        spec = [*m.sharding.spec, *[None] * (len(m.shape) - len(m.sharding.spec))]
        has_tops = any(x.shape != m.shape for x in others)
        if has_tops and m.sharding.shard_shape(m.shape)[-1] % BLOCK:
            spec[-1] = None
        like_m = NamedSharding(mesh, PartitionSpec(*spec))
        everywhere = NamedSharding(mesh, PartitionSpec())
        own = (like_m if x.shape or not m.shape else everywhere for x in operands[_SHARED:])
        along_rows = NamedSharding(mesh, PartitionSpec(*spec[-1:]))
        places = (*(everywhere,) * (_SHARED - 1), along_rows, *own)
        kept = 0 if options.weights is None else options.weights.kept
        return mesh, functools.partial(call, plan), [like_m] * (1 + plan.moments + kept), places

    def sharding_rule(plan: Any, mesh: Any, operands: Any, results: Any) -> Any:
        """The axes of a leaf in their order; a code's top lies where its block lies.

        Not where a block may be cut: tops would be divided in a way that JAX has no words for.
        """
        del results
        (options,) = plan.options
        shapes = [tuple(x.shape) for x in operands[_SHARED:]]
        whole, tops = shapes[0], shapes[1 : 1 + plan.moments]
        axes, sizes = [f"axis{i}" for i in range(len(whole))], {}
        blocks = axes
        if any(shape != whole for shape in tops):
            blocks = [*axes[:-1], "blocks"]
            # One block has no axis of its own.
            if whole[-1] % BLOCK == 0 and whole[-1] > BLOCK == uncut_lanes(whole[-1], mesh):
                axes, sizes = [*axes[:-1], "(blocks lanes)"], {"lanes": BLOCK}
        names = {whole: " ".join(axes), (): ""}
        leaf = [names.get(shape, " ".join(blocks)) for shape in shapes]
        extra = 1 + plan.moments + options.needs_params
        kept = [] if options.weights is None else leaf[extra : extra + options.weights.kept]
        results = [*leaf[: 1 + plan.moments], *kept]
        return f"numbers, tables, , shards, {', '.join(leaf)} -> {', '.join(results)}", sizes

    def places(plan: Any, mesh: Any, operands: Any, results: Any) -> Any:
        """Where the results lie: the same rule for XLA's older partitioner."""
        return partition(plan, mesh, operands, results)[2]

    divided.def_partition(partition, places, sharding_rule=sharding_rule)
    return divided
