"""Adam's family in NumPy float64, written from the papers: the oracle of the tests.

Nothing here is shared with jadam. t counts from 1; `bias(b, t)` is 1 - bᵗ.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


def bias(b: float, t: float) -> float:
    """1 - bᵗ without cancellation."""
    return 1.0 if b == 0 else -np.expm1(t * np.log(b))


def direction(m, v, t, *, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0):
    """Kingma & Ba (2015), Algorithm 1, last lines: m̂ / (√(v̂ + eps_root) + eps)."""
    m, v = np.asarray(m, np.float64), np.asarray(v, np.float64)
    return (m / bias(b1, t)) / (np.sqrt(v / bias(b2, t) + eps_root) + eps)


def nesterov_momentum(m, g, t, *, b1=0.9):
    """Dozat (2016) with constant momentum."""
    return b1 * m / bias(b1, t + 1) + (1 - b1) * g / bias(b1, t)


def dozat_momentum(m, g, t, *, b1=0.9, momentum_decay=0.004):
    """Dozat (2016), Algorithm 2, with the products written out."""
    mu = b1 * (1 - 0.5 * 0.96 ** (np.arange(1, t + 2) * momentum_decay))
    product = np.prod(mu[:t])
    return mu[t] * m / (1 - product * mu[t]) + (1 - mu[t - 1]) * g / (1 - product)


def sma_length(t: int, b2: float) -> float:
    """ρₜ of Liu et al. (2020) as the mean age of the average's weights, a sum of positive terms.

    ρ∞ - 2t·b2ᵗ/(1-b2ᵗ) is 2·Σ (k+1)·b2ᵏ / Σ b2ᵏ - 1 over k < t, without its cancellation.
    """
    weights = b2 ** np.arange(t, dtype=np.float64)
    return 2 * np.sum(np.arange(1, t + 1) * weights) / np.sum(weights) - 1


def rectification(t: int, b2: float) -> float:
    """rₜ of Liu et al. (2020), Algorithm 2."""
    rho, limit = sma_length(t, b2), 2 / (1 - b2) - 1
    return np.sqrt((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho))


def ademamix_warmup(t, *, b1=0.9, b3=0.9999, alpha=5.0, warmup=None):
    """b3 and alpha at step t, Pagliardini et al. (2024), section 3."""
    if warmup is None:
        return b3, alpha
    share, fast, slow = min(t / warmup, 1), 1 / np.log(b1) if b1 else 0.0, 1 / np.log(b3)
    return np.exp(1 / ((1 - share) * fast + share * slow)), share * alpha


def ademamix_bounds(steps, *, b1=0.9, b2=0.999, **options) -> np.ndarray:
    """The largest |direction| of AdEMAMix after steps 1 to `steps` without eps.

    |m| and |slow| by Cauchy and Schwarz, as in `step_bound`, step by step.
    """
    fast = slow = 0.0
    found = []
    for t in range(1, steps + 1):
        b3, alpha = ademamix_warmup(t, b1=b1, **options)
        fast = b1 * b1 / b2 * fast + (1 - b1) ** 2 / (1 - b2)
        slow = b3 * b3 / b2 * slow + (1 - b3) ** 2 / (1 - b2)
        found.append((np.sqrt(fast) / bias(b1, t) + alpha * np.sqrt(slow)) * np.sqrt(bias(b2, t)))
    return np.array(found)


@dataclass
class Member:
    """One optimizer of the family: call it with a gradient, get the direction."""

    kind: str = "adam"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    eps_root: float = 0.0
    momentum_decay: float = 0.004
    b3: float = 0.9999
    alpha: float = 5.0
    warmup: float | None = None
    t: int = 0
    m: np.ndarray | float = 0.0
    v: np.ndarray | float = 0.0
    v_max: np.ndarray | float = 0.0
    slow: np.ndarray | float = 0.0

    def __call__(self, g):
        g = np.asarray(g, np.complex128 if np.iscomplexobj(g) else np.float64)
        self.t += 1
        t, b1, b2 = self.t, self.b1, self.b2
        self.m = b1 * self.m + (1 - b1) * g
        if self.kind == "adamax":
            self.v = np.maximum(b2 * self.v, np.abs(g) + self.eps)
            return self.m / bias(b1, t) / self.v
        self.v = b2 * self.v + (1 - b2) * np.abs(g) ** 2
        m_hat, v_hat = self.m / bias(b1, t), self.v / bias(b2, t)
        if self.kind == "nadam":
            m_hat = nesterov_momentum(self.m, g, t, b1=b1)
        if self.kind == "dozat":
            m_hat = dozat_momentum(self.m, g, t, b1=b1, momentum_decay=self.momentum_decay)
        if self.kind == "amsgrad":
            self.v_max = np.maximum(self.v_max, self.v)
            v_hat = self.v_max / bias(b2, t)
        if self.kind == "amsgrad-corrected":
            v_hat = self.v_max = np.maximum(self.v_max, v_hat)
        if self.kind == "ademamix":
            b3, alpha = ademamix_warmup(t, b1=b1, b3=self.b3, alpha=self.alpha, warmup=self.warmup)
            self.slow = b3 * self.slow + (1 - b3) * g
            m_hat = m_hat + alpha * self.slow
        adaptive = m_hat / (np.sqrt(v_hat + self.eps_root) + self.eps)
        if self.kind == "radam":
            return rectification(t, b2) * adaptive if sma_length(t, b2) >= 5 else m_hat
        return adaptive


def directions(gradients, **options) -> Iterator[np.ndarray]:
    """The directions that a member takes along a sequence of gradients."""
    member = Member(**options)
    return (member(g) for g in gradients)


def step_bound(t: int, b1: float = 0.9, b2: float = 0.999) -> float:
    """The largest |direction| after t steps without eps, by Cauchy and Schwarz.

    |m|² = (1-b1)²·|Σ b1ᵏ·g|² <= (1-b1)²·Σ (b1²/b2)ᵏ · Σ b2ᵏ·g², and the last sum is v/(1-b2).
    """
    powers = (b1 * b1 / b2) ** np.arange(t)
    return (1 - b1) / bias(b1, t) * np.sqrt(bias(b2, t) / (1 - b2) * np.sum(powers))


def extremal_gradients(t: int, b1: float = 0.9, b2: float = 0.999) -> np.ndarray:
    """The gradients for which the bound is attained at step t: g_s proportional to (b2/b1)^s."""
    return (b2 / b1) ** (np.arange(1, t + 1) - float(t))
