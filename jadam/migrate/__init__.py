"""States from elsewhere and back: optax, torch and Keras, other storage, safetensors files.

A state says neither which member of the family made it nor with which hyperparameters: what has
to be known is an argument, and the transformation that goes on must be made with the same. What
does not fit is refused with its name; nothing is dropped, filled in or guessed.
"""

from jadam.migrate._cast import cast_like
from jadam.migrate._keras import from_keras, to_keras
from jadam.migrate._optax import from_optax, to_optax
from jadam.migrate._safetensors import from_safetensors, to_safetensors
from jadam.migrate._torch import from_torch, to_torch

__all__ = [
    "cast_like",
    "from_keras",
    "from_optax",
    "from_safetensors",
    "from_torch",
    "to_keras",
    "to_optax",
    "to_safetensors",
    "to_torch",
]


def __dir__() -> list[str]:
    return __all__
