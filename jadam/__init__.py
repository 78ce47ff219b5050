"""Adam and its family for JAX: exact, small, fast, and a drop-in for `optax.adam`."""

from jadam import migrate as migrate
from jadam import sharding as sharding
from jadam._diagnostics import diagnostics as diagnostics
from jadam._kernels.choice import kernels as kernels
from jadam._state import AdamState as AdamState
from jadam._state import AdemamixState as AdemamixState
from jadam._state import AmsgradState as AmsgradState
from jadam._transform import FusedTransformation as FusedTransformation
from jadam._transform import adam as adam
from jadam._transform import adamax as adamax
from jadam._transform import adamaxw as adamaxw
from jadam._transform import adamw as adamw
from jadam._transform import ademamix as ademamix
from jadam._transform import amsgrad as amsgrad
from jadam._transform import nadam as nadam
from jadam._transform import nadamw as nadamw
from jadam._transform import radam as radam
from jadam._transform import scale_by_adam as scale_by_adam
from jadam._update import init as init
from jadam._update import step as step
from jadam._update import update as update
from jadam._weights import CompensatedWeightsState as CompensatedWeightsState
from jadam._weights import StochasticRoundingState as StochasticRoundingState
from jadam._weights import compensated_weights as compensated_weights
from jadam._weights import master_weights as master_weights
from jadam._weights import stochastic_rounding as stochastic_rounding

__version__ = "0.1.0"
