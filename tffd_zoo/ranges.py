"""What a setting may be: refused where it is made, in one line, rather than found out an hour later."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Range:
    """Finite numbers from `low` to `high`."""

    low: float = -math.inf
    high: float = math.inf
    without_low: bool = False
    """`low` itself is out of range."""
    without_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.without_low else value >= self.low
        below = value < self.high if self.without_high else value <= self.high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        start = f"above {self.low:g}" if self.without_low else f"{self.low:g}"
        if self.high == math.inf:
            return start if self.without_low else f"{start} or more"
        return f"{start} to {'below ' if self.without_high else ''}{self.high:g}"


COUNT = Range(1)
NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, without_low=True)
PART = Range(0, 1)
PART_BELOW_ONE = Range(0, 1, without_high=True)


def check_ranges(config: object, **ranges: Range) -> None:
    """Make sure that every named field of a dataclass, or every entry of it, is None or in its range.

    Raises:
        ValueError: names the flag, its value and the range.
    """
    for name, allowed in ranges.items():
        value: Any = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and number not in allowed:
                raise ValueError(f"--{name.replace('_', '-')} {number:g} is out of range; choose {allowed}")
