"""Means, spreads and Student's t intervals of a few runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student_t

LEVEL = 0.95


@dataclass(frozen=True)
class Spread:
    """How far runs lie apart by chance alone: a standard deviation, and the degrees of freedom that it rests on."""

    sd: float
    degrees: int


@dataclass(frozen=True)
class Estimate:
    """Mean of n values, and what is known of its error."""

    mean: float
    n: int
    sd: float | None
    """Sample standard deviation (n - 1); None for one value."""
    error: Spread | None
    """Standard error of the mean; None for one value, which tells nothing of its error."""

    def half_width(self, level: float = LEVEL) -> float:
        """Of the interval that holds the true mean at this level, t * standard error."""
        assert self.error is not None, "one value has no interval"
        return self.error.sd * float(student_t.ppf((1 + level) / 2, self.error.degrees))

    @property
    def low(self) -> float:
        return self.mean - self.half_width()

    @property
    def high(self) -> float:
        return self.mean + self.half_width()

    @property
    def verdict(self) -> str:
        """`above` or `below` zero with its whole interval, `neither`, or `unknown` without one."""
        if self.error is None:
            return "unknown"
        return ("above" if self.mean > 0 else "below") if self.excludes_zero() else "neither"

    def excludes_zero(self, level: float = LEVEL) -> bool:
        """Whether the interval of this level has zero outside."""
        return self.error is not None and abs(self.mean) > self.half_width(level)


def widened(count: int) -> float:
    """Level at which each of so many intervals is to be held for all of them to hold at :data:`LEVEL` (Bonferroni)."""
    return 1 - (1 - LEVEL) / count


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, standard deviation and t interval of independent values."""
    n, mean = len(values), statistics.fmean(values)
    if n == 1:
        return Estimate(mean, 1, None, None)
    sd = statistics.stdev(values)
    return Estimate(mean, n, sd, Spread(sd / math.sqrt(n), n - 1))


def estimate_gain(differences: Sequence[float], runs: Spread | None) -> Estimate:
    """Mean of the paired differences of two recipes, with the spread that :func:`spread_of_runs` found.

    Its standard error is sd * sqrt(2 / n): a difference is one of two runs. One pair gets no interval even so: that its
    recipe scatters as the others do is more than one run can show.
    """
    own = estimate(differences)
    if own.error is None or runs is None:
        return own
    return Estimate(own.mean, own.n, own.sd, Spread(runs.sd * math.sqrt(2 / own.n), runs.degrees))


def spread_of_runs(recipes: Sequence[Mapping[int, float]]) -> Spread | None:
    """What is left of the spread of runs once each value is taken as the sum of its recipe's and its seed's part.

    The residual standard deviation of a two-way layout without interaction, fitted by least squares; recipes may lack
    seeds. It takes all recipes to scatter alike. Of two recipes with the same n seeds it is the standard deviation of
    their differences over sqrt(2), with n - 1 degrees of freedom: the interval is that of Student's paired t then.

    Args:
        recipes: of each recipe its values by seed.

    Returns:
        None where the runs are too few to tell.
    """
    seeds = sorted({seed for values in recipes for seed in values})
    runs = [(row, seed, value) for row, values in enumerate(recipes) for seed, value in values.items()]
    layout = np.zeros((len(runs), len(recipes) + len(seeds)))
    for position, (row, seed, _) in enumerate(runs):
        layout[position, [row, len(recipes) + seeds.index(seed)]] = 1
    values = np.array([value for *_, value in runs])
    fitted, _, rank, _ = np.linalg.lstsq(layout, values, rcond=None)
    degrees = len(runs) - int(rank)
    if degrees < 1:
        return None
    return Spread(math.sqrt(float(np.square(values - layout @ fitted).sum()) / degrees), degrees)


def paired_differences(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[int, float]:
    """Ours minus theirs for every seed that both have."""
    return {seed: ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())}
