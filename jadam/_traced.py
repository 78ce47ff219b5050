"""What jadam takes of JAX's account of a program while it traces it, in one place.

JAX does not promise to keep these names. They are looked up where they are used, so that all else
goes on without one that is gone: `jadam.release` and `jadam.sharding.streamed` then say which one
they need, and the kernels that take traced programs apart leave their leaves to XLA (`why_not`).
Names that all kernels need are in `_kernels.jax_internals`.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.core

NAMES = {
    "ClosedJaxpr": "jax.extend.core",
    "Literal": "jax.extend.core",
    "dce_jaxpr": "jax.interpreters.partial_eval",
    "get_opaque_trace_state": "jax.extend.core",
    "jaxpr_as_fun": "jax.extend.core",
    "jaxprs_in_params": "jax.extend.core",
}
"""Each name, with the module of JAX that has it."""

Jaxpr: TypeAlias = Any
"""The equations of a traced function, without its constants."""

ClosedJaxpr: TypeAlias = Any
"""The same with them."""

Equation: TypeAlias = Any
"""A primitive, what it is applied to, and the variables of its results."""


def why_not() -> str | None:
    """Why traced programs cannot be taken apart; None if JAX has all that this needs."""
    try:
        for name in NAMES:
            _of_jax(name)
    except RuntimeError as error:
        return str(error)
    return None


def _of_jax(name: str) -> Any:
    module = NAMES[name]
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise RuntimeError(
            f"jax {jax.__version__} lacks {module}.{name}, with which jadam takes a traced "
            "program apart"
        ) from None


def is_tracer(x: Any) -> bool:
    """Whether x stands for an array of a program that is traced, so that it has no value yet."""
    return isinstance(x, jax.core.Tracer)


def is_literal(variable: Any) -> bool:
    """Whether an operand of an equation is a number written there."""
    return isinstance(variable, _of_jax("Literal"))


def function_of(jaxpr: Jaxpr, constants: Sequence[Any] = ()) -> Callable[..., list[Any]]:
    """The function that makes these equations."""
    return _of_jax("jaxpr_as_fun")(_of_jax("ClosedJaxpr")(jaxpr, constants))


def without_constants(closed: ClosedJaxpr) -> Jaxpr:
    """The equations with the constants as their first inputs."""
    jaxpr = closed.jaxpr
    return jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars])


def part_of(jaxpr: Jaxpr, wanted: Sequence[bool]) -> tuple[Jaxpr, list[bool]]:
    """The equations for some of the results alone, and which inputs they need."""
    return _of_jax("dce_jaxpr")(jaxpr, list(wanted))


def inside(equation: Equation) -> list[Jaxpr]:
    """The functions that an equation calls: the body of a loop, a branch."""
    return list(_of_jax("jaxprs_in_params")(equation.params))


def in_order(x: Any) -> Any:
    """The array with its axes in their order in memory, where JAX can ask XLA for it."""
    try:
        layout = importlib.import_module("jax.experimental.layout")
        constrained, order = layout.with_layout_constraint, layout.Layout
    except (ImportError, AttributeError):
        return x
    return constrained(x, order(tuple(range(x.ndim))))


def current_trace() -> Any:
    """Which function is being traced: another value inside of a scan than around it."""
    return _of_jax("get_opaque_trace_state")(convention="jadam")
