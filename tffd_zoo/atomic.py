"""Files and folders that are complete or not there: written aside, flushed to the disk, renamed."""

from __future__ import annotations

import glob
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
from safetensors.torch import save
from torch import Tensor


@contextmanager
def replacing_file(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what is written there takes its place when the block succeeds.

    When it fails, or the process dies, `path` is as it was. Several writers of one path do not meet: the last one to
    finish stays, whole.
    """
    path = Path(path).absolute()  # so that "." has a name
    ours = f".{path.name}.{socket.gethostname()}."
    for left in path.parent.glob(f"{glob.escape(ours)}*.partial"):
        writer = left.name.removeprefix(ours).partition("-")[0]
        if writer.isdecimal() and not psutil.pid_exists(int(writer)):  # killed in the middle of it
            left.unlink(missing_ok=True)
    aside = path.with_name(f"{ours}{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        yield aside
        sync(aside)
        aside.replace(path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: Path | str) -> Iterator[Path]:
    """Yield a new, empty folder beside `folder`; it takes its place, contents and all, when the block succeeds.

    When it fails, `folder` is as it was. A folder cannot be renamed over a full one, so the old one steps aside for an
    instant: should the process die in that very instant, the next call for this folder puts the old one back first.
    """
    folder = Path(folder).absolute()
    previous = _aside(folder, "previous")
    restore_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(folder, "partial")
    shutil.rmtree(aside, ignore_errors=True)  # what a killed process left
    aside.mkdir()
    try:
        yield aside
        for path in [*aside.rglob("*"), aside]:
            sync(path)
        if folder.exists():
            folder.rename(previous)
        try:
            aside.rename(folder)
        except OSError:
            restore_folder(folder)
            raise
        sync(folder.parent)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_text(path: Path | str, text: str) -> None:
    """Write a text file, whole or not at all, in UTF-8 and with the line ends of `text`; its folder is made for it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as aside:
        aside.write_text(text, encoding="utf-8", newline="\n")


def save_tensors(tensors: Mapping[str, Tensor], path: Path | str, **metadata: str) -> None:
    """Write `tensors` as a safetensors file with `metadata`, equal to the byte whenever they are.

    Combine it with :func:`replacing_file` or :func:`replacing_folder`.
    """
    data = save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, {"format": "pt", **metadata}
    )
    # safetensors writes the metadata in an order that changes from call to call, and with it the hash of the file
    start, end = 8, 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[start:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    sorted_header = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(end - start)
    assert len(sorted_header) == end - start
    with Path(path).open("wb") as file:
        file.write(data[:start] + sorted_header)
        file.write(memoryview(data)[end:])


def restore_folder(folder: Path | str) -> None:
    """Put `folder` back if a process died while :func:`replacing_folder` was changing it for a new one."""
    folder = Path(folder).absolute()
    previous = _aside(folder, "previous")
    if not previous.exists():
        return
    if folder.exists():
        shutil.rmtree(previous)  # the new one had arrived
    else:
        previous.rename(folder)


def _aside(path: Path, role: str) -> Path:
    """Name a hidden sibling of `path`."""
    path = path.absolute()  # so that "." has a name
    return path.with_name(f".{path.name}.{role}")


def sync(path: Path) -> None:
    """Have the disk hold what was written to this file, or the names in this folder, before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
