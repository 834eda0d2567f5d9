"""Labelled images in tables, parquet above all: in a folder or on the Hub, read by `datasets`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .folders import is_image_folder
from .image_source import DatasetRows, ImageSource, no_such_split

if TYPE_CHECKING:
    import datasets

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

LABEL_COLUMNS = ("label", "fine_label")
"""Names of the label column that settle the choice where a data set has several integer columns, first wins."""


def open_table(
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
        images=DatasetRows(images, image_column, f"split {split} of {data}"),
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
        raise no_such_split(data, split, files)
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
