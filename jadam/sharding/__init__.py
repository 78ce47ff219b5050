"""Where the optimizer's state lies: like the parameters, divided further (ZeRO-1), on the host.

And a step in which each device steps its own part.

A leaf of the state belongs to the parameter whose path its own path ends with, and lies where that
parameter lies: moments, codes, residuals and accumulated gradients along all axes, the tops of
blocks too where no block is cut. (For programs that lay all like the parameters, whatever its
shape, there is `divisible`.) What belongs to none, a count or a key, lies whole on each device.
"""

from jadam.sharding._divisible import divisible
from jadam.sharding._parts import step_in_parts
from jadam.sharding._rules import divided, state_shardings
from jadam.sharding._streamed import streamed

__all__ = [
    "divided",
    "divisible",
    "state_shardings",
    "step_in_parts",
    "streamed",
]


def __dir__() -> list[str]:
    return __all__
