"""Moments as floating-point numbers, each in its own dtype."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jadam._math import Equations, Relation, widen
from jadam._rounding import round_dithered
from jadam._state import Moment
from jadam._types import Count, Number, Shape


@dataclass(frozen=True)
class Floats:
    """Moments as they are. Dtypes narrower than 32 bits are rounded with a dither."""

    moments: tuple[Moment, ...]
    dtypes: tuple[jnp.dtype, ...]
    has_numbers = True

    @property
    def name(self) -> str:
        """The dtypes of the moments, in order."""
        return " ".join(dtype.name for dtype in self.dtypes)

    def zeros(self, p: Any) -> tuple[Array, ...]:
        """The moments of parameter p before the first step."""
        return tuple(jnp.zeros_like(p, dtype=dtype) for dtype in self.dtypes)

    def shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """The shapes of the arrays for a parameter of this shape."""
        return (shape,) * len(self.moments)

    def wide(self, dtype: jnp.dtype) -> jnp.dtype:
        """The dtype to compute in with gradients of `dtype`."""
        return np.result_type(*(widen(x) for x in (dtype, *self.dtypes)))

    def load(
        self, stored: Sequence[Array], then: Callable[[], Relation], wide: jnp.dtype
    ) -> tuple[Number, ...]:
        """The moments in the dtype to compute in."""
        del then
        real = jnp.finfo(wide).dtype
        return tuple(
            x.astype(wide if moment.is_first else real)
            for moment, x in zip(self.moments, stored, strict=True)
        )

    def store(
        self,
        moments: Sequence[Number],
        stored: Sequence[Array],
        g: Array,
        now: Equations,
        relation: Callable[[], Relation],
        count: Count,
    ) -> tuple[Array, ...]:
        """The moments after a step, each rounded to its dtype with the dither of that step."""
        del stored, g, now, relation
        return tuple(
            _rounded(x, dtype, count, salt)
            for salt, (x, dtype) in enumerate(zip(moments, self.dtypes, strict=True))
        )

    def round(self, moments: Sequence[Number], relation: Relation) -> tuple[Array, ...]:
        """The moments, each as the nearest number of its dtype."""
        del relation
        return tuple(x.astype(dtype) for x, dtype in zip(moments, self.dtypes, strict=True))

    def range_ends(self, stored: Sequence[Array]) -> dict[str, Array]:
        """Nothing: floats have no ends that moments reach."""
        del stored
        return {}


def float_dtype(param_dtype: jnp.dtype, moment: Moment, chosen: jnp.dtype | None) -> jnp.dtype:
    """The dtype to store a moment of a parameter in: `chosen`, else the parameter's, widened.

    A complex moment keeps its complex dtype, since no narrower one exists.
    """
    wide = widen(param_dtype if moment.is_first else jnp.finfo(param_dtype).dtype)
    if chosen is None:
        return wide
    return np.result_type(wide, widen(chosen)) if wide.kind == "c" else chosen


def _rounded(x: Number, dtype: jnp.dtype, count: Count, salt: int) -> Array:
    """x in `dtype`, dithered where that has fewer than 32 bits; each salt gives another dither."""
    if jnp.finfo(dtype).bits < 32:
        return round_dithered(x, dtype, count, salt)
    return x.astype(dtype)
