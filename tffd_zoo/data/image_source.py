"""What a source of images is: encoded images, decoded one at a time when they are wanted, and their labels."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from .workers import WorkerPool, default_workers

if TYPE_CHECKING:
    import datasets

_logger = logging.getLogger(__name__)


class UnreadableImageError(ValueError):
    """An image whose bytes do not decode. Its message names the image and what to do."""


def decode_rgb(encoded: bytes) -> Image.Image:
    """Return the image that `encoded` (PNG, JPEG, ...) holds, in RGB.

    Raises:
        UnreadableImageError: it is missing, truncated or no image; the message is the bare reason.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        raise UnreadableImageError(reason) from error


class EncodedImages(Protocol):
    """Encoded images of one split, by row."""

    def __len__(self) -> int: ...

    def read(self, row: int) -> bytes:
        """Return the encoded image of a row."""

    def where(self, row: int) -> str:
        """Name a row so that a person can find the image."""


@dataclass(frozen=True)
class ImageFiles:
    paths: Sequence[str]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, row: int) -> bytes:
        return Path(self.paths[row]).read_bytes()

    def where(self, row: int) -> str:
        return self.paths[row]


@dataclass(frozen=True)
class DatasetRows:
    rows: datasets.Dataset
    column: str
    name: str

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, row: int) -> bytes:
        image = self.rows[row][self.column]
        if image is None:
            return b""
        return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()

    def where(self, row: int) -> str:
        path = (self.rows[row][self.column] or {}).get("path")
        return f"row {row} of {self.name}" + (f" ({path})" if path else "")


@dataclass(frozen=True)
class InMemory:
    images: Sequence[bytes]
    name: str

    def __len__(self) -> int:
        return len(self.images)

    def read(self, row: int) -> bytes:
        return self.images[row]

    def where(self, row: int) -> str:
        return f"image {row} of {self.name}"


@dataclass(frozen=True, eq=False)
class ImageSource:
    """Images and labels of one split. Subsets share the storage of the source they came from.

    Index `i` counts the images of this source, 0 to ``len(source) - 1``; `rows` maps it to the storage.
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

    def where(self, index: int) -> str:
        """Name image `index` so that a person can find it."""
        return self.images.where(int(self.rows[index]))

    def image_bytes(self, index: int) -> bytes:
        """Return image `index` as it is stored, encoded (PNG, JPEG, ...)."""
        return self.images.read(int(self.rows[index]))

    def decode(self, index: int) -> Image.Image:
        """Return image `index` decoded, in RGB.

        Raises:
            UnreadableImageError: the bytes are missing, truncated or no image.
        """
        try:
            return decode_rgb(self.image_bytes(index))
        except UnreadableImageError as error:
            raise UnreadableImageError(
                f"cannot read {self.where(index)}: {error}; replace or remove it, or skip such images with "
                "--skip-unreadable"
            ) from error

    def subset(self, indices: Tensor | Sequence[int]) -> ImageSource:
        """Return the images at `indices`, in that order, on the same storage."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        return replace(self, rows=self.rows[indices], labels=self.labels[indices])


def holdout(source: ImageSource, n: int, seed: int = 0) -> tuple[ImageSource, ImageSource]:
    """Hold `n` images out of `source`, in the proportions of its classes: (the rest, the held-out ones).

    The draw depends on `seed`, `n` and the labels alone. A class of c images among N gives n*c/N of them, rounded
    down; the images then missing come from the classes with the largest remainders. Both parts keep the order of
    `source`.
    """
    if not 0 < n < len(source):
        raise ValueError(f"cannot hold {n} images out of {len(source)}; choose from 1 to {len(source) - 1}")
    sizes = torch.bincount(source.labels, minlength=source.num_classes)
    shares = sizes * n // len(source)
    remainders = sizes * n % len(source)
    shares[remainders.argsort(descending=True, stable=True)[: n - int(shares.sum())]] += 1
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))
    order = order[source.labels[order].argsort(stable=True)]  # by class, shuffled within it
    place_in_class = torch.arange(len(source)) - (sizes.cumsum(0) - sizes)[source.labels[order]]
    held_out = torch.zeros(len(source), dtype=torch.bool)
    held_out[order[place_in_class < shares[source.labels[order]]]] = True
    return (
        source.subset((~held_out).nonzero().squeeze(1)),
        source.subset(held_out.nonzero().squeeze(1)),
    )


def no_such_split(data: str, split: str, existing: Iterable[str]) -> ValueError:
    return ValueError(f"{data} has no split {split}; it has {', '.join(existing)}")


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
    return source.subset(kept)


def _readable(source: ImageSource, indices: Tensor) -> list[int]:
    readable = []
    for index in indices.tolist():
        try:
            source.decode(index)
        except UnreadableImageError as error:
            _logger.info("%s", error)
        else:
            readable.append(index)
    return readable
