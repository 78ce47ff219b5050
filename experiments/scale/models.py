"""The parameters of real models as shapes, layers stacked along the first axis (`jax.lax.scan`).

Each has a partition spec on a mesh with the axes data, fsdp and model. "model" cuts heads and
hidden units. "fsdp" cuts the other axis or the experts; where that would cut blocks of 128 along
the last axis, it cuts the axis of "model" once more. An axis that does not divide evenly, the last
one in whole blocks, is not cut.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

Shape = tuple[int, ...]
Leaf = tuple[Shape, PartitionSpec]
BLOCK = 128

COLUMNS = PartitionSpec(None, "fsdp", "model")
ROWS = PartitionSpec(None, ("model", "fsdp"), None)
EXPERTS = PartitionSpec(None, "fsdp", None, "model")
EXPERTS_ROWS = PartitionSpec(None, "fsdp", "model", None)
WORDS = PartitionSpec("fsdp", "model")
WHOLE = PartitionSpec()


def gpt2(layers: int = 12, width: int = 768, vocabulary: int = 50257) -> dict[str, Leaf]:
    """Radford et al. (2019), the smallest: learned positions, biases, the head tied."""
    return {
        "words": ((vocabulary, width), WORDS),
        "positions": ((1024, width), WHOLE),
        "qkv": ((layers, width, 3 * width), COLUMNS),
        "out": ((layers, width, width), ROWS),
        "up": ((layers, width, 4 * width), COLUMNS),
        "down": ((layers, 4 * width, width), ROWS),
        **{f"bias of {n}": ((layers, n * width), WHOLE) for n in (3, 4)},
        # The biases of out and down, and two norms with scale and bias.
        **{f"vector {i}": ((layers, width), WHOLE) for i in range(6)},
        **{f"last vector {i}": ((width,), WHOLE) for i in range(2)},
    }


def llama3(layers: int, width: int, heads: int, hidden: int) -> dict[str, Leaf]:
    """Grattafiori et al. (2024), table 3: 8 key and value heads of 128, SwiGLU, an untied head."""
    return {
        "words": ((128256, width), WORDS),
        "q": ((layers, width, heads * 128), COLUMNS),
        "k": ((layers, width, 8 * 128), COLUMNS),
        "v": ((layers, width, 8 * 128), COLUMNS),
        "out": ((layers, heads * 128, width), ROWS),
        "gate": ((layers, width, hidden), COLUMNS),
        "up": ((layers, width, hidden), COLUMNS),
        "down": ((layers, hidden, width), ROWS),
        "norm 1": ((layers, width), WHOLE),
        "norm 2": ((layers, width), WHOLE),
        "norm": ((width,), WHOLE),
        "head": ((width, 128256), PartitionSpec("fsdp", "model")),
    }


def kimi_k2() -> dict[str, Leaf]:
    """Kimi K2 (Moonshot AI, 2025): multi-head latent attention, 384 experts and a shared one."""
    width, heads, layers = 7168, 64, 61

    def swiglu(name: str, axes: Shape, hidden: int, columns: Any, rows: Any) -> dict[str, Leaf]:
        return {
            f"{name} gate": ((*axes, width, hidden), columns),
            f"{name} up": ((*axes, width, hidden), columns),
            f"{name} down": ((*axes, hidden, width), rows),
        }

    return {
        "words": ((163840, width), WORDS),
        "q down": ((layers, width, 1536), COLUMNS),
        "q up": ((layers, 1536, heads * 192), COLUMNS),
        "kv down": ((layers, width, 576), COLUMNS),
        "kv up": ((layers, 512, heads * 256), COLUMNS),
        "out": ((layers, heads * 128, width), ROWS),
        **swiglu("dense", (1,), 18432, COLUMNS, ROWS),
        **swiglu("shared", (layers - 1,), 2048, COLUMNS, ROWS),
        **swiglu("experts", (layers - 1, 384), 2048, EXPERTS, EXPERTS_ROWS),
        "router": ((layers - 1, width, 384), PartitionSpec(None, "fsdp", None)),
        "router bias": ((layers - 1, 384), WHOLE),
        "q norm": ((layers, 1536), WHOLE),
        "kv norm": ((layers, 512), WHOLE),
        "norm 1": ((layers, width), WHOLE),
        "norm 2": ((layers, width), WHOLE),
        "norm": ((width,), WHOLE),
        "head": ((width, 163840), PartitionSpec("fsdp", "model")),
    }


MODELS: dict[str, Callable[[], dict[str, Leaf]]] = {
    "GPT-2 124M": gpt2,
    "Llama 3 8B": lambda: llama3(32, 4096, 32, 14336),
    "Llama 3 70B": lambda: llama3(80, 8192, 64, 28672),
    "Llama 3 405B": lambda: llama3(126, 16384, 128, 53248),
    "Kimi K2 1T": kimi_k2,
}


def parameters(model: str, mesh: AbstractMesh, dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """The model's parameters, abstract, each with its sharding."""
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=fitting(shape, spec, mesh))
        for name, (shape, spec) in MODELS[model]().items()
    }


def fitting(shape: Shape, spec: PartitionSpec, mesh: AbstractMesh) -> NamedSharding:
    """The spec without the mesh axes that do not divide the array evenly, in whole blocks."""
    fits = []
    for axis, (size, entry) in enumerate(zip(shape, spec, strict=False)):
        names: tuple[str, ...] = ()
        for name in (entry,) if isinstance(entry, str) else entry or ():
            cut = math.prod(mesh.shape[n] for n in (*names, name))
            if size % (cut * (BLOCK if axis == len(shape) - 1 else 1)) == 0:
                names = (*names, name)
        fits.append(names or None)
    return NamedSharding(mesh, PartitionSpec(*fits))
