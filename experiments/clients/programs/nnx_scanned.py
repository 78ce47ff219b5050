"""Flax NNX: scanned layers with sharding metadata over 8 devices, and `nnx.Optimizer`."""

import json

import jax
import jax.numpy as jnp
import optax
from flax import nnx

mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def named(*axes):
    return nnx.with_partitioning(nnx.initializers.lecun_normal(), axes)


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(64, 256, kernel_init=named(None, "model"), rngs=rngs)
        self.down = nnx.Linear(256, 64, kernel_init=named("model", None), rngs=rngs)
        self.norm = nnx.LayerNorm(64, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class Model(nnx.Module):
    def __init__(self, rngs):
        axes = nnx.StateAxes({nnx.Param: 0, ...: None})
        metadata = {nnx.PARTITION_NAME: None}

        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=axes, transform_metadata=metadata)
        def layers(rngs):
            return Layer(rngs)

        self.layers = layers(rngs)
        self.out = nnx.Linear(64, 1, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def through(layer, x):
            return layer(x)

        return self.out(through(self.layers, x))


@nnx.jit
def step(model, optimizer, x, y):
    loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - y) ** 2))(model)
    optimizer.update(model, grads)
    return loss


with jax.set_mesh(mesh):
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3, weight_decay=0.1), wrt=nnx.Param)
    x = jax.device_put(jax.random.normal(jax.random.key(1), (64, 64)), jax.P("data"))
    losses = [float(step(model, optimizer, x, jnp.sin(x[:, :1]))) for _ in range(100)]
print(json.dumps({"losses": losses}))
