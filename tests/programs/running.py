"""What every program keeps, whatever is trained and however: checked along its gradients.

A program is compiled once, for half of its steps, and then runs along many sequences of gradients.
"""

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import serialization
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jadam._storage.lattice import EIGHT_BITS, FOUR_BITS, Lattice
from tests.programs.drawing import OF_16_BITS, Program

LATTICES = {"8 bits": EIGHT_BITS, "4 bits": FOUR_BITS}
HALF = 100  # steps
ORBAX_EVERY = 20  # sequences


class BrokenError(AssertionError):
    """An invariant that does not hold: which, and where."""


def holds(condition: Any, what: str, **where: Any) -> None:
    """Raises `BrokenError` unless the condition is true."""
    if not condition:
        raise BrokenError(f"{what}; {', '.join(f'{k} {v}' for k, v in where.items())}")


@contextlib.contextmanager
def settings(program: Program) -> Iterator[None]:
    """float64 where the program has it; optax's wrappers are no friends of strict promotion."""
    with jax.enable_x64("float64" in program.dtypes), jax.numpy_dtype_promotion("standard"):
        yield


def moved(p: jax.Array, update: jax.Array) -> jax.Array:
    """p + update with one rounding, as `optax.apply_updates` has it."""
    wide = jnp.promote_types(p.dtype, update.dtype)
    return (p.astype(wide) + update.astype(wide)).astype(p.dtype)


def codes_in(program: Program, state: Any) -> list[jax.Array]:
    """The arrays of codes in a state, each of v and m together."""
    lattice = LATTICES.get(program.storage)
    return [
        x
        for path, x in jax.tree_util.tree_leaves_with_path(state)
        if lattice is not None
        and x.dtype == lattice.dtype
        and any(getattr(key, "name", None) == "mu" for key in path)
    ]


# The kernel beside XLA's form


def units_allowed(program: Program) -> int:
    """Units in the last place, of what `units_apart` says.

    RAdam has a factor more: beside float64 XLA's form of it was 2.7 units off, and the kernel 0.9
    on the other side.
    """
    if program.storage in LATTICES:
        return 8
    return 4 if program.member.startswith("radam") else 3


def units_apart(
    program: Program,
    x: jax.Array,
    y: jax.Array,
    of_m: jax.Array,
    undecayed: jax.Array,
    g: jax.Array,
) -> jax.Array:
    """The distance of two updates, as a share of what the documentation allows.

    3 units in the last place, 4 of RAdam, and 8 from moments in codes, of the longest of these: a
    learning rate, the update, what it is of m alone, and without its decay. One of the update's own
    dtype. RAdam's first steps are m̂, in which gradients cancel.
    """
    eps = float(jnp.finfo(y.dtype).eps)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    x, y, of_m, undecayed = (a.astype(wide) for a in (x, y, of_m, undecayed))
    longest = functools.reduce(jnp.maximum, map(jnp.abs, (y, of_m, undecayed)))
    size = jnp.maximum(longest, program.learning_rate)
    if program.member.startswith("radam"):
        size = jnp.maximum(size, program.learning_rate * jnp.minimum(jnp.abs(g), 2.0**63))
    unit = units_allowed(program) * 2.0**-23 + (eps if eps > 1e-3 else 0)
    return jnp.max(jnp.abs(x - y) / (unit * size), initial=0.0)


def parameters_of(state: Any) -> list[tuple[jax.Array, jax.Array]]:
    """The first and the second moment of each parameter, of members that have no more."""
    return list(zip(*map(jax.tree.leaves, (state[0].mu, state[0].nu)), strict=True))


def codes_apart(lattice: Lattice, x: Any, y: Any) -> tuple[jax.Array, jax.Array]:
    """Of two parameters in codes: how many levels v and m are apart, and how many elements differ.

    v's level is counted from 1: where a block's tops are neighbours, so are the codes of equal
    values. Code 0 is the neighbour of code 1, or 2 where the tops differ: of v under 2⁻¹²⁶, which
    one form flushes to 0 before a sum and the other after it. Nor is code 1 counted, on which lies
    all that is below its block's range. Where levels are octaves, m beside a neighbouring one is
    twice or half as large, and not compared.
    """

    def parts(both: jax.Array, tops: jax.Array) -> tuple[jax.Array, ...]:
        code, m = lattice.code_of(both), lattice.size_of(both)
        return code, code + jnp.repeat(tops.astype(jnp.int32), 128, axis=-1)[..., : m.shape[-1]], m

    (code, level, m), (other_code, other_level, other_m) = parts(*x), parts(*y)
    either, both = jnp.minimum(code, other_code) == 0, jnp.maximum(code, other_code)
    v_apart = jnp.where(either, (both + 1) // 2, jnp.abs(level - other_level))
    is_compared = (both > 0) & ((v_apart == 0) | (not lattice.is_coarse))
    m_apart = jnp.where(is_compared, jnp.abs(m - other_m), 0)
    apart = jnp.maximum(v_apart, m_apart)
    return jnp.max(apart, initial=0).astype(jnp.float32), jnp.sum(
        (apart > 0) & (jnp.minimum(code, other_code) > 2)
    )


def floats_apart(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The distance of two moments as a share of what is allowed, and how many differ by rounding.

    16-bit floats may be neighbours; float32 is 2 units in the last place apart. 2⁻¹²⁶: a subnormal
    number counts as 0; and half of it, where one was in the lighter term of a mean.
    """
    is_rounded = jnp.finfo(x.dtype).bits < 32
    wide = jnp.promote_types(x.dtype, jnp.float32)
    unit = float(jnp.finfo(x.dtype).eps) if is_rounded else 2 * 2.0**-23
    x, y = x.astype(wide), y.astype(wide)
    allowed = unit * jnp.maximum(jnp.abs(x), jnp.abs(y)) + 1.5 * 2.0**-126
    share = jnp.max(jnp.abs(x - y) / allowed, initial=0.0).astype(jnp.float32)
    return share, jnp.sum(x != y) * is_rounded


# A program


class Compiled:
    """A program's functions, each compiled when it is first called."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.tx = program.optimizer()
        self.in_xla = program.optimizer("xla")
        # What wraps an optimizer is not the kernel's; its updates are compared in their own tests.
        self.compares = program.wrapper == "none" and program.kernel != "xla"
        self.units: float | None = None
        self.along = jax.jit(self._along)
        self.step = jax.jit(self.one)

    def one(self, params: Any, state: Any, g: Any) -> tuple[Any, Any]:
        """A step: parameters and state."""
        updates, state = self.tx.update(g, state, params)
        return jax.tree.map(moved, params, updates), state

    def measured(self, seen: Any) -> None:
        """Keeps the largest distance of float32 updates."""
        if jnp.finfo(self.program.dtypes[1]).bits >= 32:
            largest = units_allowed(self.program) * max(
                float(jnp.max(share)) for share in seen["updates"]
            )
            self.units = max(round(largest, 2), self.units or 0.0)

    def _along(self, params: Any, state: Any, gradients: Any) -> tuple[Any, Any, Any]:
        """All steps: parameters, state, and what was seen."""

        def step(carry: Any, g: Any) -> Any:
            params, state = carry
            updates, after = self.tx.update(g, state, params)
            leaves = jax.tree.leaves(updates)
            seen = {"largest": [jnp.max(jnp.abs(u), initial=0) for u in leaves]}
            if self.compares:
                others, expected = self.in_xla.update(g, state, params)
                no_g, no_p = jax.tree.map(jnp.zeros_like, (g, params))
                of_m, _ = self.in_xla.update(no_g, state, no_p)
                undecayed, _ = self.in_xla.update(g, state, no_p)
                apart = functools.partial(units_apart, self.program)
                seen["updates"] = jax.tree.leaves(
                    jax.tree.map(apart, updates, others, of_m, undecayed, g)
                )
                shares, differ = [], 0
                pairs = zip(*map(parameters_of, (after, expected)), strict=True)
                for x, y in pairs:
                    lattice = LATTICES.get(self.program.storage)
                    if lattice is not None and x[0].dtype == lattice.dtype:
                        found = [codes_apart(lattice, x, y)]
                    else:
                        found = [floats_apart(*each) for each in zip(x, y, strict=True)]
                    shares += [share for share, _ in found]
                    differ += sum(n for _, n in found)
                seen |= {"stored": shares, "differ": jnp.asarray(differ)}
            return (jax.tree.map(moved, params, updates), after), seen

        (params, state), seen = jax.lax.scan(step, (params, state), gradients)
        return params, state, seen


def halves(gradients: Any) -> tuple[Any, Any]:
    """The first steps and the last."""
    return tuple(jax.tree.map(lambda g, i=i: g[i : i + HALF], gradients) for i in (0, HALF))


def same_bits(what: str, found: Any, expected: Any) -> None:
    """Two trees of arrays, with NaN as itself."""
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        x, y = np.asarray(x), np.asarray(y)
        holds(
            x.dtype == y.dtype and x.tobytes() == y.tobytes(),
            what,
            leaf=jax.tree_util.keystr(path),
            differ=np.argwhere(x != y)[:3].tolist(),
        )


def check(compiled: Compiled, number: int) -> None:
    """One sequence of gradients of a program, and its ways of making a step."""
    program = compiled.program
    gradients = program.gradients(number, 2 * HALF)
    first, last = halves(gradients)
    params = program.parameters()
    state = compiled.tx.init(params)
    middle = compiled.along(params, state, first)
    end = compiled.along(*middle[:2], last)
    avals = functools.partial(jax.tree.map, lambda x: (x.shape, x.dtype))
    holds(avals(middle[:2]) == avals((params, state)), "shapes and dtypes changed")
    for at, (new_params, new_state, seen) in enumerate((middle, end)):
        check_finite(program, new_params, new_state, at)
        check_bound(program, seen, at)
        if compiled.compares:
            check_kernel(new_state, seen, at)
            compiled.measured(seen)
    poison(compiled, number, first, middle)
    resume(compiled, number, middle, last, end)
    g = jax.tree.map(lambda x: x[0], last)
    for way in program.ways:
        WAYS[way](compiled, *middle[:2], g)


def check_finite(program: Program, params: Any, state: Any, half: int) -> None:
    """Finite gradients give finite parameters and states."""
    for path, x in jax.tree_util.tree_leaves_with_path((params, state)):
        if jnp.issubdtype(x.dtype, jnp.inexact):
            where = jax.tree_util.keystr(path)
            holds(bool(jnp.all(jnp.isfinite(x))), "not finite", leaf=where, half=half)
    for x in codes_in(program, state):
        lattice = LATTICES[program.storage]
        holds(bool(jnp.all(lattice.code_of(x) != lattice.nan)), "NaN in codes", half=half)


def check_bound(program: Program, seen: Any, half: int) -> None:
    """No step is beyond that of exact moments."""
    if not program.is_plain:
        return
    bounds = program.learning_rate * program.bounds(2 * HALF)[half * HALF :][:HALF]
    for i, largest in enumerate(seen["largest"]):
        # 1e-5: the moments' roundings, as in test_storage; and that of the update's own dtype.
        slack = 1 + 1e-5 + float(jnp.finfo(largest.dtype).eps)
        if "warm-up" in program.member:  # no bound is known while it rounds: a unit in 16 bits
            slack += 2.0**-7
        found = np.asarray(largest, np.float64)
        worst = int(np.argmax(found / bounds))
        holds(
            np.all(found <= bounds * slack),
            "beyond the bound",
            leaf=i,
            step=half * HALF + worst + 1,
            times=found[worst] / bounds[worst],
        )


def check_kernel(state: Any, seen: Any, half: int) -> None:
    """The kernel's step is XLA's, from the same state, to what the documentation says."""
    for name in ("updates", "stored"):
        for i, share in enumerate(seen[name]):
            share = np.asarray(share)
            step = half * HALF + int(np.argmax(share)) + 1
            holds(
                np.all(share <= 1),
                f"{name} of kernel and XLA",
                leaf=i,
                step=step,
                times=share.max(),
            )
    total = HALF * sum(m.size for m, _ in parameters_of(state))
    differ = int(np.sum(np.asarray(seen["differ"])))
    # One in a thousand, and some by chance where there are few.
    holds(differ <= 2 + 1e-3 * total, "codes of kernel and XLA", differ=differ, of=total)


def poison(compiled: Compiled, number: int, first: Any, clean: Any) -> None:
    """A NaN or an infinity in the gradients spoils its own element, and no bit of another."""
    program = compiled.program
    if program.wrapper in ("clip", "apply_if_finite"):  # the ones that look at all leaves
        return
    rng = np.random.default_rng([program.seed, number, 1])
    leaves, structure = jax.tree.flatten(first)
    which = int(rng.choice([i for i, g in enumerate(leaves) if g[0].size]))
    place = tuple(int(rng.integers(n)) for n in leaves[which].shape[1:])
    if program.wrapper == "masked" and not place:  # held out: the gradient is its update
        return
    bad = float(rng.choice([np.nan, np.inf, -np.inf]))
    step = int(rng.integers(HALF))
    leaves[which] = leaves[which].at[(step, *place)].set(bad)
    params = program.parameters()
    spoiled, state, _ = compiled.along(
        params, compiled.tx.init(params), structure.unflatten(leaves)
    )
    if is_coded := bool(codes_in(program, state)):
        isolated(compiled, which, place, bad, structure.unflatten(leaves))
    for i, (x, y) in enumerate(zip(*map(jax.tree.leaves, (spoiled, clean[0])), strict=True)):
        x, y = np.array(x), np.array(y)
        if i == which:
            holds(not np.isfinite(x[place]), "poison was lost", leaf=i, place=place, step=step)
            x[place] = y[place] = 0
        # A finite gradient in its place may have raised the top of its block.
        is_right = np.all(np.isfinite(x)) if is_coded else x.tobytes() == y.tobytes()
        holds(is_right, "poison spread", leaf=i, from_leaf=which, place=place, step=step, bad=bad)


def isolated(
    compiled: Compiled, which: int, place: tuple[int, ...], bad: float, gradients: Any
) -> None:
    """An element that is bad from its first step on leaves its block as one without gradients does.

    A block of codes has a top in common, which neither of the two may raise.
    """
    params, ends = compiled.program.parameters(), []
    leaves, structure = jax.tree.flatten(gradients)
    shape = leaves[which].shape[1:]
    for start in (0.0, bad):
        x = leaves[which].at[(slice(None), *place)].set(0).at[(0, *place)].set(start)
        changed = structure.unflatten([*leaves[:which], x, *leaves[which + 1 :]])
        end = compiled.along(params, compiled.tx.init(params), changed)[:2]
        arrays = [np.array(x) for x in jax.tree.leaves(end)]
        for x in arrays:
            if x.shape == shape:  # no two leaves have the same
                x[place] = 0
        ends.append(arrays)
    same_bits("poison spread", ends[1], ends[0])


def resume(compiled: Compiled, number: int, middle: Any, last: Any, end: Any) -> None:
    """Saved and restored in the middle, by Flax and now and then by Orbax: the same bits after."""
    now = {"params": middle[0], "state": middle[1]}
    restored = serialization.from_bytes(now, serialization.to_bytes(now))
    again = compiled.along(restored["params"], restored["state"], last)
    same_bits("resumed from Flax", again[:2], end[:2])
    if number % ORBAX_EVERY == 0 and all(x.size for x in jax.tree.leaves(now)):
        with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(Path(folder) / "now", now)
            checkpointer.wait_until_finished()
            device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            like = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), now
            )
            same_bits("resumed from Orbax", checkpointer.restore(Path(folder) / "now", like), now)


# Ways of making a step


def close(program: Program, what: str, found: Any, expected: Any, before: Any, g: Any) -> None:
    """Parameters after a step that was compiled in another way.

    Sums and products may be fused otherwise: as for the kernel, with half a unit more for each
    product that is not (README), and a unit of the parameter's dtype.
    """
    for i, (x, y, p, g_) in enumerate(
        zip(*map(jax.tree.leaves, (found, expected, before, g)), strict=True)
    ):
        holds(x.shape == y.shape and x.dtype == y.dtype, f"{what}: avals", leaf=i)
        unit = float(jnp.finfo(y.dtype).eps)
        of_g = float(jnp.finfo(g_.dtype).eps)
        wide = np.complex128 if np.iscomplexobj(x) else np.float64
        x, y, p, g_ = (np.asarray(a, wide) for a in (x, y, p, g_))
        size = np.maximum(np.abs(y - p), program.learning_rate) + np.abs(p) * 0.1
        if program.member.startswith("radam"):
            size = np.maximum(size, program.learning_rate * np.minimum(np.abs(g_), 2.0**63))
        allowed = (6 * 2.0**-23 + of_g) * size + 2 * unit * np.maximum(np.abs(y), np.abs(p))
        holds(np.all(np.abs(x - y) <= allowed), what, leaf=i)


def with_vmap(compiled: Compiled, params: Any, state: Any, g: Any) -> None:
    """Two trainings at once."""
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), (params, state, g))
    if not hasattr(compiled, "many"):
        compiled.many = jax.jit(jax.vmap(compiled.one))
    many = compiled.many(*twice)
    expected = compiled.step(params, state, g)
    for i in range(2):
        found = jax.tree.map(lambda x, i=i: x[i], many[0])
        if compiled.program.wrapper in OF_16_BITS:  # the update may fall to another neighbour
            holds(all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(found)), "vmap: finite")
        else:
            close(compiled.program, "vmap", found, expected[0], params, g)


def without_jit(compiled: Compiled, params: Any, state: Any, g: Any) -> None:
    """Operation by operation.

    AdaMax divides any m by any u. Where either is so small that (1 - b1)·m or (1 - b2)·u is under
    2⁻¹²⁶, it does not fade: that is flushed to 0, unless a fused product has it. There parameters
    are not compared.
    """
    program = compiled.program
    found, expected = compiled.one(params, state, g)[0], compiled.step(params, state, g)[0]
    if (program.member, program.wrapper) == ("adamax", "none") and not codes_in(program, state):
        leaves = zip(*map(jax.tree.leaves, (found, expected)), parameters_of(state), strict=True)
        compared = [
            jnp.where((jnp.abs(m) < 2.0**-126 / 0.1) | (u < 2.0**-126 / 1e-3), y, x)
            for x, y, (m, u) in leaves
        ]
        found = jax.tree.unflatten(jax.tree.structure(found), compared)
    if program.wrapper not in OF_16_BITS:
        close(program, "without jit", found, expected, params, g)


def with_donation(compiled: Compiled, params: Any, state: Any, g: Any) -> None:
    """In the memory of what is given away."""
    if not hasattr(compiled, "in_place"):
        compiled.in_place = jax.jit(compiled.one, donate_argnums=(0, 1))
    copies = jax.tree.map(jnp.copy, (params, state))
    expected = compiled.step(params, state, g)
    same_bits("donation", compiled.in_place(*copies, g), expected)


def divided(tree: Any) -> Any:
    """Rows over eight devices where they can be."""

    def spec(x: Any) -> P:
        return P("x") if x.ndim and x.shape[0] and x.shape[0] % 8 == 0 else P()

    return jax.tree.map(spec, tree)


def on_devices(compiled: Compiled, params: Any, state: Any, g: Any) -> None:
    """Divided over eight devices by XLA."""
    mesh = Mesh(np.array(jax.devices()[:8]), "x")
    where = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), divided((params, state, g)), is_leaf=is_spec
    )
    found = compiled.step(*jax.device_put((params, state, g), where))
    agree(compiled, "eight devices", found, compiled.step(params, state, g), params, g)


def in_shard_map(compiled: Compiled, params: Any, state: Any, g: Any) -> None:
    """Divided over eight devices by hand. Random bits are those of a place among all elements."""
    program = compiled.program
    if program.wrapper in ("stochastic", "clip", "apply_if_finite"):
        return
    if not hasattr(compiled, "by_hand"):
        mesh = Mesh(np.array(jax.devices()[:8]), "x")
        specs = divided((params, state, g))
        compiled.by_hand = jax.jit(
            jax.shard_map(compiled.one, mesh=mesh, in_specs=specs, out_specs=specs[:2])
        )
    found = compiled.by_hand(params, state, g)
    agree(compiled, "shard_map", found, compiled.step(params, state, g), params, g)


def agree(compiled: Compiled, what: str, found: Any, expected: Any, params: Any, g: Any) -> None:
    """The bits of one device where the kernel or codes make the step, else to some roundings."""
    if compiled.program.wrapper in OF_16_BITS:
        holds(all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(found[0])), f"{what}: finite")
        return
    found = jax.device_put(found, jax.devices()[0])
    close(compiled.program, what, found[0], expected[0], params, g)


def is_spec(x: Any) -> bool:
    """Whether this is a leaf of a tree of specs."""
    return isinstance(x, P)


WAYS: dict[str, Callable[..., None]] = {
    "vmap": with_vmap,
    "devices": on_devices,
    "shard_map": in_shard_map,
    "donation": with_donation,
    "without jit": without_jit,
}


class Found:
    """What came of a program along sequences of gradients.

    Attributes:
        ran: how many sequences.
        failures: what did not hold, with the sequence; at most three, each with leaf and step.
        units: the largest distance of an update of the kernel from XLA's, in units in the last
            place as `units_apart` counts them; None where they were not compared.
    """

    def __init__(self, program: Program, sequences: range) -> None:
        self.ran = 0
        self.failures: list[dict[str, Any]] = []
        with settings(program):
            compiled = Compiled(program)
            for number in sequences:
                try:
                    check(compiled, number)
                except BrokenError as error:
                    self._failed(program, number, str(error))
                except Exception as error:
                    self._failed(program, number, f"{type(error).__name__}: {error}"[:500])
                self.ran += 1
                if len(self.failures) == 3:
                    break
        self.units = compiled.units

    def _failed(self, program: Program, number: int, what: str) -> None:
        self.failures.append({"program": str(program), "sequence": number, "what": what})
