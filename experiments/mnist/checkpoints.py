"""Where a run is, and its checkpoints with Orbax: one that was killed goes on to the same bits."""

import contextlib
import fcntl
import json
import shutil
import sys
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from .config import Config

State = TypeVar("State", bound=PyTree)


@dataclass
class Position:
    """How far a run has come: what the arrays do not say."""

    step: int = 0
    loss: float = 0.0
    """Sums over the images of this epoch, and seconds."""
    correct: int = 0
    seconds: float = 0.0
    metrics: int = 0
    """Lines in metrics.jsonl and in diagnostics.jsonl."""
    diagnostics: int = 0


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the run's folder for this process; the lock ends with it, however it ends.

    Raises:
        ValueError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"--out: expected a folder in which no run is going on, {folder} has one, in "
                "another process"
            ) from None
        yield


def begin(config: Config, state: State) -> tuple[ocp.CheckpointManager, State, Position]:
    """The checkpoints of the run's folder, and the state and position to go on from.

    A new run replaces one that was finished.

    Where the last checkpoint is damaged, that is said, and the one before is taken.

    Raises:
        ValueError: the checkpoint to resume is missing, of another configuration, or none is
            whole; or a new run would replace one that was not finished.
    """
    folder, result = config.out / "checkpoints", config.out / "result.json"
    checkpoints = _open(folder, config.keep)
    step = checkpoints.latest_step()
    if config.resume:
        if step is None:
            raise ValueError(f"--resume: expected a checkpoint in {folder}, which has none")
        return checkpoints, *_restore(checkpoints, config, state)
    if step is not None:
        if not result.exists():
            raise ValueError(
                f"--out: expected a folder without an unfinished run, {config.out} has one at step "
                f"{step}; go on with --resume, or delete the folder"
            )
        checkpoints.close()
        for finished in (folder, config.out / "tensorboard"):
            shutil.rmtree(finished, ignore_errors=True)
        checkpoints = _open(folder, config.keep)
    result.unlink(missing_ok=True)
    return checkpoints, state, Position()


def _open(folder: Path, keep: int) -> ocp.CheckpointManager:
    """The last `keep` checkpoints, and the one of the best validation.

    Orbax writes each under a temporary name, and renames it when all is in it.
    """
    best = BestN(
        get_metric_fn=lambda metrics: metrics["accuracy"],
        n=1,
        keep_checkpoints_without_metrics=False,
    )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=AnyPreservationPolicy([LatestN(keep), best]),
        enable_async_checkpointing=False,
    )
    return ocp.CheckpointManager(folder.absolute(), options=options)


def save(
    checkpoints: ocp.CheckpointManager,
    config: Config,
    state: PyTree,
    at: Position,
    accuracy: float | None,
) -> None:
    """The arrays, the position and the configuration; the accuracy is that of a validation."""
    position = {**asdict(at), "config": config.as_json()}
    checkpoints.save(
        at.step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            position=ocp.args.JsonSave({**position, "crc32": _checksum(position)}),
        ),
        metrics=None if accuracy is None else {"accuracy": accuracy},
    )


def _checksum(position: dict[str, Any]) -> int:
    """Orbax has one for arrays, but none for JSON."""
    return zlib.crc32(json.dumps(position, sort_keys=True).encode())


class _OtherRunError(ValueError):
    """The checkpoint is whole, and of another configuration."""


def _restore(
    checkpoints: ocp.CheckpointManager, config: Config, like: State
) -> tuple[State, Position]:
    """The last checkpoint that is whole; those after it are moved to the folder `damaged`."""
    damaged: dict[int, str] = {}
    for step in sorted(checkpoints.all_steps(), reverse=True):
        try:
            restored = _read(checkpoints, step, config, like)
        except _OtherRunError:
            raise
        except Exception as error:  # of any kind: Orbax, TensorStore and json have their own
            first_line = f"{type(error).__name__}: {error}".partition("\n")[0]
            damaged[step] = f"the checkpoint of step {step} is damaged ({first_line:.200})"
        else:
            break
    else:
        reasons = "; ".join(damaged.values())
        raise ValueError(
            f"--resume: expected a whole checkpoint in {checkpoints.directory}: {reasons}"
        )
    for step, reason in damaged.items():
        aside = config.out / "damaged" / str(step)
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(exist_ok=True)
        (config.out / "checkpoints" / str(step)).rename(aside)
        print(f"{reason}, and is now in {aside}", file=sys.stderr)
    if damaged:
        print(f"the run goes on from step {restored[1].step}", file=sys.stderr)
        checkpoints.reload()
    return restored


def _read(
    checkpoints: ocp.CheckpointManager, step: int, config: Config, like: State
) -> tuple[State, Position]:
    """What was saved at a step, its arrays in the places of those of `like`."""
    # The configuration first: other options make other trees, at which Orbax would fail.
    position = checkpoints.restore(step, args=ocp.args.Composite(position=ocp.args.JsonRestore()))[
        "position"
    ]
    if position.pop("crc32", None) != _checksum(position):
        raise ValueError("the checksum of its position is wrong")
    _same_run(config, position.pop("config"))
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
    )
    arrays = checkpoints.restore(
        step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))
    )
    return arrays["state"], Position(**position)


def _same_run(config: Config, saved: dict[str, Any]) -> None:
    for name, value in config.as_json().items():
        if name not in ("out", "resume", "keep") and value != saved.get(name):
            raise _OtherRunError(
                f"--resume: the run in {config.out} has --{name.replace('_', '-')} "
                f"{saved.get(name)}, not {value}"
            )
