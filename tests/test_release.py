"""Released steps: the plain step's bits, its errors, its memory, and what it may not skip."""

import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.extend import core
from jax.sharding import AxisType

import jadam
from experiments.common.gpt import GPT, Shape
from experiments.common.gpt import loss_fn as loss_fn_of_gpt
from experiments.common.gpt import scanned as scanned_gpt
from experiments.common.report import readme_block
from experiments.scale import release as scale_release
from jadam import release
from jadam.sharding import state_shardings

LAYERS, WIDTH, HIDDEN, WORDS = 4, 64, 128, 32
EIGHT_BITS = {"mu_dtype": "int8", "nu_dtype": "uint8", "min_size": 0}
FOUR_BITS = {"mu_dtype": "int4", "nu_dtype": "uint4", "min_size": 0}
SIXTEEN_BITS = {"mu_dtype": jnp.bfloat16, "nu_dtype": jnp.bfloat16}
XLA: dict[str, Any] = {"kernel": "xla"}  # a plain step would take the CPU's kernel, where it is


def matrices(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


SCHEDULE = optax.linear_schedule(1e-2, 1e-3, 10)
TRANSFORMATIONS = {
    "adamw": jadam.adamw(SCHEDULE, weight_decay=0.1, mask=matrices, **XLA),
    "bf16 moments": jadam.adam(1e-2, **SIXTEEN_BITS, **XLA),
    "8 bits": jadam.nadamw(1e-2, **EIGHT_BITS, **XLA),
    "4 bits": jadam.stochastic_rounding(jadam.adamw(1e-2, **FOUR_BITS, **XLA), 3),
    "amsgrad": jadam.amsgrad(1e-2, **EIGHT_BITS, **XLA),
    "adamax": jadam.adamaxw(1e-2, **XLA),
    "radam": jadam.radam(1e-2, **XLA),
    "ademamix": jadam.ademamix(1e-2, weight_decay=0.1, warmup=50, **EIGHT_BITS, **XLA),
    "compensated": jadam.compensated_weights(
        jadam.adamw(SCHEDULE, weight_decay=0.1, mask=matrices, **EIGHT_BITS, **XLA)
    ),
    "stochastic": jadam.stochastic_rounding(jadam.adamw(1e-2, **SIXTEEN_BITS, **XLA), 3),
    "optax": optax.chain(optax.clip(0.1), optax.adamw(SCHEDULE), optax.add_decayed_weights(-1e-3)),
    "partitioned": optax.partition(
        {"matrices": jadam.adamw(1e-2, **XLA), "others": optax.sgd(1e-2, 0.9)},
        lambda params: jax.tree.map(lambda p: "matrices" if p.ndim > 1 else "others", params),
    ),
    "hyperparameters": optax.inject_hyperparams(jadam.adam, static_args=("kernel",))(
        SCHEDULE, **XLA
    ),
}


SHORT = ("adamw", "compensated", "stochastic", "optax", "hyperparameters")


def parameters(dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)

    def leaf(*shape):
        return jnp.asarray(rng.standard_normal(shape) / 8, dtype)

    layers = {
        "up": leaf(LAYERS, WIDTH, HIDDEN),
        "down": leaf(LAYERS, HIDDEN, WIDTH),
        "bias": leaf(LAYERS, HIDDEN),
        "scale": leaf(LAYERS),
    }
    return {"words": leaf(WORDS, WIDTH), "layers": layers, "norm": leaf(WIDTH), "unused": leaf(3)}


def layer(x, p):
    p = jax.tree.map(lambda p: p.astype(jnp.float32), p)
    hidden = jax.nn.relu(x @ p["up"] + p["bias"][None])
    return x + p["scale"] * (hidden @ p["down"]), jnp.mean(x)


def loss_fn(params, text, wrap=jax.checkpoint, **options):
    """The words are embedding and head: their gradient is a sum of two."""
    words = params["words"].astype(jnp.float32)
    x, _ = release.scan(wrap(layer), words[text[:, 0]], params["layers"], **options)
    logits = x * params["norm"].astype(jnp.float32)[None] @ words.T
    return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1]).mean()


TEXT = jnp.asarray(np.random.default_rng(1).integers(0, WORDS, (3, 16, 2)))


def plain_step(loss, tx):
    def step(params, state, *args):
        value, grads = jax.value_and_grad(loss)(params, *args)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


# XLA's algebra, its way around bfloat16 and the processor's joint product and sum round differently
# in different programs. Without them two programs that mean the same have to agree in every bit.
AS_WRITTEN = {
    "xla_backend_optimization_level": 0,
    "xla_disable_hlo_passes": "algsimp",
    "xla_allow_excess_precision": False,
}


def trained(step, tx, params, batches=TEXT):
    state, losses = jax.jit(tx.init)(params), []
    step = jax.jit(step, compiler_options=AS_WRITTEN)
    for batch in batches:
        params, state, value = step(params, state, batch)
        losses.append(value)
    return params, state, losses


def assert_equal(got, expected, atol=1e-12):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    flat, _ = jax.tree_util.tree_flatten_with_path(got)
    for (path, x), y in zip(flat, jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        x, y = (np.asarray(a).astype(np.float32) for a in (x, y))
        # A sum of products that cancels leaves nothing or 1e-13, by its order: only this is let go.
        message = jax.tree_util.keystr(path)
        np.testing.assert_allclose(x, y, rtol=0, atol=atol, err_msg=message)


@pytest.mark.usefixtures("standard_promotion")  # optax.apply_updates of bfloat16 parameters
@pytest.mark.parametrize(
    "name",
    [
        name if name in SHORT else pytest.param(name, marks=pytest.mark.soak)
        for name in TRANSFORMATIONS
    ],
)
def test_the_plain_steps_bits(name):
    """Parameters, state and losses of three steps, for members, storages, wrappers and optax's."""
    tx = TRANSFORMATIONS[name]
    params = parameters(jnp.bfloat16 if name in ("compensated", "stochastic") else jnp.float32)
    expected = trained(plain_step(loss_fn, tx), tx, params)
    assert_equal(trained(release.train_step(loss_fn, tx), tx, params), expected)


# What may not be skipped. JAX calls no backward rule that it needs no gradient of.


def layer_of(x, p):
    return jnp.tanh(x @ p["w"]), None


def scanned(params, x, f=layer_of):
    return release.scan(f, x, params["layers"])[0]


def mean(params, x):
    return jnp.mean(x @ params["head"])


X = jnp.ones((2, 4))
SMALL = {
    "layers": {"w": jnp.asarray(np.random.default_rng(2).standard_normal((3, 4, 4)), jnp.float32)},
    "others": {"w": jnp.ones((3, 4, 4)) / 8},
    "head": jnp.ones(4),
}
NO_GRADIENT = {
    "unused": lambda p, x: (scanned(p, x), mean(p, x))[1],
    "stopped": lambda p, x: mean(p, jax.lax.stop_gradient(scanned(p, x))),
    "stopped inside": lambda p, x: mean(
        p, scanned(p, x, lambda x, p: layer_of(x, jax.lax.stop_gradient(p)))
    ),
    "ignored": lambda p, x: mean(p, scanned(p, x, lambda x, p: (1.5 * x, None))),
    "sometimes": lambda p, x: mean(
        p,
        release.scan(
            lambda c, p: (
                (c[0] + 1, jax.lax.cond(c[0] == 1, lambda: c[1] @ p["w"], lambda: c[1])),
                None,
            ),
            (0, x),
            p["layers"],
        )[0][1],
    ),
}
OTHER_FORMS = {
    "ys alone": lambda p, x: jnp.mean(
        release.scan(lambda c, p: (c, x @ p["w"] * p["w"][0, 0]), 0.0, p["layers"])[1]
    ),
    "two stacks": lambda p, x: mean(p, scanned({"layers": p["others"]}, scanned(p, x))),
    "keys, reversed": lambda p, x: mean(
        p,
        release.scan(
            lambda x, a: (layer_of(x, a[0])[0] * jax.random.uniform(a[1], x.shape), None),
            x,
            (p["layers"], jax.random.split(jax.random.key(0), 3)),
            reverse=True,
        )[0],
    ),
    "closed over": lambda p, x: jnp.mean(
        scanned(p, x, lambda x, q: (layer_of(x * p["head"][None], q)[0], None))
    ),
    "one in a jit": lambda p, x: mean(p, jax.jit(scanned)({"layers": p["others"]}, scanned(p, x))),
    "policy": lambda p, x: mean(
        p,
        scanned(p, x, jax.checkpoint(layer_of, policy=jax.checkpoint_policies.dots_saveable)),
    ),
}
# Where the forward pass keeps what the backward pass needs, XLA computes it in other ways: last
# bits of gradients of 1e-3, hence of parameters of 1. A step that is skipped is off by 1e-2.
LAST_BITS = 1e-6
DECAYING = jadam.adamw(1e-2, weight_decay=0.1, **XLA)


def both(loss, tx=DECAYING, params=SMALL, **options):
    steps = (plain_step(loss, tx), release.train_step(loss, tx, **options))
    return [trained(step, tx, params, [X, -X]) for step in steps]


@pytest.mark.parametrize("name", [*NO_GRADIENT, *OTHER_FORMS])
def test_no_step_is_skipped(name):
    """A parameter without a gradient is stepped with zeros: its moments and its decay go on."""
    expected, got = both((NO_GRADIENT | OTHER_FORMS)[name])
    assert_equal(got, expected, LAST_BITS)
    if name in NO_GRADIENT:
        assert (got[0]["layers"]["w"] != SMALL["layers"]["w"]).any()


@pytest.mark.parametrize(
    ("message", "loss"),
    [
        (r"^params\['layers'\]\['w'\]: .*once.*twice", lambda p, x: mean(
            p, scanned(p, scanned(p, x)))),
        (r"^params\['layers'\]\['w'\]: .*another", lambda p, x: mean(
            p, scanned(p, x)) + jnp.sum(p["layers"]["w"] ** 2)),
        (r"^params\['layers'\]\['w'\]: .*another", lambda p, x: mean(
            p, scanned(p, x, lambda x, q: (x @ q["w"] @ p["layers"]["w"][0], None)))),
        (r"^params\['layers'\]\['w'\]: .*accumulated", lambda p, x: jnp.mean(
            jax.lax.map(lambda x: mean(p, scanned(p, x[None])), x))),
        (r"^params\['layers'\]\['w'\]: .*inside", lambda p, x: mean(
            p, jax.lax.cond(x[0, 0] > 0, lambda: scanned(p, x), lambda: x))),
        (r"^params\['layers'\]\['w'\]: .*inside", lambda p, x: mean(
            p, jax.checkpoint(lambda x: scanned(p, x))(x))),
        (r"^params\['layers'\]\['w'\]: .*inside", lambda p, x: jnp.sum(
            jax.grad(lambda x: mean(p, scanned(p, x)))(x))),
        (r"^loss: .*got none", lambda p, x: mean(p, jax.checkpoint(scanned)(p, x))),
        (r"^loss: .*got none", lambda p, x: mean(
            p, scanned(jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(p.dtype), p), x))),
        (r"^loss: .*real scalar.*\(2,\)", lambda p, x: scanned(p, x) @ p["head"]),
    ],
)  # fmt: skip
def test_a_loss_that_cannot_be_released_is_refused(message, loss):
    """While it is traced: by the leaf's path, with what to do instead."""
    with pytest.raises((TypeError, ValueError), match=message):
        jax.eval_shape(release.train_step(loss, DECAYING), SMALL, DECAYING.init(SMALL), X)


@pytest.mark.usefixtures("standard_promotion")  # optax's noise needs it
@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(optax.clip_by_global_norm(1.0), jadam.adam(1e-3)),
        optax.apply_if_finite(jadam.adam(1e-3), 3),
        optax.chain(optax.zero_nans(), optax.sgd(1e-3)),
        optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(1e-3)),
    ],
    ids=["global norm", "all finite", "a flag a leaf", "noise"],
)
def test_a_transformation_that_mixes_is_refused(tx):
    """Leaves that need each other's gradients, and layers that would get the same noise."""
    step = release.train_step(lambda p, x: mean(p, scanned(p, x)), tx)
    with pytest.raises(ValueError, match=r"^tx: the step of "):
        jax.eval_shape(step, SMALL, tx.init(SMALL), X)


@pytest.mark.usefixtures("standard_promotion")  # optax.MultiSteps needs it
def test_accumulation_in_the_state_is_right():
    """optax.MultiSteps keeps the gradients' sum in its state: no memory saved, no step lost."""
    tx = optax.MultiSteps(jadam.adam(1e-2, eps=1e-3, **XLA), 2).gradient_transformation()
    expected, got = both(OTHER_FORMS["two stacks"], tx)
    assert_equal(got, expected, LAST_BITS)


def test_a_step_is_skipped_where_the_loss_says_so():
    """Nothing moves, no count either; the next step is made."""
    step = jax.jit(
        release.train_step(OTHER_FORMS["two stacks"], DECAYING, skip_if=lambda x: ~jnp.isfinite(x))
    )
    start = (SMALL, DECAYING.init(SMALL))
    *skipped, value = step(*start, X * jnp.nan)
    assert jnp.isnan(value)
    assert_equal(tuple(skipped), start)
    assert int(step(*skipped, X)[1][0].count) == 1


def test_the_step_can_be_differentiated_and_vectorized():
    """Hypergradients and ensembles: what a plain step gives, not zeros."""
    loss = OTHER_FORMS["two stacks"]

    def moved(rate, make):
        tx = jadam.adam(rate, **XLA)
        params, *_ = make(loss, tx)(SMALL, tx.init(SMALL), X)
        return sum(jnp.sum(p**2) for p in jax.tree.leaves(params))

    expected = jax.jit(jax.grad(moved), static_argnums=1)(1e-2, plain_step)
    got = jax.jit(jax.grad(moved), static_argnums=1)(1e-2, release.train_step)
    # Sums of a hundred float32 numbers in another order.
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    rates = jnp.array([1e-2, 1e-3])
    several = jax.jit(jax.vmap(lambda rate: moved(rate, release.train_step)))(rates)
    plain = jax.jit(lambda rate: moved(rate, plain_step))
    each = np.stack([plain(rate) for rate in rates])
    np.testing.assert_allclose(several, each, rtol=1e-5)


def test_each_layer_is_clipped_by_its_own_norm():
    """The gradients in float64 of a plain backward pass, each layer's clipped, then Adam's step."""
    largest = 0.01
    loss = OTHER_FORMS["two stacks"]
    step = release.train_step(
        loss, jadam.adam(1e-2, eps=1e-3, **XLA), per_layer=optax.clip_by_global_norm(largest)
    )
    params, state = SMALL, jadam.adam(1e-2).init(SMALL)
    params, state, _ = jax.jit(step)(params, state, X)
    names, layers = ("layers", "others", "head"), []
    grads = jax.grad(loss)(SMALL, X)
    wide = [np.asarray(jax.tree.leaves(grads[name])[0], np.float64) for name in names]
    for g in wide:  # each stack is a scan of its own, and the head what is left
        layers += [*g] if g.ndim > 1 else [g]
    norms = [np.sqrt((g**2).sum()) for g in layers]
    assert min(norms) < largest < max(norms)
    for name, g in zip(names, wide, strict=True):
        each = g if g.ndim > 1 else g[None]
        norm = np.sqrt((each**2).sum(axis=tuple(range(1, each.ndim)), keepdims=True))
        clipped = (each * np.minimum(1, largest / norm)).reshape(g.shape)
        mu = jax.tree.leaves(state[0].mu[name])[0]
        # The gradients are sums of 16 float32 products in two orders, and the norm another one.
        np.testing.assert_allclose(mu, 0.1 * clipped, rtol=1e-5, atol=1e-9, err_msg=name)
        moved = SMALL[name]["w"] if name != "head" else SMALL[name]
        expected = np.asarray(moved, np.float64) - 1e-2 * clipped / (np.abs(clipped) + 1e-3)
        got = params[name]["w"] if name != "head" else params[name]
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7, err_msg=name)


def test_a_layer_is_all_that_a_scan_releases():
    """Two leaves of one scan are one layer, with one norm."""

    def loss(params, x):
        two = {"w": params["layers"]["w"], "v": params["others"]["w"]}
        x, _ = release.scan(lambda x, p: (jnp.tanh(x @ p["w"] @ p["v"]), None), x, two)
        return mean(params, x)

    tx = jadam.adam(1e-2, **XLA)
    step = release.train_step(loss, tx, per_layer=optax.clip_by_global_norm(1e-3))
    _, state, _ = jax.jit(step)(SMALL, tx.init(SMALL), X)
    grads = jax.grad(loss)(SMALL, X)
    both = np.stack([np.asarray(grads[name]["w"], np.float64) for name in ("layers", "others")])
    norms = np.sqrt((both**2).sum(axis=(0, 2, 3)))
    assert (norms > 1e-3).all()
    for g, name in zip(both, ("layers", "others"), strict=True):
        expected = 0.1 * g * (1e-3 / norms)[:, None, None]
        np.testing.assert_allclose(state[0].mu[name]["w"], expected, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("where", ["state", "state and parameters"])
def test_stacks_on_the_host_come_and_go(where):
    """They stay there, and the bits are those of stacks on the device."""
    loss = OTHER_FORMS["two stacks"]
    tx = jadam.adamw(1e-2, weight_decay=0.1, mu_dtype="int8", nu_dtype="uint8", min_size=0, **XLA)
    params = {
        "layers": {"w": jnp.tile(SMALL["layers"]["w"], (1, 8, 8)) / 8},
        "others": {"w": jnp.ones((3, 32, 32)) / 64},
        "head": jnp.ones(32),
    }
    x = jnp.ones((2, 32))
    step = release.train_step(loss, tx)
    expected = jax.jit(step)(params, tx.init(params), x)
    host = state_shardings(tx, params, memory_kind="pinned_host")
    near = jax.tree.map(lambda p: p.sharding, params)
    lies = jax.tree.map(lambda s: s.with_memory_kind("pinned_host"), near)
    lies = lies if where == "state and parameters" else near
    state = jax.jit(tx.init, out_shardings=host)(params)
    there = jax.device_put(params, lies)
    step = jax.jit(step, donate_argnums=(0, 1), out_shardings=(lies, host, None))
    got = step(there, state, x)
    assert_equal(got, expected, 0)
    assert got[1][0].mu["layers"]["w"].sharding.memory_kind == "pinned_host"
    assert got[0]["layers"]["w"].sharding.memory_kind == lies["layers"]["w"].memory_kind


def test_released_names_the_leaves():
    assert release.released(OTHER_FORMS["one in a jit"], SMALL, X) == ["params['layers']['w']"]


def test_arguments_are_checked():
    with pytest.raises(TypeError, match=r"^loss: "):
        release.train_step(3, DECAYING)
    with pytest.raises(TypeError, match=r"^tx: .*got 3"):
        release.train_step(mean, 3)
    with pytest.raises(TypeError, match=r"^has_aux: "):
        release.train_step(mean, DECAYING, has_aux=1)
    with pytest.raises(TypeError, match=r"^per_layer: .*got 1.0"):
        release.train_step(mean, DECAYING, per_layer=1.0)
    step = release.train_step(lambda p, x: mean(p, scanned(p, x)), DECAYING, per_layer=DECAYING)
    with pytest.raises(ValueError, match=r"^per_layer: .*without a state"):
        jax.eval_shape(step, SMALL, DECAYING.init(SMALL), X)


# A language model


@pytest.mark.soak
@pytest.mark.usefixtures("standard_promotion")  # Flax's norms need it
def test_a_small_gpt_is_trained_to_the_same_loss():
    """The GPT of experiments/lowmem, its blocks stacked and released, beside itself unstacked."""
    shape = Shape(layers=2, width=32, heads=2, context=16)
    text = jnp.asarray(np.random.default_rng(3).integers(0, 256, (1, 4, 17)), jnp.int32)
    text = jnp.repeat(text, 10, axis=0)
    graph, params = nnx.split(GPT(shape, rngs=nnx.Rngs(0)), nnx.Param)
    stacked, stacked_loss = scanned_gpt(GPT(shape, rngs=nnx.Rngs(0)))
    tx = jadam.adamw(3e-3, eps=1e-4, **XLA)
    plain = plain_step(lambda params, text: loss_fn_of_gpt(nnx.merge(graph, params), text), tx)
    *_, expected = trained(plain, tx, nnx.to_pure_dict(params), text)
    *_, got = trained(release.train_step(stacked_loss, tx), tx, stacked, text)
    assert expected[-1] < expected[0] - 0.05
    # Attention and norms are sums in another order, over ten steps.
    np.testing.assert_allclose(got, expected, rtol=1e-5)


# Memory


def arrays_made(jaxpr):
    """The shape of every array that is made, and by what, in inner programs too."""
    for equation in jaxpr.eqns:
        yield from ((v.aval.shape, equation.primitive.name) for v in equation.outvars)
        for inner in core.jaxprs_in_params(equation.params):
            yield from arrays_made(inner)


def test_no_array_of_a_stack_is_made():
    """No gradient, no copy: of p, m and v slices are written in a loop, in donated space."""
    params = {"layers": {"w": jnp.ones((8, 128, 128))}, "head": jnp.ones(128)}
    step = release.train_step(
        lambda p, x: mean(p, scanned(p, x, jax.checkpoint(layer_of))), DECAYING
    )
    arguments = params, DECAYING.init(params), jnp.ones((4, 128))
    made = list(arrays_made(jax.make_jaxpr(step)(*arguments).jaxpr))
    by = [name for shape, name in made if shape == (8, 128, 128)]
    # The forward loop hands the parameters on as they are, the backward loop replaces slices.
    as_it_lies = ["optimization_barrier", "cond", "layout_constraint", "scan"]
    assert sorted(by) == sorted([*as_it_lies, *["dynamic_update_slice", "scan"] * 3])
    plan = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile().memory_analysis()
    assert plan.alias_size_in_bytes >= sum(x.nbytes for x in jax.tree.leaves(arguments[:2]))


def test_the_page_on_scale_has_the_committed_figures():
    """No figure was typed by hand, and they keep what is promised of a released step."""
    results = json.loads(scale_release.RESULTS.read_text())
    block = readme_block("release", scale_release.README)[1]
    assert block == scale_release.markdown(results) + "\n"
    # One layer's gradients, and what the two passes take. Codes of 4 bits, which are XLA's on this
    # host, and codes in eight wide layers take more: the page says so.
    row = results["chips"]["v5e"]["rows"]["24 layers of GPT-2 medium"]
    for name in ("float32, released", "compensated + 8-bit, released"):
        assert row[name]["peak"] < row[name]["arguments"] + 0.3, name


def collectives(program):
    """What devices send each other: the operation, the shape, and whether it is in a loop."""
    found, is_entry = [], False
    for line in program.as_text().splitlines():
        if not line.startswith(" "):
            is_entry = line.startswith("ENTRY")
        for shape, name in re.findall(r"= \w+\[([\d,]*)\]\S* (all-\w+|reduce-scatter)\(", line):
            found.append((name, tuple(map(int, shape.split(","))), not is_entry))
    return found


LAYOUTS = {"whole": jax.P(), "FSDP": jax.P(None, "data"), "ZeRO-1": jax.P()}


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        (AxisType.Auto, "FSDP"),
        (AxisType.Explicit, "ZeRO-1"),
        pytest.param(AxisType.Auto, "ZeRO-1", marks=pytest.mark.soak),
        pytest.param(AxisType.Auto, "whole", marks=pytest.mark.soak),
        pytest.param(AxisType.Explicit, "FSDP", marks=pytest.mark.soak),
        pytest.param(AxisType.Explicit, "whole", marks=pytest.mark.soak),
    ],
    ids=str,
)
def test_a_divided_stack_is_stepped_where_it_lies(kind, layout):
    """Parameters and state lie as before, with the numbers of the plain step.

    The gradients of a layer are joined in its round of the backward loop, and no stack is sent;
    where XLA alone decides, it gathers the new parameters of ZeRO-1 at the end.
    """
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    tx = jadam.adamw(1e-2, weight_decay=0.1, **EIGHT_BITS, **XLA)
    rng = np.random.default_rng(4)
    w = jnp.asarray(rng.standard_normal((3, 64, 64)) / 8, jnp.float32)
    params, x = {"layers": {"w": w}, "head": jnp.ones(64)}, jnp.ones((16, 64))

    def layer(x, p):
        w = p["w"]
        if kind == AxisType.Explicit:
            w = jax.sharding.reshard(w, jax.P())
        return x + jnp.tanh(x @ w), None

    def loss(params, x):
        return mean(params, scanned(params, x, jax.checkpoint(layer)))

    with jax.set_mesh(mesh):
        rows = {"layers": {"w": LAYOUTS[layout]}, "head": jax.P()}
        lies = jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), rows)
        params, x = jax.device_put((params, x), (lies, jax.NamedSharding(mesh, jax.P("data"))))
        axis = "data" if layout == "ZeRO-1" else None
        home = state_shardings(tx, params, axis=axis)
        state = jax.jit(tx.init, out_shardings=home)(params)
        expected = jax.jit(plain_step(loss, tx))(params, state, x)
        step = jax.jit(release.train_step(loss, tx), out_shardings=(lies, home, None))
        program = step.lower(params, state, x).compile()
        got = program(params, state, x)
    # Sums over eight devices in two orders; a code may then be its neighbour, half an octave of 32.
    assert_equal(got[0], expected[0], 1e-4)
    divided = (3, 8, 64)
    shard = got[0]["layers"]["w"].sharding.shard_shape(w.shape)
    assert shard == (divided if layout == "FSDP" else w.shape)
    shard = got[1][0].mu["layers"]["w"].sharding.shard_shape(w.shape)
    assert shard == (w.shape if layout == "whole" else divided)
    sent = collectives(program)
    assert ("all-reduce", (64, 64), True) in sent
    of_stacks = [x for x in sent if x[1] == w.shape]
    is_gathered = layout == "ZeRO-1" and kind == AxisType.Auto
    assert of_stacks == [("all-gather", w.shape, False)] * is_gathered
