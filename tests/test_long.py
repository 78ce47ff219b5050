"""The long trainings: their control, their steps, what is counted, and their files."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compilation import quickly

import jadam
from experiments.common.text import Text
from experiments.lowmem.long import __main__ as long
from experiments.lowmem.long import nearest, report
from experiments.lowmem.long.training import LONG, Config, Program, Task, share_moved

TEXT = Text(
    np.frombuffer(b"Words that come again and again. " * 40, np.uint8),
    np.frombuffer(b"again and again come other words " * 4, np.uint8),
    {"bytes": 0},
)
# optax.apply_updates of 16-bit parameters needs standard promotion.
pytestmark = pytest.mark.usefixtures("standard_promotion")


def v_after(tx, gradients):
    """v after some steps with one gradient, and after 693 without."""
    params = jnp.zeros_like(gradients)

    def step(state, g):
        return tx.update(g, state, params)[1], None

    def adam_of(state):
        return state if isinstance(state, jadam.AdamState) else state[1]  # a chain's second

    @jax.jit
    def run(state):
        early, _ = jax.lax.scan(step, state, jnp.stack([gradients] * 3))
        late, _ = jax.lax.scan(step, early, jnp.zeros((693, *params.shape)))
        return early, late

    return [np.asarray(jadam.moments(adam_of(x)).nu) for x in run(tx.init(params))]


@pytest.mark.usefixtures("quick_compilation")
def test_the_control_gets_stuck_where_jadam_does_not():
    """v shrinks by 0.999 in a step without a gradient, and so to a half in 693.

    Rounded to nearest it does not move at all. Dithered it is a half to within a fifth: the
    roundings of so many steps add up to some levels, of 4.4% each.
    """
    g = jnp.asarray(np.random.default_rng(0).normal(size=(32, 128)), jnp.float32)
    exact = np.asarray(g) ** 2 * (1 - 0.999**3)
    control = nearest.adamw(lambda count: 1e-3, 0.0, optax.identity())
    early, late = v_after(control, g)
    np.testing.assert_allclose(early, exact, rtol=0.1)  # two levels: it starts as exact Adam does
    np.testing.assert_array_equal(late, early)
    early, late = v_after(jadam.scale_by_adam(mu_dtype="int8", nu_dtype="uint8"), g)
    np.testing.assert_allclose(early, exact, rtol=0.1)
    np.testing.assert_allclose(late, exact / 2, rtol=0.2)


def test_a_moved_parameter_is_counted_once():
    """A residual that changes moves its parameter, and both together are one."""
    before = {"a": jnp.zeros(4)}, {"a": jnp.zeros(4, jnp.int8)}
    after = {"a": jnp.array([0.0, 1, 1, 0])}, {"a": jnp.array([0, 0, 1, 1], jnp.int8)}
    assert share_moved(before[:1], after[:1]) == 0.5
    assert share_moved(before, after) == 0.75
    assert share_moved((*before[:1], None), (*after[:1], None)) == 0.5


def test_the_rates_are_those_of_the_schedule():
    """Warmup, a cosine to the last share, and a constant one for fine-tuning."""
    config = Config(steps=1000, warmup=100, chunk=50, fine_steps=50)
    assert config.rates[100] == pytest.approx(config.learning_rate)
    # Half a step's worth of a cosine's end.
    assert config.rates[-1] == pytest.approx(config.learning_rate / 10, rel=1e-4)
    assert set(config.fine_rates) == {np.float32(config.learning_rate / 100)}
    with pytest.raises(ValueError, match="steps: expected a multiple of 50, got 30"):
        replace(config, steps=30)


@pytest.fixture(scope="module")
def task():
    """Tiny; with a quarter of the time for compilation, since little is run."""
    with quickly():
        yield Task(replace(long.TINY, steps=50, chunk=50), TEXT)


@pytest.fixture(scope="module")
def alone(task):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return Program("float32", task, 1)


@pytest.mark.soak
def test_seeds_at_once_are_each_as_alone(task, alone):
    """The same text, data and rates: vmap changes roundings alone, 1e-3 of a loss in 50 steps."""
    both = Program("float32", task, 2)
    rates = task.config.rates
    _, found = both.run(task.first_params([0, 1]), [0, 1], 0, rates)
    _, one = alone.run(task.first_params([1]), [1], 0, rates)
    np.testing.assert_allclose(found.loss[1], one.loss[0], rtol=1e-3)
    assert np.abs(found.loss[0] - found.loss[1]).min() > 0
    assert found.validation.shape == (2, 2)
    assert found.validation[0, -1] < found.validation[0, 0] - 1


@pytest.mark.soak
def test_runs_are_files_that_are_not_run_again(task, alone, tmp_path):
    """A setting's run needs float32's weights; then both are in the one file, once."""
    config = {"steps": 50}
    runs = long.Runs(tmp_path, tmp_path / "all.json", config, {"commit": "abc"})
    name = "bf16 weights, stochastic + 8-bit moments"
    programs = {"float32": alone, name: Program(name, task, 1)}
    with pytest.raises(ValueError, match="--settings: expected 'float32' to have run"):
        long.run(name, [0], programs[name], task, runs)
    for setting, program in programs.items():
        long.run(setting, [0], program, task, runs)
    runs.write(2)
    written = json.loads((tmp_path / "all.json").read_text())
    assert [run["setting"] for run in written["runs"]] == ["float32", name]
    reference, other = (run["fine-tuning"] for run in written["runs"])
    assert reference["arrived"] == pytest.approx(1)
    assert reference["moved"] > 0.9
    # A sixth to a third of bfloat16's numbers move in a step; right in the mean, to the noise of
    # 2⁻⁹ of a weight in 50 steps of 1e-4.
    assert other["moved"] < 0.5
    assert other["arrived"] == pytest.approx(1, abs=0.1)
    again = long.Runs(tmp_path, tmp_path / "all.json", {"steps": 60}, {})
    assert runs.there("float32", 0) is not None
    assert again.there("float32", 0) is None


def test_the_reference_comes_first():
    """The time may end before the last setting, and without this one nothing can be said."""
    assert next(iter(LONG)) == "float32"


def made_up(differences: dict[str, float], sd: float) -> dict[str, list[dict]]:
    """Runs of eight seeds that are far apart, with given differences and normal chance."""
    rng = np.random.default_rng(0)
    return {
        name: [
            {
                "seed": seed,
                "final": {"validation loss": 1 + seed + gap + sd * rng.normal()},
                "fine-tuning": {"moved": 0.1, "moved with rest": 0.9},
            }
            for seed in range(8)
        ]
        for name, gap in differences.items()
    }


def test_a_difference_is_found_where_it_is_larger_than_chance():
    """The size of chance is known here: 0.01. Seeds that are 1 apart hide nothing."""
    differences = dict.fromkeys(LONG, 0.0) | {"bf16 weights, plain": 0.05, "bf16 moments": 0.002}
    rows = made_up(differences, 0.01)
    fitted = report.fit(rows, "validation loss")
    # All of float32 is one setting; of the others and of the eight seeds a number each.
    assert fitted.degrees == 8 * len(LONG) - (len(LONG) - 1) - 7
    assert fitted.sd == pytest.approx(0.01, rel=0.2)  # over 100 degrees of freedom: 7% in sd
    found = report.gaps(rows, "validation loss")
    assert set(found) == set(LONG) - set(report.BOTH) | set(report.TOGETHER)
    assert found["bf16 weights, plain"].differs
    assert not found["bf16 moments"].differs
    # Three rows together say more than one. What nine studies of ten find is past the interval.
    assert found[report.ALL_CODES].half < found["8-bit moments"].half < found["8-bit moments"].found


def test_a_row_whose_residuals_never_change_is_void():
    """It is left out of the size of chance and of all differences."""
    rows = made_up(dict.fromkeys(LONG, 0.0), 0.01)
    assert report.valid(rows) == rows
    for run in rows["flashoptim-jax"]:
        run["fine-tuning"]["moved with rest"] = 0.1
    assert set(rows) - set(report.valid(rows)) == {"flashoptim-jax"}
    assert "flashoptim-jax" not in report.joined([rows])


def test_studies_are_joined_run_by_run():
    """A row that is void in one study stays in another, and float32 counts from both."""
    first, second = (made_up(dict.fromkeys(LONG, 0.0), 0.01) for _ in range(2))
    for run in first["flashoptim-jax"]:
        run["fine-tuning"]["moved with rest"] = 0.1
    joint = report.joined([first, {name: second[name] for name in ("float32", "flashoptim-jax")}])
    assert len(joint["float32"]) == 16
    assert joint["flashoptim-jax"] == second["flashoptim-jax"]
    once, twice = (report.gaps(rows, "validation loss") for rows in (second, joint))
    assert twice["8-bit moments"].half < once["8-bit moments"].half
