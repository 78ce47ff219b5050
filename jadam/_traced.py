"""What jadam takes of JAX's account of a program while it traces it, in one place.

JAX does not promise to keep these names. They are looked up where they are used, so that one which
is gone breaks what needs it and nothing else. Those of the kernels are in `_kernels.jax_internals`.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax.core
from jax.extend import core
from jax.interpreters import partial_eval

Jaxpr: TypeAlias = Any
"""The equations of a traced function, without its constants."""

ClosedJaxpr: TypeAlias = Any
"""The same with them."""

Equation: TypeAlias = Any
"""A primitive, what it is applied to, and the variables of its results."""


def is_tracer(x: Any) -> bool:
    """Whether x stands for an array of a program that is traced, so that it has no value yet."""
    return isinstance(x, jax.core.Tracer)


def is_literal(variable: Any) -> bool:
    """Whether an operand of an equation is a number written there."""
    return isinstance(variable, core.Literal)


def function_of(jaxpr: Jaxpr, constants: Sequence[Any] = ()) -> Callable[..., list[Any]]:
    """The function that makes these equations."""
    return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, constants))


def without_constants(closed: ClosedJaxpr) -> Jaxpr:
    """The equations with the constants as their first inputs."""
    jaxpr = closed.jaxpr
    return jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars])


def part_of(jaxpr: Jaxpr, wanted: Sequence[bool]) -> tuple[Jaxpr, list[bool]]:
    """The equations for some of the results alone, and which inputs they need."""
    return partial_eval.dce_jaxpr(jaxpr, list(wanted))


def inside(equation: Equation) -> list[Jaxpr]:
    """The functions that an equation calls: the body of a loop, a branch."""
    return list(core.jaxprs_in_params(equation.params))


def in_order(x: Any) -> Any:
    """The array with its axes in their order in memory, where JAX can ask XLA for it."""
    try:
        layout = importlib.import_module("jax.experimental.layout")
        constrained, order = layout.with_layout_constraint, layout.Layout
    except (ImportError, AttributeError):
        return x
    return constrained(x, order(tuple(range(x.ndim))))


def level() -> Any:
    """Equal where nothing was traced in between: inside of a scan it is another."""
    return core.get_opaque_trace_state(convention="jadam")
