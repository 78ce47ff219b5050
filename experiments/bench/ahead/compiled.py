"""The figures of one program, compiled for one chip or divided over several."""

import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.bench.ahead import entry
from experiments.bench.ahead.programs import Program
from experiments.bench.workloads import Shapes
from experiments.common.chips import Chip
from jadam._kernels import primitive


def figures(program: Program, shapes: Shapes, chip: Chip) -> dict[str, Any]:
    """What XLA says of a program for these leaves on a chip; bytes are bytes a parameter."""
    mesh = Mesh(np.array(chip.devices(program.chips)), "x")

    def lying(x: Any) -> Any:
        spec = P("x") if x.ndim > 1 and program.chips > 1 else P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    params = [jax.ShapeDtypeStruct(shape, program.dtype) for shape in shapes]
    state = jax.eval_shape(program.tx.init, params)
    args = jax.tree.map(lying, (params, state, params))
    start = time.perf_counter()
    compiled = compile_for(chip, program.step, *args)
    seconds = time.perf_counter() - start
    results = jax.tree.leaves(jax.eval_shape(program.step, *args))
    parameters = sum(p.size for p in params)
    least = sum(x.size * x.dtype.itemsize for x in (*jax.tree.leaves(args), *results)) / parameters
    return {
        **read_off(compiled, chip, parameters // program.chips),
        "least": least,
        "donated": len(jax.tree.leaves(args[:2])),
        "compile_s": seconds,
    }


def compile_for(chip: Chip, step: Any, *args: Any) -> Any:
    """The step with parameters and state donated, compiled as in a process that has the chip."""
    if chip.platform == "cuda":
        # Leaves are joined while tracing, and as many as this process's own backend takes.
        primitive.GROUP["cpu"] = primitive.GROUP["gpu"]
    return jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile()


def read_off(compiled: Any, chip: Chip, parameters: int) -> dict[str, Any]:
    """What a compiled program moves, needs and launches; bytes are bytes a parameter.

    They are the operands and results of all that is launched: a kernel in Pallas or CUDA visits
    each once. Those that a TPU's program keeps on the chip are not among them; XLA's own count has
    these too, and what is read from there. A kernel is what a GPU starts; of a TPU, which computes
    scalars in between and moves arrays to the chip beside its kernels, what computes or copies an
    array.
    """
    text = compiled.as_text()
    launched = list(entry.launches(text))
    cost = compiled.cost_analysis()  # None for a GPU
    return {
        "bytes": sum(x.read + x.written for x in launched) / parameters,
        "xlas_count": cost["bytes accessed"] / parameters if cost else None,
        "temporary": compiled.memory_analysis().temp_size_in_bytes / parameters,
        "copied": sum(x.written for x in launched if x.kind.startswith("copy")) / parameters,
        "kernels": sum(x.kernels for x in launched if chip.platform == "cuda" or x.is_of_arrays),
        "calls": {
            target: sum(x.target == target for x in launched)
            for target in sorted({x.target for x in launched} - {""})
        },
        "collectives": sum(x.is_collective for x in launched),
        "aliased": entry.aliased(text),
    }
