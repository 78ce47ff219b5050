"""Parameters in 16 bits that still learn, with any optax transformation.

A 16-bit parameter that moves by less than half a unit in its last place rounds back to itself.
Either the state keeps what the rounding took (`compensated_weights`), or the rounding is random
and right in the mean (`stochastic_rounding`).

Both emit float32 updates that `optax.apply_updates` turns into the wanted 16-bit numbers. The
inner transformation runs as if parameters and gradients were float32.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float32, UInt32

from jadam import _math, _validate
from jadam._callers import check_callers
from jadam._kernels.choice import left_to_xla
from jadam._masters import Compensated, Stochastic, Weights, join
from jadam._traced import is_tracer
from jadam._transform import FusedTransformation, FusedUpdate, is_local, steps_in_slices
from jadam._types import DType, PyTree
from jadam._update import Advanced


class CompensatedWeightsState(NamedTuple):
    """What `compensated_weights` remembers.

    Attributes:
        residual: for each bfloat16 parameter an integer array of its shape, the master weight
            minus the parameter; None for each other parameter.
        dither: the number of 8-bit roundings made, uint32, wraps; None with 16-bit residuals.
        inner_state: the inner transformation's state, made for float32 parameters.
    """

    residual: PyTree
    dither: UInt32[Array, ""] | None
    inner_state: Any


class StochasticRoundingState(NamedTuple):
    """What `stochastic_rounding` remembers.

    Attributes:
        key: the threefry key of the next step, as uint32 so that every checkpoint library,
            `optax.MultiSteps` and `optax.tree.cast` take it for the plain array that it is.
        inner_state: the inner transformation's state, made for float32 parameters.
    """

    key: UInt32[Array, "2"]
    inner_state: Any


# Trees


def _is_narrow(x: Any) -> bool:
    return jnp.finfo(jnp.result_type(x)).bits < 32


def _narrow_leaves(params: PyTree, supported: tuple[DType, ...], by: str) -> None:
    """Every parameter is of a supported dtype of 16 bits, or of more bits, which is let through."""
    _validate.inexact_leaves("params", params)
    names = " or ".join(jnp.dtype(dtype).name for dtype in supported)
    for path, p in jax.tree_util.tree_flatten_with_path(params)[0]:
        if _is_narrow(p) and jnp.result_type(p) not in supported:
            where = f"params{jax.tree_util.keystr(path)}"
            raise TypeError(
                f"{where}: {by} expects {names}, or float32 or wider, got {jnp.result_type(p)}"
            )


def _checked(inner: Any) -> optax.GradientTransformationExtraArgs:
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(f"inner: expected an optax.GradientTransformation, got {inner!r}")
    return optax.with_extra_args_support(inner)


def _check_update(grads: PyTree, params: PyTree, by: str, to_params: bool) -> None:
    if params is None:
        raise ValueError(f"params: expected the parameters, which {by} needs; got None")
    _validate.inexact_leaves("grads", grads)
    _validate.same_structure("grads", grads, "params", params)
    _validate.real_where("grads", grads, "params", params)
    pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(params), strict=True)
    narrow = [_is_narrow(g) for g, p in pairs if _is_narrow(p)]
    if narrow and not to_params:
        check_callers(by, changes_dtypes=any(narrow))


_HOW_TO_APPLY = (
    "updates are float32: apply them with optax.apply_updates, which converts back as "
    "eqx.apply_updates does not, or make tx.step"
)


def _check_residuals(params: PyTree, residual: PyTree) -> None:
    """The residuals were made for these parameters, their shapes and dtypes."""

    def flat(tree: PyTree) -> tuple[list[Any], PyTree]:
        found = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)[0]
        nodes = jax.tree.map(lambda _: 0, tree, is_leaf=lambda x: x is None)
        return found, nodes

    (leaves, nodes), (kept, kept_nodes) = flat(params), flat(residual)
    _validate.same_structure("params", nodes, "state.residual", kept_nodes)
    for (path, p), (_, r) in zip(leaves, kept, strict=True):
        if p is None and r is None:
            continue
        where = jax.tree_util.keystr(path)
        if p is None or (r is not None) != _is_narrow(p):
            expected = "float32 or wider" if r is None else "bfloat16"
            got = None if p is None else jnp.result_type(p)
            raise TypeError(
                f"params{where}: expected {expected} as at init, got {got}; {_HOW_TO_APPLY}"
            )
        if r is not None and np.shape(p) != np.shape(r):
            raise ValueError(
                f"params{where}: expected shape {np.shape(r)} of state.residual{where}, got "
                f"{np.shape(p)}"
            )


def _widened(tree: PyTree) -> PyTree:
    """Each array of less than 32 bits in float32, the others as they are."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32) if _is_narrow(x) else x, tree)


def _inner_state(inner: optax.GradientTransformationExtraArgs, params: PyTree) -> Any:
    """The inner transformation's state for parameters in float32.

    Of the family's nothing is read but shapes, dtypes and where leaves lie, so that no copy of the
    parameters has to be made, which without `jax.jit` would be there in memory for a moment.
    """

    def wide(p: Any) -> Any:
        if not _is_narrow(p) or is_tracer(p):
            return p
        place = p.sharding if getattr(p, "committed", False) else None
        return jax.ShapeDtypeStruct(np.shape(p), jnp.float32, sharding=place)

    return inner.init(_widened(jax.tree.map(wide, params) if is_local(inner) else params))


Lying = tuple[Weights, tuple[Array, ...]] | None
"""How a parameter lies, and what belongs to it; None where it is its own weight."""


def _wrapped(
    inner: optax.GradientTransformationExtraArgs,
    lying: Sequence[Lying],
    grads: PyTree,
    inner_state: Any,
    params: PyTree,
    to_params: bool,
    extra_args: dict[str, Any],
) -> Advanced:
    """The inner transformation's step of the weights that the parameters stand for, by a wrapper.

    A transformation of jadam's makes it in one pass; around any other one it is made here.
    """
    if isinstance(inner.update, FusedUpdate):
        return inner.update.move(grads, inner_state, params, to_params=to_params, weights=lying)
    leaves, structure = jax.tree.flatten(params)
    pairs = list(zip(map(jnp.asarray, leaves), lying, strict=True))
    masters = [p if kind is None else kind[0].load(p, kind[1]) for p, kind in pairs]
    with left_to_xla():
        updates, inner_state = inner.update(
            _widened(grads), inner_state, structure.unflatten(masters), **extra_args
        )
    steps = structure.flatten_up_to(updates)
    moved = [
        (step, ()) if kind is None else kind[0].store(_moved(master, step), p, kind[1])
        for (p, kind), master, step in zip(pairs, masters, steps, strict=True)
    ]
    updates = structure.unflatten([update for update, _ in moved])
    first = optax.apply_updates(params, updates) if to_params else updates
    return Advanced(first, inner_state, [extra for _, extra in moved])


def _moved(master: Float32[Array, "*shape"], update: Any) -> Float32[Array, "*shape"]:
    """master + update, as `optax.apply_updates` adds them to a float32 parameter."""
    update = jnp.asarray(update)
    dtype = np.promote_types(master.dtype, _math.widen(update.dtype))
    return (master.astype(dtype) + update.astype(dtype)).astype(master.dtype)


def compensated_weights(
    inner: optax.GradientTransformation, *, residual_dtype: DType = "int8"
) -> FusedTransformation:
    """Trains bfloat16 parameters as if they had 24 or 32 bits: the state keeps the missing ones.

    master = parameter + residual,  master += inner's update,  parameter = master in bfloat16

    The scheme of FlashOptim (arXiv 2602.23349), made exact: the residual counts float32 numbers
    from the parameter, so that a bfloat16 and an int16 are one float32 number and training is
    float32 training, bit for bit. An int8 keeps every 256th of them and is dithered, so that
    updates far below its resolution (2⁻¹⁵ of the weight) still add up.

    Parameters of 32 bits and more and complex ones are let through to the inner transformation.
    Apply the updates with `optax.apply_updates`, in the same jit, and nothing in between: in a
    chain this wraps all or comes last; where it does not, a warning says so. What refuses float32
    updates for bfloat16 gradients (`optax.apply_if_finite`, `optax.conditionally_mask`) goes
    inside. Under strict dtype promotion, which `optax.apply_updates` does not work under, add
    `p.astype(u.dtype) + u` and convert back.

    Args:
        inner: any transformation. It sees float32 parameters, gradients of fewer bits in float32,
            and all extra arguments.
        residual_dtype: int8 for 24-bit weights, 3 bytes with the parameter; int16 for 32 bits, 4.

    Raises:
        TypeError: a parameter is of another 16-bit or narrower dtype, or not of the one at init;
            `optax.apply_if_finite` and the like are outside.
        ValueError: `params` is missing in an update, or trees do not match.

    >>> import jax.numpy as jnp, jadam
    >>> tx = jadam.compensated_weights(jadam.adamw(1e-4))
    >>> params = {"w": jnp.ones(3, jnp.bfloat16)}
    >>> state = tx.init(params)
    >>> for _ in range(10):  # too small for bfloat16: there is nothing to apply yet
    ...     updates, state = tx.update({"w": jnp.ones(3, jnp.bfloat16)}, state, params)
    >>> updates["w"].tolist(), state.residual["w"].dtype
    ([-0.0, -0.0, -0.0], dtype('int8'))
    >>> [round(w, 3) for w in jadam.master_weights(params, state)["w"].tolist()]
    [0.999, 0.999, 0.999]
    """
    dtype = jnp.dtype(residual_dtype)
    if dtype not in (jnp.int8, jnp.int16):
        raise ValueError(f"residual_dtype: expected int8 or int16, got {residual_dtype!r}")
    dithered = dtype == jnp.int8
    transformation = _checked(inner)

    def init_fn(params: PyTree) -> Any:
        _narrow_leaves(params, (jnp.bfloat16,), "compensated_weights")
        return CompensatedWeightsState(
            jax.tree.map(lambda p: jnp.zeros_like(p, dtype) if _is_narrow(p) else None, params),
            jnp.zeros((), jnp.uint32) if dithered else None,
            _inner_state(transformation, params),
        )

    def move(
        grads: PyTree, state: Any, params: PyTree, *, to_params: bool, extra_args: Any
    ) -> Advanced:
        params = _validate.where_given(params, grads)
        _check_update(grads, params, "compensated_weights", to_params)
        _narrow_leaves(params, (jnp.bfloat16,), "compensated_weights")
        residual, dither, inner_state = state
        _check_residuals(params, residual)
        structure = jax.tree.structure(params)
        count = () if dither is None else (dither,)
        lying = [
            None if r is None else (Compensated(np.dtype(r.dtype), place), (r, *count))
            for place, r in enumerate(structure.flatten_up_to(residual))
        ]
        moved, inner_state, kept = _wrapped(
            transformation, lying, grads, inner_state, params, to_params, extra_args
        )
        residual = structure.unflatten([x[0] if x else None for x in kept])
        following = None if dither is None else dither + np.uint32(1)
        return Advanced(moved, CompensatedWeightsState(residual, following, inner_state), [])

    made = FusedUpdate(move, is_local=is_local(inner), in_slices=steps_in_slices(inner))
    return FusedTransformation(init_fn, made)


def _joined(params: PyTree, residual: PyTree) -> PyTree:
    _check_residuals(params, residual)
    leaves, structure = jax.tree.flatten(params)
    residuals = structure.flatten_up_to(residual)
    return structure.unflatten(
        p if r is None else join(jnp.asarray(p), r) for p, r in zip(leaves, residuals, strict=True)
    )


def master_weights(params: PyTree, state: Any) -> PyTree:
    """The parameters with their residuals: what `compensated_weights` trains, to save or evaluate.

    Args:
        params: the parameters that the state belongs to.
        state: a state with one `CompensatedWeightsState` in it.

    Returns:
        The tree with float32 in the place of bfloat16.

    Raises:
        TypeError: a parameter is not of the dtype at init.
        ValueError: the state has none of them or several, or belongs to other parameters.

    >>> import jax.numpy as jnp, jadam, optax
    >>> tx = jadam.compensated_weights(optax.sgd(2.0**-12), residual_dtype="int16")
    >>> params = jnp.ones((), jnp.bfloat16)
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> float(params + updates.astype(params.dtype)), float(jadam.master_weights(params, state))
    (1.0, 0.999755859375)
    """

    def is_ours(node: Any) -> bool:
        return isinstance(node, CompensatedWeightsState)

    found = [node for node in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(node)]
    if len(found) != 1:
        raise ValueError(
            f"state: expected one CompensatedWeightsState in it, found {len(found)} in "
            f"{type(state).__name__}"
        )
    return _joined(params, found[0].residual)


def stochastic_rounding(
    inner: optax.GradientTransformation, key: int | jax.Array = 0
) -> FusedTransformation:
    """Trains bfloat16 or float16 parameters without extra memory: each step is rounded randomly.

    parameter + inner's update goes to one of its two neighbours, to the upper one as often as it
    lies above the lower: the mean is right, the spread is that of rounding at each step. Where
    that shows, use `compensated_weights`.

    The random numbers follow from the key, the step, the leaf's place and the element's: equal on
    every run and under any sharding. Under `jax.vmap` give each member its own key, in the state.
    The rest is as in `compensated_weights`.

    Args:
        inner: any transformation.
        key: a seed, or a key of `jax.random`.

    Raises:
        TypeError: a parameter is of another narrow dtype, or has 32 bits and had 16 at init; `key`
            is no key; `optax.apply_if_finite` and the like are outside.
        ValueError: `params` is missing in an update, or trees do not match.

    >>> import jax.numpy as jnp, jadam, optax
    >>> tx = jadam.stochastic_rounding(optax.sgd(2.0**-10))
    >>> params = jnp.ones(10_000, jnp.bfloat16)
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> sorted(set(updates.tolist())), round(float(updates.mean()), 3)
    ([-0.00390625, -0.0], -0.001)
    """
    transformation = _checked(inner)
    _check_key(key)
    supported = (jnp.bfloat16, jnp.float16)
    narrow_at_init: dict[Any, bool] = {}  # by path; for a check, no step depends on it

    def init_fn(params: PyTree) -> Any:
        _narrow_leaves(params, supported, "stochastic_rounding")
        for path, p in jax.tree_util.tree_flatten_with_path(params)[0]:
            narrow_at_init[path] = narrow_at_init.get(path, True) and _is_narrow(p)
        return StochasticRoundingState(_words(key), _inner_state(transformation, params))

    def move(
        grads: PyTree, state: Any, params: PyTree, *, to_params: bool, extra_args: Any
    ) -> Advanced:
        params = _validate.where_given(params, grads)
        _check_update(grads, params, "stochastic_rounding", to_params)
        _narrow_leaves(params, supported, "stochastic_rounding")
        for path, p in jax.tree_util.tree_flatten_with_path(params)[0]:
            if narrow_at_init.get(path, False) and not _is_narrow(p):
                where = f"params{jax.tree_util.keystr(path)}"
                raise TypeError(
                    f"{where}: expected 16 bits as at init, got {jnp.result_type(p)}; "
                    f"{_HOW_TO_APPLY}"
                )
        leaves = jax.tree.leaves(params)
        random = jax.random.wrap_key_data(state.key, impl="threefry2x32")
        next_words, *words = jax.random.bits(random, (1 + len(leaves), 2), jnp.uint32)
        lying = [
            (Stochastic(np.dtype(jnp.result_type(p))), (x,)) if _is_narrow(p) else None
            for p, x in zip(leaves, words, strict=True)
        ]
        moved, inner_state, _ = _wrapped(
            transformation, lying, grads, state.inner_state, params, to_params, extra_args
        )
        return Advanced(moved, StochasticRoundingState(next_words, inner_state), [])

    return FusedTransformation(init_fn, FusedUpdate(move, in_slices=steps_in_slices(inner)))


def _is_typed_key(key: Any) -> bool:
    return isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


def _check_key(key: Any) -> None:
    is_seed = isinstance(key, (int, np.integer)) and not isinstance(key, bool)
    is_raw = isinstance(key, (jax.Array, np.ndarray)) and key.dtype == jnp.uint32
    if not (is_seed or _is_typed_key(key) or is_raw):
        raise TypeError(f"key: expected an integer or a key of jax.random, got {key!r}")


def _words(key: Any) -> UInt32[Array, "2"]:
    """A key of any kind as two words."""
    if isinstance(key, (int, np.integer)):
        key = jax.random.key(key, impl="threefry2x32")
    return jax.random.bits(key, (2,), jnp.uint32)
