"""The loop of Equinox's documentation: model, state and transformation go into `filter_jit`."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

model = eqx.nn.MLP(2, "scalar", 32, 2, key=jax.random.key(0))
x = jax.random.normal(jax.random.key(1), (256, 2))
y = jnp.sin(3 * x[:, 0]) * x[:, 1]
optimizer = optax.adamw(optax.cosine_decay_schedule(1e-2, 200), weight_decay=1e-3)
state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))


@eqx.filter_value_and_grad
def loss_of(model, x, y):
    return jnp.mean((jax.vmap(model)(x) - y) ** 2)


@eqx.filter_jit
def make_step(model, state, x, y, optimizer):
    loss, grads = loss_of(model, x, y)
    params = eqx.filter(model, eqx.is_inexact_array)
    updates, state = optimizer.update(grads, state, params)
    return eqx.apply_updates(model, updates), state, loss


losses = []
for _ in range(200):
    model, state, loss = make_step(model, state, x, y, optimizer)
    losses.append(float(loss))
print(json.dumps({"losses": losses}))
