"""SIGINT and SIGTERM end a run between two calls, with its state saved."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn


class InterruptedRunError(Exception):
    """A signal ended the run, whose state is saved."""

    def __init__(self, number: signal.Signals, step: int):
        super().__init__(f"{number.name}: the run is saved at step {step}")
        self.number = number


@contextlib.contextmanager
def interruptions() -> Iterator[Callable[[], signal.Signals | None]]:
    """Gives a function that says which signal has come; a second one acts at once, as ever."""
    came: list[signal.Signals] = []
    before: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        came.append(signal.Signals(number))
        signal.signal(number, before[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield lambda: came[0] if came else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_by(number: signal.Signals) -> NoReturn:
    """Ends the process as the signal does by default, so that its parent sees which it was."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    raise AssertionError("unreachable: the signal has ended the process")
