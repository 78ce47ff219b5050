"""Flax NNX: low-rank adapters alone are trained, `nnx.Optimizer(..., wrt=nnx.LoRAParam)`."""

import json

import jax
import jax.numpy as jnp
import optax
from flax import nnx


class Model(nnx.Module):
    def __init__(self, rngs):
        base = nnx.Linear(128, 128, rngs=rngs)
        self.hidden = nnx.LoRA(128, 8, 128, base_module=base, rngs=rngs)
        self.out = nnx.LoRALinear(128, 16, lora_rank=4, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))


@nnx.jit
def step(model, optimizer, x, y):
    adapters = nnx.DiffState(0, nnx.LoRAParam)
    loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - y) ** 2), argnums=adapters)(
        model
    )
    optimizer.update(model, grads)
    return loss


model = Model(nnx.Rngs(0))
frozen = jax.tree.map(jnp.copy, nnx.state(model, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))))
schedule = optax.linear_schedule(1e-2, 1e-3, 100)
optimizer = nnx.Optimizer(model, optax.nadam(schedule), wrt=nnx.LoRAParam)
x = jax.random.normal(jax.random.key(1), (64, 128))
losses = [float(step(model, optimizer, x, jnp.cos(x[:, :16]))) for _ in range(100)]
after = nnx.state(model, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)))
assert all(map(jnp.array_equal, jax.tree.leaves(frozen), jax.tree.leaves(after)))
print(json.dumps({"losses": losses}))
