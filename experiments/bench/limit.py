"""How fast the device can move an Adam step's bytes: a hand-made kernel, and a plain copy.

On a CPU it is `limit.cc`, compiled at the first use; elsewhere XLA computes the same expressions.
"""

import ctypes
import functools
import math
import os
import shutil
import subprocess
import tempfile
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp

from experiments.bench.trials import Trial, cores
from experiments.bench.workloads import Shapes

STEP_BYTES = 28
"""Bytes that a float32 step moves for each parameter: it reads g, p, m, v and writes p, m, v."""
COPY_BYTES = 8
"""Bytes that a copy moves for each parameter."""


@functools.cache
def _library() -> ctypes.CDLL:
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++"))), None)
    if compiler is None:
        raise RuntimeError("no C++ compiler")
    options = ["-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder, "limit.so")
        source = Path(__file__).with_suffix(".cc")
        subprocess.run([compiler, *options, source, "-o", built], check=True)
        library = ctypes.CDLL(str(built))
    library.make.restype = ctypes.c_void_p
    return library


def _native(function: str, shapes: Shapes) -> Trial:
    library, sizes = _library(), [math.prod(shape) for shape in shapes]
    handle = ctypes.c_void_p(library.make(len(sizes), (ctypes.c_long * len(sizes))(*sizes)))
    timed = getattr(library, function)

    def run() -> None:
        timed(handle, cores())

    weakref.finalize(run, library.drop, handle)
    return Trial(run)


def _is_cpu() -> bool:
    return jax.default_backend() == "cpu"


def step(shapes: Shapes) -> Trial:
    """p += c·g, m += c·g, v += c·g."""
    if _is_cpu():
        return _native("step", shapes)
    grads = [jnp.full(shape, 1e-3) for shape in shapes]
    moved = [[jnp.zeros(shape) for shape in shapes] for _ in range(3)]

    @functools.partial(jax.jit, donate_argnums=0)
    def add(moved: list[list[jax.Array]], grads: list[jax.Array]) -> list[list[jax.Array]]:
        return [[x + 1e-3 * g for x, g in zip(xs, grads, strict=True)] for xs in moved]

    def run() -> list[list[jax.Array]]:
        moved[:] = add(moved, grads)
        return moved

    return Trial(run, wait=jax.block_until_ready)


def copy(shapes: Shapes) -> Trial:
    """Copies an array that is as large as all parameters together."""
    size = sum(math.prod(shape) for shape in shapes)
    if _is_cpu():
        return _native("copy", ((size,),))
    array, copied = jnp.ones(size), jax.jit(jnp.copy)
    return Trial(lambda: copied(array), wait=jax.block_until_ready)
