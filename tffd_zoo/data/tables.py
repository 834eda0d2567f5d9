"""Labelled images in tables, parquet above all: in a folder or on the Hub, read by `datasets`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .folders import is_image_folder
from .image_source import DatasetRows, ImageSource, class_order
from .splits import find_split, usual_name

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

IMAGE_COLUMNS = ("image", "img", "images", "pixels", "picture", "photo", "jpg", "jpeg", "png", "webp")
"""Names that make a column that of the images, whatever its type; then comes the only column of images by type..."""
PATH_COLUMNS = ("file_name", "filename", "file", "filepath", "file_path", "path", "image_path", "image_file")
"""...then the only one of these names that holds text."""
LABEL_COLUMNS = (
    "label", "labels", "fine_label", "class", "classes", "target", "targets", "category", "cls", "class_label",
    "class_id", "class_name", "label_id", "label_name", "target_id", "category_id", "category_name",
)  # fmt: skip
"""Names that make a column that of the classes, whatever its type; then comes the only one of type ClassLabel, and then
the only one of integers or text that :data:`NO_LABEL` does not rule out."""
NO_LABEL = re.compile(
    r"(?:.*[_\W])?(?:id|ids|uid|uuid|key|index|idx|row|no|num|number|hash|md5|sha1|sha256|name|path|file|filename|url|uri|"
    r"source|split|fold|width|height|size|x|y|w|h|bbox|date|time|timestamp|year|caption|text|description|license|author)",
    re.IGNORECASE,
)
"""Names of columns that tell images from each other, or something else about them than their class."""
MOST_CLASSES = 2**17
"""A larger integer label is taken for an id."""


def open_table(
    data: str,
    wanted: str | Sequence[str],
    image_column: str | None,
    label_column: str | None,
    revision: str | None,
    cache_dir: str | None,
) -> ImageSource:
    import datasets

    if os.path.isdir(data):
        builder = _local_builder(data)
        (split, files), revision = _files_of_split(builder, wanted, data), None
    else:
        builder, split, files, revision = _download_split(data, wanted, revision)
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
    if builder.name == "imagefolder":  # numbered by `datasets` itself: 1, 10, 2
        numbered = class_order(label_names)
        labels = torch.tensor([numbered.index(name) for name in label_names], dtype=torch.int64)[labels]
        label_names = tuple(numbered)
    images = rows.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    return ImageSource(
        name=data,
        split=split,
        images=DatasetRows(images, image_column, f"split {split} of {data}", data if os.path.isdir(data) else ""),
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

    path = os.path.abspath(folder)  # a bare `parquet` would be the name of a reader, which then reads what lies about
    try:
        try:
            return datasets.load_dataset_builder(path)
        except ValueError as error:
            if "Config name is missing" in str(error):  # several data sets in one folder
                raise
            # part of a Hub repository, whose README names splits that are not here: go by file names
            return datasets.load_dataset_builder(path, data_files=get_data_patterns(path))
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{folder} is not laid out as `datasets` reads it: {' '.join(str(error).split())}") from error


def _files_of_split(
    builder: datasets.DatasetBuilder, wanted: str | Sequence[str], data: str
) -> tuple[str, dict[str, list[str]]]:
    """The name of the split that is meant, and what is to be read for it, by split."""
    files = {str(name): list(paths) for name, paths in (builder.config.data_files or {}).items() if paths}
    here = os.path.basename(os.path.abspath(data))
    unnamed = [*files] == ["train"] and not any("train" in os.path.relpath(path, data) for path in files["train"])
    if unnamed and usual_name(here) and os.path.isdir(data):
        files[here] = files["train"]
    split = find_split(wanted, files, data)
    return split, {split: files[split]}


def _download_split(
    data: str, wanted: str | Sequence[str], revision: str | None
) -> tuple[datasets.DatasetBuilder, str, dict[str, list[str]], str]:
    """Download the files of one split of a Hub data set into the Hub's cache, or find them there without the Hub.

    Returns:
        How they are read, the split, its paths by split, and the commit that they are of.
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
            split, files = _files_of_split(builder, wanted, f"{data} in the local cache")
            return builder, split, files, commit
        prefix = f"hf://datasets/{data}@{commit}/"
        split, addresses = _files_of_split(builder, wanted, data)
        files = {name: [path.removeprefix(prefix) for path in paths] for name, paths in addresses.items()}
        downloaded = snapshot_download(
            data,
            repo_type="dataset",
            revision=commit,
            allow_patterns=[path for paths in files.values() for path in paths],
        )
        return (
            builder,
            split,
            {name: [os.path.join(downloaded, path) for path in paths] for name, paths in files.items()},
            commit,
        )


def locate_parquet(
    data: str, wanted: str, revision: str | None
) -> tuple[datasets.Features | None, str, list[str], str | None]:
    """Find the parquet files of one split, in a folder or on the Hub, without downloading any.

    Returns:
        The columns as far as they are known without the files, the split, the paths or hf:// addresses of its files,
        and the commit.

    Raises:
        ValueError: it is not parquet, or the Hub does not give it.
    """
    import datasets

    if os.path.isdir(data) and not is_image_folder(data):
        builder, revision = _local_builder(data), None
    elif HUB_ID.fullmatch(data) and not os.path.exists(data):
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
    split, files = _files_of_split(builder, wanted, data)
    return builder.info.features, split, files[split], revision


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
    """The column of the images: `wanted`, or the only one that its name or its type makes one.

    Raises:
        ValueError: there is none, or several may be meant, or it cannot hold images.
    """
    import datasets

    def holds_images(name: str) -> bool:
        feature = features[name]
        return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})

    def of_type(name: str, *types: str) -> bool:
        return isinstance(features[name], datasets.Value) and features[name].dtype.removeprefix("large_") in types

    images = [name for name in features if holds_images(name)]
    named = [name for name in features if name.lower() in IMAGE_COLUMNS]
    paths = [name for name in features if name.lower() in PATH_COLUMNS and of_type(name, "string")]
    column = _choose_column("image", named or images or paths, wanted, list(features), data)
    if not holds_images(column) and not of_type(column, "binary", "string"):
        raise ValueError(
            f"column {column} of {data} holds {features[column]}, not images (Image, bytes or paths); "
            f"name another with --image-column: {', '.join(images or features)}"
        )
    return column


def find_label_column(features: datasets.Features, wanted: str | None, data: str) -> str:
    """The column of the classes, as in :func:`find_image_column`."""
    import datasets

    def holds_classes(name: str) -> bool:
        feature = features[name]
        return isinstance(feature, datasets.ClassLabel) or (
            isinstance(feature, datasets.Value)
            and re.fullmatch("u?int.*|(large_)?string|bool", feature.dtype) is not None
        )

    labels = [name for name in features if holds_classes(name)]
    named = [name for name in features if name.lower() in LABEL_COLUMNS]
    declared = [name for name in labels if isinstance(features[name], datasets.ClassLabel)]
    others = [name for name in labels if not NO_LABEL.fullmatch(name) and name.lower() not in IMAGE_COLUMNS]
    column = _choose_column("label", named or declared or others, wanted, list(features), data)
    if column not in labels:
        raise ValueError(
            f"column {column} of {data} holds {features[column]}, not classes (ClassLabel, integers or text); "
            f"name another with --label-column: {', '.join(declared or labels or features)}"
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
        found = f"several {kind} columns" if suitable else f"no column that is surely the {kind}'s"
        raise ValueError(f"{data} has {found}; name one with --{kind}-column: {', '.join(suitable or existing)}")
    return suitable[0]


def _read_labels(rows: datasets.Dataset, column: str, data: str, split: str) -> tuple[Tensor, tuple[str, ...]]:
    """Return the class of every row and the names of the classes."""
    import datasets
    import pyarrow as pa

    values = rows.select_columns([column]).with_format("arrow")[:][column]
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type) or pa.types.is_boolean(values.type):
        return _number_names(values, f"column {column} of split {split} of {data}")
    if values.null_count:
        raise _lacks_labels(f"column {column} of split {split} of {data}", values.null_count)
    labels = torch.from_numpy(values.to_numpy().astype("int64"))
    feature = rows.features[column]
    largest = int(labels.max()) if len(labels) else -1
    if isinstance(feature, datasets.ClassLabel):
        names = tuple(feature.names)
    elif largest < MOST_CLASSES:
        names = tuple(map(str, range(largest + 1)))
    else:
        raise ValueError(
            f"column {column} of {data} goes up to {largest}: ids rather than classes? Name another with "
            f"--label-column: {', '.join(rows.features)}"
        )
    outside = ((labels < 0) | (labels >= len(names))).nonzero()
    if len(outside):
        row = int(outside[0])
        raise ValueError(
            f"split {split} of {data} has label {int(labels[row])} in row {row}, outside its {len(names)} classes "
            f"({len(outside)} such rows); choose a labelled split, or another column with --label-column"
        )
    return labels, names


def _number_names(values: pa.ChunkedArray, where: str) -> tuple[Tensor, tuple[str, ...]]:
    """The same of a column of text, whose distinct values are the names."""
    import pyarrow as pa
    import pyarrow.compute as pc

    texts = values.cast(pa.string())
    lacking = len(texts) - (pc.sum(pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(texts)), 0)).as_py() or 0)
    if lacking:
        raise _lacks_labels(where, lacking)
    names = class_order(texts.unique().to_pylist())
    return torch.from_numpy(pc.index_in(texts, pa.array(names)).to_numpy().astype("int64")), tuple(names)


def _lacks_labels(where: str, number: int) -> ValueError:
    return ValueError(f"{where} lacks {number} labels; fill or remove those rows")
