"""What a member does while no gradient comes: closed forms in place of many steps.

After j steps without a gradient the moments are b1ʲ·m and b2ʲ·v, and AMSGrad's maximum is what it
was. The direction is m·w/(√(v + eps_root·s²) + eps·s) + plain·m with numbers w, s and plain that
depend on the time alone: s/√v is 1/√v̂, and w is s·b1ʲ over the bias correction.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jadam import _math
from jadam._members import (
    ADAM,
    ADAMAX,
    AMSGRAD,
    CORRECTED_AMSGRAD,
    NADAM,
    RADAM,
    Member,
    Rule,
)

# An interpolation costs a division for each node and element, and some time to find.
_MOST_NODES, _MOST_STEPS = 24, 1000

Numbers = Float[Array, "..."]


class Quiet(NamedTuple):
    """What the direction of a step without a gradient has beside the moments of j steps ago.

    direction = m·weight/(√(v + eps_root·scale²) + eps·scale) + plain·m, v the maximum in AMSGrad.
    """

    weight: Numbers
    scale: Numbers
    plain: Numbers | float


def _correction(b: _math.Decay, then: Numbers, j: Numbers) -> Numbers:
    """1 - bᵗ of t = then + j, with one exponential of each row and one of each j."""
    before = -jnp.expm1(then * b.log)
    return before + (1 - before) * _math.bias_correction(b, j)


def _adam(then: Numbers, j: Numbers, *, b1: float, b2: float, **_: Any) -> Quiet:
    d1, d2 = _math.Decay.of(b1, j.dtype), _math.Decay.of(b2, j.dtype)
    scale = jnp.sqrt(_correction(d2, then, j)) * jnp.exp(-0.5 * j * d2.log)
    weight = scale * jnp.exp(j * d1.log) / _correction(d1, then, j)
    return Quiet(weight, scale, 0.0)


def _nadam(
    then: Numbers, j: Numbers, *, b1: float, b2: float, momentum_decay: float | None, **_: Any
) -> Quiet:
    d1, t = _math.Decay.of(b1, j.dtype), then + j
    scale = _adam(then, j, b1=b1, b2=b2).scale
    momentum = jax.vmap(lambda t: jnp.asarray(_math.momentum(d1, t, momentum_decay).m_weight))
    m_weight = momentum(t.reshape(-1)).reshape(t.shape)
    return Quiet(scale * jnp.exp(j * d1.log) * m_weight, scale, 0.0)


def _amsgrad(
    then: Numbers,
    j: Numbers,
    *,
    b1: float,
    b2: float,
    maximum: str,
    bias_correction_mu: bool,
    bias_correction_nu: bool,
    **_: Any,
) -> Quiet:
    d1, d2 = _math.Decay.of(b1, j.dtype), _math.Decay.of(b2, j.dtype)
    one = jnp.ones_like(then + j)
    c1 = _correction(d1, then, j) if bias_correction_mu else one
    corrected_here = bias_correction_nu and maximum == "raw"
    scale = jnp.sqrt(_correction(d2, then, j)) if corrected_here else one
    return Quiet(scale * jnp.exp(j * d1.log) / c1, scale, 0.0)


def _radam(
    then: Numbers,
    j: Numbers,
    *,
    b1: float,
    b2: float,
    threshold: float,
    nesterov: bool,
    **_: Any,
) -> Quiet:
    d2 = _math.Decay.of(b2, j.dtype)
    weight, scale, _none = (
        _nadam(then, j, b1=b1, b2=b2, momentum_decay=None)
        if nesterov
        else _adam(then, j, b1=b1, b2=b2)
    )
    tractable, r = _math.rectification(d2, then + j, threshold)
    return Quiet(
        jnp.where(tractable, r * weight, 0), scale, jnp.where(tractable, 0, weight / scale)
    )


QUIET: Mapping[Member, Callable[..., Quiet]] = {
    ADAM: _adam,
    NADAM: _nadam,
    AMSGRAD: functools.partial(_amsgrad, maximum="raw"),
    CORRECTED_AMSGRAD: functools.partial(_amsgrad, maximum="corrected"),
    RADAM: _radam,
}


def quiet(rule: Rule, then: Numbers, j: Numbers) -> Quiet:
    """The j-th step of a rule without a gradient, after `then` updates."""
    return QUIET[rule.member](then, j, **rule.hyperparameters)


def fade(rule: Rule) -> float:
    """The factor ρ by which the direction shrinks in a step without a gradient, at most.

    Raises:
        TypeError: a hyperparameter other than eps and eps_root is not known on the host.
        ValueError: the motion without a gradient has no end, or hardly one.
    """
    member, numbers = rule.member, rule.hyperparameters
    if member not in (*QUIET, ADAMAX):
        raise ValueError(
            f"tx: expected a member whose motion ends without gradients, got {member.name}, whose "
            "slow average outlives √v; catch_up has no end for it"
        )
    for name in sorted(numbers.keys() - {"eps", "eps_root"}):
        if not isinstance(numbers[name], (float, int, type(None))):
            raise TypeError(f"{name}: expected a Python number for rows, got {numbers[name]!r}")
    b1, b2 = numbers["b1"], numbers["b2"]
    below = 1.0 if member in (AMSGRAD, CORRECTED_AMSGRAD) else b2 ** (1 / member.power)
    if b1 >= below:
        raise ValueError(
            f"b1, b2: expected b1 < {'b2' if member.power == 1 else '√b2'} for rows, since the "
            f"direction grows without gradients otherwise; got {b1} and {b2}"
        )
    return b1 / below


def bound(rule: Rule) -> float:
    """The largest direction: C² = (1-b1)²/(1-b2)/(1-ρ²)."""
    b1, b2 = rule.hyperparameters["b1"], rule.hyperparameters["b2"]
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
    """The least interpolation whose sums are 5e-6 off at most; None where it has too many nodes.

    A node is where what is off is largest, over all directions that there are: after few and many
    updates, for v around eps and far above.
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
    late = 100 + 20 / (1 - rule.hyperparameters["b2"])
    touched = np.unique(np.concatenate([np.arange(1, 30), np.geomspace(30, late, 16).astype(int)]))
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        each = (jnp.asarray(x, jnp.float64) for x in (touched[:, None], j[None]))
        found = jax.jit(functools.partial(quiet, rule))(*each)
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


def power(rule: Rule, b: str, steps: Array) -> Array:
    """What so many steps without a gradient leave of a moment, by the name of its rate."""
    return _math.Decay.of(rule.hyperparameters[b], steps.dtype).power(steps)


def faded(
    rule: Rule, moments: tuple[Array, ...], steps: Float[Array, "rows *ones"]
) -> tuple[Array, ...]:
    """The moments after some steps without a gradient."""
    numbers = rule.hyperparameters
    return rule.member.faded(moments, steps, **{x: numbers[x] for x in ("b1", "b2", "eps")})
