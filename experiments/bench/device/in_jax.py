"""Time and memory of the steps in JAX, in a process that JAX has for itself.

Two times of a step: `call` is what a training loop sees, many calls queued one after the other and
waited for at the end; `device` is one of STEPS steps in a loop inside one program, in which neither
Python nor a call takes part. Parameters and state are donated.
"""

import functools
import math
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jadam
from experiments.bench.ahead.programs import Program
from experiments.bench.device import programs
from experiments.bench.device.rows import (
    ABOUT,
    REPEATS,
    Order,
    attempt,
    calls_in_a_turn,
    end,
    order,
    say,
)
from experiments.bench.workloads import GPT2, Shapes
from experiments.common import report

STEPS = 10
"""In a loop."""
COPIED = 4_000_000_000
"""Bytes of the array whose copy is timed."""
COMPILING = 0.4
"""The share of the time that is left which the programs of a workload may compile for."""


def about() -> dict[str, Any]:
    """Device, versions, and what computes a step."""
    command = "python -m experiments.bench.device"
    backend = jax.default_backend()
    return {**report.provenance(command), "backend": backend, "kernels": jadam.kernels()[backend]}


@functools.partial(jax.jit, static_argnums=1)
def _filled(drawn: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    size = math.prod(shape)
    return drawn[jnp.arange(size) % drawn.size].reshape(shape)


def arrays(shapes: Shapes, dtype: Any, seed: int) -> list[jax.Array]:
    """A million normal numbers, repeated, as leaves."""
    drawn = jnp.asarray(np.random.default_rng(seed).standard_normal(2**20, np.float32))
    return [_filled(drawn.astype(dtype), shape) for shape in shapes]


class Compiled(NamedTuple):
    """A program for a workload's shapes.

    Attributes:
        program: what was compiled.
        call: one step.
        loop: STEPS of them, or why there is no loop.
        bytes: of each array that a step takes, and of each that it returns.
        lowering_s: seconds to trace and lower one step.
        compile_s: seconds to compile it.
    """

    program: Program
    call: Any
    loop: Any
    bytes: int
    lowering_s: float
    compile_s: float


def _abstract(program: Program, shapes: Shapes) -> tuple[Any, Any, Any]:
    params = [jax.ShapeDtypeStruct(shape, program.dtype) for shape in shapes]
    return params, jax.eval_shape(program.tx.init, params), params


def compiled(name: str, shapes: Shapes, loop: bool = True) -> Compiled:
    """One step and a loop of them, for arrays of these shapes."""
    program = programs.PROGRAMS[name]()
    args = _abstract(program, shapes)
    start = time.perf_counter()
    lowered = jax.jit(program.step, donate_argnums=(0, 1)).lower(*args)
    middle = time.perf_counter()
    call = lowered.compile()
    done = time.perf_counter()

    def steps(params: Any, state: Any, grads: Any) -> Any:
        def body(_: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            return program.step(*carry, grads)

        return jax.lax.fori_loop(0, STEPS, body, (params, state))

    looped: Any = None
    if loop:
        try:
            looped = jax.jit(steps, donate_argnums=(0, 1)).lower(*args).compile()
        except Exception as error:
            looped = error
    moved = sum(
        math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves((args, lowered.out_info))
    )
    return Compiled(program, call, looped, moved, middle - start, done - middle)


def turns(step: Any, held: list[Any], grads: Any) -> list[float]:
    """Seconds of a call in each turn; `held` are parameters and state, which calls take over."""

    def turn(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            held[:] = step(*held, grads)
        jax.block_until_ready(held)
        return (time.perf_counter() - start) / calls

    turn(1)
    calls = calls_in_a_turn(turn(1))
    return [turn(calls) for _ in range(REPEATS)]


def timed(made: Compiled, shapes: Shapes) -> dict[str, Any]:
    """Both times of a step, and what was compiled."""
    program = made.program
    parameters = sum(map(math.prod, shapes))
    params, grads = (arrays(shapes, program.dtype, seed) for seed in (0, 1))
    held = [params, program.tx.init(params)]
    del params
    row = {
        "bytes": made.bytes / parameters,
        "temporary": made.call.memory_analysis().temp_size_in_bytes / parameters,
        "kernels": made.call.as_text().count('custom_call_target="jadam'),
        "lowering_s": made.lowering_s,
        "compile_s": made.compile_s,
        "call": turns(made.call, held, grads),
    }
    if isinstance(made.loop, Exception):
        return {**row, "no_loop": f"{type(made.loop).__name__}: {made.loop}"[:300]}
    return {**row, "device": [s / STEPS for s in turns(made.loop, held, grads)]}


def copied(tiny: bool) -> dict[str, Any]:
    """Bytes a second, read and written, that a copy moves."""
    size = COPIED // 4 if not tiny else 1_000_000
    (x,) = arrays(((size,),), jnp.float32, 0)
    copy = jax.jit(jnp.copy)

    seconds = turns(lambda x, _: [copy(x)], [x], None)
    return {"framework": "jax", "rates": [2 * 4 * size / s for s in seconds]}


def first_step(name: str, shapes: Shapes) -> dict[str, Any]:
    """Seconds from `jax.jit` to the end of the first step."""
    program = programs.PROGRAMS[name]()
    params, grads = (arrays(shapes, program.dtype, seed) for seed in (0, 1))
    state = program.tx.init(params)
    jax.block_until_ready((params, grads, state))
    start = time.perf_counter()
    made = compiled(name, shapes, loop=False)
    jax.block_until_ready(made.call(params, state, grads))
    seconds = time.perf_counter() - start
    return {"first_s": seconds, "lowering_s": made.lowering_s, "compile_s": made.compile_s}


def speed(given: Order) -> None:
    """The copy, the first steps, then each workload: compiled side by side, timed one by one."""
    say(ABOUT, about())
    attempt("copy, jax", lambda: copied(given.tiny), given, framework="jax")
    workloads = programs.TINY_TIMED if given.tiny else programs.TIMED
    first = workloads[0][0] if given.tiny else GPT2
    latencies = programs.LATENCIES[-1:] if given.tiny else programs.LATENCIES
    for name in () if given.names and first.name not in given.names else latencies:
        if (missing := programs.why_not(name, len(first.shapes))) is not None:
            say(f"first step, {name}", {"contender": name, "missing": missing})
            continue
        attempt(
            f"first step, {name}",
            functools.partial(first_step, name, first.shapes),
            given,
            workload=first.name,
            contender=name,
        )
    pool = ThreadPoolExecutor(8)
    for workload, names in workloads:
        if given.names and workload.name not in given.names:
            continue
        reasons = {name: programs.why_not(name, len(workload.shapes)) for name in names}
        making = {
            name: pool.submit(compiled, name, workload.shapes)
            for name in names
            if reasons[name] is None and given.left > 0
        }
        # Nothing is timed beside a compilation, as far as it can be helped.
        limit = max(0.0, COMPILING * given.left)
        wait(making.values(), timeout=limit)
        for name in names:
            attempt(
                f"{workload.name} / {name}",
                functools.partial(_row, reasons[name], making.get(name), workload.shapes, limit),
                given,
                workload=workload.name,
                contender=name,
                framework="jax",
                parameters=workload.parameters,
                leaves=len(workload.shapes),
            )


def _row(
    missing: str | None, making: Future[Compiled] | None, shapes: Shapes, limit: float
) -> dict[str, Any]:
    """A contender's times, if it is compiled."""
    if making is None:
        return {"missing": missing or "no time was left"}
    if not making.done():
        making.cancel()
        return {"missing": f"not compiled in {limit:.0f} s"}
    return timed(making.result(), shapes)


def memory(given: Order) -> None:
    """Bytes that a GPT-2 step needs at its peak, by the allocator's own account."""
    (name,) = given.names
    shapes = programs.TINY_TIMED[0][0].shapes if given.tiny else GPT2.shapes
    say(ABOUT, about())
    if (missing := programs.why_not(name, len(shapes))) is not None:
        say(name, {"missing": missing})
        return
    attempt(name, functools.partial(peak, name, shapes), given)


def peak(name: str, shapes: Shapes) -> dict[str, Any]:
    """Before and at the peak of a step; None where the allocator does not count."""
    made = compiled(name, shapes, loop=False)
    program = made.program
    params, grads = (arrays(shapes, program.dtype, seed) for seed in (0, 1))
    state = program.tx.init(params)
    held = jax.block_until_ready((params, state, grads))
    (device,) = jax.devices()[:1]
    before = device.memory_stats() or {}
    # The names must not keep what the step takes over.
    del params, state, grads
    stepped = made.call(*held)
    jax.block_until_ready(stepped)
    after = device.memory_stats() or {}
    leaves = jax.tree.leaves(held)
    return {
        "parameters": sum(map(math.prod, shapes)),
        "least": sum(x.size * x.dtype.itemsize for x in leaves),
        "before": before.get("bytes_in_use"),
        "peak_before": before.get("peak_bytes_in_use"),
        "peak": after.get("peak_bytes_in_use"),
        "temporary": made.call.memory_analysis().temp_size_in_bytes,
    }


if __name__ == "__main__":
    {"speed": speed, "memory": memory}[sys.argv[1]](order())
    end()
