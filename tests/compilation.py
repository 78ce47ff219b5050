"""How tests compile: quickly where nothing hangs on it.

Most of the time of all tests goes into XLA and LLVM.
"""

import contextlib
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import compiler

# What was compiled in one way is not taken for the other.
_is_quick = jax.make_user_context(False)


@functools.cache
def _options() -> dict[str, bool]:
    """Kernels go to LLVM without MLIR before it, where XLA still can do that: in jaxlib 0.10."""
    options = {"xla_cpu_use_fusion_emitters": False}
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        jax.jit(jnp.negative).lower(np.float32(1)).compile(compiler_options=options)
        return options
    return {}


@contextlib.contextmanager
def quickly() -> Iterator[None]:
    """Without the costly passes of XLA and LLVM, which are most of the time."""
    ordinary, options = getattr(compiler, "get_compile_options", None), _options()

    def with_options(*args: Any, **kwargs: Any) -> Any:
        made = ordinary(*args, **kwargs)
        given = dict(made.env_option_overrides)
        made.env_option_overrides = list({**options, **given}.items())
        return made

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    # A user gives such options to one function, and jax.config has none of them for all. A JAX
    # without this function compiles a little longer.
    patch = mock.patch.object(compiler, "get_compile_options", with_options, create=True)
    try:
        with patch, _is_quick(True):
            yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def run_module(*arguments: Any) -> subprocess.CompletedProcess[str]:
    """`python -m ...` from the repository, in a process that compiles as `quickly` does."""
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=Path(__file__).parent.parent,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def environment() -> dict[str, str]:
    """For a process that has one device and compiles as `quickly` does."""
    flags = [f"--{name}={str(value).lower()}" for name, value in _options().items()]
    return {
        **os.environ,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": " ".join(["--xla_cpu_parallel_codegen_split_count=1", *flags]),
    }
