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
BITS_16: dict[str, Any] = {"mu_dtype": "bfloat16", "nu_dtype": "bfloat16"}
BF16 = jnp.bfloat16


class Program(NamedTuple):
    """A step to compile.

    Attributes:
        tx: the transformation.
        step: `(params, state, grads) -> (params, state)`.
        dtype: of parameters and gradients.
    """

    tx: Any
    step: Callable[..., tuple[Any, Any]]
    dtype: Any


def _fused(tx: Any, dtype: Any = jnp.float32) -> Program:
    return Program(tx, lambda params, state, grads: tx.step(grads, state, params), dtype)


def _in_two(tx: Any) -> Program:
    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return Program(tx, step, jnp.float32)


def _jadam(**options: Any) -> Program:
    return _fused(jadam.adamw(**OPTIONS, **options))


def _compensated(**options: Any) -> Program:
    return _fused(jadam.compensated_weights(jadam.adamw(**OPTIONS, **options)), BF16)


def _flashoptim(dtype: Any, bits: int | None, *, fused: bool) -> Program:
    from flashoptim_jax import flash_adamw

    tx: Any = flash_adamw(**OPTIONS, master_weight_bits=bits, fused=fused)
    return Program(tx, tx.step, dtype)


OPTAX, FLOAT32, BF16_MOMENTS = "optax", "jadam float32", "jadam bf16 moments"
CODES, COMPENSATED = "jadam 8-bit moments", "jadam compensated bf16 weights"
SMALLEST = "jadam 7 bytes: compensated, 8-bit"
UPDATE = f"{CODES}, update"
FLASH, FLASH_BF16 = "flashoptim-jax 8-bit", "flashoptim-jax 8-bit, bf16 weights"
XLA, PALLAS = ", XLA's form", ", its kernel"

_OWN: dict[str, Callable[..., Program]] = {
    FLOAT32: _jadam,
    BF16_MOMENTS: partial(_jadam, **BITS_16),
    CODES: partial(_jadam, **BITS_8),
    COMPENSATED: _compensated,
    SMALLEST: partial(_compensated, **BITS_8),
}
_FLASH = {FLASH: (jnp.float32, None), FLASH_BF16: (BF16, 24)}
PROGRAMS: dict[str, Callable[[], Program]] = {
    OPTAX: lambda: _in_two(optax.adamw(**OPTIONS)),
    **_OWN,
    UPDATE: lambda: _in_two(jadam.adamw(**OPTIONS, **BITS_8)),
    **{name + XLA: partial(make, kernel="xla") for name, make in _OWN.items()},
    **{name + PALLAS: partial(_flashoptim, *how, fused=True) for name, how in _FLASH.items()},
    **{name + XLA: partial(_flashoptim, *how, fused=False) for name, how in _FLASH.items()},
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
    return list(dict.fromkeys([OPTAX, *_OWN, *flash, UPDATE, *by_xla]))
