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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
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

DIGITS = "digits"
DIGITS_SPLIT_SEED = 0
DIGITS_TEST_IMAGES = 360

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

LABEL_COLUMNS = ("label", "fine_label")
"""Names of the label column that settle the choice where a data set has several integer columns, first wins."""

SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval"),
}
"""Names that the subfolder of a split may have in a folder of images, as `datasets` reads them."""

TABLE_SUFFIXES = {".parquet", ".arrow"}
METADATA_FILES = {"metadata.csv", "metadata.jsonl"}
"""A folder where one of these comes before any image is read by `datasets`; one with images alone, by class folders."""


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
        if _is_image_folder(data):
            source = _open_class_folders(data, split)
        else:
            source = _open_dataset(data, split, image_column, label_column, None, cache_dir)
    elif os.path.exists(data):
        raise ValueError(f"{data} is a file; give the folder that holds the data")
    elif _HUB_ID.fullmatch(data):
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


def _is_image_folder(folder: str) -> bool:
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


def _open_class_folders(data: str, split: str) -> ImageSource:
    from timm.data.readers.reader_image_folder import find_images_and_targets
    from timm.utils.misc import natural_key

    folders = {name: path for name, aliases in SPLIT_FOLDERS.items() for path in _subfolders(data, aliases)}
    folders = folders or {"train": data}
    if split not in folders:
        raise _no_such_split(data, split, folders)
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
        images=_ImageFiles(paths[split]),
        rows=torch.arange(len(paths[split])),
        labels=torch.tensor([index_of[classes[os.path.dirname(path)]] for path in paths[split]], dtype=torch.int64),
        label_names=tuple(label_names),
        image_column="file",
        label_column="folder",
    )


def _subfolders(folder: str, names: Sequence[str]) -> list[str]:
    return [entry.path for entry in os.scandir(folder) if entry.is_dir() and entry.name.lower() in names]


def _open_dataset(
    data: str,
    split: str,
    image_column: str | None,
    label_column: str | None,
    revision: str | None,
    cache_dir: str | None,
) -> ImageSource:
    import datasets

    if os.path.isdir(data):
        builder = _local_builder(data)
        files, revision = _files_of_split(builder, split, data), None
    else:
        builder, files, revision = _download_split(data, split, revision)
    try:
        rows = datasets.load_dataset(
            builder.name, data_files=files, features=builder.info.features, split=split, cache_dir=cache_dir
        )
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"split {split} of {data} cannot be read: {error.__cause__ or error}; is one of its files damaged?"
        ) from error
    image_column = find_image_column(rows.features, image_column, data)
    label_column = find_label_column(rows.features, label_column, data)
    labels, label_names = _read_labels(rows, label_column, data, split)
    images = rows.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    return ImageSource(
        name=data,
        split=split,
        images=_DatasetRows(images, image_column, f"split {split} of {data}"),
        rows=torch.arange(len(labels)),
        labels=labels,
        label_names=label_names,
        image_column=image_column,
        label_column=label_column,
        revision=revision,
    )


def _local_builder(folder: str) -> datasets.DatasetBuilder:
    import datasets
    from datasets.data_files import get_data_patterns

    try:
        try:
            return datasets.load_dataset_builder(folder)
        except ValueError:  # part of a Hub repository, whose README names splits that are not here: go by file names
            return datasets.load_dataset_builder(folder, data_files=get_data_patterns(folder))
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{folder} is not laid out as `datasets` reads it: {error}") from error


def _files_of_split(builder: datasets.DatasetBuilder, split: str, data: str) -> dict[str, list[str]]:
    files = {str(name): list(paths) for name, paths in (builder.config.data_files or {}).items() if paths}
    if split not in files:
        raise _no_such_split(data, split, files)
    # the classes of an image folder are the names of its subfolders: one split alone might lack some
    return files if builder.name == "imagefolder" else {split: files[split]}


def _download_split(
    data: str, split: str, revision: str | None
) -> tuple[datasets.DatasetBuilder, dict[str, list[str]], str]:
    """Download the files of one split of a Hub data set into the Hub's cache, or find them there without the Hub.

    Returns:
        How they are read, their paths by split, and the commit that they are of.
    """
    import datasets
    from huggingface_hub import snapshot_download

    with _hub_errors(data, revision):
        snapshot = _settle_commit(data, revision)
        commit = snapshot.name
        try:
            builder = datasets.load_dataset_builder(data, revision=commit)
        except ConnectionError:
            builder = None
        if builder is None or builder.config.data_files is None:  # without the Hub: what the cache holds of it
            builder = _local_builder(str(snapshot))
            return builder, _files_of_split(builder, split, f"{data} in the local cache"), commit
        prefix = f"hf://datasets/{data}@{commit}/"
        files = {
            name: [path.removeprefix(prefix) for path in paths]
            for name, paths in _files_of_split(builder, split, data).items()
        }
        downloaded = snapshot_download(
            data,
            repo_type="dataset",
            revision=commit,
            allow_patterns=[path for paths in files.values() for path in paths],
        )
        return (
            builder,
            {name: [os.path.join(downloaded, path) for path in paths] for name, paths in files.items()},
            commit,
        )


def locate_parquet(
    data: str, split: str, revision: str | None
) -> tuple[datasets.Features | None, list[str], str | None]:
    """Find the parquet files of one split, in a folder or on the Hub, without downloading any.

    Returns:
        The columns as far as they are known without the files, the paths or hf:// addresses, and the commit.

    Raises:
        ValueError: it is not parquet, or the Hub does not give it.
    """
    import datasets

    if os.path.isdir(data) and not _is_image_folder(data):
        builder, revision = _local_builder(data), None
    elif _HUB_ID.fullmatch(data) and not os.path.exists(data):
        with _hub_errors(data, revision):
            revision = _settle_commit(data, revision).name
            try:
                builder = datasets.load_dataset_builder(data, revision=revision)
            except ConnectionError as error:
                raise ValueError(
                    f"--streaming reads {data} from the Hub, which cannot be reached; leave it out to use a local copy"
                ) from error
    else:
        kind = "a folder of images" if os.path.isdir(data) else f"'{data}'"
        raise ValueError(
            f"--streaming reads parquet, in a folder or on the Hub, not {kind}; leave --streaming out, or give --data "
            "such a folder or a Hub id"
        )
    if builder.name != "parquet":
        raise ValueError(f"--streaming reads parquet, and {data} is stored as {builder.name}; leave --streaming out")
    return builder.info.features, _files_of_split(builder, split, data)[split], revision


def _settle_commit(data: str, revision: str | None) -> Path:
    """Download the README of a Hub data set, into a folder named after the commit that is then read.

    With no Hub, it is the newest commit in the cache.
    """
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(data, repo_type="dataset", revision=revision, allow_patterns="README.md"))


@contextmanager
def _hub_errors(data: str, revision: str | None) -> Iterator[None]:
    """Say in one or two lines why a Hub data set cannot be had, and what to do."""
    import datasets
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    from ..models.weights import reason_of

    try:
        yield
    except RevisionNotFoundError as error:
        raise ValueError(f"{data} has no revision {revision} on the Hub") from error
    except LocalEntryNotFoundError as error:
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
        raise ValueError(
            f"{data} is neither a folder nor in the local cache, and {reason}.\n"
            "Give a folder with --data FOLDER, or go online once (gated data want `hf auth login` first)."
        ) from error
    except (RepositoryNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ValueError(
            f"{data} is no folder, and on the Hub it is gated, private or missing. Log in with `hf auth login` and\n"
            f"accept the terms at {constants.ENDPOINT}/datasets/{data}, or give a copy on disk with --data FOLDER"
        ) from error
    except ValueError:
        raise
    except Exception as error:  # the client's own errors and those of its HTTP library have no common base
        raise OSError(
            f"{data} cannot be downloaded: {reason_of(error)}; check the connection and run the same command again"
        ) from error


def find_image_column(features: datasets.Features, wanted: str | None, data: str) -> str:
    import datasets

    def holds_images(feature: object) -> bool:
        return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})

    images = [name for name, feature in features.items() if holds_images(feature)]
    column = _choose_column("image", images, wanted, list(features), data)
    if column not in images and features[column] not in (datasets.Value("binary"), datasets.Value("string")):
        raise ValueError(
            f"column {column} of {data} holds {features[column]}, not images (Image, bytes or paths); "
            f"name another with --image-column: {', '.join(images or features)}"
        )
    return column


def find_label_column(features: datasets.Features, wanted: str | None, data: str) -> str:
    import datasets

    def holds_classes(feature: object) -> bool:
        integer = isinstance(feature, datasets.Value) and "int" in feature.dtype
        return integer or isinstance(feature, datasets.ClassLabel)

    labels = [name for name, feature in features.items() if holds_classes(feature)]
    preferred = [name for name in LABEL_COLUMNS if name in labels]
    column = _choose_column("label", preferred[:1] or labels, wanted, list(features), data)
    if column not in labels:
        raise ValueError(
            f"column {column} of {data} holds {features[column]}, not classes (ClassLabel or integers); "
            f"name another with --label-column: {', '.join(labels or features)}"
        )
    return column


def _choose_column(kind: str, suitable: list[str], wanted: str | None, existing: list[str], data: str) -> str:
    if wanted is not None:
        if wanted not in existing:
            raise ValueError(
                f"{data} has no column {wanted}; name one that it has with --{kind}-column: {', '.join(existing)}"
            )
        return wanted
    if len(suitable) != 1:
        found = f"several {kind} columns" if suitable else f"no {kind} column"
        raise ValueError(f"{data} has {found}; name one with --{kind}-column: {', '.join(suitable or existing)}")
    return suitable[0]


def _read_labels(rows: datasets.Dataset, column: str, data: str, split: str) -> tuple[Tensor, tuple[str, ...]]:
    """Return the class of every row and the names of the classes."""
    import datasets

    values = rows.with_format("arrow")[:][column]
    if values.null_count:
        raise ValueError(
            f"column {column} of split {split} of {data} lacks {values.null_count} labels; fill or remove those rows"
        )
    labels = torch.from_numpy(values.to_numpy().astype("int64"))
    feature = rows.features[column]
    if isinstance(feature, datasets.ClassLabel):
        names = tuple(feature.names)
    else:
        names = tuple(map(str, range(int(labels.max()) + 1)))
    outside = ((labels < 0) | (labels >= len(names))).nonzero()
    if len(outside):
        row = int(outside[0])
        raise ValueError(
            f"split {split} of {data} has label {int(labels[row])} in row {row}, outside its {len(names)} classes "
            f"({len(outside)} such rows); choose a labelled split, or another column with --label-column"
        )
    return labels, names


def _no_such_split(data: str, split: str, existing: Iterable[str]) -> ValueError:
    return ValueError(f"{data} has no split {split}; it has {', '.join(existing)}")


def _without_unreadable(source: ImageSource) -> ImageSource:
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
