"""What resuming a run of experiments.mnist gives after damage to its checkpoints, as JSON.

`python -m tests.mnist_damage`, in a process of its own: Orbax leaves threads and coroutines behind
when a restore fails.
"""

import contextlib
import io
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from experiments.mnist.checkpoints import begin, save
from experiments.mnist.config import Config
from tests.checkpoints.damage import DAMAGES

WAYS: dict[str, Callable[[bytes], bytes] | None] = {
    **DAMAGES,
    "emptied": lambda content: b"",
    "gone": None,
}
LIKE = {"w": jnp.arange(300.0), "b": {"c": jnp.ones(3, jnp.bfloat16)}}


def state(step: int) -> Any:
    return jax.tree.map(lambda x: x + step, LIKE)


def write(config: Config) -> None:
    """A run with three checkpoints."""
    checkpoints, _, at = begin(config, LIKE)
    for step in (5, 9, 14):
        at.step, at.loss = step, step + 0.5
        save(checkpoints, config, state(step), at, 0.5 if step == 9 else None)
    checkpoints.close()


def damaged(path: Path, damage: Callable[[bytes], bytes] | None) -> None:
    if damage is not None:
        path.write_bytes(damage(path.read_bytes()))
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def outcome(config: Config) -> dict[str, Any]:
    """Where the run goes on, whether with the right bits, what is said, and what is kept then."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        checkpoints, found, at = begin(replace(config, resume=True), LIKE)
    leaves = zip(jax.tree.leaves(found), jax.tree.leaves(state(at.step)), strict=True)
    right = all(np.array_equal(x, y) for x, y in leaves) and at.loss == at.step + 0.5
    step = at.step
    if step < 14:
        at.step = 14
        save(checkpoints, config, found, at, None)
    saved = list(checkpoints.all_steps())
    checkpoints.close()
    # Without what Python says of Orbax's coroutines.
    lines = [line for line in said.getvalue().splitlines() if line.startswith("the ")]
    return {"step": step, "right": bool(right), "said": lines, "saved": saved}


def outcomes(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """What was done to the last checkpoint, and what came of it."""
    whole = Config(out=folder / "whole")
    write(whole)
    last = Path("checkpoints") / "14"

    def after(place: Path, damage: Callable[[bytes], bytes] | None) -> dict[str, Any]:
        copy = folder / "damaged"
        shutil.copytree(whole.out, copy)
        damaged(copy / last / place, damage)
        found = outcome(replace(whole, out=copy))
        shutil.rmtree(copy)
        return found

    for path in sorted((whole.out / last).rglob("*")):
        place = path.relative_to(whole.out / last)
        # The folders d are named after what is in them.
        name = re.sub(r"[0-9a-f]{32}", str(path.stat().st_size), str(place))
        for way, damage in WAYS.items():
            if damage is None or path.is_file():
                yield f"{name} {way}", after(place, damage)
    yield (
        "a digit changed in position/metadata",
        after(Path("position/metadata"), lambda content: content.replace(b"14.5", b"15.5")),
    )


def nothing_whole(folder: Path) -> dict[str, Any]:
    """What is said when every checkpoint is damaged."""
    config = Config(out=folder / "none")
    write(config)
    for step in (5, 9, 14):
        damaged(config.out / f"checkpoints/{step}/state/manifest.ocdbt", DAMAGES["truncated"])
    try:
        begin(replace(config, resume=True), LIKE)
    except Exception as error:
        left = sorted(path.name for path in config.out.iterdir())
        return {"error": f"{type(error).__name__}: {error}", "left": left}
    raise AssertionError("expected an error")


if __name__ == "__main__":
    logging.set_verbosity(logging.FATAL)
    with tempfile.TemporaryDirectory() as folder:
        found = {"last": dict(outcomes(Path(folder))), "all": nothing_whole(Path(folder))}
        print(json.dumps(found))
