"""The steps that are compiled, by name, and the leaves that each is compiled for."""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

import jadam
from experiments.bench.workloads import GPT2, Shapes

OPTIONS: dict[str, Any] = {"learning_rate": 1e-3, "weight_decay": 0.1}
BITS_8: dict[str, Any] = {"mu_dtype": "int8", "nu_dtype": "uint8"}
BITS_4: dict[str, Any] = {"mu_dtype": "int4", "nu_dtype": "uint4"}
BITS_16: dict[str, Any] = {"mu_dtype": "bfloat16", "nu_dtype": "bfloat16"}
BF16 = jnp.bfloat16


class Program(NamedTuple):
    """A step to compile.

    Attributes:
        tx: the transformation.
        step: `(params, state, grads) -> (params, state)`.
        dtype: of parameters and gradients.
        chips: over how many XLA divides the rows of each array.
    """

    tx: Any
    step: Callable[..., tuple[Any, Any]]
    dtype: Any
    chips: int = 1


def fused(tx: Any, dtype: Any = jnp.float32) -> Program:
    """Parameters and state by jadam's `step`."""
    return Program(tx, lambda params, state, grads: tx.step(grads, state, params), dtype)


def in_two(tx: Any, dtype: Any = jnp.float32) -> Program:
    """`update`, then `optax.apply_updates`."""

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return Program(tx, step, dtype)


def adamw(dtype: Any = jnp.float32, **options: Any) -> Program:
    """jadam's."""
    return fused(jadam.adamw(**OPTIONS, **options), dtype)


def compensated(**options: Any) -> Program:
    """The same around weights in bfloat16 with a residual."""
    return fused(jadam.compensated_weights(jadam.adamw(**OPTIONS, **options)), BF16)


def stochastic(**options: Any) -> Program:
    """The same around weights in bfloat16, rounded randomly."""
    return fused(jadam.stochastic_rounding(jadam.adamw(**OPTIONS, **options)), BF16)


def flashoptim(dtype: Any, bits: int | None, *, fused: bool) -> Program:
    """flashoptim-jax's, by its kernel for GPUs or in XLA's operations."""
    from flashoptim_jax import flash_adamw

    tx: Any = flash_adamw(**OPTIONS, master_weight_bits=bits, fused=fused)
    return Program(tx, tx.step, dtype)


def over_chips(make: Callable[[], Program]) -> Program:
    """The step of arrays that lie in parts on a host's chips, without `step_in_parts`."""
    return make()._replace(chips=8)


OPTAX, FLOAT32, BF16_MOMENTS = "optax", "jadam float32", "jadam bf16 moments"
CODES, COMPENSATED = "jadam 8-bit moments", "jadam compensated bf16 weights"
FEWER_CODES = "jadam 4-bit moments"
SMALLEST = "jadam 7 bytes: compensated, 8-bit"
UPDATE = f"{CODES}, update"
FLASH, FLASH_BF16 = "flashoptim-jax 8-bit", "flashoptim-jax 8-bit, bf16 weights"
XLA, PALLAS, DIVIDED = ", XLA's form", ", its kernel", ", divided by XLA"

_OWN: dict[str, Callable[..., Program]] = {
    FLOAT32: adamw,
    BF16_MOMENTS: partial(adamw, **BITS_16),
    CODES: partial(adamw, **BITS_8),
    FEWER_CODES: partial(adamw, **BITS_4),
    COMPENSATED: compensated,
    SMALLEST: partial(compensated, **BITS_8),
}
_FLASH = {FLASH: (jnp.float32, None), FLASH_BF16: (BF16, 24)}
PROGRAMS: dict[str, Callable[[], Program]] = {
    OPTAX: lambda: in_two(optax.adamw(**OPTIONS)),
    **_OWN,
    UPDATE: lambda: in_two(jadam.adamw(**OPTIONS, **BITS_8)),
    **{name + XLA: partial(make, kernel="xla") for name, make in _OWN.items()},
    CODES + DIVIDED: partial(over_chips, _OWN[CODES]),
    **{name + PALLAS: partial(flashoptim, *how, fused=True) for name, how in _FLASH.items()},
    **{name + XLA: partial(flashoptim, *how, fused=False) for name, how in _FLASH.items()},
}

ONE_LEAF, ALL_LEAVES = "1 leaf of 8192 x 4096", f"{GPT2.name}, {len(GPT2.shapes)} leaves"
LEAVES: dict[str, Shapes] = {ONE_LEAF: ((8192, 4096),), ALL_LEAVES: GPT2.shapes}


def compiled_for(platform: str, leaves: str) -> list[str]:
    """The names of the programs for a platform and leaves, optax's first: all are compared to it.

    XLA's own form of codes compiles for minutes, so it is compiled for one leaf. flashoptim-jax's
    kernel is one for GPUs.
    """
    flash = [name + (PALLAS if platform == "cuda" else XLA) for name in _FLASH]
    if importlib.util.find_spec("flashoptim_jax") is None:
        flash = []
    if leaves == ALL_LEAVES:
        return [OPTAX, *_OWN, *(flash if platform == "cuda" else [])]
    by_xla = [name + XLA for name in (*_OWN, *_FLASH)] if flash else [name + XLA for name in _OWN]
    divided = [CODES + DIVIDED] if platform == "tpu" else []
    return list(dict.fromkeys([OPTAX, *_OWN, *flash, UPDATE, *divided, *by_xla]))
