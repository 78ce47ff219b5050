"""The descents: their mathematics against NumPy, the grid against single runs, what is drawn."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tyro
from PIL import Image

from experiments.common.objectives import FUNCTIONS
from experiments.common.report import readme_block
from experiments.trajectories import animation, pictures, planes, run
from experiments.trajectories.choose import RATES, STARTS, Choice, choose
from experiments.trajectories.descend import OPTIMIZERS, TARGET, Runs, descend, outcomes
from experiments.trajectories.problem import problem
from tests.reference import Member

# From the literature, beside a value elsewhere that can be computed by hand.
KNOWN = {
    "sphere": ([(0, 0)], (3, 4), 25),
    "ellipse": ([(0, 0)], (2, 1), 52),
    "rosenbrock": ([(1, 1)], (-1.2, 1), 24.2),
    "beale": ([(3, 0.5)], (0, 0), 14.203125),
    "himmelblau": (
        [(3, 2), (-2.805118, 3.131312), (-3.779310, -3.283186), (3.584428, -1.848126)],
        (0, 0),
        170,
    ),
    "saddle": ([(0, 1), (0, -1)], (2, 0), 4.5),
}
NOT_FINITE = planes.Planes(
    *(np.full((1, len(b), len(planes.LEARNING_RATES)), np.inf) for b in planes.PLANES.values())
)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_have_their_known_minima_and_values(name):
    """What is walked down is the function of that name, and the stars are its minima."""
    function, (minima, point, value) = FUNCTIONS[name], KNOWN[name]
    # The literature gives six digits.
    np.testing.assert_allclose(sorted(function.minima), sorted(minima), atol=1e-6)
    # A square of float64's rounding of numbers around 10.
    np.testing.assert_allclose([function.value(*m) for m in function.minima], 0, atol=1e-24)
    assert function.value(*point) == pytest.approx(value, rel=1e-14)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_equal_finite_differences(name):
    """The derivative that optimizers see is the function's own."""
    f, h = FUNCTIONS[name].value, 1e-5
    x, y = np.random.default_rng(0).uniform(-2, 2, (2, 50))
    differences = (f(x + h, y) - f(x - h, y)) / (2 * h), (f(x, y + h) - f(x, y - h)) / (2 * h)
    found = jax.vmap(jax.grad(f, (0, 1)))(jnp.float32(x), jnp.float32(y))
    # float32 in sums whose terms come to 1e3.
    np.testing.assert_allclose(found, differences, rtol=1e-4, atol=1e-3)


def walk(name, start, steps, learning_rate, **options):
    """A path in NumPy float64 by the reference's Adam, with the gradients of the sphere."""
    assert name == "sphere"
    point, member, points = np.array(start), Member(**options), [np.array(start)]
    for _ in range(steps):
        point = point - learning_rate * member(2 * point)
        points.append(point)
    return np.array(points)


@pytest.mark.usefixtures("quick_compilation")
def test_the_path_on_the_sphere_is_that_of_the_paper():
    """x² + y² with alpha = 0.1: each point of the path, from several starts."""
    problems = run.around(problem("sphere"))
    runs = run.adam_runs(problems, 0.1, 200)
    for each, points, losses in zip(problems, *runs, strict=True):
        exact = walk("sphere", each.start, 200, 0.1)
        # 200 float32 roundings of numbers up to 5.
        np.testing.assert_allclose(points, exact, atol=200 * 5 * 2.0**-24)
        np.testing.assert_allclose(losses, np.sum(exact**2, -1), rtol=1e-3, atol=1e-7)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("name", ["RAdam", "Nesterov", "RMSProp"])
def test_the_grid_equals_single_runs(name):
    """vmap and switch change nothing: each run of the grid is the run by itself."""
    names, rates = ["rosenbrock", "saddle"], np.array([1e-3, 3e-3, 1e-2], np.float32)
    problems = [problem(name) for name in names]
    indices = np.array([each.index for each in problems])
    starts = np.array([each.start for each in problems], np.float32)
    grid = descend(OPTIMIZERS[name], 30, indices, starts, {"learning_rate": rates})

    @jax.jit
    def update(rate, grad, state, point):
        updates, state = OPTIMIZERS[name](rate).update(grad, state, point)
        return optax.apply_updates(point, updates), state

    for i, each in enumerate(problems):
        grad = jax.jit(jax.grad(lambda p, f=each.function.value: f(*p)))
        for j, rate in enumerate(rates):
            point, state = jnp.asarray(starts[i]), OPTIMIZERS[name](rate).init(starts[i])
            for step in range(31):
                # Both are float32; Rosenbrock's steep walls magnify a rounding.
                np.testing.assert_allclose(grid.points[i, j, step], point, rtol=2e-4, atol=2e-5)
                point, state = update(rate, grad(point), state, point)


@pytest.mark.usefixtures("quick_compilation")
def test_the_planes_are_adam_with_those_hyperparameters(monkeypatch):
    """Each cell of the heat map is the loss after Adam's steps with its learning rate, b1, b2."""
    monkeypatch.setattr(planes, "LEARNING_RATES", np.array([0.05, 0.2, 0.7]))
    complements = {"b1": np.array([0.01, 0.3]), "b2": np.array([0.001, 0.05])}
    monkeypatch.setattr(planes, "PLANES", complements)
    found = planes.scan_planes([problem("sphere")], 25)
    for name in complements:
        for i, complement in enumerate(complements[name]):
            for j, rate in enumerate(planes.LEARNING_RATES):
                end = walk("sphere", (-4.0, 3.0), 25, rate, **{name: 1 - complement})[-1]
                # 1-b of a float32 b is off by 6e-8 of 1-b = 0.001.
                assert getattr(found, name)[0, i, j] == pytest.approx(end @ end, rel=1e-3)


def test_outcomes_count_until_the_loss_stays_under_the_target():
    """To pass by a minimum is not to arrive, and what is not finite never does."""
    small, nan, inf = TARGET / 10, np.nan, np.inf
    losses = [
        [1, 1, small, small],
        [1, small, 1, small],
        [small, small, small, small],
        [1, small, small, TARGET],
        [1, small, nan, nan],
        [1, inf, inf, inf],
    ]
    last, steps = outcomes(losses)
    assert steps.tolist() == [2, 3, 0, 4, 4, 4]
    np.testing.assert_array_equal(last, [small, small, small, TARGET, inf, inf])


@pytest.fixture(scope="module")
def sgd():
    """SGD's choice on the ill-conditioned quadratic."""
    with jax.numpy_dtype_promotion("strict"):
        return choose(optax.sgd, [problem("ellipse")], 300)[0]


def test_the_chosen_rate_obeys_theory(sgd):
    """Gradient descent with curvatures 1 and 100 arrives below 2/100, and best near 2/101."""
    assert 0.01 < sgd.learning_rate < 0.02
    assert sgd.arrived == STARTS
    assert np.isinf(sgd.last_losses[RATES > 0.03]).all()
    assert np.isfinite(sgd.last_losses[RATES < 0.02]).all()
    # It is the fastest: after n steps the slow coordinate is 4·(1 - rate)ⁿ, the fast one smaller.
    slow = np.log(np.sqrt(2 * TARGET) / 4) / np.log1p(-sgd.learning_rate)
    assert sgd.mean_steps == pytest.approx(slow, rel=0.05)  # starts differ by 6% of the width


def diverged(sgd: Choice) -> Choice:
    """A choice whose run goes to infinity and beyond."""
    points = np.array(sgd.runs.points)
    points[5:] *= 1e30
    points[8:] = np.nan
    losses = np.where(np.arange(len(points)) < 8, sgd.runs.losses, np.inf)
    losses[9:] = np.nan
    return sgd._replace(runs=Runs(points, losses))


def test_what_is_not_finite_is_drawn_as_such(sgd):
    """A diverging path ends in a cross, its loss at the ceiling; no picture breaks."""
    lost, each = diverged(sgd), problem("ellipse")
    assert len(pictures.visible(lost.runs, each)) == 5
    figure = pictures.adam_figure([each], [Runs(*(x[None] for x in lost.runs))], 0.1)
    assert "x" in [line.get_marker() for line in figure.axes[0].lines]
    choices = {"SGD": [lost], "Adam": [sgd]}
    pictures.comparison_figure([each], choices, 300).draw_without_rendering()
    figure = pictures.losses_figure([each], choices, 300)
    figure.draw_without_rendering()
    assert figure.axes[0].lines[0].get_ydata().max() == pictures.CEILING
    assert "x" in [line.get_marker() for line in figure.axes[1].lines]
    pictures.planes_figure([each], NOT_FINITE, 300).draw_without_rendering()


def test_the_animation_has_its_frames_and_loops(sgd, tmp_path):
    """A frame for each of frame_steps, from the first step to the last, for ever."""
    path, steps = tmp_path / "race.gif", 12
    first = Runs(*(x[: steps + 1] for x in sgd.runs))
    choices = {"SGD": [sgd._replace(runs=first)], "Adam": [diverged(sgd)]}
    animation.animate(path, [problem("ellipse")], choices, steps)
    shown = animation.frame_steps(steps)
    assert shown[0] == 0
    assert shown[-1] == steps
    assert (np.diff(shown) > 0).all()
    with Image.open(path) as film:
        assert film.n_frames == len(shown)
        assert film.info["loop"] == 0


def test_an_animation_is_written_whole_or_not_at_all(sgd, tmp_path, monkeypatch):
    """The old file stays as it was when drawing fails."""
    path = tmp_path / "race.gif"
    path.write_bytes(b"old")

    def fail(canvas):
        raise OSError("no")

    monkeypatch.setattr(animation.FigureCanvasAgg, "draw", fail)
    with pytest.raises(OSError, match="no"):
        animation.animate(path, [problem("ellipse")], {"SGD": [sgd]}, 12)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"function": "parabola"}, "--function: expected all or one of sphere, .*, got parabola"),
        ({"start": (0.0, np.nan)}, "--start: expected two finite numbers"),
        ({"learning_rate": 0.0}, "--learning-rate: expected a number of float32 above 0, got 0.0"),
        ({"learning_rate": np.inf}, "--learning-rate: .*, got inf"),
        ({"steps": 0}, "--steps: expected 1 to 10000, got 0"),
        ({"compare_steps": 3001}, "--compare-steps: expected 1 to 3000, got 3001"),
    ],
)
def test_a_wrong_argument_gives_an_error_that_names_it(options, message):
    """No traceback from deep inside, no empty picture."""
    with pytest.raises(ValueError, match=message):
        run.Config(**options)


def test_wrong_places_give_errors_that_name_them(tmp_path, capsys):
    """A start where the loss overflows, a file where a folder is to be, a word for a number."""
    with pytest.raises(ValueError, match="--start: expected a point where beale is finite"):
        run.Config(function="beale", start=(1e12, 1e12)).problems  # noqa: B018
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--out: expected a folder, got the file"):
        run.Config(out=tmp_path / "file")
    with pytest.raises(SystemExit):
        tyro.cli(run.Config, args=["--steps", "many"])
    assert "--steps" in capsys.readouterr().err


def test_the_view_holds_the_start():
    """From any start: what is drawn begins in the picture."""
    for start in ((-40.0, 3.0), (2.0, 7.0), (0.0, 0.0)):
        (left, right), (bottom, top) = problem("sphere", start).view
        assert left < start[0] < right
        assert bottom < start[1] < top


@pytest.mark.usefixtures("quick_compilation")
def test_the_command_writes_everything(tmp_path, monkeypatch, capsys):
    """Pictures, animation and figures, also where Adam's own run is not finite."""
    few = {"SGD": OPTIMIZERS["SGD"]}
    monkeypatch.setattr(run, "OPTIMIZERS", few)
    monkeypatch.setattr(run, "scan_planes", lambda problems, steps: NOT_FINITE)
    drawn = []
    monkeypatch.setattr(run, "write", lambda figure, stem: drawn.append(stem))
    monkeypatch.setattr(run, "animate", lambda path, *arguments: drawn.append(path))
    run.main(run.Config("sphere", (1.0, 2.0), 1e30, steps=20, compare_steps=10, out=tmp_path))
    names = ("adam", "sphere", "comparison", "losses", "planes", "animation.gif")
    assert drawn == [tmp_path / name for name in names]
    figures = json.loads((tmp_path / "trajectories.json").read_text())["functions"]["sphere"]
    assert figures["start"] == [1, 2]
    assert figures["adam"]["loss"] is None
    assert figures["adam"]["steps_to_target"] is None
    assert set(figures["optimizers"]) == set(few)
    assert "not finite" in capsys.readouterr().out


def test_the_quick_form_draws_adam_alone(tmp_path, capsys):
    """What is seen in seconds; the comparison and the planes take a minute."""
    assert run.main(run.Config(function="sphere", steps=20, quick=True, out=tmp_path)) is None
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {f"{name}.{kind}" for name in ("adam", "sphere") for kind in ("png", "svg")}
    assert str(tmp_path) in capsys.readouterr().out


def test_the_readme_says_what_was_measured():
    """Its tables are those of the committed JSON, and no chosen rate lies on the grid's edge."""
    results = json.loads((run.RESULTS / "trajectories.json").read_text())
    for name, block in run.markdown(results).items():
        assert readme_block(name, run.README)[1] == f"{block}\n"
    for function in results["functions"].values():
        for found in function["optimizers"].values():
            assert results["rates"][0] < found["learning_rate"] < results["rates"][-1]
