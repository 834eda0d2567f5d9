"""Accuracy on test images that have no near-duplicate in the training set.

About a tenth of CIFAR-100's test images have one (Barz and Denzler, "Do We Train on Test Data? Purging CIFAR of
Near-Duplicates", J. Imaging 2020). Their list, ciFAIR's, was judged by eye and is taken when given. What is found here
without it is by pixels alone: copies, mirrored copies, and copies with another brightness or contrast or a slight blur;
not crops, shifts or other shots of one scene.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np
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
DIFFERENT = 2
"""ciFAIR's judgment of pairs that look alike but are two pictures."""


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


def read_list(path: Path, images: int) -> np.ndarray:
    """Which of the test images ciFAIR's list names as duplicates, exact or near: (images,) bool.

    Raises:
        ValueError: the file is not such a list, or is of another split.
    """
    found = np.zeros(images, bool)
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        if not {"TestID", "Judgment"} <= set(rows.fieldnames or ()):
            raise ValueError(f"{path} has no columns TestID and Judgment; give ciFAIR's duplicates_cifar100.csv")
        for row in rows:
            index = int(row["TestID"])
            if not 0 <= index < images:
                raise ValueError(f"{path} names test image {index}, and there are {images}: it is of another data set")
            found[index] |= int(row["Judgment"]) != DIFFERENT
    return found


def _sought(source: ImageSource, train: ImageSource) -> np.ndarray:
    """Likeness of each test image to its nearest training image, from the cache where it was sought before."""
    folder = cached_assets_path("tffd_zoo", "duplicates", f"{source.fingerprint}-{train.fingerprint}-{SIDE}")
    path = folder / "likeness.npy"
    if not path.exists():
        likeness = nearest_likeness(pixels(source, SIDE), pixels(train, SIDE))
        with replacing_file(path) as aside, aside.open("wb") as file:
            np.save(file, likeness)
    return np.load(path)


def measure(subject: Subject, setting: Setting) -> Measurement:
    source, listed = setting.source, setting.config.duplicates
    if listed is not None:
        duplicate = read_list(listed, len(source.images))[source.rows.numpy()]
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
