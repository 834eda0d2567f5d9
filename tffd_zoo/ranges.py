"""What a setting may be: refused where it is made, in one line, rather than found out an hour later."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, get_type_hints


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
        return abs(value) < math.inf and above and below

    def __str__(self) -> str:
        start = f"above {_shown(self.low)}" if self.without_low else _shown(self.low)
        if self.high == math.inf:
            return start if self.without_low else f"{start} or more"
        return f"{start} to {'below ' if self.without_high else ''}{_shown(self.high)}"


def _shown(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


COUNT = Range(1)
SEED = Range(0, 2**31)
NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, without_low=True)
PART = Range(0, 1)
PART_BELOW_ONE = Range(0, 1, without_high=True)
PART_ABOVE_ZERO = Range(0, 1, without_low=True)
PART_INSIDE = Range(0, 1, without_low=True, without_high=True)


@cache
def ranges_of(config: type) -> dict[str, Range]:
    """The ranges of the fields of a dataclass that have one, `Annotated[float, PART]`."""
    hints = get_type_hints(config, include_extras=True)
    found = {field.name: getattr(hints[field.name], "__metadata__", ()) for field in fields(config)}
    return {name: extra for name, extras in found.items() for extra in extras if isinstance(extra, Range)}


def check_ranges(config: Any, section: str = "") -> None:
    """Make sure that every field of a dataclass that has a range, or every entry of it, is None or in that.

    Args:
        config: the dataclass.
        section: what its flags begin with, `tffd.`.

    Raises:
        ValueError: names the flag, its value and the range.
    """
    for name, allowed in ranges_of(config.__class__).items():
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and number not in allowed:
                flag = f"--{section}{name.replace('_', '-')}"
                raise ValueError(f"{flag} {_shown(number)} is out of range; choose {allowed}")
