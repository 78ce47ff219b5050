"""jadam.diagnostics: right numbers, for every state in every place, without a leaf's memory."""

import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import jadam
from experiments.common.mnist import dataset
from experiments.mnist import train
from experiments.mnist.config import Config
from jadam._members import member_of
from jadam._storage import storage_of
from tests.helpers import FAMILY, gradients_like, tree_of_parameters

EDGES = [0.01, 0.03, 0.1, 0.3, 0.7, 2]
diagnose = jax.jit(jadam.diagnostics, static_argnames=("adamax", "maximum"))
EIGHT_BITS = {"mu_dtype": "int8", "nu_dtype": "uint8"}


def options_of(case):
    """What diagnostics must be told of an optimizer."""
    known = {k: v for k, v in case.options.items() if k in ("b1", "b2", "eps", "eps_root")}
    if case.name.startswith("adamax"):
        known["adamax"] = True
    return known | {k: v for k, v in case.options.items() if k == "maximum"}


def in_float64(
    state, update, param, grad, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0, adamax=False, maximum=""
):
    """One leaf's report by the definitions, from its moments: the oracle."""
    t = max(int(state.count), 1)
    m, v, *largest = (
        np.asarray(x, np.complex128 if x.dtype.kind == "c" else float) for x in state[1:]
    )
    m_hat, v_hat = m / (1 - b1**t), v**2 if adamax else v / (1 - b2**t)
    divisor = v_hat
    if largest:
        divisor = largest[0] / (1 if maximum == "corrected" else 1 - b2**t)

    def rms(x):
        return np.sqrt(np.mean(np.abs(np.asarray(x)).astype(float) ** 2)) if np.size(x) else 0.0

    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(m_hat == 0, 0, np.abs(m_hat) / np.sqrt(divisor))
    size = max(m.size, 1)
    bins = np.histogram(ratio, [-1, *np.nextafter(EDGES, 9), np.inf])[0] / size
    rule = eps > (divisor**0.5 / 2 if adamax else np.sqrt(divisor + eps_root))
    return {
        "update_rms": rms(update),
        "param_rms": rms(param),
        "grad_rms": rms(grad),
        "v_rms": rms(np.sqrt(v_hat)),
        "update_to_param": rms(update) / rms(param) if rms(update) else 0.0,
        "eps_share": np.sum(rule) / size,
        "zero_share": np.sum(divisor == 0) / size,
        "ratio_histogram": bins,
    }


def after_steps(tx, params, steps=3):
    """Updates, state and gradients of the last of some steps, with gradients of many sizes."""
    state = tx.init(params)
    for seed in range(steps):
        grads = jax.tree.map(lambda g: g**5 * 1e-5, gradients_like(params, seed))
        updates, state = jax.jit(tx.update)(grads, state, params)
    return updates, state, grads


def path_of(tree):
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): leaf for path, leaf in flat}


def assert_report(report, expected, rtol=1e-5):
    assert set(report) == set(expected)
    for name, value in expected.items():
        # A share counts; a mean of float32 squares: 1e-5 is far above its rounding.
        np.testing.assert_allclose(report[name], value, rtol=rtol, atol=1e-30, err_msg=name)


KINDS = ("adam", "adam_eps_root", "amsgrad_corrected", "adamax")


@pytest.mark.usefixtures("either_compilation")
@pytest.mark.parametrize("case", [case for case in FAMILY if case.name in KINDS], ids=str)
def test_the_numbers_are_those_of_the_definitions(case):
    """Each number of each leaf equals its definition, evaluated in float64 from the state."""
    params = tree_of_parameters()
    updates, state, grads = after_steps(case(), params)
    options = {"eps": 1e-6} | options_of(case)  # an eps that rules somewhere
    reports = diagnose(state, updates, params, grads, **options)
    trees = map(path_of, (*state[0][1:], updates, params, grads))
    columns = list(trees)
    assert list(reports["leaves"]) == sorted(columns[0])
    for path, report in reports["leaves"].items():
        *moments, update, param, grad = (column[path] for column in columns)
        leaf = type(state[0])(state[0].count, *moments)
        assert_report(report, in_float64(leaf, update, param, grad, **options))
    # Under the root lies 1e-6 in that case: its root is never under eps.
    assert (reports["whole"]["eps_share"] > 0) == (case.name != "adam_eps_root")


@pytest.mark.usefixtures("quick_compilation")
def test_each_bin_of_ratios_ends_at_its_edge():
    """One |m̂|/√v̂ is below each edge and one above, and one is 2 itself, which is in its bin."""
    # 1e-5: some roundings of the square of an edge.
    ratios = jnp.asarray([2.0, *np.outer(EDGES, [1 - 1e-5, 1 + 1e-5]).ravel()], jnp.float32)
    v = jnp.full_like(ratios, 4)
    state = jadam.AdamState(jnp.int32(10**6), 2 * ratios, v)  # bias corrections of 1
    histogram = diagnose(state, v, v)["whole"]["ratio_histogram"]
    counts = np.array([1, 2, 2, 2, 2, 3, 1])
    np.testing.assert_allclose(histogram, counts / counts.sum(), rtol=1e-6)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("second", "options"),
    [
        ([0.24, 0.25, 0.26], {}),
        ([0.12, 0.125, 0.13], {"eps_root": 0.125}),
        ([0.99, 1.0, 1.01], {"adamax": True}),  # u = |g| + eps: twice eps
    ],
)
def test_eps_rules_where_it_is_more_than_half(second, options):
    """Of the denominator √v̂ + eps. Where it is just half it does not rule."""
    nu = jnp.asarray(second, jnp.float32)
    state = jadam.AdamState(jnp.int32(10**6), nu, nu)  # bias corrections of 1
    report = diagnose(state, nu, nu, eps=0.5, **options)["whole"]
    assert report["eps_share"] == pytest.approx(1 / 3)
    assert report["zero_share"] == 0


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(("maximum", "correction"), [("raw", 0.001), ("corrected", 1.0)])
def test_amsgrads_maximum_counts_as_its_step_takes_it(maximum, correction):
    """At t = 1 a raw one is divided by 1-b2, a corrected one has been."""
    state, *_ = jadam.amsgrad(1.0, maximum=maximum).init(jnp.ones(2))
    largest = correction * jnp.asarray([0.2, 0.3])
    state = state._replace(count=jnp.int32(1), nu_max=largest)
    report = diagnose(state, largest, largest, eps=0.5)["whole"]
    assert report["eps_share"] == 0.5
    assert report["zero_share"] == 0


@pytest.mark.usefixtures("quick_compilation")
def test_the_whole_is_made_of_its_leaves():
    """Mean squares and shares are weighted by the leaves' sizes, an empty leaf by none."""
    params = tree_of_parameters()
    updates, state, grads = after_steps(jadam.adam(1e-2), params)
    reports = diagnose(state, updates, params, grads)
    whole, leaves = reports["whole"], reports["leaves"]
    sizes = {path: p.size for path, p in path_of(params).items()}

    def mean(name, power=1):
        weighted = sum(n * np.asarray(leaves[path][name]) ** power for path, n in sizes.items())
        return (weighted / sum(sizes.values())) ** (1 / power)

    names = ("update_rms", "param_rms", "grad_rms", "v_rms")
    expected = {name: mean(name, 2) for name in names}
    expected["update_to_param"] = expected["update_rms"] / expected["param_rms"]
    for name in ("eps_share", "zero_share", "ratio_histogram"):
        expected[name] = mean(name)
    assert_report(whole, expected)
    np.testing.assert_allclose(whole["ratio_histogram"].sum(), 1, rtol=1e-6)
    assert not any(np.any(x) for x in leaves["['empty']"].values())


@pytest.mark.usefixtures("either_compilation")
@pytest.mark.parametrize("make", [jadam.amsgrad, jadam.adamax])
def test_codes_are_read_with_the_equations_of_their_step(make):
    """A state in 8 bits is reported as the float32 state of the moments that it stands for."""
    adamax = make is jadam.adamax
    params = {"coded": jnp.ones((16, 256)), "small": jnp.ones(7)}
    updates, (state, _), grads = after_steps(make(1e-2, **EIGHT_BITS), params)
    member, float32 = member_of(state, adamax=adamax), jnp.dtype("float32")
    stored = tuple(moment["coded"] for moment in state[1:])

    @jax.jit
    def decode():
        time = jadam._math.Time.of(state.count, float32)
        relation = member.relation_at(time, b1=0.9, b2=0.999)
        return storage_of(member.moments, stored).load(stored, lambda: relation, float32)

    decoded = decode()
    plain = type(state)(
        state.count,
        *({"coded": x, "small": y["small"]} for x, y in zip(decoded, state[1:], strict=True)),
    )
    report = functools.partial(diagnose, adamax=adamax)
    coded, right = (report(s, updates, params, grads) for s in (state, plain))
    code = np.asarray(stored[0]) & 511
    m_code = np.abs((np.asarray(stored[0]) >> 9).astype(int) - 64)
    ends = {
        "m_end_share": np.mean((m_code >= 62) & (code > 0) & (code < 511)),
        "v_end_share": np.mean((code == 1) | (code == 510)),
    }
    assert ends["v_end_share"] > 0  # g**5 spans more than the 16 octaves below a block's top
    assert_report(coded["leaves"]["['coded']"], right["leaves"]["['coded']"] | ends)
    assert_report(coded["leaves"]["['small']"], right["leaves"]["['small']"])
    assert_report(coded["whole"], right["whole"] | ends)  # the shares are of the coded elements


@pytest.mark.usefixtures("quick_compilation")
def test_the_first_codes_are_at_their_ends():
    """In the first step |m|/√v is what it can be at most, for every gradient."""
    params = jnp.ones((16, 256))
    tx = jadam.adam(1e-2, **EIGHT_BITS)
    updates, state = jax.jit(tx.update)(gradients_like(params, 0), tx.init(params))
    assert diagnose(state, updates, params)["whole"]["m_end_share"] == 1


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("bits", [8, 4])
def test_which_codes_are_the_outermost(bits):
    """v's first and last, and m's last two on either side where v is a number."""
    both = np.random.default_rng(0).integers(0, 2 ** (2 * bits), (512, 128))
    if bits == 8:  # bits of m and of v
        m, v, sizes, top = (both >> 9) - 64, both & 511, 63, 510
    else:  # digits to the base 21, and the last value is NaN
        v = -(-both // 21)
        m, sizes, top = both - 21 * v + 10, 10, 12
    number = (v > 0) & (v <= top)
    params, tops = jnp.ones(both.shape), jnp.zeros((both.shape[0], 1), jnp.int16)
    state = jadam.AdamState(jnp.int32(9), jnp.asarray(both, f"uint{2 * bits}"), tops)
    report = diagnose(state, params, params)["whole"]
    assert report["m_end_share"] == np.mean(number & (np.abs(m) >= sizes - 1))
    assert report["v_end_share"] == np.mean((v == 1) | (v == top))


ADAM = jadam.adam(1e-2)
PLACES = {
    "bare": jadam.scale_by_adam(),
    "chain": optax.chain(optax.clip(1e9), ADAM, optax.scale(1.0)),
    "partition": optax.partition({"x": ADAM, "y": jadam.adamw(1e-2)}, {"a": "x", "b": "y"}),
    "inject": optax.inject_hyperparams(jadam.adam)(1e-2),
    "compensated": jadam.compensated_weights(ADAM),
}


@functools.cache
def report_of(place):
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones(5)}
    _, state, grads = after_steps(PLACES[place], params, steps=2)
    return diagnose(state, grads, params)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("place", list(PLACES)[1:])
def test_the_state_is_found_wherever_it_is(place, standard_promotion):
    """In every wrapper, the report on the same updates is that of a plain jadam.adam.

    Tolerance: inject_hyperparams has b2 in float32, which changes 1-b2 by 1.3e-5 of itself.
    """
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5)
    jax.tree.map(close, report_of(place), report_of("bare"))


@pytest.mark.usefixtures("quick_compilation")
def test_the_state_of_flax_nnx():
    """What nnx.Optimizer keeps in Variables, with the model's state as parameters."""
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, ADAM, wrt=nnx.Param)
    params = nnx.state(model, nnx.Param)
    grads = jax.tree.map(jnp.ones_like, params)
    optimizer.update(model, grads)
    report = diagnose(optimizer.opt_state, grads, params)
    np.testing.assert_allclose(report["whole"]["v_rms"], 1, rtol=1e-6)


@pytest.mark.usefixtures("quick_compilation")
def test_leaves_that_no_state_covers_are_left_out():
    """Masked leaves count nowhere, of whatever dtype; None and empty nodes are no leaves."""
    params = {"a": jnp.ones(3), "table": jnp.arange(4), "b": None, "c": ()}
    mask = {"a": True, "table": False, "b": None, "c": ()}
    tx = optax.masked(jadam.adam(1e-2), mask)
    state = tx.init(params)
    report = diagnose(state, params, params)
    assert list(report["leaves"]) == ["['a']"]
    assert report["whole"]["param_rms"] == 1
    nothing = jadam.diagnostics(jadam.init({}), {}, {})
    assert nothing == {"whole": {}, "leaves": {}}


@pytest.mark.usefixtures("quick_compilation")
def test_before_the_first_step():
    """All is 0, nothing is NaN: eps rules everywhere, for want of a gradient."""
    params = tree_of_parameters()
    zeros = jax.tree.map(jnp.zeros_like, params)
    whole = diagnose(jadam.init(params), zeros, zeros)["whole"]
    assert whole["eps_share"] == whole["zero_share"] == whole["ratio_histogram"][0] == 1
    assert whole["update_to_param"] == whole["v_rms"] == 0


@pytest.mark.usefixtures("quick_compilation")
def test_a_nan_shows_in_its_leaf():
    """It is in no bin and makes means NaN, there and in the whole; other leaves are as before."""
    params = {"a": jnp.ones(4), "b": jnp.ones(4)}
    grads = {"a": jnp.array([1.0, jnp.nan, 1.0, 1.0]), "b": jnp.ones(4)}
    updates, state = ADAM.update(grads, ADAM.init(params))
    reports = diagnose(state, updates, params, grads)
    whole, leaves = reports["whole"], reports["leaves"]
    assert leaves["['a']"]["ratio_histogram"].sum() == 0.75
    assert all(np.isnan(r["update_to_param"]) for r in (whole, leaves["['a']"]))
    assert leaves["['b']"]["ratio_histogram"].sum() == 1


@pytest.mark.usefixtures("either_compilation")
def test_complex_and_float64(x64):
    """|g|² of both parts; a float64 state is read in float64 and reported in float32."""
    params = {"z": jnp.ones(6, complex), "x": jnp.ones(6, np.float64)}
    updates, state, grads = after_steps(ADAM, params)
    reports = diagnose(state, updates, params, grads)["leaves"]
    for name in params:
        moments = (moment[name] for moment in state[0][1:])
        leaf = jadam.AdamState(state[0].count, *moments)
        right = in_float64(leaf, updates[name], params[name], grads[name])
        assert_report(reports[f"['{name}']"], right)
    assert {x.dtype for x in jax.tree.leaves(reports)} == {jnp.dtype("float32")}


def at(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


@pytest.mark.usefixtures("either_compilation")
def test_scan_and_vmap():
    """The same report inside lax.scan, and for each member of an ensemble under vmap."""
    params = {"w": jnp.ones((2, 16, 256), jnp.bfloat16), "b": jnp.ones((2, 3))}
    tx = jadam.adam(1e-2, **EIGHT_BITS)
    grads = [gradients_like(params, seed) for seed in range(3)]

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        params = jax.tree.map(lambda p, u: p + u, params, updates)
        return (params, state), jadam.diagnostics(state, updates, params, grads)

    carry = params, jax.vmap(tx.init)(params)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *grads)
    _, scanned = jax.lax.scan(jax.vmap(step), carry, stacked)
    jitted = jax.jit(step)
    for member in range(2):
        own = at(params, member)
        carry = own, tx.init(own)
        for g in grads:
            carry, report = jitted(carry, at(g, member))
        # Another order of summation: 1e-5 is far above its rounding.
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
        jax.tree.map(close, at(at(scanned, -1), member), report)


def test_sharded_as_in_one_piece():
    """On eight devices the same shares, from partial counts: no leaf is gathered."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    params = jnp.ones((64, 512))
    updates, state, grads = after_steps(jadam.adam(1e-2, **EIGHT_BITS), params)
    right = diagnose(state, updates, params, grads)["whole"]

    def place(x):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*("x", "y")[: x.ndim])))

    args = jax.tree.map(place, (state, updates, params, grads))
    compiled = jax.jit(jadam.diagnostics).lower(*args).compile()
    for name, value in compiled(*args)["whole"].items():
        np.testing.assert_allclose(value, right[name], rtol=1e-6, err_msg=name)
    # Counts may be gathered, a number for each device.
    gathered = re.findall(r"\[([\d,]*)\]\S* (?:all-gather|all-to-all)\(", compiled.as_text())
    assert all(math.prod(map(int, shape.split(","))) <= 8 for shape in gathered)


@pytest.mark.parametrize(
    ("make", "leaves"), [(jadam.adam, 0), (functools.partial(jadam.adam, **EIGHT_BITS), 1)]
)
def test_no_array_of_a_leafs_size_is_made(make, leaves):
    """Also on a CPU; but for codes, whose v is there once in float32 while it is summed."""
    params = jnp.ones((512, 1024))
    state = jax.eval_shape(make(1e-2).init, params)
    compiled = jax.jit(jadam.diagnostics).lower(state, params, params, params).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < (leaves + 0.1) * params.nbytes


def test_a_large_leaf_is_counted_to_its_end():
    """Past 2²⁴ elements, where float32 counts and sums that are added one by one stand still."""
    ones = jnp.ones(2**25, jnp.bfloat16)
    state = jadam.AdamState(jnp.int32(10**6), ones, ones)  # bias corrections of 1
    report = jax.jit(jadam.diagnostics)(state, ones, ones)["whole"]
    np.testing.assert_allclose(report["update_rms"], 1, rtol=1e-5)
    np.testing.assert_array_equal(report["ratio_histogram"][5], 1)


STATE = jadam.init({"w": jnp.ones((2, 3))})


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (
            (optax.EmptyState(), {}, {}),
            {},
            "state: expected one of jadam's states .* none in EmptyState",
        ),
        (((STATE, STATE), {}, {}), {}, r"two for \['w'\]"),
        ((STATE, {}, {}), {}, r"updates\['w'\] is missing: state.mu\['w'\] exists"),
        ((STATE, STATE.mu, {"w": jnp.ones(3)}), {}, r"params\['w'\]: expected shape \(2, 3\)"),
        ((STATE, STATE.mu, {"w": jnp.ones((2, 2))}), {}, r"params\['w'\]: expected shape \(2, 3\)"),
        ((STATE, STATE.mu, STATE.mu, {"v": 1}), {}, r"grads\['w'\] is missing"),
        ((STATE, {"w": "text"}, STATE.mu), {}, r"updates\['w'\]: expected an array, got str"),
        ((STATE, STATE.mu, STATE.mu), {"b2": 1.0}, "b2: expected a number >= 0 and < 1"),
        ((STATE, STATE.mu, STATE.mu), {"eps": -1.0}, "eps: expected a number >= 0"),
        ((STATE, STATE.mu, STATE.mu), {"maximum": "hat"}, "maximum: expected one of"),
    ],
)
def test_what_does_not_fit_is_named(arguments, options, message):
    """The argument or the leaf's path, what was expected and what came."""
    with pytest.raises((TypeError, ValueError), match=message):
        jadam.diagnostics(*arguments, **options)


class Linear(nnx.Module):
    """In the place of the CNN, which takes ten seconds to compile."""

    def __init__(self, *, rngs, dropout):
        self.dense = nnx.Linear(784, 10, rngs=rngs)

    def __call__(self, images, *, key=None):
        return self.dense(images.reshape(-1, 784))


@pytest.mark.usefixtures("quick_compilation")
def test_mnist_with_diagnostics(tmp_path, monkeypatch):
    """The flag changes no bit of the training; it adds 20 lines of JSON an epoch and a picture."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (940, 28, 28, 1), np.uint8)
    labels = rng.integers(0, 10, 940, np.int32)
    mnist = dataset.Mnist(images[:740], labels[:740], images[740:], labels[740:])
    monkeypatch.setitem(train.MODELS, "cnn", Linear)
    monkeypatch.setattr(train.pictures, "write_all", lambda *arguments: None)
    folders, results = [tmp_path / "plain", tmp_path / "observed"], []
    for folder, flag in zip(folders, (False, True), strict=True):
        config = Config(epochs=2, validation=100, diagnostics=flag, out=folder)
        results.append(train.train_and_test(config, mnist))
    plain, observed = results
    assert plain["test"] == observed["test"]
    assert plain.keys() == observed.keys()
    plain, observed = ({path.name for path in folder.iterdir()} for folder in folders)
    assert observed - plain == {"diagnostics.jsonl", "diagnostics.png", "diagnostics.svg"}
    lines = (tmp_path / "observed" / "diagnostics.jsonl").read_text().splitlines()
    # Strictly JSON: no NaN and no Infinity.
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [row["step"] for row in rows] == list(range(1, 41))
    # The learning rate, since every direction is ±1 at first.
    assert rows[0]["whole"]["update_rms"] == pytest.approx(1e-3, rel=0.1)
    assert rows[0]["leaves"]["['dense']['bias'].value"]["update_to_param"] is None  # by zeros
