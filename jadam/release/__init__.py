"""Gradients that are never whole: each layer of a scanned stack is stepped in the backward pass.

A train step that donates its parameters and state holds the gradients of all parameters besides,
where layers are stacked and scanned: XLA frees a gradient when its leaf is stepped, but the stack
is one leaf. `scan` takes the place of `jax.lax.scan` in the model, and `train_step` makes the step
from the loss and the transformation.
"""

from jadam.release._scan import scan
from jadam.release._step import train_step
from jadam.release._survey import released

__all__ = [
    "released",
    "scan",
    "train_step",
]


def __dir__() -> list[str]:
    return __all__
