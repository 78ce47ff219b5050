"""How a moment is stored between two updates."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Inexact

from jadam._math import widen
from jadam._rounding import round_dithered
from jadam._types import Count, Leaf


def storage(param_dtype: jnp.dtype, chosen: jnp.dtype | None) -> jnp.dtype:
    """The dtype to store a moment of a parameter in: `chosen`, else the parameter's, widened.

    A complex moment keeps its complex dtype, since no narrower one exists.
    """
    wide = widen(param_dtype)
    if chosen is None:
        return wide
    return np.result_type(wide, widen(chosen)) if wide.kind == "c" else chosen


def load(stored: Inexact[Array, "*shape"], dtype: jnp.dtype) -> Leaf:
    """The stored moment in the dtype of the computation."""
    return stored.astype(dtype)


def store(x: Leaf, dtype: jnp.dtype, t: Count, salt: int) -> Inexact[Array, "*shape"]:
    """The moment x in its storage dtype, dithered where that has fewer than 32 bits."""
    if jnp.finfo(dtype).bits < 32:
        return round_dithered(x, dtype, t, salt)
    return x.astype(dtype)
