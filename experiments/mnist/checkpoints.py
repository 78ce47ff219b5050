"""Where a run is, and its checkpoints with Orbax: one that was killed goes on to the same bits."""

import shutil
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


def begin(config: Config, state: State) -> tuple[ocp.CheckpointManager, State, Position]:
    """The checkpoints of the run's folder, and the state and position to go on from.

    A new run replaces one that was finished.

    Raises:
        ValueError: the checkpoint to resume is missing or of another configuration; or a new run
            would replace one that was not finished.
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
            state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position)
        ),
        metrics=None if accuracy is None else {"accuracy": accuracy},
    )


def _restore(
    checkpoints: ocp.CheckpointManager, config: Config, like: State
) -> tuple[State, Position]:
    """What was saved last, its arrays in the places of those of `like`."""
    step = checkpoints.latest_step()
    # The configuration first: other options make other trees, at which Orbax would fail.
    position = checkpoints.restore(step, args=ocp.args.Composite(position=ocp.args.JsonRestore()))[
        "position"
    ]
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
            raise ValueError(
                f"--resume: the run in {config.out} has --{name.replace('_', '-')} "
                f"{saved.get(name)}, not {value}"
            )
