"""Accuracy on test images that have no near-duplicate in the training set.

About a tenth of CIFAR-100's test images have one (Barz and Denzler, "Do We Train on Test Data? Purging CIFAR of
Near-Duplicates", J. Imaging 2020). Their list, ciFAIR's, was judged by eye and is taken when given. What is found here
without it is by pixels alone: copies, mirrored copies, and copies with another brightness or contrast or a slight blur;
not crops, shifts or other shots of one scene. It finds 304 of CIFAR-100's 10,000, a third of what ciFAIR counts; of 64
of them that were looked at, about 51 are duplicates, and the others are even pictures of sky, sea or plates.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock
from huggingface_hub import cached_assets_path

from ..atomic import replacing_file
from ..data import ImageSource
from .measurement import Figures, Measurement, Part, Sample, percent
from .setting import Setting, pixels
from .subject import Subject

SIDE = 16
"""Images are compared at so many pixels a side."""
LIKENESS = 0.95
"""Correlation from which on two images count as duplicates."""
CHUNK = 500
EXACT, DIFFERENT = 0, 2
"""ciFAIR's judgments of pairs that are equal in almost all pixels, and that look alike but are two pictures."""
CHECKED = 9
ALIKE = 0.9
"""So many exact pairs are looked at, and their median likeness must be above this."""


def nearest_likeness(test: np.ndarray, train: np.ndarray) -> np.ndarray:
    """The highest correlation of each test image's values with those of any training image, mirrored or not.

    Args:
        test: (N, H, W, 3).
        train: (M, H, W, 3).
    """
    candidates = [_standardised(train).T, _standardised(train[:, :, ::-1]).T]
    best = np.full(len(test), -1.0, np.float32)
    for start in range(0, len(test), CHUNK):
        part = _standardised(test[start : start + CHUNK])
        best[start : start + CHUNK] = np.maximum(*((part @ columns).max(axis=1) for columns in candidates))
    return best


def _standardised(images: np.ndarray) -> np.ndarray:
    """Values of each image as a row of mean 0 and norm 1; an even image is like none."""
    rows = images.reshape(len(images), -1).astype(np.float32)
    rows -= rows.mean(axis=1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


class Pair(NamedTuple):
    """A test image and its like in the training set, as ciFAIR's list has them."""

    test: int
    train: int
    judgment: int


def read_list(path: Path) -> list[Pair]:
    """Read ciFAIR's list.

    Raises:
        ValueError: the file is not such a list.
    """
    columns = ("TestID", "TrainID", "Judgment")
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        if not set(columns) <= set(rows.fieldnames or ()):
            raise ValueError(
                f"{path} has no columns {', '.join(columns)}; give ciFAIR's duplicates_cifar100.csv with --duplicates"
            )
        return [Pair(*(int(row[column]) for column in columns)) for row in rows]


def require_order(pairs: Sequence[Pair], test: ImageSource, train: ImageSource) -> None:
    """Make sure that the list counts the images as the data does: copies of some data sets are shuffled.

    Raises:
        ValueError: what the list calls an exact duplicate is none.
    """
    exact = [pair for pair in pairs if pair.judgment == EXACT][:CHECKED]
    inside = all(pair.test < len(test) and pair.train < len(train) for pair in pairs)
    if inside and exact:
        shown, seen = (
            pixels(source.subset(rows), SIDE)
            for source, rows in ((test, [pair.test for pair in exact]), (train, [pair.train for pair in exact]))
        )
        inside = bool(np.median([nearest_likeness(a[None], b[None]) for a, b in zip(shown, seen, strict=True)]) > ALIKE)
    if not inside:
        raise ValueError(
            f"the rows of {test.name} are not in the order of the published CIFAR, which the list counts in: its exact "
            "duplicates are none here; leave --duplicates out to have them sought"
        )


def _sought(source: ImageSource, train: ImageSource) -> np.ndarray:
    """Likeness of each test image to its nearest training image, from the cache where it was sought before."""
    folder = cached_assets_path("tffd_zoo", "duplicates", f"{source.fingerprint}-{train.fingerprint}-{SIDE}")
    path = folder / "likeness.npy"
    with FileLock(folder / "lock"):  # of several processes one seeks, and the others wait for it
        if not path.exists():
            likeness = nearest_likeness(pixels(source, SIDE), pixels(train, SIDE))
            with replacing_file(path) as aside, aside.open("wb") as file:
                np.save(file, likeness)
    return np.load(path)


def measure(subject: Subject, setting: Setting) -> Measurement:
    source, listed = setting.source, setting.config.duplicates
    if listed is not None:
        pairs = read_list(listed)
        whole = setting.open_labels(source.split, None)
        require_order(pairs, whole, setting.train)
        found = {pair.test for pair in pairs if pair.judgment != DIFFERENT}
        duplicate = np.isin(source.rows.numpy(), list(found))
        method = f"{listed.name}, judgments 0 and 1"
    else:
        duplicate = _sought(source, setting.train) >= LIKENESS
        method = f"correlation of {SIDE}-pixel images, mirrored or not, from {LIKENESS} on"
    sample = {"top1": subject.predict(source).correct, "duplicate": duplicate}
    return Measurement({"test": sample}, {"method": method, "duplicates": int(duplicate.sum())})


def figures(samples: Mapping[str, Sample]) -> Figures:
    correct, duplicate = samples["test"]["top1"], samples["test"]["duplicate"]
    found = {"top1": percent(correct), "duplicate_share": percent(duplicate)}
    for name, chosen in (("top1_without", ~duplicate), ("top1_on_duplicates", duplicate)):
        if chosen.any():
            found[name] = percent(correct[chosen])
    return found


PART = Part("duplicates", measure, figures, depends=("duplicates", "train_split"))
