"""Flax Linen: a small transformer in scanned layers, `TrainState`, logical axes over 8 devices."""

import json

import flax.linen as nn
import jax
import optax
from flax.training.train_state import TrainState

RULES = [("embed", None), ("mlp", "model"), ("words", "model"), ("layers", None)]
mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
tokens = jax.random.randint(jax.random.key(0), (16, 33), 0, 128) // 3 * 3


def named(*axes):
    return nn.with_logical_partitioning(nn.initializers.normal(0.05), axes)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        x += nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x), mask=mask)
        y = nn.Dense(256, kernel_init=named("embed", "mlp"))(nn.LayerNorm()(x))
        return x + nn.Dense(64, kernel_init=named("mlp", "embed"))(nn.gelu(y)), None


class Model(nn.Module):
    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(128, 64, embedding_init=named("words", "embed"))
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=2,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = layers()(table(ids), nn.make_causal_mask(ids))
        return table.attend(nn.LayerNorm()(x))


def create():
    variables = Model().init(jax.random.key(1), tokens[:, :-1])
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3, weight_decay=0.1))
    return TrainState.create(apply_fn=Model().apply, params=variables["params"], tx=tx)


@jax.jit
def step(state, tokens):
    def loss_of(params):
        logits = state.apply_fn({"params": params}, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    return state.apply_gradients(grads=grads), loss


specs = nn.get_partition_spec(jax.eval_shape(create))
state = jax.jit(create, out_shardings=nn.logical_to_mesh_sharding(specs, mesh, RULES))()
losses = []
for _ in range(60):
    state, loss = step(state, tokens)
    losses.append(float(loss))
print(json.dumps({"losses": losses}))
