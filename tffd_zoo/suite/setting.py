"""What the parts of the suite measure on: the settings of a person, and the images that they lead to."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np

from ..data import ImageSource, holdout, open_source
from ..ranges import COUNT, NOT_NEGATIVE, check_ranges

STANDARD = "standard"


@dataclass(frozen=True)
class SuiteConfig:
    """Settings of the suite."""

    suite: str | None = None
    """Measure more than accuracy: 'standard', or parts separated by commas: clean, calibration, corruptions,
    duplicates, ood, transfer, shifts, cost. What was measured before is not measured again."""
    against: tuple[str, ...] = ()
    """Models to compare with on the same images: one for all, or as many as models, pair by pair."""
    out: Path = Path("runs/suite")
    """Folder for the tables and pictures."""
    kept: Path = Path("runs/suite/measured")
    """Folder for what was measured, image by image: what is there is not measured again."""
    images: Annotated[int | None, COUNT] = None
    """Measure on so many images of the split, in the proportions of its classes; all when not given."""
    train_split: str = "train"
    """Split that the models were trained on: for the temperature, for neighbours and for duplicates."""
    fit_images: Annotated[int, COUNT] = 5000
    """Training images for the temperature, the feature distance and the probes."""
    corruption_images: Annotated[int | None, COUNT] = None
    """Corrupt so many of the test images, in the proportions of the classes; all when not given."""
    corruptions: Path | None = None
    """Folder of corrupted images: CIFAR-C's arrays, or class folders in KIND/SEVERITY; made when not given."""
    frost: Path | None = None
    """Folder of the published pictures of frost; stand-ins when not given."""
    duplicates: Path | None = None
    """ciFAIR's list of duplicates (TestID, TrainID, Distance, Judgment); sought when not given."""
    ood: tuple[str, ...] = ("noise", "digits")
    """Images of no known class: noise, digits, or NAME=DATA[:SPLIT]."""
    transfer: tuple[str, ...] | None = None
    """Label sets for the frozen features: digits, coarse (CIFAR-100's 20 superclasses), or NAME=DATA[:TRAIN:TEST];
    digits, and on CIFAR-100 coarse, when not given."""
    shifts: tuple[str, ...] = ()
    """Other test sets of the same classes, found by their names: NAME=DATA[:SPLIT], or real=FILE.json for ReaL."""
    suite_seed: Annotated[int, NOT_NEGATIVE] = 0
    """Seed of the corruptions, the noise, the few-shot draws and the bootstrap."""
    resamples: Annotated[int, COUNT] = 1000
    """Draws of the bootstrap."""

    def __post_init__(self) -> None:
        check_ranges(self)


class Named(NamedTuple):
    """NAME=DATA[:SPLIT[:SPLIT]] taken apart."""

    name: str
    data: str
    splits: tuple[str, ...]


def parse_named(text: str, splits: tuple[str, ...]) -> Named:
    """Take NAME=DATA[:SPLIT...] apart; `splits` are those meant when there are none.

    Raises:
        ValueError: it has another form.
    """
    name, equals, rest = text.partition("=")
    data, *given = rest.split(":")
    if not (name and equals and data) or len(given) not in (0, len(splits)):
        raise ValueError(f"{text!r} is not NAME=DATA{''.join(f'[:{split}]' for split in splits)}")
    return Named(name, data, tuple(given) or splits)


@dataclass(frozen=True)
class Setting:
    """The images that parts measure on."""

    config: SuiteConfig
    source: ImageSource
    """The test images."""
    open_labels: Callable[[str, str | None], ImageSource]
    """Open a split of the same data set, with the labels of this column; None: with those of `source`."""
    known: Callable[[ImageSource], ImageSource] = lambda source: source
    """The images whose classes the model knows, these numbered as its logits are."""
    holdout: int | None = None
    """Training images that the model's recipe held out; None: not known."""

    @functools.cached_property
    def train(self) -> ImageSource:
        """The split that the models were trained on, with all its classes."""
        return self.open_labels(self.config.train_split, None)

    @functools.cached_property
    def fit_source(self) -> ImageSource:
        """Training images to fit a temperature or a distance on: those that the recipe held out, where it did."""
        wanted = self.holdout or self.config.fit_images
        return self.known(holdout(self.train, wanted)[1] if wanted < len(self.train) else self.train)

    @property
    def fitted_on(self) -> str:
        """In words, what `fit_source` is."""
        seen = {None: "not known whether seen in training", 0: "seen in training"}
        return f"{len(self.fit_source)} training images, {seen.get(self.holdout, 'held out of training')}"


def test_subset(source: ImageSource, images: int | None) -> ImageSource:
    """So many images of `source`, in the proportions of its classes; all of them for None."""
    return source if images is None or images >= len(source) else holdout(source, images)[1]


def pixels(source: ImageSource, size: int) -> np.ndarray:
    """Decode every image at `size` x `size`: (N, size, size, 3) uint8."""
    images = np.empty((len(source), size, size, 3), np.uint8)
    for index in range(len(source)):
        image = source.decode(index)
        images[index] = np.asarray(image if image.size == (size, size) else image.resize((size, size)))
    return images


def open_named(text: str, splits: tuple[str, ...]) -> tuple[str, list[ImageSource]]:
    """Open the splits of NAME=DATA[:SPLIT...] or of the bare word digits."""
    named = parse_named(f"digits=digits:{':'.join(splits)}" if text == "digits" else text, splits)
    return named.name, [open_source(named.data, split) for split in named.splits]
