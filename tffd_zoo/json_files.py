"""JSON files of ours: written whole, read with one line of error that names the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .atomic import write_text


def read_json(path: Path, mend: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: the file.
        mend: what a person does when it is damaged.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is damaged, or no file at all but a pipe, a device or a folder.
    """
    return parse_json(read_text(path, mend), str(path), mend)


def parse_json(text: str, where: str, mend: str) -> dict[str, Any]:
    """Parse a JSON object; ValueError names `where` it stood and what to do."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is damaged ({error if text.strip() else 'it is empty'}); {mend}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} is damaged (it holds no JSON object); {mend}")
    return value


def read_text(path: Path, mend: str) -> str:
    """Read a regular file of UTF-8; a pipe or a device in its place is refused, not waited for.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is no text, or no file.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no regular file; {mend}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged ({error.reason} at byte {error.start}); {mend}") from None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")
