"""What people call the parts of a data set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval"),
}
"""The usual names of the usual splits, those that `datasets` knows too."""

EVAL_SPLITS = ("validation", "test")
"""Splits to evaluate on where none is named, first wins: the test images of many a data set have no labels."""


class NoSuchSplit(ValueError):
    """A split that the data does not have. Its message names those that it has."""


def usual_name(split: str) -> str | None:
    """The key of :data:`SPLIT_NAMES` that `split` is another name for; None for a name of its own."""
    return next((usual for usual, names in SPLIT_NAMES.items() if split.lower() in names), None)


def same_split(one: str, other: str) -> bool:
    """Whether both are names of one split."""
    return one == other or (usual_name(one) is not None and usual_name(one) == usual_name(other))


def find_split(wanted: str | Sequence[str], existing: Iterable[str], data: str) -> str:
    """The one of `existing` that is meant by `wanted`, or by the first of several that there is.

    A split answers to its own name and to every usual name for the same.

    Raises:
        NoSuchSplit: there is none.
        ValueError: two of them may be meant.
    """
    existing = list(existing)
    names = [wanted] if isinstance(wanted, str) else wanted
    for name in names:
        if name in existing:
            return name
        usual = usual_name(name)
        found = [split for split in existing if usual and usual_name(split) == usual]
        if len(found) > 1:
            raise ValueError(f"{data} has {' and '.join(found)}, each of which may be the split {name}; name one")
        if found:
            return found[0]
    raise NoSuchSplit(f"{data} has no split {' or '.join(names)}; it has {', '.join(existing)}")
