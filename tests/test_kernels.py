"""Which leaf goes to a kernel: by what the kernel declares, and by what JAX still has."""

import ast
import dataclasses
import functools
import importlib
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jadam
from jadam import _leaf, _traced
from jadam._kernels import choice

needs_kernel = pytest.mark.skipif(
    choice.why_not() is not None, reason=f"no kernel: {choice.why_not()}"
)
EIGHT_BITS = {"mu_dtype": "int8", "nu_dtype": "uint8", "min_size": 0}
FOUR_BITS = {"mu_dtype": "int4", "nu_dtype": "uint4", "min_size": 0}


def has_kernel(function, *args):
    # A function of its own, so that it is traced anew after a patch.
    return "jadam_step" in jax.jit(lambda *args: function(*args)).lower(*args).as_text()


# A program that needs the feature, by name.
PROGRAMS = {
    "member adam": lambda: (jadam.adam(1e-2, kernel="native"), "float32", "float32", "update"),
    "member nadam": lambda: (jadam.nadam(1e-2, kernel="native"), "float32", "float32", "update"),
    "member radam": lambda: (jadam.radam(1e-2, kernel="native"), "float32", "float32", "update"),
    "gradients float32, parameters float32": lambda: (
        *(jadam.adam(1e-2, kernel="native"), "float32", "float32", "step"),
    ),
    "gradients bfloat16, parameters float32": lambda: (
        *(jadam.adam(1e-2, kernel="native"), "bfloat16", "float32", "step"),
    ),
    "gradients bfloat16, parameters bfloat16": lambda: (
        *(jadam.adam(1e-2, kernel="native"), "bfloat16", "bfloat16", "step"),
    ),
    "moments float32 float32": lambda: (
        *(jadam.adam(1e-2, kernel="native"), "float32", "float32", "update"),
    ),
    "moments bfloat16 float32": lambda: (
        *(jadam.adam(1e-2, mu_dtype="bfloat16", kernel="native"), "float32", "float32", "update"),
    ),
    "moments bfloat16 bfloat16": lambda: (
        jadam.adam(1e-2, mu_dtype="bfloat16", nu_dtype="bfloat16", kernel="native"),
        *("float32", "float32", "update"),
    ),
    "moments 8-bit codes": lambda: (
        *(jadam.adam(1e-2, **EIGHT_BITS, kernel="native"), "float32", "float32", "update"),
    ),
    "moments 4-bit codes": lambda: (
        *(jadam.adam(1e-2, **FOUR_BITS, kernel="native"), "float32", "float32", "update"),
    ),
    "weights compensated int8": lambda: (
        *(jadam.compensated_weights(jadam.adam(1e-2, kernel="native")), "float32", "bfloat16"),
        "update",
    ),
    "weights compensated int16": lambda: (
        jadam.compensated_weights(jadam.adam(1e-2, kernel="native"), residual_dtype="int16"),
        *("float32", "bfloat16", "update"),
    ),
    "weights stochastic bfloat16": lambda: (
        *(jadam.stochastic_rounding(jadam.adam(1e-2, kernel="native")), "bfloat16", "bfloat16"),
        "update",
    ),
    "decays": lambda: (jadam.adamw(1e-2, kernel="native"), "float32", "float32", "update"),
    "to_params": lambda: (jadam.adam(1e-2, kernel="native"), "float32", "float32", "step"),
}


@pytest.mark.usefixtures("quick_compilation")
@needs_kernel
@pytest.mark.parametrize("feature", sorted(choice.CPU.features))
def test_a_kernel_without_a_feature_steps_aside(feature, monkeypatch):
    """Each feature that the table names is one that a leaf can need, and is asked for."""
    tx, g_dtype, p_dtype, way = PROGRAMS[feature]()
    params, grads = jnp.ones((4, 256), p_dtype), jnp.ones((4, 256), g_dtype)
    state = tx.init(params)
    function = getattr(tx, way)
    assert has_kernel(function, grads, state, params)
    less = dataclasses.replace(choice.CPU, features=choice.CPU.features - {feature})
    monkeypatch.setattr(choice, "CPU", less)
    assert not has_kernel(function, grads, state, params)


@pytest.mark.usefixtures("quick_compilation")
@needs_kernel
def test_an_option_that_the_kernel_does_not_know_keeps_it_away(monkeypatch):
    """Who adds an option to a leaf's step, such as a mask, need not think of the kernels."""

    class Options(_leaf.Options):
        def _asdict(self):
            return super()._asdict() | {"masked": True}

    g = jnp.ones((4, 256))
    tx = jadam.adam(1e-2, kernel="native")
    state = tx.init(g)
    assert has_kernel(tx.step, g, state, g)
    monkeypatch.setattr(jadam._update, "Options", Options)
    assert not has_kernel(tx.step, g, state, g)


@pytest.mark.usefixtures("quick_compilation")
@needs_kernel
def test_all_leaves_are_one_call_or_one_each_where_a_program_is_taken_apart():
    """One has its overhead once; a released step puts each leaf's where its gradient is made."""
    params = {"a": jnp.ones((4, 256)), "b": jnp.ones((8, 256))}
    tx = jadam.adam(1e-2, kernel="native")
    state = tx.init(params)

    def calls():
        step = jax.jit(lambda *args: tx.step(*args))
        return step.lower(params, state, params).as_text().count("custom_call @jadam_step(")

    assert calls() == 1
    with choice.apart():
        assert calls() == 2
    assert calls() == 1


def test_the_table_is_what_kernels_prints():
    """Each feature, so that nobody has to guess which leaves are XLA's."""
    if choice.why_not() is None:
        assert all(feature in jadam.kernels()["cpu"] for feature in choice.CPU.features)


NAMES = [
    ("jax._src.dispatch", "prim_requires_devices_during_lowering"),
    ("jax.experimental.custom_partitioning", "custom_partitioning"),
    ("jax.interpreters.mlir", "register_lowering"),
    ("jax.interpreters.mlir", "lower_fun"),
    ("jax.interpreters.batching", "primitive_batchers"),
    ("jax.extend.core", "Primitive"),
]


# jadam sees a copy of the module without the name; JAX itself goes on with its own.
WITHOUT = f"""
import importlib, sys, types
import jax.numpy as jnp
for module, name in {NAMES}:
    whole = importlib.import_module(module)
    without = types.ModuleType(module)
    vars(without).update((k, v) for k, v in vars(whole).items() if k != name)
    parent, _, last = module.rpartition(".")
    sys.modules[module] = without
    setattr(sys.modules[parent], last, without)
    import jadam
    text = jadam.kernels()["cpu"]
    assert text.startswith("xla: not usable") and name in text, (name, text)
    params = jnp.ones(3)
    updates, _ = jadam.update(params, jadam.init(params))
    assert updates.shape == (3,), name
    sys.modules[module] = whole
    setattr(sys.modules[parent], last, whole)
    for loaded in [x for x in sys.modules if x.partition(".")[0] == "jadam"]:
        del sys.modules[loaded]
"""


def test_without_a_name_of_jax_the_steps_are_xlas():
    """jax moves what it does not promise: then jadam runs as before, and says what is missing.

    In one process, which imports jadam again for each name.
    """
    subprocess.run([sys.executable, "-c", WITHOUT], check=True, timeout=120)


def released(x):
    """A released step of two layers."""

    def loss(params):
        layer = lambda x, p: (x * p, None)  # noqa: E731
        return jadam.release.scan(layer, jnp.ones(()), params)[0]

    tx = jadam.adam(0.1)
    return jadam.release.train_step(loss, tx)(x, tx.init(x))[0]


def streamed(x):
    """An update in parts."""
    tx = jadam.adam(0.1)
    host = jadam.sharding.state_shardings(tx, x, memory_kind="pinned_host")
    return jadam.sharding.streamed(tx, host).update(x, tx.init(x))[0]


@pytest.mark.parametrize("name", sorted(_traced.NAMES))
def test_without_a_name_of_traced_programs_all_else_goes_on(name, monkeypatch):
    """What needs it says so, and rows are XLA's, as `jadam.kernels()` tells."""
    x, table, ids = jnp.ones(2), jnp.ones((8, 4)), jnp.array([1, 3])
    rows = jadam.rows.lazy(jadam.adam(0.1, kernel="auto"))
    state = rows.init(table)
    gather = lambda: jax.jit(rows.gather).lower(table, state, ids)  # noqa: E731
    expected = jadam.update(x, jadam.init(x))[0]
    monkeypatch.delattr(sys.modules[_traced.NAMES[name]], name)
    assert jnp.array_equal(jadam.update(x, jadam.init(x))[0], expected)
    assert "jadam_rows" not in gather().as_text()
    if choice.why_not() is None:
        assert f"jadam.rows: xla: jax {jax.__version__} lacks" in jadam.kernels()["cpu"]
    with pytest.raises(RuntimeError, match=name):
        (streamed if name == "Literal" else released)(x)


@pytest.mark.parametrize("module", ["jax.experimental.pallas", "jax.experimental.pallas.tpu"])
def test_without_a_name_of_pallas_the_steps_on_tpus_are_xlas(module, monkeypatch):
    """Each that the kernel imports, as it is written there."""
    source = Path(importlib.import_module("jadam._kernels.tpu").__file__).read_text()
    imports = [x for x in ast.walk(ast.parse(source)) if isinstance(x, ast.ImportFrom)]
    names = [alias.name for x in imports if x.module == module for alias in x.names]
    assert names
    for name in names:
        with monkeypatch.context() as patch:
            patch.delitem(sys.modules, "jadam._kernels.tpu")
            patch.delattr(sys.modules[module], name)
            choice.why_not_on_tpu.cache_clear()
            text = jadam.kernels()["tpu"]
            assert text.startswith("xla: not usable"), name
            assert name in text
    choice.why_not_on_tpu.cache_clear()


# The primitive under JAX's transformations


def eight(axis_type=AxisType.Auto):
    return jax.make_mesh((8,), ("d",), axis_types=(axis_type,))


@pytest.mark.usefixtures("either_compilation")
@needs_kernel
@pytest.mark.parametrize("storage", [{}, EIGHT_BITS], ids=["float32", "8 bits"])
def test_under_shard_map_a_result_varies_where_any_operand_does(storage):
    """Gradients that differ from device to device make parameters that do: 0.9·x² in the loss."""
    params, x = jnp.ones((4, 256)), jnp.linspace(0.1, 1.0, 8)

    def loss(p, x):
        return jnp.sum((p * x) ** 2) / 2

    def both(kernel, out_specs):
        tx = jadam.adam(0.1, kernel=kernel, **storage)

        def body(p, x):
            g = jax.grad(loss)(jax.lax.pcast(p, "d", to="varying"), x[0])
            p, _ = tx.step(g, tx.init(p), p)
            return (jax.grad(loss)(p, x[0])[None], p) if out_specs else p

        specs = (P("d"), P("d")) if out_specs else P()
        return jax.jit(jax.shard_map(body, mesh=eight(), in_specs=(P(), P("d")), out_specs=specs))

    found = both("native", True)(params, x)[0][:, 0, 0]
    # The step is 0.1 in each coordinate, but for roundings.
    np.testing.assert_allclose(found, 0.9 * np.asarray(x) ** 2, rtol=1e-5)
    for kernel in ("xla", "native"):
        with pytest.raises(ValueError, match="out_specs"):
            both(kernel, False)(params, x)


@pytest.mark.usefixtures("either_compilation")
@needs_kernel
@pytest.mark.parametrize("storage", [{}, EIGHT_BITS], ids=["float32", "8 bits"])
def test_under_shard_map_a_leaf_that_is_the_same_everywhere_stays_so(storage):
    """Beside one that is divided: `out_specs` may say of each what its `in_specs` did."""
    params = {"rows": jnp.ones((8, 256)), "whole": jnp.ones((3, 256))}
    tx = jadam.adam(0.1, kernel="native", **storage)
    state = tx.init(params)
    specs = jax.tree.map(lambda x: P("d") if x.shape[:1] == (8,) else P(), (params, state))
    divided = jax.jit(
        jax.shard_map(lambda p, s: tx.step(p, s, p), mesh=eight(), in_specs=specs, out_specs=specs)
    )
    assert "jadam_step" in divided.lower(params, state).as_text()
    expected = jax.jit(tx.step)(params, state, params)
    jax.tree.map(np.testing.assert_array_equal, divided(params, state), expected)


@pytest.mark.usefixtures("either_compilation")
@needs_kernel
def test_leaves_on_several_meshes_take_a_step():
    """As with optax: their steps are XLA's, since JAX knows one mesh for such a primitive."""
    devices = np.array(jax.devices())
    meshes = {
        "x": NamedSharding(Mesh(devices, "a"), P("a")),
        "y": NamedSharding(Mesh(devices.reshape(4, 2), ("b", "c")), P("b", "c")),
    }
    params = {name: jax.device_put(jnp.ones((16, 256)), where) for name, where in meshes.items()}
    tx = jadam.adam(0.1, kernel="native")
    moved, _ = jax.jit(tx.step)(params, tx.init(params), params)
    for name, where in meshes.items():
        assert moved[name].sharding.is_equivalent_to(where, 2)
        # lr·1 at the first step, but for a rounding.
        np.testing.assert_allclose(moved[name], 0.9, rtol=1e-6)


@needs_kernel
def test_without_jit_the_kernel_still_makes_the_step():
    """`jax.disable_jit`, with which people debug, must not call the primitive for ever."""
    p = jnp.ones((4, 256))
    tx = jadam.adam(0.1, kernel="native")
    expected = tx.step(p, tx.init(p), p)
    with jax.disable_jit():
        found = tx.step(p, tx.init(p), p)
    # 1e-6: outside of jit the step's numbers may be rounded in another way.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), found, expected)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_program_is_planned_on_devices_that_do_not_exist(platform):
    """Lowering for an `AbstractMesh`: a TPU program on a host without one."""
    mesh = AbstractMesh((8,), ("d",), axis_types=(AxisType.Auto,))

    def abstract(x):
        where = NamedSharding(mesh, P("d") if x.ndim else P())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    tx = jadam.adamw(0.1)
    params = abstract(jax.ShapeDtypeStruct((16, 256), jnp.float32))
    state = jax.tree.map(abstract, jax.eval_shape(tx.init, params))
    traced = jax.jit(tx.step).trace(params, state, params)
    assert "sdy.mesh" in traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.usefixtures("quick_compilation")
@needs_kernel
def test_gradients_that_are_not_summed_yet_are_refused_as_by_xla():
    """On explicit axes a gradient may still be one term a device: never taken as whole."""
    mesh = eight(AxisType.Explicit)

    def step(tx, a, p, state):
        where = P(None, None, unreduced={"d"})
        g = jax.lax.dot_general(a.T, a, (((1,), (0,)), ((), ())), out_sharding=where)
        return tx.step(g, state, p)

    with jax.set_mesh(mesh):
        a, p = jax.device_put(jnp.ones((16, 256)), P("d")), jnp.ones((256, 256))
        for kernel in ("xla", "native"):
            tx = jadam.adam(0.1, kernel=kernel)
            with pytest.raises(NotImplementedError, match="unreduced"):
                jax.jit(functools.partial(step, tx))(a, p, tx.init(p))


@pytest.mark.usefixtures("either_compilation")
@needs_kernel
def test_the_step_composes_with_scan_and_schedules_under_shard_map():
    """What varies is carried through a scan with the types that it had."""
    tx = jadam.adamw(optax.linear_schedule(0.1, 0.01, 4), kernel="native")
    x = jnp.linspace(0.1, 1.0, 8)

    def body(p, x):
        p = jax.lax.pcast(p, "d", to="varying")

        def one(carry, _):
            p, state = carry
            return tx.step(p * x[0], state, p), None

        return jax.lax.scan(one, (p, tx.init(p)), None, length=3)[0][0][None]

    shard_map = functools.partial(
        jax.shard_map, mesh=eight(), in_specs=(P(), P("d")), out_specs=P("d")
    )
    assert np.all(np.isfinite(jax.jit(shard_map(body))(jnp.ones((4, 128)), x)))
