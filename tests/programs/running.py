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

from tests.programs.drawing import OF_16_BITS, Program

HALF = 100  # steps
ORBAX_EVERY = 20  # sequences


class Broken(AssertionError):
    """An invariant that does not hold: which, and where."""


def holds(condition: Any, what: str, **where: Any) -> None:
    """Raises `Broken` unless the condition is true."""
    if not condition:
        raise Broken(f"{what}; {', '.join(f'{k} {v}' for k, v in where.items())}")


@contextlib.contextmanager
def settings(program: Program) -> Iterator[None]:
    """float64 where the program has it; optax's wrappers are no friends of strict promotion."""
    with jax.enable_x64("float64" in program.dtypes), jax.numpy_dtype_promotion("standard"):
        yield


def moved(p: jax.Array, update: jax.Array) -> jax.Array:
    """p + update with one rounding, as `optax.apply_updates` has it."""
    wide = jnp.promote_types(p.dtype, update.dtype)
    return (p.astype(wide) + update.astype(wide)).astype(p.dtype)


# The kernel beside XLA's form


def units_apart(program: Program, x: jax.Array, y: jax.Array, g: jax.Array) -> jax.Array:
    """The distance of two updates, as a share of what the documentation allows.

    3 units in the last place of a learning rate, or of the update where it is longer, and 4 from
    8-bit moments. One of the update's own dtype. RAdam's first steps are m̂, in which gradients
    cancel.
    """
    real = jnp.finfo(y.dtype)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    x, y = x.astype(wide), y.astype(wide)
    size = jnp.maximum(jnp.abs(y), program.learning_rate)
    if program.member.startswith("radam"):
        size = jnp.maximum(size, program.learning_rate * jnp.minimum(jnp.abs(g), 2.0**63))
    unit = (4 if program.storage == "8 bits" else 3) * 2.0**-23
    if float(real.eps) > 1e-3:
        unit += float(real.eps)
    return jnp.max(jnp.abs(x - y) / (unit * size), initial=0.0)


def stored_apart(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The distance of two stored arrays as a share of what is allowed, and how many differ.

    Codes and 16-bit floats may be neighbours; float32 is 2 units in the last place apart. 2⁻¹²⁶: a
    subnormal number counts as 0.
    """
    differ = jnp.sum(x != y)
    if x.dtype == jnp.uint16:
        v, m = (jnp.abs(a.astype(jnp.int32) - b) for a, b in ((x & 511, y & 511), (x >> 9, y >> 9)))
        return jnp.maximum(jnp.max(v, initial=0), jnp.max(m, initial=0)).astype(jnp.float32), differ
    if jnp.issubdtype(x.dtype, jnp.integer):
        return jnp.any(x != y).astype(jnp.float32) * 2, differ
    wide = jnp.promote_types(x.dtype, jnp.float32)
    unit = max(2.0 * 2.0**-23, float(jnp.finfo(x.dtype).eps))
    x, y = x.astype(wide), y.astype(wide)
    allowed = unit * jnp.maximum(jnp.abs(x), jnp.abs(y)) + 2.0**-126
    return jnp.max(jnp.abs(x - y) / allowed, initial=0.0).astype(jnp.float32), differ


def float_moments_are_wide(x: jax.Array) -> bool:
    """Whether an array's numbers are not rounded to fewer bits, so that each may differ."""
    return bool(jnp.issubdtype(x.dtype, jnp.inexact)) and jnp.finfo(x.dtype).bits >= 32


# A program


class Compiled:
    """A program's functions, each compiled when it is first called."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.tx = program.optimizer()
        self.in_xla = program.optimizer("xla")
        # What wraps an optimizer is not the kernel's; its updates are compared in their own tests.
        self.compares = program.wrapper == "none" and program.kernel != "xla"
        self.along = jax.jit(self._along)
        self.step = jax.jit(self.one)

    def one(self, params: Any, state: Any, g: Any) -> tuple[Any, Any]:
        """A step: parameters and state."""
        updates, state = self.tx.update(g, state, params)
        return jax.tree.map(moved, params, updates), state

    def _along(self, params: Any, state: Any, gradients: Any) -> tuple[Any, Any, Any]:
        """All steps: parameters, state, and what was seen."""

        def step(carry: Any, g: Any) -> Any:
            params, state = carry
            updates, after = self.tx.update(g, state, params)
            leaves = jax.tree.leaves(updates)
            seen = {"largest": [jnp.max(jnp.abs(u), initial=0) for u in leaves]}
            if self.compares:
                others, expected = self.in_xla.update(g, state, params)
                apart = functools.partial(units_apart, self.program)
                seen["updates"] = jax.tree.leaves(jax.tree.map(apart, updates, others, g))
                stored = [
                    (*stored_apart(x, y), not float_moments_are_wide(x))
                    for x, y in zip(*map(jax.tree.leaves, (after, expected)), strict=True)
                ]
                seen["stored"] = [share for share, _, _ in stored]
                seen["differ"] = sum(n for _, n, is_rounded in stored if is_rounded) + 0
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
        check_finite(new_params, new_state, at)
        check_bound(program, seen, at)
        if compiled.compares:
            check_kernel(new_state, seen, at)
    poison(compiled, number, first, middle)
    resume(compiled, number, middle, last, end)
    g = jax.tree.map(lambda x: x[0], last)
    for way in program.ways:
        WAYS[way](compiled, *middle[:2], g)


def check_finite(params: Any, state: Any, half: int) -> None:
    """Finite gradients give finite parameters and states."""
    for path, x in jax.tree_util.tree_leaves_with_path((params, state)):
        if jnp.issubdtype(x.dtype, jnp.inexact):
            where = jax.tree_util.keystr(path)
            holds(bool(jnp.all(jnp.isfinite(x))), "not finite", leaf=where, half=half)
        if x.dtype == jnp.uint16:
            holds(bool(jnp.all((x & 511) != 511)), "NaN in codes", half=half)


def check_bound(program: Program, seen: Any, half: int) -> None:
    """No step is beyond that of exact moments."""
    if not program.is_plain:
        return
    bounds = program.learning_rate * program.bounds(2 * HALF)[half * HALF :][:HALF]
    for i, largest in enumerate(seen["largest"]):
        # 1e-5: the moments' roundings, as in test_storage; and that of the update's own dtype.
        slack = 1 + 1e-5 + float(jnp.finfo(largest.dtype).eps)
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
    rounded = [x for x in jax.tree.leaves(state) if not float_moments_are_wide(x)]
    total = HALF * sum(x.size for x in rounded)
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
    is_coded = any(x.dtype == jnp.uint16 for x in jax.tree.leaves(state))
    for i, (x, y) in enumerate(zip(*map(jax.tree.leaves, (spoiled, clean[0])), strict=True)):
        x, y = np.array(x), np.array(y)
        if i == which:
            holds(not np.isfinite(x[place]), "poison was lost", leaf=i, place=place, step=step)
            x[place] = y[place] = 0
        # A finite gradient in its place may have raised the top of its block.
        is_right = np.all(np.isfinite(x)) if is_coded else x.tobytes() == y.tobytes()
        holds(is_right, "poison spread", leaf=i, from_leaf=which, place=place, step=step, bad=bad)


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
    """Operation by operation."""
    found = compiled.one(params, state, g)
    expected = compiled.step(params, state, g)
    if compiled.program.wrapper not in OF_16_BITS:
        close(compiled.program, "without jit", found[0], expected[0], params, g)


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


def broken(program: Program, sequences: range) -> list[dict[str, Any]]:
    """What does not hold in a program, by sequence; the first three, each as small as it gets."""
    found = []
    with settings(program):
        compiled = Compiled(program)
        for number in sequences:
            try:
                check(compiled, number)
            except Broken as error:
                found.append({"program": str(program), "sequence": number, "what": str(error)})
            if len(found) == 3:
                break
    return found
