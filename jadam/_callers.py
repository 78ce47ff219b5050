"""What optax makes of an update behind us: read from Python's stack while a step is traced.

A wrapper that keeps what a rounding took must know which number each parameter becomes, so its
update has to be applied as it is. optax has no way to ask what else comes; the stack has one. Where
optax's code is another than the one known here, nothing is noticed and nothing else changes.
"""

import inspect
import warnings
from types import FrameType
from typing import Any

# Functions with a lax.cond between an update and an array of the gradient's dtype.
_CHOOSES = {
    "apply_if_finite.<locals>.update.<locals>.do_update",
    "conditionally_mask.<locals>.update_fn.<locals>.do_update",
    "conditionally_transform.<locals>.update_fn.<locals>.do_update",
}

# It does nothing, or as a rule what it does is for the parameters that another mask leaves out.
_HARMLESS = {"identity", "masked"}


def check_callers(by: str, *, changes_dtypes: bool) -> None:
    """What runs this update leaves its updates as they are.

    Args:
        by: the wrapper whose update runs.
        changes_dtypes: whether an update is of another dtype than its gradient.

    Raises:
        TypeError: optax would choose between the update and an array of the gradient's dtype.

    Warns:
        UserWarning: another transformation follows in a chain.
    """
    frame, level = inspect.currentframe(), 1
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("optax."):
            name = frame.f_code.co_qualname
            if changes_dtypes and name in _CHOOSES:
                outer = f"optax.{name.split('.')[0]}"
                raise TypeError(
                    f"{outer}: expected updates of the gradients' dtypes, got those of {by} in "
                    f"float32; put it inside, {by}({outer}(inner, ...))"
                )
            if following := _following(frame):
                warnings.warn(
                    f"{by}: its updates are what the parameters must move by, and "
                    f"{', '.join(following)} after it in the chain changes them, so that weights "
                    f"go astray or stand still; put all inside, {by}(optax.chain(...))",
                    stacklevel=level + 1,
                )
        frame, level = frame.f_back, level + 1


def _following(frame: FrameType) -> list[str]:
    """The names of the transformations that a chain runs after the present one."""
    known = frame.f_locals
    later = slice(len(known.get("new_state", ())) + 1, None)
    match frame.f_code.co_qualname:
        case "chain.<locals>.update_fn":
            updates = known.get("update_fns", ())[later]
            return [name for name in map(_name, updates) if name not in _HARMLESS]
        case "named_chain.<locals>.update_fn":
            return [name for name, _ in known.get("transforms", ())[later]]
        case _:
            return []


def _name(update: Any) -> str:
    """The function of optax that made this `update`."""
    name = getattr(update, "__qualname__", type(update).__name__)
    if name.startswith("with_extra_args_support."):
        return _name(inspect.getclosurevars(update).nonlocals["tx"].update)
    return name.split(".")[0]
