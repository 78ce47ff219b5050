"""`model.fit` of Keras 3 on JAX, with an optax transformation as its optimizer: 25 lines."""

import json
import os

os.environ["KERAS_BACKEND"] = "jax"

import jax
import keras
import numpy as np
import optax


class Optax(keras.optimizers.Optimizer):
    """An optax transformation as a Keras optimizer; the learning rate is the transformation's."""

    def __init__(self, transformation, **options):
        super().__init__(learning_rate=1.0, **options)
        self.transformation = transformation

    def build(self, variables):
        super().build(variables)
        leaves, self._structure = jax.tree.flatten(
            self.transformation.init([v.value for v in variables])
        )
        # A Keras variable is a number or an array; its initializer is called with shape and dtype.
        self._leaves = [
            self.add_variable(x.shape, lambda *_, x=x, **__: x, dtype=x.dtype.name, name=f"leaf{i}")
            for i, x in enumerate(leaves)
        ]

    def _backend_update_step(self, grads, variables, learning_rate):
        state = self._structure.unflatten([leaf.value for leaf in self._leaves])
        params = [v.value for v in variables]
        updates, state = self.transformation.update(list(grads), state, params)
        for v, p in zip(variables, optax.apply_updates(params, updates), strict=True):
            v.assign(p)
        for leaf, x in zip(self._leaves, jax.tree.leaves(state), strict=True):
            leaf.assign(x)


keras.utils.set_random_seed(0)
rng = np.random.default_rng(0)
x = rng.standard_normal((512, 20)).astype("float32")
y = (x @ rng.standard_normal(20) > 0).astype("int32")
layers = [keras.layers.Dense(64, "relu"), keras.layers.BatchNormalization(), keras.layers.Dense(2)]
model = keras.Sequential([keras.Input((20,)), *layers])
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
optimizer = Optax(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)))
model.compile(optimizer, loss)
history = model.fit(x, y, batch_size=64, epochs=8, verbose=0, shuffle=False)
print(json.dumps({"losses": history.history["loss"]}))
