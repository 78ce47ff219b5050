"""The equations of a step as numbers, for the members whose equations the kernels have."""

from typing import NamedTuple

import jax.numpy as jnp

from jadam import _math
from jadam._types import Scalar


class Coefficients(NamedTuple):
    """One step of Adam, NAdam or RAdam as numbers.

    m = start1 + share1·(g - m),  v = start2 + share2·(g² - v + dither·spacing(v)),
    direction = m̂/(c1·(√min(v/c2 + eps_root, most) + eps)),  m̂ = m_weight·m + g_weight·g

    Without Nesterov's look-ahead both weights are 0, and m̂ is m. With most = 0 and eps = 1 nothing
    is divided: the root is 2⁻⁵¹ then, and is lost beside 1.

    A mean starts from what was before, m or v, or from g or g² where its share is -b.
    """

    share1: Scalar
    share2: Scalar
    dither: Scalar
    m_weight: Scalar
    g_weight: Scalar
    c1: Scalar
    c2: Scalar
    eps: Scalar
    eps_root: Scalar
    most: Scalar = jnp.inf


def adam(
    time: _math.Time, *, b1: Scalar, b2: Scalar, eps: Scalar, eps_root: Scalar
) -> Coefficients:
    """Those of `_math.adam`."""
    d1, d2 = _math.Decay.of(b1, time.t.dtype), _math.Decay.of(b2, time.t.dtype)
    c1 = _math.bias_correction(d1, time.t)
    return _of(d1, d2, time, _math.Momentum(0.0, 0.0), c1, eps, eps_root)


def nadam(
    time: _math.Time,
    *,
    b1: Scalar,
    b2: Scalar,
    eps: Scalar,
    eps_root: Scalar,
    momentum_decay: Scalar | None,
) -> Coefficients:
    """Those of `_math.nadam`."""
    d1, d2 = _math.Decay.of(b1, time.t.dtype), _math.Decay.of(b2, time.t.dtype)
    look_ahead = _math.momentum(d1, time.t, momentum_decay)
    return _of(d1, d2, time, look_ahead, jnp.ones_like(time.t), eps, eps_root)


def radam(
    time: _math.Time,
    *,
    b1: Scalar,
    b2: Scalar,
    eps: Scalar,
    eps_root: Scalar,
    threshold: Scalar,
    nesterov: bool,
) -> Coefficients:
    """Those of `_math.radam`: r is within c1 or the look-ahead."""
    d2 = _math.Decay.of(b2, time.t.dtype)
    tractable, r = _math.rectification(d2, time.t, threshold)
    plain = {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root}
    if nesterov:
        found = nadam(time, **plain, momentum_decay=None)
        found = found._replace(m_weight=r * found.m_weight, g_weight=r * found.g_weight)
    else:
        found = adam(time, **plain)
        found = found._replace(c1=found.c1 / r)
    one, infinity = jnp.ones_like(r), jnp.full_like(r, jnp.inf)
    return found._replace(
        eps=jnp.where(tractable, jnp.asarray(eps, r.dtype), one),
        most=jnp.where(tractable, infinity, 0),
    )


def _of(
    d1: _math.Decay,
    d2: _math.Decay,
    time: _math.Time,
    look_ahead: _math.Momentum,
    c1: Scalar,
    eps: Scalar,
    eps_root: Scalar,
) -> Coefficients:
    dither, c2 = _math.dither_of_v(d2, time), _math.bias_correction(d2, time.t)
    return Coefficients(d1.share, d2.share, dither, *look_ahead, c1, c2, eps, eps_root)
