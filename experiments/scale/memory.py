"""What a device holds and sends, for a model, a mesh and an optimizer's setting.

All is computed from `jax.eval_shape` and shardings on a `jax.sharding.AbstractMesh`: this needs
no device.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

import jadam
from jadam.sharding import divided, state_shardings

from .models import BLOCK, parameters


@dataclass(frozen=True)
class Setting:
    """The dtype of parameters and gradients, and what their optimizer remembers."""

    dtype: Any
    optimizer: Callable[[], optax.GradientTransformation]


SETTINGS = {
    "float32": Setting(jnp.float32, lambda: jadam.adamw(1e-3)),
    "bf16": Setting(
        jnp.bfloat16,
        lambda: jadam.compensated_weights(
            jadam.adamw(1e-3, mu_dtype=jnp.bfloat16, nu_dtype=jnp.bfloat16)
        ),
    ),
    "8-bit": Setting(
        jnp.bfloat16,
        lambda: jadam.compensated_weights(jadam.adamw(1e-3, mu_dtype="int8", nu_dtype="uint8")),
    ),
}


def mesh_of(devices: int) -> AbstractMesh:
    """8 devices for a layer's columns, up to 64 for its rows, and the rest for data."""
    model = min(devices, 8)
    fsdp = min(devices // model, 64)
    return AbstractMesh((devices // model // fsdp, fsdp, model), ("data", "fsdp", "model"))


def bytes_here(shapes: Any, shardings: Any) -> int:
    """What one device holds of a tree."""
    return sum(
        math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
        for x, s in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    )


def row(model: str, devices: int, setting: str, *, sharded: bool) -> dict[str, Any]:
    """Bytes of one device, and the bytes that it sends in a step.

    If `sharded`, the parameters are sharded over fsdp and model, and the state over data as well.
    Otherwise each device has all parameters, and the state is divided over all axes of the mesh.
    """
    mesh = mesh_of(devices)
    params = parameters(model, mesh, SETTINGS[setting].dtype)
    if not sharded:
        params = jax.tree.map(partial(replace, spec=PartitionSpec()), params)
    axes = "data" if sharded else mesh.axis_names
    zero = divided(params, axis=axes, block=BLOCK if setting == "8-bit" else 1)
    tx = SETTINGS[setting].optimizer()
    state = jax.eval_shape(tx.init, params)
    sent = [sent_by(p, zero[name], sharded) for name, p in params.items()]
    return {
        "model": model,
        "parameters": sum(math.prod(p.shape) for p in params.values()),
        "devices": devices,
        "mesh": dict(mesh.shape),
        "setting": setting,
        "sharded": sharded,
        "weights": bytes_here(params, jax.tree.map(lambda p: p.sharding, params)),
        "state": bytes_here(state, state_shardings(tx, params)),
        "state_zero_1": bytes_here(state, state_shardings(tx, params, zero)),
        "sent_for_zero_1": round(sum(s for s, _ in sent)),
        "sent_for_fsdp": round(sum(s for _, s in sent)),
    }


def replace(p: jax.ShapeDtypeStruct, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
    return p.update(sharding=NamedSharding(p.sharding.mesh, spec))


def ring(n: int, size: float) -> float:
    """Bytes that each of n devices sends to gather an array, or to reduce and scatter it."""
    return (n - 1) / n * size


def sent_by(p: jax.ShapeDtypeStruct, zero: NamedSharding, sharded: bool) -> tuple[float, float]:
    """Bytes that ZeRO-1 sends for a parameter, and those that FSDP sends.

    ZeRO-1 reduces and scatters the gradient to the devices that have a part of the state, and
    gathers the parameter from them. Devices that have the same part sum it by an all-reduce, which
    is two rings. FSDP gathers the parameter in both passes, and scatters its gradient.
    """
    lies, mesh = p.sharding, p.sharding.mesh
    size = math.prod(lies.shard_shape(p.shape)) * p.dtype.itemsize
    part = math.prod(zero.shard_shape(p.shape)) * p.dtype.itemsize
    copies = mesh.shape["data"] if sharded else mesh.size
    cut = size // part
    sums = 2 * ring(cut, size) + 2 * ring(copies // cut, part)
    if not sharded:
        return sums, 0.0
    fsdp = mesh.shape["fsdp"]
    if any("fsdp" in (entry or ()) for entry in lies.spec):
        return sums, 3 * ring(fsdp, size * fsdp)
    return sums, 2 * ring(fsdp, size)
