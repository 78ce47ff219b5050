"""Runs of experiments.mnist that are killed go on to the bits of one that was not."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments.mnist import pictures, train
from experiments.mnist.checkpoints import Position, begin
from tests.mnist_run import CONFIG, Tiny, digits

ROOT = Path(__file__).parent.parent
STEPS = 27


@pytest.fixture(scope="module")
def small():
    """The model and the images of tests/mnist_run.py, and no pictures, which take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.MODELS, "mlp", Tiny)
        patch.setattr(pictures, "write_all", lambda *arguments: None)
        yield digits()


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """The folder of a run without interruption."""
    out = tmp_path_factory.mktemp("whole")
    train.train_and_test(replace(CONFIG, out=out), small)
    return out


def checkpoint(out):
    """All arrays of the last checkpoint by their names."""
    with ocp.CheckpointManager(out / "checkpoints") as checkpoints:
        state = checkpoints.restore(
            STEPS, args=ocp.args.Composite(state=ocp.args.StandardRestore())
        )["state"]
        flat = {}

        def add(path, tree):
            if isinstance(tree, dict):
                for name, branch in tree.items():
                    add(f"{path}/{name}", branch)
            elif isinstance(tree, (list, tuple)):
                add(path, dict(enumerate(tree)))
            elif tree is not None:
                flat[path] = np.asarray(tree)

        add("", state)
        return flat


def steps_in(out):
    with ocp.CheckpointManager(out / "checkpoints") as checkpoints:
        return list(checkpoints.all_steps())


def metrics(out):
    """The rows, but for what the clock says."""
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{name: x for name, x in row.items() if name != "seconds"} for row in rows]


def killed(out, resume, *death):
    """Runs tests/mnist_run.py to its end by SIGKILL."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-m", "tests.mnist_run", str(out), str(resume), *map(str, death)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def test_a_killed_run_goes_on_to_the_same_bits(small, whole, tmp_path):
    """SIGKILL in mid-epoch, then in mid-save: parameters, moments, average, statistics, metrics."""
    # At the 17th line; the run is at step 16, its last checkpoint at 14, the fifth of the second
    # epoch. The 10th line is the validation of the first.
    killed(tmp_path, False, "open", "metrics.jsonl", 17)
    assert steps_in(tmp_path) == [5, 9, 14]
    assert len(metrics(tmp_path)) == 16

    # All of the checkpoint is written but its name.
    killed(tmp_path, True, "os.rename", "checkpoints/23", 1)
    written = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert any(name.startswith("23.orbax-checkpoint-tmp") for name in written)
    assert "23" not in written

    result = train.train_and_test(replace(CONFIG, out=tmp_path, resume=True), small)
    assert result["epochs"][-1]["step"] == STEPS
    expected, got = checkpoint(whole), checkpoint(tmp_path)
    assert expected.keys() == got.keys()
    kinds = ("params", "mu", "nu", "stats", "average")
    assert all(any(f"/{kind}/" in name for name in expected) for kind in kinds)
    for name, array in expected.items():
        assert array.dtype == got[name].dtype
        assert array.tobytes() == got[name].tobytes(), name
    assert metrics(tmp_path) == metrics(whole)


def test_the_last_checkpoints_and_the_best_are_kept(whole):
    """Three of the last, and that of the epoch with the best validation."""
    best = max((row["validation/accuracy"], row["step"]) for row in metrics(whole)[9::10])[1]
    assert steps_in(whole) == sorted({18, 23, 27, best})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 2e-3}, "--resume: the run in .* has --learning-rate 0.001, not 0.002"),
        ({"seed": 1}, "has --seed 0, not 1"),
        ({"mu_dtype": None, "nu_dtype": None}, "has --mu-dtype bfloat16, not None"),
        ({"optimizer": "adamax", "nu_dtype": None}, "has --optimizer adamw, not adamax"),
    ],
)
def test_another_configuration_is_refused(change, message, small, whole):
    """Before an array is read, with the option's name and both values."""
    with pytest.raises(ValueError, match=message):
        train.train_and_test(replace(CONFIG, out=whole, resume=True, **change), small)


def test_what_there_is_nothing_to_resume_from_is_named(small, tmp_path):
    """A wrong folder is not silently trained from the start."""
    with pytest.raises(ValueError, match=r"--resume: expected a checkpoint in .* has none"):
        train.train_and_test(replace(CONFIG, out=tmp_path, resume=True), small)


def test_a_new_run_replaces_none_but_a_finished_one(small, whole):
    """Finished is a run whose numbers are written."""
    config = replace(CONFIG, out=whole)
    with pytest.raises(ValueError, match="--out: expected a folder without an unfinished run"):
        train.train_and_test(config, small)
    assert steps_in(whole)[-1] == STEPS
    (whole / "result.json").write_text("{}")
    checkpoints, state, at = begin(config, "new")
    assert (checkpoints.latest_step(), state, at) == (None, "new", Position())
    assert not (whole / "result.json").exists()
