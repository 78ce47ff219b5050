"""The moments of a state in another storage."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jadam import _math, _validate
from jadam._members import Member
from jadam._search import Found, Parameter, check_flushed, states_in, with_moments
from jadam._storage import Storage
from jadam._types import Count, PyTree
from jadam.migrate._foreign import check_possible

Rates = tuple[tuple[str, float], ...]


def cast_like(
    state: PyTree,
    like: PyTree,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    adamax: bool = False,
    **rates: float,
) -> PyTree:
    """A state with its moments stored as in another: float32, 16 bits or codes.

    Each moment is rounded once, to the nearest number that its new storage has. From codes to
    float32 and back is therefore exact.

    Args:
        state: a state of any chain; of `jadam.rows` one that `flush` has made. Not for use inside
            jit.
        like: the state that the same chain with other `mu_dtype` and `nu_dtype` makes, also an
            abstract one. Only its dtypes are taken.
        b1: the decay rate of m, which codes refer to.
        b2: the decay rate of v, which codes refer to.
        adamax: whether the state is that of `jadam.adamax`, so that `nu` holds norms.
        **rates: other decay rates, where the member has more than two.

    Raises:
        TypeError: a complex moment has to become real.
        ValueError: the trees do not match; a moment is too large for its new storage; or, on the
            way to codes, a first moment is beyond what b1 and b2 allow beside the second.

    >>> import jax, jax.numpy as jnp, jadam
    >>> params = jnp.ones((64, 64))
    >>> state = jadam.adam(1e-3).init(params)
    >>> small = jadam.adam(1e-3, mu_dtype="int8", nu_dtype="uint8")
    >>> jadam.migrate.cast_like(state, jax.eval_shape(small.init, params))[0].mu.dtype
    dtype('uint16')
    """
    rates |= {name: float(_validate.decay_rate(name, b)) for name, b in (("b1", b1), ("b2", b2))}
    ours, theirs = (
        states_in(name, tree, adamax=adamax) for name, tree in (("state", state), ("like", like))
    )
    check_flushed(ours)
    kinds = [[type(found.state).__name__ for found in states] for states in (theirs, ours)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"state: expected {kinds[0]} as in like, got {kinds[1]}")

    def moments() -> Iterator[Sequence[Any]]:
        for mine, wanted in zip(ours, theirs, strict=True):
            trees = (found.member.stored(found.state)[0] for found in (mine, wanted))
            wheres = (f"{found.where}.{found.member.moments[0].name}" for found in (mine, wanted))
            (tree, like_tree), (where, like_where) = trees, wheres
            _validate.same_structure(where, tree, like_where, like_tree)
            for parameter, like in zip(mine.parameters, wanted.parameters, strict=True):
                yield _recoded(mine, parameter, like, tuple(rates.items()))

    return with_moments(state, moments())


def _recoded(found: Found, parameter: Parameter, like: Parameter, rates: Rates) -> Sequence[Array]:
    """A parameter's moments in the storage of `like`."""
    if parameter.storage == like.storage:
        return parameter.stored
    count = jnp.asarray(found.state.count)
    moments, rest = parameter.stored, (count, found.member, rates)
    if not parameter.storage.has_numbers:
        moments = _loaded(parameter.storage, moments, *rest)
    if not like.storage.has_numbers:
        _check_codable(parameter, moments, *rest)
        return _rounded(like.storage, moments, *rest)
    fields = zip(parameter.moments, moments, like.stored, strict=True)
    return [_cast(parameter.where(name), x, target.dtype) for name, x, target in fields]


def _cast(where: str, x: Array, dtype: jnp.dtype) -> Array:
    if jnp.iscomplexobj(x) and not jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"{where}: expected a real dtype as in like, {dtype}, got {x.dtype}")
    cast = x.astype(dtype)
    if bool(jnp.any(jnp.isfinite(x) & ~jnp.isfinite(cast.astype(x.dtype)))):
        raise ValueError(f"{where}: expected numbers that {dtype} has, got {jnp.max(jnp.abs(x))}")
    return cast


def _check_codable(
    parameter: Parameter, moments: Sequence[Array], count: Count, member: Member, rates: Rates
) -> None:
    """Codes end where jadam's moments do: with a gradient of 2⁶³, and with m at its bound."""
    for moment, x in zip(member.moments, moments, strict=True):
        limit = 2.0 ** (63 if moment.is_first else 63 * member.power)
        if bool(jnp.any(jnp.abs(x) > limit)):
            where, largest = parameter.where(moment.name), jnp.nanmax(jnp.abs(x))
            raise ValueError(f"{where}: expected at most {limit:.3g}, got {largest}")
    bound = float(_relation(member, count, rates).ratios[0].limit)
    found = dict(zip(parameter.moments, moments, strict=True))
    # NaN in either has a code. 5%: moments of 16 bits are rounded, and the codes' v is off by 1.1%.
    lost = jnp.isnan(found["mu"]) | jnp.isnan(found["nu"])
    check_possible(
        {field: parameter.where(field) for field in found},
        {field: jnp.where(lost, jnp.zeros_like(x), x) for field, x in found.items()},
        limit=1.05 * bound,
        power=member.power,
    )


@functools.partial(jax.jit, static_argnames=("storage", "member", "rates"))
def _loaded(
    storage: Storage, stored: tuple[Array, ...], count: Count, member: Member, rates: Rates
) -> tuple[Array, ...]:
    return storage.load(stored, lambda: _relation(member, count, rates), jnp.dtype(jnp.float32))


@functools.partial(jax.jit, static_argnames=("storage", "member", "rates"))
def _rounded(
    storage: Storage, moments: tuple[Array, ...], count: Count, member: Member, rates: Rates
) -> tuple[Array, ...]:
    wide = [x.astype(jnp.float32) for x in moments]
    return storage.round(wide, _relation(member, count, rates))


def _relation(member: Member, count: Count, rates: Rates) -> _math.Relation:
    return member.relation_at(_math.Time.of(count, jnp.dtype(jnp.float32)), **dict(rates))
