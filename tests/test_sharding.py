"""Where the state lies: memory per device, equal bits, and the collectives of the compiled step."""

import itertools
import json
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jadam
from experiments.common.report import readme_block
from experiments.scale import __main__ as scale
from experiments.scale import tpu
from jadam.sharding import divided, divisible, state_shardings, step_in_parts, streamed

EIGHT_BITS = {"mu_dtype": "int8", "nu_dtype": "uint8"}
SIXTEEN_BITS = {"mu_dtype": jnp.bfloat16, "nu_dtype": jnp.bfloat16}
TRANSFORMATIONS = {
    "float32": jadam.adamw(1e-3),
    "bfloat16": jadam.adamw(1e-3, **SIXTEEN_BITS),
    "8 bits": jadam.adamw(1e-3, **EIGHT_BITS),
    "4 bits": jadam.adamw(1e-3, mu_dtype="int4", nu_dtype="uint4"),
    "8-bit amsgrad": jadam.amsgrad(1e-3, **EIGHT_BITS),
    "residuals": jadam.compensated_weights(jadam.adamw(1e-3, **EIGHT_BITS)),
    "stochastic": jadam.stochastic_rounding(jadam.adamax(1e-3)),
    "accumulating": optax.MultiSteps(
        optax.chain(optax.clip(1.0), jadam.adam(1e-3, **EIGHT_BITS)), 2
    ).gradient_transformation(),
    "partitioned": optax.partition(
        {"codes": jadam.adam(1e-3, **EIGHT_BITS), "floats": jadam.radam(lambda count: 1e-3)},
        {"rows": "codes", "blocks": {"w": "floats"}, "bias": "floats", "odd": "codes"},
    ),
}
SPECS = {"rows": P("data"), "blocks": {"w": P(None, "data")}, "bias": P("data"), "odd": P()}
SHAPES = {"rows": (64, 256), "blocks": {"w": (8, 1024)}, "bias": (1024,), "odd": (7, 5)}
COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|"
    r"collective-broadcast)(?:-start)?\("
)


def mesh_of(shape: tuple[int, ...] = (8,), names: tuple[str, ...] = ("data",), kind=AxisType.Auto):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


def trees(name: str, steps: int = 2) -> tuple[Any, list[Any]]:
    """Parameters and gradients, in bfloat16 for what is made for it."""
    dtype = jnp.bfloat16 if name in ("residuals", "stochastic") else jnp.float32
    rng = np.random.default_rng(0)

    def tree():
        return jax.tree.map(
            lambda shape: jnp.asarray(rng.standard_normal(shape), dtype),
            SHAPES,
            is_leaf=lambda x: isinstance(x, tuple),
        )

    return tree(), [tree() for _ in range(steps)]


def one_step(tx, params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def trained(step, params, state, gradients):
    for grads in gradients:
        params, state = step(params, state, grads)
    return params, state


def assert_equal(got: Any, expected: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def collectives(compiled: Any) -> list[str]:
    return COLLECTIVE.findall(compiled.as_text())


def elements_moved(collective: str, compiled: Any) -> int:
    """The number of elements in the results of a kind of collective."""
    found = re.findall(rf"= (.*) {collective}(?:-start)?\(", compiled.as_text())
    shapes = [shape for result in found for shape in re.findall(r"\[([\d,]*)\]", result)]
    return sum(int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes)


def bytes_of_one_device(tree: Any) -> list[tuple[str, int, int]]:
    """Each leaf's path, its bytes on the first device, and in all."""
    return [
        (jax.tree_util.keystr(path), leaf.addressable_shards[0].data.nbytes, leaf.nbytes)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]


def assert_an_eighth_of_all_but(whole: str, state: Any) -> None:
    """Each leaf with more than a handful of elements is held in eighths."""
    for path, here, everywhere in bytes_of_one_device(state):
        if everywhere > 8 and whole not in path and "key" not in path:
            assert here * 8 == everywhere, path


@pytest.mark.usefixtures("either_compilation")
@pytest.mark.usefixtures("standard_promotion")  # optax.apply_updates of bfloat16 parameters
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(
            (name, AxisType.Auto)
            for name in ("float32", "stochastic", "accumulating", "partitioned")
        ),
        *((name, AxisType.Explicit) for name in ("bfloat16", "residuals")),
        *(
            pytest.param(name, kind, marks=pytest.mark.soak)
            for name in TRANSFORMATIONS
            for kind in (AxisType.Auto, AxisType.Explicit)
        ),
    ],
)
def test_a_state_like_the_parameters(name, kind):
    """An eighth of each leaf's bytes, one device's bits, no collective, nothing resharded."""
    tx = TRANSFORMATIONS[name]
    params, gradients = trees(name)
    step = partial(one_step, tx)
    expected = trained(jax.jit(step), params, jax.jit(tx.init)(params), gradients)

    mesh = mesh_of(kind=kind)
    with jax.set_mesh(mesh):
        lies = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
        shardings = state_shardings(tx, params, SPECS, mesh=mesh)
        params, *gradients = jax.device_put([params, *gradients], [lies] * (1 + len(gradients)))
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        assert_an_eighth_of_all_but("odd", state)
        # No out_shardings: XLA leaves all where it was by itself.
        compiled = jax.jit(step).lower(params, state, gradients[0]).compile()
        got = trained(compiled, params, state, gradients)
    assert collectives(compiled) == []
    assert_equal(got, expected)
    for x, sharding in zip(jax.tree.leaves(got), jax.tree.leaves((lies, shardings)), strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)


def loss_of(params, x):
    """Its gradients are sums over the batch of small integers: exact in any order."""
    wide = jnp.concatenate([x, x, x, x], axis=1)
    return (
        jnp.sum((x[:, :64] @ params["rows"]) * x)
        + jnp.sum((x[:, :8] @ params["blocks"]["w"]) * wide)
        + jnp.sum(wide * params["bias"][None])
        + jnp.sum((x[:, :7] @ params["odd"]) * x[:, :5])
    )


@pytest.mark.usefixtures("either_compilation")
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("float32", AxisType.Auto),
        ("8-bit amsgrad", AxisType.Explicit),
        *(
            pytest.param(name, kind, marks=pytest.mark.soak)
            for name in ("bfloat16", "8 bits", "8-bit amsgrad")
            for kind in (AxisType.Auto, AxisType.Explicit)
        ),
    ],
)
def test_zero_1_divides_the_state_of_replicated_parameters(name, kind):
    """An eighth of the memory, one device's bits; gradients are summed, parameters gathered.

    No other collective. XLA:CPU has no pass that joins an all-reduce and the slice of its result
    to a reduce-scatter; experiments/scale has what XLA:TPU makes of it.
    """
    tx = TRANSFORMATIONS[name]
    params, _ = trees(name)
    x = jnp.asarray(np.random.default_rng(1).integers(-3, 4, (64, 256)), jnp.float32)

    def alone(params, state, x):
        return one_step(tx, params, state, jax.grad(loss_of)(params, x))

    expected = trained(jax.jit(alone), params, jax.jit(tx.init)(params), [x, x[::-1]])

    mesh = mesh_of(kind=kind)
    whole = NamedSharding(mesh, P())
    constrain = jax.lax.with_sharding_constraint
    if kind == AxisType.Explicit:
        constrain = jax.sharding.reshard
    with jax.set_mesh(mesh):
        params = jax.device_put(params, whole)
        zero = divided(params, axis="data")
        shardings = state_shardings(tx, params, axis="data")
        state = jax.jit(tx.init, out_shardings=shardings)(params)

        def step(params, state, x):
            grads = constrain(jax.grad(loss_of)(params, x), zero)
            params, state = one_step(tx, constrain(params, zero), state, grads)
            return constrain(params, whole), state

        batches = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in (x, x[::-1])]
        jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(whole, shardings))
        compiled = jitted.lower(params, state, batches[0]).compile()
        got = trained(jitted, params, state, batches)
    assert_equal(got, expected)
    for path, here, everywhere in bytes_of_one_device(got[1]):
        divides = "rows" in path or "blocks" in path
        assert here * (8 if divides else 1) == everywhere, path
    assert set(collectives(compiled)) == {"all-reduce", "all-gather"}
    assert elements_moved("all-gather", compiled) == 64 * 256 + 8 * 1024
    assert elements_moved("all-reduce", compiled) == 64 * 256 + 8 * 1024 + 1024 + 7 * 5


# The rules: shapes alone, no device.


def shape_of(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.usefixtures("standard_promotion")  # optax.MultiSteps needs it
@pytest.mark.parametrize("name", [*TRANSFORMATIONS, "8-bit radam"])
def test_whole_gradients_go_with_a_divided_state_on_explicit_axes(name):
    """ZeRO-1 by the state's shardings alone, as with `optax.adamw`; JAX's types say where it goes.

    XLA's form of "auto" and of codes had choices between whole and divided arrays, which JAX
    refuses.
    """
    radam = jadam.radam(1e-3, **EIGHT_BITS, kernel="xla")
    tx = (TRANSFORMATIONS | {"8-bit radam": radam})[name]
    mesh = mesh_of(kind=AxisType.Explicit)

    def typed(tree, places):
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places
        )

    with jax.set_mesh(mesh):
        params, _ = trees(name)
        params = typed(params, jax.tree.map(lambda _: NamedSharding(mesh, P()), params))
        state = jax.eval_shape(tx.init, params)
        state = typed(state, state_shardings(tx, params, axis="data"))
        updates, after = jax.eval_shape(tx.update, params, state, params)
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
        assert updates["rows"].sharding.spec == P("data", None)


@pytest.mark.parametrize(
    ("shape", "spec", "axis", "expected"),
    [
        ((4096, 512), P(), "data", P("data")),
        ((512, 4096), P(), "data", P("data")),  # not the last axis, though it is longer
        ((3, 512, 1024, 8), P(), "data", P(None, None, "data")),  # the longest of the others
        ((512, 512, 4), P(), "data", P("data")),  # the first of two as long
        ((50257, 1024), P(), "data", P(None, "data")),  # 8 blocks of 128
        ((50257, 768), P(), "data", P()),  # 6 blocks: none is cut
        ((50257, 960), P(), "data", P()),
        ((4096,), P(), "data", P("data")),
        ((4104,), P(), "data", P()),  # 8 times 513
        ((4095,), P(), "data", P()),  # small
        ((8, 8, 8), P(), "data", P()),
        ((), P(), "data", P()),
        ((0, 4), P(), "data", P()),
        ((4096, 512), P("data"), "data", P("data")),  # lies there already
        ((4096, 512), P(None, ("data", "model")), "data", P(None, ("data", "model"))),
        ((4096, 512), P("model"), "data", P(("model", "data"))),
        ((8, 4096), P("model"), "data", P("model", "data")),  # 2 rows are left for 8
        ((4096, 512), P(None, "model"), "data", P("data", "model")),
        ((4096, 512), P(), ("data", "model"), P(("data", "model"))),
        ((8, 512), P(), ("data", "model"), P("data", "model")),
        ((4, 1100), P(), ("data", "model"), P("model")),  # one of two axes is better than none
    ],
)
def test_which_axis_is_divided(shape, spec, axis, expected):
    """The table of the rules that `divided` states, on 8 x 4 devices."""
    mesh = AbstractMesh((8, 4), ("data", "model"))
    sharding = divided(shape_of(*shape), spec, mesh=mesh, axis=axis)
    assert sharding == NamedSharding(mesh, expected)


def test_the_smallest_leaf_and_block_to_divide_can_be_chosen():
    eighths = partial(divided, mesh=AbstractMesh((8,), ("data",)), axis="data")
    assert eighths(shape_of(8, 4), P(), min_size=32).spec == P("data")
    assert eighths(shape_of(8, 4), P(), min_size=33).spec == P()
    assert eighths(shape_of(50257, 768), P(), block=96).spec == P(None, "data")
    assert eighths(shape_of(50257, 768), P(), block=97).spec == P()
    # Without codes any multiple of the devices may be cut.
    for block in (0, 1):
        assert eighths(shape_of(50257, 8), P(), block=block).spec == P(None, "data")
        assert eighths(shape_of(50257, 12), P(), block=block).spec == P()


def test_tops_lie_with_their_blocks():
    """Along the last axis only where each device has whole blocks, else whole."""
    mesh = AbstractMesh((8, 4), ("data", "model"))
    params = {n: shape_of(64, n) for n in (1024, 1000, 1280, 200)}
    shardings = {1024: P("data", "model"), 1000: P("data", "model"), 1280: P(None, "model")}
    tx = jadam.amsgrad(1e-3, **EIGHT_BITS)
    state, *_ = state_shardings(tx, params, shardings | {200: None}, mesh=mesh)
    assert {n: s.spec for n, s in state.nu.items()} == {
        1024: P("data", "model"),  # 2 blocks each
        1000: P("data"),  # 250 columns each
        1280: P(),  # 320
        200: P(),
    }
    for moment in (state.mu, state.nu_max):
        assert [moment[n].spec for n in (1024, 1000, 1280)] == list(shardings.values())


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((64, 1024), P("data", "model")),
        ((64, 8), P("data", "model")),  # the tops: 2 for each device
        ((64, 12), P("data")),  # longer than they need to be
        ((64, 7), P()),
        ((64, 1), P()),
        ((32, 8), P()),
        ((128, 8), P()),
        ((128, 1024), P()),
        ((64, 1024, 1), P()),
        ((1, 64, 8), P()),
        ((64,), P()),
        ((), P()),
    ],
)
def test_which_leaves_of_a_state_lie_as_their_parameter(shape, expected):
    """What has its shape, and its blocks' tops, which may be longer. All else is whole."""
    mesh = AbstractMesh((8, 4), ("data", "model"))
    tx = optax.GradientTransformation(lambda _: {"w": jnp.zeros(shape)}, optax.identity().update)
    params = {"w": shape_of(64, 1024)}
    found = state_shardings(tx, params, P("data", "model"), mesh=mesh)
    assert found["w"] == NamedSharding(mesh, expected)


def test_a_leaf_of_the_state_belongs_to_the_longest_path():
    """Names that a state uses too, names within names, a parameter alone, and no parameter's."""
    mesh = AbstractMesh((8,), ("data",))
    params = {"w": shape_of(64, 64), "in": {"w": shape_of(64, 64)}, "count": shape_of(8, 8)}
    tx = optax.chain(optax.trace(0.9), jadam.adam(optax.constant_schedule(1.0)))
    specs = {"w": P("data"), "in": {"w": P(None, "data")}, "count": P("data")}
    trace, (adam, schedule) = state_shardings(tx, params, specs, mesh=mesh)
    for tree in (trace.trace, adam.mu, adam.nu):
        assert jax.tree.map(lambda s: s.spec, tree) == specs
    assert adam.count.spec == schedule.count.spec == P()

    adam, *_ = state_shardings(jadam.adam(1.0), shape_of(64), P("data"), mesh=mesh)
    assert (adam.count.spec, adam.mu.spec) == (P(), P("data"))
    # Factored moments have their parameter's path and shapes of their own.
    tx = optax.scale_by_factored_rms()
    factored = state_shardings(tx, shape_of(256, 256), P("data"), mesh=mesh)
    assert all(s.spec == P() for s in jax.tree.leaves(factored))


# Blocks that are cut


FOUR_BITS = {"mu_dtype": "int4", "nu_dtype": "uint4"}
CUT = [
    # The kernel, XLA's form, explicit axes; 64, 192, 25 and 125 columns a device, 128 in a block.
    (jadam.adam(1e-3, **EIGHT_BITS), AxisType.Auto, 512, 8),
    (jadam.adam(1e-3, **FOUR_BITS, kernel="xla"), AxisType.Auto, 512, 8),
    (jadam.adam(1e-3, **EIGHT_BITS, kernel="xla"), AxisType.Explicit, 384, 2),
    (jadam.adam(1e-3, **FOUR_BITS, kernel="xla"), AxisType.Auto, 100, 4),
    (jadam.adam(1e-3, **EIGHT_BITS, kernel="xla"), AxisType.Auto, 1000, 8),
]


def columns(mesh: Any, n: int) -> list[Any]:
    """Parameters and gradients, divided along the last axis."""
    rng, lies = np.random.default_rng(0), NamedSharding(mesh, P(None, "data"))
    return [
        {"w": jax.device_put(rng.standard_normal((64, n)).astype(np.float32), lies)}
        for _ in range(3)
    ]


@pytest.mark.usefixtures("either_compilation")
@pytest.mark.parametrize(("tx", "kind", "n", "parts"), CUT)
def test_blocks_that_are_cut(tx, kind, n, parts):
    """Where devices divide a block the step runs, with one device's bits.

    A reduction of jadam's own is none that XLA has over devices, and uneven parts are none that JAX
    has words for: both failed to compile. Explicit axes were refused.
    """

    def step(params, state, grads):
        return tx.step(grads, state, params)

    mesh = mesh_of((parts,), kind=kind)
    params, *gradients = columns(mesh, n)
    alone, *others = jax.tree.map(np.asarray, [params, *gradients])
    expected = trained(jax.jit(step), alone, tx.init(alone), others)
    with jax.set_mesh(mesh):
        state = jax.jit(tx.init)(params)
        got = trained(jax.jit(step), params, state, gradients)
    assert_equal(got, expected)
    assert got[1][0].mu["w"].sharding.is_equivalent_to(params["w"].sharding, 2)


def test_an_update_of_blocks_that_are_cut_lies_as_its_gradient():
    """On explicit axes, also without parameters: and the state as it lay."""
    mesh = mesh_of((2,), kind=AxisType.Explicit)
    grads, *_ = columns(mesh, 384)
    with jax.set_mesh(mesh):
        state = jax.jit(partial(jadam.init, **EIGHT_BITS))(grads)
        update = partial(jadam.update, kernel="xla")
        types = jax.tree.map(jax.typeof, jax.eval_shape(update, grads, state))
        assert types == jax.tree.map(jax.typeof, (grads, state))


def laid_by_optax(tx: Any, mesh: Any) -> tuple[Any, Any]:
    """optax.tree.map_params: each leaf of the state gets the sharding of its parameter."""
    params, *_ = columns(mesh, 512)
    lies = jax.tree.map(lambda p: p.sharding, params)
    state = jax.eval_shape(tx.init, params)
    shardings = optax.tree.map_params(
        tx, lambda _, s: s, state, lies, transform_non_params=lambda _: NamedSharding(mesh, P())
    )
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    return jax.jit(tx.update)(params, state, params)


def laid_by_linen(tx: Any, mesh: Any) -> tuple[Any, Any]:
    """A state in boxes with logical axes, as MaxText has it."""
    init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
    model = nn.Dense(512, kernel_init=init, use_bias=False)

    def create() -> Any:
        params = model.init(jax.random.key(0), jnp.ones((1, 64)))["params"]
        return params, tx.init(params)

    specs = nn.get_partition_spec(jax.eval_shape(create))
    shardings = nn.logical_to_mesh_sharding(specs, mesh, [("embed", None), ("mlp", "data")])
    params, state = jax.jit(create, out_shardings=shardings)()
    return jax.jit(tx.update)(params, state, params)


def laid_by_nnx(tx: Any, mesh: Any) -> tuple[Any, Any]:
    """nnx.Optimizer, which lays its variables by the metadata of the parameters."""
    with jax.set_mesh(mesh):
        names = annotated(nnx.with_partitioning, (None, "data"))
        model = nnx.Linear(64, 512, use_bias=False, rngs=nnx.Rngs(0), **names)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        nnx.jit(lambda model, optimizer: optimizer.update(model, nnx.state(model, nnx.Param)))(
            model, optimizer
        )
        return model, nnx.to_pure_dict(nnx.state(optimizer))["opt_state"]


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("laid", "kind", "options"),
    [
        (laid_by_optax, AxisType.Auto, EIGHT_BITS),
        (laid_by_linen, AxisType.Auto, FOUR_BITS),
        (laid_by_nnx, AxisType.Explicit, EIGHT_BITS),
        *(
            pytest.param(*case, marks=pytest.mark.soak)
            for case in itertools.product(
                (laid_by_optax, laid_by_linen, laid_by_nnx),
                (AxisType.Auto, AxisType.Explicit),
                (EIGHT_BITS, FOUR_BITS),
            )
        ),
    ],
)
def test_a_state_that_a_program_lays_like_its_parameters(laid, kind, options):
    """4 tops a row over 8 devices: the program runs as it is, around `divisible`."""
    tx, mesh = jadam.adam(1e-3, **options), mesh_of(kind=kind)
    with pytest.raises(ValueError, match=r"divi"):
        laid(tx, mesh)
    _, state = laid(divisible(tx, 8), mesh)
    *_, codes, tops = (x for x in jax.tree.leaves(state) if x.ndim == 2)
    assert (codes.shape, tops.shape) == ((64, 512), (64, 8))
    assert codes.addressable_shards[0].data.shape == (64, 64)


@pytest.mark.usefixtures("either_compilation")
def test_longer_tops_change_no_bit():
    """Around a chain, of leaves of any width and of what is no code; tools read it as it is."""
    tx = optax.chain(optax.clip(1.0), jadam.adam(1e-2, **EIGHT_BITS))
    wrapped = divisible(tx, 8)
    rng, params = np.random.default_rng(0), {"few": (64, 96), "b": (512,), "odd": (50, 1000)}
    params = {k: jnp.asarray(rng.standard_normal(n), jnp.float32) for k, n in params.items()}
    step, longer = (jax.jit(partial(one_step, each)) for each in (tx, wrapped))
    expected = trained(step, params, tx.init(params), [params] * 2)
    got = trained(longer, params, wrapped.init(params), [params] * 2)
    assert_equal(got[0], expected[0])
    tops, right = (state[1][0].nu for _, state in (got, expected))
    assert {k: x.shape[-1] for k, x in tops.items()} == {"few": 8, "b": 512, "odd": 8}
    assert_equal(tops["few"][:, :1], right["few"])
    assert_equal(tops["odd"], right["odd"])
    assert_equal(jadam.moments(got[1])[1][0], jadam.moments(expected[1])[1][0])


@pytest.mark.parametrize(
    "wrap", [lambda tx: tx, lambda tx: divisible(tx, 8)], ids=["", "divisible"]
)
def test_codes_under_shard_map(wrap):
    """Each device steps its rows by itself, with the bits of all together."""
    tx = wrap(jadam.adam(1e-2, **EIGHT_BITS, kernel="xla"))
    params = jnp.asarray(np.random.default_rng(0).standard_normal((64, 512)), jnp.float32)

    def steps(params):
        return one_step(tx, *one_step(tx, params, tx.init(params), params), -params)[0]

    apart = jax.shard_map(steps, mesh=mesh_of(), in_specs=P("data"), out_specs=P("data"))
    assert_equal(jax.jit(apart)(params), jax.jit(steps)(params))


def test_longer_tops_around_16_bit_weights():
    """`step`, and where `state_shardings` lays it: along the rows with the parameter."""
    tx = jadam.compensated_weights(jadam.adamw(1e-3, **EIGHT_BITS))
    wrapped = divisible(tx, 8)
    params = {"w": jnp.ones((64, 512), jnp.bfloat16)}
    got, state = jax.jit(wrapped.step)(params, wrapped.init(params), params)
    expected, _ = jax.jit(tx.step)(params, tx.init(params), params)
    assert_equal(got, expected)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, wrapped.init(params))
    mesh = AbstractMesh((8,), ("data",))
    for spec, there in ((P("data"), P("data")), (P(None, "data"), P())):
        lies = state_shardings(wrapped, params, spec, mesh=mesh)
        assert optax.tree.get(lies, "nu")["w"].spec == there
    with pytest.raises(ValueError, match=r"^parts: expected a number >= 1, got 0"):
        divisible(tx, 0)


# Flax


def annotated(init: Any, names: tuple[str | None, ...]) -> dict[str, Any]:
    return {"kernel_init": init(nnx.initializers.lecun_normal(), names)}


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_nnx_annotations(kind):
    """From the partition specs, and from the parameters that Flax put in their places by them."""
    mesh = mesh_of((2, 4), ("data", "model"), kind)
    tx = jadam.adamw(1e-3, **EIGHT_BITS)
    with jax.set_mesh(mesh):
        model = nnx.Linear(
            64, 1024, rngs=nnx.Rngs(0), **annotated(nnx.with_partitioning, (None, "model"))
        )
        params = nnx.state(model, nnx.Param)
        specs = nnx.get_partition_spec(params)
        shardings = state_shardings(tx, params, specs, mesh=mesh, axis="data")
        state, *_ = jax.jit(tx.init, out_shardings=shardings)(params)
        plain, *_ = state_shardings(tx, params)
    codes, tops = (moment["kernel"].get_value() for moment in (state.mu, state.nu))
    assert codes.addressable_shards[0].data.shape == (32, 256)
    assert tops.addressable_shards[0].data.shape == (32, 2)
    assert plain.mu["kernel"].get_value().spec == P(None, "model")


@pytest.mark.usefixtures("quick_compilation")
def test_linen_annotations():
    """Boxes among the parameters stay boxes in the state."""
    mesh = mesh_of((2, 4), ("data", "model"))
    tx = jadam.adamw(1e-3, **EIGHT_BITS)
    model = nn.Dense(1024, **annotated(nn.with_partitioning, (None, "model")))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 64)))
    specs = nn.get_partition_spec(shapes)
    shardings = state_shardings(tx, shapes, specs, mesh=mesh, axis="data")
    params = jax.jit(model.init, out_shardings=nn.get_sharding(shapes, mesh))(
        jax.random.key(0), jnp.ones((1, 64))
    )
    state, *_ = jax.jit(tx.init, out_shardings=shardings)(params)
    codes, tops = (nn.unbox(moment)["params"]["kernel"] for moment in (state.mu, state.nu))
    assert codes.addressable_shards[0].data.shape == (32, 256)
    assert tops.addressable_shards[0].data.shape == (32, 2)


# Each device's own part


@pytest.mark.usefixtures("either_compilation")
@pytest.mark.parametrize(
    ("name", "zero_1"),
    [
        pytest.param(
            name,
            zero_1,
            marks=[pytest.mark.soak] * (zero_1 != (name in ("float32", "residuals"))),
            id=f"{name}-{'ZeRO-1' if zero_1 else 'FSDP'}",
        )
        for name in ("float32", "bfloat16", "8 bits", "residuals")
        for zero_1 in (False, True)
    ],
)
def test_a_step_in_parts_is_the_step(name, zero_1):
    """One device's bits from eight, nothing sent: how a kernel that XLA cannot divide is used."""
    tx = TRANSFORMATIONS[name]
    params, gradients = trees(name)
    expected = trained(
        jax.jit(lambda p, s, g: tx.step(g, s, p)), params, jax.jit(tx.init)(params), gradients
    )
    arguments = {"mesh": mesh_of(), "axis": "data" if zero_1 else None}
    specs = P() if zero_1 else SPECS
    shardings = state_shardings(tx, params, specs, **arguments)
    lies = divided(params, specs, mesh=mesh_of(), axis=arguments["axis"] or ())
    params, *gradients = jax.device_put([params, *gradients], [lies] * (1 + len(gradients)))
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    in_parts = step_in_parts(tx, params, specs, **arguments)
    step = jax.jit(lambda p, s, g: in_parts(g, s, p), donate_argnums=(0, 1))
    compiled = step.lower(params, state, gradients[0]).compile()
    got = trained(compiled, params, state, gradients)
    assert collectives(compiled) == []
    assert_equal(got, expected)
    for x, sharding in zip(jax.tree.leaves(got), jax.tree.leaves((lies, shardings)), strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)


def test_a_step_in_parts_refuses_what_a_part_does_not_know():
    """A norm of all gradients, random bits by an element's place, a block on two devices."""
    mesh, params = mesh_of(), {"a": {"w": shape_of(64, 1024)}, "b": shape_of(64, 512)}
    adam, eight_bits = jadam.adam(1e-3), jadam.adam(1e-3, **EIGHT_BITS)
    clipped = optax.chain(optax.clip_by_global_norm(1.0), adam)
    for tx in (
        clipped,
        jadam.compensated_weights(clipped),
        jadam.stochastic_rounding(adam),
        adam._replace(update=clipped.update),
    ):
        with pytest.raises(TypeError, match=r"^tx: expected one of jadam's family"):
            step_in_parts(tx, params, P("data"), mesh=mesh)
    specs = {"a": P("data"), "b": P(None, "data")}
    expected = r"^params\['b'\]: .* 128 .* uint16; got \(64, 64\) of \(64, 512\) by .*'data'"
    with pytest.raises(ValueError, match=expected):
        step_in_parts(eight_bits, params, specs, mesh=mesh)
    with pytest.raises(ValueError, match=r"^params\['b'\]: .* bfloat16"):
        step_in_parts(jadam.adam(1e-3, **SIXTEEN_BITS), params, specs, mesh=mesh)
    two = {"a": NamedSharding(mesh, P()), "b": NamedSharding(mesh_of((2,)), P())}
    with pytest.raises(ValueError, match=r"^shardings: expected all on one mesh, got \[.*,.*\]"):
        step_in_parts(adam, params, two)
    step_in_parts(adam, params, specs, mesh=mesh)  # float32 may be cut anywhere
    with pytest.raises(TypeError, match=r"^params\['b'\]: "):
        step_in_parts(adam, {"b": jnp.ones((64, 512))})


# Host memory


@pytest.mark.usefixtures("either_compilation")
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", ["float32", "residuals", "partitioned"])
def test_a_state_in_host_memory(name):
    """It stays there, and changes no bit. XLA:CPU has the memory kind, but no other memory."""
    tx = TRANSFORMATIONS[name]
    params, gradients = trees(name)
    expected = trained(jax.jit(partial(one_step, tx)), params, jax.jit(tx.init)(params), gradients)
    mesh = mesh_of()
    lies = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    host = state_shardings(tx, params, lies, memory_kind="pinned_host")
    params, *gradients = jax.device_put([params, *gradients], [lies] * (1 + len(gradients)))
    state = jax.jit(tx.init, out_shardings=host)(params)
    step = jax.jit(
        partial(one_step, streamed(tx, host)), donate_argnums=(0, 1), out_shardings=(lies, host)
    )
    got = trained(step, params, state, gradients)
    assert_equal(got, expected)
    for path, leaf in jax.tree_util.tree_flatten_with_path(got[1])[0]:
        follows = any(name in jax.tree_util.keystr(path) for name in SPECS)
        assert leaf.sharding.memory_kind == ("pinned_host" if follows else "device"), path


@pytest.mark.usefixtures("quick_compilation")
def test_a_streamed_state_comes_leaf_by_leaf():
    """A leaf is fetched when the one before the last was given back, also after a global norm."""
    params = {name: jnp.ones((8, 8)) for name in "abcdef"}
    # Not adam, whose kernel for a CPU, where it is installed, joins leaves.
    tx = optax.chain(optax.clip_by_global_norm(1.0), jadam.radam(1e-3))
    host = state_shardings(tx, params, memory_kind="pinned_host")
    state = jax.jit(tx.init, out_shardings=host)(params)
    program = jax.make_jaxpr(streamed(tx, host).update)(params, state)
    back, waits = [], []
    for equation in program.eqns:
        if equation.primitive.name == "device_put":
            back += [v for v in equation.outvars if "<host>" in str(v.aval)]
        if equation.primitive.name == "optimization_barrier":
            waits.append([back.index(v) for v in equation.invars if v in back])
    # m and v of the third parameter wait for those of the first, and so on.
    assert waits == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert len(back) == 12


SLICED = {
    "float32": jadam.adamw(
        optax.linear_schedule(1e-2, 1e-3, 10),
        weight_decay=0.1,
        mask=lambda params: jax.tree.map(lambda p: p.ndim > 2, params),
        kernel="xla",
    ),
    "8 bits": jadam.nadamw(1e-2, weight_decay=0.1, **EIGHT_BITS, kernel="xla"),
    "residuals": jadam.compensated_weights(jadam.amsgrad(1e-2, **SIXTEEN_BITS, kernel="xla")),
    "stochastic": jadam.stochastic_rounding(jadam.adam(1e-2, **SIXTEEN_BITS, kernel="xla"), 3),
}


@pytest.mark.usefixtures("either_compilation")
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param(
            name,
            form,
            marks=[pytest.mark.soak] * ((form == "step") != (name in ("8 bits", "stochastic"))),
        )
        for name in SLICED
        for form in ("update", "step")
    ],
)
def test_a_large_leaf_comes_in_slices(name, form):
    """No bit changes: slices are dithered, rounded and decayed as the whole leaf."""
    tx, rng = SLICED[name], np.random.default_rng(0)
    dtype = jnp.bfloat16 if name in ("residuals", "stochastic") else jnp.float32
    shapes = {"stack": (4, 8, 256), "words": (60, 128), "bias": (64,), "prime": (53, 32)}

    def tree():
        return {k: jnp.asarray(rng.standard_normal(s) / 8, dtype) for k, s in shapes.items()}

    params, grads = tree(), tree()
    lies = jax.tree.map(lambda p: p.sharding, params)
    host = state_shardings(tx, params, memory_kind="pinned_host")

    def trained(tx, state, **options):
        def step(params, state):
            if form == "step":
                return tx.step(grads, state, params)
            return one_step(tx, params, state, grads)

        # Two programs: XLA is to round in the order that is written.
        plain = {"xla_backend_optimization_level": 0, "xla_disable_hlo_passes": "algsimp"}
        exact = {**plain, "xla_allow_excess_precision": False}
        traced = jax.jit(step, compiler_options=exact, **options).trace(params, state)
        compiled = traced.lower().compile()
        after = compiled(params, state)
        return compiled(*after), str(traced.jaxpr).count("scan[")

    expected, loops = trained(tx, jax.jit(tx.init)(params))
    state = jax.jit(tx.init, out_shardings=host)(params)
    moved = streamed(tx, host, slice_size=2**13)
    got, more = trained(moved, state, out_shardings=(lies, host))
    assert_equal(got, expected)
    # The bias has no rows, and a prime number of them no equal slices.
    assert more >= loops + 1
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(got[1]) if x.size > 64}
    assert kinds == {"pinned_host"}


@pytest.mark.usefixtures("either_compilation")
def test_streaming_changes_no_bit_of_what_mixes_leaves():
    """Norms of all gradients, of a leaf's own, a condition on all: each needs what it needs."""
    tx = optax.apply_if_finite(
        optax.chain(
            optax.clip_by_global_norm(1.0), jadam.scale_by_adam(), optax.scale_by_trust_ratio()
        ),
        max_consecutive_errors=3,
    )
    params, gradients = trees("float32")
    lies = jax.tree.map(lambda spec: NamedSharding(mesh_of(), spec), SPECS)
    params, *gradients = jax.device_put([params, *gradients], [lies] * (1 + len(gradients)))
    host = state_shardings(tx, params, memory_kind="pinned_host")
    plain, moved = (jax.jit(partial(one_step, each)) for each in (tx, streamed(tx, host)))
    expected = trained(plain, params, jax.jit(tx.init)(params), gradients)
    state = jax.jit(tx.init, out_shardings=host)(params)
    assert_equal(trained(moved, params, state, gradients), expected)


def test_a_memory_that_the_device_has_not_is_named():
    params = jax.device_put(jnp.ones(8), NamedSharding(mesh_of(), P()))
    with pytest.raises(ValueError, match=r"^memory_kind: .*cpu.*pinned_host.*hbm2"):
        state_shardings(jadam.adam(1e-3), params, memory_kind="hbm2")


# What is refused


def test_what_is_refused():
    """Each message names the argument or the leaf, what was expected and what came."""
    mesh = mesh_of()
    tx = jadam.adam(1e-3)
    params = {"a": {"w": shape_of(64, 60)}}
    refused = [
        (TypeError, r"^params\['a'\]\['w'\]: expected a sharding.*None", {}),
        (ValueError, r"^mesh: expected a mesh.*shardings\['a'\]\['w'\]", {"shardings": P()}),
        (TypeError, r"shardings\['a'\]\['w'\]: .*'data'", {"shardings": {"a": {"w": "data"}}}),
        (ValueError, r"^shardings: expected a tree like params.*", {"shardings": {"b": P()}}),
        (ValueError, r"^shardings\['a'\]\['w'\]: .*model", {"shardings": P("model"), "mesh": mesh}),
        (ValueError, r"\['w'\]: .* 60 ", {"shardings": P(None, "data"), "mesh": mesh}),
        (ValueError, r"\['w'\]: .*\(64, 60\)", {"shardings": P(None, None, "data"), "mesh": mesh}),
        (ValueError, r"^axis: .*'data'; got 'x'", {"shardings": P(), "mesh": mesh, "axis": "x"}),
    ]
    for error, message, arguments in refused:
        with pytest.raises(error, match=message):
            state_shardings(tx, params, **arguments)
    with pytest.raises(ValueError, match=r"^params: expected at least one array"):
        state_shardings(tx, {})
    with pytest.raises(TypeError, match=r"^params\['w'\]: expected a NamedSharding to divide"):
        divided({"w": jnp.ones((64, 64))}, axis="data")
    with pytest.raises(TypeError, match=r"^min_size"):
        divided(params, P(), mesh=mesh, axis="data", min_size=0.5)
    host = state_shardings(tx, {"w": jnp.ones(8)}, memory_kind="pinned_host")
    with pytest.raises(ValueError, match=r"^state: expected the tree of shardings"):
        streamed(tx, host).update({"w": jnp.ones(8)}, jadam.init({"w": jnp.ones(8)}))


@pytest.mark.usefixtures("quick_compilation")
def test_one_device_needs_no_mesh():
    """A sharding that is no NamedSharding is used as it is."""
    params = {"w": jnp.ones((64, 64))}
    tx = jadam.adam(1e-3, **EIGHT_BITS)
    shardings = state_shardings(tx, params)
    assert set(jax.tree.leaves(shardings)) == {params["w"].sharding}
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    assert all(x.sharding == params["w"].sharding for x in jax.tree.leaves(state))


# experiments/scale


def test_the_page_on_scale_has_the_committed_figures():
    """No figure was typed by hand."""
    results = json.loads(scale.RESULTS.read_text())["rows"]
    for name, sharded in (("whole", False), ("sharded", True)):
        assert (
            readme_block(name, scale.README)[1] == scale.markdown(results, sharded=sharded) + "\n"
        )
    compiled = json.loads(tpu.RESULTS.read_text())
    assert readme_block("tpu", scale.README)[1] == tpu.markdown(compiled) + "\n"


@pytest.mark.usefixtures("quick_compilation")
def test_the_committed_figures_on_scale_are_what_the_code_computes():
    """From shapes, in seconds: two models of the five, and the known numbers of parameters."""
    committed = json.loads(scale.RESULTS.read_text())["rows"]
    models = ("GPT-2 124M", "Kimi K2 1T")
    assert scale.rows(models) == [row for row in committed if row["model"] in models]
    # GPT-2's and Llama 3's published sums; Kimi K2 says 1 trillion.
    assert {row["model"]: row["parameters"] for row in committed} == {
        "GPT-2 124M": 124_439_808,
        "Llama 3 8B": 8_030_261_248,
        "Llama 3 70B": 70_553_706_496,
        "Llama 3 405B": 405_853_388_800,
        "Kimi K2 1T": pytest.approx(1.03e12, rel=0.005),
    }


def test_parameters_on_one_device_are_whole_on_a_mesh_that_is_given():
    """`divided(params, mesh=mesh, axis=...)` of a model that was just made needs no shardings."""
    mesh, params = mesh_of(), {"w": jnp.ones((64, 1024)), "b": jnp.ones(8)}
    zero = jadam.sharding.divided(params, mesh=mesh, axis="data")
    expected = jadam.sharding.divided(params, P(), mesh=mesh, axis="data")
    assert zero == expected
    assert zero["w"].spec == P("data")
    with pytest.raises(TypeError, match=r"params\['b'\]: .*pass shardings or a mesh"):
        jadam.sharding.divided(params, axis="data")


def test_parameters_on_a_mesh_stay_there_when_another_is_given():
    """Whole or divided, they have shardings of their own, and their state with them."""
    own = mesh_of((2, 4), ("x", "y"))
    lies = {"w": NamedSharding(own, P()), "b": NamedSharding(own, P("x"))}
    params = {name: jax.device_put(jnp.ones((8, 8)), where) for name, where in lies.items()}
    state, *_ = state_shardings(jadam.adam(1e-3), params, mesh=mesh_of())
    assert state.mu == state.nu == lies
