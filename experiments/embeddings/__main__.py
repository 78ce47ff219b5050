"""What a step on the touched rows costs, and what it learns: `python -m experiments.embeddings`.

All contenders are timed in one interleaved run: each round times each of them once, torch where it
is installed. Under `speed` a step is the optimizer's alone, from gradients that are there: of the
rows for the lazy ones, of the whole table for the dense ones. Under `learned` it is the step of a
training, with the loss and its gradient.
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

from . import nextword

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "embeddings.json"
SIZES = tuple(2**k for k in (14, 16, 18, 20))
ROUNDS = 31
LEARNING_RATE = 1e-2
LEARNED_SIZE, LEARNED_STEPS = 2**20, 60
Step = Callable[[np.ndarray, np.ndarray], float]


def timed(step: Callable[[], Any]) -> float:
    """Milliseconds."""
    start = time.perf_counter()
    jax.block_until_ready(step())
    return 1e3 * (time.perf_counter() - start)


CODES: dict[str, Any] = {"mu_dtype": "int8", "nu_dtype": "uint8"}


def moments(size: int) -> tuple[jax.Array, jax.Array]:
    """Those of a table that has learned for long: no row is as at the start."""
    m, v = jax.random.normal(jax.random.key(1), (2, size, nextword.WIDTH))
    return 1e-2 * m, 1e-3 * v**2


def by_rows(size: int, *, gathers: bool, storage: Any = None, **options: Any) -> Step:
    """A step of jadam.rows; every row has missed a thousand steps."""
    rows = jadam.rows.lazy(jadam.adam(LEARNING_RATE, **(storage or {})), **options)
    table = nextword.table(size)
    state = rows.init(table)
    learned = state.dense[0]._replace(count=jnp.int32(1000))
    if storage is None:
        mu, nu = moments(size)
        learned = learned._replace(mu=mu, nu=nu)
    carry = [table, state._replace(dense=(learned, *state.dense[1:]))]

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
    table = nextword.table(size)
    carry = [table, tx.init(table)]

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(table: Any, state: Any, grads: Any) -> Any:
        if fused:
            return tx.step(grads, state, table)
        updates, state = tx.update(grads, state, table)
        return optax.apply_updates(table, updates), state

    def run(ids: np.ndarray, grads: np.ndarray) -> float:
        whole = jnp.zeros((size, nextword.WIDTH)).at[ids].add(grads).block_until_ready()
        return timed(lambda: carry.__setitem__(slice(None), step(*carry, whole)) or carry)

    return run


def torch_sparse(size: int) -> Step:
    """A step of torch.optim.SparseAdam."""
    import torch

    table = torch.nn.Parameter(torch.tensor(np.asarray(nextword.table(size))))
    optimizer = torch.optim.SparseAdam([table], lr=LEARNING_RATE)
    m, v = (torch.tensor(np.asarray(x)) for x in moments(size))
    optimizer.state[table] = {"step": 1000, "exp_avg": m, "exp_avg_sq": v}

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
        ids = rng.integers(0, size, nextword.IDS)
        grads = rng.standard_normal((nextword.IDS, nextword.WIDTH), np.float32)
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
    table = jax.ShapeDtypeStruct((size, nextword.WIDTH), jnp.float32)

    def of(init: Callable[[Any], Any]) -> float:
        leaves = jax.tree.leaves(jax.eval_shape(init, table))
        return sum(x.size * x.dtype.itemsize for x in leaves) / table.size

    coded = jadam.adam(LEARNING_RATE, **CODES)
    return {
        "optax dense": of(optax.adam(LEARNING_RATE).init),
        "jadam.rows": of(jadam.rows.lazy(jadam.adam(LEARNING_RATE)).init),
        "jadam.rows, 8-bit": of(jadam.rows.lazy(coded).init),
    }


Losses = Callable[[np.ndarray], float]


def learned_by_rows(tx: Any, **options: Any) -> tuple[Losses, Callable[[], Any]]:
    """A training step by rows, and the table that it has made."""
    rows = jadam.rows.lazy(tx, **options)
    table = nextword.table(LEARNED_SIZE)
    carry = [table, rows.init(table)]

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(table: Any, state: Any, ids: Any) -> Any:
        vectors = rows.gather(table, state, ids)
        value, grads = jax.value_and_grad(nextword.loss)(vectors)
        return *rows.scatter(grads, ids, table, state), value

    def run(ids: np.ndarray) -> float:
        *carry[:], value = step(*carry, ids)
        return float(value)

    return run, lambda: rows.flush(*carry)[0]


def learned_densely(tx: Any) -> tuple[Losses, Callable[[], Any]]:
    """A training step of all rows, and the table that it has made."""
    table = nextword.table(LEARNED_SIZE)
    carry = [table, tx.init(table)]

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(table: Any, state: Any, ids: Any) -> Any:
        value, grads = jax.value_and_grad(lambda t: nextword.loss(t[ids]))(table)
        updates, state = tx.update(grads, state, table)
        return optax.apply_updates(table, updates), state, value

    def run(ids: np.ndarray) -> float:
        *carry[:], value = step(*carry, ids)
        return float(value)

    return run, lambda: carry[0]


def learned_by_torch() -> tuple[Losses, Callable[[], Any]]:
    """A training step of torch.optim.SparseAdam, and the table that it has made."""
    import torch

    table = torch.tensor(np.asarray(nextword.table(LEARNED_SIZE)))
    embedding = torch.nn.Embedding.from_pretrained(table, freeze=False, sparse=True)
    optimizer = torch.optim.SparseAdam(embedding.parameters(), lr=LEARNING_RATE)

    def run(ids: np.ndarray) -> float:
        vectors = embedding(torch.tensor(ids))
        context = vectors[:, : nextword.ORDERS].sum(1)
        scores = torch.einsum("pw,pcw->pc", context, vectors[:, nextword.ORDERS :])
        signs = torch.where(torch.arange(scores.shape[1]) == 0, 1.0, -1.0)
        value = -torch.nn.functional.logsigmoid(signs * scores).sum(1).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        return value.item()

    return run, lambda: embedding.weight.detach().numpy()


def learned() -> dict[str, Any]:
    """Losses, distances from dense jadam and times of a training, all on the same batches."""
    runs = {
        "jadam dense": learned_densely(jadam.adam(LEARNING_RATE)),
        "optax dense": learned_densely(optax.adam(LEARNING_RATE)),
        "jadam.rows": learned_by_rows(jadam.adam(LEARNING_RATE)),
        "jadam.rows, 8-bit": learned_by_rows(jadam.adam(LEARNING_RATE, **CODES), catch_up="sum"),
        "jadam.rows, catch_up=False": learned_by_rows(jadam.adam(LEARNING_RATE), catch_up=False),
    }
    if importlib.util.find_spec("torch"):
        runs["torch SparseAdam"] = learned_by_torch()
    batches, touched = nextword.batches(LEARNED_SIZE, 0), set[int]()
    losses: dict[str, list[float]] = {name: [] for name in runs}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(LEARNED_STEPS):
        ids = next(batches)
        touched.update(ids.reshape(-1).tolist())
        for name, (step, _) in runs.items():
            start = time.perf_counter()
            losses[name].append(step(ids))
            times[name].append(1e3 * (time.perf_counter() - start))
    reference = np.asarray(runs["jadam dense"][1]())
    contexts, targets = nextword.ngrams(LEARNED_SIZE)
    return {
        "rows": LEARNED_SIZE,
        "rows_of_the_text": np.union1d(contexts, targets).size,
        "rows_touched": len(touched),
        "steps": LEARNED_STEPS,
        "runs": {
            name: {
                "loss": float(np.mean(losses[name][LEARNED_STEPS // 2 :])),
                "loss_distance": float(
                    np.abs(np.subtract(losses[name], losses["jadam dense"])).max()
                ),
                "table_rms_distance": float(
                    np.sqrt(np.mean((np.asarray(table()) - reference) ** 2))
                ),
                "best_ms": min(times[name][2:]),
                "ms": report.quartiles(times[name][2:]),
            }
            for name, (_, table) in runs.items()
        },
    }


def picture_of(results: dict[str, Any]) -> Figure:
    """The time of a step against the number of rows."""
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    sizes = [int(size) for size in results["speed"]]
    styles = {
        "optax dense": (palette.BLACK, "s-"),
        "jadam dense": (palette.PINK, "s-"),
        "torch SparseAdam": (palette.ORANGE, "^-"),
        "jadam.rows, 8-bit": (palette.RED, "o-"),
        "jadam.rows, gather and scatter": (palette.SKY, "o-"),
        "jadam.rows, scatter": (palette.BLUE, "o-"),
        "jadam.rows, catch_up=False": (palette.GREEN, "o--"),
    }
    for name, (colour, style) in styles.items():
        if name not in results["speed"][str(sizes[0])]:
            continue
        best = [results["speed"][str(size)][name]["best_ms"] for size in sizes]
        axes.loglog(sizes, best, style, color=colour, label=name, markersize=5)
    axes.set(xlabel=f"rows of {nextword.WIDTH} numbers", ylabel="a step, best round [ms]")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    ticks = (0.5, 1, 2, 5, 10, 20, 50, 100)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(visible=True, alpha=0.25)
    axes.set_title(f"A batch of {nextword.IDS:,} ids: rows that are not touched cost nothing")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
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
    runs = results["learned"]["runs"]
    learned_rows = [
        [
            f"`{name}`",
            f"{x['loss']:.4f}",
            f"{x['loss_distance']:.1e}",
            f"{x['table_rms_distance']:.1e}",
            f"{x['best_ms']:.1f}",
            f"{x['ms']['median']:.1f}",
        ]
        for name, x in runs.items()
    ]
    bytes_rows = [[f"`{name}`", f"{x:.2f}"] for name, x in results["state_bytes"].items()]
    names = ["next word", "loss", "largest distance from jadam dense", "table, root mean square"]
    names += ["ms a training step, best", "median"]
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
