"""What XLA:TPU makes of a step, without a TPU: `python -m experiments.bench.ahead`.

All is compiled ahead of time for one chip, which needs libtpu of jax's version. Bytes are those
that XLA counts for the program, copies and padding included, over the least: each array that a
step takes is read once, each that it returns written once. Of a kernel in Pallas XLA knows what the
kernel says, which is its operands and results: its grid visits each tile once. All this says how
much memory moves, not how long that takes.
"""

import functools
import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jadam
from experiments.bench import publish
from experiments.common.report import table, update_readme

NO_CLOUD = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
OPTIONS: dict[str, Any] = {"learning_rate": 1e-3, "weight_decay": 0.1}
BITS_8: dict[str, Any] = {"mu_dtype": "int8", "nu_dtype": "uint8"}
BITS_16: dict[str, Any] = {"mu_dtype": "bfloat16", "nu_dtype": "bfloat16"}
Shapes = tuple[tuple[int, ...], ...]
LEAVES: dict[str, Shapes] = {
    "1 leaf of 8192 x 4096": ((8192, 4096),),
    "GPT-2's embedding of 50257 x 768": ((50257, 768),),
}
# XLA's own form of codes compiles for a minute, so it is compiled for the first of them only.
SLOW = (
    "jadam 8-bit moments, XLA's form",
    "flashoptim-jax 8-bit",
    "flashoptim-jax 8-bit, bf16 weights",
)


class Program(NamedTuple):
    """A step to compile.

    Attributes:
        tx: the transformation.
        step: `(params, state, grads) -> (params, state)`.
        dtype: of parameters and gradients.
    """

    tx: Any
    step: Callable[..., tuple[Any, Any]]
    dtype: Any


def _fused(tx: Any, dtype: Any = jnp.float32) -> Program:
    return Program(tx, lambda params, state, grads: tx.step(grads, state, params), dtype)


def _in_two(tx: Any, dtype: Any = jnp.float32) -> Program:
    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return Program(tx, step, dtype)


def programs() -> Iterator[tuple[str, Callable[[], Program]]]:
    """Each by its name, made when it is called."""
    adamw = functools.partial(jadam.adamw, **OPTIONS)
    compensated = jadam.compensated_weights
    bf16 = jnp.bfloat16
    yield "optax", lambda: _in_two(optax.adamw(**OPTIONS))
    yield "jadam float32", lambda: _fused(adamw())
    yield "jadam bf16 moments", lambda: _fused(adamw(**BITS_16))
    yield "jadam 8-bit moments", lambda: _fused(adamw(**BITS_8))
    yield "jadam 8-bit moments, update", lambda: _in_two(adamw(**BITS_8))
    yield "jadam 8-bit moments, XLA's form", lambda: _fused(adamw(**BITS_8, kernel="xla"))
    yield "jadam compensated bf16 weights", lambda: _fused(compensated(adamw()), bf16)
    yield "jadam compensated, 8-bit moments", lambda: _fused(compensated(adamw(**BITS_8)), bf16)
    if importlib.util.find_spec("flashoptim_jax") is not None:
        yield "flashoptim-jax 8-bit", lambda: _flashoptim(jnp.float32, None)
        yield "flashoptim-jax 8-bit, bf16 weights", lambda: _flashoptim(bf16, 24)


def _flashoptim(dtype: Any, bits: int | None) -> Program:
    """Its form in XLA's operations: its fused kernel is one for GPUs."""
    from flashoptim_jax import flash_adamw

    tx: Any = flash_adamw(**OPTIONS, master_weight_bits=bits, fused=False)
    return Program(tx, lambda params, state, grads: tx.step(params, state, grads), dtype)


def chip() -> NamedSharding:
    """One TPU v5e that is not there."""
    os.environ.update(NO_CLOUD)
    topology = topologies.get_topology_desc("v5e:2x4", "tpu")
    return NamedSharding(Mesh(np.array(topology.devices[:1]), "x"), P())


def figures(program: Program, shapes: Shapes, where: NamedSharding) -> dict[str, float]:
    """What XLA says of a program for these leaves; bytes are bytes a parameter."""

    def abstract(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    params = [jax.ShapeDtypeStruct(shape, program.dtype) for shape in shapes]
    state = jax.eval_shape(program.tx.init, params)
    args = jax.tree.map(abstract, (params, state, params))
    results = jax.tree.leaves(jax.eval_shape(program.step, *args))
    moved = [*jax.tree.leaves(args), *results]
    parameters = sum(p.size for p in params)
    start = time.perf_counter()
    compiled = jax.jit(program.step, donate_argnums=(0, 1)).lower(*args).compile()
    seconds = time.perf_counter() - start
    entry = compiled.as_text().split("ENTRY", 1)[1]
    least = sum(x.size * x.dtype.itemsize for x in moved) / parameters
    accessed = compiled.cost_analysis()["bytes accessed"] / parameters
    return {
        "bytes": accessed,
        "least": least,
        "over_the_least": accessed / least,
        "temporary": compiled.memory_analysis().temp_size_in_bytes / parameters,
        "kernels": entry.count('custom_call_target="tpu_custom_call"'),
        "fusions": entry.count(" fusion("),
        "compile_s": seconds,
    }


def measured(where: NamedSharding) -> dict[str, dict[str, Any]]:
    """The figures of each program, or why there are none."""
    found: dict[str, dict[str, Any]] = {}
    for i, (leaves, shapes) in enumerate(LEAVES.items()):
        found[leaves] = {}
        for name, make in programs():
            if i > 0 and name in SLOW:
                continue
            try:
                found[leaves][name] = figures(make(), shapes, where)
            except Exception as error:
                found[leaves][name] = {"failed": f"{type(error).__name__}: {error}"[:200]}
            print(leaves, name, found[leaves][name], flush=True)
    return found


def markdown(results: dict[str, Any]) -> str:
    columns = ("", "bytes", "least", "over the least", "temporary", "kernels", "compile [s]")
    parts = []
    for leaves, rows in results["programs"].items():
        lines = [[name, *_cells(row)] for name, row in rows.items()]
        parts.append(f"### {leaves}, {results['device']}\n\n{table(columns, lines)}")
    return "\n\n".join(parts)


def _cells(row: dict[str, Any]) -> list[str]:
    if "failed" in row:
        return ["does not compile", "", "", "", "", ""]
    numbers = (row[x] for x in ("bytes", "least", "over_the_least", "temporary"))
    return [*(f"{x:.2f}" for x in numbers), f"{row['kernels']}", f"{row['compile_s']:.1f}"]


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    where = chip()
    (device,) = where.mesh.devices.flat
    results = {
        "command": "python -m experiments.bench.ahead",
        "jax": jax.__version__,
        "libtpu": version("libtpu"),
        "optax": version("optax"),
        "device": device.device_kind,
        "programs": measured(where),
    }
    publish.write("ahead", results)
    update_readme("ahead", markdown(results), publish.README)


if __name__ == "__main__":
    main()
