"""Comparing what steps cost on a noisy machine: interleaved times, paired ratios, and the peak of the memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

Step = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One compared cost: the median of paired ratios, and how far they spread."""

    part: str
    """The section of the report."""
    what: str
    """What over what."""
    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    n: int
    """Pairs."""
    unit: str = "x"
    """`x` is a ratio; `ms` a time; `images/s` a rate."""
    seconds: tuple[float, float] | None = None
    """Median times of the two, where they were timed."""
    bound: Literal["<=", ">="] | None = None
    """How the target is meant; None has no target."""
    target: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the median meets the target."""
        if self.target is None:
            return None
        return self.median <= self.target if self.bound == "<=" else self.median >= self.target


def interleave(steps: Mapping[str, Step], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of every step in every round: all of them in turn, so that what slows the machine slows all alike.

    The order turns by one each round; the first `warmup` rounds, with compilation in them, do not count.
    """
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            _wait_for_device()
            started = time.perf_counter()
            steps[name]()
            _wait_for_device()
            if turn >= warmup:
                times[name].append(time.perf_counter() - started)
    return times


def compare(part: str, what: str, above: Sequence[float], below: Sequence[float], **target: Any) -> Row:
    """The row of `above` over `below`, times of the same rounds."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return summary(part, what, ratios, seconds=(statistics.median(above), statistics.median(below)), **target)


def summary(part: str, what: str, values: Sequence[float], **rest: Any) -> Row:
    """The row of some measured values."""
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return Row(part, what, median, low, high, len(values), **rest)


def peak_memory(step: Step, module: nn.Module, tensors: Sequence[Tensor] = ()) -> int:
    """Bytes in use at the worst moment of a step: what lies there all the time, and the peak on top of it.

    Args:
        step: one training step that leaves no gradients behind.
        module: parameters and buffers of it lie there all the time.
        tensors: so do these, such as the batch and the state of the optimizer.
    """
    resident = sum(t.untyped_storage().nbytes() for t in [*module.parameters(), *module.buffers(), *tensors])
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    kineto: Any = profiled.profiler
    in_use = peak = 0
    for event in sorted(kineto.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            in_use += event.nbytes()
            peak = max(peak, in_use)
    return resident + peak


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
