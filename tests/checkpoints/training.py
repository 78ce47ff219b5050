"""A training that goes on from its last checkpoint, for tests that end it rudely.

`python -m tests.checkpoints.training FOLDER STEPS [kill|full AT]`
"""

import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from tests.checkpoints.states import STATES, gradients, parameters, step

NAME = "compensated_int8"  # with codes, residuals and a dither: the layout with most to lose
EVERY = 2


def train(folder: Path, steps: int, ending: str = "", at: int = -1) -> Any:
    """State and parameters after `steps` steps, saved every second one."""
    tx, params = STATES[NAME], parameters(NAME)
    now = {"state": tx.init(params), "params": params}
    options = ocp.CheckpointManagerOptions(save_interval_steps=EVERY, max_to_keep=3)
    with ocp.CheckpointManager(folder, options=options) as manager:
        start = manager.latest_step() or 0
        if start:
            target = jax.tree.map(ocp.utils.to_shape_dtype_struct, now)
            now = manager.restore(start, args=ocp.args.StandardRestore(target))
        for number in range(start + 1, steps + 1):
            grads = gradients(now["params"], number)
            _, state, params = step(tx, grads, now["state"], now["params"])
            now = {"state": state, "params": params}
            if number == at and ending == "full":
                # Files can grow to 100 bytes, as on a disk with that left.
                resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
            manager.save(number, args=ocp.args.StandardSave(now))
            if number == at and ending == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
    return now


if __name__ == "__main__":
    folder, steps, *ending = sys.argv[1:]
    train(Path(folder), int(steps), *ending[:1], *map(int, ending[1:]))
