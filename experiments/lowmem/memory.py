"""Bytes a parameter, measured on the language model's parameters."""

from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import PyTree

import jadam
from experiments.common.gpt import GPT, Shape

from .settings import Setting, in_dtype


def measure(setting: Setting, shape: Shape) -> dict[str, float]:
    """Bytes a parameter of one optimizer step whose parameters and state are donated.

    It is `step` where there is one, else `update` and `optax.apply_updates`.

    `weights`, `gradient` and `state` are the buffers on the device after a step, `live` their sum.
    Two figures are from XLA's plan of the compiled step: `temporary`, what it allocates besides,
    and `in_place`, how much of weights and state it writes to where it was read from.
    """
    model = GPT(shape, rngs=nnx.Rngs(0))
    params = in_dtype(nnx.to_pure_dict(nnx.state(model, nnx.Param)), setting.param_dtype)
    grads = jax.tree.map(lambda p: jnp.full_like(p, 1e-3), params)
    optimizer = setting.build(1e-3, 0.1, None)
    state = optimizer.init(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: PyTree, state: optax.OptState, grads: PyTree) -> tuple[PyTree, optax.OptState]:
        if isinstance(optimizer, jadam.FusedTransformation):
            return optimizer.step(grads, state, params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = step.lower(params, state, grads).compile()
    plan = compiled.memory_analysis()
    params, state = compiled(params, state, grads)
    count = sum(p.size for p in jax.tree.leaves(params))
    parts = {"weights": params, "gradient": grads, "state": state}
    sizes = {
        name: sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / count
        for name, tree in parts.items()
    }
    return {
        **sizes,
        "live": sum(sizes.values()),
        "temporary": plan.temp_size_in_bytes / count,
        "in_place": plan.alias_size_in_bytes / count,
        "parameters": count,
    }
