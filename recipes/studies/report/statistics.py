"""Means, spreads and Student's t intervals of a few runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import t as student_t


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
    return float(student_t.ppf(0.975, n - 1)) / math.sqrt(n)


def paired_differences(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[int, float]:
    """Ours minus theirs for every seed that both have."""
    return {seed: ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())}
