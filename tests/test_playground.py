"""The playground: its numbers, its callbacks, and the page in a browser."""

import gc
import re
import socket

import compilation
import numpy as np
import pytest
import reference
from bokeh.document import Document
from bokeh.events import Tap
from bokeh.models import ImportedStyleSheet
from panel.io.state import set_curdoc

from experiments.common.objectives import FUNCTIONS
from experiments.playground import compute
from experiments.playground.__main__ import Playground, main
from experiments.playground.compute import MAX_STEPS, OPTIMIZERS, Setting, descend, inner
from experiments.playground.figures import contours
from experiments.playground.page import PICKED, PRESETS, Page, new_page

# optax needs the promotion.
pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compilation")

# Few, since each is compiled once.
SOME = ["Adam", "Momentum", "RMSProp"]


def rosenbrock_gradient(x, y):
    return np.array([-2 * (1 - x) - 400 * x * (y - x**2), 200 * (y - x**2)])


@pytest.mark.parametrize(("b1", "b2"), [(0.8, 0.99), (0.0, 0.9), (0.9, 0.0)])
def test_inner_values_are_those_of_the_paper(b1, b2):
    """Along Adam's path, also with a slider at its end, from NumPy in float64."""
    setting = Setting("rosenbrock", 0.03, b1, b2, 1e-3, -1.2, 1.0, 40)
    found = inner(descend("Adam", setting), setting)
    member = reference.Member(b1=b1, b2=b2, eps=1e-3)
    point = np.array([-1.2, 1.0])
    for i in range(setting.steps):
        step = -0.03 * member(rosenbrock_gradient(*point))
        m_hat = member.m / reference.bias(b1, i + 1)
        v_hat = member.v / reference.bias(b2, i + 1)
        rate = 0.03 / (np.sqrt(v_hat) + 1e-3)
        expected = (member.m, m_hat, member.v, v_hat, step, rate)
        for name, value in zip(found._fields, expected, strict=True):
            # float64 rounds to 1e-16; steep walls make 1e5 of it in 40 steps where b2 is 0.
            np.testing.assert_allclose(getattr(found, name)[i], value, 1e-9, 1e-9, name)
        point = point + step


def test_a_path_has_its_start_and_every_step():
    """Points are start and sums of updates; losses are the function there."""
    setting = Setting("himmelblau", x=1.0, y=-2.0, steps=7)
    descent = descend("Adam", setting)
    assert not descent.diverged
    assert descent.points.shape == (8, 2)
    np.testing.assert_array_equal(descent.points[0], [1.0, -2.0])
    # Each is one sum in float64.
    np.testing.assert_allclose(np.diff(descent.points, axis=0), descent.updates, rtol=1e-13)
    himmelblau = FUNCTIONS["himmelblau"].value
    np.testing.assert_allclose(descent.losses, himmelblau(*descent.points.T), rtol=1e-13)


@pytest.mark.parametrize(
    ("optimizer", "heeded"),
    [
        ("Adam", {"learning_rate", "b1", "b2", "eps"}),
        ("Momentum", {"learning_rate", "b1"}),
        ("RMSProp", {"learning_rate", "b2", "eps"}),
    ],
)
def test_a_slider_reaches_the_optimizers_that_have_it(optimizer, heeded):
    """b1 is also the momentum, b2 also RMSProp's decay."""
    setting = Setting("sphere", 0.01, 0.5, 0.9, 1e-2, 1.0, 2.0, 5)
    path = descend(optimizer, setting).points
    others = {"learning_rate": 0.02, "b1": 0.6, "b2": 0.95, "eps": 1e-1}
    moved = {
        name
        for name, value in others.items()
        if not np.array_equal(path, descend(optimizer, setting._replace(**{name: value})).points)
    }
    assert moved == heeded


def test_the_noise_is_normal_seeded_and_the_same_for_all():
    """What is in the gradient beside that of x² + y², for two optimizers and two seeds."""

    def noise(seed):
        setting = Setting("sphere", 1e-3, 0.5, x=1.0, y=1.0, steps=MAX_STEPS, noise=3.0, seed=seed)
        adam = descend("Adam", setting)
        m = np.concatenate([np.zeros((1, 2)), adam.state.mu])
        of_adam = (m[1:] - 0.5 * m[:-1]) / 0.5 - 2 * adam.points[:-1]
        momentum = descend("Momentum", setting)
        trace = np.concatenate([np.zeros((1, 2)), -momentum.updates / 1e-3])
        of_momentum = trace[1:] - 0.5 * trace[:-1] - 2 * momentum.points[:-1]
        # Sums of numbers of size 10, in float64.
        np.testing.assert_allclose(of_adam, of_momentum, atol=1e-12)
        return of_adam

    one = noise(1)
    # Four standard errors of mean and deviation of 2,000 values: 4·3/√2000, 4·3/√4000.
    assert abs(one.mean()) < 0.27
    assert abs(one.std() - 3.0) < 0.19
    np.testing.assert_array_equal(one, noise(1))
    assert not np.array_equal(one, noise(2))


def test_a_path_that_diverges_ends():
    """Before it is 1e6 away, with finite numbers, whatever comes after."""
    setting = Setting("rosenbrock", 1.0, x=-1.2, y=1.0)
    descent = descend("Momentum", setting)
    assert descent.diverged
    assert 1 <= len(descent.points) < 10
    assert len(descent.points) == len(descent.losses) == len(descent.updates)
    assert np.all(np.abs(descent.points) <= compute.FAR)
    assert np.isfinite(descent.losses).all()


@pytest.fixture
def page():
    page = Page()
    page.optimizers.value = SOME
    return page


def drawn(page):
    """All that the figures show of the paths and of Adam."""
    sources = [*page.paths.values(), page.ends, page.inner]
    return [[column.tolist() for column in map(np.asarray, s.data.values())] for s in sources]


def test_every_slider_changes_what_is_drawn_and_compiles_nothing(page):
    """From end to end, with every function."""
    page.controls["noise"].value = 1.0
    compiled = compute._descend._cache_size()
    for name, slider in page.controls.items():
        positions = slider.options.values() if name == "function" else (slider.start, slider.end)
        middle = slider.value
        for position in {*positions, middle} - {middle}:
            before = drawn(page)
            slider.value = position
            assert before != drawn(page), (name, position)
        slider.value = middle
    assert compute._descend._cache_size() == compiled


def test_every_optimizer_is_drawn_when_picked(page):
    """And no more when it is not; what is inside of Adam stays."""
    for picked in (["Momentum"], [], SOME):
        page.optimizers.value = picked
        for name, source in page.paths.items():
            assert (len(source.data["step"]) > 0) == (name in picked)
        for items in (page.landscape.items, page.losses.items):
            assert [item.label.value for item in items if item.visible] == [
                name for name in OPTIMIZERS if name in picked
            ]
        assert len(page.ends.data["x"]) == len(picked)
        assert len(page.inner.data["step"]) == Setting().steps
        assert ("No optimizer" in page.status.object) == (not picked)
    for source in page.paths.values():
        if len(source.data["step"]):
            assert [source.data[axis][0] for axis in "xy"] == list(Setting()[5:7])


def test_a_function_brings_its_landscape_and_its_start(page):
    """And a click on the contours another start, inside of what is drawn."""
    contours = page.landscape.contours.fill_renderer.data_source
    before = contours.data["xs"]
    page.controls["function"].value = "beale"
    start = (page.controls["x"].value, page.controls["y"].value)
    assert start == FUNCTIONS["beale"].start
    assert contours.data["xs"] is not before
    assert FUNCTIONS["beale"].formula in page.formula.object
    page.start_at(Tap(page.landscape.figure, x=1.234, y=99.0))
    assert (page.controls["x"].value, page.controls["y"].value) == (1.23, 4.5)
    assert page.paths["Adam"].data["x"][0] == 1.23


def test_a_preset_sets_all_that_it_needs(page):
    """The function first, whose start belongs to it; what an earlier one moved goes back."""
    first_of_all, *others = PRESETS.items()
    for name, wanted in (*others, first_of_all):
        page.presets.value = name
        function = FUNCTIONS[wanted.get("function", "himmelblau")]
        assert page.setting()[5:7] == function.start
        assert page.start.data == {"x": [function.start[0]], "y": [function.start[1]]}
        for key, widget in {**page.controls, "optimizers": page.optimizers}.items():
            if key not in ("x", "y"):
                first = PICKED if key == "optimizers" else page._first[key]
                assert widget.value == wanted.get(key, first), (name, key)


def test_the_bar_says_what_the_colours_stand_for(page):
    """At the edges of bands, of the function that is shown."""
    for name in ("beale", "sphere"):
        page.controls["function"].value = name
        labels = page.landscape._bar.major_label_overrides
        levels = contours(name).fill_data.lower_levels
        assert labels == {i: f"{levels[i]:.3g}" for i in (0, 3, 6, 9, 12)}


def test_what_diverges_is_told(page):
    """The page goes on with what there is."""
    page.controls["function"].value = "rosenbrock"
    assert re.search(r"Diverged, so the path ends: Momentum after step \d+\.", page.status.object)
    page.controls["learning_rate"].value = -4
    assert "Diverged" not in page.status.object


def test_a_start_in_the_minimum_is_drawn(page):
    """Where loss, gradient and v are 0, which have no logarithm."""
    page.controls["function"].value = "sphere"
    for axis in "xy":
        page.controls[axis].value = 0.0
    assert np.all(page.paths["Adam"].data["loss"] == 0)
    assert np.isnan(page.inner.data["v_x"]).all()
    limits = page.losses.figure.y_range
    assert 0 < limits.start < limits.end


def test_positions_stand_for_numbers(page):
    """Sliders are in powers of ten; b1 and b2 in those of 1 - b."""
    for name, position in {"learning_rate": -2, "b1": 2, "b2": 4, "eps": -6, "steps": 17}.items():
        page.controls[name].value = position
    setting = page.setting()
    expected = (0.01, 0.99, 0.9999, 1e-6, 17)
    found = (setting.learning_rate, setting.b1, setting.b2, setting.eps, setting.steps)
    assert found == pytest.approx(expected, rel=1e-15)
    assert page.inner.data["step"].tolist() == list(range(1, 18))
    m = inner(descend("Adam", setting), setting).m
    np.testing.assert_array_equal(page.inner.data["m_x"], m[:, 0])


def test_nothing_comes_from_elsewhere():
    """No style sheet of a CDN, also in a session whose page a browser had before."""
    document = Document()
    with set_curdoc(document):
        new_page().server_doc(document)
    found = [s.url for root in document.roots for s in root.select({"type": ImportedStyleSheet})]
    assert found
    assert all(url.startswith("static/") for url in found), found


# tornado leaves the socket that it could not bind to the garbage collection.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_busy_port_is_named():
    """Before anything is compiled."""
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            SystemExit, match=f"cannot listen on port {port}: Address already in use"
        ):
            main(Playground(port=port))
    gc.collect()


@pytest.fixture(scope="module")
def in_browser():
    """The page, and its complaints. The server has its own process: here warnings are errors."""
    pytest.importorskip("playwright", reason="no playwright (pip install playwright)")
    from experiments.playground import browser

    if browser.executable() is None:
        pytest.skip(f"no browser: none of {', '.join(browser.NAMES)} is installed")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in compilation.environment().items():
            patch.setenv(name, value)
        with browser.serving() as url, browser.chromium() as chromium:
            yield browser.opened(chromium, url, 1280, 900)


SGD = "path of SGD"
HANDLES = ("Learning rate α", "b1", "b2", "eps", "Start x", "Start y", "Steps")
HANDLES += ("Noise of the gradient (sd)", "Seed of the noise")


def column(name, source="path of Adam"):
    """JavaScript for a column of a source, as a list."""
    return f"Array.from(Bokeh.documents[0].get_model_by_name('{source}').data.{name})"


def test_a_browser_draws_what_is_moved_and_picked(in_browser):
    """A slider by its key, an optimizer by its box, a function; without a complaint."""
    page, complaints = in_browser
    path, values = column("y"), column("v_x", "inner values")
    before, inside = page.evaluate(path), page.evaluate(values)
    assert len(before) == Setting().steps + 1
    page.locator(".noUi-handle").first.press("ArrowRight")  # the learning rate's
    page.wait_for_function(f"before => {path}[9] !== before[9]", arg=before)
    page.wait_for_function(f"inside => {values}[9] !== inside[9]", arg=inside)

    picked = column("x", "path of Momentum")
    assert page.evaluate(picked) == []
    page.get_by_label("Momentum", exact=True).check()
    page.wait_for_function(f"{picked}.length > 0")

    page.get_by_label("Function", exact=True).select_option("Beale")
    start = list(FUNCTIONS["beale"].start)
    page.wait_for_function(
        f"start => {column('x')}[0] === start[0] && {path}[0] === start[1]", arg=start
    )
    page.get_by_text("2.625").wait_for()  # in the formula
    assert re.search(r"Computed in \d+ ms", page.get_by_text("Computed in").inner_text())
    assert complaints == []


def test_handles_have_names_and_values(in_browser):
    """For screen readers: what is written above a slider, and not its position."""
    page, _ = in_browser
    assert [page.get_by_role("slider", name=name, exact=True).count() for name in HANDLES] == [
        1
    ] * 9
    b2 = page.get_by_role("slider", name="b2", exact=True)
    assert b2.get_attribute("aria-valuetext") == "0.999"
    b2.press("ArrowRight")
    page.wait_for_function("handle => handle.ariaValueText === '0.99911'", arg=b2.element_handle())


def test_the_address_keeps_what_is_set(in_browser):
    """It has what was moved, and a page that is opened there begins so."""
    page, _ = in_browser
    page.get_by_role("slider", name="Steps", exact=True).press("Home")
    page.wait_for_function("/[?&]steps=1(&|$)/.test(location.search)")
    address = re.sub(r"\?.*", "?function=beale&learning_rate=-2&optimizers=SGD", page.url)
    page.goto(address)
    page.wait_for_function(f"window.Bokeh?.documents[0]?.is_idle && {column('x', SGD)}.length > 0")
    assert page.evaluate(column("x")) == []
    rate = page.get_by_role("slider", name="Learning rate α", exact=True)
    page.wait_for_function("handle => handle.ariaValueText === '0.01'", arg=rate.element_handle())


@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_cut(in_browser, width):
    """No scrolling sideways, and every figure and slider inside of the window."""
    page, complaints = in_browser
    page.set_viewport_size({"width": width, "height": 860})
    # Bokeh lays its figures out anew some frames later.
    page.wait_for_function("document.documentElement.scrollWidth <= innerWidth")
    boxes = [box.bounding_box() for box in page.locator(".bk-Figure, .noUi-target").all()]
    assert len(boxes) == 6 + 9
    for box in boxes:
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        assert box["width"] > 200
    assert complaints == []
