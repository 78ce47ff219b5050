"""What a process of this bench says to the command that started it: a row at a time, by a key.

Without JAX, so that PyTorch's process needs none.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

MARK = "\x1e"
"""Begins a line that is a row; all others are somebody's message."""
ABOUT = "about"
"""The key of what is true of all rows: device, versions, kernels."""


class Order(NamedTuple):
    """What a process is told.

    Attributes:
        tiny: sizes that a CPU steps at once.
        until: when it must have ended, in seconds as `time.time` counts them.
        seconds: how long to train.
        names: what to do: whose memory to measure, which setting to train.
        cache: a folder for the text.
    """

    tiny: bool
    until: float
    seconds: float = 0.0
    names: tuple[str, ...] = ()
    cache: str = ""

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.until - time.time()


def order() -> Order:
    """The one that this process was started with."""
    return Order(**json.loads(sys.argv[-1]))


def say(key: str, row: dict[str, Any]) -> None:
    """Says a row; a later one takes the place of an earlier one of the same key."""
    print(f"{MARK}{json.dumps([key, row])}", flush=True)


def heard(line: str) -> tuple[str, dict[str, Any]] | None:
    """The key and the row of a line, if it is one."""
    return tuple(json.loads(line[len(MARK) :])) if line.startswith(MARK) else None


def attempt(key: str, found: Callable[[], dict[str, Any]], order: Order, **fixed: Any) -> None:
    """Says a row, or why there is none: one that fails takes no other with it."""
    if order.left < 0:
        say(key, {**fixed, "missing": "no time was left"})
        return
    try:
        say(key, {**fixed, **found()})
    except Exception as error:
        say(key, {**fixed, "failed": reason(error)})


def reason(error: BaseException) -> str:
    """An error in a line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def end() -> None:
    """Ends the process at once: what still compiles in a thread is not waited for."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


REPEATS = 7
"""Turns whose median is the time."""
TURN_SECONDS = 0.03
"""How long a turn should take."""


def calls_in_a_turn(seconds: float) -> int:
    """How many calls of so many seconds a turn has."""
    return max(1, min(50, round(TURN_SECONDS / max(seconds, 1e-6))))
