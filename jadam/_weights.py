"""Parameters in 16 bits that still learn, with any optax transformation.

A 16-bit parameter that moves by less than half a unit in its last place rounds back to itself.
Either the state keeps what the rounding took (`compensated_weights`), or the rounding is random
and right in the mean (`stochastic_rounding`).

Both emit float32 updates that `optax.apply_updates` turns into the wanted 16-bit numbers. The
inner transformation runs as if parameters and gradients were float32.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Float32, Int32, Integer, UInt32

from jadam import _math, _validate
from jadam._kernels.choice import left_to_xla
from jadam._rounding import elements_before, grid, weyl
from jadam._types import DType, PyTree

_LARGEST = 0x7F7F  # the upper half of the bits of bfloat16's largest finite number
_SIGN = np.int32(-(2**31))


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


# One array. float32's bits as an integer, with the magnitude negated below zero, count the float32
# numbers in their order. A bfloat16 number is every 65,536th of them.


def _ordered(x: Float32[Array, "*shape"]) -> Int32[Array, "*shape"]:
    bits = lax.bitcast_convert_type(x, jnp.int32)
    sign = bits >> 31
    return ((bits & ~_SIGN) ^ sign) - sign


def _exactly(p: Float[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """A bfloat16 array in float32, subnormal numbers too, which a conversion may flush."""
    upper = lax.bitcast_convert_type(p, jnp.int16).astype(jnp.int32)
    return lax.bitcast_convert_type(upper << 16, jnp.float32)


def join(p: Float[Array, "*shape"], residual: Integer[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """The master weight: the float32 number that lies `residual` steps from p.

    A step is one float32 number for an int16 residual, 256 for int8.
    """
    x = _exactly(p)
    bits = lax.bitcast_convert_type(x, jnp.int32)
    step = 16 - jnp.iinfo(residual.dtype).bits
    order = _ordered(x) + (residual.astype(jnp.int32) << step)
    joined = jnp.abs(order) | (jnp.where(order == 0, bits, order) & _SIGN)
    return lax.bitcast_convert_type(jnp.where(jnp.isfinite(x), joined, bits), jnp.float32)


def difference(
    target: Float32[Array, "*shape"], x: Float32[Array, "*shape"]
) -> Float32[Array, "*shape"]:
    """u with x + u = target, finite for finite arguments; -0 where nothing moves, also ±0 and ±∞.

    Wrong only where x is 2¹⁶ and more times the target and the target has digits below x's last.
    """
    same = lax.bitcast_convert_type(target, jnp.int32) == lax.bitcast_convert_type(x, jnp.int32)
    largest = float(jnp.finfo(jnp.float32).max)
    moved = jnp.where(jnp.isfinite(target), jnp.clip(target - x, -largest, largest), target)
    return jnp.where(same, -0.0, moved)


def split(
    master: Float32[Array, "*shape"],
    p: Float[Array, "*shape"],
    dtype: jnp.dtype,
    dither: UInt32[Array, "*shape"] | None = None,
) -> tuple[Float32[Array, "*shape"], Integer[Array, "*shape"]]:
    """The update that takes p to the bfloat16 number nearest to `master`, and the residual there.

    The residual is taken from the number that p + update rounds to. An int8 residual has its last
    bit dithered, up as often as the master lies above. Finite masters stay finite: past the middle
    between bfloat16's largest number and infinity they are brought back to it.
    """
    step = 16 - jnp.iinfo(dtype).bits
    order, x = _ordered(master), _exactly(p)
    finite = jnp.isfinite(master)
    if step and dither is not None:
        order += (dither >> (32 - step)).astype(jnp.int32)
    upper = jnp.clip((order + 2**15) >> 16, -_LARGEST, _LARGEST)
    sign = lax.bitcast_convert_type(master, jnp.int32) & _SIGN
    target = lax.bitcast_convert_type((jnp.abs(upper) << 16) | sign, jnp.float32)
    update = difference(jnp.where(finite, target, master), x)
    # XLA may drop a conversion to bfloat16 and back, but not this.
    landed = _ordered(lax.reduce_precision(x + update, 8, 7))
    residual = (jnp.clip(order, landed - 2**15, landed + (2**15 - 1)) - landed) >> step
    return update, jnp.where(finite, residual, 0).astype(dtype)


def random_bits(words: UInt32[Array, "2"], shape: tuple[int, ...]) -> UInt32[Array, "*shape"]:
    """32 random bits for each element, from two random words and the element's index.

    Wellons' lowbias32 twice. For one element over the steps it is as random as the words are; it
    is fused into what uses it, where threefry takes 16 bytes an element for itself and, on a CPU,
    50 times as long. The same under every sharding.
    """
    bits = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        index = lax.broadcasted_iota(jnp.uint32, shape, axis)
        bits += index * np.uint32(stride % 2**32)
        stride *= shape[axis]
    bits += elements_before(stride)
    for word in words:
        bits ^= word
        bits = (bits ^ (bits >> 16)) * np.uint32(0x7FEB352D)
        bits = (bits ^ (bits >> 15)) * np.uint32(0x846CA68B)
        bits ^= bits >> 16
    return bits


def round_randomly(
    x: Float32[Array, "*shape"], dtype: jnp.dtype, bits: UInt32[Array, "*shape"]
) -> Float32[Array, "*shape"]:
    """x as one of its two neighbours in `dtype`, with mean x to 2⁻²⁴ of their distance.

    What `dtype` has stays. Past its largest finite number it is a plain conversion.
    """
    info = jnp.finfo(dtype)
    s = grid(x, dtype)
    steps = jnp.abs(x) / s
    below = jnp.floor(steps)
    up = (bits >> 8).astype(jnp.float32) * 2.0**-24 < steps - below
    rounded = jnp.copysign((below + up.astype(jnp.float32)) * s, x)
    beyond = lax.reduce_precision(x, info.nexp, info.nmant)
    return jnp.where(jnp.abs(x) <= float(info.max), rounded, beyond)


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


def _check_update(grads: PyTree, params: PyTree, by: str) -> None:
    if params is None:
        raise ValueError(f"params: expected the parameters, which {by} needs; got None")
    _validate.inexact_leaves("grads", grads)
    _validate.same_structure("grads", grads, "params", params)
    _validate.real_where("grads", grads, "params", params)


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
            raise TypeError(f"params{where}: expected {expected} as at init, got {got}")
        if r is not None and np.shape(p) != np.shape(r):
            raise ValueError(
                f"params{where}: expected shape {np.shape(r)} of state.residual{where}, got "
                f"{np.shape(p)}"
            )


def _widened(tree: PyTree) -> PyTree:
    """Each array of less than 32 bits in float32, the others as they are."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32) if _is_narrow(x) else x, tree)


def _moved(master: Float32[Array, "*shape"], update: Any) -> Float32[Array, "*shape"]:
    """master + update, as `optax.apply_updates` adds them to a float32 parameter."""
    update = jnp.asarray(update)
    dtype = np.promote_types(master.dtype, _math.widen(update.dtype))
    return (master.astype(dtype) + update.astype(dtype)).astype(master.dtype)


def compensated_weights(
    inner: optax.GradientTransformation, *, residual_dtype: DType = "int8"
) -> optax.GradientTransformationExtraArgs:
    """Trains bfloat16 parameters as if they had 24 or 32 bits: the state keeps the missing ones.

    master = parameter + residual,  master += inner's update,  parameter = master in bfloat16

    The scheme of FlashOptim (arXiv 2602.23349), made exact: the residual counts float32 numbers
    from the parameter, so that a bfloat16 and an int16 are one float32 number and training is
    float32 training, bit for bit. An int8 keeps every 256th of them and is dithered, so that
    updates far below its resolution (2⁻¹⁵ of the weight) still add up.

    Parameters of 32 bits and more and complex ones are let through to the inner transformation.
    Apply the updates with `optax.apply_updates`, in the same jit, and nothing in between: in a
    chain this wraps all or comes last. What refuses float32 updates for bfloat16 gradients
    (`optax.apply_if_finite`, `optax.conditionally_mask`) goes inside. Under strict dtype promotion,
    which `optax.apply_updates` does not work under, add `p.astype(u.dtype) + u` and convert back.

    Args:
        inner: any transformation. It sees float32 parameters, gradients of fewer bits in float32,
            and all extra arguments.
        residual_dtype: int8 for 24-bit weights, 3 bytes with the parameter; int16 for 32 bits, 4.

    Raises:
        TypeError: a parameter is of another 16-bit or narrower dtype, or not of the one at init.
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
            transformation.init(_widened(params)),
        )

    def update_fn(
        updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        _check_update(updates, params, "compensated_weights")
        _narrow_leaves(params, (jnp.bfloat16,), "compensated_weights")
        residual, dither, inner_state = state
        masters = _joined(params, residual)
        with left_to_xla():
            steps, inner_state = transformation.update(
                _widened(updates), inner_state, masters, **extra_args
            )
        structure = jax.tree.structure(params)

        def leaf(place: int, p: Any, master: Any, r: Any, step: Any) -> tuple[Any, Any]:
            if r is None:
                return step, None
            # The place as salt: leaves of one shape are dithered apart.
            phase = None if dither is None else weyl(np.shape(p), dither, place)
            return split(_moved(master, step), jnp.asarray(p), r.dtype, phase)

        columns = (structure.flatten_up_to(x) for x in (params, masters, residual, steps))
        rows = [leaf(i, *row) for i, row in enumerate(zip(*columns, strict=True))]
        return structure.unflatten([step for step, _ in rows]), CompensatedWeightsState(
            structure.unflatten([r for _, r in rows]),
            None if dither is None else dither + np.uint32(1),
            inner_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


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
) -> optax.GradientTransformationExtraArgs:
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
        TypeError: a parameter is of another narrow dtype; `key` is no key.
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

    def init_fn(params: PyTree) -> Any:
        _narrow_leaves(params, supported, "stochastic_rounding")
        return StochasticRoundingState(_words(key), transformation.init(_widened(params)))

    def update_fn(
        updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        _check_update(updates, params, "stochastic_rounding")
        _narrow_leaves(params, supported, "stochastic_rounding")
        wide = _widened(params)
        with left_to_xla():
            steps, inner_state = transformation.update(
                _widened(updates), state.inner_state, wide, **extra_args
            )
        leaves, structure = jax.tree.flatten(params)
        random = jax.random.wrap_key_data(state.key, impl="threefry2x32")
        next_words, *words = jax.random.bits(random, (1 + len(leaves), 2), jnp.uint32)

        def leaf(p: Any, x: Any, step: Any, words: UInt32[Array, "2"]) -> Any:
            if not _is_narrow(p):
                return step
            bits = random_bits(words, np.shape(p))
            return difference(round_randomly(_moved(x, step), jnp.result_type(p), bits), x)

        columns = (structure.flatten_up_to(x) for x in (wide, steps))
        moved = [leaf(*row) for row in zip(leaves, *columns, words, strict=True)]
        return structure.unflatten(moved), StochasticRoundingState(next_words, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


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
