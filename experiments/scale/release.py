"""What XLA:TPU needs for a train step, plain and released: `python -m experiments.scale.release`.

Compiled ahead of time for one v5e chip, which needs libtpu but no TPU.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jadam
from experiments.common.report import table, update_readme, write_json

from .tpu import NO_CLOUD

RESULTS = Path(__file__).parent / "results" / "release.json"
README = Path(__file__).parent / "README.md"
TOKENS, HEAD = 512, 64
# Layers, width and words. With few words, which are no part of the stack, it is nearly all.
MODELS = {"24 layers of GPT-2 medium": (24, 1024, 128)}
EIGHT_BITS = jadam.compensated_weights(jadam.adamw(1e-3, mu_dtype="int8", nu_dtype="uint8"))
SETTINGS: dict[str, tuple[Any, Any, bool]] = {
    "optax.adamw float32": (jnp.float32, optax.adamw(1e-3), False),
    "float32": (jnp.float32, jadam.adamw(1e-3), False),
    "float32, released": (jnp.float32, jadam.adamw(1e-3), True),
    "compensated + 8-bit": (jnp.bfloat16, EIGHT_BITS, False),
    "compensated + 8-bit, released": (jnp.bfloat16, EIGHT_BITS, True),
}


def parameters(layers: int, width: int, words: int, dtype: Any) -> dict[str, Any]:
    shapes = {
        "qkv": (layers, width, 3 * width),
        "out": (layers, width, width),
        "up": (layers, width, 4 * width),
        "down": (layers, 4 * width, width),
    }
    stack = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}
    return {"words": jax.ShapeDtypeStruct((words, width), dtype), "layers": stack}


def layer(x: jax.Array, p: dict[str, jax.Array]) -> tuple[jax.Array, None]:
    p = jax.tree.map(lambda p: p.astype(jnp.bfloat16), p)
    qkv = (jax.nn.standardize(x) @ p["qkv"]).reshape(TOKENS, 3, -1, HEAD)
    attention = jax.nn.dot_product_attention(qkv[:, 0], qkv[:, 1], qkv[:, 2], is_causal=True)
    x = x + attention.reshape(x.shape) @ p["out"]
    return x + jax.nn.gelu(jax.nn.standardize(x) @ p["up"]) @ p["down"], None


def loss(params: dict[str, Any], text: jax.Array) -> jax.Array:
    x = params["words"].astype(jnp.bfloat16)[text]
    x, _ = jadam.release.scan(jax.checkpoint(layer), x, params["layers"])
    logits = (x @ params["words"].astype(jnp.bfloat16).T).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, text).mean()


def plain(tx: Any) -> Callable[..., Any]:
    def step(params: Any, state: Any, text: jax.Array) -> Any:
        value, grads = jax.value_and_grad(loss)(params, text)
        if isinstance(tx, jadam.FusedTransformation):
            return *tx.step(grads, state, params), value
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def measured(model: str, setting: str, place: NamedSharding) -> dict[str, float]:
    """Bytes a parameter: what lies there before and after the step, and the peak in it."""
    dtype, tx, released = SETTINGS[setting]
    params = parameters(*MODELS[model], dtype)
    step = jadam.release.train_step(loss, tx) if released else plain(tx)
    arguments = (params, jax.eval_shape(tx.init, params), jax.ShapeDtypeStruct((TOKENS,), "int32"))
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments
    )
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()
    plan = compiled.memory_analysis()
    count = sum(p.size for p in jax.tree.leaves(params))
    sizes = {
        "arguments": plan.argument_size_in_bytes,
        "temporary": plan.temp_size_in_bytes,
        "peak": plan.peak_memory_in_bytes,
    }
    return {name: round(size / count, 3) for name, size in sizes.items()}


def markdown(results: dict[str, Any]) -> str:
    columns = ("model", "AdamW", "parameters and state", "temporary", "peak")
    rows = [
        [model, setting, *(f"{size:.2f}" for size in sizes.values())]
        for model, row in results["rows"].items()
        for setting, sizes in row.items()
    ]
    return table(columns, rows)


def main() -> None:
    os.environ.update(NO_CLOUD)
    jax.config.update("jax_platforms", "cpu")
    topology = topologies.get_topology_desc("v5e:2x4", "tpu")
    place = NamedSharding(Mesh(np.array(topology.devices)[:1], "data"), P())
    results = {
        "command": "python -m experiments.scale.release",
        "jax": jax.__version__,
        "device": topology.devices[0].device_kind,
        "rows": {
            model: {setting: measured(model, setting, place) for setting in SETTINGS}
            for model in MODELS
        },
    }
    write_json(RESULTS, results)
    update_readme("release", markdown(results), README)


if __name__ == "__main__":
    main()
