"""Steps compiled ahead of time for a GPU that is not there, and the figures on the page."""

import json

import pytest
from helpers import printed_ahead

from experiments.bench import publish
from experiments.bench.ahead import entry, tables
from experiments.bench.ahead.__main__ import RESULTS
from experiments.common import chips
from experiments.common.report import readme_block
from jadam._kernels import choice

ON_GPU = """
import json
import jax, jax.numpy as jnp, numpy as np
import jadam
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from experiments.common.chips import H100
from experiments.bench.ahead.compiled import compile_for, figures, read_off
from experiments.bench.ahead.programs import PROGRAMS, SMALLEST
from jadam.sharding import state_shardings, step_in_parts

program = PROGRAMS[SMALLEST]()
# Two layers whose biases are too small for codes.
alone = figures(program, ((4096, 1024), (1024,)) * 2, H100)

mesh = Mesh(np.array(H100.devices(4)), "data")
params = {"w": jax.ShapeDtypeStruct((4096, 1024), jnp.bfloat16)}
tx, rows = program.tx, P("data")
in_parts = step_in_parts(tx, params, rows, mesh=mesh)

def lying(tree, shardings):
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )

state = lying(jax.eval_shape(tx.init, params), state_shardings(tx, params, rows, mesh=mesh))
params = lying(params, {"w": NamedSharding(mesh, rows)})

def divided(step):
    moved = compile_for(H100, lambda p, s, g: step(g, s, p), params, state, params)
    return read_off(moved, H100, 4096 * 1024 // 4)

print(json.dumps({"alone": alone, "parts": divided(in_parts), "by XLA": divided(tx.step)}))
"""

compiled_for_gpus = pytest.mark.skipif(
    chips.H100.why_not() is not None, reason=f"for a GPU {chips.H100.why_not()}"
)
with_kernel = pytest.mark.skipif(
    choice.why_not() is not None,
    reason="on a host without the kernel for CPUs a leaf is not lowered to that for GPUs",
)


@compiled_for_gpus
@with_kernel
def test_a_step_is_one_call_in_place_on_a_gpu():
    """All leaves in a call, whose results lie where its operands lay: no copy, no other memory."""
    figures = printed_ahead(ON_GPU)["alone"]
    assert figures["calls"] == {"jadam_step": 1}
    # Of the call one for codes and one for floats; the step's numbers, its count and the dither's
    # count, and a copy of that count.
    assert figures["kernels"] <= 2 + 4
    assert figures["aliased"] == figures["donated"]
    parameters = 2 * (4096 * 1024 + 1024)
    assert figures["copied"] * parameters <= 16
    # The step's numbers and tables.
    assert figures["temporary"] * parameters <= 4096
    assert figures["bytes"] <= 1.001 * figures["least"]


@compiled_for_gpus
@with_kernel
@pytest.mark.parametrize("divided", ["parts", "by XLA"])
def test_a_divided_step_sends_nothing_on_gpus(divided):
    """Four GPUs that hold a quarter each step it by the same kernel, in place."""
    figures = printed_ahead(ON_GPU)[divided]
    assert figures["calls"] == {"jadam_step": 1}
    assert figures["collectives"] == 0
    # Parameter, residual, m, v, and the two counts.
    assert figures["aliased"] == 6
    assert figures["copied"] * 4096 * 256 <= 16


PROGRAM = """HloModule jit_step, input_output_alias={ {0}: (0, {}, may-alias), {1}: (2, {}, may-alias) }

%fused (p: f32[]) -> f32[] {
  ROOT %n = f32[] negate(%p)
}

ENTRY %main (a: f32[8,128], b: bf16[128]) -> (f32[8,128]) {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %b = bf16[128]{0} parameter(1)
  %c = f32[8,128]{1,0:T(8,128)} copy(%a), metadata={op_name="f(%b)"}
  %s = f32[8,128]{1,0} all-reduce(%c), to_apply=%sum
  %t = f32[12,24]{1,0:T(8,128)} parameter(2)
  %slice-start.1 = ((f32[12,24]{1,0:T(8,128)}), f32[4,24]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%t), slice={[0:4], [0:24]}
  %slice-done.1 = f32[4,24]{1,0:T(8,128)S(1)} slice-done(%slice-start.1)
  %call = (f32[8,128]{1,0}, f32[8,128]{1,0}, f32[8,128]{1,0}, /*index=3*/bf16[128]{0}, u16[128]{0}, s16[1]{0}, s8[128]{0}, bf16[128]{0}, u16[128]{0}, s16[1]{0}) custom-call(%s, %b), custom_call_target="jadam_step", backend_config={decays = dense<1> : tensor<3xi32>, salts = dense<[0, 1, 2]> : tensor<3xi32>, weights = dense<[0, 1, 0]> : tensor<3xi32>, writes_params = true}
  ROOT %g = f32[8,128]{1,0} get-tuple-element(%call), index=0
}
"""  # noqa: E501


def test_what_is_launched_is_read_off_a_program():
    """The bytes that the page counts, by hand: 4,096 of an array, and each kernel of a call."""
    copy, reduced, fetched, call = entry.launches(PROGRAM)
    assert copy == ("copy", "", 4096, 4096, 8192, 1)
    assert reduced.is_collective
    assert not copy.is_collective
    written = 3 * 4096 + (256 + 256 + 2 + 128) + (256 + 256 + 2)
    # float32 alone, codes under compensated weights, codes.
    assert call == ("custom-call", "jadam_step", 4096 + 256, written, 4096 + 256 + written, 3)
    # Of 12 rows of 24 numbers a slice of 4 is brought to the chip, as a tile of 8 x 128.
    assert fetched.read + fetched.written == 8 * 128 * 4
    assert not fetched.is_of_arrays
    assert entry.aliased(PROGRAM) == 2


def test_the_page_has_the_committed_figures():
    """No figure was typed by hand."""
    results = json.loads(RESULTS.read_text())
    assert readme_block("ahead", publish.README)[1] == tables.markdown(results) + "\n"
