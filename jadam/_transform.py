"""The family as optax gradient transformations.

Each is the pure pair with its hyperparameters bound. Its state is that of its optax namesake, class
by class, so that a program which reaches into the state finds everything in its place, and a state
or a checkpoint of one goes on under the other.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import optax

from jadam import _validate
from jadam._kernels import choice
from jadam._kernels.choice import Choice
from jadam._leaf import increment
from jadam._members import ADAMAX, ADEMAMIX, AMSGRAD, CORRECTED_AMSGRAD, NADAM, RADAM, Rule
from jadam._types import DType, PyTree, Scalar, ScalarOrSchedule
from jadam._update import (
    Advanced,
    Mask,
    adam_rule,
    advance,
    decaying_leaves,
    initializer,
    with_frozen,
)


class FusedTransformation(optax.GradientTransformationExtraArgs):
    """An optax transformation that can also make the whole step.

    It is the pair of `init` and `update` that every optax transformation is, and a tree of these
    two for JAX. `step` follows from `update`, also where a tool has put another one in its place.
    """

    def step(
        self, grads: PyTree, state: Any, params: PyTree, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        """The next parameters and state: `update` and `optax.apply_updates` in one.

        Of jadam's own `update` no update lies in memory in between. Donate parameters and state,
        in this order, as `jadam.step` says.

        >>> import jax, jax.numpy as jnp, jadam
        >>> tx = jadam.adam(1e-3)
        >>> params = {"w": jnp.array([1.0, 2.0])}
        >>> def train_step(params, state, grads):
        ...     return tx.step(grads, state, params)
        >>> train_step = jax.jit(train_step, donate_argnums=(0, 1))
        >>> params, state = train_step(params, tx.init(params), {"w": jnp.array([0.5, -3.0])})
        >>> params["w"].tolist()
        [0.9990000128746033, 2.000999927520752]
        """
        make = getattr(self.update, "step", None)
        if make is not None:
            return make(grads, state, params, **extra_args)
        updates, state = self.update(grads, state, params, **extra_args)
        return optax.apply_updates(params, updates), state


class Recipe(NamedTuple):
    """What a transformation is made of, for who applies it in another way, as `jadam.rows` does."""

    rule: Rule
    learning_rate: ScalarOrSchedule
    weight_decay: ScalarOrSchedule
    mask: Mask
    kernel: Choice


def is_local(tx: Any) -> bool:
    """Whether a transformation's step of a part of the parameters is that part of its step.

    So it is of the family's, if the parts are whole blocks of 128 along the last axis.
    """
    update = getattr(tx, "update", None)
    return isinstance(update, FusedUpdate) and update.is_local


def steps_in_slices(tx: Any) -> bool:
    """Whether a transformation's step of slices, which know their places, is its step."""
    update = getattr(tx, "update", None)
    return isinstance(update, FusedUpdate) and update.in_slices


def recipe_of(tx: Any) -> Recipe | None:
    """The recipe of one of the family's transformations, None for any other object."""
    update = getattr(tx, "update", None)
    return update.recipe if isinstance(update, FusedUpdate) else None


@dataclass(frozen=True)
class FusedUpdate:
    """An `update` that can also make the whole step.

    Attributes:
        move: `(grads, state, params, *, to_params, extra_args, weights=None) -> Advanced`, as in
            `advance`; the extra arguments of optax are for a transformation inside.
        recipe: what it is made of, if it is one of the family's.
        is_local: whether a block of 128 elements steps without knowing others or its place.
        in_slices: whether a slice along a leaf's first axis steps without knowing others, where it
            is told its place (`as_layer`).
    """

    move: Callable[..., Advanced]
    recipe: Recipe | None = field(default=None, compare=False)
    is_local: bool = False
    in_slices: bool = False

    def __call__(
        self, updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        moved, state, _ = self.move(updates, state, params, to_params=False, extra_args=extra_args)
        return moved, state

    def step(
        self, grads: PyTree, state: Any, params: PyTree, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        """The next parameters and state."""
        moved, state, _ = self.move(grads, state, params, to_params=True, extra_args=extra_args)
        return with_frozen(moved, params), state


def _transformation(
    rule: Rule,
    learning_rate: ScalarOrSchedule,
    mu_dtype: DType | None,
    nu_dtype: DType | None,
    min_size: int | None,
    kernel: Choice,
    *,
    decay: tuple[ScalarOrSchedule, Mask] | None = None,
) -> FusedTransformation:
    """A rule followed by decay and learning rate, all in one step; optax gives their states."""
    learning_rate = _validate.learning_rate("learning_rate", learning_rate)
    followers = [optax.scale_by_learning_rate(learning_rate)]
    weight_decay, mask = (0.0, None) if decay is None else decay
    weight_decay = _validate.schedulable("weight_decay", weight_decay)
    if decay is not None:
        followers.insert(0, optax.add_decayed_weights(weight_decay, _as_optax_takes(mask)))

    init = initializer(rule.member, mu_dtype, nu_dtype, min_size)

    def init_fn(params: PyTree) -> tuple[Any, ...]:
        made = init(params)
        decaying_leaves(params, mask)
        return made, *(follower.init(params) for follower in followers)

    kernel = choice.checked(kernel)

    def move(
        grads: PyTree, state: Any, params: PyTree, *, extra_args: Any = None, **form: Any
    ) -> Advanced:
        del extra_args
        if not (isinstance(state, (tuple, list)) and len(state) == 1 + len(followers)):
            raise TypeError(
                f"state: expected the tuple of {1 + len(followers)} states that init made, got "
                f"{type(state).__name__}"
            )
        adam_state, *schedules = state
        moved, adam_state, extra = advance(
            rule,
            grads,
            adam_state,
            params,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            mask=mask,
            kernel=kernel,
            **form,
        )
        # A schedule's state is its count, or nothing.
        return Advanced(moved, (adam_state, *jax.tree.map(increment, schedules)), extra)

    recipe = Recipe(rule, learning_rate, weight_decay, mask, kernel)
    return FusedTransformation(init_fn, FusedUpdate(move, recipe, is_local=True, in_slices=True))


def _as_optax_takes(mask: Mask) -> Mask:
    """A mask as a function where it is a callable tree, which optax would call."""
    if mask is None or not callable(mask):
        return mask

    def masked(params: PyTree) -> PyTree:
        return mask(params) if _validate.is_function(mask, params) else mask

    return masked


def scale_by_adam(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: DType | None = None,
    *,
    nu_dtype: DType | None = None,
    min_size: int | None = None,
    kernel: Choice = "auto",
    nesterov: bool = False,
) -> FusedTransformation:
    """Adam's direction m̂/(√(v̂ + eps_root) + eps) alone, to build chains with.

    Its state is a bare `AdamState`. Arguments as in `adam`.

    >>> import jadam, optax
    >>> tx = optax.chain(
    ...     optax.clip_by_global_norm(1.0), jadam.scale_by_adam(), optax.scale(-1e-3)
    ... )
    """
    rule = adam_rule(b1, b2, eps, eps_root, nesterov)
    return _direction(rule, mu_dtype, nu_dtype, min_size, kernel)


def scale_by_amsgrad(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: DType | None = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
    *,
    nu_dtype: DType | None = None,
    min_size: int | None = None,
    kernel: Choice = "auto",
    maximum: Literal["raw", "corrected"] = "raw",
) -> FusedTransformation:
    """AMSGrad's direction alone, to build chains with. Arguments as in `amsgrad`.

    >>> import jadam, optax
    >>> tx = optax.chain(jadam.scale_by_amsgrad(), optax.scale(-1e-3))
    """
    rule = _amsgrad_rule(b1, b2, eps, eps_root, bias_correction_mu, bias_correction_nu, maximum)
    return _direction(rule, mu_dtype, nu_dtype, min_size, kernel)


def scale_by_adamax(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    *,
    mu_dtype: DType | None = None,
    nu_dtype: DType | None = None,
    min_size: int | None = None,
    kernel: Choice = "auto",
) -> FusedTransformation:
    """AdaMax's direction alone, to build chains with. Arguments as in `adamax`.

    >>> import jadam, optax
    >>> tx = optax.chain(jadam.scale_by_adamax(), optax.scale(-2e-3))
    """
    rule = ADAMAX.with_hyperparameters(b1=b1, b2=b2, eps=eps)
    return _direction(rule, mu_dtype, nu_dtype, min_size, kernel)


def scale_by_radam(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    threshold: Scalar = 5.0,
    *,
    mu_dtype: DType | None = None,
    nu_dtype: DType | None = None,
    min_size: int | None = None,
    kernel: Choice = "auto",
    nesterov: bool = False,
) -> FusedTransformation:
    """RAdam's direction alone, to build chains with. Arguments as in `radam`.

    >>> import jadam, optax
    >>> tx = optax.chain(jadam.scale_by_radam(), optax.scale(-1e-3))
    """
    rule = RADAM.with_hyperparameters(
        b1=b1, b2=b2, eps=eps, eps_root=eps_root, threshold=threshold, nesterov=nesterov
    )
    return _direction(rule, mu_dtype, nu_dtype, min_size, kernel)


def _direction(
    rule: Rule,
    mu_dtype: DType | None,
    nu_dtype: DType | None,
    min_size: int | None,
    kernel: Choice,
) -> FusedTransformation:
    """A rule alone: its direction is the update of a learning rate of -1."""
    kernel = choice.checked(kernel)

    def move(
        grads: PyTree, state: Any, params: PyTree, *, extra_args: Any = None, **form: Any
    ) -> Advanced:
        del extra_args
        return advance(rule, grads, state, params, learning_rate=-1.0, kernel=kernel, **form)

    init = initializer(rule.member, mu_dtype, nu_dtype, min_size)
    return FusedTransformation(init, FusedUpdate(move, is_local=True))


def adam(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: DType | None = None,
    *,
    nu_dtype: DType | None = None,
    min_size: int | None = None,
    kernel: Choice = "auto",
    nesterov: bool = False,
) -> FusedTransformation:
    """Adam, Kingma & Ba (2015), Algorithm 1.

    m = b1·m + (1-b1)·g,  v = b2·v + (1-b2)·g²,
    update = -learning_rate·m̂/(√(v̂ + eps_root) + eps),  m̂ = m/(1-b1ᵗ),  v̂ = v/(1-b2ᵗ)

    Takes the place of `optax.adam` in an unchanged program. Without eps no step is longer than
    7.27 learning rates at the default b1 and b2, and than one in the first step.

    Args:
        learning_rate: a number, a scalar array, or a schedule of the number of updates made. A
            negative one climbs.
        b1: the decay rate of m, in [0, 1). A Python number is used in float64: .99999 is not
            rounded to float32 before 1 - b is taken.
        b2: the decay rate of v, in [0, 1).
        eps: added to the root, in the gradient's units, not negative. 0 is allowed.
        eps_root: added under the root, in the squared gradient's units, not negative. Not needed
            for gradients through the update: those are finite without.
        mu_dtype: the dtype to store m in. Default: the parameter's dtype, at least float32.
            "params" stores both moments in the parameter's own, also where that has 16 bits.
        nu_dtype: the same for v. 16-bit storage is dithered, so that it goes on moving.
            `mu_dtype="int8", nu_dtype="uint8"` stores both in 2 bytes a parameter, "int4" with
            "uint4" in 1 (`init`).
        min_size: leaves with fewer elements, or with a last axis under 32, keep float32 then.
            Default: 4096.
        kernel: "auto", "xla" or "native", as in `update`.
        nesterov: NAdam, the same as `nadam`.

    Returns:
        A transformation that works wherever optax's do. Its updates have the gradients' dtypes.

    Raises:
        RuntimeError: `kernel` is "native" and there is none.
        TypeError: an argument or a leaf is of a wrong type.
        ValueError: an argument is out of range, or trees do not match.

    >>> import jax.numpy as jnp, jadam, optax
    >>> tx = jadam.adam(1e-3)
    >>> params = {"w": jnp.array([1.0, 2.0])}
    >>> state = tx.init(params)
    >>> updates, state = tx.update({"w": jnp.array([0.5, -3.0])}, state)
    >>> params = optax.apply_updates(params, updates)
    >>> params["w"].tolist()
    [0.9990000128746033, 2.000999927520752]
    """
    return _transformation(
        adam_rule(b1, b2, eps, eps_root, nesterov),
        learning_rate,
        mu_dtype,
        nu_dtype,
        min_size,
        kernel,
    )


def adamw(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: DType | None = None,
    weight_decay: ScalarOrSchedule = 1e-4,
    mask: Mask = None,
    *,
    nu_dtype: DType | None = None,
    min_size: int | None = None,
    kernel: Choice = "auto",
    nesterov: bool = False,
) -> FusedTransformation:
    """Adam with decoupled weight decay, Loshchilov & Hutter (2019), Algorithm 2.

    update = -learning_rate·(m̂/(√(v̂ + eps_root) + eps) + weight_decay·param)

    The decay is multiplied by the learning rate, as in optax and torch (the paper's η alone
    scales both). Other arguments as in `adam`.

    Args:
        weight_decay: a number, a scalar array, or a schedule; not negative.
        mask: which leaves decay: a tree of booleans like the parameters or a prefix of it, or a
            function of the parameters that makes one. Default: all.

    >>> import jax, jax.numpy as jnp, jadam
    >>> tx = jadam.adamw(1.0, weight_decay=0.5, mask={"w": True, "b": False})
    >>> params = {"w": jnp.ones(2), "b": jnp.ones(2)}
    >>> updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    >>> abs(updates["w"]).tolist(), abs(updates["b"]).tolist()
    ([0.5, 0.5], [0.0, 0.0])
    """
    return _transformation(
        adam_rule(b1, b2, eps, eps_root, nesterov),
        learning_rate,
        mu_dtype,
        nu_dtype,
        min_size,
        kernel,
        decay=(weight_decay, mask),
    )


def nadam(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: DType | None = None,
    *,
    nu_dtype: DType | None = None,
    min_size: int | None = None,
    kernel: Choice = "auto",
    momentum_decay: Scalar | None = None,
    nesterov: bool = True,
) -> FusedTransformation:
    """Adam with Nesterov's momentum, Dozat (2016).

    m̂ = μₜ₊₁·m/(1 - μ₁·…·μₜ₊₁) + (1-μₜ)·g/(1 - μ₁·…·μₜ),  the rest as in `adam`

    Constant momentum μ = b1, the default, is optax's NAdam and `adam(..., nesterov=True)`. Other
    arguments as in `adam`.

    Args:
        momentum_decay: Dozat's schedule μᵢ = b1·(1 - ½·0.96^(i·momentum_decay)), a positive
            number. 0.004 is the paper's and torch's, 1.0 is Keras's.
        nesterov: False is `adam`, as in optax.

    >>> import jadam
    >>> tx = jadam.nadam(2e-3, momentum_decay=0.004)
    """
    return _transformation(
        _nadam_rule(b1, b2, eps, eps_root, momentum_decay, nesterov),
        learning_rate,
        mu_dtype,
        nu_dtype,
        min_size,
        kernel,
    )


def nadamw(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: DType | None = None,
    weight_decay: ScalarOrSchedule = 1e-4,
    mask: Mask = None,
    *,
    nu_dtype: DType | None = None,
    min_size: int | None = None,
    kernel: Choice = "auto",
    momentum_decay: Scalar | None = None,
    nesterov: bool = True,
) -> FusedTransformation:
    """`nadam` with the decoupled weight decay of `adamw`.

    >>> import jadam
    >>> tx = jadam.nadamw(2e-3, weight_decay=1e-2)
    """
    return _transformation(
        _nadam_rule(b1, b2, eps, eps_root, momentum_decay, nesterov),
        learning_rate,
        mu_dtype,
        nu_dtype,
        min_size,
        kernel,
        decay=(weight_decay, mask),
    )


def _nadam_rule(
    b1: Scalar,
    b2: Scalar,
    eps: Scalar,
    eps_root: Scalar,
    momentum_decay: Scalar | None,
    nesterov: bool,
) -> Rule:
    if not _validate.flag("nesterov", nesterov):
        if momentum_decay is not None:
            raise ValueError("momentum_decay: expected None without nesterov, got a number")
        return adam_rule(b1, b2, eps, eps_root, nesterov=False)
    return NADAM.with_hyperparameters(
        b1=b1, b2=b2, eps=eps, eps_root=eps_root, momentum_decay=momentum_decay
    )


def amsgrad(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: DType | None = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
    *,
    nu_dtype: DType | None = None,
    min_size: int | None = None,
    kernel: Choice = "auto",
    maximum: Literal["raw", "corrected"] = "raw",
) -> FusedTransformation:
    """AMSGrad, Reddi, Kale & Kumar (2018), Algorithm 2: v̂ never falls.

    raw:        v_max = max(v_max, v),          v̂ = v_max/(1-b2ᵗ)   (torch, Keras)
    corrected:  v_max = max(v_max, v/(1-b2ᵗ)),  v̂ = v_max            (optax)

    The two are different algorithms: the corrected maximum remembers the large first v̂ of a noisy
    start for ever. The paper corrects neither moment. Other arguments as in `adam`.

    Args:
        bias_correction_mu: divide m by 1-b1ᵗ. False is the paper.
        bias_correction_nu: divide v by 1-b2ᵗ, before or after the maximum. False is the paper.
        maximum: what the maximum is taken of.

    >>> import jadam
    >>> like_torch = jadam.amsgrad(1e-3)
    >>> like_optax = jadam.amsgrad(1e-3, maximum="corrected")
    >>> like_paper = jadam.amsgrad(1e-3, bias_correction_mu=False, bias_correction_nu=False)
    """
    return _transformation(
        _amsgrad_rule(b1, b2, eps, eps_root, bias_correction_mu, bias_correction_nu, maximum),
        learning_rate,
        mu_dtype,
        nu_dtype,
        min_size,
        kernel,
    )


def _amsgrad_rule(
    b1: Scalar,
    b2: Scalar,
    eps: Scalar,
    eps_root: Scalar,
    bias_correction_mu: bool,
    bias_correction_nu: bool,
    maximum: str,
) -> Rule:
    _validate.choice("maximum", maximum, ("raw", "corrected"))
    member = AMSGRAD if maximum == "raw" else CORRECTED_AMSGRAD
    return member.with_hyperparameters(
        b1=b1,
        b2=b2,
        eps=eps,
        eps_root=eps_root,
        bias_correction_mu=bias_correction_mu,
        bias_correction_nu=bias_correction_nu,
    )


def adamax(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    *,
    mu_dtype: DType | None = None,
    nu_dtype: DType | None = None,
    min_size: int | None = None,
    kernel: Choice = "auto",
) -> FusedTransformation:
    """AdaMax, Kingma & Ba (2015), Algorithm 2: Adam with the infinity norm.

    u = max(b2·u, |g| + eps),  update = -learning_rate·m/(1-b1ᵗ)/u

    eps stands where torch and optax have it (the paper has none, Keras adds it to u). The state's
    `nu` holds u. Other arguments as in `adam`.

    >>> import jadam
    >>> tx = jadam.adamax(2e-3)
    """
    return _transformation(
        ADAMAX.with_hyperparameters(b1=b1, b2=b2, eps=eps),
        learning_rate,
        mu_dtype,
        nu_dtype,
        min_size,
        kernel,
    )


def adamaxw(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: ScalarOrSchedule = 1e-4,
    mask: Mask = None,
    *,
    mu_dtype: DType | None = None,
    nu_dtype: DType | None = None,
    min_size: int | None = None,
    kernel: Choice = "auto",
) -> FusedTransformation:
    """`adamax` with the decoupled weight decay of `adamw`.

    >>> import jadam
    >>> tx = jadam.adamaxw(2e-3, weight_decay=1e-2)
    """
    return _transformation(
        ADAMAX.with_hyperparameters(b1=b1, b2=b2, eps=eps),
        learning_rate,
        mu_dtype,
        nu_dtype,
        min_size,
        kernel,
        decay=(weight_decay, mask),
    )


def radam(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    threshold: Scalar = 5.0,
    *,
    mu_dtype: DType | None = None,
    nu_dtype: DType | None = None,
    min_size: int | None = None,
    kernel: Choice = "auto",
    nesterov: bool = False,
) -> FusedTransformation:
    """Rectified Adam, Liu et al. (2020), Algorithm 2: no warm-up needed.

    update = -learning_rate·rₜ·m̂/(√(v̂ + eps_root) + eps) where ρₜ >= threshold, else
    -learning_rate·m̂, with rₜ = √((ρₜ-4)(ρₜ-2)ρ∞ / ((ρ∞-4)(ρ∞-2)ρₜ)),
    ρₜ = ρ∞ - 2t·b2ᵗ/(1-b2ᵗ), ρ∞ = 2/(1-b2) - 1

    eps is added after the bias correction, as in optax (torch adds it before). Other arguments
    as in `adam`.

    Args:
        threshold: from which length ρₜ of the moving average on v̂ is trusted, at least 4. The
            paper has 4, optax and torch have 5.

    >>> import jadam
    >>> tx = jadam.radam(1e-3)
    """
    return _transformation(
        RADAM.with_hyperparameters(
            b1=b1,
            b2=b2,
            eps=eps,
            eps_root=eps_root,
            threshold=threshold,
            nesterov=nesterov,
        ),
        learning_rate,
        mu_dtype,
        nu_dtype,
        min_size,
        kernel,
    )


def ademamix(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    b3: ScalarOrSchedule = 0.9999,
    alpha: ScalarOrSchedule = 5.0,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: DType | None = None,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask = None,
    *,
    nu_dtype: DType | None = None,
    min_size: int | None = None,
    kernel: Choice = "auto",
    warmup: Scalar | None = None,
) -> FusedTransformation:
    """AdEMAMix, Pagliardini, Ablin & Grangier (2024), Algorithm 1: gradients remembered for longer.

    m = b1·m + (1-b1)·g,  slow = b3·slow + (1-b3)·g,  v = b2·v + (1-b2)·g²,
    update = -learning_rate·((m̂ + alpha·slow)/(√(v̂ + eps_root) + eps) + weight_decay·param)

    The slow average is not corrected for its start at 0. Without eps no direction after t steps is
    longer than √(1-b2ᵗ)·(C₁/(1-b1ᵗ) + alpha·C₃), where C₁² and C₃² become b²/b2·C² + (1-b)²/(1-b2)
    in each step, with b = b1 and b = b3. This is 1 + alpha·(1-b3) in the first step. With
    `mu_dtype="int8", nu_dtype="uint8"` the three moments take 3.02 bytes a parameter, and the bound
    holds if b3 never falls. Other arguments as in `adamw`.

    Args:
        b3: the decay rate of the slow average: a number in [0, 1), or a schedule.
        alpha: the weight of the slow average: a number, not negative, or a schedule.
        warmup: the number of steps in which alpha grows linearly from 0, and the half-life of the
            slow average linearly from that of b1: the paper's schedules, which it sets to the whole
            training. Default: none. An early slow average is as noisy as it is large.

    >>> import jadam
    >>> tx = jadam.ademamix(1e-3, weight_decay=0.1, warmup=100_000)
    """
    return _transformation(
        ADEMAMIX.with_hyperparameters(
            b1=b1, b2=b2, b3=b3, alpha=alpha, eps=eps, eps_root=eps_root, warmup=warmup
        ),
        learning_rate,
        mu_dtype,
        nu_dtype,
        min_size,
        kernel,
        decay=(weight_decay, mask),
    )
