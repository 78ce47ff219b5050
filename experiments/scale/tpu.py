"""What XLA:TPU makes of ZeRO-1 and of a state on the host: `python -m experiments.scale.tpu`.

All is compiled ahead of time for eight v5e chips. That needs libtpu of jax's version, but no TPU.
"""

import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jadam
from experiments.common.chips import ENVIRONMENT, V5E
from experiments.common.report import table, update_readme, write_json
from jadam.sharding import divided, state_shardings, streamed

RESULTS = Path(__file__).parent / "results" / "tpu.json"
README = Path(__file__).parent / "README.md"
LAYERS, WIDTH, HIDDEN, TOKENS = 8, 2048, 8192, 8 * 4096
# A member that only XLA computes: the CPU's kernel, where it is installed, would join leaves.
OPTIMIZER = jadam.radam(1e-3)


def abstract(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def perceptron(mesh: Mesh, sharding: P) -> dict[str, jax.ShapeDtypeStruct]:
    shapes = {"up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    sharding = NamedSharding(mesh, sharding)
    return {
        f"{name} {i}": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
        for i in range(LAYERS)
        for name, shape in shapes.items()
    }


def loss(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    for i in range(LAYERS):
        x = x + jax.nn.relu(x @ params[f"up {i}"]) @ params[f"down {i}"]
    return jnp.mean(x**2)


def collectives_of_zero_1(mesh: Mesh) -> dict[str, list[str]]:
    """The kinds of collectives in the step, and the shapes that they move."""
    params = perceptron(mesh, P())
    tx = OPTIMIZER
    zero, shardings = divided(params, axis="data"), state_shardings(tx, params, axis="data")
    constrain = jax.lax.with_sharding_constraint

    def step(params: Any, state: Any, x: jax.Array) -> Any:
        grads, part = constrain(jax.grad(loss)(params, x), zero), constrain(params, zero)
        updates, state = tx.update(grads, state, part)
        return optax.apply_updates(part, updates), state

    state = abstract(jax.eval_shape(tx.init, params), shardings)
    x = jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    jitted = jax.jit(
        step, donate_argnums=(0, 1), out_shardings=(NamedSharding(mesh, P()), shardings)
    )
    text = jitted.lower(params, state, x).compile().as_text()
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    found: dict[str, set[str]] = {}
    for result, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text):
        # The result of an asynchronous collective begins with its operand.
        found.setdefault(kind, set()).add(re.findall(r"\[([\d,]+)\]", result)[-1])
    return {kind: sorted(shapes) for kind, shapes in sorted(found.items())}


def bytes_of_an_update(mesh: Mesh, where: str) -> dict[str, int]:
    """XLA's plan of an update of sharded parameters: arguments and temporaries on the device."""
    params = perceptron(mesh, P("data"))
    tx = OPTIMIZER
    near = state_shardings(tx, params)
    far = near if where == "device" else state_shardings(tx, params, memory_kind="pinned_host")
    update = streamed(tx, far).update if where == "host, streamed" else tx.update

    def step(params: Any, state: Any, grads: Any) -> Any:
        if where == "host, moved as a whole":
            updates, state = update(grads, jax.device_put(state, near), params)
            state = jax.device_put(state, far)
        else:
            updates, state = update(grads, state, params)
        return optax.apply_updates(params, updates), state

    lies = jax.tree.map(lambda p: p.sharding, params)
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(lies, far))
    state = abstract(jax.eval_shape(tx.init, params), far)
    plan = jitted.lower(params, state, params).compile().memory_analysis()
    return {"arguments": plan.argument_size_in_bytes, "temporary": plan.temp_size_in_bytes}


def markdown(results: dict[str, Any]) -> str:
    columns = ("the state", "arguments on the device [MB]", "temporary [MB]")
    rows = [
        [where, *(f"{plan[kind] / 1e6:.0f}" for kind in ("arguments", "temporary"))]
        for where, plan in results["update"].items()
    ]
    found = "; ".join(f"{kind} of [{'], ['.join(s)}]" for kind, s in results["zero_1"].items())
    return f"{table(columns, rows)}\n\nCollectives in the step with ZeRO-1: {found}."


def main() -> None:
    os.environ.update(ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")
    devices = V5E.devices(8)
    mesh = Mesh(np.array(devices), "data")
    places = ("device", "host, moved as a whole", "host, streamed")
    results = {
        "command": "python -m experiments.scale.tpu",
        "jax": jax.__version__,
        "device": devices[0].device_kind,
        "zero_1": collectives_of_zero_1(mesh),
        "update": {where: bytes_of_an_update(mesh, where) for where in places},
    }
    write_json(RESULTS, results)
    update_readme("tpu", markdown(results), README)


if __name__ == "__main__":
    main()
