"""What XLA needs for a train step, plain and released: `python -m experiments.scale.release`.

Compiled ahead of time for one chip, which needs what compiles for it but not the chip.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jadam
from experiments.common.chips import CHIPS, ENVIRONMENT
from experiments.common.report import table, update_readme, write_json
from jadam.sharding import state_shardings, streamed

RESULTS = Path(__file__).parent / "results" / "release.json"
README = Path(__file__).parent / "README.md"
TOKENS, HEAD = 512, 64


class Model(NamedTuple):
    """Layers whose parameters are stacked. With few words, which are no part of it, it is all."""

    layers: int
    width: int
    hidden: int
    gated: bool = False
    words: int = 128


MODELS = {
    "24 layers of GPT-2 medium": Model(24, 1024, 4096),
    "8 layers of Llama 3.2 1B": Model(8, 2048, 8192, gated=True),
}
FLOAT32, EIGHT_BITS = jadam.adamw(1e-3), jadam.adamw(1e-3, mu_dtype="int8", nu_dtype="uint8")
FOUR_BITS = jadam.adamw(1e-3, mu_dtype="int4", nu_dtype="uint4")
THREE_BYTES = jadam.stochastic_rounding(FOUR_BITS)
FIVE_BYTES = jadam.compensated_weights(EIGHT_BITS)


class Setting(NamedTuple):
    """The parameters' dtype, the optimizer, and how the step is made."""

    dtype: Any
    tx: Any
    released: bool = False
    on_host: bool = False
    stacked: bool = True


SETTINGS = {
    "optax.adamw float32": Setting(jnp.float32, optax.adamw(1e-3)),
    "flashoptim-jax": Setting(jnp.bfloat16, None),
    "float32": Setting(jnp.float32, FLOAT32),
    "float32, layers not stacked": Setting(jnp.float32, FLOAT32, stacked=False),
    "float32, released": Setting(jnp.float32, FLOAT32, released=True),
    "compensated + 8-bit": Setting(jnp.bfloat16, FIVE_BYTES),
    "compensated + 8-bit, released": Setting(jnp.bfloat16, FIVE_BYTES, released=True),
    "stochastic + 4-bit, released": Setting(jnp.bfloat16, THREE_BYTES, released=True),
    "float32, state on the host": Setting(jnp.float32, FLOAT32, on_host=True),
    "float32, state on the host, released": Setting(jnp.float32, FLOAT32, True, True),
    "8-bit moments, state on the host, released": Setting(jnp.float32, EIGHT_BITS, True, True),
}


def parameters(model: Model, dtype: Any) -> dict[str, Any]:
    layers, width, hidden = model.layers, model.width, model.hidden
    keys = width // 4 if model.gated else width  # Llama's groups of heads share keys and values
    shapes = {
        "qkv": (layers, width, width + 2 * keys),
        "out": (layers, width, width),
        "up": (layers, width, hidden),
        "down": (layers, hidden, width),
    }
    shapes |= {"gate": (layers, width, hidden)} if model.gated else {}
    stack = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}
    return {"words": jax.ShapeDtypeStruct((model.words, width), dtype), "layers": stack}


def unstacked(tree: dict[str, Any], layers: int) -> dict[str, Any]:
    """The parameters with a leaf for each layer's part of a stack."""
    parts = {k: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for k, x in tree["layers"].items()}
    return tree | {"layers": [parts] * layers}


def layer(x: jax.Array, p: dict[str, jax.Array]) -> tuple[jax.Array, None]:
    p = jax.tree.map(lambda p: p.astype(jnp.bfloat16), p)
    width, columns = p["qkv"].shape
    cuts = (width, (width + columns) // 2)
    q, k, v = jnp.split(jax.nn.standardize(x) @ p["qkv"], cuts, axis=1)
    q, k, v = (x.reshape(TOKENS, -1, HEAD) for x in (q, k, v))
    attention = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = x + attention.reshape(x.shape) @ p["out"]
    y = jax.nn.standardize(x)
    gate = jax.nn.silu(y @ p["gate"]) if "gate" in p else 1
    hidden = gate * (y @ p["up"]) if "gate" in p else jax.nn.gelu(y @ p["up"])
    return x + hidden @ p["down"], None


def from_words(params: dict[str, Any], x: jax.Array, text: jax.Array) -> jax.Array:
    layers, again = params["layers"], jax.checkpoint(layer)
    if isinstance(layers, list):
        for p in layers:
            x, _ = again(x, p)
    else:
        x, _ = jadam.release.scan(again, x, layers)
    logits = (x @ params["words"].astype(jnp.bfloat16).T).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, text).mean()


def loss(params: dict[str, Any], text: jax.Array) -> jax.Array:
    return from_words(params, params["words"].astype(jnp.bfloat16)[text], text)


def plain(tx: Any) -> Callable[..., Any]:
    def step(params: Any, state: Any, text: jax.Array) -> Any:
        value, grads = jax.value_and_grad(loss)(params, text)
        if isinstance(tx, jadam.FusedTransformation):
            return *tx.step(grads, state, params), value
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def peer(flash: Any) -> Callable[..., Any]:
    def step(params: Any, state: Any, text: jax.Array) -> Any:
        value, grads = jax.value_and_grad(loss)(params, text)
        return *flash.step(params, state, grads), value

    return step


def lying(tree: Any, place: Any) -> Any:
    places = place if jax.tree.structure(place) == jax.tree.structure(tree) else None
    if places is None:
        places = jax.tree.map(lambda _: place, tree)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, places
    )


def activations(model: Model, place: NamedSharding) -> float:
    """What both passes need in bytes a parameter: of bfloat16 parameters without gradients."""
    params = parameters(model, jnp.bfloat16)
    x = jax.ShapeDtypeStruct((TOKENS, model.width), jnp.bfloat16)
    text = jax.ShapeDtypeStruct((TOKENS,), jnp.int32)
    arguments = lying((params, x, text), place)
    compiled = jax.jit(jax.grad(from_words, 1)).lower(*arguments).compile()
    plan = compiled.memory_analysis()
    size = plan.peak_memory_in_bytes - plan.argument_size_in_bytes
    return round(size / sum(p.size for p in jax.tree.leaves(params)), 3)


def measured(model: Model, setting: Setting, place: NamedSharding) -> dict[str, float]:
    """Bytes a parameter: what lies there before and after the step, and the peak in it."""
    params, tx = parameters(model, setting.dtype), setting.tx
    if not setting.stacked:
        params = unstacked(params, model.layers)
    if tx is None:
        from flashoptim_jax import flash_adamw

        flash = flash_adamw(1e-3, fused=False)  # its kernels are for GPUs
        step = peer(flash)
        state = jax.eval_shape(flash.init, params)
    else:
        step, state = plain(tx), jax.eval_shape(tx.init, params)
    near = jax.tree.map(lambda _: place, params)
    text = jax.ShapeDtypeStruct((TOKENS,), jnp.int32)
    home = jax.tree.map(lambda _: place, state)
    if setting.on_host:
        home = state_shardings(tx, lying(params, near), memory_kind="pinned_host")
    if setting.released:
        # The words are not released: their state may stay on the device.
        home = jax.tree_util.tree_map_with_path(
            lambda path, s: s if "layers" in jax.tree_util.keystr(path) else place, home
        )
        step = jadam.release.train_step(loss, tx)
    elif setting.on_host:
        step = plain(streamed(tx, home))
    arguments = lying(params, near), lying(state, home), lying(text, place)
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(near, home, place))
    plan = jitted.lower(*arguments).compile().memory_analysis()
    count = sum(p.size for p in jax.tree.leaves(params))
    # XLA's own peak counts what lies on the host as well.
    peak = plan.argument_size_in_bytes + plan.temp_size_in_bytes
    sizes = {
        "arguments": plan.argument_size_in_bytes,
        "host": plan.host_argument_size_in_bytes,
        "temporary": plan.temp_size_in_bytes,
        "peak": peak if setting.on_host else plan.peak_memory_in_bytes,
    }
    return {name: round(size / count, 3) for name, size in sizes.items()}


def markdown(results: dict[str, Any]) -> str:
    columns = ("AdamW", "parameters and state", "on the host", "peak", "without passes")
    tables = []
    for chip, found in results["chips"].items():
        for model, row in found["rows"].items():
            rows = []
            for setting in (setting for setting in SETTINGS if setting in row):
                sizes, passes = row[setting], found["activations"][model]
                kept = [sizes["arguments"], sizes["host"], sizes["peak"], sizes["peak"] - passes]
                rows.append([setting, *(f"{size:.2f}" for size in kept)])
            tables.append(f"{model} on one {CHIPS[chip].name}:\n\n{table(columns, rows)}")
    return "\n\n".join(tables)


def main(
    chip: str = "v5e",
    models: tuple[str, ...] = tuple(MODELS),
    settings: tuple[str, ...] = tuple(SETTINGS),
    out: Path = RESULTS,
) -> None:
    """Measures these rows, and keeps the others that the results have of this version of jax.

    XLA:GPU's account does not tell the host's memory from the device's, so there are no rows of it.
    """
    os.environ.update(ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")
    place = NamedSharding(Mesh(np.array(CHIPS[chip].devices()), "data"), P())
    results: dict[str, Any] = {
        "command": "python -m experiments.scale.release",
        "jax": jax.__version__,
        "chips": {},
    }
    before = json.loads(out.read_text()) if out.exists() else {}
    if before.get("jax") == jax.__version__:
        results |= before
    found = results["chips"].setdefault(chip, {"activations": {}, "rows": {}})
    for name in models:
        if name not in found["activations"]:
            found["activations"][name] = activations(MODELS[name], place)
        row = found["rows"].setdefault(name, {})
        for setting in settings:
            if SETTINGS[setting].on_host and CHIPS[chip].platform == "cuda":
                continue
            row[setting] = measured(MODELS[name], SETTINGS[setting], place)
            write_json(out, results)
    if out == RESULTS:
        update_readme("release", markdown(results), README)


if __name__ == "__main__":
    tyro.cli(main)
