"""What is refused, with the argument's name or the leaf's path, what was expected and what came.

Everything here looks at types, dtypes, shapes and known values only, so it runs while tracing
and costs nothing in the compiled program.
"""

import math
import numbers
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jadam._traced import is_tracer
from jadam._types import Count, PyTree, Scalar, ScalarOrSchedule

Check: TypeAlias = Callable[[str, Any], Any]
"""A hyperparameter's name and value ↦ the value, which is checked."""


def scalar(name: str, value: Any) -> Scalar:
    """`value` as a float64 Python number where it is known on the host, else as the array it is.

    Raises:
        TypeError: `value` is not a real number.
        ValueError: `value` is not a scalar.
    """
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, (jax.Array, np.ndarray, np.generic)):
        raise TypeError(f"{name}: expected a real number or a scalar array, got {value!r}")
    if value.shape:
        raise ValueError(f"{name}: expected a scalar, got an array of shape {value.shape}")
    if value.dtype.kind == "c" and _is_real(value):
        value = value.real  # optax.inject_hyperparams gives numbers the parameters' dtype
    if value.dtype.kind not in "fiu" and not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"{name}: expected a real number, got dtype {value.dtype}")
    if isinstance(value, jax.Array):
        return value if jnp.issubdtype(value.dtype, jnp.floating) else value.astype(jnp.float32)
    return float(value)


def _is_real(value: Any) -> bool:
    """Whether a complex scalar has no imaginary part; a traced one is taken at its word."""
    return is_tracer(value) or not np.any(np.imag(np.asarray(value)))


def _known(value: Scalar) -> float | None:
    """The value, or None while it is being traced or lies on devices of other processes."""
    if is_tracer(value):
        return None
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return None
    return float(value)


def in_range(
    name: str,
    value: Any,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    hint_if_narrow: str = "",
) -> Scalar:
    """A finite scalar in the range; a traced one is taken at its word.

    An array of under 32 bits that is out of range may have been rounded out: the hint says so.

    Raises:
        TypeError: `value` is not a real number.
        ValueError: `value` is not a scalar, or is out of the range.
    """
    value = scalar(name, value)
    known = _known(value)
    if known is not None and not (at_least <= known < below and known > above):
        bounds = [
            f"{text} {bound:g}"
            for text, bound in ((">=", at_least), (">", above), ("<", below))
            if math.isfinite(bound)
        ]
        dtype = f" in {value.dtype}" if isinstance(value, jax.Array) else ""
        is_narrow = isinstance(value, jax.Array) and jnp.finfo(value.dtype).bits < 32
        hint = hint_if_narrow if is_narrow else ""
        expected = f"a number {' and '.join(bounds)}" if bounds else "a finite number"
        raise ValueError(f"{name}: expected {expected}, got {known}{dtype}{hint}")
    return value


def decay_rate(name: str, value: Any) -> Scalar:
    """A decay rate in [0, 1)."""
    # optax.inject_hyperparams rounds it to the parameters' dtype: .999 in bfloat16 is 1.
    hint = "; pass hyperparam_dtype=jnp.float32 to optax.inject_hyperparams"
    return in_range(name, value, at_least=0.0, below=1.0, hint_if_narrow=hint)


def non_negative(name: str, value: Any) -> Scalar:
    """A finite number that is not negative."""
    return in_range(name, value, at_least=0.0)


def schedulable(name: str, value: Any) -> Any:
    """A schedule, which is checked when it is called, or a finite number that is not negative."""
    return value if callable(value) else non_negative(name, value)


def learning_rate(name: str, value: Any) -> Any:
    """A schedule, which is checked when it is called, or a finite number; negative ones climb."""
    return value if callable(value) else in_range(name, value)


def at_count(name: str, value: ScalarOrSchedule, count: Count) -> Scalar:
    """A hyperparameter's value after `count` updates."""
    if not callable(value):
        return value
    # optax's schedules mix integers and floats, which JAX's strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        return scalar(f"{name}(count)", value(count))


def optional(check: Check) -> Check:
    """The check of a hyperparameter that may be None."""
    return lambda name, value: None if value is None else check(name, value)


def scheduled(check: Check) -> Check:
    """The check of a hyperparameter that may be a schedule, which is checked when it is called."""
    return lambda name, value: value if callable(value) else check(name, value)


def choice(name: str, value: Any, options: tuple[str, ...]) -> str:
    """One of the named options."""
    if value not in options:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, options))}, got {value!r}")
    return value


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return bool(value)


def size(name: str, value: Any) -> int:
    """A number of elements."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        injected = is_tracer(value)
        hint = f"; name {name} in static_args of optax.inject_hyperparams" if injected else ""
        raise TypeError(f"{name}: expected a whole number, got {value!r}{hint}")
    if value < 0:
        raise ValueError(f"{name}: expected a number >= 0, got {value}")
    return int(value)


def inexact_leaves(name: str, tree: PyTree) -> None:
    """Every leaf holds real or complex numbers.

    Raises:
        TypeError: a leaf is of another dtype, or no array at all.
    """
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        where = name + jax.tree_util.keystr(path)
        try:
            dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
        except TypeError:
            raise TypeError(f"{where}: expected an array, got {type(leaf).__name__}") from None
        if dtype == jax.dtypes.float0:
            raise TypeError(
                f"{where}: expected a floating-point or complex dtype, got float0, the gradient "
                "with respect to an integer or boolean; differentiate floating-point leaves only"
            )
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"{where}: expected a floating-point or complex dtype, got {dtype} of shape "
                f"{np.shape(leaf)}; keep such leaves out with optax.masked, optax.partition or "
                "equinox.is_inexact_array"
            )


def is_function(value: Any, params: PyTree) -> bool:
    """Whether what may be a tree like the parameters, or a prefix of it, is a function instead.

    A tree may be callable, as an Equinox module is.
    """
    if not callable(value) or jax.tree_util.all_leaves([value]):
        return callable(value)
    try:
        jax.tree.structure(value).flatten_up_to(params)
    except ValueError:
        return True
    return False


def where_given(params: PyTree, grads: PyTree) -> PyTree:
    """The parameters with None where the gradients have None: what does not train.

    A tree that does not match comes back as it is, for `same_structure` to say where.
    """

    def keep(g: Any, p: Any) -> Any:
        return None if g is None else p

    try:
        return jax.tree.map(keep, grads, params, is_leaf=lambda x: x is None)
    except ValueError:
        return params


def same_nodes(name: str, tree: PyTree, reference_name: str, reference: PyTree) -> None:
    """`tree` has the nodes of `reference`.

    Raises:
        ValueError: names the first leaf that is missing or not expected.
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(tree)
    expected, expected_structure = jax.tree_util.tree_flatten_with_path(reference)
    if structure != expected_structure:
        paths = [jax.tree_util.keystr(path) for path, _ in flat]
        expected_paths = [jax.tree_util.keystr(path) for path, _ in expected]
        for path in expected_paths:
            if path not in paths:
                raise ValueError(f"{name}{path} is missing: {reference_name}{path} exists")
        for path in paths:
            if path not in expected_paths:
                raise ValueError(f"{name}{path} is not expected: no {reference_name}{path} exists")
        raise ValueError(
            f"{name}: expected the tree structure of {reference_name}, {expected_structure}, "
            f"got {structure}"
        )


def same_structure(name: str, tree: PyTree, reference_name: str, reference: PyTree) -> None:
    """`tree` has the nodes and the leaf shapes of `reference`.

    Raises:
        ValueError: names the first leaf that is missing, not expected or of another shape.
    """
    same_nodes(name, tree, reference_name, reference)
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    expected = jax.tree_util.tree_leaves_with_path(reference)
    for (path, leaf), (_, other) in zip(flat, expected, strict=True):
        if np.shape(leaf) != np.shape(other):
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)}: expected shape {np.shape(other)} of "
                f"{reference_name}{jax.tree_util.keystr(path)}, got {np.shape(leaf)}"
            )


def real_where(name: str, tree: PyTree, reference_name: str, reference: PyTree) -> None:
    """No leaf of `tree` is complex where that of `reference` is real.

    Raises:
        TypeError: names the first leaf whose imaginary part would be lost.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    for (path, leaf), other in zip(flat, jax.tree.leaves(reference), strict=True):
        if jnp.iscomplexobj(leaf) and not jnp.iscomplexobj(other):
            path = jax.tree_util.keystr(path)
            raise TypeError(
                f"{name}{path}: expected a real dtype like {reference_name}{path}'s, "
                f"{jnp.result_type(other)}, got {jnp.result_type(leaf)}"
            )
