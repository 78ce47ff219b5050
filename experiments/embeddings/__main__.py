"""What a step on the touched rows costs, and what it learns: `python -m experiments.embeddings`.

All contenders are timed in one interleaved run: each round times each of them once. torch is timed
where it is installed. A step is the optimizer's alone, from gradients that are there: of the rows
for the lazy ones, of the whole table for the dense ones.
"""

import functools
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.console import Console

import jadam
from experiments.common import palette, picture, report

from . import skipgram

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "embeddings.json"
SIZES = tuple(2**k for k in (14, 16, 18, 20))
ROUNDS = 31
LEARNING_RATE = 1e-2
LEARNED_SIZE, LEARNED_STEPS = 2**15, 300
Step = Callable[[np.ndarray, np.ndarray], float]


def timed(step: Callable[[], Any]) -> float:
    """Milliseconds."""
    start = time.perf_counter()
    jax.block_until_ready(step())
    return 1e3 * (time.perf_counter() - start)


CODES: dict[str, Any] = {"mu_dtype": "int8", "nu_dtype": "uint8"}


def by_rows(size: int, *, gathers: bool, storage: Any = None, **options: Any) -> Step:
    """A step of jadam.rows; every row has missed a thousand steps."""
    rows = jadam.rows.lazy(jadam.adam(LEARNING_RATE, **(storage or {})), **options)
    table = skipgram.table(size)
    state = rows.init(table)
    moments = state.dense[0]._replace(count=jnp.int32(1000))
    carry = [table, state._replace(dense=(moments, *state.dense[1:]))]

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(table: Any, state: Any, ids: Any, grads: Any) -> Any:
        if gathers:
            # So that the gradient depends on them, as a loss's does.
            grads += 1e-9 * rows.gather(table, state, ids)
        return rows.scatter(grads, ids, table, state)

    def run(ids: np.ndarray, grads: np.ndarray) -> float:
        device = jax.block_until_ready((jnp.asarray(ids), jnp.asarray(grads)))
        return timed(lambda: carry.__setitem__(slice(None), step(*carry, *device)) or carry)

    return run


def dense(size: int, tx: Any, *, fused: bool) -> Step:
    """A step of a dense transformation."""
    table = skipgram.table(size)
    carry = [table, tx.init(table)]

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(table: Any, state: Any, grads: Any) -> Any:
        if fused:
            return tx.step(grads, state, table)
        updates, state = tx.update(grads, state, table)
        return optax.apply_updates(table, updates), state

    def run(ids: np.ndarray, grads: np.ndarray) -> float:
        whole = jnp.zeros((size, skipgram.WIDTH)).at[ids].add(grads).block_until_ready()
        return timed(lambda: carry.__setitem__(slice(None), step(*carry, whole)) or carry)

    return run


def torch_sparse(size: int) -> Step:
    """A step of torch.optim.SparseAdam."""
    import torch

    table = torch.nn.Parameter(torch.tensor(np.asarray(skipgram.table(size))))
    optimizer = torch.optim.SparseAdam([table], lr=LEARNING_RATE)

    def run(ids: np.ndarray, grads: np.ndarray) -> float:
        table.grad = torch.sparse_coo_tensor(
            torch.tensor(ids[None]), torch.tensor(grads), table.shape, check_invariants=True
        )
        start = time.perf_counter()
        optimizer.step()
        return 1e3 * (time.perf_counter() - start)

    return run


def contenders(size: int) -> dict[str, Step]:
    """By name."""
    found = {
        "jadam.rows, scatter": by_rows(size, gathers=False),
        "jadam.rows, gather and scatter": by_rows(size, gathers=True),
        "jadam.rows, catch_up=False": by_rows(size, gathers=False, catch_up=False),
        "jadam.rows, 8-bit": by_rows(size, gathers=True, storage=CODES, catch_up="sum"),
        "jadam dense": dense(size, jadam.adam(LEARNING_RATE), fused=True),
        "optax dense": dense(size, optax.adam(LEARNING_RATE), fused=False),
    }
    if importlib.util.find_spec("torch"):
        found["torch SparseAdam"] = torch_sparse(size)
    return found


def speed(size: int) -> dict[str, Any]:
    """The time of a step of each contender, and its ratio to jadam.rows round by round."""
    rng, steps = np.random.default_rng(0), contenders(size)
    rounds = []
    for _ in range(ROUNDS + 2):
        ids = rng.integers(0, size, skipgram.IDS)
        grads = rng.standard_normal((skipgram.IDS, skipgram.WIDTH), np.float32)
        rounds.append({name: step(ids, grads) for name, step in steps.items()})
    rounds = rounds[2:]
    own = "jadam.rows, scatter"
    return {
        name: {
            "ms": report.quartiles([r[name] for r in rounds]),
            "best_ms": min(r[name] for r in rounds),
            "times_own": report.quartiles([r[name] / r[own] for r in rounds]),
        }
        for name in steps
    }


def state_bytes(size: int) -> dict[str, float]:
    """The bytes of a state for each parameter of the table."""
    table = jax.ShapeDtypeStruct((size, skipgram.WIDTH), jnp.float32)

    def of(init: Callable[[Any], Any]) -> float:
        leaves = jax.tree.leaves(jax.eval_shape(init, table))
        return sum(x.size * x.dtype.itemsize for x in leaves) / table.size

    coded = jadam.adam(LEARNING_RATE, **CODES)
    return {
        "optax dense": of(optax.adam(LEARNING_RATE).init),
        "jadam.rows": of(jadam.rows.lazy(jadam.adam(LEARNING_RATE)).init),
        "jadam.rows, 8-bit": of(jadam.rows.lazy(coded).init),
    }


def learned() -> dict[str, dict[str, float]]:
    """The mean loss of the last 50 batches, and the greatest distance from dense jadam."""
    tx = jadam.adam(LEARNING_RATE)

    def by_rows(tx: Any = tx, **options: Any) -> tuple[list[float], Any]:
        rows = jadam.rows.lazy(tx, **options)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(table: Any, state: Any, ids: Any) -> Any:
            vectors = rows.gather(table, state, ids)
            value, grads = jax.value_and_grad(skipgram.loss)(vectors)
            return *rows.scatter(grads, ids, table, state), value

        table = skipgram.table(LEARNED_SIZE)
        losses, (table, state) = run(step, table, rows.init(table))
        return losses, rows.flush(table, state)[0]

    def dense(tx: Any) -> tuple[list[float], Any]:
        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(table: Any, state: Any, ids: Any) -> Any:
            value, grads = jax.value_and_grad(lambda t: skipgram.loss(t[ids]))(table)
            updates, state = tx.update(grads, state, table)
            return optax.apply_updates(table, updates), state, value

        table = skipgram.table(LEARNED_SIZE)
        losses, (table, _) = run(step, table, tx.init(table))
        return losses, table

    def run(step: Any, table: Any, state: Any) -> tuple[list[float], Any]:
        losses, batches = [], skipgram.batches(LEARNED_SIZE, 0)
        for _ in range(LEARNED_STEPS):
            table, state, value = step(table, state, next(batches))
            losses.append(float(value))
        return losses, (table, state)

    runs = {
        "jadam dense": dense(tx),
        "jadam.rows": by_rows(),
        "jadam.rows, 8-bit": by_rows(jadam.adam(LEARNING_RATE, **CODES), catch_up="sum"),
        "optax dense": dense(optax.adam(LEARNING_RATE)),
        "jadam.rows, catch_up=False": by_rows(catch_up=False),
    }
    reference, table = runs["jadam dense"]
    return {
        name: {
            "loss": float(np.mean(losses[-50:])),
            "loss_distance": float(np.abs(np.subtract(losses, reference)).max()),
            "table_rms_distance": float(jnp.sqrt(jnp.mean((found - table) ** 2))),
        }
        for name, (losses, found) in runs.items()
    }


def picture_of(results: dict[str, Any]) -> Figure:
    """The time of a step against the number of rows."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    colours = (*palette.SIX, palette.ORANGE)
    sizes = [int(size) for size in results["speed"]]
    for name, colour in zip(results["speed"][str(sizes[0])], colours, strict=False):
        best = [results["speed"][str(size)][name]["best_ms"] for size in sizes]
        axes.loglog(sizes, best, "o-", color=colour, label=name)
    axes.set(xlabel=f"rows of {skipgram.WIDTH}", ylabel="a step, best round [ms]")
    axes.set_title(f"{skipgram.IDS} ids a batch: what is not touched costs nothing")
    axes.legend(frameon=False)
    return figure


def markdown(results: dict[str, Any]) -> str:
    """The tables of the README."""
    largest = list(results["speed"])[-1]
    own = results["speed"][largest]["jadam.rows, scatter"]["best_ms"]
    speed_rows = [
        [
            f"`{name}`",
            *(f"{results['speed'][size][name]['best_ms']:.1f}" for size in results["speed"]),
            f"{results['speed'][largest][name]['best_ms'] / own:.2f}",
            report.spread(results["speed"][largest][name]["times_own"]),
        ]
        for name in results["speed"][largest]
    ]
    columns = ["ms a step, best", *(f"{int(size):,} rows" for size in results["speed"])]
    columns += ["beside jadam.rows, most rows", "in the same round"]
    learned_rows = [
        [
            f"`{name}`",
            f"{x['loss']:.4f}",
            f"{x['loss_distance']:.1e}",
            f"{x['table_rms_distance']:.1e}",
        ]
        for name, x in results["learned"].items()
    ]
    bytes_rows = [[f"`{name}`", f"{x:.2f}"] for name, x in results["state_bytes"].items()]
    names = ["skip-gram", "loss", "largest distance from jadam dense", "table, root mean square"]
    tables = [
        report.table(columns, speed_rows),
        report.table(["state", "bytes a parameter"], bytes_rows),
        report.table(names, learned_rows),
    ]
    return "\n\n".join(tables)


def main() -> None:
    """Measure, and write JSON, picture and tables."""
    console = Console()
    results = report.provenance("python -m experiments.embeddings")
    results["processor"] = report.processor()
    results["learned"] = learned()
    console.print(results["learned"])
    results["state_bytes"] = state_bytes(SIZES[-1])
    results["speed"] = {}
    for size in SIZES:
        results["speed"][str(size)] = speed(size)
        console.print(size, results["speed"][str(size)])
    report.write_json(RESULTS, results)
    picture.write(picture_of(results), HERE / "results" / "embeddings")
    report.update_readme("embeddings", markdown(results), HERE / "README.md")


if __name__ == "__main__":
    main()
