"""The pickles of a checkpoint, read without running what they may hold: before anything unpickles them for good.

accelerate and torch read some files of a checkpoint as any pickle. Ours hold tensors, numbers and names, and so do the
shards of `torch.distributed.checkpoint`: an index, `.metadata`, and `.distcp` files, each of many pickles.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import load
from torch.distributed.checkpoint import Metadata, TensorStorageMetadata

INDEX = ".metadata"

NAMES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}
"""What an index of shards is made of, by module; and torch's types of numbers."""


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = name in NAMES.get(module, ()) or (
            module == "torch" and isinstance(getattr(torch, name, 0), torch.dtype)
        )
        if not known:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an index of shards")
        return super().find_class(module, name)


def refuse_code(folder: Path) -> None:
    """Make sure that no pickle in `folder`, or in a folder of it, holds anything but tensors and plain values.

    Raises:
        ValueError: names the file, and what is in it or that it is damaged.
    """
    for path in sorted(folder.rglob("*")):
        try:
            for readable in _pickles(path):
                load(readable, map_location="cpu")
        except Exception as error:  # whatever a damaged or malicious file makes of a reader
            raise ValueError(f"{path.relative_to(folder)}: {first_line(error)}") from error


def _pickles(path: Path) -> Iterator[Path | io.BytesIO]:
    """What is to be read of a file as tensors and plain values."""
    if path.suffix in (".bin", ".pkl", ".pt"):
        yield path
    if not path.name.endswith(INDEX):
        return
    with path.open("rb") as file:
        index = _IndexUnpickler(file).load()
    if not isinstance(index, Metadata):
        raise ValueError("it is no index of shards")
    for place, stored in index.storage_data.items():
        if isinstance(index.state_dict_metadata.get(place.fqn), TensorStorageMetadata):
            continue  # torch itself reads it so
        shards = path.parent / stored.relative_path
        if shards.parent != path.parent or stored.transform_descriptors:
            raise ValueError(f"{place.fqn} does not lie beside it as it is")
        with shards.open("rb") as file:
            file.seek(stored.offset)
            yield io.BytesIO(file.read(stored.length))


def first_line(error: Exception) -> str:
    """An error in one line, cut after its first sentence: torch explains at length."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0].partition('. ')[0].strip()}"
