"""Runs of experiments.mnist that are ended or damaged go on to the bits of one that was not."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import compilation
import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments.mnist import pictures, train
from experiments.mnist.checkpoints import Position, begin, locked
from experiments.mnist.interruption import interruptions
from tests.mnist_run import CONFIG, Tiny, digits

ROOT = Path(__file__).parent.parent
STEPS = 27


@pytest.fixture(scope="module", autouse=True)
def _quickly():
    """Here and in the processes that are started: bits are compared with bits made alike."""
    with compilation.quickly():
        yield


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


def ended_by(number, out, resume, *event):
    """What tests/mnist_run.py says until a signal ends it."""
    done = compilation.run_module("tests.mnist_run", out, resume, number.name, *event)
    assert done.returncode == -number, done.stderr
    return done.stderr


def assert_goes_on_to_the_same_bits(small, whole, out):
    """Parameters, moments, average, statistics and metrics are those of the whole run."""
    result = train.train_and_test(replace(CONFIG, out=out, resume=True), small)
    assert result["epochs"][-1]["step"] == STEPS
    expected, got = checkpoint(whole), checkpoint(out)
    assert expected.keys() == got.keys()
    kinds = ("params", "mu", "nu", "stats", "average")
    assert all(any(f"/{kind}/" in name for name in expected) for kind in kinds)
    for name, array in expected.items():
        assert array.dtype == got[name].dtype
        assert array.tobytes() == got[name].tobytes(), name
    assert metrics(out) == metrics(whole)


def test_a_killed_run_goes_on_to_the_same_bits(small, whole, tmp_path):
    """SIGKILL in mid-epoch."""
    # At the 17th line; the run is at step 16, its last checkpoint at 14, the fifth of the second
    # epoch. The 10th line is the validation of the first.
    ended_by(signal.SIGKILL, tmp_path, False, "open", "metrics.jsonl", 17)
    assert steps_in(tmp_path) == [5, 9, 14]
    assert len(metrics(tmp_path)) == 16
    assert_goes_on_to_the_same_bits(small, whole, tmp_path)


@pytest.mark.soak
def test_a_run_that_is_killed_in_mid_save_goes_on_to_the_same_bits(small, whole, tmp_path):
    """All of the checkpoint is written but its name."""
    ended_by(signal.SIGKILL, tmp_path, False, "os.rename", "checkpoints/23", 1)
    written = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert any(name.startswith("23.orbax-checkpoint-tmp") for name in written)
    assert "23" not in written
    assert_goes_on_to_the_same_bits(small, whole, tmp_path)


def test_a_run_that_is_asked_to_end_loses_nothing(small, whole, tmp_path):
    """SIGINT in mid-epoch: saved at that step, said how to go on, the signal's code."""
    said = ended_by(signal.SIGINT, tmp_path, False, "open", "metrics.jsonl", 8)
    assert "SIGINT: the run is saved at step 8; this goes on from there:\npython -m" in said
    assert said.strip().endswith("--resume")
    assert "Traceback" not in said
    assert steps_in(tmp_path)[-1] == 8
    assert_goes_on_to_the_same_bits(small, whole, tmp_path)


@pytest.mark.soak
def test_a_run_can_be_asked_to_end_twice(small, whole, tmp_path):
    """SIGINT and SIGTERM, the second in what the first left."""
    ended_by(signal.SIGINT, tmp_path, False, "open", "metrics.jsonl", 8)
    # It is opened to be read, for the lines of steps 9 to 14, the validation, and that of step 15.
    said = ended_by(signal.SIGTERM, tmp_path, True, "open", "metrics.jsonl", 9)
    assert "SIGTERM: the run is saved at step 15" in said
    assert said.count("--resume") == 1
    assert steps_in(tmp_path)[-1] == 15
    assert_goes_on_to_the_same_bits(small, whole, tmp_path)


@pytest.fixture
def _sigint_as_in_the_foreground():
    """A shell without job control has what it starts in the background ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_sigint_as_in_the_foreground")
def test_a_second_signal_acts_at_once():
    """A run that does not come to the end of its call can still be ended by hand."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with interruptions() as interruption:
        assert interruption() is None
        signal.raise_signal(signal.SIGINT)
        assert interruption() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with interruptions() as interruption:
        signal.raise_signal(signal.SIGTERM)
        assert interruption() == signal.SIGTERM
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_two_runs_do_not_share_a_folder(tmp_path, monkeypatch):
    """The second is refused before it reads or writes anything; the killed leave no lock."""
    monkeypatch.setattr(train, "load", lambda data_dir: pytest.fail("has started"))
    holder = (
        "import sys, time; from pathlib import Path; from experiments.mnist.checkpoints import "
        "locked\nwith locked(Path(sys.argv[1])): print('locked', flush=True); time.sleep(300)"
    )
    command = [sys.executable, "-c", holder, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"locked\n"
            for resume in (False, True):
                with pytest.raises(ValueError, match="--out: expected a folder in which no run is"):
                    train.main(replace(CONFIG, out=tmp_path, resume=resume))
        finally:
            process.kill()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    with locked(tmp_path):
        pass


@pytest.fixture(scope="module")
def damage():
    """What tests/mnist_damage.py finds, in a process in which Orbax leaves its threads behind."""
    done = compilation.run_module("tests.mnist_damage")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(damage):
    """Every file and folder of the last checkpoint cut, emptied, with a bit flipped or gone.

    What is taken nevertheless has all its bits: files that nothing is read from.
    """
    for done, came in damage["last"].items():
        assert came["right"], done
        if came["step"] == 14:
            assert came["said"] == [], done
        else:
            assert came["step"] == 9, done
            first, second = came["said"]
            assert first.startswith("the checkpoint of step 14 is damaged ("), done
            assert first.endswith("/damaged/14"), done
            assert second == "the run goes on from step 9", done
        assert came["saved"] == [5, 9, 14], done  # step 14 can be saved again
    needed = ("position/metadata", "state/_METADATA", "state/manifest.ocdbt", "state/d", "position")
    assert all(damage["last"][f"{place} gone"]["step"] == 9 for place in needed[2:])
    assert all(damage["last"][f"{place} truncated"]["step"] == 9 for place in needed[:3])
    assert damage["last"]["a digit changed in position/metadata"]["step"] == 9


def test_a_run_with_no_whole_checkpoint_is_refused(damage):
    """An error for the user that names each step; nothing is moved."""
    assert damage["all"]["error"].startswith("ValueError: --resume: expected a whole checkpoint")
    for step in (5, 9, 14):
        assert f"the checkpoint of step {step} is damaged (" in damage["all"]["error"]
    assert damage["all"]["left"] == ["checkpoints"]


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
