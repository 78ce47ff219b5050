"""MaxText's optimizer factory, with masks, frozen parameters and steps skipped on spikes."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import optax
from maxtext.optimizers.optimizers import get_optimizer

config = SimpleNamespace(
    opt_type="adamw",
    adam_b1=0.9,
    adam_b2=0.95,
    adam_eps=1e-8,
    adam_eps_root=0.0,
    adam_weight_decay=0.1,
    mu_dtype=jnp.float32,
    adamw_mask=["bias", "scale"],
    skip_step_on_spikes=True,
    skip_step_interval=20,
    skip_step_scaling_factor=6.0,
    trainable_parameters_mask=["decoder"],
)
keys = jax.random.split(jax.random.key(0), 4)
params = {
    "embedder": {"table": jax.random.normal(keys[0], (32, 128)) / 8},
    "decoder": {
        "wi": jax.random.normal(keys[1], (128, 512)) / 12,
        "wo": jax.random.normal(keys[2], (512, 128)) / 24,
        "bias": jnp.zeros(32),
        "scale": jnp.ones(128),
    },
}
tokens = jax.random.randint(keys[3], (64,), 0, 32)
optimizer = get_optimizer(config, optax.warmup_cosine_decay_schedule(0.0, 5e-3, 10, 100))


@jax.jit
def step(params, state):
    def loss_of(params):
        table, d = params["embedder"]["table"], params["decoder"]
        x = table[tokens] * d["scale"]
        x += jax.nn.gelu(x @ d["wi"]) @ d["wo"]
        logits = x @ table.T + d["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, (5 * tokens) % 32).mean()

    loss, grads = jax.value_and_grad(loss_of)(params)
    norm = optax.global_norm(grads)
    updates, state = optimizer.update(grads, state, params, loss=loss, grad_norm=norm)
    return optax.apply_updates(params, updates), state, loss


state, losses = optimizer.init(params), []
for _ in range(100):
    params, state, loss = step(params, state)
    losses.append(float(loss))
print(json.dumps({"losses": losses}))
