"""Adam and its family for JAX: exact, small, fast, and a drop-in for `optax.adam`.

Transformations   adam adamw nadam nadamw amsgrad adamax adamaxw radam ademamix, and
                  scale_by_adam, scale_by_amsgrad, scale_by_adamax and scale_by_radam alone; each
                  is a FusedTransformation: `init` and `update` as in optax, and `step`.
Pure functions    init, update and step on trees; AdamState, optax's class, is their state.
16-bit weights    compensated_weights, stochastic_rounding, master_weights.
Looking inside    diagnostics: what a step did; moments: those of a state as numbers; kernels: what
                  computes a step on each platform.
Modules           jadam.rows: embeddings by the rows that are touched; jadam.release: gradients
                  that are never whole; jadam.sharding: where the state lies; jadam.migrate:
                  states from elsewhere.
"""

from jadam import migrate, release, rows, sharding
from jadam._diagnostics import diagnostics
from jadam._kernels.choice import kernels
from jadam._moments import moments
from jadam._state import AdamState, AdemamixState, AmsgradState
from jadam._transform import (
    FusedTransformation,
    adam,
    adamax,
    adamaxw,
    adamw,
    ademamix,
    amsgrad,
    nadam,
    nadamw,
    radam,
    scale_by_adam,
    scale_by_adamax,
    scale_by_amsgrad,
    scale_by_radam,
)
from jadam._update import init, step, update
from jadam._weights import (
    CompensatedWeightsState,
    StochasticRoundingState,
    compensated_weights,
    master_weights,
    stochastic_rounding,
)

__version__ = "0.1.0"

__all__ = [
    "AdamState",
    "AdemamixState",
    "AmsgradState",
    "CompensatedWeightsState",
    "FusedTransformation",
    "StochasticRoundingState",
    "adam",
    "adamax",
    "adamaxw",
    "adamw",
    "ademamix",
    "amsgrad",
    "compensated_weights",
    "diagnostics",
    "init",
    "kernels",
    "master_weights",
    "migrate",
    "moments",
    "nadam",
    "nadamw",
    "radam",
    "release",
    "rows",
    "scale_by_adam",
    "scale_by_adamax",
    "scale_by_amsgrad",
    "scale_by_radam",
    "sharding",
    "step",
    "stochastic_rounding",
    "update",
]


def __dir__() -> list[str]:
    return __all__
