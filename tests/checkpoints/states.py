"""Writes this version's fixture: `python -m tests.checkpoints.states`.

One Orbax checkpoint with a state of each layout after three steps, and beside it, as .npz, what a
fourth step needs and gives. A later version must restore it and make the same step. Run it once
for a version that changes a layout, and commit the new folder; older folders stay as they are.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

import jadam

HERE = Path(__file__).parent
EIGHT_BITS = {"mu_dtype": "int8", "nu_dtype": "uint8", "min_size": 0}
in_8_bits = jadam.adam(1e-2, **EIGHT_BITS)

STATES = {
    "adam": jadam.adam(1e-2),
    "adamw_schedule": jadam.adamw(lambda count: 0.01 / (1.0 + count)),
    "adam_bfloat16": jadam.adam(1e-2, mu_dtype="bfloat16", nu_dtype="bfloat16"),
    "adam_8_bits": in_8_bits,
    "nadam": jadam.nadam(1e-2, momentum_decay=0.004),
    "amsgrad": jadam.amsgrad(1e-2),
    "amsgrad_8_bits": jadam.amsgrad(1e-2, **EIGHT_BITS),
    "adamax": jadam.adamax(1e-2),
    "adamax_8_bits": jadam.adamax(1e-2, **EIGHT_BITS),
    "radam": jadam.radam(1e-2),
    "compensated_int8": jadam.compensated_weights(in_8_bits),
    "compensated_int16": jadam.compensated_weights(jadam.adam(1e-2), residual_dtype="int16"),
    "stochastic_rounding": jadam.stochastic_rounding(jadam.adam(1e-2), key=1),
}
"""A transformation for each layout that a state can have."""

NARROW = {"compensated_int8", "compensated_int16", "stochastic_rounding"}
"""Those that are for bfloat16 parameters."""


def parameters(name: str) -> dict[str, Any]:
    """A matrix of two blocks of codes a row and a vector."""
    dtype = jnp.bfloat16 if name in NARROW else jnp.float32
    params = {"kernel": np.linspace(-1, 1, 320).reshape(2, 160), "bias": np.linspace(0.5, 2, 8)}
    return jax.tree.map(lambda p: jnp.asarray(p, dtype), params)


def gradients(params: dict[str, Any], seed: int) -> dict[str, Any]:
    """Gradients of many sizes that bfloat16 has, so that .npz keeps them in float32."""
    rng = np.random.default_rng(seed)

    def like(p: Any) -> Any:
        return jnp.asarray(rng.standard_normal(p.shape) ** 3, jnp.bfloat16).astype(p.dtype)

    return jax.tree.map(like, params)


@partial(jax.jit, static_argnums=0)
def step(tx: Any, grads: Any, state: Any, params: Any) -> tuple[Any, Any, Any]:
    """Updates, state and parameters; as `optax.apply_updates`, also under strict promotion."""
    updates, state = tx.update(grads, state, params)
    moved = jax.tree.map(lambda p, u: (p.astype(u.dtype) + u).astype(p.dtype), params, updates)
    return updates, state, moved


def after_steps(name: str, steps: int = 3, place: Any = lambda tree: tree) -> tuple[Any, Any]:
    """State and parameters after some steps; `place` puts the first parameters on devices."""
    tx, params = STATES[name], place(parameters(name))
    state = tx.init(params)
    for seed in range(steps):
        _, state, params = step(tx, gradients(params, seed), state, params)
    return state, params


def main() -> None:
    """Writes the folder of this version; refuses to overwrite one."""
    folder = HERE / jadam.__version__
    if folder.exists():
        sys.exit(f"{folder}: exists. A fixture is what an old version wrote: it is never rewritten")
    states, arrays = {}, {"versions": f"jadam {jadam.__version__}, orbax {ocp.__version__}"}
    for name, tx in STATES.items():
        states[name], params = after_steps(name)
        grads = gradients(params, 3)
        updates, _, _ = step(tx, grads, states[name], params)
        for role, tree in {"params": params, "grads": grads, "updates": updates}.items():
            for leaf, x in tree.items():
                arrays[f"{name}/{role}/{leaf}"] = np.asarray(x, np.float32)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "states", states)
    np.savez_compressed(folder / "step.npz", **arrays)


if __name__ == "__main__":
    main()
