"""Mean-field variational inference: blackjax takes an optax transformation as its optimizer."""

import json

import blackjax
import jax
import jax.numpy as jnp
import optax

x = jax.random.normal(jax.random.key(0), (200, 3))
y = x @ jnp.array([1.0, -2.0, 0.5]) + 0.3 * jax.random.normal(jax.random.key(1), (200,))


def logdensity(position):
    scale = jnp.exp(position["log_scale"])
    error = (y - x @ position["w"]) / scale
    prior = jnp.sum(position["w"] ** 2) + position["log_scale"] ** 2
    return -0.5 * jnp.sum(error**2) - y.size * position["log_scale"] - 0.5 * prior


inference = blackjax.meanfield_vi(logdensity, optax.adam(2e-2), num_samples=20)
state = inference.init({"w": jnp.zeros(3), "log_scale": jnp.zeros(())})
step = jax.jit(inference.step)
losses = []
for key in jax.random.split(jax.random.key(2), 300):
    state, info = step(key, state)
    losses.append(float(info.elbo))
print(json.dumps({"losses": losses}))
