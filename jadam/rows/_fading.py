"""How the motion of a row without gradients fades.

When it ends, and which few steps say what all of them add up to.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jadam import _math
from jadam._members import Member, Rule
from jadam._state import Role

# An interpolation costs a division for each node and element, and some time to find.
_MOST_NODES, _MOST_STEPS = 24, 1000


def fade(rule: Rule) -> float:
    """The factor ρ by which the direction shrinks in a step without a gradient, at most.

    Raises:
        TypeError: a hyperparameter that is no epsilon is not known on the host.
        ValueError: the motion without a gradient has no end, or hardly one.
    """
    member, numbers = rule.member, rule.hyperparameters
    if sum(moment.is_first for moment in member.moments) > 1:
        raise ValueError(
            f"tx: expected a member whose motion ends without gradients, got {member.name}, whose "
            "slow average outlives √v; catch_up has no end for it"
        )
    for name in sorted(numbers.keys() - member.epsilons.keys()):
        if not isinstance(numbers[name], (float, int, type(None))):
            raise TypeError(f"{name}: expected a Python number for rows, got {numbers[name]!r}")
    b1, b2 = rule.member.rates_in(rule.hyperparameters)
    has_maximum = any(moment.role is Role.MAXIMUM for moment in member.moments)
    below = 1.0 if has_maximum else b2 ** (1 / member.power)
    if b1 >= below:
        raise ValueError(
            f"b1, b2: expected b1 < {'b2' if member.power == 1 else '√b2'} for rows, since the "
            f"direction grows without gradients otherwise; got {b1} and {b2}"
        )
    return b1 / below


def bound(rule: Rule) -> float:
    """The largest direction: C² = (1-b1)²/(1-b2)/(1-ρ²)."""
    b1, b2 = rule.member.rates_in(rule.hyperparameters)
    return (1 - b1) / math.sqrt((1 - b2) * (1 - fade(rule) ** 2))


def horizon(rule: Rule, dtype: Any) -> int:
    """After how many steps without a gradient a parameter stands still.

    What all later steps add is less than an ulp of a learning rate: each is at most bound·ρʲ.
    """
    rho = fade(rule)
    least = float(jnp.finfo(dtype).eps) / 2 * (1 - rho) / max(bound(rule), 1.0)
    return max(1, math.ceil(math.log(least) / math.log(max(rho, 1e-30))))


class Interpolation(NamedTuple):
    """The directions of a rule's steps without a gradient, from those of few of them.

    direction(j) = Σ_q basis[j - 1, q]·direction(nodes[q]), for all times, v and eps.
    """

    nodes: Int[np.ndarray, "nodes"]
    basis: Float[np.ndarray, "steps nodes"]


def interpolation(rule: Rule) -> Interpolation | None:
    """An interpolation of few nodes whose sums are off by 5e-6 at most; None where few do not do.

    Each node is put where the error of those before is largest over all directions that there are:
    after few and many updates, for v around eps and far above.
    """
    numbers = dict(rule.hyperparameters)
    # Directions are counted in eps.
    numbers["eps"], numbers["eps_root"] = 1.0, float(not is_zero(numbers["eps_root"]))
    return _interpolation(rule.member, tuple(sorted(numbers.items())))


def is_zero(x: Any) -> bool:
    """Whether a hyperparameter is known to be 0."""
    return isinstance(x, (int, float)) and x == 0


@functools.lru_cache(maxsize=64)
def _interpolation(member: Member, numbers: tuple[tuple[str, Any], ...]) -> Interpolation | None:
    rule = Rule(member, dict(numbers))
    steps = horizon(rule, np.float32)
    if steps > _MOST_STEPS:
        return None
    j = np.arange(1, steps + 1)
    _, b2 = rule.member.rates_in(rule.hyperparameters)
    late = 100 + 20 / (1 - b2)
    touched = np.unique(np.concatenate([np.arange(1, 30), np.geomspace(30, late, 16).astype(int)]))
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        each = (jnp.asarray(x, jnp.float64) for x in (touched[:, None], j[None]))
        found = jax.jit(rule.quiet_at)(*each)
    weight, scale, plain = np.broadcast_arrays(*(np.asarray(x) for x in found))
    directions, largest = [plain], 100 * np.max(scale / scale[:, :1])
    for root in (0.0, *np.geomspace(0.01, largest, round(2 * math.log10(largest)) + 5)):
        v = root * scale[:, :1]
        directions.append((1 + root) * weight / (v + scale))
        if rule.hyperparameters["eps_root"]:
            directions.append((1 + root) * weight / np.hypot(v, scale))
    directions = np.concatenate(directions)
    off, nodes = directions.copy(), list[int]()
    while bound(rule) * np.abs(np.cumsum(off, axis=1)).max() > 5e-6:
        if len(nodes) == _MOST_NODES:
            return None
        nodes.append(int(np.argmax(np.sum(off**2, axis=0))))
        q = off[:, nodes[-1]] / np.linalg.norm(off[:, nodes[-1]])
        off -= np.outer(q, q @ off)
    return Interpolation(j[nodes], np.linalg.lstsq(directions[:, nodes], directions)[0].T)


def left_after(
    rule: Rule, steps: Float[Array, "rows"]
) -> tuple[Float[Array, "rows"], Float[Array, "rows"]]:
    """What so many steps without a gradient leave of the first and of the second moment."""
    rates = rule.member.rates_in(rule.hyperparameters)
    first, second = (_math.Decay.of(b, steps.dtype).power(steps) for b in rates)
    return first, second
