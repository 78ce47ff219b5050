"""What jadam uses of JAX that JAX does not promise to keep, in one place.

A name that is gone makes the import of this module fail. Then `choice` leaves everything to XLA and
says so in `jadam.kernels()`.
"""

import enum
from collections.abc import Callable
from typing import Any

import jax
import jax.extend
from jax._src.dispatch import prim_requires_devices_during_lowering
from jax.experimental.custom_partitioning import custom_partitioning as custom_partitioning
from jax.interpreters import batching, mlir

Primitive = jax.extend.core.Primitive
_register_lowering = mlir.register_lowering
_lower_function = mlir.lower_fun
_batchers = batching.primitive_batchers

Rule = Callable[..., Any]


class Place(enum.Enum):
    """What is known of the devices where a primitive is lowered."""

    ONE_DEVICE = "the arrays are whole, or each device has its own under manual sharding"
    DIVIDED = "the arrays may be divided over devices, which are known"
    UNKNOWN = "the program is exported, or its devices are not known"


def place_of(module: Any) -> Place:
    """Where a primitive is lowered, from the context of the module."""
    context = module.axis_context
    mesh = getattr(context, "mesh", None)
    is_manual = mesh is not None and context.manual_axes == frozenset(mesh.axis_names)
    if module.lowering_parameters.for_export:
        return Place.UNKNOWN
    if is_manual or getattr(context, "num_devices", None) == 1:
        return Place.ONE_DEVICE
    known = getattr(context, "device_assignment", None) is not None
    return Place.DIVIDED if known else Place.UNKNOWN


def varying_axes(x: Any) -> frozenset[str]:
    """The mesh axes of a `jax.shard_map` along which an array differs from device to device."""
    return jax.typeof(x).manual_axis_type.varying


def new_primitive(
    name: str,
    *,
    abstract: Rule,
    batched: Rule,
    everywhere: Rule,
    on_cpu: Callable[[Place, int], Rule],
) -> jax.extend.core.Primitive:
    """A primitive with several results, lowered by tracing functions.

    Args:
        name: its name.
        abstract: `(*avals, **params) -> avals` of the results.
        batched: the rule for `jax.vmap`.
        everywhere: the function to trace on any platform.
        on_cpu: the function to trace on a CPU, by the place and the number of devices.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(abstract)
    compiled: dict[tuple[Any, ...], Rule] = {}

    def run(*operands: Any, **params: Any) -> Any:
        key = tuple(params.items())
        if key not in compiled:
            compiled[key] = jax.jit(lambda *operands: primitive.bind(*operands, **params))
        # Under `jax.disable_jit` the call below would come back here for ever.
        with jax.disable_jit(False):
            return compiled[key](*operands)

    def lower(ctx: Any, *operands: Any, **params: Any) -> Any:
        def function(*operands: Any) -> Any:
            return everywhere(*operands, **params)

        return _lower_function(function, multiple_results=True)(ctx, *operands)

    def lower_on_cpu(ctx: Any, *operands: Any, **params: Any) -> Any:
        def function(*operands: Any) -> Any:
            devices = getattr(ctx.module_context.axis_context, "num_devices", None) or 1
            return on_cpu(place_of(ctx.module_context), devices)(*operands, **params)

        return _lower_function(function, multiple_results=True)(ctx, *operands)

    primitive.def_impl(run)
    _batchers[primitive] = batched
    _register_lowering(primitive, lower)
    _register_lowering(primitive, lower_on_cpu, platform="cpu")
    # To divide a call over devices, the lowering has to know them.
    prim_requires_devices_during_lowering.add(primitive)
    return primitive
