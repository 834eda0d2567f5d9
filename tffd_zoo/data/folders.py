"""Folders of images: one subfolder per class, in one subfolder per split or in none."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from .image_source import ImageFiles, ImageSource, no_such_split

SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval"),
}
"""Names that the subfolder of a split may have in a folder of images, as `datasets` reads them."""

TABLE_SUFFIXES = {".parquet", ".arrow"}
METADATA_FILES = {"metadata.csv", "metadata.jsonl"}
"""A folder where one of these comes before any image is read by `datasets`; one with images alone, by class folders."""


def is_image_folder(folder: str) -> bool:
    """Whether class folders are what `folder` holds, rather than something for `datasets`."""
    from timm.data.readers.img_extensions import get_img_extensions

    empty = True
    for _, _, names in os.walk(folder, followlinks=True):
        suffixes = {os.path.splitext(name)[1].lower() for name in names}
        if suffixes & TABLE_SUFFIXES or METADATA_FILES & set(names):
            return False
        if suffixes & get_img_extensions(as_set=True):
            return True
        empty = empty and not names
    if empty:
        raise FileNotFoundError(f"{folder} is empty; give --data a folder of images or parquet")
    return False


def open_class_folders(data: str, split: str) -> ImageSource:
    from timm.data.readers.reader_image_folder import find_images_and_targets
    from timm.utils.misc import natural_key

    folders = {name: path for name, aliases in SPLIT_FOLDERS.items() for path in _subfolders(data, aliases)}
    folders = folders or {"train": data}
    if split not in folders:
        raise no_such_split(data, split, folders)
    # Classes are numbered over all splits: one that a split lacks must not shift the others.
    paths = {name: [path for path, _ in find_images_and_targets(folder)[0]] for name, folder in folders.items()}
    classes = {
        os.path.dirname(path): os.path.basename(os.path.dirname(path)) for found in paths.values() for path in found
    }
    for folder in folders.values():
        if folder in classes:
            raise ValueError(f"{folder} holds images outside class folders; move them into one subfolder per class")
    label_names = sorted(sorted(set(classes.values())), key=natural_key)  # timm's order; A before a, which it ties
    index_of = {name: index for index, name in enumerate(label_names)}
    return ImageSource(
        name=data,
        split=split,
        images=ImageFiles(paths[split]),
        rows=torch.arange(len(paths[split])),
        labels=torch.tensor([index_of[classes[os.path.dirname(path)]] for path in paths[split]], dtype=torch.int64),
        label_names=tuple(label_names),
        image_column="file",
        label_column="folder",
    )


def _subfolders(folder: str, names: Sequence[str]) -> list[str]:
    return [entry.path for entry in os.scandir(folder) if entry.is_dir() and entry.name.lower() in names]
