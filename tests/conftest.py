"""The strictest JAX that a user can have: what passes here works under any setting.

Strict dtype promotion, no silent rank promotion, eight virtual CPU devices; pytest turns warnings
into errors (pyproject.toml).
"""

import os

# Before jax starts its backend.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
)

from collections.abc import Iterator

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The same examples in every run, so that a failure can be repeated; no clock in a test.
hypothesis.settings.register_profile("jadam", derandomize=True, deadline=None)
hypothesis.settings.load_profile("jadam")


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
