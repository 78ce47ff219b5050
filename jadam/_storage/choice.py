"""What a storage is, which one a new parameter gets, and which one stored arrays are in."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jadam import _validate
from jadam._math import Equations, Relation
from jadam._state import Moment
from jadam._storage.codes import MIN_SIZE, Codes, suits
from jadam._storage.floats import Floats, float_dtype, like_parameter, why_not
from jadam._storage.lattice import LATTICES
from jadam._types import Count, Number, Shape

AS_PARAMS = "params"
"""The value of `mu_dtype` with which both moments have the parameter's dtype."""
CODES = {lattice.asked: lattice for lattice in LATTICES}
"""The lattice that `mu_dtype` and `nu_dtype` stand for together."""


@runtime_checkable
class Storage(Protocol):
    """What a storage can do with the moments of a parameter, in the order of its member."""

    @property
    def name(self) -> str:
        """What it is called where a kernel declares which storages it has."""
        ...

    @property
    def has_numbers(self) -> bool:
        """Whether the stored arrays are the moments themselves."""
        ...

    @property
    def largest_gradient(self) -> float:
        """Larger finite gradients count as this one: each moment of it is finite when stored."""
        ...

    @property
    def unfit(self) -> dict[str, str]:
        """What moments that it cannot hold would have to be instead, by their names."""
        ...

    def zeros(self, p: Any) -> tuple[Array, ...]:
        """The stored moments of parameter p before the first step, on p's devices."""
        ...

    def shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """The shapes of the stored arrays for a parameter of this shape."""
        ...

    def wide(self, dtype: jnp.dtype) -> jnp.dtype:
        """The dtype to compute a step in, with gradients of `dtype`."""
        ...

    def load(
        self, stored: Sequence[Array], then: Callable[[], Relation], wide: jnp.dtype
    ) -> tuple[Number, ...]:
        """The moments; `then` gives the relation of the step that stored them."""
        ...

    def store(
        self,
        moments: Sequence[Number],
        stored: Sequence[Array],
        g: Array,
        now: Equations,
        relation: Callable[[], Relation],
        count: Count,
    ) -> tuple[Array, ...]:
        """The moments after a step of these equations with gradient g; `stored` are those before.

        The relation is that of this step.
        """
        ...

    def round(self, moments: Sequence[Number], relation: Relation) -> tuple[Array, ...]:
        """Moments that come from elsewhere, each rounded once to the nearest that can be stored."""
        ...

    def range_ends(self, stored: Sequence[Array]) -> dict[str, Array]:
        """Which elements are at an end of what can be stored, by name; empty for floats."""
        ...


def storage_of(moments: tuple[Moment, ...], stored: Sequence[Any]) -> Storage:
    """The storage that these arrays, a parameter's moments, are in."""
    if Codes.holds(stored):
        return Codes.of(moments, stored)
    return Floats(moments, tuple(jnp.dtype(jnp.result_type(x)) for x in stored))


def checked_storage_of(
    moments: tuple[Moment, ...], stored: Sequence[Any], where: Callable[[str], str]
) -> Storage:
    """`storage_of` arrays that come from outside: all of them codes, or all numbers.

    Args:
        where: the place of a moment, by its name, in an error.

    Raises:
        TypeError: one is not as those beside it.
    """
    coded = Codes.holds(stored)
    for moment, x, codes in zip(moments, stored, Codes.dtypes(moments), strict=True):
        dtype = jnp.result_type(x)
        if not (dtype in codes if coded else jnp.issubdtype(dtype, jnp.inexact)):
            expected = " or ".join(map(str, codes)) if coded else "a floating-point dtype"
            raise TypeError(
                f"{where(moment.name)}: expected {expected} beside the other moments, got {dtype}"
            )
    return storage_of(moments, stored)


def chooser(
    moments: tuple[Moment, ...],
    mu_dtype: Any,
    nu_dtype: Any,
    min_size: Any,
) -> Callable[[Any], Storage]:
    """The function from a new parameter to its storage, for the arguments that `init` takes.

    Raises:
        TypeError: a dtype is not floating-point and stands for no codes, or has too small a range.
        ValueError: one of the two moments alone is to be coded.
    """
    # Both moments, unless nu_dtype says otherwise.
    as_params = isinstance(mu_dtype, str) and mu_dtype == AS_PARAMS
    mu = None if as_params else _dtype("mu_dtype", mu_dtype, is_first=True)
    nu = _dtype("nu_dtype", nu_dtype, is_first=False)
    lattice = CODES.get((str(mu), str(nu)))
    if lattice is None and any(_is_integer(dtype) for dtype in (mu, nu)):
        raise ValueError(
            f"mu_dtype, nu_dtype: expected both codes, {_pairs()}, or none, since m is stored "
            f"relative to the stored v; got {mu} and {nu}"
        )
    least = MIN_SIZE if min_size is None else _validate.size("min_size", min_size)

    def choose(p: Any) -> Storage:
        dtype = jnp.result_type(p)
        if lattice is not None and suits(np.shape(p), dtype, least):
            return Codes(moments, lattice)
        chosen = (None if lattice else mu if moment.is_first else nu for moment in moments)
        dtypes = (
            like_parameter(dtype, moment)
            if as_params and asked is None
            else float_dtype(dtype, moment, asked)
            for moment, asked in zip(moments, chosen, strict=True)
        )
        return Floats(moments, tuple(dtypes))

    return choose


def _dtype(name: str, value: Any, *, is_first: bool) -> np.dtype | None:
    """A real floating-point dtype, one that stands for codes, or None for the default."""
    if value is None:
        return None
    codes = [pair[0 if is_first else 1] for pair in CODES]
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if str(dtype) in codes:
        return dtype
    if is_first and dtype is not None and dtype.kind == "c":
        dtype = jnp.finfo(dtype).dtype  # as wide, and complex where the parameter is
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        came = repr(value) if dtype is None else dtype
        expected = " or ".join(map(repr, codes))
        raise TypeError(f"{name}: expected a floating-point dtype or {expected}, got {came}")
    if (reason := why_not(dtype, is_first=is_first)) is not None:
        raise TypeError(f"{name}: expected {reason}; got {dtype}")
    return jax.dtypes.canonicalize_dtype(dtype)


def _is_integer(dtype: np.dtype | None) -> bool:
    return dtype is not None and jnp.issubdtype(dtype, jnp.integer)


def _pairs() -> str:
    return " or ".join(f"{mu!r} with {nu!r}" for mu, nu in CODES)
