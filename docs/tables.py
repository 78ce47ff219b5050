"""Writes the tables of docs/pages/numbers.md and of the README from the committed results.

`python -m docs.tables` does it, and `make docs` before it builds. Nothing is measured here: the
JSON files come from `make bench`, `make clients` and `python -m experiments.lowmem`. That the
tables are theirs is held by tests/test_readme.py.
"""

import json
from pathlib import Path
from typing import Any

from experiments.bench import accuracy, publish, speed
from experiments.bench.device import tables as device
from experiments.clients import table as clients
from experiments.common import report
from experiments.lowmem import report as lowmem
from experiments.lowmem.long import report as long

ROOT = Path(__file__).parent.parent
WORKLOAD = "GPT-2 124M"
GPU_WORKLOADS = ("GPT-2 124M", "Llama 3 8B, a layer")
# The same for a GPU: the README's words and the bench's.
ON_GPU = {
    "`optax.adamw`": "optax float32",
    "torch, fused": "torch fused float32",
    "`jadam.adamw`, `step`": "jadam float32",
    "bfloat16 weights and moments, `step`": "jadam bf16 weights and moments",
    "torch, fused, bfloat16": "torch fused bf16",
    "8-bit moments, `step`": "jadam 8-bit moments",
    "flashoptim-jax, 8-bit": "flashoptim-jax 8-bit",
    "bfloat16 weights, compensated, `step`": "jadam compensated bf16 weights",
    "bfloat16 weights, compensated, 8-bit moments, `step`": "jadam 7 bytes: compensated, 8-bit",
    "4-bit moments, `step`": "jadam 4-bit moments",
    "bfloat16 weights, stochastic, 4-bit moments, `step`": "jadam 5 bytes: stochastic, 4-bit",
}
# What the README compares: its words, the study of memory's name, the name in the bench.
COSTS = {
    "`optax.adamw`": ("optax.adamw float32", "optax"),
    "`jadam.adamw`, `update`": ("float32", "jadam update"),
    "`jadam.adamw`, `step`": ("float32", "jadam step"),
    "16-bit moments, `step`": ("bf16 moments", "jadam bf16 moments"),
    "8-bit moments, `step`": ("8-bit moments", "jadam 8-bit moments"),
    "4-bit moments, `step`": ("4-bit moments", "jadam 4-bit moments"),
    "bfloat16 weights, compensated, `step`": (
        "bf16 weights, compensated",
        "jadam compensated bf16 weights",
    ),
    "bfloat16 weights, compensated, 8-bit moments, `step`": (
        "bf16 weights, compensated + 8-bit moments",
        "jadam compensated, 8-bit moments",
    ),
    "bfloat16 weights, stochastic, 4-bit moments, `step`": (
        "bf16 weights, stochastic + 4-bit moments",
        "jadam stochastic, 4-bit moments",
    ),
}
# What the page of settings advises, the study of memory's name, and for what.
ADVICE = {
    "the default": ("float32", "whatever fits"),
    "`mu_dtype=jnp.bfloat16, nu_dtype=jnp.bfloat16`": (
        "bf16 moments",
        "half the state",
    ),
    '`mu_dtype="int8", nu_dtype="uint8"`': (
        "8-bit moments",
        "a quarter of the state, float32 weights",
    ),
    '`mu_dtype="int4", nu_dtype="uint4"`': (
        "4-bit moments",
        "an eighth of the state: right in the mean, with noise",
    ),
    "`compensated_weights(tx)`": (
        "bf16 weights, compensated",
        "bfloat16 weights that learn as if they had 24 bits",
    ),
    "`stochastic_rounding(tx)`": (
        "bf16 weights, stochastic",
        "bfloat16 weights without a residual: right in the mean, with noise",
    ),
    "`compensated_weights` around 8-bit moments": (
        "bf16 weights, compensated + 8-bit moments",
        "all of it",
    ),
    "`stochastic_rounding` around 4-bit moments": (
        "bf16 weights, stochastic + 4-bit moments",
        "the least there is",
    ),
}


NOT_MEASURED = "–"


def advice(memory: dict[str, dict[str, float]], losses: dict[str, str]) -> str:
    """What to take for how many bytes a parameter."""
    rows = (
        [f"{memory[name]['live']:.1f}", take, use, losses.get(name, NOT_MEASURED)]
        for take, (name, use) in ADVICE.items()
    )
    return report.table(["bytes", "take", "for", "measured loss against float32"], rows)


def costs(
    times: list[dict[str, Any]], memory: dict[str, dict[str, float]], losses: dict[str, str]
) -> str:
    """What each setting costs: bytes a parameter, milliseconds on each CPU measured, loss."""
    rows = []
    for words, (stored, timed) in COSTS.items():
        found = memory[stored]
        parts = [f"{found[part]:.2f}" for part in ("weights", "gradient", "state", "live")]
        steps = (one["workloads"][WORKLOAD]["contenders"].get(timed, {}) for one in times)
        seconds = [step.get("seconds") for step in steps]
        milliseconds = [f"{1e3 * x['median']:.0f}" if x else NOT_MEASURED for x in seconds]
        rows.append([words, *parts, *milliseconds, losses.get(stored, NOT_MEASURED)])
    columns = ["AdamW", "weights", "gradient", "state", "together"]
    columns += [f"a step, {one['instruction_set']} [ms]" for one in times]
    columns.append("measured loss against float32")
    table = report.table(columns, rows)
    return (
        f"{table}\n\nBytes a parameter, and the time of a step of {WORKLOAD} on each CPU measured "
        f"({'; '.join(map(speed.where, times))}). "
        "The loss is that of validation after the long training of a small language model, in nats "
        "a byte, minus float32's, with a 95% interval "
        "([how](experiments/lowmem/README.md#long-trainings))."
    )


def costs_on_gpu(results: dict[str, Any]) -> str:
    """What a step of each setting takes on the GPU that was measured, beside others."""
    rows = results["rows"]
    copy = max(filter(None, (device.copy_rate(rows, x) for x in ("jax", "torch"))))
    lines = []
    for words, contender in ON_GPU.items():
        timed = [rows[f"{workload} / {contender}"] for workload in GPU_WORKLOADS]
        lines.append(
            [
                words,
                f"{timed[0]['bytes']:.0f}",
                *(f"{1e3 * report.quartiles(row['device'])['median']:.2f}" for row in timed),
                f"{100 * device.rate(timed[-1], 'device') / copy:.0f}%",
            ]
        )
    columns = ["AdamW", "bytes moved", *(f"{x} [ms]" for x in GPU_WORKLOADS), "of a copy's rate"]
    jax, torch = (results["versions"][name] for name in ("jax", "torch"))
    return (
        f"{report.table(columns, lines)}\n\nBytes a parameter, the least that a step can move; the "
        f"share is that of the last column ({results['device']}, jax {jax}, torch {torch}, "
        f"jadam of commit {results['commit']})."
    )


def blocks() -> dict[tuple[str, Path], str]:
    """Each table, by the name between whose markers it stands, and the page."""
    rows = json.loads((publish.RESULTS / "accuracy.json").read_text())
    times = speed.committed()
    on_gpu = json.loads((publish.RESULTS / "device-speed.json").read_text())
    small = json.loads((lowmem.HERE / "results" / "lowmem.json").read_text())
    trained = long.committed()
    losses = long.measured(trained)
    tables = {
        "accuracy": accuracy.markdown(rows),
        "speed": speed.of_each(times, speed.markdown),
        "targets": speed.of_each(times, speed.target_markdown),
        "memory": lowmem.peers_table(small["memory"]),
        "quality": "\n\n".join(
            lowmem.final_table(name, small[name]["settings"])
            for name in lowmem.TITLES
            if name in small
        ),
        "long": long.markdown(trained),
    }
    others = report.NUMBERS.with_name("clients.md")
    programs = clients.committed()
    settings = report.NUMBERS.with_name("settings.md")
    written = {(name, report.NUMBERS): table for name, table in tables.items()}
    return written | {
        ("bytes", settings): advice(small["memory"], losses),
        ("costs", ROOT / "README.md"): costs(times, small["memory"], losses),
        ("costs on a GPU", ROOT / "README.md"): costs_on_gpu(on_gpu),
        ("clients", others): clients.markdown(programs),
        ("optax's tests", others): clients.markdown_of_tests(programs),
        ("gpu", report.NUMBERS): costs_on_gpu(on_gpu),
    }


def main() -> None:
    """Writes all of them."""
    for (name, page), table in blocks().items():
        report.update_readme(name, table, page)


if __name__ == "__main__":
    main()
