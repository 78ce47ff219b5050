"""The steps in JAX that are compared, by name, and the workloads that each is timed on."""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jadam
from experiments.bench.ahead.programs import (
    BF16,
    BITS_4,
    BITS_8,
    BITS_16,
    OPTIONS,
    Program,
    adamw,
    compensated,
    flashoptim,
    in_two,
    stochastic,
)
from experiments.bench.workloads import (
    GPT2,
    LLAMA3_LAYER,
    MANY_LEAVES,
    ONE_LEAF,
    TINY_LEAVES,
    WORKLOADS,
    Workload,
)


def _flashoptim(dtype: Any, bits: int | None) -> Program:
    # Its kernel is for GPUs.
    return flashoptim(dtype, bits, fused=jax.default_backend() == "gpu")


OPTAX, FLOAT32, CODES = "optax float32", "jadam float32", "jadam 8-bit moments"
BF16_MOMENTS = "jadam bf16 weights and moments"
COMPENSATED, SMALLER = "jadam compensated bf16 weights", "jadam 7 bytes: compensated, 8-bit"
FEWER_CODES, SMALLEST = "jadam 4-bit moments", "jadam 5 bytes: stochastic, 4-bit"
UPDATE = "jadam float32, update"
FLASH, FLASH_BF16 = "flashoptim-jax 8-bit", "flashoptim-jax 8-bit, bf16 weights"
XLA = ", XLA's form"

_OWN: dict[str, Callable[..., Program]] = {
    FLOAT32: adamw,
    BF16_MOMENTS: partial(adamw, BF16, **BITS_16),
    CODES: partial(adamw, **BITS_8),
    COMPENSATED: compensated,
    SMALLER: partial(compensated, **BITS_8),
    FEWER_CODES: partial(adamw, **BITS_4),
    SMALLEST: partial(stochastic, **BITS_4),
}
_CODES = (CODES, SMALLER, FEWER_CODES, SMALLEST)
PROGRAMS: dict[str, Callable[[], Program]] = {
    **_OWN,
    UPDATE: lambda: in_two(jadam.adamw(**OPTIONS)),
    OPTAX: lambda: in_two(optax.adamw(**OPTIONS)),
    **{name + XLA: partial(make, kernel="xla") for name, make in _OWN.items()},
    FLASH: partial(_flashoptim, jnp.float32, None),
    FLASH_BF16: partial(_flashoptim, BF16, 24),
}

BASIC = (*_OWN, OPTAX)
PEERS = (FLASH, FLASH_BF16)
IN_XLA = tuple(name + XLA for name in _OWN)
(ONE_BILLION,) = (workload for workload in WORKLOADS if workload.gpu_only)
TIMED: tuple[tuple[Workload, tuple[str, ...]], ...] = (
    (ONE_LEAF, (*BASIC, UPDATE, *PEERS, *IN_XLA)),
    # Of flashoptim-jax for bf16 weights XLA compiles a kernel a leaf, for longer than there is.
    (GPT2, (*BASIC, UPDATE, FLASH)),
    (LLAMA3_LAYER, (*BASIC, *PEERS)),
    (MANY_LEAVES, BASIC),
    # Leaves of 2,000 are too small for codes.
    (TINY_LEAVES, (FLOAT32, BF16_MOMENTS, OPTAX)),
    (ONE_BILLION, (*BASIC, *PEERS)),
)
TINY_TIMED: tuple[tuple[Workload, tuple[str, ...]], ...] = (
    (Workload("20 leaves of 64 x 64", ((64, 64),) * 20), (FLOAT32, SMALLEST, OPTAX)),
)
LATENCIES = (OPTAX, FLOAT32, CODES, SMALLER, SMALLEST)
"""Of these a user's first step is timed, on GPT-2."""
MEMORY = LATENCIES


def why_not(name: str, leaves: int) -> str | None:
    """Why a program is not compiled for so many leaves, if it is not."""
    if name in PEERS and importlib.util.find_spec("flashoptim_jax") is None:
        return "not installed"
    in_xla = name.endswith(XLA) or jadam.kernels()[jax.default_backend()].startswith("xla")
    if in_xla and leaves > 20 and name.removesuffix(XLA) in _CODES:
        return "XLA's form of codes compiles for minutes"
    return None
