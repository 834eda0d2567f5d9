"""Where images come from: a Hub data set, a folder of parquet, a folder of images, or scikit-learn's digits.

Every source is opened with :func:`open_source` and is an :class:`.ImageSource`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
from PIL import Image
from torch import Tensor

from .folders import is_image_folder, open_class_folders
from .image_source import ImageSource, InMemory, holdout, without_unreadable
from .splits import find_split
from .tables import HUB_ID, open_table

DIGITS = "digits"
DIGITS_SPLIT_SEED = 0
DIGITS_TEST_IMAGES = 360


def open_source(
    data: str,
    split: str | Sequence[str],
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    revision: str | None = None,
    skip_unreadable: bool = False,
    cache_dir: str | None = None,
) -> ImageSource:
    """Open one split of a data set of labelled images. Nothing is decoded yet, and no other split is downloaded.

    Args:
        data: one of
            - a data set on the Hugging Face Hub: ``uoft-cs/cifar100``, ``ILSVRC/imagenet-1k``;
            - a folder of parquet, or any other layout that `datasets` reads;
            - a folder of images, in one subfolder per class, itself in one subfolder per split (``train``, ``val``,
              ...) or in none, when every image belongs to ``train``;
            - ``digits``: the 1,797 handwritten digits of 8x8 pixels that scikit-learn ships, 360 of them, drawn with
              seed 0 in the proportions of the classes, as ``test`` and the rest as ``train``.
        split: ``train``, ``validation``, ``test`` or whatever the data set calls its splits; or several names, of
            which the first that there is is opened, such as :data:`.EVAL_SPLITS`.
        image_column: column of the images; found by its name, then by its type, when None.
        label_column: column of the classes; likewise.
        revision: branch, tag or commit of a Hub data set.
        skip_unreadable: decode every image once beforehand and leave out, with a warning, those that fail. Otherwise
            the first one that is needed stops the program.
        cache_dir: where `datasets` keeps its tables; its own default when None.

    A path that exists is a path. Classes without numbers of their own (folders, text) are numbered in natural order.

    Raises:
        FileNotFoundError: the folder does not exist or is empty.
        ValueError: the data cannot be used: no such split or column, labels outside the classes, no access.
    """
    if os.path.isdir(data):
        _refuse("--revision", revision, f"{data}, a folder")
        if is_image_folder(data):
            _refuse("--image-column or --label-column", image_column or label_column, f"{data}, a folder of images")
            source = open_class_folders(data, split)
        else:
            source = open_table(data, split, image_column, label_column, None, cache_dir)
    elif os.path.exists(data):
        raise ValueError(f"{data} is a file; give the folder that holds the data")
    elif data == DIGITS:
        _refuse("--revision or a column", revision or image_column or label_column, DIGITS)
        source = _open_digits(split)
    elif HUB_ID.fullmatch(data):
        source = open_table(data, split, image_column, label_column, revision, cache_dir)
    else:
        raise FileNotFoundError(
            f"there is no folder {data}; give --data an existing folder, a Hub id such as uoft-cs/cifar100, or {DIGITS}"
        )
    return without_unreadable(source) if skip_unreadable else source


def _refuse(flags: str, value: str | None, data: str) -> None:
    if value is not None:
        raise ValueError(f"{flags} ({value}) means nothing for {data}; leave it out")


def _open_digits(wanted: str | Sequence[str]) -> ImageSource:
    split = find_split(wanted, ("train", "test"), DIGITS)
    return _digits()[split]


@cache
def _digits() -> dict[str, ImageSource]:
    """Both splits; encoding the images takes longer than all else about them."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(f"--data {DIGITS} needs scikit-learn: pip install scikit-learn") from error
    digits = load_digits()
    source = ImageSource(
        name=DIGITS,
        split="train",
        images=InMemory([_png(image) for image in torch.from_numpy(digits.images)], DIGITS),
        rows=torch.arange(len(digits.target)),
        labels=torch.from_numpy(digits.target).to(torch.int64),
        label_names=tuple(str(name) for name in digits.target_names),
        image_column="images",
        label_column="target",
    )
    train, test = holdout(source, DIGITS_TEST_IMAGES, seed=DIGITS_SPLIT_SEED)
    return {"train": train, "test": replace(test, split="test")}


def _png(image: Tensor) -> bytes:
    """Encode an image of intensities 0 to 16, the range of scikit-learn's digits."""
    buffer = io.BytesIO()
    Image.fromarray((image * (255 / 16)).round().to(torch.uint8).numpy()).save(buffer, format="png")
    return buffer.getvalue()
