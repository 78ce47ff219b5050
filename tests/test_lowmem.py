"""The low-memory experiment: its text, its language model, its settings, its statistics."""

import json
import sysconfig
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments.common import text
from experiments.common.gpt import GPT, Shape, loss_fn
from experiments.common.intervals import interval
from experiments.lowmem import lm, report, runs
from experiments.lowmem.memory import measure
from experiments.lowmem.settings import SETTINGS

TINY = Shape(layers=1, width=64, heads=2, context=16)


@pytest.fixture(scope="module")
def prose():
    """Python's own documentation of json, as the whole library's is collected."""
    values = np.frombuffer("\n\n".join(docstrings("json")).encode(), np.uint8)
    return text.Text(values[:-512], values[-512:], {})


def docstrings(package: str) -> list[str]:
    return text.docstrings(Path(sysconfig.get_path("stdlib")) / package)


def test_the_text_is_deterministic():
    """Sorted, none twice, none empty, and English."""
    found = docstrings("json")
    assert found == docstrings("json") == sorted(set(found))
    assert all(found)
    assert any("JSON (JavaScript Object Notation)" in docstring for docstring in found)


def test_docstrings_are_parsed_and_not_imported(tmp_path):
    """Of modules, classes and functions; tests and foreign packages are left out."""
    code = '"""A."""\nclass B:\n    "B."\n    def c(self):\n        "A."\nraise SystemExit\n'
    for name in ("module.py", "test/module.py", "site-packages/module.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(code if name == "module.py" else f'"""In {name}."""')
    assert text.docstrings(tmp_path) == ["A.", "B."]


def test_the_text_is_split_once_and_its_origin_told(tmp_path, monkeypatch):
    """The cache gives the same bytes; the tail is validation alone."""
    monkeypatch.setattr(text, "collect", lambda: b"abcdefgh")
    first = text.load(tmp_path, validation_bytes=3)
    monkeypatch.setattr(text, "collect", lambda: pytest.fail("collected twice"))
    again = text.load(tmp_path, validation_bytes=3)
    assert (first.train.tobytes(), first.validation.tobytes()) == (b"abcde", b"fgh")
    assert again.origin == first.origin
    assert first.origin["bytes"] == 8
    assert first.origin["sha256"].startswith("9c56cc51b374c3ba")  # of b"abcdefgh"


@pytest.mark.usefixtures("quick_compilation")
def test_the_language_model_is_causal():
    """A byte changes the logits of its own place and later ones, never of earlier ones."""
    model = GPT(TINY, rngs=nnx.Rngs(0))
    one = jnp.arange(16)[None] + 60
    other = one.at[0, 9].set(7)
    logits, changed = jnp.split(jax.jit(model)(jnp.concatenate([one, other])), 2)
    assert logits.shape == (1, 16, 256)
    assert logits.dtype == jnp.float32
    np.testing.assert_array_equal(logits[:, :9], changed[:, :9])
    assert jnp.all(jnp.any(logits[:, 9:] != changed[:, 9:], axis=-1))


@pytest.mark.usefixtures("quick_compilation")
def test_the_language_model_starts_at_a_uniform_guess():
    """log 256 = 5.545 nats; weights of sd 0.02 move it by some hundredths."""
    batch = jnp.asarray(np.random.default_rng(0).integers(0, 256, (8, 17)))
    assert abs(jax.jit(loss_fn)(GPT(TINY, rngs=nnx.Rngs(0)), batch) - np.log(256)) < 0.05


@pytest.mark.usefixtures("quick_compilation")
def test_the_language_model_has_the_size_of_its_description():
    """Bytes, positions, 4 blocks of 12 matrices' worth and 2 norms, a norm, the head."""
    params = nnx.eval_shape(lambda: nnx.state(GPT(Shape(), rngs=nnx.Rngs(0)), nnx.Param))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count == 256 * 256 + 128 * 256 + 4 * (12 * 256**2 + 2 * 256) + 256 + 256 * 256


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("setting", SETTINGS)
def test_each_setting_makes_a_step(setting):
    """The updates fit the parameters, and no aval of the state changes."""
    if not SETTINGS[setting].is_installed:
        pytest.skip(f"{SETTINGS[setting].package} is an optional peer")
    tx = SETTINGS[setting].build(optax.constant_schedule(1e-3), 0.1, optax.clip(1.0))
    params = {"w": jax.ShapeDtypeStruct((64, 128), jnp.dtype(SETTINGS[setting].param_dtype))}
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    assert updates["w"].shape == (64, 128)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )


# What is widest, and what is smallest.
SHORT = ("float32", "bf16 weights, compensated + 8-bit moments")


# optax.apply_updates of 16-bit parameters needs standard promotion.
@pytest.mark.usefixtures("standard_promotion", "quick_compilation")
@pytest.mark.parametrize(
    "setting",
    [name if name in SHORT else pytest.param(name, marks=pytest.mark.soak) for name in SETTINGS],
)
def test_each_setting_learns(setting, prose):
    """Thirty steps take the loss from 5.5 nats to below 4.5, with the parameters' dtype kept."""
    if not SETTINGS[setting].is_installed:
        pytest.skip(f"{SETTINGS[setting].package} is an optional peer")
    config = lm.Lm(steps=30, warmup=3, batch_size=4, learning_rate=1e-2, shape=TINY)
    result = lm.train(setting, 0, config, prose)
    assert result["curve"]["loss"][0] > 5.4
    assert result["final"]["training loss"] < 4.5
    assert result["final"]["validation loss"] < 4.5


@pytest.mark.usefixtures("either_compilation")
@pytest.mark.usefixtures("standard_promotion")
def test_memory_is_that_of_the_buffers():
    """float32 Adam: 4 bytes each of weights, gradient and two moments, all but one in place."""
    memory = measure(SETTINGS["float32"], TINY)
    # The count is one int32 for the whole tree.
    assert memory["live"] == pytest.approx(16, abs=4.1 / memory["parameters"])
    assert memory["in_place"] == pytest.approx(12, abs=4.1 / memory["parameters"])


def test_the_interval_is_students():
    """1, 2, 3: mean 2, sd 1, t(0.975, 2) = 4.30265; the half is 4.30265/√3 = 2.48414."""
    found = interval([1.0, 2.0, 3.0])
    assert found == pytest.approx((2.0, -0.48414, 4.48414), abs=1e-5)
    with pytest.raises(ValueError, match="expected 2 or more, got 1"):
        interval([1.0])


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([1.0, 2.0, 3.0], "no difference found"),
        ([2.0, 2.1, 2.2], "differs"),
        ([-2.0, -2.1, -2.2], "differs"),
        ([0.0, 0.0], "no difference found"),
        ([float("nan"), 0.0], "differs"),
    ],
)
def test_a_verdict_follows_from_the_interval(values, verdict):
    """Nothing is called equal whose interval leaves out 0, nor where a run diverged."""
    assert interval(values).verdict == verdict


def fake_run(setting: str, seed: int) -> dict:
    """A loss that depends on the seed much, on the setting little."""
    loss = 1 + seed + 0.01 * list(SETTINGS).index(setting) + 0.001 * seed
    return {
        "final": {"training loss": loss, "validation loss": loss},
        "curve": {"steps": list(range(1, 41)), "loss": [loss] * 40},
    }


def test_differences_are_paired_by_seed(tmp_path):
    """Seeds 1 apart hide nothing: the difference of 0.01 has no spread at all."""
    names = ["float32", "bf16 moments"]
    runs.run_all("lm", names, 3, tmp_path, {"steps": 40}, fake_run, guess=1)
    summary = report.summarize(report.runs_of(tmp_path, "lm"))
    loss = summary["bf16 moments"]["quantities"]["validation loss"]
    assert loss["high"] - loss["low"] > 4
    assert loss["difference"]["verdict"] == "differs"
    assert loss["difference"]["mean"] == pytest.approx(0.01)
    assert "differs: +0.0100 (+0.0100 to +0.0100)" in report.final_table("lm", summary)
    assert "| flashoptim-jax | 0 | not run" in report.final_table("lm", summary)


def test_finished_runs_are_not_run_again(tmp_path, capsys):
    """But for those of another config; a file gets its name when all is in it."""
    done = []

    def run(setting: str, seed: int) -> dict:
        done.append((setting, seed))
        return fake_run(setting, seed)

    for config in ({"steps": 40}, {"steps": 40}, {"steps": 50}):
        runs.run_all("lm", ["float32"], 2, tmp_path, config, run, guess=1)
    assert done == 2 * [("float32", 0), ("float32", 1)]
    assert "lm: 2 runs are there, 0 to do" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "lm").iterdir()) == [
        "float32.0.json",
        "float32.1.json",
    ]
    runs.run_all("lm", ["float32"], 1, tmp_path, {"steps": 40}, run, guess=1)
    with pytest.raises(ValueError, match="runs of 2 configs, expected one"):
        report.runs_of(tmp_path, "lm")


def test_an_unknown_setting_is_named(tmp_path):
    """Before anything runs."""
    with pytest.raises(ValueError, match=r"--settings: expected some of .*, got \['float31'\]"):
        runs.run_all("lm", ["float31"], 1, tmp_path, {}, fake_run, guess=1)


def test_the_report_writes_table_json_and_picture(tmp_path, monkeypatch):
    """From made-up runs of every setting; what is around the table stays."""
    monkeypatch.setattr(report, "measure", lambda setting, shape: dict.fromkeys(MEMORY, 1.5))
    runs.run_all("lm", list(SETTINGS), 3, tmp_path, {"steps": 40}, fake_run, guess=1)
    readme = tmp_path / "README.md"
    readme.write_text("Before.\n<!-- lowmem: begin -->\nold\n<!-- lowmem: end -->\nAfter.\n")
    project = tmp_path / "project.md"
    project.write_text("<!-- memory: begin -->\n<!-- memory: end -->\n")
    report.main(report.Report(tmp_path, tmp_path / "results", readme, project))
    assert "FlashOptim" in project.read_text()
    written = readme.read_text()
    assert written.startswith("Before.\n")
    assert written.endswith("<!-- lowmem: end -->\nAfter.\n")
    assert "| bf16 moments | 1.500 |" in written
    assert "old" not in written
    files = {path.name for path in (tmp_path / "results").iterdir()}
    assert files == {"lowmem.json", "lowmem.png", "lowmem.svg"}
    results = json.loads((tmp_path / "results" / "lowmem.json").read_text())
    assert results["lm"]["settings"]["float32"]["seeds"] == [0, 1, 2]


MEMORY = ("weights", "gradient", "state", "live", "temporary")
