"""The forms for TPUs: on a CPU against XLA's own, and compiled ahead of time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import printed_ahead
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jadam
from experiments.bench.ahead import programs
from experiments.common import chips
from jadam._kernels import choice, tiles
from jadam._leaf import Options, leaf_step
from jadam._masters import Compensated
from jadam._members import ADAM, ADEMAMIX, AMSGRAD, NADAM
from jadam._storage import chooser
from jadam._storage.lattice import LATTICES

tpu = pytest.importorskip("jadam._kernels.tpu")

OPTIONS = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "eps_root": 0.0}
RULES = {
    "adam": ADAM.with_hyperparameters(**OPTIONS),
    "nadam": NADAM.with_hyperparameters(**OPTIONS, momentum_decay=0.004),
    "amsgrad": AMSGRAD.with_hyperparameters(
        **OPTIONS, bias_correction_mu=True, bias_correction_nu=True
    ),
    "ademamix": ADEMAMIX.with_hyperparameters(**OPTIONS, b3=0.9999, warmup=None, alpha=5.0),
}
# Few, since each is compiled twice: a feature each, and all shapes.
CASES = {
    # shape, gradients, parameters, residual, codes, step, member
    "several tiles, ragged": ((40, 600), "float32", "float32", None, "int8", True, "adam"),
    "3 axes, nadam": ((2, 32, 128), "bfloat16", "bfloat16", None, "int8", True, "nadam"),
    "1 axis, update": ((700,), "bfloat16", "float32", None, "int8", False, "adam"),
    "int8": ((40, 256), "bfloat16", "bfloat16", "int8", "int8", True, "adam"),
    "int16": ((40, 256), "float32", "bfloat16", "int16", None, True, "adam"),
    "amsgrad": ((40, 256), "float32", "float32", None, "int8", True, "amsgrad"),
    "ademamix": ((40, 256), "float32", "float32", None, "int8", True, "ademamix"),
    "4 bits": ((40, 600), "float32", "float32", None, "int4", True, "adam"),
    "bf16 moments": ((40, 600), "float32", "float32", None, "bfloat16", True, "adam"),
}


def gradients(rng, shape, dtype, i):
    """Over 20 octaves; in the second step with zeros, infinities and NaN."""
    g = rng.standard_normal(shape) * 10.0 ** rng.uniform(-3, 3, shape)
    if i == 1:
        special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 3e38]
        g = np.where(rng.random(shape) < 0.01, rng.choice(special, shape), g)
    return jnp.asarray(g, dtype)


def in_codes(stored):
    """The codes of v and of m beside each other."""
    found = next(x for x in LATTICES if x.dtype == stored.dtype)
    return tuple(np.asarray(f(stored)) for f in (found.code_of, found.size_of))


def assert_close(found, expected, codes):
    """What the contract of kernels says: a code may be its neighbour, one in a thousand."""
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
    (moved, stored, extra), (moved_y, stored_y, extra_y) = found, expected
    a, b = (np.asarray(x, np.float64) for x in (moved, moved_y))
    if moved.dtype == jnp.float32:
        # 4 ulps of updates from 8-bit moments, and those of the parameter.
        np.testing.assert_allclose(a, b, rtol=4 * 2.0**-23, atol=4 * 2.0**-23 * 0.1)
    else:
        # A sum beside the middle of two neighbours may go to the other one.
        np.testing.assert_allclose(a, b, rtol=2.0**-7)
        assert np.mean((a != b) & ~np.isnan(a)) <= 1e-3
    if codes:
        for x, y in zip(in_codes(stored[0]), in_codes(stored_y[0]), strict=True):
            assert np.max(np.abs(x - y)) <= 1
            assert np.mean(x != y) <= 1e-3
        np.testing.assert_array_equal(stored[1], stored_y[1])
        for x, y in zip(stored[2:], stored_y[2:], strict=True):
            assert np.max(np.abs(np.asarray(x, int) - np.asarray(y, int))) <= 1
    else:
        for x, y in zip(stored, stored_y, strict=True):
            # Beside the middle of two neighbours a moment of 16 bits may go to the other one.
            is_narrow = x.dtype == jnp.bfloat16
            x, y = (np.asarray(x, np.float64) for x in (x, y))
            np.testing.assert_allclose(x, y, rtol=2.0**-7 if is_narrow else 2 * 2.0**-23)
            assert not is_narrow or np.mean((x != y) & ~np.isnan(x)) <= 1e-3
    for x, y in zip(extra, extra_y, strict=True):
        # The master weight may differ by a few ulps: from the same parameter as many in the
        # residual, or all of it where the parameter went to the other neighbour.
        same = a == b if moved.dtype == jnp.bfloat16 else np.ones(a.shape, bool)
        units = 1 if x.dtype == jnp.int8 else 16
        off = np.abs(np.asarray(x, int) - np.asarray(y, int))[same]
        assert np.mean(off > units) <= 1e-3


FORMS = {"pallas": functools.partial(tpu.step, interpret=True), "tiles": tiles.step}
OF_TILES = ("3 axes, nadam", "amsgrad", "ademamix")


@pytest.mark.parametrize(
    ("name", "form"), [*((x, "pallas") for x in CASES), *((x, "tiles") for x in OF_TILES)]
)
def test_a_step_on_a_tpu_is_that_of_xlas_form(name, form, monkeypatch):
    """A TPU trains as all other devices do, over shapes, dtypes, members and special numbers."""
    # Small tiles, so that small leaves are cut along both axes.
    monkeypatch.setattr(tpu, "_MAX_ROWS", 32)
    monkeypatch.setattr(tpu, "_COLUMNS", 256)
    shape, g_dtype, p_dtype, residual, codes, to_params, member = CASES[name]
    rule, rng = RULES[member], np.random.default_rng(0)
    weights = None if residual is None else Compensated(np.dtype(residual), 3)
    options = Options(decays=True, to_params=to_params, weights=weights)
    kinds = {"int8": ("int8", "uint8"), "int4": ("int4", "uint4")}
    kind, codes = kinds.get(codes, (codes, codes)), codes in kinds
    stored = chooser(rule.member.moments, *kind, 0)(jnp.zeros(shape)).zeros(jnp.zeros(shape))
    p = jnp.asarray(rng.standard_normal(shape), p_dtype)
    extra = () if residual is None else (jnp.zeros(shape, residual),)
    dither = (jnp.uint32(5),) if residual == "int8" else ()

    @jax.jit
    def in_xla(count, rate, g, p, stored, extra):
        return leaf_step(rule, rate, 0.1, count)(g, p, options, stored, extra)

    @jax.jit
    def on_tpu(count, rate, g, p, stored, extra):
        return FORMS[form](rule, rate, 0.1, count, (g, p, stored, extra), options)

    for i in range(2):
        g = gradients(rng, shape, g_dtype, i)
        args = (jnp.int32(i), jnp.float32(0.01), g, p, stored, (*extra, *dither))
        expected, found = in_xla(*args), on_tpu(*args)
        assert_close(found, expected, codes)
        p = expected.moved if to_params else p
        stored, extra = expected.stored, expected.extra


@pytest.mark.parametrize("spec", [P("a"), P(None, "a")], ids=["rows", "columns"])
def test_codes_divided_over_tpus_need_no_communication(spec):
    """Each device puts its own tiles in order: FSDP and ZeRO-1 send no state."""
    shape, mesh = (64, 1024), jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    stored = chooser(ADAM.moments, "int8", "uint8", 0)(jnp.zeros(shape)).zeros(jnp.zeros(shape))
    assert tiles.suits(stored, shape, 8)
    leaf = (jnp.zeros(shape), jnp.zeros(shape), stored, ())
    leaf = jax.device_put(leaf, NamedSharding(mesh, spec))

    @jax.jit
    def step(leaf):
        return tiles.step(RULES["adam"], 0.01, 0.1, jnp.int32(0), leaf, Options(True, True))

    compiled = step.lower(leaf).compile()
    assert "all-" not in compiled.as_text()
    assert "collective" not in compiled.as_text()
    assert all(
        x.is_equivalent_to(leaf[0].sharding, 2) for x in jax.tree.leaves(compiled.output_shardings)
    )


def test_what_would_be_sent_or_padded_stays_in_rows():
    """A row of tiles that two devices share would go from one to the other."""
    codes = (jnp.zeros((1, 1), jnp.uint16), jnp.zeros((1, 1), jnp.int16))
    for shape, devices, suits in [
        ((64, 1024), 8, True),
        ((2, 64, 1024), 8, True),
        ((32, 1024), 8, False),
        ((64, 512), 8, False),
        ((63, 128), 1, False),
        ((64, 96), 1, False),
        ((1024,), 1, False),
    ]:
        assert tiles.suits(codes, shape, devices) is suits, (shape, devices)
    assert not tiles.suits((jnp.zeros((1, 1)),), (64, 1024), 1)


SHAPES = {
    (64, 256): True,
    (3, 128): True,
    (4, 32, 256): True,
    (256,): False,
    (): False,
    (64, 96): False,
    (64, 200): False,
    (4, 12, 256): False,
    (0, 256): False,
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_leaves_that_would_be_moved_are_xlas(shape):
    """A kernel that has its operands copied into its order costs more than it saves."""
    assert choice.TPU.suits(shape) == SHAPES[shape]


def test_the_table_is_what_kernels_prints():
    """Each feature, so that nobody has to guess which leaves are XLA's."""
    text = jadam.kernels()["tpu"]
    assert text.startswith("pallas")
    assert all(feature in text for feature in choice.TPU.features)


def test_floats_are_left_to_xla_on_a_tpu():
    """XLA makes one pass of them by itself."""
    plain = {"member adam", "moments float32 float32", "to_params"}
    assert choice.TPU.has(frozenset(plain), (64, 256))
    assert not choice.TPU.is_faster(frozenset(plain))
    for narrow in ("8-bit codes", "bfloat16 bfloat16"):
        assert choice.TPU.is_faster(frozenset({*plain, f"moments {narrow}"}))


AHEAD = """
import json
from experiments.common.chips import V5E
from experiments.bench.ahead.compiled import figures
from experiments.bench.ahead.programs import PROGRAMS
shapes = ((8192, 4096), (768, 3072))
found = {{name: figures(PROGRAMS[name](), shapes, V5E) for name in {names}}}
found[{divided!r}] = figures(PROGRAMS[{divided!r}](), shapes[:1], V5E)
print(json.dumps(found))
"""


@pytest.mark.skipif(chips.V5E.why_not() is not None, reason=f"for a TPU {chips.V5E.why_not()}")
@pytest.mark.skipif(
    choice.why_not() is not None,
    reason="on a host without the kernel for CPUs a leaf is not lowered to that for TPUs",
)
def test_a_step_is_one_pass_on_a_tpu():
    """Memory is what 8-bit moments are for: a step reads each array once and needs no other."""
    own = (
        *(programs.BF16_MOMENTS, programs.CODES, programs.FEWER_CODES),
        *(programs.COMPENSATED, programs.SMALLEST),
    )
    by_xla = programs.CODES + programs.DIVIDED
    found = printed_ahead(AHEAD.format(names=own, divided=by_xla))
    divided = found.pop(by_xla)
    for name, figures in found.items():
        assert figures["calls"] == {"tpu_custom_call": 2}, (name, figures)
        # Tops are padded to 128 a row, of 32.
        assert figures["bytes"] <= 1.05 * figures["least"], (name, figures)
        assert figures["temporary"] <= 0.1, (name, figures)
        # The small leaf too: XLA would copy that to the chip's fast memory first.
        assert figures["copied"] <= 0.1, (name, figures)
    # Without `step_in_parts`: three passes, no other memory and nothing sent.
    assert divided["collectives"] == 0
    assert divided["bytes"] <= 28 * 1.01, divided
    assert divided["temporary"] <= 0.1, divided
