"""Two models on the same images: the difference of every figure, and how sure it is.

An interval here says what other test images might have shown, of these very weights. What another seed of training
would have given is another question, and only several pairs of runs answer it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .measurement import Measurement, Part, Sample

LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """A figure of a model minus that of the one it is held against."""

    figure: str
    ours: float
    theirs: float
    low: float
    """Lower end of the 95 % bootstrap interval of the difference."""
    high: float
    mcnemar_p: float | None = None
    """Exact two-sided p of McNemar's test, for a figure that is the part of right images."""

    @property
    def difference(self) -> float:
        return self.ours - self.theirs


def same_images(ours: Measurement, theirs: Measurement) -> list[str]:
    """The samples that both have, of as many images, by name."""
    return [
        name
        for name, sample in ours.samples.items()
        if name in theirs.samples and _size(sample) == _size(theirs.samples[name])
    ]


def differences(part: Part, ours: Measurement, theirs: Measurement, resamples: int, seed: int) -> list[Difference]:
    """The differences of all figures of a part, with percentile intervals of the paired bootstrap.

    Both models are always drawn the same images, each set of images by itself. A figure of the two together, such as
    mCE, is held against 100.
    """
    names = same_images(ours, theirs)
    if not names:
        return []
    pair = [{name: measured.samples[name] for name in names} for measured in (ours, theirs)]
    sizes = {name: _size(sample) for name, sample in pair[0].items()}

    def both(chosen: Mapping[str, np.ndarray] | None) -> dict[str, tuple[float, float]]:
        a, b = (part.figures(samples if chosen is None else _take(samples, chosen)) for samples in pair)
        relative = {name: (value, 100.0) for name, value in part.relative(a, b).items()}
        return {name: (a[name], b[name]) for name in a if name in b} | relative

    whole = both(None)
    drawn: dict[str, list[float]] = {name: [] for name in whole}
    generator = np.random.default_rng(seed)
    for _ in range(resamples):
        again = both({name: generator.integers(0, size, size) for name, size in sizes.items()})
        for name in drawn.keys() & again.keys():
            drawn[name].append(again[name][0] - again[name][1])
    found = []
    for name, values in drawn.items():
        low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if values else (np.nan, np.nan)
        found.append(Difference(name, *whole[name], float(low), float(high), _mcnemar_of(name, *pair)))
    return found


def mcnemar(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Exact two-sided p of McNemar's test: are the images that one model alone gets right shared out evenly?

    Args:
        ours: (N,) bool, what we get right.
        theirs: (N,) bool.
    """
    from scipy.stats import binomtest

    only_ours, only_theirs = int((ours & ~theirs).sum()), int((~ours & theirs).sum())
    if only_ours + only_theirs == 0:
        return 1.0
    return float(binomtest(only_ours, only_ours + only_theirs, 0.5).pvalue)


def _mcnemar_of(figure: str, ours: Mapping[str, Sample], theirs: Mapping[str, Sample]) -> float | None:
    """McNemar's p of a figure that is the part of right images: their values then have its name."""
    for name, sample in ours.items():
        values = sample.get(figure)
        if values is not None and values.dtype == bool and values.ndim == 1:
            return mcnemar(values, theirs[name][figure])
    return None


def mean_over_pairs(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of the differences of several pairs of runs, and Student's 95 % interval of it."""
    from scipy.stats import t

    mean, half = float(np.mean(values)), float(t.ppf((1 + LEVEL) / 2, len(values) - 1))
    half *= float(np.std(values, ddof=1)) / len(values) ** 0.5
    return mean, mean - half, mean + half


def _size(sample: Sample) -> int:
    return len(next(iter(sample.values())))


def _take(samples: Mapping[str, Sample], chosen: Mapping[str, np.ndarray]) -> dict[str, Sample]:
    return {name: {array: values[chosen[name]] for array, values in sample.items()} for name, sample in samples.items()}
