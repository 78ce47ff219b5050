"""The papers' claims hold, in the short form of each reproduction, and a claim can fail."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from compilation import quickly
from scipy import stats

import jadam
from experiments.common.mnist import idx
from experiments.papers import (
    defects,
    dozat_2016,
    grid,
    liu_2020,
    loshchilov_hutter_2019,
    publish,
    reddi_2018,
    step_bound,
)


def failed(claims):
    return [claim for claim in claims if not claim.holds]


@pytest.fixture(scope="module")
def mnist():
    """The files themselves: through TFDS, as test_mnist has them, they take seconds."""
    return idx.read_all()


JUDGES = {
    "reddi_2018": lambda x: reddi_2018.judge(x, config_of(reddi_2018, x)),
    "step_bound": step_bound.judge,
    "loshchilov_hutter_2019": loshchilov_hutter_2019.judge,
    "liu_2020": liu_2020.judge,
    "dozat_2016": lambda x: dozat_2016.judge(x, config_of(dozat_2016, x)),
}


def config_of(module, results):
    """The settings that a JSON file was made with."""
    tuples = {name: tuple(x) for name, x in results["config"].items() if isinstance(x, list)}
    return module.Config(**{**results["config"], **tuples})


@pytest.mark.parametrize("name", JUDGES)
def test_the_committed_verdicts_are_those_of_the_committed_numbers(name):
    """Nothing is stated by hand, in the JSON or in the README; and the pictures are there."""
    results = json.loads((publish.RESULTS / f"{name}.json").read_text())
    claims = JUDGES[name](results)
    assert [claim._asdict() for claim in claims] == results["claims"]
    assert publish.table_of(claims) + "\n" in publish.README.read_text()
    for kind in ("png", "svg"):
        assert (publish.RESULTS / f"{name}.{kind}").stat().st_size > 1000
        assert f"results/{name}.png" in publish.README.read_text()


def test_publish_writes_whole_files_elsewhere_than_the_repository(reddi, tmp_path):
    """JSON with its origin, and both pictures."""
    config, numbers, claims = reddi
    before = publish.README.read_bytes()
    config = dataclasses.replace(config, out=tmp_path)
    publish.publish("x", config, numbers, claims, reddi_2018.draw(numbers, config))
    assert {path.name for path in tmp_path.iterdir()} == {"x.json", "x.png", "x.svg"}
    found = json.loads((tmp_path / "x.json").read_text())
    assert {"command", "versions", "commit", "config", "claims"} <= set(found)
    assert publish.README.read_bytes() == before


@pytest.fixture(scope="module")
def reddi():
    config = reddi_2018.Config(seeds=1)
    return config, *reddi_2018.run(config)


def test_reddi_adam_goes_to_the_worst_point_and_amsgrad_to_the_best(reddi):
    """All claims at T = 1e6, with the figures that were measured before this code was written."""
    _, numbers, claims = reddi
    assert not failed(claims)
    ends = {
        name: [[row[-1] for row in run[quantity]] for quantity in ("average_regret", "x")]
        for name, run in numbers["online"].items()
    }
    # 0.001: those figures were written with three digits.
    np.testing.assert_allclose(ends["Adam"], [[0.200, 0.228], [1.0, 1.0]], atol=1e-3)
    np.testing.assert_allclose(ends["AMSGrad"], [[0.072, 0.034], [-0.393, -0.997]], atol=1e-3)


@pytest.mark.usefixtures("quick_compilation")
def test_reddis_walk_is_adam_with_projection():
    """Against float64: α/√t counts from 1, x is put back into [-1, 1] after each step."""
    slopes = reddi_2018.periodic(1010.0, -10.0, 101, 2000)
    path = reddi_2018.descend(jadam.adam, slopes, np.array([0.5]), 0.0)
    member, x, exact = reference.Member(), 0.0, [0.0]
    for t, slope in enumerate(slopes[0], 1):
        x = float(np.clip(x - 0.5 / np.sqrt(t) * member(slope), -1, 1))
        exact.append(x)
    assert max(exact) == 1 or min(exact) == -1
    # 2,000 additions of float32 numbers under 1, 6e-8 each, that mostly cancel.
    np.testing.assert_allclose(path[0], exact, atol=2e-5)


def test_reddis_regret_is_that_of_the_definition():
    """By hand: x = 0, then 1, on f = 2x, -3x: cost -3, best -1 (at x = 1)."""
    found = reddi_2018.average_regret(np.array([[2.0, -3.0]]), np.array([[0.0, 1.0, 1.0]]))
    np.testing.assert_allclose(found, [[2.0, -1.0]])


def test_reddis_claims_can_fail(reddi):
    """AMSGrad's numbers in Adam's place are no counterexample."""
    config, numbers, _ = reddi
    swapped = {form: dict(numbers[form]) for form in ("online", "stochastic")}
    for form in swapped.values():
        form["Adam"], form["AMSGrad"] = form["AMSGrad"], form["Adam"]
    claims = reddi_2018.judge({**numbers, **swapped}, config)
    assert {claim.claim.split(":")[0] for claim in failed(claims)} == {"online", "stochastic"}


@pytest.fixture(scope="module")
def steps():
    with quickly():
        return step_bound.run(step_bound.Config(steps=1000, points=4, rows=1))


def test_the_step_bound_holds_and_is_attained(steps):
    """Float32 and 8-bit moments, along every kind of sequence."""
    numbers, claims = steps
    assert not failed(claims)
    t = numbers["t"]
    exact = [reference.step_bound(step) for step in t]
    np.testing.assert_allclose(numbers["bound"], exact, rtol=1e-6)  # written with 7 digits
    assert [round(exact[t.index(step)], 3) for step in (1, 100, 1000)] == [1.0, 2.243, 5.781]
    assert round(step_bound.limit(), 3) == 7.270


def test_the_step_bounds_claims_can_fail(steps):
    """A step 1% too long is seen."""
    numbers, _ = steps
    run = {**numbers["8-bit moments"], "normal": {"largest_over_bound": 1.01}}
    (claim,) = failed(step_bound.judge({**numbers, "8-bit moments": run}))
    assert claim.claim.startswith("8-bit")
    assert "normal" in claim.measured


@pytest.fixture(scope="module")
def panels():
    # optax does not run under the strict promotion of these tests.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), quickly():
        return defects.measure()


def test_jadam_has_none_of_the_defects(panels):
    """Every row, whatever optax does by now; and it can be drawn."""
    assert len(panels) == len(defects.CURVES) + len(defects.WORDS)
    wrong = [panel.title for panel in panels.values() if not panel.results["jadam"].right]
    assert not wrong
    assert len(defects.draw(panels).axes) == 9
    json.dumps(defects.numbers(panels), allow_nan=False)


@pytest.mark.usefixtures("quick_compilation")
def test_a_defect_that_is_mended_says_so(monkeypatch):
    """With jadam in optax's place the row is no claim any more."""
    monkeypatch.setattr(defects, "LIBRARIES", {"optax": jadam, "jadam": jadam})
    panel = defects.stuck_second_moment()
    (claim,) = defects.judge({"x": panel})
    assert not claim.holds
    assert "v ends at 0.0473, right: mended; jadam" in claim.measured


def test_a_peer_that_is_missing_is_named(monkeypatch):
    """flashoptim-jax takes part where it is installed."""
    monkeypatch.setattr(defects.importlib.util, "find_spec", lambda name: None)
    panel = defects.beyond_the_bound()
    assert defects.verdict(defects.PEER, panel.results[defects.PEER]).endswith("not installed")
    assert not defects.judge({"x": panel})[0].holds


@pytest.mark.usefixtures("quick_compilation")
def test_a_grid_trains_each_setting_as_if_alone():
    """One vmap over seeds and settings: losses, order of the settings, batches of the seed."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(50, 3)), jnp.float32)

    def loss(w, batch):
        return jnp.mean((batch @ w - 1) ** 2)

    settings = grid.product(rate=np.array([0.1, 0.2]), b1=np.array([0.5, 0.9]))
    batches = grid.orders(seeds=2, steps=6, batch_size=10, images=20, available=50)
    makes = {"make": lambda rate, b1: jadam.adam(rate, b1), "initial": lambda key: jnp.zeros(3)}
    parts = list(
        grid.trained(loss, settings=settings, examples=x, batches=batches, label="", **makes)
    )
    losses = np.concatenate([part for _, part in parts])
    assert losses.shape == (6, 2, 4)
    member, w = reference.Member(b1=0.5), np.zeros(3)
    for t in range(6):
        batch = np.asarray(x, np.float64)[batches[t, 1]]
        residual = batch @ w - 1
        # float32 against float64, six steps.
        np.testing.assert_allclose(losses[t, 1, 2], np.mean(residual**2), rtol=1e-4)
        w -= 0.2 * member(2 * batch.T @ residual / len(batch))
    own = [set(batches[:2, seed].ravel()) for seed in range(2)]
    assert [len(images) for images in own] == [20, 20]
    assert own[0] == set(batches[2:4, 0].ravel()) != own[1]


def test_the_best_and_the_edge_move_with_the_rate_or_do_not():
    """Loshchilov & Hutter's numbers on made-up basins: parallel, askew, and never left."""
    rates, decays = np.arange(-8, -3), np.arange(-16, -1, 2)
    octaves = loshchilov_hutter_2019.octaves
    for slope in (0.0, -1.0, 0.5):
        best = -9.0 + slope * (rates - rates[0])
        errors = 0.1 + 0.002 * (decays[None] - best[:, None]) ** 2
        found = loshchilov_hutter_2019.best_decays(errors, decays)
        np.testing.assert_allclose(found, best)  # a parabola is its own
        edges = loshchilov_hutter_2019.edges(errors, decays)
        assert octaves(errors, rates, found) == pytest.approx(slope)
        # The edge is interpolated between decays two octaves apart.
        assert octaves(errors, rates, edges) == pytest.approx(slope, abs=0.1)
    flat = np.full((5, 8), 0.1)
    assert np.isnan(octaves(flat, rates, loshchilov_hutter_2019.edges(flat, decays)))


@pytest.mark.usefixtures("quick_compilation")
def test_adamws_decay_sets_the_speed_of_turning_and_l2s_does_not():
    """The short form of Loshchilov & Hutter's claim: λ and α are decoupled in AdamW alone."""
    rates = np.arange(-8, -3)
    speeds = {
        name: loshchilov_hutter_2019.turning(name, rates, 2.0**-6, steps=500)
        for name in loshchilov_hutter_2019.OPTIMIZERS
    }
    # In balance |w|² loses 2λ|w|² a step and wins what noise, averaged by b1, adds.
    expected = np.sqrt(2 * 2.0**-6 * (1 - 0.9) / (1 + 0.9))
    np.testing.assert_allclose(speeds["AdamW"], expected, rtol=0.05)
    assert speeds["Adam with L2"][-1] > 2 * speeds["Adam with L2"][0]


@pytest.mark.usefixtures("quick_compilation")
def test_the_papers_lambda_is_not_multiplied_by_the_learning_rate():
    """Algorithm 2: a step of zero gradients shrinks by η_t·λ, whatever α is."""
    tx = loshchilov_hutter_2019.adamw(jnp.float32(1e-3), jnp.float32(0.25), lambda count: 0.5)
    updates, _ = tx.update(jnp.zeros(2), tx.init(jnp.ones(2)), jnp.ones(2))
    np.testing.assert_allclose(updates, -0.125, rtol=1e-6)


def test_the_variance_of_the_adaptive_rate_is_that_of_a_scaled_inverse_chi():
    """Liu et al., theorem 1, against scipy's inverse gamma distribution of ψ²."""
    for rho in (5.0, 8.0, 50.0, 1999.0):
        squared = stats.invgamma(rho / 2, scale=rho / 2)
        exact = squared.mean() - squared.expect(np.sqrt) ** 2
        # expect integrates numerically; for large ρ two numbers near 1 are subtracted.
        assert liu_2020.variance(np.array([rho]))[0] == pytest.approx(exact, rel=1e-3)
    t = np.array([10, 100, 1000])
    expected = [reference.sma_length(step, 0.999) for step in t]
    np.testing.assert_allclose(liu_2020.sma_length(t.astype(float)), expected, rtol=1e-6)
    r = liu_2020.rectifications(100)
    assert np.flatnonzero(r)[0] + 1 == 6  # ρ_t >= 5 from t = 6 on
    assert r[99] == pytest.approx(reference.rectification(100, 0.999), rel=1e-4)


@pytest.mark.soak
@pytest.mark.usefixtures("quick_compilation")
def test_liu_radam_needs_no_warm_up(mnist):
    """The short form: one learning rate, one seed, 100 steps; Adam without warm-up is caught."""
    config = liu_2020.Config(
        steps=100, warmup=30, batch_size=16, seeds=1, rates=(4e-3,), samples=4000, last=300
    )
    _, claims = liu_2020.run(config, mnist)
    # With one learning rate there is no sensitivity to it.
    assert not failed(claims[:-1])


@pytest.mark.usefixtures("quick_compilation")
def test_liu_the_variance_falls_and_its_rectification_makes_it_constant(mnist):
    """And each optimizer of the training learns, in forty steps of one layer."""
    config = liu_2020.Config(
        steps=40, warmup=10, batch_size=16, seeds=1, rates=(4e-3,), layers=1, samples=4000, last=300
    )
    numbers, claims = liu_2020.run(config, mnist)
    assert not failed(claims[:2])
    for name in liu_2020.COLOURS:
        curve = np.array(numbers["training"][name]["curve"])[:, 0, 0]
        assert curve[-4:].mean() < curve[:4].mean(), name


@pytest.mark.usefixtures("quick_compilation")
def test_dozat_nadam_is_faster_than_momentum(mnist, monkeypatch):
    """The short form: two optimizers, one hidden layer, 80 steps; and the claim can fail."""
    monkeypatch.setattr(dozat_2016, "WIDTHS", (196, 32, 196))
    config = dozat_2016.Config(
        steps=80, seeds=2, octaves=0, validation=200, optimizers=("Nesterov", "NAdam")
    )
    numbers, (claim,) = dozat_2016.run(config, mnist)
    assert claim.holds, claim
    swapped = {**numbers, "NAdam": numbers["Nesterov"], "Nesterov": numbers["NAdam"]}
    assert len(failed(dozat_2016.judge(swapped, config))) == 1


@pytest.mark.parametrize(
    ("module", "wrong", "message"),
    [
        (reddi_2018, {"steps": 5}, "--steps: expected 1010 or more, got 5"),
        (reddi_2018, {"constant": 2.0}, "--constant: expected a number above 2"),
        (step_bound, {"points": 0}, "--points: expected 1 or more, got 0"),
        (loshchilov_hutter_2019, {"images": 3}, "--images: expected 100 .a batch. to 60000, got 3"),
        (loshchilov_hutter_2019, {"rates": (-5, -5)}, "--rates: expected three values or more"),
        (liu_2020, {"width": 30}, "--width: expected a multiple of 4, got 30"),
        (dozat_2016, {"steps": 50}, "--steps: expected a multiple of 40, got 50"),
        (dozat_2016, {"optimizers": ("Adam",)}, "--optimizers: expected NAdam and others"),
    ],
)
def test_a_wrong_option_is_named(module, wrong, message):
    """Before anything is loaded or trained."""
    with pytest.raises(ValueError, match=message):
        module.Config(**wrong)
