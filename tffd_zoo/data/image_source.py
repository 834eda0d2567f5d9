"""What a source of images is: encoded images, decoded one at a time when they are wanted, and their labels."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import stat
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .pixels import UnreadableImageError, decode_rgb
from .workers import WorkerPool, default_workers

if TYPE_CHECKING:
    import datasets

_logger = logging.getLogger(__name__)


class EncodedImages(Protocol):
    """Encoded images of one split, by row."""

    def __len__(self) -> int: ...

    def read(self, row: int) -> bytes:
        """Return the encoded image of a row, b"" where there is none.

        Raises:
            OSError, ValueError: it cannot be read.
        """

    def where(self, row: int) -> str:
        """Name a row so that a person can find the image."""

    def outline(self) -> bytes:
        """What tells these images from others, short of reading them: names and sizes, where they lie left out."""


@dataclass(frozen=True)
class ImageFiles:
    """Images in files of their own."""

    folder: str
    paths: Sequence[str]
    """In `folder`."""

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, row: int) -> bytes:
        return read_file(self.where(row))

    def where(self, row: int) -> str:
        return os.path.join(self.folder, self.paths[row])

    def outline(self) -> bytes:
        def size(path: str) -> int:
            try:
                return os.stat(os.path.join(self.folder, path)).st_size
            except OSError:  # a link that leads nowhere: found again when the image is wanted
                return -1

        return repr([(path, size(path)) for path in self.paths]).encode(errors="surrogateescape")


@dataclass(frozen=True)
class DatasetRows:
    """Images in a column of a table, or in the files that it names."""

    rows: datasets.Dataset
    column: str
    name: str
    folder: str = ""
    """Where paths in the table start."""

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, row: int) -> bytes:
        image = self.rows[row][self.column] or {"bytes": b"", "path": None}
        if image["bytes"] is not None:
            return image["bytes"]
        return read_file(os.path.join(self.folder, image["path"])) if image["path"] else b""

    def where(self, row: int) -> str:
        path = (self.rows[row][self.column] or {}).get("path")
        return f"row {row} of {self.name}" + (f" ({path})" if path else "")

    def outline(self) -> bytes:
        import pyarrow as pa
        import pyarrow.compute as pc

        images = self.rows.data.column(self.column)
        names, sizes = images, images
        if pa.types.is_struct(images.type):
            names, sizes = pc.struct_field(images, "path"), pc.struct_field(images, "bytes")
        elif pa.types.is_binary(images.type) or pa.types.is_large_binary(images.type):
            names = pa.nulls(len(images), pa.string())
        named = [os.path.basename(path or "") for path in names.to_pylist()]
        return repr([*zip(named, pc.binary_length(sizes).to_pylist(), strict=True)]).encode(errors="surrogateescape")


@dataclass(frozen=True)
class InMemory:
    """Images that are there already."""

    images: Sequence[bytes]
    name: str

    def __len__(self) -> int:
        return len(self.images)

    def read(self, row: int) -> bytes:
        return self.images[row]

    def where(self, row: int) -> str:
        return f"image {row} of {self.name}"

    def outline(self) -> bytes:
        return repr([len(image) for image in self.images]).encode()


def read_file(path: str) -> bytes:
    """The bytes of a file. A pipe or a device is refused: it might have to be waited for."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("it is no file")
    return Path(path).read_bytes()


@dataclass(frozen=True, eq=False)
class ImageSource:
    """Images and labels of one split. Subsets share the storage of the source they came from.

    Position `i` counts the images of this source, 0 to ``len(source) - 1``; `rows` maps it to the storage.
    """

    name: str
    """What the user asked for: Hub id, folder or ``digits``."""
    split: str
    images: EncodedImages
    rows: Tensor
    """(N,) int64: the row in `images` of every image."""
    labels: Tensor
    """(N,) int64 class of every image, in [0, num_classes)."""
    label_names: tuple[str, ...]
    image_column: str
    label_column: str
    revision: str | None = None
    """Commit of a Hub data set; None for local data."""
    left_out: tuple[str, ...] = ()
    """What was found beside the images and is none of them, counted."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_classes(self) -> int:
        return len(self.label_names)

    @property
    def fingerprint(self) -> str:
        """Short hash of the order, labels and class names: equal on every machine that reads the same split."""
        digest = hashlib.sha256()
        digest.update(repr((self.split, self.label_names, self.revision)).encode())
        digest.update(self.rows.numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def outline(self) -> str:
        """Short hash of the images' names and sizes, which other images rarely share, wherever they lie."""
        return hashlib.sha256(self.images.outline()).hexdigest()[:16]

    @property
    def classes_without_images(self) -> list[str]:
        images = torch.bincount(self.labels, minlength=self.num_classes)
        return [name for name, n in zip(self.label_names, images.tolist(), strict=True) if not n]

    def describe(self) -> str:
        """Say in one line how many images of how many classes these are, which have none, and what was left out."""
        missing, left_out = self.classes_without_images, ", ".join(self.left_out)
        return (
            f"{len(self):,} images of {self.num_classes} classes{f' (none of {some_of(missing)})' if missing else ''} "
            f"from {self.name} ({self.split}{f'; left out: {left_out}' if left_out else ''})"
        )

    def where(self, position: int) -> str:
        """Name image `position` so that a person can find it."""
        return self.images.where(int(self.rows[position]))

    def image_bytes(self, position: int) -> bytes:
        """Return image `position` as it is stored, encoded (PNG, JPEG, ...)."""
        return self.images.read(int(self.rows[position]))

    def decode(self, position: int) -> Image.Image:
        """Return image `position` as :func:`.decode_rgb` does.

        Raises:
            UnreadableImageError: it cannot be opened, or the bytes are truncated or no image.
        """
        try:
            return decode_rgb(self.image_bytes(position))
        except (OSError, ValueError) as error:
            reason = (isinstance(error, OSError) and error.strerror) or error
            raise UnreadableImageError(
                f"cannot read {self.where(position)}: {reason}; replace or remove it, or skip such images with "
                "--skip-unreadable"
            ) from error

    def subset(self, positions: Tensor | Sequence[int]) -> ImageSource:
        """Return the images at `positions`, in that order, on the same storage."""
        positions = torch.as_tensor(positions, dtype=torch.int64)
        return replace(self, rows=self.rows[positions], labels=self.labels[positions])

    def of_classes(self, label_names: Container[str]) -> ImageSource:
        """Return the images of these classes alone; of these, each keeps its place among the others."""
        kept = torch.tensor([name in label_names for name in self.label_names], dtype=torch.bool)
        part = self.subset(kept[self.labels].nonzero().squeeze(1))
        names = tuple(name for name in self.label_names if name in label_names)
        return replace(part, labels=(kept.cumsum(0) - 1)[part.labels], label_names=names)

    def with_classes(self, label_names: Sequence[str]) -> ImageSource:
        """Return the same images, their classes numbered by their place in `label_names`, which has them all.

        Raises:
            ValueError: two classes have one name, and their places are not the same already.
        """
        if tuple(label_names[: self.num_classes]) == self.label_names:
            return replace(self, label_names=tuple(label_names))
        if twice := [name for name, times in Counter(label_names).items() if times > 1]:
            raise ValueError(f"the classes of {self.name} cannot be told apart by their names: {some_of(twice)} twice")
        place = {name: number for number, name in enumerate(label_names)}
        numbers = torch.tensor([place[name] for name in self.label_names], dtype=torch.int64)
        return replace(self, labels=numbers[self.labels], label_names=tuple(label_names))


def holdout(source: ImageSource, n: int, seed: int = 0) -> tuple[ImageSource, ImageSource]:
    """Hold `n` images out of `source`, in the proportions of its classes: (the rest, the held-out ones).

    The draw depends on `seed`, `n` and the labels alone. A class of c images among N gives n*c/N of them, rounded
    down; the images then missing come from the classes with the largest remainders. Both parts keep the order of
    `source`.
    """
    if not 0 < n < len(source):
        raise ValueError(f"cannot hold {n} images out of {len(source)}; choose from 1 to {len(source) - 1}")
    sizes = torch.bincount(source.labels, minlength=source.num_classes)
    quotas = sizes * n // len(source)
    remainders = sizes * n % len(source)
    quotas[remainders.argsort(descending=True, stable=True)[: n - int(quotas.sum())]] += 1
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))
    order = order[source.labels[order].argsort(stable=True)]  # by class, shuffled within it
    place_in_class = torch.arange(len(source)) - (sizes.cumsum(0) - sizes)[source.labels[order]]
    held_out = torch.zeros(len(source), dtype=torch.bool)
    held_out[order[place_in_class < quotas[source.labels[order]]]] = True
    return (
        source.subset((~held_out).nonzero().squeeze(1)),
        source.subset(held_out.nonzero().squeeze(1)),
    )


def natural_order(name: str) -> tuple[list[str | int], str]:
    """Sorts 2 before 10."""
    parts = re.split(r"([0-9]+)", name.lower())
    return [int(part) if number % 2 else part for number, part in enumerate(parts)], name


def class_order(names: Iterable[str]) -> list[str]:
    """The classes of these names in the order of their numbers: a natural one, in which timm numbers class folders.

    So timm's own commands, on the same folder, mean the same classes by the same numbers.
    """
    return sorted(set(names), key=natural_order)


def some_of(names: Sequence[str], most: int = 8) -> str:
    """Names in a row, or the first of them and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def without_unreadable(source: ImageSource) -> ImageSource:
    chunks = torch.arange(len(source)).split(1024)
    pool = WorkerPool(partial(_readable, source), default_workers() if len(chunks) > 1 else 0)
    kept: list[int] = []
    with tqdm(total=len(source), desc="check images", unit="image", leave=False, disable=None) as bar:
        for chunk, readable in zip(chunks, pool.map(chunks), strict=True):
            kept += readable
            bar.update(len(chunk))
    skipped = len(source) - len(kept)
    if skipped:
        _logger.warning(
            "skipped %d unreadable images of %d in %s (%s)", skipped, len(source), source.name, source.split
        )
        source = replace(source, left_out=(*source.left_out, f"{skipped:,} unreadable (--skip-unreadable)"))
    return source.subset(kept)


def _readable(source: ImageSource, positions: Tensor) -> list[int]:
    readable = []
    for position in positions.tolist():
        try:
            source.decode(position)
        except UnreadableImageError as error:
            _logger.info("%s", error)
        else:
            readable.append(position)
    return readable
