"""The kernel in C++ for CPUs: its library, and the numbers that it is called with.

XLA:CPU compiles m, v and the parameter as three loops, each of which reads its operands again. The
kernel makes one pass.
"""

import ctypes
import functools
import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jadam import _math
from jadam._kernels.coefficients import Coefficients
from jadam._leaf import increment
from jadam._members import Rule
from jadam._storage import codes
from jadam._storage.curve import Curve
from jadam._types import Count, Scalar

TARGET = "jadam_step"


class Library(NamedTuple):
    """The loaded library, or why there is none."""

    instruction_set: str | None
    reason: str


@functools.cache
def library() -> Library:
    """Loads the library and registers it with XLA, once."""
    spec = importlib.util.find_spec("jadam._kernel")
    if spec is None or spec.origin is None:
        return Library(None, "not built: jadam was installed without a C++ compiler")
    try:
        loaded = ctypes.CDLL(spec.origin)
    except OSError as error:
        return Library(None, f"not loaded: {error}")
    built, there = loaded.jadam_ffi_api_version(), _ffi_api_version()
    # XLA calls a kernel that was built for its own major version and no later minor one.
    if built // 1000 != there // 1000 or built > there:
        versions = [f"{v // 1000}.{v % 1000}" for v in (built, there)]
        return Library(None, "not usable: built for XLA's FFI {}, jaxlib has {}".format(*versions))
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(loaded.jadam_step), platform="cpu")
    loaded.jadam_instruction_set.restype = ctypes.c_char_p
    return Library(loaded.jadam_instruction_set().decode(), "loaded")


def _ffi_api_version() -> int:
    """1000·major + minor of XLA's FFI in the installed jaxlib."""
    header = Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h").read_text()
    major, minor = (
        int(re.search(rf"define XLA_FFI_API_{part} (\d+)", header)[1])  # pyright: ignore
        for part in ("MAJOR", "MINOR")
    )
    return 1000 * major + minor


class Numbers(NamedTuple):
    """`Numbers` of step.h: the numbers of one step, for all its leaves.

    The last four are the curve of m's code (`Curve`) in the step before and in this one.
    """

    complement1: Scalar
    complement2: Scalar
    dither: Scalar
    m_weight: Scalar
    g_weight: Scalar
    c1: Scalar
    c2: Scalar
    eps: Scalar
    eps_root: Scalar
    learning_rate: Scalar
    weight_decay: Scalar
    before_a: Scalar
    before_s: Scalar
    now_a: Scalar
    now_s: Scalar

    def packed(self) -> Float[Array, "15"]:
        """As one array, in which the library finds its struct."""
        return jnp.stack([jnp.asarray(x, jnp.float32) for x in self])


def numbers_of(
    rule: Rule, learning_rate: Scalar, weight_decay: Scalar, count: Count
) -> Float[Array, "15"]:
    """The numbers of the step after `count` updates."""
    then, now = (_math.Time.of(t, jnp.dtype(jnp.float32)) for t in (count, increment(count)))
    (before,), (after,) = (map(Curve.of, rule.relation_at(time).ratios) for time in (then, now))
    coefficients: Coefficients = rule.coefficients_at(now)
    return Numbers(
        **coefficients._asdict(),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        before_a=before.a,
        before_s=before.s,
        now_a=after.a,
        now_s=after.s,
    ).packed()


@functools.cache
def tables() -> np.ndarray:
    """`Tables` of step.h: what the storage computes with polynomials, at 32 places."""
    places = np.arange(32) / 32
    reciprocal = (1 / (1 + places + 1 / 64)).astype(np.float32)
    # 16·log(1 + r)/log 2, to 2e-8 for |r| <= 1/64
    series = 16 / np.log(2) * np.array([1, -1 / 2, 1 / 3])
    powers = np.polynomial.polynomial.polyval(2 * places - 1, codes.EXP2).astype(np.float32)
    powers = (powers.view(np.int32) - (np.arange(32) << 18)).astype(np.int32).view(np.float32)
    logarithms = -16 * np.log2(reciprocal.astype(np.float64)) - np.arange(32) // 2
    in_order = (powers, reciprocal, logarithms, series, codes.EXP2, 16 * codes.LOG2)
    return np.concatenate(in_order).astype(np.float32)
