"""The pictures of a report: the gain of every recipe over its twin, and what longer runs give."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

from tffd_zoo.pictures import COLOURS, NEUTRAL

from .statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Gain:
    """The paired differences of a recipe to its twin."""

    label: str
    differences: Sequence[float]
    mean: Estimate
    published: float | None
    """The gain that its source claims."""


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
        known = gain.mean.error is not None
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


def draw_lengths(recipes: Mapping[str, Mapping[int, Sequence[float]]]) -> Figure:
    """Top-1 after the last epoch against the number of epochs: a dot for each run, a line through their means.

    Args:
        recipes: of every recipe the values of its runs, by length.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for colour, (recipe, by_length) in zip(cycle((NEUTRAL, *COLOURS)), recipes.items(), strict=False):
        lengths = sorted(by_length)
        axes.plot(lengths, [statistics.fmean(by_length[length]) for length in lengths], color=colour)
        runs = [(length, value) for length in lengths for value in by_length[length]]
        axes.plot(*zip(*runs, strict=True), "o", color=colour, markersize=5, alpha=0.7, label=recipe)
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    ticks = sorted({length for by_length in recipes.values() for length in by_length})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set(title="after the last epoch, a dot for each run", xlabel="epochs", ylabel="top-1, %")
    axes.legend(loc="lower right")
    return figure


def _limits(gains: Sequence[Gain]) -> tuple[float, float]:
    """Ends of the forest plot: room for zero, every run, every published gain, and every interval of like size."""
    points = [0.0, *(value for gain in gains for value in (*gain.differences, gain.published or 0.0))]
    far = 3 * max(map(abs, points))
    ends = [end for gain in gains if gain.mean.error is not None for end in (gain.mean.low, gain.mean.high)]
    points += [end for end in ends if abs(end) <= far]
    margin = 0.08 * (max(points) - min(points)) or 1.0
    return min(points) - margin, max(points) + margin


def _gain_legend(gains: Sequence[Gain]) -> list[Any]:
    """A handle for every kind of mark that the picture has."""
    from matplotlib.lines import Line2D

    def mark(marker: str, colour: str, label: str, face: str | None = None, line: str = "") -> Line2D:
        return Line2D([], [], color=colour, marker=marker, markerfacecolor=face, linestyle=line, label=label)

    known = [gain.mean for gain in gains if gain.mean.error is not None]
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
