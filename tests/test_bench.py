"""The speed bench: what it compares is comparable, and what it cannot time it names."""

import functools
import json
import math
import os
import re
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from experiments.bench import bars, contenders, program, rounds, speed
from experiments.bench.device import tables
from experiments.bench.device.rows import MARK, heard
from experiments.bench.rounds import Workers
from experiments.bench.workloads import GPT2, QUICK, WORKLOADS, llama3_layer
from experiments.common import picture, report


def test_the_shapes_are_those_of_the_published_models():
    """124,439,808 parameters in GPT-2's published checkpoint; (8.03e9 - embeddings) / 32 layers."""
    assert (len(GPT2.shapes), GPT2.parameters) == (148, 124_439_808)
    layer = sum(math.prod(shape) for shape in llama3_layer())
    assert 32 * layer + 2 * 128_256 * 4096 + 4096 == 8_030_261_248


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_every_group_fits_and_has_the_references(workload):
    """A ratio to the limit or to torch can be taken in every round, and none is dropped."""
    budget = 14 * 2**30
    groups = rounds.groups(contenders.CONTENDERS, workload.parameters, budget)
    for group in groups:
        assert group[: len(contenders.REFERENCES)] == list(contenders.REFERENCES)
        others = group[len(contenders.REFERENCES) :]
        held = workload.parameters * sum(contender.bytes for contender in group)
        assert held <= budget or len(others) == 1
    names = [c.name for group in groups for c in group if c not in contenders.REFERENCES]
    assert sorted([*names, *(c.name for c in contenders.REFERENCES)]) == sorted(
        c.name for c in contenders.CONTENDERS
    )


def test_a_ratio_compares_turns_of_the_same_round():
    """A machine that is slow for a whole round slows no ratio."""
    slow = [1.0, 10.0, 2.0, 7.0]
    timed = [
        {name: {"seconds": own * s, "dispatch": 0.0} for name, own in {"limit": 2, "x": 3}.items()}
        for s in slow
    ]
    alone = {"x": {"seconds": 1000.0, "dispatch": 0.0}}
    found = rounds.summary("x", [*timed, alone])
    assert found["over limit"] == {"median": 1.5, "low": 1.5, "high": 1.5}
    assert "over torch fused" not in found


def test_the_figures_of_a_program():
    """Donated bytes are aliased, a matrix product is no fusion, and the text is counted by kind."""
    jitted = jax.jit(lambda x: x + 1, donate_argnums=0)
    found = program.figures(jitted, jnp.ones(1000))
    assert found["aliased_bytes"] == 4000
    assert found["temporary_bytes"] == 0
    text = "%fusion.1 = f32[2] fusion(%copy.2), calls=%c\n%copy.2 = f32[2]{0} copy(%x)"
    assert [program.count(name, text) for name in program.INSTRUCTIONS] == [1, 0, 1]


def adamw(p, g, steps):
    """Loshchilov & Hutter (2019), algorithm 2, on numbers."""
    m = v = 0.0
    for t in range(1, steps + 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        root = math.sqrt(v / (1 - 0.999**t))
        p -= 1e-3 * (m / (1 - 0.9**t) / (root + 1e-8) + 0.1 * p)
    return p


IN_JAX = [
    c
    for c in contenders.CONTENDERS
    if c.process == "jax"
    and c is not contenders.BUFFERS
    and not c.missing("cpu")
    and "flashoptim" not in c.name
]


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("contender", IN_JAX, ids=lambda contender: contender.name)
def test_contenders_make_the_same_step(contender, standard_promotion):
    """Nobody is faster for computing something else."""
    shapes = ((64, 64), (8,))
    trial = contender.make(shapes)
    for _ in range(2):
        params = trial.run()[0]
    p, g = (next(iter(contenders._normal(shapes, seed)))[0, 0] for seed in (0, 1))
    expected = adamw(float(p), float(g), 2 * trial.steps)
    # bfloat16 has 8 bits, and a rounding by chance takes either neighbour in each of two steps; a
    # step is 1e-3, of which 8-bit moments may lose a fifth each time, 4-bit ones 40% of the second.
    is_bf16, is_coded = params[0].dtype == jnp.bfloat16, "-bit moments" in contender.name
    units = 4 if "stochastic" in contender.name else 1
    tolerance = units * 2**-8 * abs(float(p)) if is_bf16 else 4e-4 if is_coded else 1e-5
    assert float(params[0][0, 0]) == pytest.approx(expected, abs=tolerance)
    assert trial.compilations() == 1


XLA_8 = functools.partial(contenders._jadam, kernel="xla", **contenders._8_BITS)
XLA_16 = functools.partial(contenders._jadam, kernel="xla", **contenders._16_BITS)
XLA_COMPENSATED = functools.partial(contenders._compensated, kernel="xla")
MAKERS = {c.name: c.make for c in IN_JAX} | {
    "8-bit moments, XLA": XLA_8,
    "bf16 moments, XLA": XLA_16,
    "compensated bf16 weights, XLA": XLA_COMPENSATED,
}
# Of XLA's own account: bytes a parameter that are temporary, aliased (parameters and state, all
# that is donated) and accessed, at most, and fusions a leaf.
PROGRAMS = {
    # One custom call, inside which XLA counts nothing.
    "jadam step": (0, 12, 0, 0),
    "jadam bf16 moments": (0, 8, 0, 0),
    "jadam 8-bit moments": (0, 4 + 2 + 2 / 128, 0, 0),
    "jadam 4-bit moments": (0, 4 + 1 + 2 / 128, 0, 0),
    "jadam compensated bf16 weights": (0, 2 + 1 + 8, 0, 0),
    "jadam compensated, 8-bit moments": (0, 2 + 1 + 2 + 2 / 128, 0, 0),
    # A fusion makes a leaf's two random words.
    "jadam stochastic, 4-bit moments": (0, 2 + 1 + 2 / 128, 0, 1),
    "jadam step, in a scan": (0, 12, 0, 0),
    # m and v read g and themselves and write themselves (24), p reads m, v, p and writes p (16).
    "jadam update": (0, 12, 40, 3),
    "jadam step, XLA": (0, 12, 40, 3),
    # XLA:CPU has no fusion with two results, and what it can not do in place it copies: both
    # moments (4 bytes; 2 in codes), and what the weights are made of.
    # m is held to its bound beside the stored v, which is read once more.
    "bf16 moments, XLA": (4, 8, 42, 3),
    "8-bit moments, XLA": (2.15, 4 + 2 + 2 / 128, 32.7, 7),
    "compensated bf16 weights, XLA": (7, 2 + 1 + 8, 55, 5),
}


# Of the kernels' programs those whose state is widest and narrowest.
OTHERS = ("jadam bf16 moments", "jadam 8-bit moments", "jadam compensated bf16 weights")
OTHERS += ("jadam step, in a scan", "jadam step, XLA")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.soak) if name in OTHERS else name for name in PROGRAMS],
)
def test_what_the_compiled_step_moves(name, standard_promotion):
    """No temporary of the state's size but those named; state and parameters aliased; one pass,
    or XLA's loops, for each leaf.

    A hundredth of a byte a parameter is left for scalars and the kernel's tables.
    """
    temporary, aliased, accessed, fusions = PROGRAMS[name]
    one, two = (MAKERS[name](((512, 1024),) * leaves).program for leaves in (1, 2))
    parameters = 512 * 1024
    assert one["temporary_bytes"] <= (temporary + 0.01) * parameters
    assert one["aliased_bytes"] >= aliased * parameters
    assert one["accessed_bytes"] <= (accessed + 0.01) * parameters
    assert two["fusion"] - one["fusion"] <= fusions


@pytest.fixture
def measured(monkeypatch):
    """Results of a tiny run with a peer that fails and one that is not installed."""
    failing = functools.partial(contenders._jadam, mu_dtype="int3")
    chosen = (
        contenders.LIMIT,
        contenders.JADAM,
        contenders.Contender("a failing peer", "jax", failing, 20),
        contenders.Contender("a peer", "jax", failing, 20, module="no_such_module"),
        contenders.COPY,
    )
    monkeypatch.setattr(rounds, "CONTENDERS", chosen)
    return rounds.measure(QUICK[1], 2, {})


def test_a_run_from_the_processes_to_the_tables(measured, tmp_path):
    """A peer that cannot be timed is named with its reason, and the others have figures."""
    found = measured["contenders"]
    assert found["a peer"] == {"missing": "not installed"}
    assert re.match(r"\w+Error: ", found["a failing peer"]["missing"])
    assert found["jadam step"]["over limit"]["median"] > 0
    assert found["jadam step"]["compilations"] == 1

    results = {
        "machine": "here",
        "processor": "a processor",
        "versions": {"jax": jax.__version__},
        "kernels": "native",
        "instruction_set": "avx2",
        "targets": [],
        "workloads": {QUICK[1].name: measured},
    }
    assert "not installed" in speed.full_markdown(results)
    assert speed.markdown(results).count("\n") == 4
    picture.write(bars.draw(results), tmp_path / "speed")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert "a failing peer" not in (tmp_path / "speed.svg").read_text()


def test_a_worker_that_dies_takes_only_its_own_contenders():
    """The next call has a new process."""
    with Workers() as workers:
        with pytest.raises(Exception, match="terminated abruptly"):
            workers.call("jax", os._exit, 1)
        assert workers.call("jax", math.sqrt, 4.0) == 2.0


def test_a_worker_ends_with_its_parent_however_that_ended():
    """A bench that was killed leaves no process that holds memory: what both print to closes."""
    program = """
import os, signal
from experiments.bench.rounds import Workers
if __name__ == "__main__":
    print(Workers().call("other", os.getpid), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout.strip().isdigit()


@pytest.mark.parametrize(
    ("median", "verdict"), [(0.9, "met"), (1.04, "tie"), (1.06, "missed"), (None, "not measured")]
)
def test_a_target_within_the_noise_is_a_tie(median, verdict):
    """5% is no difference; a figure that was not measured meets nothing."""
    ratio = None if median is None else {"median": median, "low": median, "high": median}
    target = {"workload": "w", "contender": "c", "reference": "r", "at_most": 1.0}
    rows = speed.target_cells({"targets": [{**target, "measured": ratio}]})
    assert rows == [["w", "c / r ≤ 1.00", report.spread(ratio), verdict]]


def test_a_stopped_bench_goes_on(tmp_path, monkeypatch):
    """What a stopped run has finished is not measured again; without --resume it is."""
    measured = []

    def measure(workload, rounds, pace):
        measured.append(workload.name)
        return {"rounds": rounds}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speed, "measure", measure)
    for resume in (False, True, False):
        config = speed.Config(rounds=5, resume=resume)
        found = speed.measured_once(GPT2, config, {})
        assert found == {"rounds": 5}
    assert len(measured) == 2


def rehearsed(folder, parts):
    """The JSON of each part, and what the command for a GPU printed, of tiny sizes on this CPU."""
    command = [sys.executable, "-m", "experiments.bench.device", "--tiny", "--out", folder]
    answer = subprocess.run(
        [*command, "--parts", *parts],
        check=True,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )
    found = {name: json.loads((folder / f"device-{name}.json").read_text()) for name in parts}
    return found, answer.stdout


@pytest.mark.soak
def test_the_command_for_a_gpu_is_rehearsed(tmp_path_factory):
    """On the day when a device is there, the parts run, rows have figures, tables are made."""
    folder = tmp_path_factory.mktemp("device")
    found, printed = rehearsed(folder, ("numbers", "memory"))
    assert_ran(found)
    for name, row in found["numbers"]["rows"].items():
        assert row["within"], (name, row)
        assert row["kernels"] == int("native" in found["numbers"]["kernels"])
    (smallest,) = (row for key, row in found["memory"]["rows"].items() if "5 bytes" in key)
    assert smallest["least"] / smallest["parameters"] == pytest.approx(5, abs=0.1)
    assert tables.markdown(folder) in printed


def assert_ran(found):
    """Each part has rows, none failed, and says of what it is."""
    for name, part in found.items():
        assert part["versions"]["jax"] == jax.__version__, name
        assert "commit" in part
        bad = {key: row for key, row in part["rows"].items() if "failed" in row}
        assert part["rows"]
        assert not bad, (name, bad)


@pytest.mark.soak
def test_its_timing_is_rehearsed(tmp_path_factory):
    """Every row of JAX's is timed in each round."""
    found, _ = rehearsed(tmp_path_factory.mktemp("device"), ("speed",))
    assert_ran(found)
    framed = [row for row in found["speed"]["rows"].values() if row.get("framework") == "jax"]
    assert [len(row["rates" if "rates" in row else "device"]) for row in framed] == [7] * 4


@pytest.mark.soak
def test_its_training_is_rehearsed(tmp_path_factory):
    """Both settings train, on the same batches."""
    found, _ = rehearsed(tmp_path_factory.mktemp("device"), ("training",))
    assert_ran(found)
    losses = [row["losses"] for row in found["training"]["rows"].values()]
    assert len(losses) == 2
    # The same model, and the same batches: before the warm-up has moved much, the same losses.
    assert losses[0][:5] == pytest.approx(losses[1][:5], rel=1e-3)


def test_rows_are_told_from_messages():
    """A library that prints does not break what a process says."""
    assert heard("WARNING: something\n") is None
    assert heard(f'{MARK}["key", {{"x": 1}}]\n') == ("key", {"x": 1})
