"""Means, spreads and Student's t intervals of a few runs, in plain Python."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """Mean of n values, and what they tell about its error."""

    mean: float
    n: int
    sd: float | None
    """Sample standard deviation (n - 1); None for one value."""
    half_width: float | None
    """Of the 95 % interval of the mean, t sd / sqrt(n); None for one value, which tells nothing of its error."""

    @property
    def low(self) -> float:
        assert self.half_width is not None
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        assert self.half_width is not None
        return self.mean + self.half_width

    @property
    def verdict(self) -> str:
        """`above` or `below` zero with its whole interval, `neither`, or `unknown` without one."""
        if self.half_width is None:
            return "unknown"
        return "above" if self.low > 0 else "below" if self.high < 0 else "neither"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, standard deviation and 95 % t interval of independent values."""
    n, mean = len(values), statistics.fmean(values)
    if n == 1:
        return Estimate(mean, 1, None, None)
    sd = statistics.stdev(values)
    return Estimate(mean, n, sd, interval_factor(n) * sd)


def interval_factor(n: int) -> float:
    """Half-width of the 95 % interval of a mean of n values, in standard deviations."""
    return t_quantile(0.975, n - 1) / math.sqrt(n)


def paired_differences(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[int, float]:
    """Ours minus theirs for every seed that both have."""
    return {seed: ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())}


def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution, for a probability in [0.5, 1) and whole degrees of freedom.

    With theta = atan(t / sqrt(degrees)), P(|T| < t) is a finite sum of powers of cos theta (Abramowitz and Stegun,
    "Handbook of Mathematical Functions", 26.7.3 and 26.7.4); it grows with theta, so halving finds its inverse.
    """
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        if _central_probability(middle, degrees) < 2 * probability - 1:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan(low)


def _central_probability(theta: float, degrees: int) -> float:
    odd = degrees % 2
    term = math.cos(theta) if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= (k - 1) / k * math.cos(theta) ** 2
        total += term
    total *= math.sin(theta)
    return 2 / math.pi * (theta + total) if odd else total
