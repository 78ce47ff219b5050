"""What torch's and Keras's states have in common: arrays under keys, each of which one leaf takes.

Such a mapping may come from anywhere. Every entry is checked, and taken or refused by its name.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Inexact, Shaped

from jadam import _math
from jadam._members import is_state
from jadam._search import Found, Parameter, placed, refuse_codes, with_moments
from jadam._state import RowsState
from jadam._types import PyTree

Key: TypeAlias = str | int
"""A parameter's name in the other library, or its number there."""

Name: TypeAlias = Callable[[str], Key | tuple[Key, Sequence[int]]]
"""A parameter's path ↦ its key in the other library, or that and the order of its axes."""

Host: TypeAlias = Float[np.ndarray, "*shape"]


class Address(NamedTuple):
    """A leaf and what the user's function says of it: its key, and which axis comes when."""

    where: str
    parameter: Parameter
    key: Key
    axes: tuple[int, ...] | None


def addresses(states: list[Found], name: Name) -> list[Address]:
    """Every leaf with its address.

    Raises:
        TypeError: the function gives something else, or a leaf holds codes.
        ValueError: the axes are not those of the leaf, or two leaves have one key.
    """
    found: dict[Key, Address] = {}
    for parameter in (parameter for state in states for parameter in state.parameters):
        refuse_codes(parameter)
        path = jax.tree_util.keystr(parameter.path, simple=True, separator=".")
        where, ndim = f"name({path!r})", len(parameter.shape)
        answer = name(path)
        key, axes = answer if isinstance(answer, tuple) and len(answer) == 2 else (answer, None)
        if not _is_key(key):
            raise TypeError(f"{where}: expected a name, a number or (name, axes), got {answer!r}")
        if axes is not None and sorted(axes) != list(range(ndim)):
            raise ValueError(f"{where}: expected an order of {ndim} axes, got {axes!r}")
        if key in found:
            raise ValueError(f"{where}: {key!r} is what {found[key].where} has")
        found[key] = Address(where, parameter, key, None if axes is None else tuple(axes))
    return list(found.values())


# Values


def _is_key(value: Any) -> bool:
    return isinstance(value, (str, int)) and not isinstance(value, bool)


def mapping(where: str, value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{where}: expected a mapping, got {type(value).__name__}")
    return value


def listed(where: str, value: Any) -> list[Any]:
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping)):
        with contextlib.suppress(TypeError):  # an array without axes
            return list(value)
    raise TypeError(f"{where}: expected a list, got {type(value).__name__}")


def keys_of(where: str, value: Any) -> list[Key]:
    found = listed(where, value)
    for i, key in enumerate(found):
        if not _is_key(key):
            raise TypeError(f"{where}[{i}]: expected a name or a number, got {key!r}")
    return found


def host_array(where: str, value: Any) -> Shaped[np.ndarray, "*shape"]:
    """The elements of any library's array."""
    try:
        try:
            return np.asarray(value)
        except TypeError:
            return np.asarray(jnp.from_dlpack(value))  # torch's bfloat16, which NumPy lacks
    except Exception as error:
        came = type(value).__name__
        raise TypeError(f"{where}: expected an array in host memory, got {came}") from error


def update_count(where: str, value: Any) -> int:
    """A number of updates."""
    array = host_array(where, value)
    if array.shape or not jnp.issubdtype(array.dtype, jnp.number):
        raise TypeError(f"{where}: expected a number of updates, got {value!r}")
    number = complex(array)
    if number.imag or not (0 <= number.real < 2**31 and number.real.is_integer()):
        raise ValueError(f"{where}: expected a whole number >= 0 and < 2**31, got {array}")
    return int(number.real)


def common(values: Mapping[str, Any]) -> Any:
    """The value that all places have.

    Raises:
        ValueError: names a place that differs from the first.
    """
    first, value = next(iter(values.items()))
    for where, other in values.items():
        if other != value:
            raise ValueError(f"{where}: expected {value} as {first} has, got {other}")
    return value


def arrived(
    where: str,
    value: Any,
    like: Any,
    axes: Sequence[int] | None = None,
) -> Host:
    """A moment in the shape and dtype of `like`: a copy, since the other optimizer may move on.

    Raises:
        TypeError: it is no array of real (complex) numbers.
        ValueError: its shape is another, or a number is out of range.
    """
    array, dtype = host_array(where, value), np.dtype(like.dtype)
    kind = jnp.complexfloating if jnp.issubdtype(dtype, jnp.complexfloating) else jnp.floating
    if not jnp.issubdtype(array.dtype, kind):
        raise TypeError(f"{where}: expected {kind.__name__} numbers, got {array.dtype}")
    if axes is not None and array.ndim == len(axes):
        array = array.transpose(axes)
    if array.shape != np.shape(like):
        order = "" if axes is None else f" in the order {axes}"
        raise ValueError(f"{where}: expected shape {np.shape(like)}, got {array.shape}{order}")
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    if np.any(np.isfinite(array) & ~np.isfinite(cast)):
        raise ValueError(f"{where}: expected numbers that {dtype} has, got {np.abs(array).max()}")
    return cast


def largest_ratio(b1: float, b2: float, t: int, power: int) -> float:
    """The largest |m|/√v (power 2) or |m|/u (power 1) of any gradients, by Cauchy and Schwarz.

    (1-b1)·√(Σ ρᵏ/(1-b2)) with ρ = b1²/b2, or AdaMax's (1-b1)·Σ (b1/b2)ᵏ, each over k < t.
    """
    with np.errstate(divide="ignore", over="ignore"):
        # Kept from 0, where the sum is t, and from infinity: 700 is what float64 has. For b1 = 0 it
        # is the first term.
        log_rho = power * np.log(np.float64(b1)) - np.log(np.float64(b2)) if b1 else -np.inf
        log_rho = np.clip(log_rho if abs(log_rho) > 1e-9 else 1e-9, -700, 700)
        total = np.expm1(t * log_rho) / np.expm1(log_rho)
        squared = (1 - b1) ** power * total / (1 - b2 if power == 2 else 1)
        return float(squared ** (1 / power))


@functools.partial(jax.jit, static_argnames="power")
def _impossible(
    m: Inexact[Array, "*shape"], v: Float[Array, "*shape"], limit: float, power: int | None
) -> Bool[Array, "*shape"]:
    wide = _math.widen(v.dtype)
    # A v from squares under the smallest number of its dtype is 0, while m is not.
    smallest = 1e3 * float(max(jnp.finfo(dtype).tiny for dtype in (v.dtype, np.float32)))
    v, size = v.astype(wide), jnp.abs(m).astype(wide)
    norm, root = v + smallest, jnp.sqrt(v + smallest)
    most = limit * {1: norm, 2: root, None: jnp.maximum(norm, root)}[power]
    return jnp.where(jnp.isnan(v), jnp.isfinite(size), jnp.isfinite(v) & ~(size <= most))


def _near(x: Any) -> Any:
    """An array of the host's memory in that of its device, which alone can compute."""
    if isinstance(x, jax.Array) and x.sharding.memory_kind == "pinned_host":
        return jax.device_put(x, jax.memory.Space.Device)
    return x


def check_possible(
    places: Mapping[str, str],
    moments: Mapping[str, Any],
    *,
    limit: float = 1e6,
    power: int | None = None,
) -> None:
    """Refuses moments that no gradients make.

    Args:
        places: each field's name in an error.
        moments: the arrays of `mu`, `nu` and, for AMSGrad, `nu_max`. Infinities and NaN pass
            where infinite and NaN gradients make them: in all of them.
        limit: the largest |m|/√v; by default more than any b1 and b2 in use allow.
        power: 1 where `nu` holds AdaMax's norms, 2 where it does not, None if that is not known.

    Raises:
        ValueError: names the moment, and the first of its numbers that is impossible.
    """
    moments = {field: _near(x) for field, x in moments.items()}
    m, v = moments["mu"], moments["nu"]

    def refuse(wrong: Any, field: str, expected: str) -> None:
        if bool(jnp.any(wrong)):
            first = tuple(int(i) for i in np.argwhere(np.asarray(wrong))[0])
            got = " beside ".join(
                str(moments[name][first]) for name in dict.fromkeys((field, "nu"))
            )
            raise ValueError(f"{places[field]}: expected {expected}, got {got}")

    refuse(v < 0, "nu", "numbers >= 0")
    if "nu_max" in moments:
        refuse(moments["nu_max"] < v, "nu_max", f"no number below that of {places['nu']}")
    root = {1: "", 2: "the root of ", None: "the root of "}[power]
    refuse(
        _impossible(m, v, limit, power),
        "mu",
        f"a first moment that gradients make, at most {limit:.3g} times {root}{places['nu']}",
    )


def departing(address: Address, field: str) -> Host:
    """A moment in the other library's order of axes: a copy, in at least float32.

    Raises:
        TypeError: it is complex, which others treat as two real numbers.
    """
    where = address.parameter.where(field)
    array = host_array(where, address.parameter.moments[field])
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{where}: expected real numbers, got {array.dtype}")
    if address.axes is not None:
        array = array.transpose(np.argsort(address.axes))
    return np.array(array, _math.widen(array.dtype), order="C")


class Table:
    """What the other state holds, by the text that names it in an error."""

    def __init__(self, entries: Mapping[str, Any]) -> None:
        self._left = dict(entries)

    def take(self, where: str) -> Any:
        if where not in self._left:
            raise ValueError(f"{where} is missing")
        return self._left.pop(where)

    def moments(
        self,
        address: Address,
        places: Mapping[str, str],
        *,
        limit: float = 1e6,
        power: int | None = None,
    ) -> list[jax.Array]:
        """A leaf's moments, each from its field's place; limit and power as in `check_possible`."""
        likes = address.parameter.moments
        found = {
            field: arrived(places[field], self.take(places[field]), like, address.axes)
            for field, like in likes.items()
        }
        check_possible(places, found, limit=limit, power=power)
        return [placed(found[field], like) for field, like in likes.items()]

    def check_all_taken(self) -> None:
        for where in self._left:
            raise ValueError(f"{where} is not expected: no leaf of like takes it")


# Whole states


def count_of(states: list[Found]) -> int:
    """The number of updates, which jadam's states in a tree have in common."""
    counts = {f"{found.where}.count": found.state.count for found in states}
    return common({where: update_count(where, count) for where, count in counts.items()})


# optax's nodes whose count is the number of updates: those of schedules.
_COUNTED = {
    "InjectStatefulHyperparamsState",
    "ScaleByScheduleState",
    "WrappedScheduleState",
}


def filled(like: PyTree, moments: list[list[jax.Array]], count: int) -> PyTree:
    """`like` with other moments, and with other counts there, in schedules and of rows."""

    def is_counted(node: Any) -> bool:
        return is_state(node) or isinstance(node, RowsState) or type(node).__name__ in _COUNTED

    def counted(node: Any) -> Any:
        if isinstance(node, RowsState):
            # All rows stand after the last update, and have nothing to make up for.
            last = placed(np.full(np.shape(node.last), count, np.int32), node.last)
            decayed = jax.tree.map(
                lambda x: placed(np.zeros(np.shape(x), x.dtype), x), node.decayed
            )
            return RowsState(at_count(node.dense), last, decayed)
        if not is_counted(node):
            return node
        fields = {name: at_count(child) for name, child in node._asdict().items()}
        return type(node)(**fields | {"count": jnp.array(count, jnp.int32)})

    def at_count(tree: PyTree) -> PyTree:
        return jax.tree.map(counted, tree, is_leaf=is_counted)

    return at_count(with_moments(like, iter(moments)))


# NAdam's product of momenta μ₁·…·μₜ is state in torch and in Keras. Here it follows from t.


def momentum_product(t: int, b1: float, decay: float) -> float:
    """μ₁·…·μₜ with μᵢ = b1·(1 - ½·0.96^(i·decay)), by the sum that `_math.dozat` has."""
    if b1 == 0 or t == 0:
        return float(t == 0)
    log_x, k = decay * math.log(0.96), np.arange(1, 49)
    terms = np.exp(k * log_x) * np.expm1(k * t * log_x) / np.expm1(k * log_x) / (k * 2.0**k)
    return math.exp(t * math.log(b1) - float(np.sum(terms)))


def check_product(where: str, value: Any, t: int, b1: float, decay: float) -> None:
    """The product is the one that follows, but for t roundings."""
    product, expected = host_array(where, value), momentum_product(t, b1, decay)
    if product.shape or not jnp.issubdtype(product.dtype, jnp.floating):
        raise TypeError(f"{where}: expected a number, got {value!r}")
    slack = (t + 16) * float(jnp.finfo(product.dtype).eps) * expected + 1e-37
    if not abs(float(product) - expected) <= slack:
        raise ValueError(
            f"{where}: expected {expected:.6g} after {t} steps with b1 = {b1} and "
            f"momentum_decay = {decay}, got {float(product):.6g}"
        )
