"""The kernels for NVIDIA's GPUs, as far as they can be checked without one.

tests/native runs their source as plain C++; experiments.bench.device runs them on a GPU.
"""

import re
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jadam
from experiments.bench.ahead import entry
from jadam._kernels import choice

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "jadam" / "_kernels" / "native" / "gpu"
PTX = FOLDER / "kernel.ptx"
ARCHITECTURES = [
    "sm_80",
    "sm_90",
    "sm_120",
    *(pytest.param(name, marks=pytest.mark.soak) for name in ("sm_86", "sm_89", "sm_100")),
]

needs_kernel = pytest.mark.skipif(
    choice.why_not() is not None, reason=f"no kernel: {choice.why_not()}"
)
needs_ptxas = pytest.mark.skipif(shutil.which("ptxas") is None, reason="no ptxas of CUDA here")


def version_of(text):
    """The version of CUDA's compiler, as it says it itself and in what it makes."""
    return re.search(r"release [\d.]+, (V[\d.]+)", text)[1]


def entries(text):
    return re.findall(r"^\.visible \.entry (\w+)", text, re.MULTILINE)


def test_the_ptx_has_what_the_library_asks_a_driver_for():
    """Each kernel by its name, for compute capability 8.0 and drivers since CUDA 12.1."""
    header, text = (FOLDER / "device_leaf.h").read_text(), PTX.read_text()
    asked = re.findall(r'\{"(\w+)", k\w+\}', header)
    assert len(asked) == 7
    assert sorted(asked) == sorted(entries(text))
    assert re.findall(r"^\.version (.*)", text, re.MULTILINE) == ["8.1"]
    assert re.findall(r"^\.target (.*)", text, re.MULTILINE) == ["sm_80"]
    assert ".pragma" not in text


def test_a_call_is_a_launch():
    """As many leaves as are joined in one call fit in the arguments of one launch."""
    primitive = pytest.importorskip("jadam._kernels.primitive")
    found = re.search(r"kLeavesInLaunch = (\d+);", (FOLDER / "launch.h").read_text())
    assert int(found[1]) == primitive.GROUP["gpu"] == entry.LEAVES_IN_LAUNCH


def test_the_ptx_is_made_of_the_source_that_is_there(tmp_path):
    """`make ptx` was run after the last change of a source: users run what they read."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc here")
    told = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    here, there = version_of(told.stdout), version_of(PTX.read_text())
    if here != there:
        pytest.skip(f"nvcc is {here}, the PTX was made by {there}")
    made = tmp_path / "kernel.ptx"
    subprocess.run([ROOT / ".ci" / "ptx.sh", made], check=True)

    def code(path):  # in comments are the compiler's own names
        return [x for x in path.read_text().splitlines() if not x.startswith("//")]

    assert code(made) == code(PTX), "make ptx"
    assert list(tmp_path.iterdir()) == [made]


# Bytes a thread, of a store of a register to memory and back. None but for what follows, in the
# rare branches and between blocks: a register more would let a multiprocessor have room for fewer
# thread blocks.
# Of narrow floats it is one register, for `least_bounding`, which a rare branch alone reads.
SPILLED = {
    "jadam_floats": 64,
    "jadam_narrow_floats": 4,
    "jadam_narrow_codes": 32,
    "jadam_narrow_codes4": 32,
}


@needs_ptxas
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_ptx_is_taken_for_each_architecture(tmp_path, architecture):
    """A100, RTX 30 and 40, H100, B200, RTX 50; what does not fit into registers stays little."""
    known = subprocess.run(["ptxas", "--help"], capture_output=True, text=True, check=True).stdout
    if f"'{architecture}'" not in known:
        pytest.skip(f"this ptxas does not know {architecture}")
    command = ["ptxas", "-v", f"-arch={architecture}", "-o", tmp_path / "kernel.cubin", PTX]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    spilled = re.findall(
        r"entry function '(\w+)' for '\w+'.*?(\d+) bytes spill stores", told.stderr, re.DOTALL
    )
    assert sorted(name for name, _ in spilled) == sorted(entries(PTX.read_text()))
    beyond = {name: n for name, n in spilled if int(n) > SPILLED.get(name, 0)}
    assert not beyond, f"bytes a thread that {architecture} has no registers for: {beyond}"


def test_kernels_says_what_a_gpu_lacks():
    """Without a driver or a GPU a user reads which it is, on a machine with one what it has."""
    text = jadam.kernels()["gpu"]
    if choice.why_not_on_gpu() is None:
        assert text.startswith("cuda: it has ")
    elif choice.why_not() is None:
        assert re.match(r"xla: (no libcuda\.so\.1|no GPU|a driver for|GPU \d|not built)", text)
    else:
        assert text == f"xla: {choice.why_not()}"


CODES = {"mu_dtype": "int8", "nu_dtype": "uint8", "min_size": 0}
FEW_CODES = {"mu_dtype": "int4", "nu_dtype": "uint4", "min_size": 0}
NARROW = {"mu_dtype": "bfloat16", "nu_dtype": "bfloat16"}
# The dtype of gradients and parameters, and the transformation: where there is no kernel it raises.
STEPS = {
    "float32": ("float32", lambda: jadam.adam(1e-2, kernel="native")),
    "bfloat16": ("bfloat16", lambda: jadam.adam(1e-2, **NARROW, kernel="native")),
    "codes": ("float32", lambda: jadam.nadam(1e-2, **CODES, kernel="native")),
    "few codes": ("float32", lambda: jadam.adam(1e-2, **FEW_CODES, kernel="native")),
    "compensated": (
        "bfloat16",
        lambda: jadam.compensated_weights(jadam.adamw(1e-2, **CODES, kernel="native")),
    ),
    "rounded randomly": (
        "bfloat16",
        lambda: jadam.stochastic_rounding(jadam.adam(1e-2, kernel="native")),
    ),
}


def lowered(tx, params, platform):
    state = jax.eval_shape(tx.init, params)
    traced = jax.jit(tx.step).trace(params, state, params)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@needs_kernel
@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_lowered_to_the_kernel_for_cuda_and_for_no_other_gpu(name):
    """Wherever a program is compiled: NVIDIA's GPUs have the kernel, AMD's do not."""
    dtype, tx = STEPS[name]
    params = {"a": jnp.ones((4, 300), dtype), "b": jnp.ones(7, dtype)}
    for platform, calls in {"cuda": 1, "rocm": 0}.items():
        found = re.findall(r"custom_call @jadam_step\(", lowered(tx(), params, platform))
        assert len(found) == calls, platform


@needs_kernel
@pytest.mark.parametrize("name", STEPS)
def test_what_a_kernel_replaces_lies_where_it_was(name):
    """The kernels read and write moments and residuals in one place: XLA is told of each."""
    dtype, tx = STEPS[name]
    text = lowered(tx(), jnp.ones((4, 300), dtype), "cuda")
    (call,) = (x for x in text.splitlines() if "custom_call @jadam_step(" in x)
    results = call.rsplit("-> ", 1)[1].count("tensor<")
    assert call.count("#stablehlo.output_operand_alias<") == results


@needs_kernel
def test_what_the_kernel_does_not_have_is_left_to_xla():
    """A member with a third moment, for a GPU too."""
    tx = jadam.amsgrad(1e-2, kernel="native")
    assert "@jadam_step" not in lowered(tx, jnp.ones((4, 300)), "cuda")
