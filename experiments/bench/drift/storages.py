"""What holds the moments from one step to the next: jadam's storages, and others' by formula."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array

import jadam
from experiments.bench.codecs.adam import Betas
from experiments.bench.codecs.candidates import Codec
from experiments.bench.codecs.first_moment import (
    DynamicM,
    Fp8M,
    Rational,
    Relative,
    SoftsignM,
)
from experiments.bench.codecs.judgement import advance, first
from experiments.bench.codecs.second_moment import DynamicV, Fp8V, LinearRoot, LinearV, LogRoot

Rates: TypeAlias = tuple[float, float]
"""b1 and b2."""


class Storage(NamedTuple):
    """A storage and a step of Adam in it, in float32.

    Attributes:
        name: in the tables.
        source: where the code is described.
        start: what is stored before the first step.
        step: from what is stored, the step's number from 1 on and its gradient to what is stored
            after it and the update over the learning rate, m̂/(√v̂ + eps).
        moments: m and v from what is stored after step t.
    """

    name: str
    source: str
    start: Callable[[Array, Rates], Any]
    step: Callable[[Any, Array, Array, Rates, float], tuple[Any, Array]]
    moments: Callable[[Any, Array, Rates], tuple[Array, Array]]


def of_jadam(name: str, **dtypes: str) -> Storage:
    """As a user has it: `jadam.update`, with its kernel where there is one."""

    def step(state: Any, t: Array, g: Array, rates: Rates, eps: float) -> tuple[Any, Array]:
        del t  # the state has its own
        b1, b2 = rates
        # The update is -learning_rate·m̂/(√v̂ + eps).
        u, state = jadam.update(g, state, learning_rate=-1.0, b1=b1, b2=b2, eps=eps)
        return state, u

    def moments(state: Any, t: Array, rates: Rates) -> tuple[Array, Array]:
        del t
        decoded = jadam.moments(state, b1=rates[0], b2=rates[1])
        return decoded.mu.astype(jnp.float32), decoded.nu.astype(jnp.float32)

    return Storage(
        name,
        "jadam",
        lambda like, rates: jadam.init(like, min_size=0, **dtypes),
        step,
        moments,
    )


def by_formula(codec: Codec, source: str) -> Storage:
    """A code of the bench, after exact steps from what it stores."""
    return Storage(
        codec.name,
        source,
        lambda like, rates: first(codec, like, Betas.of(*rates)),
        lambda stored, t, g, rates, eps: advance(codec, stored, t, g, Betas.of(*rates), eps)[:2],
        lambda stored, t, rates: codec.decode(stored, t, Betas.of(*rates)),
    )


FLOAT32 = of_jadam("jadam, float32")
EIGHT_BITS = of_jadam("jadam, 8 bits", mu_dtype="int8", nu_dtype="uint8")
FOUR_BITS = of_jadam("jadam, 4 bits", mu_dtype="int4", nu_dtype="uint4")
NEAREST = by_formula(
    Codec(
        "jadam's codes to nearest",
        Relative(Rational(3), "nearest", levels=63),
        LogRoot(half=256, rounding="nearest"),
    ),
    "the negative control: no dither",
)
STORAGES = (
    FLOAT32,
    of_jadam("jadam, bfloat16", mu_dtype="bfloat16", nu_dtype="bfloat16"),
    of_jadam("jadam, m float16, v bfloat16", mu_dtype="float16", nu_dtype="bfloat16"),
    EIGHT_BITS,
    FOUR_BITS,
    NEAREST,
    by_formula(
        Codec("FlashOptim", SoftsignM(), LinearRoot()),
        "[arXiv 2602.23349](https://arxiv.org/abs/2602.23349), blocks of 32",
    ),
    by_formula(
        Codec("bitsandbytes, torchao 8-bit", DynamicM(), DynamicV()),
        "[arXiv 2110.02861](https://arxiv.org/abs/2110.02861), blocks of 256, and "
        "[torchao's](https://github.com/pytorch/ao/blob/main/torchao/optim/quant_utils.py) "
        "of the same table",
    ),
    by_formula(
        Codec("torchao fp8", Fp8M(256), Fp8V()),
        "[torchao](https://github.com/pytorch/ao/blob/main/torchao/optim/subclass_fp8.py), "
        "e4m3 of m and of v, blocks of 256",
    ),
    by_formula(
        Codec("torchao 4-bit", DynamicM(128, exponents=3), LinearV()),
        "[arXiv 2309.01507](https://arxiv.org/abs/2309.01507), as in "
        "[torchao](https://github.com/pytorch/ao/blob/main/torchao/optim/subclass_4bit.py), "
        "blocks of 128",
    ),
)
