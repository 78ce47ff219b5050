"""Intervals of a mean by Student's t."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    """A mean and its 95% confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Whether 0 lies in the interval of a difference: not where a run diverged to NaN."""
        return "no difference found" if self.low <= 0 <= self.high else "differs"


def interval(values: Sequence[float]) -> Interval:
    """By Student's t with n-1 degrees of freedom.

    Raises:
        ValueError: fewer than two values.
    """
    if (n := len(values)) < 2:
        raise ValueError(f"values: expected 2 or more, got {n}")
    mean = float(np.mean(values))
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
    return Interval(mean, mean - half, mean + half)
