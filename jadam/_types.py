"""Annotations that the modules share."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
from jaxtyping import Array, Float, Inexact, Int

PyTree: TypeAlias = Any
"""A tree of arrays: parameters, gradients, updates."""

DType: TypeAlias = jax.typing.DTypeLike

Count: TypeAlias = Int[Array, ""]
"""The number of updates made, int32."""

Real: TypeAlias = Float[Array, "*shape"]
"""An array of real numbers in float32 or wider: a second moment, a norm."""

Number: TypeAlias = Inexact[Array, "*shape"]
"""An array of real or complex numbers in float32 or wider: a gradient, a first moment."""

Scalar: TypeAlias = float | Float[Array, ""]
"""A hyperparameter: a number known when tracing, kept in float64, or a traced array."""

Schedule: TypeAlias = Callable[[jax.typing.ArrayLike], jax.typing.ArrayLike]
"""A function of the number of updates already made that gives a hyperparameter."""

ScalarOrSchedule: TypeAlias = Scalar | Schedule

Shape: TypeAlias = tuple[int, ...]
