"""What float32 and bfloat16 Adams get wrong: optax and jadam through the same code.

Each row is a function of the library (`optax` or `jadam`) that returns a figure or raises. The
exact values come from float64, by hand.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Row:
    """One promise: what is run, what is right, and how a result is shown."""

    name: str
    question: str
    exact: float | str
    measure: Callable[[ModuleType], Any]
    form: str = "{:.4g}"


def _first_update(library: ModuleType, g: float, dtype: str, **options: Any) -> jax.Array:
    tx = library.adam(1.0, **options)
    grads = jnp.asarray([g], dtype)
    return tx.update(grads, tx.init(grads))[0]


def _first_step_error(b2: float) -> Callable[[ModuleType], float]:
    return lambda library: abs(float(_first_update(library, 1.0, "float32", b2=b2, eps=0.0)[0]) + 1)


def _largest_error_in_ulps(library: ModuleType) -> float:
    """The direction's error for given moments of 1e-15 to 1e15, over many b1, b2 and t."""
    rng = np.random.default_rng(0)
    grads, m, root = (
        (10.0 ** rng.uniform(-15, 15, 2000) * rng.choice([-1, 1], 2000)).astype(np.float32)
        for _ in range(3)
    )
    worst = 0.0
    for b1 in (0.0, 0.5, 0.9, 0.99):
        for b2 in (0.9, 0.99, 0.999, 0.9999, 0.99999):
            tx = library.scale_by_adam(b1=b1, b2=b2, eps=0.0)
            update = jax.jit(tx.update)
            for t in (2, 10, 1000, 100_000):
                state = tx.init(jnp.asarray(grads))
                state = state._replace(count=jnp.int32(t - 1), mu=jnp.asarray(m))
                state = state._replace(nu=jnp.asarray(root**2))
                direction, state = update(jnp.asarray(grads), state)
                m_hat, v_hat = (
                    np.asarray(moment, np.float64)
                    / -math.expm1(t * math.log(b) if b else -math.inf)
                    for moment, b in ((state.mu, b1), (state.nu, b2))
                )
                exact = m_hat / np.sqrt(v_hat)
                error = np.abs(np.asarray(direction, np.float64) - exact)
                worst = max(worst, float((error / np.spacing(np.abs(exact).astype("f4"))).max()))
    return worst


def _drift(b2: float) -> Callable[[ModuleType], float]:
    """The largest |update / learning rate + 1| in 100,000 steps of constant gradients, eps = 0."""

    def measure(library: ModuleType) -> float:
        tx = library.adam(1.0, b2=b2, eps=0.0)
        grads = jnp.asarray([1e-3, 0.1, 0.7, 1.0, 1.3, 1e3])

        def step(state: Any, _: None) -> tuple[Any, jax.Array]:
            updates, state = tx.update(grads, state)
            return state, jnp.abs(updates + 1).max()

        run = jax.jit(lambda state: jax.lax.scan(step, state, length=100_000)[1].max())
        return float(run(tx.init(grads)))

    return measure


def _second_moment(
    library: ModuleType, phases: list[tuple[float, int]], dtype: str, b2: float
) -> float:
    """nu after phases of constant gradients (value, steps), for a parameter of `dtype`."""
    tx = library.scale_by_adam(b2=b2)

    @jax.jit
    def run(state: Any) -> Any:
        for g, steps in phases:
            grads = jnp.full(1, g, dtype)
            state = jax.lax.fori_loop(0, steps, lambda _, s, g=grads: tx.update(g, s)[1], state)
        return state

    return float(run(tx.init(jnp.ones(1, dtype))).nu[0])


def _decay_error(library: ModuleType, b2: float = 0.99999, steps: int = 500_000) -> float:
    exact = (1 - b2) * b2**steps
    return abs(_second_moment(library, [(1.0, 1), (0.0, steps)], "float32", b2) / exact - 1)


def _small_bfloat16() -> float:
    return float(jnp.bfloat16(0.01)) ** 2


def _slope_at_zero(library: ModuleType) -> float:
    tx = library.adam(1.0)

    def moved(g: jax.Array) -> jax.Array:
        return -tx.update(g, tx.init(g))[0].sum()

    return float(jax.grad(moved)(jnp.zeros(1))[0])


def _in_scan(member: str) -> Callable[[ModuleType], str]:
    def measure(library: ModuleType) -> str:
        tx = getattr(library, member)(1e-3)
        state = tx.init(jnp.ones(2, jnp.bfloat16))
        jax.lax.scan(lambda s, g: (tx.update(g, s)[1], None), state, jnp.ones((3, 2)))
        return "runs"

    return measure


def _strict(library: ModuleType) -> str:
    with jax.numpy_dtype_promotion("strict"):
        _first_update(library, 1.0, "float32")
    return "runs"


def _first_adaptive_step(library: ModuleType) -> int:
    """The first of RAdam's steps that is not m̂ = 2, for gradients of 2; an adaptive one is rₜ."""
    tx = library.radam(1.0, b2=0.99999)
    grads = jnp.full(1, 2.0)
    state = tx.init(grads)
    for t in range(1, 10):
        updates, state = tx.update(grads, state)
        if abs(float(updates[0]) + 2) > 0.1:
            return t
    return 0


ROWS = [
    Row(
        "ulps",
        "direction from given moments: largest error in ulps (any b1, b2, step, size)",
        0.0,
        _largest_error_in_ulps,
        "{:.3g}",
    ),
    *(
        Row(
            f"first_step_b2_{b2}",
            f"first step, b2 = {b2}: relative error of the update",
            0.0,
            _first_step_error(b2),
            "{:.1e}",
        )
        for b2 in (0.999, 0.9999, 0.99999)
    ),
    *(
        Row(
            f"drift_b2_{b2}",
            f"constant gradient, b2 = {b2}: largest error of the update in 100,000 steps",
            0.0,
            _drift(b2),
            "{:.1e}",
        )
        for b2 in (0.999, 0.9999, 0.99999)
    ),
    Row(
        "decay",
        "b2 = .99999, v after 500,000 zero gradients: relative error",
        0.0,
        _decay_error,
        "{:.1e}",
    ),
    Row(
        "bfloat16_grow",
        "bfloat16 parameter, 3,000 gradients of 1: v",
        1 - 0.999**3000,
        lambda library: _second_moment(library, [(1.0, 3000)], "bfloat16", 0.999),
        "{:.3f}",
    ),
    Row(
        "bfloat16_shrink",
        "then 3,000 gradients of 0.01: v",
        (1 - 0.999**3000) * (0.999**3000 + _small_bfloat16()),
        lambda library: _second_moment(library, [(1.0, 3000), (0.01, 3000)], "bfloat16", 0.999),
        "{:.4f}",
    ),
    Row(
        "float16_zero",
        "float16 gradient 0: update",
        0.0,
        lambda library: float(_first_update(library, 0.0, "float16")[0]),
    ),
    Row(
        "huge_gradient",
        "gradient 1e20: update / learning rate",
        -1.0,
        lambda library: float(_first_update(library, 1e20, "float32")[0]),
    ),
    Row(
        "slope_at_zero",
        "derivative of the update by the gradient at 0 (1/eps)",
        1e8,
        _slope_at_zero,
    ),
    *(
        Row(
            f"scan_{member}",
            f"{member} in lax.scan: bfloat16 parameters, float32 gradients",
            "runs",
            _in_scan(member),
        )
        for member in ("amsgrad", "adamax", "radam")
    ),
    Row("strict", 'adam under jax_numpy_dtype_promotion="strict"', "runs", _strict),
    Row(
        "radam_start",
        "RAdam, b2 = .99999: first adaptive step",
        6,
        _first_adaptive_step,
        "{:d}",
    ),
]


def measured(row: Row, library: ModuleType) -> float | str:
    """The row's figure for one library; an exception's name where it raises."""
    try:
        value = row.measure(library)
    except (TypeError, ValueError) as error:
        return type(error).__name__
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def shown(row: Row, value: float | str) -> str:
    """A figure as the tables print it."""
    return value if isinstance(value, str) else row.form.format(value + 0)  # no -0
