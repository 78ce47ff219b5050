"""Are the numbers right: jadam's kernel beside XLA's form, on the device, and beside NumPy.

Every case steps the same ragged leaves a few times: with gradients over many octaves, then with
infinities, NaN, zeros and numbers at the ends of float32, then once more. In each step XLA's form
gets what the kernel got. Distances are in units of the last place: of the reference, of what it is
a sum of, or of the learning rate, whichever is larger. Codes count as they are.

What the two do differently on a GPU is no distance: the kernel flushes numbers under 2⁻¹²⁶ to 0,
as XLA:CPU does, and rounds an update of bf16 gradients to bf16 before it is added, which XLA:GPU
leaves out.
"""

import functools
import importlib.util
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jadam
from experiments.bench.ahead.programs import BITS_4, BITS_8, BITS_16, Program, fused, in_two
from experiments.bench.device.in_jax import about
from experiments.bench.device.rows import ABOUT, Order, attempt, end, order, say

RATE, DECAY = 0.01, 0.1
SHAPES = ((70, 300), (4099,), (33, 7, 20), (0, 5), (), (4, 2048), (200, 1257), (64, 256))
TINY_SHAPES = ((70, 300), (33, 7, 20), (0, 5), ())
SPECIAL = (0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 3e38)
PLAIN_STEPS = 3
"""Before the special numbers; the oracle follows these."""


class Case(NamedTuple):
    """A step, which is made with `kernel=`.

    Attributes:
        make: the member's function.
        options: of it.
        dtype: of the parameters.
        gradients: their dtype.
        weights: what is around it: "int8", "int16" or "stochastic".
        update: whether `update` and `optax.apply_updates` are made in place of `step`.
        oracle: the options of the reference in NumPy, for float32 alone.
    """

    make: Any
    options: dict[str, Any]
    dtype: Any = jnp.float32
    gradients: Any = jnp.float32
    weights: str | None = None
    update: bool = False
    oracle: dict[str, Any] | None = None

    def program(self, kernel: str) -> Program:
        """The step by this kernel."""
        tx = self.make(RATE, kernel=kernel, **self.options)
        if self.weights == "stochastic":
            tx = jadam.stochastic_rounding(tx)
        elif self.weights is not None:
            tx = jadam.compensated_weights(tx, residual_dtype=self.weights)
        return in_two(tx, self.dtype) if self.update else fused(tx, self.dtype)


BF16 = jnp.bfloat16
DECAYS = {"weight_decay": DECAY}
CASES = {
    "adamw float32": Case(jadam.adamw, DECAYS, oracle={"kind": "adam"}),
    "adamw 8-bit": Case(jadam.adamw, {**DECAYS, **BITS_8}),
    "7 bytes: compensated int8, 8-bit": Case(jadam.adamw, {**DECAYS, **BITS_8}, BF16, BF16, "int8"),
    "compensated int8": Case(jadam.adamw, DECAYS, BF16, BF16, "int8"),
    "compensated int16": Case(jadam.adamw, DECAYS, BF16, BF16, "int16"),
    "bf16 weights and moments": Case(jadam.adamw, {**DECAYS, **BITS_16}, BF16, BF16),
    "stochastic bf16": Case(jadam.adamw, DECAYS, BF16, BF16, "stochastic"),
    "nadam float32": Case(jadam.nadam, {}, oracle={"kind": "nadam"}),
    "radam float32": Case(jadam.radam, {}, oracle={"kind": "radam"}),
    "bf16 gradients": Case(jadam.adamw, DECAYS, gradients=BF16),
    "nadam 8-bit": Case(jadam.nadam, BITS_8),
    "radam 8-bit": Case(jadam.radam, BITS_8),
    "stochastic bf16, 8-bit": Case(jadam.adamw, {**DECAYS, **BITS_8}, BF16, BF16, "stochastic"),
    "adamw 4-bit": Case(jadam.adamw, {**DECAYS, **BITS_4}),
    "nadam 4-bit": Case(jadam.nadam, BITS_4),
    "5 bytes: stochastic bf16, 4-bit": Case(
        jadam.adamw, {**DECAYS, **BITS_4}, BF16, BF16, "stochastic"
    ),
    "compensated int8, 4-bit": Case(jadam.adamw, {**DECAYS, **BITS_4}, BF16, BF16, "int8"),
    "adamw float32, update": Case(jadam.adamw, DECAYS, update=True, oracle={"kind": "adam"}),
    "adamw 8-bit, update": Case(jadam.adamw, {**DECAYS, **BITS_8}, update=True),
    "float32, no decay": Case(jadam.adam, {}, oracle={"kind": "adam"}),
}
TINY_CASES = ("adamw float32", "7 bytes: compensated int8, 8-bit")


class Limit(NamedTuple):
    """What the kernel may differ by: the largest distance, and the share that differs at all."""

    largest: float
    share: float = 1.0


# The contract of `kernel=`: moments to 2 ulps, updates to 4 of the learning rate; what is rounded
# to fewer bits may go to the neighbour, one number in a thousand. A weight with its residual is one
# number; beside a power of two its neighbours are twice as far on one side.
NEIGHBOURS = Limit(1, 1e-3)
# Powers of two of a GPU are off by two ulps themselves.
FROM_CODES = 5
LIMITS = {
    "p float32": Limit(FROM_CODES),
    "p bfloat16": NEIGHBOURS,
    # An update has its gradient's dtype: its neighbour is 2¹⁶ float32 numbers away.
    "p float32 by bfloat16": Limit(2.0**17),
    # It is 2⁻⁹ of itself off, beside half a distance of 2⁻⁸ of a normal parameter: of updates of
    # 0.01 in the mean 0.01/4·E(1/|p|), for |p| over 0.01/4.
    "p bfloat16 by bfloat16": Limit(1, 0.03),
    "moments float32": Limit(2),
    "moments bfloat16": NEIGHBOURS,
    "8-bit codes of m": NEIGHBOURS,
    "8-bit codes of v": NEIGHBOURS,
    "4-bit codes of m": NEIGHBOURS,
    "4-bit codes of v": NEIGHBOURS,
    "scales": Limit(0),
    "weights with int8": Limit(2, 1e-3),
    "weights with int16": Limit(4),
    "not finite": Limit(0),
    "oracle": Limit(4 * PLAIN_STEPS),
}
V_BITS, SIZES = 9, 21
"""Of 8 bits each, v's code is the lower bits and m's the upper; of 4 bits both are digits."""


def ulps(found: Any, expected: Any, at_least: Any = 0.0) -> np.ndarray:
    """Distances in units of the last place of the dtype, at no less than given sizes."""
    bits = 16 if found.dtype == BF16 else 0
    a, b = (np.asarray(x).astype(np.float32) for x in (found, expected))
    size = np.fmax(np.abs(b), np.asarray(at_least, np.float32))
    with np.errstate(invalid="ignore", over="ignore"):
        spacing = np.spacing(size).astype(np.float64) * 2.0**bits
        apart = np.abs(a.astype(np.float64) - b.astype(np.float64)) / spacing
    return np.where(np.isfinite(a) & np.isfinite(b), apart, 0.0)


def astray(found: Any, expected: Any) -> np.ndarray:
    """1 where one is infinite or NaN and the other is not the same."""
    a, b = (np.asarray(x).astype(np.float32) for x in (found, expected))
    same = (a == b) | (np.isnan(a) & np.isnan(b)) | (np.isfinite(a) & np.isfinite(b))
    return np.where(same, 0.0, 1.0)


def _one(state: Any, kind: type) -> Any:
    """The state of a class that lies in another, or None."""
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kind))
    return next((node for node in nodes if isinstance(node, kind)), None)


SMALLEST = 2.0**-103
"""Its last place, in float32, is 2⁻¹²⁶."""


def codes(both: np.ndarray, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Those of m and of v in the integers that a state has of both."""
    if dtype == jnp.uint16:
        return both >> V_BITS, both & 2**V_BITS - 1
    of_v = -(-both // SIZES)
    return both - SIZES * of_v, of_v


def terms_of(state: Any, grads: list[Any]) -> dict[str, list[np.ndarray]]:
    """What each moment after a step is a sum of: the moment before, g or g², by their size."""
    own = _one(state, jadam.AdamState)
    sizes = [np.clip(np.abs(np.asarray(g).astype(np.float64)), 0, 2.0**63) for g in grads]
    found: dict[str, list[np.ndarray]] = {}
    for name, power in (("mu", 1), ("nu", 2)):
        before = (np.asarray(x).astype(np.float64) for x in getattr(own, name))
        found[name] = [
            np.fmax(np.fmax(np.abs(x), size**power), SMALLEST)
            if x.shape == size.shape
            else np.full(x.shape, SMALLEST)
            for x, size in zip(before, sizes, strict=True)
        ]
    return found


def distances(
    found: Any,
    expected: Any,
    sizes: list[np.ndarray],
    terms: dict[str, list[np.ndarray]],
    dtype: Any,
) -> Iterator[tuple[str, np.ndarray]]:
    """What was compared, and how far apart; `found` and `expected` are parameters and state.

    `sizes` are those of the parameters before, `terms` of what moments are sums of, `dtype` is that
    of the gradients.
    """
    (p, state), (q, other) = found, expected
    weights = _one(state, jadam.CompensatedWeightsState)
    own_weights = weights or _one(state, jadam.StochasticRoundingState)
    for a, b, size in zip(p, q, sizes, strict=True):
        by = f" by {jnp.dtype(dtype)}" if dtype == BF16 and not own_weights else ""
        yield f"p {a.dtype}{by}", ulps(a, b, size)
        yield "not finite", astray(a, b)
    own, peer = (_one(x, jadam.AdamState) for x in (state, other))
    for name in ("mu", "nu"):
        for a, b, term in zip(getattr(own, name), getattr(peer, name), terms[name], strict=True):
            x, y = (np.asarray(z) for z in (a, b))
            if a.dtype in (jnp.uint16, jnp.uint8):
                of_m, of_v = zip(*(codes(z.astype(np.int64), a.dtype) for z in (x, y)), strict=True)
                bits = 4 * a.dtype.itemsize
                apart_m, apart_v = (np.abs(np.subtract(*pair)) for pair in (of_m, of_v))
                # A neighbour of v's code in 4 bits is twice v's root, and m's another share of it.
                same_root = (apart_v == 0) | (bits == 8)
                yield f"{bits}-bit codes of m", np.where(same_root, apart_m, 0)
                yield f"{bits}-bit codes of v", apart_v
            elif a.dtype == jnp.int16:
                yield "scales", np.abs(x.astype(np.int64) - y)
            else:
                yield f"moments {a.dtype}", ulps(a, b, term)
                yield "not finite", astray(a, b)
    if weights is None:
        return
    masters = (jadam.master_weights(*pair) for pair in ((p, state), (q, other)))
    for a, b, residual, size in zip(*masters, weights.residual, sizes, strict=True):
        # An 8-bit residual counts every 256th float32 number.
        unit = 256 if residual.dtype == jnp.int8 else 1
        yield f"weights with {residual.dtype}", ulps(a, b, size) / unit


def gradients(shapes: Any, dtype: Any, step: int) -> list[jax.Array]:
    """Over six decades; in one step with special numbers among them."""
    rng = np.random.default_rng(step)
    found = []
    for shape in shapes:
        g = rng.standard_normal(shape) * 10.0 ** rng.uniform(-3, 3, shape)
        if step == PLAIN_STEPS:
            g = np.where(rng.random(shape) < 0.01, rng.choice(SPECIAL, shape), g)
        found.append(jnp.asarray(g, jnp.float32).astype(dtype))
    return found


def parameters(shapes: Any, dtype: Any) -> list[jax.Array]:
    """Normal numbers."""
    rng = np.random.default_rng(100)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32).astype(dtype) for shape in shapes]


def reference() -> ModuleType:
    """The tests' reference, which is no package."""
    path = Path(__file__).parents[3] / "tests" / "reference.py"
    spec = importlib.util.spec_from_file_location("reference", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["reference"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiled(case: Case, kernel: str, shapes: Any) -> Any:
    """A step of a case. That of the kernel takes over its arguments, as in a training."""
    program = case.program(kernel)
    params = [jax.ShapeDtypeStruct(shape, case.dtype) for shape in shapes]
    grads = [jax.ShapeDtypeStruct(shape, case.gradients) for shape in shapes]
    state = jax.eval_shape(program.tx.init, params)
    donated = (0, 1) if kernel == "native" else ()
    return jax.jit(program.step, donate_argnums=donated).lower(params, state, grads).compile()


def compared(
    case: Case, shapes: Any, making: dict[str, Future[Any]], given: Order
) -> dict[str, Any]:
    """The largest distance of each kind, and what share differs at all."""
    native, in_xla = (making[kernel].result(max(0.0, given.left)) for kernel in ("native", "xla"))
    params = parameters(shapes, case.dtype)
    state = case.program("xla").tx.init(params)
    exact = [np.asarray(p).astype(np.float64) for p in params]
    members = []
    if case.oracle is not None:
        members = [reference().Member(**case.oracle) for _ in params]
    apart: dict[str, list[np.ndarray]] = {}
    terms = sizes = [np.full(p.shape, RATE) for p in params]
    for step in range(PLAIN_STEPS + 2):
        grads = gradients(shapes, case.gradients, step)
        expected = jax.block_until_ready(in_xla(params, state, grads))
        # An update is no longer than the parameters before and after it together. RAdam's first are
        # as long as the gradients, of which what is stored may cancel.
        if case.make is jadam.radam:
            lengths = [np.clip(np.abs(np.asarray(g).astype(np.float64)), 0, 2.0**63) for g in grads]
            terms = [np.fmax(x, RATE * g) for x, g in zip(terms, lengths, strict=True)]
        before = [
            np.fmax(np.abs(np.asarray(p).astype(np.float64)), x)
            for p, x in zip(params, terms, strict=True)
        ]
        sizes = [np.fmax(*pair) for pair in zip(sizes, before, strict=True)]
        parts = terms_of(state, grads)
        params, state = native(params, state, grads)
        for kind, distance in distances((params, state), expected, before, parts, case.gradients):
            apart.setdefault(kind, []).append(distance.ravel())
        if members and step < PLAIN_STEPS:
            decay = case.options.get("weight_decay", 0.0)
            exact = [
                x - RATE * (member(np.asarray(g)) + decay * x)
                for x, g, member in zip(exact, grads, members, strict=True)
            ]
            if step == PLAIN_STEPS - 1:
                off = [ulps(*triple) for triple in zip(params, exact, sizes, strict=True)]
                apart["oracle"] = [x.ravel() for x in off]
    found = {kind: _summary(np.concatenate(parts)) for kind, parts in apart.items()}
    return {
        "kernels": native.as_text().count('custom_call_target="jadam'),
        "within": all(_within(LIMITS[kind], summary) for kind, summary in found.items()),
        "found": found,
    }


def _summary(apart: np.ndarray) -> dict[str, float]:
    return {
        "numbers": apart.size,
        "largest": float(apart.max(initial=0)),
        "share": float(np.mean(apart != 0)) if apart.size else 0.0,
    }


def _within(limit: Limit, summary: dict[str, float]) -> bool:
    return summary["largest"] <= limit.largest and summary["share"] <= limit.share


def main(given: Order) -> None:
    """All cases are compiled side by side."""
    say(ABOUT, about())
    # Compiled by several threads before any was compiled by one, programs for a GPU have crashed.
    jax.block_until_ready(jax.jit(jnp.negative)(jnp.ones(3)))
    shapes = TINY_SHAPES if given.tiny else SHAPES
    names = TINY_CASES if given.tiny else tuple(CASES)
    pool = ThreadPoolExecutor(8)
    making = {
        name: {k: pool.submit(compiled, CASES[name], k, shapes) for k in ("native", "xla")}
        for name in names
    }
    for name in names:
        attempt(name, functools.partial(compared, CASES[name], shapes, making[name], given), given)


if __name__ == "__main__":
    main(order())
    end()
