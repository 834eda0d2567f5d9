"""Training images straight from parquet, on the Hub or in a folder: for data that fits on no disk.

The unit of reading is a *row group* of a parquet file, as large as whoever wrote the file chose (`datasets` writes at
most 100 MB). The files' footers give the number of images, so the length of an epoch is known before any image is
fetched; then each row group is fetched, as one range of bytes, shortly before its first image is needed.

**Order.** The row groups of an epoch are permuted, laid end to end, and cut by images into *lanes* of equal length. A
lane is shuffled by a buffer: its image i is put at i plus a random number below the buffer's size. A global batch takes
its next images from every lane, lane after lane. This approximates a permutation of all images: what lies further apart
in a lane than the buffer never meets, so data sorted by class should be written in another order, or trained without
streaming. The order follows from (seed, epoch, global batch) and the footers alone. As in training without streaming,
each rank takes its run of every global batch: every image comes once per epoch, and two processes together see what one
process with their global batch sees.

**What a rank reads.** Its run of the batch is a run of lanes, so it fetches the row groups of its own lanes and no
other. A row group is fetched twice where a lane ends inside it. There is a lane for every 32 images of the global
batch, rounded down to a power of two: ranks whose number divides that of the lanes share none, others fetch the lanes
at their borders too. (Dealing row groups to ranks and balancing the remainders would spare these too, but the order,
and so the gradients, would depend on the number of processes.)

**Memory.** A process holds its share of the buffer, and per lane the one or two row groups that are open, encoded: with
batches of 256 photographs in row groups of 100 MB, about 2 GB.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from hashlib import sha256
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from .sources import (
    HUB_ID,
    ImageSource,
    UnreadableImageError,
    decode_rgb,
    files_of_split,
    find_image_column,
    find_label_column,
    hub_errors,
    is_image_folder,
    local_builder,
    settle_commit,
)

if TYPE_CHECKING:
    from pyarrow.parquet import FileMetaData

IMAGES_PER_LANE = 32
"""Of a global batch, at least."""
BUFFER = 4096
"""Images that the shuffle buffers of all lanes hold together, or BUFFER_BATCHES global batches if those are more."""
BUFFER_BATCHES = 16
READ_AHEAD = 2048
"""Images of this process whose row groups are fetched before they are needed."""
READERS = 4
"""Threads that fetch row groups; of footers, which are small, four times as many are fetched at once."""
FOOTERS_KEPT = 64


@dataclass(frozen=True)
class StreamedRows:
    """The images of one batch as they are stored, encoded, and their labels."""

    encoded: list[bytes]
    labels: Tensor
    """(B,) int64."""
    names: list[str]
    """Where each image is, for a person."""

    def decode(self, position: int) -> Image.Image:
        """Return the image at a position of the batch, in RGB.

        Raises:
            UnreadableImageError: the bytes are missing, truncated or no image.
        """
        try:
            return decode_rgb(self.encoded[position])
        except UnreadableImageError as error:
            raise UnreadableImageError(
                f"cannot read {self.names[position]}: {error}; replace or remove it, or leave --streaming out and skip "
                "such images with --skip-unreadable"
            ) from error


class _RowGroup(NamedTuple):
    encoded: Any  # pyarrow's ChunkedArray of binary
    labels: Tensor


@dataclass(frozen=True, eq=False)
class StreamedSource:
    """The images of one split, of which only the number is known until they are read. See the module's docstring.

    Index `i` counts them in the order of files and rows: the images and indices of :func:`open_source`.
    """

    name: str
    """What the user asked for: Hub id or folder."""
    split: str
    files: tuple[str, ...]
    """Paths, or hf:// addresses."""
    groups: tuple[tuple[int, int], ...]
    """Every row group: its file, and its number there."""
    sizes: Tensor
    """(G,) int64: the rows of every row group."""
    label_names: tuple[str, ...]
    image_column: str
    label_column: str
    revision: str | None = None
    """Commit of a Hub data set; None for local data."""

    def __len__(self) -> int:
        return int(self.sizes.sum())

    @property
    def num_classes(self) -> int:
        return len(self.label_names)

    @property
    def fingerprint(self) -> str:
        """Short hash of what is known before reading: the sizes of the row groups and the class names."""
        known = (self.split, self.label_names, self.revision, self.groups, self.sizes.tolist())
        return sha256(repr(known).encode()).hexdigest()[:16]

    @cached_property
    def _starts(self) -> Tensor:
        """Index of the first image of every row group."""
        return self.sizes.cumsum(0) - self.sizes

    @cached_property
    def _file_starts(self) -> dict[int, int]:
        """Index of the first image of every file."""
        starts: dict[int, int] = {}
        for (file, _), start in zip(self.groups, self._starts.tolist(), strict=True):
            starts.setdefault(file, start)
        return starts

    def _where(self, index: int, group: int) -> str:
        """Name image `index`, of that row group, so that a person can find it."""
        file, _ = self.groups[group]
        return f"row {index - self._file_starts[file]} of {self.files[file]}"

    def describe_order(self, global_batch: int) -> str:
        """Say in a few words how an epoch is shuffled."""
        return f"streamed in shuffled row groups ({len(self.groups):,}), through a buffer of {_buffer(global_batch):,}"

    def order(self, generator: torch.Generator, global_batch: int) -> Tensor:
        """Return the indices of an epoch in their order, for global batches of so many images."""
        groups = torch.randperm(len(self.groups), generator=generator)
        sizes = self.sizes[groups]
        shift = self._starts[groups] - (sizes.cumsum(0) - sizes)
        indices = torch.arange(len(self)) + shift.repeat_interleave(sizes)

        lanes = 1 << (max(1, global_batch // IMAGES_PER_LANE).bit_length() - 1)
        per_batch, in_last = (_even_parts(images, lanes) for images in (global_batch, len(self) % global_batch))
        lengths = [len(self) // global_batch * each + last for each, last in zip(per_batch, in_last, strict=True)]
        chunks = []
        for lane, each in zip(indices.split(lengths), per_batch, strict=True):
            late = torch.rand(len(lane), generator=generator, dtype=torch.float64) * _buffer(global_batch) / lanes
            chunks.append(lane[(torch.arange(len(lane)) + late).argsort(stable=True)].split(each))
        return torch.cat([chunk for batch in zip_longest(*chunks) for chunk in batch if chunk is not None])

    def read(self, shares: Sequence[Tensor], global_batch: int) -> Iterator[StreamedRows]:
        """Yield the images at the indices of each share in turn; row groups are fetched ahead, in threads.

        Raises:
            ValueError: a row group cannot be read, or has a label outside the classes.
        """
        ahead = -(-READ_AHEAD // max(map(len, shares), default=1))  # in batches, rounded up
        # A row group is let go with its last image, or when some of its images are another lane's or rank's and it was
        # not needed for as long as the buffer can hold an image back: its lane is past it then.
        patience = 2 * _buffer(global_batch) // global_batch
        held: dict[int, Future[_RowGroup]] = {}
        unread: dict[int, int] = {}
        needed: dict[int, int] = {}  # the last batch known to need it
        footer = lru_cache(FOOTERS_KEPT)(_read_footer)
        pool = ThreadPoolExecutor(READERS)
        try:
            opened = 0
            for number, share in enumerate(shares):
                for upcoming in shares[opened : number + 1 + ahead]:
                    for group in self._groups_of(upcoming).unique().tolist():
                        if group not in held:
                            held[group] = pool.submit(self._read_group, group, footer)
                            unread[group] = int(self.sizes[group])
                        needed[group] = opened
                    opened += 1
                yield self._rows(share, held, unread)
                for group in [g for g in held if not unread[g] or needed[g] < number - patience]:
                    del held[group]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _groups_of(self, indices: Tensor) -> Tensor:
        return torch.searchsorted(self._starts, indices, right=True) - 1

    def _rows(self, share: Tensor, held: dict[int, Future[_RowGroup]], unread: dict[int, int]) -> StreamedRows:
        of_group = self._groups_of(share)
        indices, groups, rows = share.tolist(), of_group.tolist(), (share - self._starts[of_group]).tolist()
        encoded, labels = [], []
        for group, row in zip(groups, rows, strict=True):
            read = held[group].result()
            encoded.append(read.encoded[row].as_py() or b"")
            labels.append(read.labels[row])
            unread[group] -= 1
        return StreamedRows(encoded, torch.stack(labels), list(map(self._where, indices, groups)))

    def _read_group(self, group: int, footer: Any) -> _RowGroup:
        import pyarrow as pa
        import pyarrow.compute as pc
        from pyarrow.parquet import ParquetFile

        file, number = self.groups[group]
        path = self.files[file]
        try:
            with _open(path) as opened:
                # pre_buffer: the columns that are wanted come in one read, and nothing else does
                parquet = ParquetFile(opened, metadata=footer(path), pre_buffer=True)
                table = parquet.read_row_group(number, [self.image_column, self.label_column])
        except Exception as error:
            raise _unreadable(f"row group {number}", path, error) from error
        images, labels = table[self.image_column], table[self.label_column]
        if pa.types.is_struct(images.type):
            images = pc.struct_field(images, "bytes")
        first = int(self._starts[group])
        if labels.null_count:
            row = labels.is_null().to_pylist().index(True)
            raise ValueError(f"{self._where(first + row, group)} has no label; fill or remove such rows")
        classes = torch.from_numpy(labels.to_numpy().astype("int64"))
        outside = ((classes < 0) | (classes >= self.num_classes)).nonzero()
        if len(outside):
            row = int(outside[0])
            raise ValueError(
                f"{self._where(first + row, group)} has label {int(classes[row])}, outside its {self.num_classes} "
                "classes; choose a labelled split, or another column with --label-column"
            )
        return _RowGroup(images, classes)


TrainSource: TypeAlias = ImageSource | StreamedSource
"""What can be trained on."""


def open_streamed(
    data: str,
    split: str,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    revision: str | None = None,
) -> StreamedSource:
    """Open one split of parquet for streaming. Only the footers of its files are fetched.

    Arguments as in `open_source`.

    Raises:
        ValueError: the data is no parquet or cannot be used; the message names the mend.
    """
    import datasets

    if os.path.isdir(data) and not is_image_folder(data):
        builder, revision = local_builder(data), None
    elif HUB_ID.fullmatch(data) and not os.path.exists(data):
        with hub_errors(data, revision):
            revision = settle_commit(data, revision).name
            try:
                builder = datasets.load_dataset_builder(data, revision=revision)
            except ConnectionError as error:
                raise ValueError(
                    f"--streaming reads {data} from the Hub, which cannot be reached; leave --streaming out to use a "
                    "downloaded copy"
                ) from error
    else:
        kind = "a folder of images" if os.path.isdir(data) else f"'{data}'"
        raise ValueError(
            f"--streaming reads parquet, in a folder or on the Hub, not {kind}; leave --streaming out, or give --data "
            "such a folder or a Hub id"
        )
    if builder.name != "parquet":
        raise ValueError(f"--streaming reads parquet, and {data} is stored as {builder.name}; leave --streaming out")
    files = files_of_split(builder, split, data)[split]
    first = _read_footer(files[0])
    features = builder.info.features or datasets.Features.from_arrow_schema(first.schema.to_arrow_schema())
    image_column = find_image_column(features, image_column, data)
    label_column = find_label_column(features, label_column, data)
    if features[image_column] == datasets.Value("string"):
        raise ValueError(f"column {image_column} of {data} holds paths; --streaming needs the images themselves there")
    summarize = partial(_summary, label_column=label_column)
    with ThreadPoolExecutor(4 * READERS) as pool:
        summaries = [summarize(first), *pool.map(lambda file: summarize(_read_footer(file)), files[1:])]
    groups = [
        (file, number, rows)
        for file, summary in enumerate(summaries)
        for number, rows in enumerate(summary.rows)
        if rows
    ]
    return StreamedSource(
        name=data,
        split=split,
        files=tuple(files),
        groups=tuple((file, number) for file, number, _ in groups),
        sizes=torch.tensor([rows for *_, rows in groups], dtype=torch.int64),
        label_names=_label_names(features[label_column], summaries, label_column, data),
        image_column=image_column,
        label_column=label_column,
        revision=revision,
    )


class _Summary(NamedTuple):
    """What is kept of a footer."""

    rows: list[int]
    """Of every row group."""
    largest_label: int | None
    """None when the footer does not tell."""


def _summary(footer: FileMetaData, label_column: str) -> _Summary:
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    column = next(i for i in range(footer.num_columns) if footer.schema.column(i).path == label_column)
    statistics = [group.column(column).statistics for group in groups if group.num_rows]
    told = all(each is not None and each.has_min_max for each in statistics)
    largest = max((each.max for each in statistics), default=-1) if told else None
    return _Summary([group.num_rows for group in groups], largest)


def _label_names(feature: object, summaries: list[_Summary], column: str, data: str) -> tuple[str, ...]:
    """Names of the classes: the feature's, or numbers up to the largest one that the footers tell of."""
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names)
    largest = [summary.largest_label for summary in summaries if summary.largest_label is not None]
    if len(largest) < len(summaries):
        raise ValueError(
            f"the files of {data} don't tell how many classes column {column} has: make it a ClassLabel, write "
            "statistics, or leave --streaming out"
        )
    return tuple(map(str, range(max(largest) + 1)))


def _read_footer(path: str) -> FileMetaData:
    from pyarrow.parquet import read_metadata

    try:
        with _open(path) as file:
            return read_metadata(file)
    except Exception as error:
        raise _unreadable("the footer", path, error) from error


def _open(path: str) -> AbstractContextManager[Any]:
    """A file to read at random; of a file on the Hub, each read fetches its own bytes and no more."""
    import pyarrow
    from huggingface_hub import HfFileSystem

    return HfFileSystem().open(path, cache_type="none") if path.startswith("hf://") else pyarrow.OSFile(path)


def _unreadable(part: str, path: str, error: Exception) -> ValueError:
    reason = f"{type(error).__name__}: {(str(error) or 'no reason given').splitlines()[0]}"
    return ValueError(
        f"cannot read {part} of {path} ({reason}); check the file or the connection, then give the same command: it "
        "resumes"
    )


def _buffer(global_batch: int) -> int:
    return max(BUFFER, BUFFER_BATCHES * global_batch)


def _even_parts(images: int, parts: int) -> list[int]:
    """Sizes of the parts, as `tensor_split` makes them."""
    return [len(part) for part in torch.arange(images).tensor_split(parts)]
