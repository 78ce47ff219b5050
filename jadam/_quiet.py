"""What a member does while no gradient comes: the direction of its steps in closed form.

After j steps without a gradient the moments are b1ʲ·m and b2ʲ·v, and AMSGrad's maximum is what it
was. The direction is m·w/(√(v + eps_root·s²) + eps·s) + plain·m with numbers w, s and plain that
depend on the time alone: s/√v is 1/√v̂, and w is s·b1ʲ over the bias correction.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jadam import _math

Times = Float[Array, "..."]


class Quiet(NamedTuple):
    """What the direction of a step without a gradient has beside the moments of j steps ago.

    direction = m·weight/(√(v + eps_root·scale²) + eps·scale) + plain·m, v the maximum in AMSGrad.
    """

    weight: Float[Array, "..."]
    scale: Float[Array, "..."]
    plain: Float[Array, "..."] | float


def _correction(b: _math.Decay, then: Times, j: Times) -> Float[Array, "..."]:
    """1 - bᵗ of t = then + j, with one exponential of each row and one of each j."""
    before = -jnp.expm1(then * b.log)
    return before + (1 - before) * _math.bias_correction(b, j)


def adam(then: Times, j: Times, *, b1: float, b2: float, **_: Any) -> Quiet:
    """The j-th step of Adam after `then` updates."""
    d1, d2 = _math.Decay.of(b1, j.dtype), _math.Decay.of(b2, j.dtype)
    scale = jnp.sqrt(_correction(d2, then, j)) * jnp.exp(-0.5 * j * d2.log)
    weight = scale * jnp.exp(j * d1.log) / _correction(d1, then, j)
    return Quiet(weight, scale, 0.0)


def nadam(
    then: Times, j: Times, *, b1: float, b2: float, momentum_decay: float | None, **_: Any
) -> Quiet:
    """The same of NAdam: of its look-ahead only the part of m is left."""
    d1, t = _math.Decay.of(b1, j.dtype), then + j
    scale = adam(then, j, b1=b1, b2=b2).scale
    momentum = jax.vmap(lambda t: jnp.asarray(_math.momentum(d1, t, momentum_decay).m_weight))
    m_weight = momentum(t.reshape(-1)).reshape(t.shape)
    return Quiet(scale * jnp.exp(j * d1.log) * m_weight, scale, 0.0)


def amsgrad(
    then: Times,
    j: Times,
    *,
    b1: float,
    b2: float,
    maximum: str,
    bias_correction_mu: bool,
    bias_correction_nu: bool,
    **_: Any,
) -> Quiet:
    """The same of AMSGrad, beside the maximum of v."""
    d1, d2 = _math.Decay.of(b1, j.dtype), _math.Decay.of(b2, j.dtype)
    one = jnp.ones_like(then + j)
    c1 = _correction(d1, then, j) if bias_correction_mu else one
    corrected_here = bias_correction_nu and maximum == "raw"
    scale = jnp.sqrt(_correction(d2, then, j)) if corrected_here else one
    return Quiet(scale * jnp.exp(j * d1.log) / c1, scale, 0.0)


def radam(
    then: Times,
    j: Times,
    *,
    b1: float,
    b2: float,
    threshold: float,
    nesterov: bool,
    **_: Any,
) -> Quiet:
    """The same of RAdam: while its variance is intractable, plain·m is all."""
    d2 = _math.Decay.of(b2, j.dtype)
    weight, scale, _none = (
        nadam(then, j, b1=b1, b2=b2, momentum_decay=None)
        if nesterov
        else adam(then, j, b1=b1, b2=b2)
    )
    tractable, r = _math.rectification(d2, then + j, threshold)
    return Quiet(
        jnp.where(tractable, r * weight, 0), scale, jnp.where(tractable, 0, weight / scale)
    )
