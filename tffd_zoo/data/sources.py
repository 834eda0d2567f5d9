"""Where images come from: a Hub data set, a folder of parquet, a folder of images, or scikit-learn's digits.

Every source is opened with :func:`open_source` and is an :class:`ImageSource`: encoded images, decoded one at a time
when they are wanted, and labels, read once and checked.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

if TYPE_CHECKING:
    import datasets

_logger = logging.getLogger(__name__)

DIGITS = "digits"
DIGITS_SPLIT_SEED = 0
DIGITS_TEST_IMAGES = 360

LABEL_COLUMNS = ("label", "fine_label")
"""Names of the label column that settle the choice where a data set has several integer columns, first wins."""

SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval"),
}
"""Names that the subfolder of a split may have in a folder of images, as `datasets` reads them."""

DATA_FILES = (".parquet", ".arrow", ".tar", ".zip", ".jsonl", ".csv")
"""A folder with one of these files, itself or one level down, is read by `datasets`; any other by class folders."""


class UnreadableImageError(ValueError):
    """An image whose bytes do not decode. Its message names the image and what to do."""


class EncodedImages(Protocol):
    """Encoded images of one split, by row."""

    def __len__(self) -> int: ...

    def read(self, row: int) -> bytes:
        """Return the encoded image of a row."""

    def where(self, row: int) -> str:
        """Name a row so that a person can find the image."""


@dataclass(frozen=True)
class _ImageFiles:
    paths: Sequence[str]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, row: int) -> bytes:
        return Path(self.paths[row]).read_bytes()

    def where(self, row: int) -> str:
        return self.paths[row]


@dataclass(frozen=True)
class _DatasetRows:
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
class _InMemory:
    images: Sequence[bytes]
    name: str

    def __len__(self) -> int:
        return len(self.images)

    def read(self, row: int) -> bytes:
        return self.images[row]

    def where(self, row: int) -> str:
        return f"image {row} of {self.name}"


@dataclass(frozen=True)
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
            with Image.open(io.BytesIO(self.image_bytes(index))) as image:
                return image.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UnreadableImageError(
                f"cannot read {self.where(index)}: {error}; replace or remove it, or skip such images with "
                "--skip-unreadable"
            ) from error

    def subset(self, indices: Tensor | Sequence[int]) -> ImageSource:
        """Return the images at `indices`, in that order, on the same storage."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        return replace(self, rows=self.rows[indices], labels=self.labels[indices])


def open_source(
    data: str,
    split: str,
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
              ...) or in none, when every image belongs to ``train``. Classes are numbered in timm's natural order
              of their names;
            - ``digits``: the 1,797 handwritten digits of 8x8 pixels that scikit-learn ships, 360 of them, drawn with
              seed 0 in the proportions of the classes, as ``test`` and the rest as ``train``.
        split: ``train``, ``validation``, ``test`` or whatever the data set calls its splits.
        image_column: column of the images; found by its type when None.
        label_column: column of the classes; found by its type when None (``label``, then ``fine_label``, where
            there are several).
        revision: branch, tag or commit of a Hub data set.
        skip_unreadable: decode every image once beforehand and leave out, with a warning, those that fail. Otherwise
            the first one that is needed stops the program.
        cache_dir: where `datasets` keeps its tables; its own default when None.

    Raises:
        FileNotFoundError: the folder does not exist or is empty.
        ValueError: the data cannot be used: no such split or column, labels outside the classes, no access.
    """
    if data == DIGITS:
        source = _open_digits(split)
    elif os.path.isdir(data):
        if _holds_data_files(Path(data)):
            source = _open_dataset(data, split, image_column, label_column, None, cache_dir)
        else:
            source = _open_class_folders(Path(data), split)
    elif os.path.exists(data):
        raise ValueError(f"{data} is a file; give the folder that holds the data")
    elif re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", data):
        source = _open_dataset(data, split, image_column, label_column, revision, cache_dir)
    else:
        raise FileNotFoundError(
            f"there is no folder {data}; give --data an existing folder, a Hub id such as uoft-cs/cifar100, or {DIGITS}"
        )
    return _without_unreadable(source) if skip_unreadable else source


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


# -- the kinds of data ------------------------------------------------------------------------------------------------


def _open_digits(split: str) -> ImageSource:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(f"--data {DIGITS} needs scikit-learn: pip install scikit-learn") from error
    if split not in ("train", "test"):
        raise _no_such_split(DIGITS, split, ["train", "test"])
    digits = load_digits()
    source = ImageSource(
        name=DIGITS,
        split=split,
        images=_InMemory([_png(image) for image in torch.from_numpy(digits.images)], DIGITS),
        rows=torch.arange(len(digits.target)),
        labels=torch.from_numpy(digits.target).to(torch.int64),
        label_names=tuple(str(name) for name in digits.target_names),
        image_column="images",
        label_column="target",
    )
    train, test = holdout(source, DIGITS_TEST_IMAGES, seed=DIGITS_SPLIT_SEED)
    return train if split == "train" else test


def _png(image: Tensor) -> bytes:
    """Encode an image of intensities 0 to 16, the range of scikit-learn's digits."""
    buffer = io.BytesIO()
    Image.fromarray((image * (255 / 16)).round().to(torch.uint8).numpy()).save(buffer, format="png")
    return buffer.getvalue()


def _holds_data_files(folder: Path) -> bool:
    return any(path.suffix in DATA_FILES for pattern in ("*", "*/*") for path in folder.glob(pattern))


def _open_class_folders(folder: Path, split: str) -> ImageSource:
    from timm.data.readers.reader_image_folder import find_images_and_targets

    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    split_of = {name: split_name for split_name, aliases in SPLIT_FOLDERS.items() for name in aliases}
    split_folders = {split_of[name.lower()]: folder / name for name in names if name.lower() in split_of}
    if not split_folders:
        split_folders = {"train": folder}
    if split not in split_folders:
        raise _no_such_split(str(folder), split, list(split_folders))
    # One numbering for all splits: a class that one split lacks must not shift the others. With no class_to_idx given,
    # timm numbers the classes in natural order.
    leaf_names = {name: 0 for path in split_folders.values() for name in find_images_and_targets(str(path))[1]}
    if not leaf_names:
        raise FileNotFoundError(f"{folder} holds neither images nor parquet; give --data a folder that does")
    from timm.utils.misc import natural_key

    class_to_idx = {name: index for index, name in enumerate(sorted(leaf_names, key=natural_key))}
    if "" in class_to_idx:
        raise ValueError(f"{split_folders[split]} holds images outside class folders; put each into a folder per class")
    samples, _ = find_images_and_targets(str(split_folders[split]), class_to_idx=class_to_idx)
    return ImageSource(
        name=str(folder),
        split=split,
        images=_ImageFiles([path for path, _ in samples]),
        rows=torch.arange(len(samples)),
        labels=torch.tensor([target for _, target in samples], dtype=torch.int64),
        label_names=tuple(class_to_idx),
        image_column="file",
        label_column="folder",
    )


def _open_dataset(
    data: str,
    split: str,
    image_column: str | None,
    label_column: str | None,
    revision: str | None,
    cache_dir: str | None,
) -> ImageSource:
    import datasets

    builder = datasets.load_dataset_builder(data, revision=revision, cache_dir=cache_dir)
    data_files = {str(name): list(files) for name, files in builder.config.data_files.items()}
    if split not in data_files:
        raise _no_such_split(data, split, list(data_files))
    rows = datasets.load_dataset(
        data,
        data_files={split: data_files[split]},
        split=split,
        revision=revision,
        cache_dir=cache_dir,
        verification_mode="no_checks",
    )
    image_column = _find_image_column(rows.features, image_column, data)
    label_column = _find_label_column(rows.features, label_column, data)
    feature = rows.features[label_column]
    labels = _read_labels(rows, label_column, data)
    if isinstance(feature, datasets.ClassLabel):
        label_names = tuple(feature.names)
    else:
        label_names = tuple(str(label) for label in range(int(labels.max()) + 1))
    outside = ((labels < 0) | (labels >= len(label_names))).nonzero()
    if len(outside):
        row = int(outside[0])
        raise ValueError(
            f"split {split} of {data} has label {int(labels[row])} at row {row}, outside its {len(label_names)} "
            f"classes ({len(outside)} such rows); choose a labelled split, or another column with --label-column"
        )
    rows = rows.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    return ImageSource(
        name=data,
        split=split,
        images=_DatasetRows(rows, image_column, f"split {split} of {data}"),
        rows=torch.arange(len(labels)),
        labels=labels,
        label_names=label_names,
        image_column=image_column,
        label_column=label_column,
        revision=revision,
    )


def _read_labels(rows: datasets.Dataset, column: str, data: str) -> Tensor:
    values = rows.with_format("arrow")[:][column]
    if values.null_count:
        raise ValueError(f"column {column} of {data} has {values.null_count} empty labels; fill or remove those rows")
    return torch.from_numpy(values.to_numpy().astype("int64"))


def _find_image_column(features: datasets.Features, wanted: str | None, data: str) -> str:
    import datasets

    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    return _choose_column(images, wanted, list(features), data, "image")


def _find_label_column(features: datasets.Features, wanted: str | None, data: str) -> str:
    import datasets

    labels = [
        name
        for name, feature in features.items()
        if isinstance(feature, datasets.ClassLabel) or (isinstance(feature, datasets.Value) and "int" in feature.dtype)
    ]
    preferred = [name for name in LABEL_COLUMNS if name in labels]
    return _choose_column(preferred[:1] or labels, wanted, list(features), data, "label")


def _choose_column(suitable: list[str], wanted: str | None, existing: list[str], data: str, kind: str) -> str:
    if wanted is not None:
        if wanted not in existing:
            raise ValueError(f"{data} has no column {wanted}; it has {', '.join(existing)}")
        return wanted
    if len(suitable) != 1:
        found = f"several {kind} columns" if suitable else f"no {kind} column"
        raise ValueError(f"{data} has {found}; name one with --{kind}-column: {', '.join(suitable or existing)}")
    return suitable[0]


def _no_such_split(data: str, split: str, existing: Iterable[str]) -> ValueError:
    return ValueError(f"{data} has no split {split}; it has {', '.join(existing)}")


def _without_unreadable(source: ImageSource) -> ImageSource:
    def readable(index: int) -> bool:
        try:
            source.decode(index)
        except UnreadableImageError as error:
            _logger.debug("%s", error)
            return False
        return True

    with ThreadPoolExecutor() as pool:
        results = pool.map(readable, range(len(source)))
        kept = list(tqdm(results, total=len(source), desc="check images", unit="image", leave=False, disable=None))
    if all(kept):
        return source
    _logger.warning("skipped %d unreadable of %d images of %s", kept.count(False), len(source), source.name)
    return source.subset(torch.tensor(kept).nonzero().squeeze(1))
