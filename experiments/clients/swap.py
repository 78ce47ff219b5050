"""Runs a program as it is with another Adam: `python swap.py optax|jadam|jadam-8bit PROGRAM`.

Every transformation that both libraries have becomes jadam's, wherever a program finds it: in
optax, and in the modules where optax's own aliases, wrappers and Muon look for it.
"""

import functools
import runpy
import sys
from collections.abc import Callable
from typing import Any

NAMES = ("adam", "adamax", "adamaxw", "adamw", "amsgrad", "nadam", "nadamw", "radam")
DIRECTIONS = ("scale_by_adam", "scale_by_adamax", "scale_by_amsgrad", "scale_by_radam")
EIGHT_BITS = {"mu_dtype": "int8", "nu_dtype": "uint8", "min_size": 0}


def swap(options: dict) -> None:
    """Puts jadam's in the place of optax's; AMSGrad with the maximum that optax has."""
    import optax
    import optax.contrib
    from optax._src import alias, transform
    from optax.contrib import _ademamix

    import jadam

    for name in (*NAMES, *DIRECTIONS, "ademamix"):
        given = options | ({"maximum": "corrected"} if "amsgrad" in name else {})
        ours = with_options(getattr(jadam, name), given)
        for module in (optax, optax.contrib, alias, transform, _ademamix):
            if hasattr(module, name):
                setattr(module, name, ours)


def with_options(ours: Callable, given: dict) -> Callable:
    """A transformation that is made with these arguments, whatever the program says of them."""
    if not given:
        return ours
    from jadam.sharding import divisible

    @functools.wraps(ours)
    def made(*args: Any, **kwargs: Any) -> Any:
        tx = ours(*args, **kwargs | given)
        # So that a program which lays its state like its parameters can have codes.
        return divisible(tx, 8) if "nu_dtype" in given else tx

    return made


if __name__ == "__main__":
    _, library, program, *rest = sys.argv
    if library != "optax":
        swap(EIGHT_BITS if library == "jadam-8bit" else {})
    sys.argv = [program, *rest]
    runpy.run_path(program, run_name="__main__")
