"""The pictures of a report: learning curves, gains with their intervals, gradient shares over training."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tffd_zoo.pictures import COLOURS, NEUTRAL

from .statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DASHES = ("-", "--", ":")
MOST_BANDS = 6
"""Recipes whose ranges can still be told apart in one picture."""

Series = Mapping[int, Sequence[tuple[float, float]]]
"""For every seed its (epoch, value) points."""


@dataclass(frozen=True)
class Gain:
    """The paired differences of a recipe to its twin."""

    label: str
    differences: Sequence[float]
    mean: Estimate
    published: float | None
    """The gain that its source claims."""


def draw_curves(top1: Mapping[str, Series], twins: Mapping[str, str]) -> Figure:
    """Top-1 over the epochs, and the paired difference to the twin.

    Args:
        top1: top-1 (%) of every recipe.
        twins: of the recipes that have one, the recipe that each is compared with.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, max(3.6, 0.2 * len(top1) + 1.2)), layout="constrained")
    curves, gaps = figure.subplots(1, 2)
    styles = _styles(top1, [name for name in top1 if name not in twins])
    band = len(top1) <= MOST_BANDS
    for name, series in top1.items():
        _mean_and_range(curves, series, band, label=name, **styles[name])
        difference = _difference(series, top1.get(twins.get(name, ""), {}))
        if difference:
            _mean_and_range(gaps, difference, band, **styles[name])
    gaps.axhline(0, color=NEUTRAL, linewidth=1)
    curves.set_title("top-1 (%)")
    gaps.set_title("top-1 minus that of the twin, same seed (points)")
    for axes in (curves, gaps):
        _count_epochs(axes)
    figure.legend(loc="outside right upper")
    return figure


def draw_gains(gains: Sequence[Gain], over: str) -> Figure:
    """Forest plot: one line per recipe with its runs, their mean, its 95 % interval and the published gain.

    Args:
        gains: the lines, from the top.
        over: what the gains are over, for the title.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.5 + 0.38 * len(gains)), layout="constrained")
    axes = figure.subplots()
    left, right = _limits(gains)
    for position, gain in enumerate(gains):
        known = gain.mean.half_width is not None
        if known:
            ends = max(gain.mean.low, left), min(gain.mean.high, right)
            axes.plot(ends, (position, position), color=COLOURS[0], linewidth=2, solid_capstyle="butt", zorder=2)
            for end, true_end, arrow in zip(ends, (gain.mean.low, gain.mean.high), "<>", strict=True):
                if end != true_end:  # the interval goes on beyond the picture
                    axes.plot(end, position, marker=arrow, color=COLOURS[0], markersize=7, clip_on=False, zorder=2)
            runs = gain.differences
            axes.plot(runs, [position] * len(runs), "|", color=NEUTRAL, markersize=8, markeredgewidth=1.2, zorder=3)
        face = COLOURS[0] if known else "white"
        axes.plot(gain.mean.mean, position, "o", color=COLOURS[0], markerfacecolor=face, markersize=7, zorder=4)
        if gain.published is not None:
            axes.plot(gain.published, position, "D", color=COLOURS[1], markerfacecolor="none", markersize=6, zorder=3)
    axes.axvline(0, color=NEUTRAL, linewidth=1)
    axes.set_xlim(left, right)
    axes.set_ylim(len(gains) - 0.5, -0.5)
    axes.set_yticks(range(len(gains)), [f"{gain.label}  (n = {gain.mean.n})" for gain in gains])
    axes.grid(axis="y", visible=False)
    axes.set(title=f"gain in top-1 of the last epoch over {over}", xlabel="points, paired by seed")
    figure.legend(handles=_gain_legend(gains), loc="outside lower center", ncols=4)
    return figure


def draw_shares(shares: Mapping[str, Mapping[str, Series]]) -> Figure:
    """Gradient share of every loss over the epochs.

    Args:
        shares: by loss, then by recipe, as fractions.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(shares) + 1.8, 3.4), layout="constrained")
    styles = _styles({name: None for series in shares.values() for name in series}, ())
    labelled: set[str] = set()
    for axes, (term, recipes) in zip(figure.subplots(1, len(shares), squeeze=False)[0], shares.items(), strict=True):
        for name, series in recipes.items():
            percent = {seed: [(epoch, 100 * share) for epoch, share in points] for seed, points in series.items()}
            label = None if name in labelled else name  # one legend for all panels
            labelled.add(name)
            _mean_and_range(axes, percent, len(styles) <= MOST_BANDS, label=label, **styles[name])
        axes.set(title=f"gradient share of {term} (%)")
        _count_epochs(axes)
        positive = [share for series in recipes.values() for points in series.values() for _, share in points if share]
        if positive and max(positive) > 10 * min(positive):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
        else:
            axes.set_ylim(bottom=0)
    figure.legend(loc="outside right upper")
    return figure


def _styles(names: Mapping[str, object], baselines: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour and dashes for every recipe; neutral for what others are compared with."""
    others = [name for name in names if name not in baselines]
    styles = {
        name: {"color": COLOURS[k % len(COLOURS)], "linestyle": DASHES[k // len(COLOURS) % len(DASHES)]}
        for k, name in enumerate(others)
    }
    return styles | {name: {"color": NEUTRAL, "linestyle": DASHES[k % len(DASHES)]} for k, name in enumerate(baselines)}


def _mean_and_range(axes: Any, series: Series, band: bool, label: str | None = None, **style: Any) -> None:
    """The mean over the seeds, and with `band` the range from the lowest to the highest of them."""
    by_epoch: dict[float, list[float]] = {}
    for points in series.values():
        for epoch, value in points:
            by_epoch.setdefault(epoch, []).append(value)
    epochs = sorted(by_epoch)
    means = [statistics.fmean(by_epoch[epoch]) for epoch in epochs]
    axes.plot(epochs, means, label=label, marker="o" if len(epochs) < 5 else None, markersize=3, **style)
    if band and len(series) > 1:
        low, high = ([pick(by_epoch[epoch]) for epoch in epochs] for pick in (min, max))
        axes.fill_between(epochs, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _count_epochs(axes: Any) -> None:
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _difference(ours: Series, theirs: Series) -> dict[int, list[tuple[float, float]]]:
    """Ours minus theirs by seed and epoch, where both have a value."""
    found = {}
    for seed in sorted(ours.keys() & theirs.keys()):
        twin = dict(theirs[seed])
        found[seed] = [(epoch, value - twin[epoch]) for epoch, value in ours[seed] if epoch in twin]
    return {seed: points for seed, points in found.items() if points}


def _limits(gains: Sequence[Gain]) -> tuple[float, float]:
    """Ends of the forest plot: room for zero, every run, every published gain, and every interval of like size."""
    points = [0.0, *(value for gain in gains for value in (*gain.differences, gain.published or 0.0))]
    far = 3 * max(map(abs, points))
    ends = [end for gain in gains if gain.mean.half_width is not None for end in (gain.mean.low, gain.mean.high)]
    points += [end for end in ends if abs(end) <= far]
    margin = 0.08 * (max(points) - min(points)) or 1.0
    return min(points) - margin, max(points) + margin


def _gain_legend(gains: Sequence[Gain]) -> list[Any]:
    """A handle for every kind of mark that the picture has."""
    from matplotlib.lines import Line2D

    def mark(marker: str, colour: str, label: str, face: str | None = None, line: str = "") -> Line2D:
        return Line2D([], [], color=colour, marker=marker, markerfacecolor=face, linestyle=line, label=label)

    known = [gain.mean for gain in gains if gain.mean.half_width is not None]
    left, right = _limits(gains)
    marks = []
    if known:
        beyond = " (arrow: goes on)" if any(mean.low < left or mean.high > right for mean in known) else ""
        marks.append(mark("o", COLOURS[0], f"mean, 95 % interval{beyond}", line="-"))
        marks.append(mark("|", NEUTRAL, "one pair of runs"))
    if len(known) < len(gains):
        marks.append(mark("o", COLOURS[0], "one pair of runs: no interval", face="white"))
    if any(gain.published is not None for gain in gains):
        marks.append(mark("D", COLOURS[1], "published, other recipe", face="none"))
    return marks
