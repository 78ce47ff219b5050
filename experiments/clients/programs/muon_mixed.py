"""`optax.contrib.muon`: matrices by Muon, and the Adam inside it for all other parameters."""

import json

import jax
import jax.numpy as jnp
import optax
import optax.contrib

keys = jax.random.split(jax.random.key(0), 4)
params = {
    "in": {"kernel": jax.random.normal(keys[0], (16, 64)) / 4, "bias": jnp.zeros(64)},
    "out": {"kernel": jax.random.normal(keys[1], (64, 4)) / 8, "bias": jnp.zeros(4)},
    "scale": jnp.ones(4),
}
x = jax.random.normal(keys[2], (128, 16))
y = jnp.sin(x @ jax.random.normal(keys[3], (16, 4)))
optimizer = optax.contrib.muon(2e-2, adam_weight_decay=1e-3, adam_b2=0.99)


@jax.jit
def step(params, state):
    def loss_of(params):
        h = jax.nn.gelu(x @ params["in"]["kernel"] + params["in"]["bias"])
        out = (h @ params["out"]["kernel"] + params["out"]["bias"]) * params["scale"]
        return jnp.mean((out - y) ** 2)

    loss, grads = jax.value_and_grad(loss_of)(params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


state, losses = optimizer.init(params), []
for _ in range(150):
    params, state, loss = step(params, state)
    losses.append(float(loss))
print(json.dumps({"losses": losses}))
