"""States from elsewhere and back: optax, torch and Keras, other storage, safetensors files.

A state says neither which member of the family made it nor with which hyperparameters: what has
to be known is an argument, and the transformation that goes on must be made with the same. What
does not fit is refused with its name; nothing is dropped, filled in or guessed.
"""

from jadam.migrate._cast import cast_like as cast_like
from jadam.migrate._keras import from_keras as from_keras
from jadam.migrate._keras import to_keras as to_keras
from jadam.migrate._optax import from_optax as from_optax
from jadam.migrate._optax import to_optax as to_optax
from jadam.migrate._safetensors import from_safetensors as from_safetensors
from jadam.migrate._safetensors import to_safetensors as to_safetensors
from jadam.migrate._torch import from_torch as from_torch
from jadam.migrate._torch import to_torch as to_torch
