"""Kingma & Ba (2015), figures 1, 2 and 4: the trainings in a short form, and the committed results.

Standard promotion: optax's AdaGrad and AdaDelta do not run under the strict one.
"""

import json
from dataclasses import asdict
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.common.mnist.idx import (
    FILES,
    TRAIN_IMAGES,
    TRAIN_LABELS,
    Mnist,
    read_images,
    read_labels,
)
from experiments.common.report import readme_block
from experiments.papers.kingma_ba_2015 import logistic, mlp, vae
from experiments.papers.kingma_ba_2015.comparison import compare
from experiments.papers.kingma_ba_2015.training import Task, grid, kept, train, unlisted
from experiments.papers.publish import README, RESULTS, table_of

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def digits():
    """The first 2,048 training images, twice: no test of these is about generalization."""
    images = read_images(FILES / TRAIN_IMAGES)[:2048]
    labels = read_labels(FILES / TRAIN_LABELS)[:2048]
    return Mnist(images, labels, images, labels)


@pytest.mark.usefixtures("quick_compilation")
def test_a_pass_sees_every_example_once():
    """The mean over a pass's batches is the mean of all; each pass has another order."""
    task = Task(
        lambda params, batch, key: params + jnp.sum(batch * jnp.array([1.0, 100.0])),
        jnp.zeros(()),
        jnp.arange(8.0),
        2,
    )
    losses = train(task, optax.sgd, {"learning_rate": np.zeros(1, np.float32)}, 2, seed=0)
    assert losses[0] != losses[1]  # the place in a batch weighs 1 or 100
    task = task._replace(loss=lambda params, batch, key: params + batch.mean())
    losses = train(task, optax.sgd, {"learning_rate": np.zeros(1, np.float32)}, 2, seed=0)
    np.testing.assert_array_equal(losses, 3.5)


@pytest.mark.usefixtures("quick_compilation")
def test_settings_at_once_are_settings_one_by_one():
    """x' = x - alpha·(x - 1): 1 - x shrinks by 1 - alpha, and the noise is everybody's."""
    noisy = lambda params, batch, key: (  # noqa: E731
        0.5 * jnp.sum((params - 1) ** 2) + jax.random.normal(key)
    )
    task = Task(noisy, jnp.zeros(()), jnp.arange(4), 2)
    rates = np.float32([0.0, 0.5, 0.9])
    losses = train(task, optax.sgd, {"learning_rate": rates}, 2, seed=3)
    steps = np.arange(4).reshape(2, 2, 1)
    quadratic = (0.5 * (1 - rates.astype(float)) ** (2 * steps)).mean(axis=1)
    # Sums of float32 numbers near 1.
    np.testing.assert_allclose((losses - losses[:, :1]), quadratic - 0.5, atol=1e-6)


def test_a_finished_training_is_not_run_again(tmp_path):
    """A killed command goes on where it was; another configuration starts anew."""
    losses = np.array([[1.0, np.inf], [0.25, np.nan]])
    first = kept(tmp_path / "part.json", {"rates": (1, 2)}, lambda: losses)
    again = kept(tmp_path / "part.json", {"rates": (1, 2)}, lambda: pytest.fail("ran twice"))
    np.testing.assert_array_equal(first, [[1.0, np.nan], [0.25, np.nan]])
    np.testing.assert_array_equal(again, first)
    assert kept(tmp_path / "part.json", {"rates": (1, 3)}, lambda: 2 * losses)[0, 0] == 2


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("b1", [0.0, 0.9])
@pytest.mark.parametrize("b2", [0.99, 0.9999])
def test_adam_without_corrections_is_algorithm_1_without_hats(b1, b2):
    """m/(√v + eps) of moments that start at 0, in float64; with corrections, m̂/(√v̂ + eps)."""
    gradients = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)

    def updates(is_corrected):
        optimizer = vae.adam(1.0, is_corrected, b1=b1, b2=b2)
        step = lambda state, g: optimizer.update(g, state)[::-1]  # noqa: E731
        return jax.lax.scan(step, optimizer.init(jnp.zeros(5)), gradients)[1]

    without, corrected = jax.jit(jax.vmap(updates))(jnp.array([False, True]))
    m = v = np.zeros(5)
    for t, g in enumerate(gradients.astype(float), 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        # float32: some ulps of 6e-8 of each, and v's last place, which is dithered.
        np.testing.assert_allclose(without[t - 1], -m / (np.sqrt(v) + 1e-8), rtol=2e-6)
        m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
        np.testing.assert_allclose(corrected[t - 1], -m_hat / (np.sqrt(v_hat) + 1e-8), rtol=2e-6)
    # The first step is so much too long: 100 times at b1 = 0, b2 = .9999. There eps is beside
    # |g|/100, and the smallest |g| is 0.1.
    ratio = (1 - b1) / np.sqrt(1 - b2)
    np.testing.assert_allclose(np.abs(without[0]), ratio, rtol=1.2e-5)


@pytest.mark.usefixtures("x64")
def test_the_divergence_is_the_integral():
    """E_q[log q(z) - log p(z)] by Gauss and Hermite: exact for polynomials of degree 2."""
    rng = np.random.default_rng(1)
    mean, log_variance = rng.standard_normal((2, 3, 4))
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    z = mean[..., None] + np.exp(0.5 * log_variance)[..., None] * nodes
    log_ratio = 0.5 * (z**2 - nodes**2 - log_variance[..., None])
    expected = (log_ratio * weights / weights.sum()).sum(axis=(1, 2))
    # float64 sums of a hundred terms near 1.
    np.testing.assert_allclose(vae.divergence(mean, log_variance), expected, rtol=1e-12)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.usefixtures("x64")
def test_the_bound_and_its_gradient():
    """Known where all parameters are 0; its slope in a direction is the difference quotient."""
    params = jax.jit(vae.init, static_argnums=(1, 2, 3))(jax.random.key(0), 9, 4, 2)
    images = np.random.default_rng(2).random((5, 9))
    bound = jax.jit(partial(vae.negative_bound, images=images, key=jax.random.key(1)))
    zeros = jax.tree.map(jnp.zeros_like, params)
    # q(z|x) is p(z), and each pixel is a coin: 9 bits.
    np.testing.assert_allclose(bound(zeros), 9 * np.log(2), rtol=1e-14)

    rng = np.random.default_rng(3)
    direction = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape)), params)
    slope = optax.tree.vdot(jax.grad(bound)(params), direction)
    h = 1e-5
    ahead, behind = (bound(optax.tree.add_scale(params, s, direction)) for s in (h, -h))
    # The quotient is off by h² = 1e-10 times the third derivative, and by 1e-16/h of rounding.
    np.testing.assert_allclose((ahead - behind) / (2 * h), slope, rtol=1e-7)


@pytest.mark.usefixtures("quick_compilation")
def test_the_uninformed_loss_is_that_of_the_best_constant():
    """The entropy of the pixels' means; another constant is worse."""
    images = np.random.default_rng(4).random((50, 6)).astype(np.float32)
    logits = jnp.log(images.mean(0) / (1 - images.mean(0)))
    loss = lambda logits: optax.sigmoid_binary_cross_entropy(logits, images).sum(1).mean()  # noqa: E731
    # float32 means of fifty numbers.
    np.testing.assert_allclose(loss(logits), vae.uninformed(images), rtol=1e-6)
    assert loss(logits + 0.1) > vae.uninformed(images)


@pytest.mark.usefixtures("quick_compilation")
def test_figure_1_in_short(digits, tmp_path):
    """192 steps: Adam and SGD Nesterov are alike, and both are ahead of AdaGrad with α/√t."""
    config = logistic.Logistic(epochs=12, images=2048)
    contenders = {
        name: logistic.CONTENDERS[name]._replace(settings=grid(learning_rate=rates, **others))
        for name, rates, others in (
            ("AdaGrad", (0.1, 0.2, 0.4), {}),
            ("AdaGrad, α constant", (0.1,), {}),
            ("SGD Nesterov", (0.3, 1.0), {"momentum": (0.9,)}),
            ("Adam", (0.03, 0.06, 0.1), {}),
        )
    }
    found = compare(contenders, logistic.task(config, digits), config, tmp_path)
    curves = {name: one.curve for name, one in found.items()}
    assert [claim.holds for claim in logistic.claims(curves)][:2] == [True, True]
    curves["AdaGrad"], curves["Adam"] = curves["Adam"], curves["AdaGrad"]
    assert [claim.holds for claim in logistic.claims(curves)][:2] == [False, False]


@pytest.mark.usefixtures("quick_compilation")
def test_figure_2_in_short(digits, tmp_path):
    """Adam learns in 64 steps, from about log 10 = 2.3 to under 1.9."""
    config = mlp.Mlp(epochs=4, images=2048, hidden=32, dropout=0.2)
    contenders = {"Adam": mlp.CONTENDERS["Adam"]}
    found = compare(contenders, mlp.task(config, digits), config, tmp_path)["Adam"]
    assert found.setting["learning_rate"] == np.float32(1e-3)
    assert found.is_at_edge
    assert found.curve.shape == (4,)
    assert found.curve[-1] == found.costs.min() < 1.9


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("module", [logistic, mlp])
def test_every_contender_descends(module):
    """On x²/2 from 1, two steps: downwards at all settings of the grid that are small."""
    for name, contender in module.CONTENDERS.items():

        def descend(setting, contender=contender):
            optimizer, x = contender.make(**setting), jnp.ones(())
            state = optimizer.init(x)
            for _ in range(2):
                update, state = optimizer.update(x, state, x)
                x += update
            return x

        ends = jax.jit(jax.vmap(descend))(contender.settings)
        assert (ends[contender.settings["learning_rate"] < 0.5] < 1).all(), name


def test_the_claims_of_figure_4_can_fail():
    """All hold where only the uncorrected b2 = .9999 is bad, at first; all fail for the reverse."""
    config = vae.Vae(epochs=(1, 2), log_learning_rates=(-3.0, -2.0))
    losses = np.full((2, 2, 3, 2, 2), 5.0)
    losses[0, :, 2, :, 0] = np.nan
    losses[1, :, 2, :, 0] = 6.0
    losses[1, 1, 2, 0, 1] = 4.0
    claims = vae.claims(config, losses, uninformed=10.0, noise=0.01)
    assert [claim.holds for claim in claims] == [True] * 5
    claims = vae.claims(config, losses[..., ::-1], uninformed=10.0, noise=0.01)
    assert [claim.holds for claim in claims] == [False] * 5


def test_a_claim_of_figure_2_can_fail():
    """Adam's last cost decides, against each of the others."""
    curves = {name: np.array([1.0, 0.5]) for name in mlp.CONTENDERS}
    for last, holds in ((0.4, True), (0.5, False)):
        claims = mlp.claims(curves | {"Adam": np.array([1.0, last])})
        assert [claim.holds for claim in claims] == [holds] * 4


@pytest.mark.usefixtures("quick_compilation")
def test_dropout_leaves_out_its_share_and_keeps_the_mean():
    """A layer of ones: the units that are kept count double at a rate of a half."""
    ones = {"kernel": jnp.ones((1, 1000)), "bias": jnp.zeros(1000)}
    read = {"kernel": jnp.stack([jnp.ones(1000), jnp.zeros(1000)], 1) / 1000, "bias": jnp.zeros(2)}
    batch = jnp.full((1, 1), 255), jnp.array([1])
    losses = jax.jit(jax.vmap(lambda key: mlp.loss([ones, read], batch, key, dropout=0.5)))(
        jax.random.split(jax.random.key(0), 100)
    )
    means = jnp.log(jnp.expm1(losses))  # of log(1 + exp(mean of the units))
    # 100 means of 1,000 units of variance 1: 0.03 each, 0.003 together; five times that.
    assert abs(means.mean() - 1) < 0.016
    assert 0.02 < means.std() < 0.045


@pytest.mark.usefixtures("quick_compilation")
def test_figure_4_in_short(digits):
    """At α = 0.1, b2 = .9999 the first steps are too long without corrections, and ruin it."""
    config = vae.Vae(images=2048, hidden=32, pooling=4, latent=4)
    task = vae.task(config, digits)
    settings = grid(learning_rate=(0.1,), is_corrected=(0.0, 1.0))
    losses = train(task, partial(vae.adam, b1=0.9, b2=0.9999), settings, 4, seed=0)
    without, corrected = losses[-1]
    uninformed = vae.uninformed(np.asarray(task.examples))
    # After 80 steps of 2,048 images it has learnt the pixels' means, 13.4 nats, and no more.
    assert corrected < 1.05 * uninformed
    assert without > 1.5 * uninformed


def test_ruined_is_what_learns_with_corrections_alone():
    """Not what learns nothing either way, nor what learns without corrections."""
    losses = np.array([[9.0, 1.0], [np.nan, 1.0], [9.0, 9.0], [np.nan, np.nan], [1.0, 9.0]])
    ruined = vae.is_ruined(losses, uninformed=5.0)
    np.testing.assert_array_equal(ruined, [True, True, False, False, False])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(logistic.Logistic, images=100), "--logistic.images: expected 128 "),
        (partial(mlp.Mlp, epochs=0), "--mlp.epochs: expected 1 or more, got 0"),
        (partial(mlp.Mlp, dropout=1.0), r"--mlp.dropout: expected a share in \[0, 1\), got 1.0"),
        (partial(vae.Vae, pooling=3), "--vae.pooling: expected a divisor of 28, got 3"),
        (partial(vae.Vae, epochs=(2, 2)), "--vae.epochs: expected few and then more"),
    ],
)
def test_a_wrong_option_is_named(make, message):
    """With what was expected and what came."""
    with pytest.raises(ValueError, match=message):
        make()


def belongs(number, config, claims_of):
    """The committed file of a figure has this configuration and the claims of its own numbers."""
    name = f"kingma_ba_2015_figure{number}"
    results = json.loads((RESULTS / f"{name}.json").read_text())
    assert results["config"] == json.loads(json.dumps(asdict(config)))
    claims = claims_of(results)
    assert results["claims"] == [claim._asdict() for claim in claims]
    assert readme_block(name, README)[1] == f"{table_of(claims)}\n"
    return results


@pytest.mark.parametrize(
    ("number", "module", "config"), [(1, logistic, logistic.Logistic()), (2, mlp, mlp.Mlp())]
)
def test_the_committed_comparison_belongs_to_the_committed_code(number, module, config):
    """Configuration, contenders and verdicts; no best learning rate lies at its grid's edge."""

    def claims(results):
        contenders = results["contenders"].items()
        return module.claims({name: unlisted(one["curve"]) for name, one in contenders})

    contenders = belongs(number, config, claims)["contenders"]
    assert contenders.keys() == module.CONTENDERS.keys()
    for name, one in contenders.items():
        assert len(one["curve"]) == config.epochs
        settings = module.CONTENDERS[name].settings
        best = int(np.nanargmin(unlisted(one["costs"])))
        assert one["setting"] == {key: float(x[best]) for key, x in settings.items()}
        assert not one["is_at_edge"], name


def test_the_committed_grid_belongs_to_the_committed_code():
    """Configuration, shape and verdicts."""
    config = vae.Vae()

    def claims(results):
        losses = unlisted(results["losses"])
        return vae.claims(config, losses, results["uninformed"], results["noise"])

    results = belongs(4, config, claims)
    rates = len(config.log_learning_rates)
    assert unlisted(results["losses"]).shape == (config.epochs[1], 2, 3, rates, 2)
