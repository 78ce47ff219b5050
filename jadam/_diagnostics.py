"""What an Adam is doing, in a few numbers that tell which hyperparameter is wrong."""

import itertools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from jadam import _math, _validate
from jadam._members import Member
from jadam._search import Found, Parameter, check_class, maximum_of, states_in
from jadam._state import Role
from jadam._types import PyTree, Real, Scalar

RATIO_EDGES = (0.01, 0.03, 0.1, 0.3, 0.7, 2.0)
"""Between the bins of `ratio_histogram`; the first begins at 0, the last is open."""

Report = dict[str, Float[Array, "..."]]
Flags = dict[str, Bool[Array, "*shape"]]


def diagnostics(
    state: Any,
    updates: PyTree,
    params: PyTree,
    grads: PyTree = None,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    adamax: bool = False,
    maximum: Literal["raw", "corrected"] | None = None,
    **rates: Scalar,
) -> dict[str, Any]:
    """What a step did, for each leaf and for all: sizes, signal and noise, where eps rules.

    Call it in the jitted step, every so many steps. It reads updates, parameters and gradients
    once and the moments twice, and makes no array of a leaf's size (on a CPU one, while it sums
    the v of a leaf in 8 bits or of a table in `jadam.rows`).

    Args:
        state: the state after the step, with states of this family anywhere in it. Moments in a
            state of `jadam.rows` count as dense steps would have made them by now: faded since the
            last update of their row. (With `catch_up=False` they stand still: pass the field
            `dense`.)
        updates: what the step returned, a tree like the parameters. Of a table in `jadam.rows`
            by how much it has changed.
        params: the parameters, before or after the step.
        grads: the gradients, for `grad_rms`.
        b1: the optimizer's, as are `b2`, `eps` and `eps_root`.
        adamax: whether the state is `adamax`'s, with u in `nu`.
        maximum: the optimizer's, for `amsgrad`. Default: what the class of the state says.
        **rates: its other decay rates, where the member has more than two.

    Returns:
        `{"whole": report, "leaves": {path: report}}`, with the paths of `jax.tree_util.keystr`;
        without the leaves that no state of the family covers. A report is a dictionary of float32:

        - update_rms, param_rms, grad_rms: the root mean squares; the last where `grads` is given.
        - update_to_param: update_rms / param_rms, 0 where nothing moves.
        - v_rms: √ of the mean of v̂, the gradients' root mean square over some 1/(1-b2) steps.
        - eps_share: the share of coordinates in which eps > √(v̂ + eps_root), so that eps is more
          than half of the denominator (AdaMax: of u).
        - zero_share: where v is 0 because no gradient has come; a part of eps_share.
        - ratio_histogram: the shares with |m̂|/√v̂ up to 0.01, 0.03, 0.1, 0.3, 0.7, 2, and above,
          m̂ = m/(1-b1ᵗ) for every member. Gradients that agree give 1, pure noise
          √((1-b1)/(1+b1)) in the root mean square, which is 0.23 by default. NaN is in no bin.
        - m_end_share, v_end_share: of the moments in 8 or 4 bits, the codes at an end of their
          range. Absent without such moments.

    Raises:
        TypeError: an argument is no number, or a leaf no floating-point or complex array.
        ValueError: there is no state of the family, or there are two for one leaf; a leaf is
            missing or of another shape; an argument is out of range.

    >>> import jax.numpy as jnp, jadam
    >>> tx = jadam.adam(1e-3)
    >>> params = {"w": jnp.full(4, 2.0)}
    >>> grads = {"w": jnp.array([3.0, -3.0, 1e-9, 0.0])}
    >>> updates, state = tx.update(grads, tx.init(params))
    >>> report = jadam.diagnostics(state, updates, params, grads)["leaves"]["['w']"]
    >>> {name: round(float(report[name]), 4) for name in ("grad_rms", "update_to_param")}
    {'grad_rms': 2.1213, 'update_to_param': 0.0004}
    >>> float(report["eps_share"]), float(report["zero_share"])
    (0.5, 0.25)
    """
    b1, b2 = _validate.decay_rate("b1", b1), _validate.decay_rate("b2", b2)
    eps, eps_root = _validate.non_negative("eps", eps), _validate.non_negative("eps_root", eps_root)
    if maximum is not None:
        _validate.choice("maximum", maximum, ("raw", "corrected"))
    rates |= {"b1": b1, "b2": b2}
    found = states_in("state", state, adamax=adamax)
    check_class((each.state for each in found), maximum)
    states = _by_parameter(found)
    named = {"update": updates, "param": params}
    if grads is not None:
        named["grad"] = grads
    arrays = {name: _matching(f"{name}s", tree, states) for name, tree in named.items()}

    def sums(state: Found, parameter: Parameter, path: str) -> Report:
        moments = _moments(state, parameter, rates, eps)
        root = jnp.sqrt(moments.v_hat + jnp.asarray(eps_root, moments.v_hat.dtype))
        flags = {
            "eps": jnp.asarray(eps * (2 if adamax else 1), root.dtype) > root,
            "zero": moments.v_hat == 0,
            **_bins(moments),
            **moments.ends,
        }
        totals = {name: jnp.sum(_square(leaves[path])) for name, leaves in arrays.items()}
        totals |= {"size": jnp.float32(math.prod(parameter.shape)), "v": moments.v_total}
        if moments.ends:
            totals["coded"] = totals["size"]
        return {name: x.astype(jnp.float32) for name, x in (totals | _counts(flags)).items()}

    leaves = {path: sums(*covered, path) for path, covered in states.items()}
    return {
        "whole": _report(list(leaves.values())),
        "leaves": {path: _report([leaf]) for path, leaf in leaves.items()},
    }


# Trees


def _by_path(tree: PyTree) -> dict[str, Any]:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): leaf for path, leaf in flat}


def _by_parameter(found: list[Found]) -> dict[str, tuple[Found, Parameter]]:
    """Each parameter that a state of the family covers, with its state, by its path."""
    by_path = {}
    for state in found:
        for parameter in state.parameters:
            path = jax.tree_util.keystr(parameter.path)
            if path in by_path:
                raise ValueError(
                    f"state: expected one state of the family for each leaf, found two for {path}"
                )
            by_path[path] = state, parameter
    return by_path


def _matching(name: str, tree: PyTree, states: dict[str, Any]) -> dict[str, Array]:
    """The leaves of a tree that the states cover, of the shapes there."""
    leaves = _by_path(tree)
    for path, (_, parameter) in states.items():
        if path not in leaves:
            raise ValueError(f"{name}{path} is missing: state.mu{path} exists")
        _validate.inexact_leaves(f"{name}{path}", leaves[path])
        if np.shape(leaves[path]) != parameter.shape:
            raise ValueError(
                f"{name}{path}: expected shape {parameter.shape} of state.mu{path}, got "
                f"{np.shape(leaves[path])}"
            )
    return {path: jnp.asarray(leaves[path]) for path in states}


# One leaf


class _Moments(NamedTuple):
    """|m̂|², the v̂ that the step divides by (AdaMax: u²; AMSGrad: the largest), the sum of v̂.

    And which codes are at an end of their range, where there are codes.
    """

    m_squared: Real
    v_hat: Real
    v_total: Float[Array, ""]
    ends: Flags


def _square(x: Array) -> Real:
    return _math.square(x.astype(_math.widen(x.dtype)))


def _moments(state: Found, parameter: Parameter, rates: dict[str, Scalar], eps: Scalar) -> _Moments:
    member = state.member
    m, second, largest = _by_role(member, state.numbers(parameter, rates, eps))
    t = jnp.maximum(state.state.count, 1).astype(second.dtype)
    c1, c2 = (_math.bias_correction(_math.Decay.of(b, t.dtype), t) for b in member.rates_in(rates))
    m_squared = _math.square(m) * (1 / c1**2)
    ends = parameter.storage.range_ends(parameter.stored)
    if member.power == 1:
        return _Moments(m_squared, second**2, jnp.sum(second**2), ends)
    is_corrected = largest is not None and maximum_of(state.state) == "corrected"
    v_hat = second if largest is None else largest
    # Corrected after the sum: XLA:CPU would store v̂ as a whole array.
    return _Moments(
        m_squared, v_hat if is_corrected else v_hat * (1 / c2), jnp.sum(second) / c2, ends
    )


def _by_role(member: Member, moments: tuple[Array, ...]) -> tuple[Array, Array, Array | None]:
    """The first of the first moments, the second moment and its maximum, where there is one."""
    by_role: dict[Role, Array] = {}
    for moment, x in zip(member.moments, moments, strict=True):
        by_role.setdefault(moment.role, x)
    return by_role[Role.FIRST], by_role[Role.SECOND], by_role.get(Role.MAXIMUM)


def _bins(moments: _Moments) -> Flags:
    """|m̂|/√v̂ up to each edge, as squares: XLA:CPU would store a quotient that is used often."""
    m_squared, v_hat = moments.m_squared, moments.v_hat
    upto = {f"upto_{edge}": m_squared <= edge**2 * v_hat for edge in RATIO_EDGES}
    return upto | {"above": m_squared > RATIO_EDGES[-1] ** 2 * v_hat}


def _counts(flags: Flags) -> Report:
    """How often each is true: one reduction of all, hence one pass without temporaries.

    As integers, which are exact to 2³², and which XLA:CPU may add in any order, hence as vectors.
    """
    operands = tuple(flag.astype(jnp.uint32) for flag in flags.values())
    zeros = (np.uint32(0),) * len(operands)
    axes = tuple(range(operands[0].ndim))
    counts = lax.reduce(operands, zeros, lambda a, b: tuple(map(jnp.add, a, b)), axes)
    return dict(zip(flags, counts, strict=True))


def _report(leaves: list[Report]) -> Report:
    """The means and shares of the totals of some leaves."""
    total: Report = {}
    for leaf in leaves:
        for name, x in leaf.items():
            total[name] = total[name] + x if name in total else x
    if not total:
        return {}
    n = jnp.maximum(total["size"], 1)
    squares = [name for name in ("update", "param", "grad", "v") if name in total]
    report = {f"{name}_rms": jnp.sqrt(total[name] / n) for name in squares}
    moved = report["update_rms"]
    report["update_to_param"] = moved / jnp.where(moved == 0, 1, report["param_rms"])
    report["eps_share"] = total["eps"] / n
    report["zero_share"] = total["zero"] / n
    upto = [jnp.zeros_like(n), *(total[f"upto_{edge}"] for edge in RATIO_EDGES)]
    bins = [*(b - a for a, b in itertools.pairwise(upto)), total["above"]]
    report["ratio_histogram"] = jnp.stack(bins) / n
    if "coded" in total:
        for name in ("m_end", "v_end"):
            report[f"{name}_share"] = total[name] / jnp.maximum(total["coded"], 1)
    return report
