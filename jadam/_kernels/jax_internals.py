"""What the kernels use of JAX that JAX does not promise to keep, in one place.

A name that is gone makes the import of this module fail. Then `choice` leaves everything to XLA and
says so in `jadam.kernels()`.
"""

import enum
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.extend
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax._src.dispatch import prim_requires_devices_during_lowering
from jax.experimental.custom_partitioning import custom_partitioning as custom_partitioning
from jax.interpreters import batching, mlir

from jadam._traced import ClosedJaxpr, is_literal

Primitive = jax.extend.core.Primitive
_register_lowering = mlir.register_lowering
_lower_function = mlir.lower_fun
_batchers = batching.primitive_batchers

Function = Callable[..., Any]


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


def shaped_like(x: Any, shape: tuple[int, ...], dtype: np.dtype) -> jax.ShapeDtypeStruct:
    """An array of another shape that varies over devices as x does."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


class Hoisted:
    """A traced function of numbers and tiles, in two parts: what depends on no tile, and the rest.

    Attributes:
        numbers: what the rest needs of the first part, which is computed when this is made.
    """

    def __init__(self, traced: ClosedJaxpr, numbers: Sequence[Any]) -> None:
        jaxpr = traced.jaxpr
        env = dict(zip(jaxpr.constvars, traced.consts, strict=True))
        env |= {x: jnp.asarray(n) for x, n in zip(jaxpr.invars, numbers, strict=False)}
        self._tiles, self._results = jaxpr.invars[len(numbers) :], jaxpr.outvars
        self._rest = []
        for eqn in jaxpr.eqns:
            is_known = all(is_literal(x) or x in env for x in eqn.invars)
            if is_known and all(x.aval.ndim < 2 for x in eqn.outvars):
                env |= _evaluated(eqn, env, {})
            else:
                self._rest.append(eqn)
        needed = [x for eqn in self._rest for x in eqn.invars if not is_literal(x) and x in env]
        self._numbers = list(dict.fromkeys(needed))
        self.numbers = [env[x] for x in self._numbers]

    @property
    def operations(self) -> int:
        """How many operations the rest has."""
        return len(self._rest)

    def __call__(
        self, numbers: Sequence[Any], tiles: Sequence[Any], instead: Mapping[str, Function]
    ) -> list[Any]:
        """The rest. `instead` has a function in the place of a primitive, by its name."""
        env = dict(zip(self._numbers, numbers, strict=True))
        env |= dict(zip(self._tiles, tiles, strict=True))
        for eqn in self._rest:
            env |= _evaluated(eqn, env, instead)
        return [x.val if is_literal(x) else env[x] for x in self._results]


def _evaluated(eqn: Any, env: Mapping[Any, Any], instead: Mapping[str, Function]) -> dict[Any, Any]:
    """The results of one operation of a traced function, by their variables."""
    values = [x.val if is_literal(x) else env[x] for x in eqn.invars]
    name = eqn.primitive.name
    if name in instead:
        results = instead[name](*values, **eqn.params)
    else:
        results = eqn.primitive.bind(*values, **eqn.params)
    if not eqn.primitive.multiple_results:
        results = [results]
    return dict(zip(eqn.outvars, results, strict=True))


def new_primitive(
    name: str,
    *,
    abstract: Function,
    everywhere: Function,
    on: Mapping[str, Callable[[Place, int], Function]],
) -> Function:
    """`bind(plan, *operands)` of a primitive with several results, lowered by tracing functions.

    Args:
        name: its name.
        abstract: `(*avals, plan) -> avals` of the results.
        everywhere: the function `(*operands, plan)` to trace on any platform, and under
            differentiation and `jax.vmap`.
        on: for a platform, the function to trace there, by the place and the number of devices.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(abstract)
    compiled: dict[tuple[Any, ...], Function] = {}

    def batched(operands: Any, axes: Any, **params: Any) -> Any:
        results = jax.vmap(functools.partial(everywhere, **params), in_axes=axes)(*operands)
        return results, (0,) * len(results)

    @functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
    def bind(plan: Any, *operands: Any) -> Any:
        return primitive.bind(*operands, plan=plan)

    @bind.defjvp
    def jvp(plan: Any, primals: Any, tangents: Any) -> Any:
        return jax.jvp(functools.partial(everywhere, plan=plan), primals, tangents)

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

    def lower_on(
        form: Callable[[Place, int], Function], ctx: Any, *operands: Any, **params: Any
    ) -> Any:
        def function(*operands: Any) -> Any:
            devices = getattr(ctx.module_context.axis_context, "num_devices", None) or 1
            return form(place_of(ctx.module_context), devices)(*operands, **params)

        return _lower_function(function, multiple_results=True)(ctx, *operands)

    primitive.def_impl(run)
    _batchers[primitive] = batched
    _register_lowering(primitive, lower)
    for platform, form in on.items():
        _register_lowering(primitive, functools.partial(lower_on, form), platform=platform)
    # To divide a call over devices, the lowering has to know them.
    prim_requires_devices_during_lowering.add(primitive)
    return bind
