"""What is compared: of each setting the parameters' dtype and the optimizer, in one table."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

import jadam
from experiments.common.gpt import is_matrix

Before: TypeAlias = optax.GradientTransformation | None
Build: TypeAlias = Callable[[optax.ScalarOrSchedule, float, Before], optax.GradientTransformation]
"""AdamW from its learning rate, its weight decay and what comes before it: clipping or nothing."""


class Setting(NamedTuple):
    """A row of the tables."""

    param_dtype: str
    build: Build
    package: str = "jadam"

    @property
    def is_installed(self) -> bool:
        """False for a peer that is not here: the tables name it all the same."""
        return find_spec(self.package) is not None


def after(before: Before, adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """A chain of both, or Adam itself, with its `step` if it has one."""
    return adam if before is None else optax.chain(before, adam)


def adamw(**moments: str) -> Build:
    """jadam.adamw with its moments in the given dtypes."""

    def build(
        learning_rate: optax.ScalarOrSchedule, decay: float, before: Before
    ) -> optax.GradientTransformation:
        adam = jadam.adamw(learning_rate, weight_decay=decay, mask=is_matrix, **moments)
        return after(before, adam)

    return build


def compensated(build: Build) -> Build:
    """bfloat16 parameters with an int8 residual each; the chain inside sees float32."""
    return lambda *args: jadam.compensated_weights(build(*args))


def stochastic(build: Build) -> Build:
    """bfloat16 parameters, rounded stochastically; the chain inside sees float32."""
    return lambda *args: jadam.stochastic_rounding(build(*args))


def optax_adamw(
    learning_rate: optax.ScalarOrSchedule, decay: float, before: Before
) -> optax.GradientTransformation:
    """The float32 peer."""
    return after(before, optax.adamw(learning_rate, weight_decay=decay, mask=is_matrix))


def flash_adamw(
    learning_rate: optax.ScalarOrSchedule, decay: float, before: Before
) -> optax.GradientTransformation:
    """The 7-byte peer, as a transformation; not fused, since its kernels are for GPUs."""
    from flashoptim_jax import flash_adamw

    undecayed = {
        "params": lambda path, leaf: leaf.ndim < 2 or path[-1] == "scale",
        "weight_decay": 0.0,
    }
    flash = flash_adamw(learning_rate, weight_decay=decay, fused=False, param_groups=[undecayed])

    def update(
        grads: PyTree, state: optax.OptState, params: PyTree = None
    ) -> tuple[PyTree, optax.OptState]:
        new, state = flash.step(params, state, grads)
        # In float32, so that apply_updates turns the difference into `new` again.
        new, old = in_dtype(new, "float32"), in_dtype(params, "float32")
        return jax.tree.map(jnp.subtract, new, old), state

    return after(before, optax.GradientTransformation(flash.init, update))


def in_dtype(params: PyTree, dtype: str) -> PyTree:
    """All parameters in one dtype."""
    return jax.tree.map(lambda p: p.astype(dtype), params)


MOMENTS_8 = {"mu_dtype": "int8", "nu_dtype": "uint8"}
MOMENTS_4 = {"mu_dtype": "int4", "nu_dtype": "uint4"}
MOMENTS_16 = {"mu_dtype": "bfloat16", "nu_dtype": "bfloat16"}

REFERENCE = "float32"
SETTINGS = {
    REFERENCE: Setting("float32", adamw()),
    "bf16 moments": Setting("float32", adamw(**MOMENTS_16)),
    "8-bit moments": Setting("float32", adamw(**MOMENTS_8)),
    "4-bit moments": Setting("float32", adamw(**MOMENTS_4)),
    "bf16 weights, compensated": Setting("bfloat16", compensated(adamw())),
    "bf16 weights, compensated + 8-bit moments": Setting(
        "bfloat16", compensated(adamw(**MOMENTS_8))
    ),
    "bf16 weights, compensated + 4-bit moments": Setting(
        "bfloat16", compensated(adamw(**MOMENTS_4))
    ),
    "bf16 weights, stochastic": Setting("bfloat16", stochastic(adamw())),
    "bf16 weights, stochastic + 4-bit moments": Setting("bfloat16", stochastic(adamw(**MOMENTS_4))),
    "bf16 weights, plain": Setting("bfloat16", adamw()),
    "optax.adamw float32": Setting("float32", optax_adamw),
    "flashoptim-jax": Setting("bfloat16", flash_adamw, package="flashoptim_jax"),
}
