"""Training images straight from parquet, on the Hub or in a folder: for data that fits on no disk.

The unit of reading is a *row group* of a parquet file, as large as its writer chose (`datasets` writes at most 100 MB).
The footers of the files tell how many images there are, so the length of an epoch is known before any image is read;
a row group is then fetched, as one range of bytes, shortly before its first image is needed.

**Order.** The row groups of an epoch are permuted, laid end to end, and cut by images into *lanes*, one for every 32
images of the global batch, rounded down to a power of two. In its lane, image i is put at i plus a random number below
the lane's share of the buffer. A global batch takes the next images of every lane, lane after lane. Only images that
are less than a buffer apart in a lane can meet, so this approximates a permutation of all images: don't stream data
that is sorted by class. The order follows from (seed, epoch, global batch) and the footers alone. As without streaming,
each rank takes its run of every global batch: each image comes once per epoch, and two processes together see what one
process with their global batch sees.

**What a rank reads.** Its run of the batch is a run of lanes, so it fetches their row groups and no others. A row group
in which a lane ends is fetched for both lanes, and a lane in which a rank's run ends by both ranks: none, where the
number of ranks divides that of the lanes. (Whole row groups dealt to ranks would never be fetched twice, but then the
order, and with it the gradients, would depend on the number of processes.)

**Memory.** A process holds its share of the buffer and one or two open row groups per lane, encoded: about 2 GB for
batches of 256 photographs from row groups of 100 MB.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from hashlib import sha256
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from .image_source import ImageSource, UnreadableImageError, decode_rgb
from .tables import find_image_column, find_label_column, locate_parquet

if TYPE_CHECKING:
    from pyarrow.parquet import FileMetaData

IMAGES_PER_LANE = 32
BUFFER = 4096
"""Images in the shuffle buffers of all lanes together; BUFFER_BATCHES global batches if those are more."""
BUFFER_BATCHES = 16
READ_AHEAD = 2048
"""Images of this process whose row groups are fetched before they are needed."""
READERS = 4
"""Threads that fetch row groups; four times as many fetch footers, which are small."""
FOOTERS_KEPT = 64


@dataclass(frozen=True)
class StreamedRows:
    """The images of one batch as they are stored, encoded, with their labels."""

    encoded: list[bytes]
    labels: Tensor
    names: list[str]
    """Where each image is, for a person."""

    def decode(self, position: int) -> Image.Image:
        """Return the image at a position of the batch, in RGB; raise UnreadableImageError where there is none."""
        try:
            return decode_rgb(self.encoded[position])
        except UnreadableImageError as error:
            raise UnreadableImageError(
                f"cannot read {self.names[position]}: {error}; replace or remove it, or leave --streaming out and skip "
                "such images with --skip-unreadable"
            ) from error


class _Fetched(NamedTuple):
    encoded: Any  # pyarrow's ChunkedArray of binary
    labels: list[int]


class RowGroup(NamedTuple):
    """Where a row group is."""

    file: int
    number: int
    """In its file."""
    first_row: int
    """In its file."""
    rows: int


@dataclass
class _Held:
    """A row group that is being fetched or was."""

    rows: Future[_Fetched]
    unread: int
    """Images that no batch has taken yet."""
    needed: int = 0
    """The last batch known to take some."""


@dataclass(frozen=True, eq=False)
class StreamedSource:
    """The images of one split, unknown but for their number until they are read; see the module's docstring.

    Position `i` counts them over files and rows: the same images as those of :func:`.open_source`.
    """

    name: str
    """What the user asked for: Hub id or folder."""
    split: str
    files: tuple[str, ...]
    """Paths, or hf:// addresses."""
    groups: tuple[RowGroup, ...]
    label_names: tuple[str, ...]
    image_column: str
    label_column: str
    revision: str | None = None
    """Commit of a Hub data set; None for local data."""

    def __len__(self) -> int:
        return sum(group.rows for group in self.groups)

    @property
    def num_classes(self) -> int:
        return len(self.label_names)

    @property
    def fingerprint(self) -> str:
        """Short hash of what is known before reading: the sizes of the row groups and the class names."""
        known = (self.split, self.label_names, self.revision, self.groups)
        return sha256(repr(known).encode()).hexdigest()[:16]

    @property
    def outline(self) -> str:
        """Short hash of the files' names, where they lie left out; what is in them, :attr:`fingerprint` knows."""
        return sha256(repr([os.path.basename(file) for file in self.files]).encode()).hexdigest()[:16]

    @cached_property
    def _sizes(self) -> Tensor:
        return torch.tensor([group.rows for group in self.groups])

    @cached_property
    def _starts(self) -> Tensor:
        """Position of the first image of every row group."""
        return self._sizes.cumsum(0) - self._sizes

    def _where(self, group: int, row: int) -> str:
        """Name an image so that a person can find it."""
        return f"row {self.groups[group].first_row + row} of {self.files[self.groups[group].file]}"

    def describe(self) -> str:
        """Say in one line how many images of how many classes these are."""
        return f"{len(self):,} images of {self.num_classes} classes from {self.name} ({self.split})"

    def with_classes(self, label_names: Sequence[str]) -> StreamedSource:
        """Return the same images with classes behind those that they have."""
        assert tuple(label_names[: self.num_classes]) == self.label_names
        return replace(self, label_names=tuple(label_names))

    def describe_order(self, global_batch: int) -> str:
        """Say in a few words how an epoch is shuffled."""
        return f"streamed in shuffled row groups ({len(self.groups):,}), through a buffer of {_buffer(global_batch):,}"

    def order(self, generator: torch.Generator, global_batch: int) -> Tensor:
        """Return the positions of an epoch in their order, for global batches of so many images."""
        groups = torch.randperm(len(self.groups), generator=generator)
        sizes = self._sizes[groups]
        shift = self._starts[groups] - (sizes.cumsum(0) - sizes)
        positions = torch.arange(len(self)) + shift.repeat_interleave(sizes)

        lanes = 1 << (max(1, global_batch // IMAGES_PER_LANE).bit_length() - 1)
        batches, rest = divmod(len(self), global_batch)
        per_batch, in_last = ([len(p) for p in torch.arange(n).tensor_split(lanes)] for n in (global_batch, rest))
        lengths = [batches * each + last for each, last in zip(per_batch, in_last, strict=True)]
        chunks = []
        for lane, each in zip(positions.split(lengths), per_batch, strict=True):
            delay = torch.rand(len(lane), generator=generator, dtype=torch.float64) * _buffer(global_batch) / lanes
            chunks.append(lane[(torch.arange(len(lane)) + delay).argsort(stable=True)].split(each))
        return torch.cat([chunk for batch in zip_longest(*chunks) for chunk in batch if chunk is not None])

    def read(self, batches: Sequence[Tensor], global_batch: int) -> Iterator[StreamedRows]:
        """Yield the images at the positions of each batch in turn; threads fetch the row groups ahead.

        Raises:
            ValueError: a row group cannot be read, or has a label outside the classes.
        """
        ahead = -(-READ_AHEAD // max(map(len, batches), default=1))  # batches
        # A row group is let go with its last image. One that this process shares with another, or two lanes with each
        # other, is let go when it was not needed for as long as the buffer can hold an image back.
        patience = 2 * _buffer(global_batch) // global_batch
        held: dict[int, _Held] = {}
        opened = 0
        pool = ThreadPoolExecutor(READERS)
        footer = lru_cache(FOOTERS_KEPT)(lambda path: pool.submit(_read_footer, path))
        try:
            for number, positions in enumerate(batches):
                for upcoming in batches[opened : number + 1 + ahead]:
                    for group in self._groups_of(upcoming).unique().tolist():
                        if group not in held:
                            metadata = footer(self.files[self.groups[group].file])
                            held[group] = _Held(pool.submit(self._read_group, group, metadata), self.groups[group].rows)
                        held[group].needed = opened
                    opened += 1
                yield self._take(positions, held)
                for group, rows in list(held.items()):
                    if not rows.unread or rows.needed < number - patience:
                        del held[group]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _groups_of(self, positions: Tensor) -> Tensor:
        return torch.searchsorted(self._starts, positions, right=True) - 1

    def _take(self, positions: Tensor, held: dict[int, _Held]) -> StreamedRows:
        of_group = self._groups_of(positions)
        groups, rows = of_group.tolist(), (positions - self._starts[of_group]).tolist()
        encoded, labels = [], []
        for group, row in zip(groups, rows, strict=True):
            fetched = held[group].rows.result()
            held[group].unread -= 1
            encoded.append(fetched.encoded[row].as_py() or b"")
            labels.append(fetched.labels[row])
        return StreamedRows(encoded, torch.tensor(labels), list(map(self._where, groups, rows)))

    def _read_group(self, group: int, footer: Future[FileMetaData]) -> _Fetched:
        import pyarrow as pa
        import pyarrow.compute as pc
        from pyarrow.parquet import ParquetFile

        metadata, number, path = footer.result(), self.groups[group].number, self.files[self.groups[group].file]
        try:
            with _open(path) as opened:
                # pre_buffer fetches the wanted columns in one read, and nothing else
                parquet = ParquetFile(opened, metadata=metadata, pre_buffer=True)
                table = parquet.read_row_group(number, [self.image_column, self.label_column])
        except Exception as error:
            raise _unreadable(f"row group {number}", path, error) from error
        images, labels = table[self.image_column], table[self.label_column].to_pylist()
        for row, label in enumerate(labels):
            if label is None or not 0 <= label < self.num_classes:
                raise ValueError(
                    f"{self._where(group, row)} has label {label}, outside its {self.num_classes} classes; choose a "
                    "labelled split, or another column with --label-column"
                )
        return _Fetched(pc.struct_field(images, "bytes") if pa.types.is_struct(images.type) else images, labels)


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
    """Open one split of parquet for streaming: only the footers of its files are read. Arguments as in `open_source`.

    Raises:
        ValueError: the data is no parquet or cannot be used; the message names the mend.
    """
    import datasets

    features, split, files, revision = locate_parquet(data, split, revision)
    footer = _read_footer(files[0])
    features = features or datasets.Features.from_arrow_schema(footer.schema.to_arrow_schema())
    image_column = find_image_column(features, image_column, data)
    label_column = find_label_column(features, label_column, data)
    if isinstance(features[image_column], datasets.Value) and "string" in features[image_column].dtype:
        raise ValueError(f"column {image_column} of {data} holds paths, and --streaming needs images; leave it out")

    with ThreadPoolExecutor(4 * READERS) as pool:  # of each footer only a few numbers are kept
        others = pool.map(lambda file: _summary(_read_footer(file), label_column), files[1:])
        rows_of_files, largest_labels = zip(_summary(footer, label_column), *others, strict=True)
    groups = [
        RowGroup(file, number, sum(rows[:number]), rows[number])
        for file, rows in enumerate(rows_of_files)
        for number in range(len(rows))
    ]
    feature = features[label_column]
    if isinstance(feature, datasets.ClassLabel):
        label_names = tuple(feature.names)
    elif "int" not in feature.dtype:
        raise ValueError(
            f"column {label_column} of {data} names its classes in each row, and --streaming must know them before: "
            "make it a ClassLabel, or leave --streaming out"
        )
    elif None in largest_labels:
        raise ValueError(
            f"the files of {data} don't tell how many classes column {label_column} has: make it a ClassLabel, write "
            "statistics, or leave --streaming out"
        )
    else:
        label_names = tuple(map(str, range(max(largest_labels) + 1)))
    return StreamedSource(data, split, tuple(files), tuple(groups), label_names, image_column, label_column, revision)


def _summary(footer: FileMetaData, label_column: str) -> tuple[list[int], int | None]:
    """The rows of every row group, and the largest label, None when the footer does not tell."""
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    column = next(i for i in range(footer.num_columns) if footer.schema.column(i).path == label_column)
    statistics = [group.column(column).statistics for group in groups]
    told = all(each is not None and each.has_min_max for each in statistics)
    return [group.num_rows for group in groups], max((each.max for each in statistics), default=-1) if told else None


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
