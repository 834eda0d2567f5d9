"""What data sets are called: in words, on the Hub, and in the tags of weights that were trained on them."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Dataset:
    """A data set, as cards name it."""

    name: str
    hub_id: str | None
    """Its id on the Hub; None for one that lies elsewhere."""
    classes: int
    usual_epochs: int | None = None
    """Length of the runs that the literature's figures are from."""
    folders: tuple[str, ...] = ()
    """What a local copy is usually called, letters and digits alone."""


DATASETS = {
    "c100": Dataset("CIFAR-100", "uoft-cs/cifar100", 100, 240, ("cifar100",)),
    "in1k": Dataset(
        "ImageNet-1k", "ILSVRC/imagenet-1k", 1000, 100, ("imagenet", "imagenet1k", "imagenet2012", "ilsvrc2012")
    ),
    "digits": Dataset("scikit-learn's handwritten digits", None, 10),
}
"""The data sets that have a tag of their own, by it."""


def data_tag(source: str, classes: int) -> str:
    """The part of a tag that names the data: `c100`, `in1k`, `digits`, or a short form of the source's own name.

    Args:
        source: a Hub id, the name of a folder, or `digits`, as `portable_source` gives it.
        classes: how many it has. A folder called `imagenet` with two classes is not ImageNet, and no tag says so.
    """
    known = _known_tag(source, classes)
    if known:
        return known
    plain = unicodedata.normalize("NFKD", _last_part(source)).encode("ascii", "ignore").decode().lower()
    short = re.sub(r"[^a-z0-9]", "", plain)[:32]  # no underscore: that parts the method from the data
    taken = {name for tag, dataset in DATASETS.items() for name in (tag, *dataset.folders)}
    return f"own{classes}" if not short or short in taken else short


def find_dataset(source: str, classes: int) -> Dataset:
    """The data set that `source`, cut of local folders, names with so many classes."""
    known = _known_tag(source, classes)
    if known:
        return DATASETS[known]
    return Dataset(source, source if _is_hub_id(source) else None, classes)


def _known_tag(source: str, classes: int) -> str | None:
    folder = re.sub(r"[^a-z0-9]", "", _last_part(source).lower())
    for tag, dataset in DATASETS.items():
        named = source == (dataset.hub_id or tag) or (folder in dataset.folders and not _is_hub_id(source))
        if named and classes == dataset.classes:
            return tag
    return None


def _is_hub_id(source: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source) is not None


def _last_part(source: str) -> str:
    return os.path.basename(os.path.abspath(source))


# --- places of this machine, which are no part of what is published ---------------------------------------------------


def portable(value: Any) -> Any:
    """`value` with every path that shows by its form to be of this machine cut down to its last part."""
    if isinstance(value, Mapping):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [portable(item) for item in value]
    if isinstance(value, str) and re.match(r"(local-dir:)?([/~]|\.{1,2}(/|$))", value):
        scheme = "local-dir:" if value.startswith("local-dir:") else ""
        return scheme + _last_part(value.removeprefix(scheme))
    return value


def portable_source(source: str, revision: str | None) -> str:
    """The name of a data set without its place: a Hub id, which has a revision, stays as it is."""
    return source if revision else _last_part(source)


def portable_recipe(recipe: Mapping[str, Any], revision: str | None) -> dict[str, Any]:
    """A recipe as it is published: without the places of this machine, so that it is the same wherever it ran.

    Args:
        recipe: as `Recipe.to_dict` gives it.
        revision: that of the data, on the Hub; None for data in a folder.
    """
    found = portable(recipe)
    found["data"]["source"] = portable_source(recipe["data"]["source"], revision)
    found["run"].pop("output", None)
    if (found.get("teacher") or {}).get("weights"):
        found["teacher"]["weights"] = Path(recipe["teacher"]["weights"]).name
    return found
