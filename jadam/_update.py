"""The pure functions on trees: `init` makes a state, `update` and `step` make one step of it.

`advance` is the one engine under both and under the whole family: it walks the leaves, and
knows nothing of which equations it applies.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from jadam import _validate
from jadam._kernels import choice
from jadam._kernels.choice import Choice
from jadam._leaf import Options, increment, leaf_step
from jadam._masters import Weights
from jadam._members import ADAM, NADAM, Member, Rule
from jadam._state import AdamState, CorrectedAmsgradState
from jadam._storage import checked_storage_of, chooser, placed_like
from jadam._types import DType, PyTree, Scalar, ScalarOrSchedule

Mask = PyTree | Callable[[PyTree], PyTree] | None
"""Which leaves decay: a tree of booleans or a prefix of it, a function that makes one, or all."""


def init(
    params: PyTree,
    *,
    mu_dtype: DType | None = None,
    nu_dtype: DType | None = None,
    min_size: int | None = None,
) -> AdamState:
    """The state before the first update: count 0 and zero moments.

    Args:
        params: a tree of floating-point or complex arrays.
        mu_dtype: the dtype to store m in. Default: the parameter's dtype, at least float32.
            "params" stores both moments in the parameter's own, also where that has 16 bits.
        nu_dtype: the same for v, which is real also for complex parameters. A dtype of 16 bits is
            rounded with a dither, so that it goes on moving where rounding to nearest would stick.
            `mu_dtype="int8", nu_dtype="uint8"` stores both in 2 bytes a parameter: `mu` then
            holds uint16 codes of both, `nu` one int16 for each 128 of them. `mu_dtype="int4",
            nu_dtype="uint4"` does in 1 byte, `mu` holding uint8: an update is then by chance
            half as long again or half as short, and not on average.
        min_size: leaves with fewer elements are stored in float32 instead of codes, as are those
            with a last axis under 32. Default: 4096.

    Raises:
        TypeError: a leaf is not floating-point or complex; a dtype is not floating-point.

    >>> import jax.numpy as jnp, jadam
    >>> state = jadam.init({"w": jnp.ones(3, jnp.bfloat16)})
    >>> state.mu["w"].dtype, state.nu["w"].dtype
    (dtype('float32'), dtype('float32'))
    """
    return initializer(ADAM, mu_dtype, nu_dtype, min_size)(params)


def initializer(
    member: Member, mu_dtype: DType | None, nu_dtype: DType | None, min_size: int | None
) -> Callable[..., Any]:
    """`init` of a member with its storage, which is checked."""
    choose = chooser(member.moments, mu_dtype, nu_dtype, min_size)

    def init_fn(params: PyTree) -> Any:
        _validate.inexact_leaves("params", params)
        leaves, structure = jax.tree.flatten(params)
        rows = [choose(p).zeros(p) for p in leaves]
        return member.state_of(jnp.zeros((), jnp.int32), structure, rows)

    return init_fn


def update(
    grads: PyTree,
    state: AdamState,
    params: PyTree = None,
    *,
    learning_rate: ScalarOrSchedule = 1e-3,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask = None,
    nesterov: bool = False,
    kernel: Choice = "auto",
) -> tuple[PyTree, AdamState]:
    """One step of Adam: the updates to add to the parameters, and the next state.

    m = b1·m + (1-b1)·g,  v = b2·v + (1-b2)·g²,
    update = -learning_rate·(m̂/(√(v̂ + eps_root) + eps) + weight_decay·param)
    with m̂ = m/(1-b1ᵗ), v̂ = v/(1-b2ᵗ) and t counting from 1. Kingma & Ba (2015), Algorithm 1;
    the decay is that of Loshchilov & Hutter (2019), Algorithm 2, line 12.

    All is computed in float32 or wider. Each update has its gradient's dtype, each moment keeps
    its own. Finite gradients past ±2⁶³ (9.2e18; float64: ±2⁵¹¹) count as ±2⁶³, since v = g² would
    not be finite. Where both m and v are 0 the direction is 0, also with eps = 0.

    Args:
        grads: a tree like the parameters that the state was made for.
        state: from `init` or the update before.
        params: the parameters, needed where they decay.
        learning_rate: a number, a scalar array, or a schedule of the number of updates made. A
            negative one climbs.
        b1: the decay rate of m, in [0, 1).
        b2: the decay rate of v, in [0, 1).
        eps: added to the root, not negative.
        eps_root: added under the root, not negative.
        weight_decay: decoupled, as a number, a scalar array, or a schedule.
        mask: which leaves decay: a tree of booleans like the parameters or a prefix of it, or a
            function of the parameters that makes one. Default: all.
        nesterov: NAdam's look-ahead m̂ = b1·m/(1-b1ᵗ⁺¹) + (1-b1)·g/(1-b1ᵗ).
        kernel: "auto" takes the kernel in C++ where a leaf is on a CPU, or that in CUDA where it
            is on a GPU, if it is there (`jadam.kernels`) and faster: in `step`, and for moments of
            16, 8 or 4 bits. "native" takes it for float32 moments in `update` too, and raises where
            there is none; "xla" never takes it. Moments agree to 2 ulps, and one code in a thousand
            may be its neighbour. Updates agree to 3 units in the last place (RAdam's: 4) of the
            longest of these: a learning rate, the update, the update without its decay, and what m
            alone makes of it. Where terms cancel, an update is short, and that is more of its own
            units. From moments of 8 or 4 bits it is 4 (5 on a GPU) for gradients as in trainings,
            and 8 for any. Without fused products (the baseline of x86-64) it is one and a half
            more.

    Raises:
        RuntimeError: `kernel` is "native" and there is none.
        TypeError: a leaf or an argument is of a wrong type.
        ValueError: an argument is out of range, the trees do not match, or `params` is missing.

    >>> import jax.numpy as jnp, jadam
    >>> params = {"w": jnp.array([1.0, 2.0])}
    >>> state = jadam.init(params)
    >>> updates, state = jadam.update({"w": jnp.array([0.5, -3.0])}, state)
    >>> updates["w"].tolist()
    [-0.0010000000474974513, 0.0010000000474974513]
    """
    moved, state, _ = advance(
        adam_rule(b1, b2, eps, eps_root, nesterov),
        grads,
        state,
        params,
        learning_rate=_validate.learning_rate("learning_rate", learning_rate),
        weight_decay=_validate.schedulable("weight_decay", weight_decay),
        mask=mask,
        kernel=choice.checked(kernel),
    )
    return moved, state


def step(
    grads: PyTree,
    state: AdamState,
    params: PyTree,
    *,
    learning_rate: ScalarOrSchedule = 1e-3,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask = None,
    nesterov: bool = False,
    kernel: Choice = "auto",
) -> tuple[PyTree, AdamState]:
    """`update` and `optax.apply_updates` in one: the next parameters and the next state.

    No update goes through memory in between. Donate both in the `jax.jit` of a train step that
    takes parameters and state in the order in which it returns them: JAX pairs donated arguments
    with results by their order, and a parameter in its moment's place costs copies. Arguments as in
    `update`.

    Raises:
        RuntimeError, TypeError, ValueError: as in `update`.

    >>> import jax, jax.numpy as jnp, jadam
    >>> params = {"w": jnp.array([1.0, 2.0])}
    >>> def train_step(params, state, grads):
    ...     return jadam.step(grads, state, params)
    >>> train_step = jax.jit(train_step, donate_argnums=(0, 1))
    >>> params, state = train_step(params, jadam.init(params), {"w": jnp.array([0.5, -3.0])})
    >>> params["w"].tolist()
    [0.9990000128746033, 2.000999927520752]
    """
    moved, state, _ = advance(
        adam_rule(b1, b2, eps, eps_root, nesterov),
        grads,
        state,
        params,
        learning_rate=_validate.learning_rate("learning_rate", learning_rate),
        weight_decay=_validate.schedulable("weight_decay", weight_decay),
        mask=mask,
        kernel=choice.checked(kernel),
        to_params=True,
    )
    return with_frozen(moved, params), state


def adam_rule(b1: Scalar, b2: Scalar, eps: Scalar, eps_root: Scalar, nesterov: bool) -> Rule:
    """Adam's, or with `nesterov` NAdam's with constant momentum."""
    if nesterov:
        return NADAM.with_hyperparameters(
            b1=b1, b2=b2, eps=eps, eps_root=eps_root, momentum_decay=None
        )
    return ADAM.with_hyperparameters(b1=b1, b2=b2, eps=eps, eps_root=eps_root)


class Advanced(NamedTuple):
    """The updates or the parameters after a step, the state, and what belongs to each leaf."""

    moved: PyTree
    state: Any
    extra: list[tuple[Any, ...]]


def advance(
    rule: Rule,
    grads: PyTree,
    state: Any,
    params: PyTree,
    *,
    learning_rate: ScalarOrSchedule,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask = None,
    kernel: Choice = "auto",
    to_params: bool = False,
    weights: Sequence[tuple[Weights, tuple[Any, ...]] | None] | None = None,
) -> Advanced:
    """One step of a rule: update = -learning_rate·(direction + weight_decay·param).

    With `to_params` the new parameters come in place of the updates. `weights` says for each leaf
    how its parameter lies and gives what belongs to it, or None.
    """
    decays = not (isinstance(weight_decay, float) and weight_decay == 0)
    params = _validate.where_given(params, grads)
    _check(rule.member, grads, state, params, decays, to_params)
    learning_rate = _validate.at_count("learning_rate", learning_rate, state.count)
    weight_decay = _validate.at_count("weight_decay", weight_decay, state.count)

    leaves, structure = jax.tree.flatten(grads)
    needed = decays or to_params or weights is not None
    given: list[Any] = jax.tree.leaves(params) if needed else [None] * len(leaves)
    stored = list(zip(*map(jax.tree.leaves, rule.member.stored(state)), strict=True))
    leaves, given = ([*map(_beside, trees, stored)] for trees in (leaves, given))
    lying = [x or (None, ()) for x in weights or [None] * len(leaves)]
    kinds, extra = [kind for kind, _ in lying], [belongs for _, belongs in lying]
    seen = (p if k is None else k.load(p, x) for k, p, x in zip(kinds, given, extra, strict=True))
    decaying = decaying_leaves(structure.unflatten(seen), mask) if decays else [False] * len(leaves)
    options = [Options(d, to_params, k) for d, k in zip(decaying, kinds, strict=True)]
    rows = list(zip(leaves, given, options, stored, extra, strict=True))

    platforms = choice.takers(kernel, rule, rows)
    numbers = (rule, learning_rate, weight_decay, state.count)
    in_xla = leaf_step(*numbers)
    taken = [(row, on) for row, on in zip(rows, platforms, strict=True) if on]
    in_kernel = iter(_through_kernel(*numbers, taken))
    results = [
        next(in_kernel) if on else in_xla(*row) for row, on in zip(rows, platforms, strict=True)
    ]
    moved = structure.unflatten([stepped.moved for stepped in results])
    return Advanced(
        moved,
        rule.member.state_of(
            increment(state.count), structure, [stepped.stored for stepped in results]
        ),
        [stepped.extra for stepped in results],
    )


def _beside(x: Any, stored: Sequence[Any]) -> Any:
    """A whole gradient or parameter in the parts in which its moments lie, on explicit axes.

    On other axes XLA does so itself. Here JAX would join the two in a sum, but not in a choice.
    """
    if x is None:
        return None
    moment = next(m for m in stored if m.shape == jnp.shape(x))
    if AxisType.Explicit not in jax.typeof(moment).sharding.mesh.axis_types:
        return x
    spec = jax.typeof(x).sharding.spec
    is_whole = not any(spec.partitions) and not spec.unreduced
    return placed_like(x, moment) if is_whole else x


def _through_kernel(*args: Any) -> list[Any]:
    *numbers, taken = args
    if not taken:
        return []
    # Imported where a kernel is in use: without what it needs of JAX, the rest goes on.
    primitive = importlib.import_module("jadam._kernels.primitive")
    calls = [[leaf] for leaf in taken] if choice.is_apart() else [taken]
    return [
        stepped
        for leaves in calls
        for stepped in primitive.through_kernel(*numbers, *zip(*leaves, strict=True))
    ]


def with_frozen(moved: PyTree, params: PyTree) -> PyTree:
    """The new parameters, and those without a gradient as they were."""
    return jax.tree.map(
        lambda new, old: old if new is None else new, moved, params, is_leaf=lambda x: x is None
    )


def decaying_leaves(params: PyTree, mask: Mask) -> list[bool]:
    """Which leaves decay.

    Raises:
        TypeError: the mask holds something else than booleans.
        ValueError: the mask is a tree that does not match.
    """
    if mask is None:
        return [True] * len(jax.tree.leaves(params))
    chosen = mask(params) if _validate.is_function(mask, params) else mask

    def spread(path: Any, keep: Any, subtree: PyTree) -> PyTree:
        if np.shape(keep) or np.asarray(keep).dtype != bool:
            where = f"mask{jax.tree_util.keystr(path)}"
            raise TypeError(f"{where}: expected True or False, got {keep!r}")
        return jax.tree.map(lambda _: bool(keep), subtree)

    try:
        return jax.tree.leaves(jax.tree_util.tree_map_with_path(spread, chosen, params))
    except ValueError as error:
        raise ValueError(f"mask: expected a tree like params or a prefix of it; {error}") from None


def _check(
    member: Member, grads: PyTree, state: Any, params: PyTree, decays: bool, to_params: bool
) -> None:
    if type(state) is not member.state:
        expected = f"the {member.state.__name__} that init made"
        hint = ""
        if isinstance(state, CorrectedAmsgradState) and issubclass(
            member.state, CorrectedAmsgradState
        ):
            hint = (
                "; the one has the maximum of the raw v, the other, optax's, that of the corrected "
                'v: go on with jadam.amsgrad(maximum="raw" or "corrected") as it was made'
            )
        raise TypeError(f"state: expected {expected}, got {type(state).__name__}{hint}")
    _validate.inexact_leaves("grads", grads)
    stored = member.stored(state)
    for moment, tree in zip(member.moments, stored, strict=True):
        _validate.same_nodes("grads", grads, f"state.{moment.name}", tree)
    leaves, _ = jax.tree_util.tree_flatten_with_path(grads)
    for (path, g), *row in zip(leaves, *map(jax.tree.leaves, stored), strict=True):
        key = jax.tree_util.keystr(path)
        storage = checked_storage_of(
            member.moments, row, lambda name, key=key: f"state.{name}{key}"
        )
        for name, expected in storage.unfit.items():
            place = f"state.{name}{key}"
            raise TypeError(f"{place}: expected {expected}; jadam.migrate.cast_like widens it")
        shapes = storage.shapes(np.shape(g))
        for moment, x, shape in zip(member.moments, row, shapes, strict=True):
            if np.shape(x) != shape:
                raise ValueError(
                    f"grads{key}: expected shape {np.shape(x)} of state.{moment.name}{key}, "
                    f"got {np.shape(g)}"
                )
            if moment.is_first and jnp.iscomplexobj(g) and not jnp.iscomplexobj(x):
                raise TypeError(
                    f"grads{key}: expected a real dtype like state.{moment.name}{key}'s, "
                    f"{jnp.result_type(x)}, got {jnp.result_type(g)}"
                )
    if decays or to_params:
        if params is None:
            reason = "step moves" if to_params else "weight_decay needs"
            raise ValueError(f"params: expected the parameters, which {reason}; got None")
        _validate.inexact_leaves("params", params)
        _validate.same_structure("params", params, "grads", grads)
        _validate.real_where("params", params, "grads", grads)
