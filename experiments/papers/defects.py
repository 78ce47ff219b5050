"""A gallery of what goes wrong in today's Adams, each computed side by side with jadam.

    python -m experiments.papers.defects

The rows of the table of accuracy, as curves: optax and jadam through the same code,
float64 as the judge, flashoptim-jax (8-bit moments) where it is installed. Nothing is stated: a row
that a newer optax has mended says so.

- Kingma & Ba (2015), algorithm 1, divides by 1 - b2ᵗ, which float32 does not hold.
- 8-bit moments: Gupta et al. (2026), "FlashOptim", arXiv 2602.23349, and stale states in low
  precision, arXiv 2603.16731.
"""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.progress import track

import jadam
from experiments.common import accuracy
from experiments.common.palette import BLACK, BLUE, GREEN, PURPLE, RED
from experiments.papers.publish import RUNS, Claim, command_line, digits, publish
from experiments.papers.step_bound import bound

LIBRARIES: dict[str, ModuleType] = {"optax": optax, "jadam": jadam}
PEER = "flashoptim-jax"
SHOWN = {"optax": f"optax {optax.__version__}"}
ROWS = {row.name: row for row in accuracy.ROWS}
COLOURS = {"exact": BLACK, "optax": RED, "jadam": BLUE, PEER: PURPLE, "bound": GREEN}


@dataclass(frozen=True)
class Config:
    """The gallery of defects."""

    out: Path = RUNS
    """The folder for JSON and pictures."""


class Result(NamedTuple):
    """What one library does in a panel.

    `says` is the figure that decides and `right` what it decides; no curve where it is one word.
    """

    says: str
    right: bool | None
    y: Any = ()


class Panel(NamedTuple):
    """One defect: a result for each library and the exact one, over x.

    `figure` names what each result says.
    """

    title: str
    figure: str
    results: dict[str, Result]
    x: Any = ()
    xlabel: str = ""
    ylabel: str = ""
    scales: tuple[str, str] = ("linear", "linear")
    limits: tuple[float, float] | None = None


def close(value: Any, exact: float, relative: float, absolute: float = 0.0) -> bool:
    """Whether a figure is a number, and the right one."""
    return isinstance(value, float | int) and math.isclose(
        value, exact, rel_tol=relative, abs_tol=absolute
    )


def decided(row: str, library: str, relative: float, y: Any, absolute: float = 0.0) -> Result:
    """A result by a row of the accuracy table."""
    value = accuracy.measured(ROWS[row], LIBRARIES[library])
    exact = ROWS[row].exact
    right = value == exact if isinstance(exact, str) else close(value, exact, relative, absolute)
    return Result(accuracy.shown(ROWS[row], value), right, y)


def along(tx: optax.GradientTransformation, gradients: jax.Array) -> np.ndarray:
    """The updates along gradients [steps, ...], in float64."""

    def step(state: Any, g: jax.Array) -> tuple[Any, jax.Array]:
        updates, state = tx.update(g, state)
        return state, updates

    run = jax.jit(lambda state, gs: jax.lax.scan(step, state, gs)[1])
    return np.asarray(run(tx.init(gradients[0]), gradients), np.float64)


def first_steps() -> Panel:
    """The relative error of the update along a constant gradient, b2 = .99999."""
    t = np.unique(np.geomspace(1, 100_000, 100).astype(int))
    results = {}
    for name, library in LIBRARIES.items():
        updates = along(library.adam(1.0, b2=0.99999, eps=0.0), jnp.ones(t[-1]))
        error = np.maximum(np.abs(updates + 1), 1e-8)
        peaks = [piece.max() for piece in np.split(error, t[:-1])]
        # float32's own rounding, 100,000 times, stays under 1e-5.
        results[name] = decided("drift_b2_0.99999", name, 0, peaks, absolute=1e-5)
    return Panel(
        "float32 bias correction is off",
        "error up to",
        {"exact": Result("0", True), **results},
        *(t, "step (constant gradient, b2 = .99999)", "error of the update"),
        ("log", "log"),
    )


def stuck_second_moment() -> Panel:
    """v of a bfloat16 parameter along 3,000 gradients of 1 and 3,000 of 0.01."""
    gradients = np.repeat([1.0, float(jnp.bfloat16(0.01))], 3000)
    t, exact, v = np.arange(1, 6001), [], 0.0
    for g in gradients:
        v += 0.001 * (g * g - v)
        exact.append(v)

    def second_moments(library: ModuleType) -> np.ndarray:
        tx = library.scale_by_adam()

        def step(state: Any, g: jax.Array) -> tuple[Any, jax.Array]:
            state = tx.update(g, state)[1]
            return state, state.nu

        run = jax.jit(lambda state, gs: jax.lax.scan(step, state, gs)[1])
        found = run(tx.init(jnp.ones((), jnp.bfloat16)), jnp.asarray(gradients, jnp.bfloat16))
        return np.asarray(found, np.float64)

    shown = slice(0, None, 60)
    row = "bfloat16_shrink"
    results = {
        name: decided(row, name, 0.01, second_moments(library)[shown])
        for name, library in LIBRARIES.items()
    }
    return Panel(
        "bfloat16: the second moment sticks",
        "v ends at",
        {
            "exact": Result(accuracy.shown(ROWS[row], ROWS[row].exact), True, exact[shown]),
            **results,
        },
        *(t[shown], "step (gradients of 1, then of 0.01)", "v"),
    )


def stuck_parameter() -> Panel:
    """A bfloat16 parameter at 1.0 under 1,000 steps of 1e-3 each.

    No optimizer alone can move it, jadam's neither: it takes `jadam.compensated_weights`.
    """
    wrapped = {
        "optax": optax.adam(1e-3),
        "jadam": jadam.compensated_weights(jadam.adam(1e-3)),
    }
    results = {}
    for name, tx in wrapped.items():

        def step(carry: Any, _: None, tx: Any = tx) -> tuple[Any, jax.Array]:
            params, state = carry
            updates, state = tx.update(jnp.ones_like(params), state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        params = jnp.ones(1, jnp.bfloat16)
        _, path = jax.jit(lambda carry, step=step: jax.lax.scan(step, carry, length=1000))(
            (params, tx.init(params))
        )
        path = np.asarray(path, np.float64)[:, 0]
        results[name] = Result(f"{abs(path[-1]):.3f}", close(path[-1], 0, 0, 0.01), path[::10])
    t = np.arange(1, 1001)
    return Panel(
        "bfloat16: a weight at 1.0 never moves",
        "weight ends at",
        {"exact": Result("0.000", True, (1 - 1e-3 * t)[::10]), **results},
        *(t[::10], "step of 1e-3 (jadam: compensated_weights)", "weight"),
    )


def first_updates(library: ModuleType, sizes: jax.Array) -> np.ndarray:
    """-update/α of a first step, for each gradient."""
    tx = library.adam(1.0)
    updates = jax.jit(lambda g: tx.update(g, tx.init(g))[0])(sizes)
    return -np.asarray(updates, np.float64)


def sizes_of_gradients(
    dtype: str, exponents: np.ndarray, row: str, title: str, figure: str
) -> Panel:
    """The first update over gradients of every size that `dtype` holds, and the row's figure."""
    sizes = jnp.asarray(10.0**exponents, dtype)
    exact = np.asarray(sizes, np.float64)
    exact = exact / (exact + 1e-8)
    results = {}
    for name, library in LIBRARIES.items():
        found = first_updates(library, sizes)
        one = decided(row, name, 1e-3, np.clip(found, 0, 2))
        near = bool(np.all(np.abs(found - exact) <= 2e-3))
        results[name] = one._replace(right=bool(one.right) and near)
    says = accuracy.shown(ROWS[row], ROWS[row].exact)
    return Panel(
        title,
        figure,
        {"exact": Result(says, True, exact), **results},
        *(np.asarray(sizes, np.float64), f"gradient, {dtype}", "-update / learning rate"),
        ("log", "linear"),
        (-0.1, 2.1),
    )


def slope() -> Panel:
    """The derivative of the update by the gradient, eps/(|g| + eps)² for the first step."""
    g = np.arange(-50, 51) * 1e-9
    gradients = jnp.asarray(g, jnp.float32)
    results = {}
    for name, library in LIBRARIES.items():

        def moved(g: jax.Array, library: ModuleType = library) -> jax.Array:
            tx = library.adam(1.0)
            return -tx.update(g, tx.init(g))[0]

        slopes = np.asarray(jax.jit(jax.vmap(jax.grad(moved)))(gradients), np.float64)
        results[name] = decided("slope_at_zero", name, 1e-3, slopes * 1e-8)
    row = ROWS["slope_at_zero"]
    exact = 1e-16 / (np.abs(g) + 1e-8) ** 2
    return Panel(
        "The gradient through the update is NaN",
        "slope at 0 is",
        {"exact": Result(accuracy.shown(row, row.exact), True, exact), **results},
        *(g * 1e8, "gradient / eps", "eps · d update / d gradient"),
        ("linear", "linear"),
        (-0.1, 1.1),
    )


def peer_updates(gradients: np.ndarray) -> np.ndarray | None:
    """|update|/α of flashoptim-jax, or None where it is not installed."""
    if importlib.util.find_spec("flashoptim_jax") is None:
        return None
    from flashoptim_jax import flash_adamw

    # Its fused kernel is for GPUs; float32 parameters need no residual.
    tx: Any = flash_adamw(1.0, weight_decay=0.0, master_weight_bits=None, fused=False)
    params = jnp.zeros(gradients.shape[1:])

    def step(state: Any, g: jax.Array) -> tuple[Any, jax.Array]:
        moved, state = tx.step(params, state, g)
        return state, moved

    run = jax.jit(lambda state, gs: jax.lax.scan(step, state, gs)[1])
    return np.abs(np.asarray(run(tx.init(params), jnp.asarray(gradients)), np.float64))


def in_8_bits(gradients: np.ndarray) -> dict[str, np.ndarray | None]:
    """|update|/α along gradients [steps, 32] with moments in 8 bits, by both that have them."""
    tx = jadam.adam(1.0, mu_dtype="int8", nu_dtype="uint8", min_size=0)
    ours = np.abs(along(tx, jnp.asarray(gradients)))
    return {PEER: peer_updates(gradients), "jadam": ours}


def beyond_the_bound() -> Panel:
    """One gradient of a block alternates ±1, the others are 1e-3, one of them 0 at times."""
    t = np.arange(2000)
    gradients = np.full((2000, 32), 1e-3, np.float32)
    gradients[:, 0] = np.where(t % 2, -1, 1)
    gradients[49::50, 1] = 0
    limits = bound(t + 1)
    results = {"bound": Result(f"{limits[-1]:.2f}", True, limits[::10])}
    for name, sizes in in_8_bits(gradients).items():
        if sizes is None:
            results[name] = Result("not installed", None)
            continue
        largest = sizes.max(1)
        right = bool(np.all(largest <= limits * (1 + 1e-5)))
        results[name] = Result(f"{largest.max():,.2f}", right, largest.reshape(-1, 10).max(1))
    return Panel(
        "8-bit moments: steps beyond Adam's bound",
        "steps up to",
        results,
        *(t[::10] + 1, "step (one block of 32)", "largest |update| / learning rate"),
        ("linear", "log"),
    )


def stale() -> Panel:
    """One gradient of a block goes on at 1, the others fall from 1 to 0.01 after 500 steps."""
    gradients = np.ones((12_000, 32), np.float32)
    gradients[500:, 1:] = 0.01
    m = v = 0.0
    exact = []
    for t, g in enumerate(gradients[:, 1].astype(np.float64), 1):
        m, v = m + 0.1 * (g - m), v + 0.001 * (g * g - v)
        exact.append(m / (1 - 0.9**t) / math.sqrt(v / (1 - 0.999**t)))
    exact = np.array(exact).reshape(-1, 100).mean(1)
    results = {"exact": Result(f"{exact[-1]:.2f}", True, exact)}
    for name, sizes in in_8_bits(gradients).items():
        if sizes is None:
            results[name] = Result("not installed", None)
            continue
        means = sizes[:, 1:].mean(1).reshape(-1, 100).mean(1)
        right = close(float(means[-1]), float(exact[-1]), 0.1)
        results[name] = Result(f"{means[-1]:.2f}", right, means)
    return Panel(
        "8-bit moments: a stale v stops the weight",
        "step ends at",
        results,
        *(np.arange(50, 12_000, 100), "step (gradients fall 100x at 500)"),
        "|update| / learning rate",
    )


WORDS = {
    "amsgrad in lax.scan": "scan_amsgrad",
    "adamax in lax.scan": "scan_adamax",
    "radam in lax.scan": "scan_radam",
    "adam, strict promotion": "strict",
    "radam's first adaptive step": "radam_start",
}


def words() -> dict[str, Panel]:
    """The rows whose answer is one word."""
    return {
        title: Panel(
            title,
            "",
            {
                "exact": Result(str(ROWS[row].exact), True),
                **{name: decided(row, name, 0, ()) for name in LIBRARIES},
            },
        )
        for title, row in WORDS.items()
    }


CURVES: dict[str, Callable[[], Panel]] = {
    "first_steps": first_steps,
    "stuck_second_moment": stuck_second_moment,
    "stuck_parameter": stuck_parameter,
    "float16_gradients": partial(
        sizes_of_gradients,
        "float16",
        np.arange(-7.0, 4.6, 0.1),
        "float16_zero",
        "float16: small gradients give infinity, 0 gives NaN",
        "update at 0 is",
    ),
    "float32_gradients": partial(
        sizes_of_gradients,
        "float32",
        np.arange(-6.0, 38.0, 0.5),
        "huge_gradient",
        "Huge gradients are ignored",
        "update at 1e20 is",
    ),
    "slope": slope,
    "beyond_the_bound": beyond_the_bound,
    "stale": stale,
}


def verdict(name: str, result: Result, figure: str = "") -> str:
    """What a library does, as the picture and the table say it."""
    shown = SHOWN.get(name, name)
    if result.right is None:
        return f"{shown}: {result.says}"
    right = "right" if name == "jadam" else "right: mended"
    return f"{shown}: {f'{figure} {result.says}'.strip()}, {right if result.right else 'wrong'}"


def libraries(panel: Panel) -> dict[str, Result]:
    """The results that are judged."""
    return {name: x for name, x in panel.results.items() if name not in ("exact", "bound")}


def judge(panels: dict[str, Panel]) -> list[Claim]:
    """A claim for each panel: the other library has the defect, and jadam has not."""
    claims = []
    for panel in panels.values():
        judged, ours = libraries(panel), panel.results["jadam"]
        others = [result.right for name, result in judged.items() if name != "jadam"]
        exact = [f"{name} {x.says}" for name, x in panel.results.items() if name not in judged]
        says = (verdict(name, x, panel.figure) for name, x in judged.items())
        measured = "; ".join([*exact, *says])
        claims.append(Claim(panel.title, measured, bool(ours.right) and False in others))
    return claims


def draw_curves(axes: Axes, panel: Panel) -> None:
    """The curves of a panel, jadam's broad and on top of it the exact one, thin."""
    broad = {"jadam": 4.0, "exact": 1.2, "bound": 1.2}
    for order, name in enumerate(("jadam", "optax", PEER, "exact", "bound")):
        result = panel.results.get(name)
        if result is None or not len(result.y):
            continue
        style = "--" if name in ("exact", "bound") else "-"
        axes.plot(
            *(panel.x, result.y, style),
            color=COLOURS[name],
            linewidth=broad.get(name, 2.0),
            alpha=0.55 if name == "jadam" else 1.0,
            zorder=2 + order,
        )
        lost = np.isnan(result.y)
        if lost.any():
            low = np.full(lost.sum(), panel.limits[0] if panel.limits else 0)
            axes.plot(np.asarray(panel.x)[lost], low, "x", color=COLOURS[name], clip_on=False)
            place = np.asarray(panel.x)[lost][0], low[0]
            axes.annotate("NaN", place, (0, 8), textcoords="offset points", color=COLOURS[name])
    axes.set_xscale(panel.scales[0])
    axes.set_yscale(panel.scales[1])
    axes.set_xlabel(panel.xlabel)
    axes.set_ylabel(panel.ylabel)
    if panel.limits:
        axes.set_yticks([0, 1, 2], ["0", "1", "2+"])
        axes.set_ylim(panel.limits)
    axes.spines[["top", "right"]].set_visible(False)


def draw_verdicts(axes: Axes, panel: Panel) -> None:
    """The title, and below it what each library does."""
    axes.set_title(panel.title, loc="left", fontweight="bold", fontsize=11, pad=34)
    for line, (name, result) in enumerate(libraries(panel).items()):
        axes.annotate(
            verdict(name, result, panel.figure),
            (0, 1),
            (0, 20 - 13 * line),
            xycoords="axes fraction",
            textcoords="offset points",
            color=COLOURS[name],
            fontsize=9.5,
        )


def draw_words(axes: Axes, rows: dict[str, Panel]) -> None:
    """A table of the answers that are one word, coloured by who is right."""
    axes.set_axis_off()
    axes.set_title("The rest of the family", loc="left", fontweight="bold", fontsize=11, pad=34)
    for place, (title, panel) in enumerate(rows.items()):
        top = 0.98 - 0.2 * place
        axes.text(0, top, title, transform=axes.transAxes, va="top", fontsize=10)
        for line, name in enumerate(("optax", "jadam")):
            axes.text(
                *(0.05, top - 0.06 * (1 + line)),
                verdict(name, panel.results[name]),
                transform=axes.transAxes,
                va="top",
                fontsize=9,
                color=COLOURS[name],
            )


def draw(panels: dict[str, Panel]) -> Figure:
    """A panel for each defect."""
    figure = Figure((14, 12.5), layout="constrained")
    grid = list(figure.subplots(3, 3).flat)
    curves = {name: panel for name, panel in panels.items() if name in CURVES}
    for axes, panel in zip(grid, curves.values(), strict=False):
        draw_curves(axes, panel)
        draw_verdicts(axes, panel)
    draw_words(grid[-1], {name: panel for name, panel in panels.items() if name in WORDS})
    figure.get_layout_engine().set(hspace=0.06, wspace=0.04)
    lines = [
        Line2D([], [], color=COLOURS[name], linestyle="--" if name in ("exact", "bound") else "-")
        for name in COLOURS
    ]
    names = [SHOWN.get(name, name) for name in COLOURS]
    figure.legend(lines, names, loc="outside lower center", ncols=len(lines))
    return figure


def measure() -> dict[str, Panel]:
    """Every panel."""
    curves = {name: make() for name, make in track(CURVES.items(), "defects", transient=True)}
    return {**curves, **words()}


def values(y: Any) -> list[float | None]:
    """A curve for JSON, which has no NaN and no infinity."""
    return [x if math.isfinite(x) else None for x in digits(y)] if len(y) else []


def numbers(panels: dict[str, Panel]) -> dict[str, Any]:
    """The panels as JSON: what was said and what was drawn."""
    return {
        "panels": {
            name: {
                "title": panel.title,
                "figure": panel.figure,
                "results": {
                    who: {"says": x.says, "right": x.right, "y": values(x.y)}
                    for who, x in panel.results.items()
                },
                "x": values(panel.x),
            }
            for name, panel in panels.items()
        }
    }


def main(config: Config) -> None:
    """Runs every row, writes JSON and picture."""
    panels = measure()
    publish("defects", config, numbers(panels), judge(panels), draw(panels))


if __name__ == "__main__":
    command_line("defects", Config, main)
