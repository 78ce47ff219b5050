"""Moments as floating-point numbers, each in its own dtype."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jadam._math import Equations, Ratio, Relation, largest_gradient, widen
from jadam._rounding import round_dithered, round_from_zero, round_to_zero
from jadam._state import Moment, Role
from jadam._types import Count, Number, Real, Shape


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

    @property
    def largest_gradient(self) -> float:
        """The largest whose moments have numbers in all dtypes."""
        limits = (
            float(jnp.finfo(dtype).max) if moment.is_first else largest_gradient(dtype)
            for moment, dtype in zip(self.moments, self.dtypes, strict=True)
        )
        return min(limits)

    @property
    def unfit(self) -> dict[str, str]:
        """What each moment would have to be instead, where its dtype cannot hold it."""
        reasons = {
            moment.name: why_not(dtype, is_first=moment.is_first)
            for moment, dtype in zip(self.moments, self.dtypes, strict=True)
        }
        return {name: reason for name, reason in reasons.items() if reason is not None}

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
        # optax's second moments of complex parameters are complex, without an imaginary part.
        return tuple(
            x.astype(wide) if moment.is_first else x.real.astype(real)
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
        """The moments after a step, each rounded to its dtype with the dither of that step.

        No rounding takes a first moment past its bound beside the rounded second moment, which
        would take the next update past Adam's bound on a step; and no maximum falls.
        """
        del stored, g, now
        kept = [
            _rounded(x, dtype, moment.role, count, salt)
            for salt, (x, dtype, moment) in enumerate(
                zip(moments, self.dtypes, self.moments, strict=True)
            )
        ]
        wide = np.result_type(*(x.dtype for x in moments))
        if all(jnp.finfo(dtype).bits >= jnp.finfo(wide).bits for dtype in self.dtypes):
            return tuple(kept)
        related = relation()
        roles = [moment.role for moment in self.moments]
        second = kept[roles.index(Role.SECOND)].real.astype(jnp.finfo(wide).dtype)
        root = jnp.maximum(second, jnp.asarray(related.least, second.dtype))
        root = jnp.sqrt(root) if related.power == 2 else root
        firsts = [i for i, role in enumerate(roles) if role is Role.FIRST]
        for i, ratio in zip(firsts, related.ratios, strict=True):
            kept[i] = _within(kept[i], moments[i], _most(moments[i], ratio, root, kept[i].dtype))
        return tuple(kept)

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


def like_parameter(param_dtype: jnp.dtype, moment: Moment) -> jnp.dtype:
    """The parameter's own dtype, or bfloat16 where float16 has not the squares of gradients."""
    dtype = param_dtype if moment.is_first else jnp.finfo(param_dtype).dtype
    return dtype if why_not(dtype, is_first=moment.is_first) is None else jnp.dtype(jnp.bfloat16)


def why_not(dtype: jnp.dtype, *, is_first: bool) -> str | None:
    """Why a dtype cannot hold a moment; None if it can."""
    info = jnp.finfo(dtype)
    if info.bits < 16:
        return "at least 16 bits, since 8 bits lose small moments; 'int8' and 'uint8' do not"
    if not is_first and info.maxexp < jnp.finfo(jnp.bfloat16).maxexp:
        return (
            "bfloat16 or wider, which has the squares of all gradients; of gradients under "
            f"{float(info.smallest_subnormal) ** 0.5:.1e} or over {float(info.max) ** 0.5:.0f} "
            f"{dtype} has none"
        )
    return None


def _rounded(x: Number, dtype: jnp.dtype, role: Role, count: Count, salt: int) -> Array:
    """x in `dtype`, dithered where that has fewer than 32 bits; each salt gives another dither."""
    if jnp.finfo(dtype).bits >= 32:
        return x.astype(dtype)
    if role is Role.MAXIMUM:
        return round_from_zero(x, dtype)
    return round_dithered(x, dtype, count, salt)


def _most(m: Number, ratio: Ratio, root: Real, dtype: jnp.dtype) -> Real:
    """How large a first moment may become by its rounding.

    Where no bound is known, it is the limit with one unit in the last place, or the moment's own
    size: gradients give the one, and have given the other.
    """
    bound, limit = (jnp.asarray(x, root.dtype) for x in (ratio.bound, ratio.limit))
    above = jnp.maximum(jnp.abs(m), limit * (1 + float(jnp.finfo(dtype).eps)) * root)
    return jnp.where(jnp.isfinite(bound), bound * root, above)


def _within(kept: Array, m: Number, most: Real) -> Array:
    """m as it is to be kept, and towards zero where |m| would be larger than `most`."""
    size = jnp.abs(kept.astype(m.dtype))
    if jnp.iscomplexobj(m):
        scale = jnp.where(size > most, most / jnp.where(size > most, size, 1), 1)
        return lax.complex(m.real * scale, m.imag * scale).astype(kept.dtype)
    cut = jnp.copysign(jnp.minimum(jnp.abs(m), most), m)
    narrow = jnp.finfo(kept.dtype).bits < 32
    lower = round_to_zero(cut, kept.dtype) if narrow else cut.astype(kept.dtype)
    return jnp.where(size > most, lower, kept)
