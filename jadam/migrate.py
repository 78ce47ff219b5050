"""States from elsewhere and back: optax, torch and Keras, other storage, safetensors files.

A state says neither which member of the family made it nor with which hyperparameters: what has
to be known is an argument, and the transformation that goes on must be made with the same. What
does not fit is refused with its name; nothing is dropped, filled in or guessed.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from jadam import _codec, _math, _validate
from jadam._foreign import check_possible
from jadam._keras import from_keras as from_keras
from jadam._keras import to_keras as to_keras
from jadam._safetensors import from_safetensors as from_safetensors
from jadam._safetensors import to_safetensors as to_safetensors
from jadam._state import AdamState, AmsgradState
from jadam._torch import from_torch as from_torch
from jadam._torch import to_torch as to_torch
from jadam._types import Count, PyTree
from jadam._walk import Leaf, Maximum, adam_states, check_maximum, refuse_codes, with_moments

_keystr = jax.tree_util.keystr


# optax


def from_optax(state: PyTree, *, maximum: Maximum = None) -> PyTree:
    """A state with jadam's states in the place of optax's, every bit as it was.

    Go on with jadam's namesake of what made it. Moments keep their dtypes: bfloat16 for bfloat16
    parameters, where jadam's own have float32 (`cast_like` changes that).

    Args:
        state: the state of any chain, mask, partition or wrapper, also an abstract one.
        maximum: must be "corrected" where AMSGrad is in it, the maximum that optax keeps. Go on
            with `jadam.amsgrad(..., maximum="corrected")`.

    Raises:
        ValueError: there is no Adam of optax in it, or `maximum` is not said; a count is negative,
            or a moment is one that no gradients make beside another (a negative second, NaN in
            one alone, a first beyond a million times the root of the second).

    >>> import jax.numpy as jnp, jadam, optax
    >>> state = optax.chain(optax.clip(1.0), optax.adam(1e-3)).init(jnp.ones(3))
    >>> type(jadam.migrate.from_optax(state)[1][0]).__name__
    'AdamState'
    """
    kinds = {optax.ScaleByAdamState: AdamState, optax.ScaleByAmsgradState: AmsgradState}

    def real(where: str, v: Any, m: Any) -> Any:
        del m
        if not jnp.iscomplexobj(v):
            return v
        if isinstance(v, jax.ShapeDtypeStruct):
            return v.update(dtype=jnp.finfo(v.dtype).dtype)
        if np.any(v.imag):
            raise ValueError(f"{where}: expected second moments with no imaginary part")
        return v.real

    swapped = _swapped(state, kinds, real, maximum)
    for where, node, leaves in adam_states("state", swapped):
        if _known(node.count) and bool(jnp.any(node.count < 0)):
            raise ValueError(f"{where}.count: expected a number >= 0, got {node.count}")
        for leaf in leaves:
            if all(map(_known, leaf.moments.values())):
                check_possible({field: leaf.where(field) for field in leaf.moments}, leaf.moments)
    return swapped


def _known(x: Any) -> bool:
    """Whether an array has values here: neither abstract nor traced."""
    return not isinstance(x, (jax.ShapeDtypeStruct, jax.core.Tracer))


def to_optax(state: PyTree, *, maximum: Maximum = None) -> PyTree:
    """A state with optax's states in the place of jadam's: `from_optax` the other way.

    Args:
        state: as in `from_optax`. From `jax.eval_shape(tx.init, params)` it makes the target to
            restore optax's checkpoint to.
        maximum: must be "corrected" where AMSGrad is in it, and be that of its `jadam.amsgrad`.

    Raises:
        TypeError: moments are 8-bit codes.
        ValueError: there is no Adam of jadam in it, or `maximum` is not said.

    >>> import jax.numpy as jnp, jadam
    >>> type(jadam.migrate.to_optax(jadam.adam(1e-3).init(jnp.ones(3)))[0]).__name__
    'ScaleByAdamState'
    """
    kinds = {AdamState: optax.ScaleByAdamState, AmsgradState: optax.ScaleByAmsgradState}
    for found in adam_states("state", state):
        for leaf in found.leaves:
            refuse_codes(leaf)

    def like_first(where: str, v: Any, m: Any) -> Any:
        del where
        if not jnp.iscomplexobj(m):
            return v
        return v.update(dtype=m.dtype) if isinstance(v, jax.ShapeDtypeStruct) else v.astype(m.dtype)

    return _swapped(state, kinds, like_first, maximum)


def _swapped(
    state: PyTree,
    kinds: Mapping[type, type],
    second: Callable[[str, Any, Any], Any],
    maximum: Maximum,
) -> PyTree:
    """The tree with nodes of other kinds; `second` makes a second moment of it and the first."""
    nodes = []

    def swap(path: Any, node: Any) -> Any:
        if type(node) not in kinds:
            return node
        nodes.append(node)

        def moments(field: str) -> PyTree:
            where = f"state{_keystr(path)}.{field}"
            return jax.tree_util.tree_map_with_path(
                lambda p, v, m: second(where + _keystr(p), v, m), getattr(node, field), node.mu
            )

        return kinds[type(node)](node.count, node.mu, *map(moments, node._fields[2:]))

    swapped = jax.tree_util.tree_map_with_path(swap, state, is_leaf=lambda x: type(x) in kinds)
    if not nodes:
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"state: expected {expected} in it, found none")
    check_maximum(nodes, maximum, "corrected", "optax")
    return swapped


# Storage


def cast_like(
    state: PyTree, like: PyTree, *, b1: float = 0.9, b2: float = 0.999, adamax: bool = False
) -> PyTree:
    """A state with its moments stored as in another: float32, 16 bits or 8-bit codes.

    Each moment is rounded once, to the nearest number that its new storage has. From codes to
    float32 and back is therefore exact.

    Args:
        state: a state of any chain. Not for use inside jit.
        like: the state that the same chain with other `mu_dtype` and `nu_dtype` makes, also an
            abstract one. Only its dtypes are taken.
        b1: the decay rate of m, which codes refer to.
        b2: the decay rate of v, which codes refer to.
        adamax: whether the state is that of `jadam.adamax`, so that `nu` holds norms.

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
    b1, b2 = (float(_validate.decay_rate(name, b)) for name, b in (("b1", b1), ("b2", b2)))
    ours, theirs = adam_states("state", state), adam_states("like", like)
    kinds = [[type(found.state).__name__ for found in states] for states in (theirs, ours)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"state: expected {kinds[0]} as in like, got {kinds[1]}")

    def moments() -> Iterator[Sequence[Any]]:
        for (where, node, leaves), (like_where, like_node, wanted) in zip(
            ours, theirs, strict=True
        ):
            _validate.same_structure(f"{where}.mu", node.mu, f"{like_where}.mu", like_node.mu)
            for leaf, like_leaf in zip(leaves, wanted, strict=True):
                yield _recoded(leaf, like_leaf, node.count, b1, b2, adamax)

    return with_moments(state, moments())


def _recoded(
    leaf: Leaf, like: Leaf, count: Count, b1: float, b2: float, adamax: bool
) -> Sequence[Array]:
    stored = tuple(leaf.moments.values())
    coded, wanted = (_codec.is_coded(x.moments["mu"]) for x in (leaf, like))
    if wanted and not coded:
        _check_codable(leaf, count, b1, b2, adamax)
        return _encode(stored, count, b1, b2, adamax)
    if wanted:
        return stored
    if coded:
        stored = _decode(stored, count, b1, b2, adamax)
    fields = zip(leaf.moments, stored, like.moments.values(), strict=True)
    return [_cast(leaf.where(field), x, like.dtype) for field, x, like in fields]


def _cast(where: str, x: Array, dtype: jnp.dtype) -> Array:
    if jnp.iscomplexobj(x) and not jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"{where}: expected a real dtype as in like, {dtype}, got {x.dtype}")
    cast = x.astype(dtype)
    if bool(jnp.any(jnp.isfinite(x) & ~jnp.isfinite(cast.astype(x.dtype)))):
        raise ValueError(f"{where}: expected numbers that {dtype} has, got {jnp.max(jnp.abs(x))}")
    return cast


def _check_codable(leaf: Leaf, count: Count, b1: float, b2: float, adamax: bool) -> None:
    """Codes end where jadam's moments do: with a gradient of 2⁶³, and with m at its bound."""
    for field, x in leaf.moments.items():
        limit = 2.0 ** (63 if adamax or field == "mu" else 126)
        if bool(jnp.any(jnp.abs(x) > limit)):
            largest = jnp.nanmax(jnp.abs(x))
            raise ValueError(f"{leaf.where(field)}: expected at most {limit:.3g}, got {largest}")
    bound = float(_equations(count, b1, b2, adamax).ratio.expand(jnp.ones((), jnp.float32)))
    # NaN in either has a code. 5%: moments of 16 bits are rounded, and the codes' v is off by 1.1%.
    lost = jnp.isnan(leaf.moments["mu"]) | jnp.isnan(leaf.moments["nu"])
    check_possible(
        {field: leaf.where(field) for field in leaf.moments},
        {field: jnp.where(lost, jnp.zeros_like(x), x) for field, x in leaf.moments.items()},
        limit=1.05 * bound,
        power=1 if adamax else 2,
    )


def _equations(count: Count, b1: float, b2: float, adamax: bool) -> _math.Equations:
    """What codes refer to; its step has g² (AdaMax: g) for every second moment."""
    t = count.astype(jnp.float32)
    decays = _math.Decay.of(b1, t.dtype), _math.Decay.of(b2, t.dtype)
    ratio, power = (_math.norm_ratio, 1) if adamax else (_math.moment_ratio, 2)
    return _math.Equations(
        lambda g, m, *seconds: (g, (m, *(g**power for _ in seconds))), ratio(*decays, t), power
    )


@functools.partial(jax.jit, static_argnames=("b1", "b2", "adamax"))
def _decode(
    stored: tuple[Array, ...], count: Count, b1: float, b2: float, adamax: bool
) -> tuple[Array, ...]:
    return _codec.Codes(*stored).decode(_equations(count, b1, b2, adamax))


@functools.partial(jax.jit, static_argnames=("b1", "b2", "adamax"))
def _encode(
    stored: tuple[Array, ...], count: Count, b1: float, b2: float, adamax: bool
) -> tuple[Array, ...]:
    m, v, *maximum = (x.astype(jnp.float32) for x in stored)
    v = jnp.where(jnp.isfinite(m), v, jnp.nan)  # the code of v alone can say NaN
    empty = _codec.Codes(
        jnp.zeros(m.shape, jnp.uint16), jnp.zeros(_codec.tops_shape(m.shape), jnp.int16)
    )
    # Half a level below √v: the largest one's nearest level is its block's top.
    g = (v if adamax else jnp.sqrt(v)) * 2.0 ** (-1 / 64)
    codes = empty.encode((m, v, *maximum), g, _equations(count, b1, b2, adamax), None)
    return tuple(x for x in codes if x is not None)
