"""Optimizers and schedules by name: jadam's family, and optax's that need a gradient alone."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import optax
from jaxtyping import PyTree

import jadam

_JADAM = ("adam", "adamw", "amsgrad", "nadam", "nadamw", "adamax", "adamaxw", "radam")
_OPTAX = (
    *("adabelief", "adadelta", "adafactor", "adagrad", "adan", "fromage", "lamb", "lars", "lion"),
    *("novograd", "optimistic_gradient_descent", "rmsprop", "rprop", "sgd"),
    *("sign_sgd", "signum", "sm3", "yogi"),
)
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    **{name: getattr(jadam, name) for name in _JADAM},
    **{name: getattr(optax, name) for name in _OPTAX},
    **{f"optax.{name}": getattr(optax, name) for name in _JADAM},
}
SCHEDULES = ("constant", "cosine", "warmup-cosine")


def make_schedule(name: str, learning_rate: float, steps: int, warmup: float) -> optax.Schedule:
    """The learning rate of each of `steps` steps; `warmup` is a share of them."""
    if name == "cosine":
        return optax.cosine_decay_schedule(learning_rate, steps)
    if name == "warmup-cosine":
        rise = max(1, round(warmup * steps))
        return optax.warmup_cosine_decay_schedule(0.0, learning_rate, rise, max(steps, rise + 1))
    return optax.constant_schedule(learning_rate)


def make_optimizer(
    name: str, learning_rate: optax.ScalarOrSchedule, **options: Any
) -> optax.GradientTransformation:
    """The optimizer of a name, with those of its options that are not None.

    Weight decay spares what is no kernel, where the optimizer can be told so.

    Raises:
        ValueError: the optimizer has no such option, or not that value of it.
    """
    build = OPTIMIZERS[name]
    known = inspect.signature(build).parameters
    given = {option: value for option, value in options.items() if value is not None}
    for option, value in given.items():
        flag = f"--{option.replace('_', '-')}"
        if option not in known:
            able = [n for n, b in OPTIMIZERS.items() if option in inspect.signature(b).parameters]
            raise ValueError(
                f"{flag}: --optimizer {name} has no {option}; these have: {', '.join(able)}"
            )
        if value in ("int8", "uint8") and "nu_dtype" not in known:
            raise ValueError(f"{flag}: only jadam's optimizers have codes, {name} has no {value}")
    masks = {mask: is_kernel for mask in ("mask", "weight_decay_mask") if mask in known}
    try:
        return build(learning_rate, **given, **masks)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--optimizer {name}: {error}") from error


def is_kernel(params: PyTree) -> PyTree:
    """Which leaves decay: not biases, nor the scales of norms."""
    return jax.tree.map(lambda p: p.ndim > 1, params)
