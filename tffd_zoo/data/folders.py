"""Folders of images: one subfolder per class, in one subfolder per split or in none.

The classes are the folders right under the split, whatever lies deeper in them. Only the split that was asked for is
read; what is in it and is no image is counted.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch

from .image_source import ImageFiles, ImageSource, class_order, natural_order, some_of
from .pixels import image_suffixes
from .splits import find_split, usual_name

CLUTTER = {"__macosx", "__pycache__", "@eadir", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "lost+found"}
"""What systems leave in folders, in lower case; like hidden files, it is nobody's data."""

TABLE_SUFFIXES = {".parquet", ".arrow"}
METADATA_FILES = {"metadata.csv", "metadata.jsonl", "metadata.parquet"}
"""A folder where one of these lies no deeper than the first image is read by `datasets`, any other by class folders."""


def is_image_folder(folder: str) -> bool:
    """Whether class folders are what `folder` holds, rather than something for `datasets`.

    Raises:
        FileNotFoundError: it holds nothing.
    """
    empty = True
    level, seen = [folder], {_identity(folder)}
    while level:
        deeper = []
        for path in level:
            folders, files = _listing(path)
            suffixes = set(map(_suffix, files))
            if suffixes & TABLE_SUFFIXES or METADATA_FILES & set(files):
                return False
            if suffixes & image_suffixes():
                return True
            empty = empty and not files
            deeper += [os.path.join(path, name) for name in folders]
        level = [path for path in deeper if _identity(path) not in seen]
        seen |= set(map(_identity, level))
    if empty:
        raise FileNotFoundError(f"{folder} is empty; give --data a folder of images or parquet")
    return False


def open_class_folders(data: str, wanted: str | Sequence[str]) -> ImageSource:
    """Open the split that is meant by `wanted`, or by the first of several that there is, as `open_source` does."""
    folders, strangers = _split_folders(data, [wanted] if isinstance(wanted, str) else wanted)
    if folders is None:  # class folders right here: all of them are for training, or for what this folder is called
        here = os.path.basename(os.path.abspath(data))
        folders = {"train": data} | ({here: data} if usual_name(here) else {})
    split = find_split(wanted, folders, data)
    left_out: Counter[str] = Counter()
    classes, misplaced = _listing(folders[split], left_out)
    for name in _images_among(misplaced, left_out):
        raise ValueError(
            f"{folders[split]} holds images outside class folders, such as {name}; move them into one subfolder per "
            "class"
        )
    paths_by_class: dict[str, list[str]] = {}
    for name in classes:
        found = list(_images_below(data, os.path.join(os.path.relpath(folders[split], data), name), left_out))
        # one name for the two ways in which systems write an accent
        paths_by_class.setdefault(unicodedata.normalize("NFC", name), []).extend(map(os.path.normpath, found))
    empty = [name for name, paths in paths_by_class.items() if not paths]
    label_names = class_order(name for name, paths in paths_by_class.items() if paths)
    notes = [f"{number:,} {what}" for what, number in sorted(left_out.items())]
    if empty:
        notes.append(f"{len(empty)} folders without an image that can be read ({some_of(empty)})")
    if strangers:
        notes.append(f"{len(strangers)} folders beside the splits ({some_of(strangers)})")
    if not label_names:
        raise ValueError(
            f"{folders[split]} holds no image in a class folder" + (f", but {', '.join(notes)}" if notes else "")
        )
    paths = [path for name in label_names for path in sorted(paths_by_class[name], key=natural_order)]
    sizes = torch.tensor([len(paths_by_class[name]) for name in label_names])
    return ImageSource(
        name=data,
        split=usual_name(split) or split,
        images=ImageFiles(data, paths),
        rows=torch.arange(len(paths)),
        labels=torch.arange(len(label_names)).repeat_interleave(sizes),
        label_names=tuple(label_names),
        image_column="file",
        label_column="folder",
        left_out=tuple(notes),
    )


def _split_folders(data: str, wanted: Sequence[str]) -> tuple[dict[str, str] | None, list[str]]:
    """The folders of the splits by name, None when `data` holds class folders itself, and those that are neither.

    A split holds class folders. So a folder is one if it has a split's usual name, or the very name that is asked for,
    and images in subfolders; a class may be called `dev` or `test`.

    Raises:
        ValueError: it cannot be told which.
    """
    paths = {name: os.path.join(data, name) for name in _listing(data)[0]}
    named = [name for name in paths if usual_name(name) or name in wanted]
    splits = [name for name in named if any(map(_has_images, _subfolders(paths[name])))]
    others = [name for name in paths if name not in named and _has_images(paths[name])]
    if splits and others and not any(usual_name(name) == "train" or name in wanted for name in splits):
        raise ValueError(
            f"{splits[0]} in {data} may be a split or a class, for {others[0]} beside it is no split; move the class "
            f"folders into {os.path.join(data, 'train')}, or give --data the folder of one split"
        )
    if splits:
        return {name: paths[name] for name in named}, others
    flat = [name for name in named if usual_name(name) and _has_images(paths[name])]
    if flat and not others:
        raise ValueError(
            f"{paths[flat[0]]} holds images outside class folders; move them into one subfolder per class (where "
            f"{some_of(flat)} are the classes, move them into {os.path.join(data, 'train')})"
        )
    return None, []


def _listing(folder: str, left_out: Counter[str] | None = None) -> tuple[list[str], list[str]]:
    """Names of the folders and of the files in `folder`, sorted, without hidden ones and clutter."""
    folders: list[str] = []
    files: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name.lower() in CLUTTER:
                if left_out is not None:
                    left_out["hidden or of the system"] += 1
            else:
                (folders if entry.is_dir() else files).append(entry.name)
    return sorted(folders), sorted(files)


def _images_among(files: Iterable[str], left_out: Counter[str]) -> Iterator[str]:
    """The names of images among `files`; the others are counted."""
    for name in files:
        suffix = _suffix(name)
        if suffix in image_suffixes():
            yield name
        else:
            left_out[f"{suffix} (not among the formats)" if suffix else "without a suffix"] += 1


def _images_below(
    root: str, folder: str, left_out: Counter[str], above: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[str]:
    """Paths, from `root`, of the images in its `folder` and below; a link to a folder above is not followed."""
    identity = _identity(os.path.join(root, folder))
    if identity in above:
        left_out["links in a circle"] += 1
        return
    folders, files = _listing(os.path.join(root, folder), left_out)
    for name in _images_among(files, left_out):
        yield os.path.join(folder, name)
    for name in folders:
        yield from _images_below(root, os.path.join(folder, name), left_out, above | {identity})


def _has_images(folder: str) -> bool:
    return next(_images_below(folder, "", Counter()), None) is not None


def _subfolders(folder: str) -> list[str]:
    return [os.path.join(folder, name) for name in _listing(folder)[0]]


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _identity(path: str) -> tuple[int, int]:
    """What a folder is called by the file system, whatever links lead there."""
    status = os.stat(path)
    return status.st_dev, status.st_ino
