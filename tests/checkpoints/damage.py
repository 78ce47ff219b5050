"""What restoring gives after damage, and into a state of another layout, as JSON.

`python -m tests.checkpoints.damage`, in a process of its own: Orbax leaves threads and coroutines
behind when a restore fails.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from tests.checkpoints.states import STATES, after_steps, parameters

LAYOUTS = ("adam", "adam_8_bits", "amsgrad_8_bits", "compensated_int8", "compensated_int16")
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[: len(content) // 2],
    "a bit flipped": lambda content: (
        content[: len(content) // 2]
        + bytes([content[len(content) // 2] ^ 1])
        + content[len(content) // 2 + 1 :]
    ),
}


def outcome(path: Path, name: str, params: dict, right: object) -> str:
    """The error, or whether the restored state is bit for bit the saved one."""
    target = jax.eval_shape(STATES[name].init, params)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(path, target)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    leaves = jax.tree.leaves(restored), jax.tree.leaves(right)
    return "the same" if all(map(np.array_equal, *leaves)) else "changed"


def outcomes(folder: Path) -> Iterator[tuple[str, str]]:
    """What was done, and what came of it."""
    states = {name: after_steps(name, steps=1)[0] for name in LAYOUTS}
    for name, state in states.items():
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / name, state)
    for saved, right in states.items():
        for name in LAYOUTS:
            done = f"{saved} into {name}"
            yield done, outcome(folder / saved, name, parameters(name), right)
    saved, params = "adam_8_bits", parameters("adam_8_bits")
    right = states[saved]
    others = {
        "a missing leaf": {"kernel": params["kernel"]},
        "another leaf": params | {"scale": params["bias"]},
        "another shape": params | {"bias": params["bias"][:-1]},
    }
    for done, other in others.items():
        yield done, outcome(folder / saved, saved, other, right)
    for file in sorted(path for path in (folder / saved).rglob("*") if path.is_file()):
        place = file.relative_to(folder / saved)
        for done, damaged in DAMAGES.items():
            copy = shutil.copytree(folder / saved, folder / "damaged", dirs_exist_ok=True)
            (copy / place).write_bytes(damaged(file.read_bytes()))
            yield f"{place} {done}", outcome(copy, saved, params, right)
            shutil.rmtree(copy)


if __name__ == "__main__":
    logging.set_verbosity(logging.FATAL)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(dict(outcomes(Path(folder)))))
