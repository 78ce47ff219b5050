"""A small convolutional network with batch normalisation in Haiku."""

import json

import haiku as hk
import jax
import jax.numpy as jnp
import optax


def network(images, is_training):
    x = hk.Conv2D(8, 3, 2)(images)
    x = jax.nn.relu(hk.BatchNorm(True, True, 0.9)(x, is_training))
    return hk.Linear(4)(hk.Flatten()(x))


net = hk.without_apply_rng(hk.transform_with_state(network))
labels = jnp.arange(64) % 4
pattern = jax.random.normal(jax.random.key(0), (4, 12, 12, 1))
images = pattern[labels] + jax.random.normal(jax.random.key(1), (64, 12, 12, 1))
params, stats = net.init(jax.random.key(2), images, True)
optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 20, 150))


@jax.jit
def step(params, stats, state):
    def loss_of(params):
        logits, new = net.apply(params, stats, images, True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new

    (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(params, updates), stats, state, loss


state, losses = optimizer.init(params), []
for _ in range(150):
    params, stats, state, loss = step(params, stats, state)
    losses.append(float(loss))
print(json.dumps({"losses": losses}))
