"""Time of one Adam step, optax and jadam side by side.

    python -m experiments.bench.speed

Every round runs each contender once on donated buffers, in turn, so that a machine whose speed
wanders slows all of them alike; a ratio compares times of the same round. Figures are medians,
with the quartiles as spread.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jadam
from experiments.bench import report

WORKLOADS = {
    "1 leaf of 20M": [20_000_000],
    "300 leaves of 100k": [100_000] * 300,
    "2,000 leaves of 2k": [2_000] * 2_000,
}
ROUNDS = 15
LEARNING_RATE = 1e-3

Tree = list[jax.Array]


def _adam(library: Any, sizes: list[int]) -> Callable[[], None]:
    """One donated step: new parameters and state from gradients."""
    tx = library.adam(LEARNING_RATE)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Tree, state: Any, grads: Tree) -> tuple[Tree, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = [jnp.ones(n) for n in sizes]
    grads = [jnp.full(n, 0.1) for n in sizes]
    held = [params, jax.jit(tx.init)(params)]

    def run() -> None:
        held[:] = jax.block_until_ready(step(*held, grads))

    return run


def seconds(run: Callable[[], None]) -> float:
    """The wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def quartiles(values: list[float]) -> dict[str, float]:
    """Median and spread."""
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "low": low, "high": high}


def measure(name: str, sizes: list[int]) -> dict[str, Any]:
    """Seconds a step of each contender, and the ratio of jadam to optax in the same round."""
    contenders = {"jadam": _adam(jadam, sizes), "optax": _adam(optax, sizes)}
    for run in contenders.values():
        run()
    rounds = [
        {contender: seconds(run) for contender, run in contenders.items()}
        for _ in track(range(ROUNDS), name)
    ]
    times = {contender: quartiles([r[contender] for r in rounds]) for contender in contenders}
    return {
        "seconds": times,
        "jadam_over_optax": quartiles([r["jadam"] / r["optax"] for r in rounds]),
    }


COLUMNS = ("workload", "jadam [ms]", "optax [ms]", "jadam / optax")


def cells(results: dict[str, Any]) -> list[list[str]]:
    """The table's rows: medians, and the ratio of times in the same round with its quartiles."""
    rows = []
    for name, result in results["workloads"].items():
        ratio, seconds = result["jadam_over_optax"], result["seconds"]
        rows.append(
            [
                name,
                *(f"{1e3 * seconds[key]['median']:.1f}" for key in ("jadam", "optax")),
                f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})",
            ]
        )
    return rows


def markdown(results: dict[str, Any]) -> str:
    """The results as the project's README shows them."""
    rows = [list(COLUMNS), ["---"] * len(COLUMNS), *cells(results)]
    machine = f"{results['machine']}, jax {results['versions']['jax']}"
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + f"\n\n({machine})"


def main() -> None:
    """Measure, print, write the JSON, and bring the README up to date."""
    workloads = {name: measure(name, sizes) for name, sizes in WORKLOADS.items()}
    results = {**report.provenance("python -m experiments.bench.speed"), "workloads": workloads}
    table = Table(*COLUMNS, title="One Adam step")
    for row in cells(results):
        table.add_row(*row)
    console = Console()
    console.print(table)
    console.print(f"written to {report.write('speed', results)}")
    report.update_readme("speed", markdown(results))


if __name__ == "__main__":
    main()
