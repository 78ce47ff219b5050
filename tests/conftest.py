"""The strictest JAX that a user can have: what passes here works under any setting.

Strict dtype promotion, no silent rank promotion, eight virtual CPU devices; pytest turns warnings
into errors (pyproject.toml).
"""

import os
from pathlib import Path

# Before jax starts its backend.
# What is compiled in one piece has the same code as in several and takes less of all CPUs together.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    " --xla_cpu_parallel_codegen_split_count=1"
).strip()
# Most of the time goes into compilations. The workers and the processes that tests start share
# what they compile, and the next run finds it: the same machine code for the same program, flags,
# and versions.
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "jax")
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

from collections.abc import Iterator

import hypothesis
import jax
import pytest
from compilation import quickly

# Where a plugin of pytest has imported jax before.
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# A program with requirements of its own: the extra "mutants".
collect_ignore = ["mutants"]

# The same examples in every run, so that a failure can be repeated; no clock in a test.
hypothesis.settings.register_profile("jadam", derandomize=True, deadline=None)
hypothesis.settings.load_profile("jadam")


@pytest.fixture
def quick_compilation() -> Iterator[None]:
    """Without the costly passes of XLA and LLVM, which are most of the time of a compilation.

    For a test in which nothing hangs on them: neither bits nor ulps nor the form of the program.
    """
    with quickly():
        yield


@pytest.fixture
def full_compilation() -> None:
    """As users have it."""


@pytest.fixture(
    params=["quick_compilation", pytest.param("full_compilation", marks=pytest.mark.soak)]
)
def either_compilation(request: pytest.FixtureRequest) -> None:
    """Compiled quickly in `make test`, and as users have it in `make soak`."""
    request.getfixturevalue(request.param)


@pytest.fixture
def x64() -> Iterator[None]:
    """float64 in the test that asks for it."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def standard_promotion() -> Iterator[None]:
    """JAX's default promotion, for a third-party library that does not run under the strict one."""
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield
