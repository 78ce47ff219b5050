"""What one step of an optimizer is timed on: the shapes of the parameters."""

import math
from dataclasses import dataclass

Shapes = tuple[tuple[int, ...], ...]


def gpt2(layers: int = 12, width: int = 768) -> Shapes:
    """GPT-2 124M as Hugging Face stores it, the head tied to the embedding: 148 leaves."""
    vocabulary, context = 50257, 1024
    norm = ((width,), (width,))
    attention = ((width, 3 * width), (3 * width,), (width, width), (width,))
    mlp = ((width, 4 * width), (4 * width,), (4 * width, width), (width,))
    blocks = (*norm, *attention, *norm, *mlp) * layers
    return ((vocabulary, width), (context, width), *blocks, *norm)


def llama3_layer(width: int = 4096, keys: int = 1024, hidden: int = 14336) -> Shapes:
    """One layer of Llama 3 8B (arXiv 2407.21783, table 3): grouped queries, SwiGLU, two norms."""
    attention = ((width, width), (width, keys), (width, keys), (width, width))
    mlp = ((width, hidden), (width, hidden), (hidden, width))
    return (*attention, *mlp, (width,), (width,))


@dataclass(frozen=True)
class Workload:
    """Shapes under a name.

    Attributes:
        name: as the tables show it.
        shapes: of the parameters.
        many_leaves: whether steps in one `jax.lax.scan` and leaves in one buffer are timed too.
        gpu_only: too large for a CPU's patience.
    """

    name: str
    shapes: Shapes
    many_leaves: bool = False
    gpu_only: bool = False

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)


ONE_LEAF = Workload("1 leaf of 50M", ((50_000_000,),))
GPT2 = Workload("GPT-2 124M", gpt2())
MANY_LEAVES = Workload("300 leaves of 100k", ((100_000,),) * 300, many_leaves=True)
TINY_LEAVES = Workload("2,000 leaves of 2k", ((2_000,),) * 2_000, many_leaves=True)
LLAMA3_LAYER = Workload("Llama 3 8B, a layer", llama3_layer())
IN_CACHE = Workload("1 leaf of 1M, in cache", ((1_000_000,),))
WORKLOADS = (
    ONE_LEAF,
    GPT2,
    LLAMA3_LAYER,
    MANY_LEAVES,
    TINY_LEAVES,
    IN_CACHE,
    Workload("1 leaf of 1B", ((1_000_000_000,),), gpu_only=True),
)
QUICK = (
    Workload("1 leaf of 100k", ((100_000,),)),
    Workload("20 leaves of 64 x 64", ((64, 64),) * 20, many_leaves=True),
)
