"""What a part of the suite is, and what it measures: values of single images, from which every figure follows.

The values are kept, the figures are worked out from them each time. So a figure can be added without measuring again,
and the interval of any figure, or of a difference between two models, comes from drawing the images anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..atomic import replacing_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .setting import Setting
    from .subject import Subject

Sample = Mapping[str, np.ndarray]
"""Arrays by name, whose first axis are the same images."""
Figures = dict[str, float]


@dataclass(frozen=True)
class Measurement:
    """What a part found out about one model."""

    samples: Mapping[str, Sample] = field(default_factory=dict)
    """Values of single images, by set of images. Boolean ones that say which images are right have the name of the
    figure that is their share."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What is one number or one word for all images, flat: counts, settings, what could not be had."""
    problems: tuple[str, ...] = ()
    """What was left out, and why, one line each."""

    def save(self, path: Path) -> None:
        """Write it to one .npz file, whole or not at all."""
        arrays: dict[str, Any] = {
            f"{sample}/{name}": array for sample, values in self.samples.items() for name, array in values.items()
        }
        notes = json.dumps({"facts": self.facts, "problems": self.problems})
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(path) as aside, aside.open("wb") as file:
            np.savez_compressed(file, notes=np.array(notes), **arrays)

    @classmethod
    def load(cls, path: Path) -> Measurement:
        """Read what :meth:`save` wrote."""
        samples: dict[str, dict[str, np.ndarray]] = {}
        with np.load(path, allow_pickle=False) as file:
            notes = json.loads(str(file["notes"]))
            for key in file.files:
                sample, _, name = key.rpartition("/")
                if sample:
                    samples.setdefault(sample, {})[name] = file[key]
        return cls(samples, notes["facts"], tuple(notes["problems"]))


@dataclass(frozen=True)
class Part:
    """One part of the suite."""

    name: str
    measure: Callable[[Subject, Setting], Measurement]
    figures: Callable[[Mapping[str, Sample]], Figures]
    """From the values of images to figures; percent where the name does not say otherwise."""
    depends: tuple[str, ...] = ()
    """The settings of `SuiteConfig` that change what is measured."""
    draw: Callable[[Mapping[str, Figures]], Figure] | None = None
    """A picture of the figures of all models."""
    relative: Callable[[Figures, Figures], Figures] = lambda ours, theirs: {}
    """Figures of a model that are percent of another one's."""


def percent(correct: np.ndarray) -> float:
    """How many are true, percent."""
    return 100 * float(np.mean(correct))
