"""Models by name, each checked before it is used: its architecture, its weights' hashes, its classes."""

from __future__ import annotations

import difflib
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from timm.models import is_model, parse_model_name, resolve_model_input_args, split_model_name_tag
from timm.models._hub import hf_split
from torch import nn

from . import models  # noqa: F401 (registers the zoo's architectures with timm)
from .data import ImageSource, TrainSource
from .data.image_source import some_of
from .export_record import (
    AGAIN,
    CONFIG,
    SIGNATURE,
    SUMS,
    WEIGHTS,
    file_sha256,
    is_of_this_package,
    read_sums,
    verify_export,
)
from .json_files import read_json
from .models.manifest import known_release
from .models.weights import reason_of
from .signing import check_signature

_logger = logging.getLogger(__name__)


def expand_names(names: Sequence[str]) -> list[str]:
    """Put the registered names with weights that match in the place of every pattern, such as 'tffd_*.*c100'.

    Raises:
        ValueError: there is no name, or nothing matches one.
    """
    if not names:
        raise ValueError("name at least one model, for example tffd_resnet20")
    found: list[str] = []
    for name in names:
        is_pattern = "*" in name and parse_model_name(name)[0] is None
        matching = timm.list_pretrained(name) if is_pattern else [name]
        if not matching:
            raise ValueError(f"no weights match {name!r}; timm.list_pretrained() has them all")
        found += matching
    return list(dict.fromkeys(found))


def check_architecture(name: str) -> None:
    """Refuse a name that no architecture has.

    Raises:
        ValueError: with the names that come close.
    """
    source, model_id = parse_model_name(name)
    architecture = split_model_name_tag(model_id)[0]
    if source is None and not is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() has them all"
        raise ValueError(f"there is no model {architecture!r}; {hint}")


def check_model_name(name: str) -> None:
    """Refuse a name that no weights have, before any data is read.

    Raises:
        ValueError: with the names that come close.
    """
    check_architecture(name)
    source, model_id = parse_model_name(name)
    if source is not None:
        return
    architecture, tag = split_model_name_tag(model_id)
    pretrained = timm.list_pretrained(f"{architecture}.*") or timm.list_pretrained(architecture)
    if not pretrained:
        raise ValueError(f"{architecture} has no weights; give an export of your own as local-dir:FOLDER")
    if tag and name not in pretrained:
        raise ValueError(f"{architecture} has no weights {tag!r}; choose one of {', '.join(pretrained)}")


def size_arguments(name: str, image_size: int | None) -> dict[str, Any]:
    """What `timm.create_model` has to be told for images of this size: `img_size`, where the network is made for one.

    Vision transformers are: their position embeddings are made for a size, and resampled from released ones of another.
    Nothing where the size is None.
    """
    if image_size is None:
        return {}
    arguments = resolve_model_input_args(name, {"img_size": image_size})
    return {"img_size": arguments["img_size"]} if "img_size" in arguments else {}


def load_model(name: str, num_classes: int | None = None, image_size: int | None = None) -> nn.Module:
    """Load a registered name, `hf-hub:org/name[@revision]` or `local-dir:FOLDER` with its weights.

    An export is checked against its hashes first, on the Hub too. With another `num_classes` than the weights have, the
    head is a new one; with another `image_size` than a network is made for, it is made for that.

    Raises:
        ValueError: it cannot be had; says why.
        FileNotFoundError: a file of an export is missing.
    """
    source, model_id = parse_model_name(name)
    if source == "local-dir":
        _verify_folder(name, Path(model_id))
    try:
        if source == "hf-hub":
            _verify_download(name, model_id)
        size = size_arguments(name, image_size)
        return timm.create_model(name, pretrained=True, num_classes=num_classes, **size)
    except (RuntimeError, SafetensorError) as error:  # how timm, torch and safetensors refuse
        raise ValueError(f"{name} cannot be loaded: {' '.join(str(error).split())}") from error
    except Exception as error:  # the Hub client's own errors and those of its HTTP library have no common base
        if source == "hf-hub":
            raise ValueError(f"{name} cannot be loaded: {reason_of(error)}") from error
        if isinstance(error, OSError):
            raise ValueError(f"{name} cannot be loaded: {' '.join(str(error).split())}") from error
        raise


def temperature_of(name: str) -> float:
    """What the logits of these weights are divided by before the softmax; 1 where they were not calibrated."""
    source, model_id = parse_model_name(name)
    if source is None:
        release = known_release(name)
        return (release and release.temperature) or 1.0
    if source == "hf-hub":
        repo, revision = hf_split(model_id)
        config = Path(hf_hub_download(repo, CONFIG, revision=revision))
    else:
        config = Path(model_id) / CONFIG
    return read_json(config, "export the run again").get("tffd_zoo", {}).get("temperature", 1.0)


def _verify_folder(name: str, folder: Path) -> None:
    """Check an export; what was not exported by this package is left to timm.

    Raises:
        FileNotFoundError, ValueError: it is not what was exported, or no file at all.
    """
    if (folder / SUMS).exists():
        verify_export(folder)
        signature = folder / SIGNATURE
        check_signature(name, folder / SUMS, signature if signature.exists() else None)
        return
    for file in (folder / CONFIG, folder / WEIGHTS):
        if file.exists() and not file.is_file():
            raise ValueError(f"{file} is no regular file; {AGAIN}")
    if (folder / CONFIG).exists():
        read_json(folder / CONFIG, AGAIN)
    if is_of_this_package(folder / WEIGHTS):
        _say_unchecked(name)


def _say_unchecked(name: str) -> None:
    _logger.warning(
        "%s is UNCHECKED: its weights were exported by this package, but the %s that tells whether they are still the "
        "same is gone; %s",
        name,
        SUMS,
        AGAIN,
    )


def _verify_download(name: str, model_id: str) -> None:
    """Compare an export on the Hub with its `SHA256SUMS`: neither timm nor the Hub's client looks at the bytes.

    What was not exported by this package is left to timm; an export whose sums are gone is said to be unchecked.

    Raises:
        ValueError: a file that timm would load is another one.
    """
    repo, revision = hf_split(model_id)
    config = Path(hf_hub_download(repo, CONFIG, revision=revision))
    ours = "tffd_zoo" in read_json(config, "delete that file and try again")
    try:
        weights = Path(hf_hub_download(repo, WEIGHTS, revision=revision))
    except EntryNotFoundError:
        return
    try:
        sums_file = Path(hf_hub_download(repo, SUMS, revision=revision)) if ours else None
    except EntryNotFoundError:
        sums_file = None
    if sums_file is None:
        if is_of_this_package(weights):
            _say_unchecked(name)
        return
    try:
        signature = Path(hf_hub_download(repo, SIGNATURE, revision=revision))
    except EntryNotFoundError:
        signature = None
    check_signature(name, sums_file, signature)
    sums = read_sums(sums_file.parent)
    for path in (config, weights):
        if file_sha256(path) != sums.get(path.name):
            raise ValueError(
                f"{path.resolve()} is not the {path.name} that {SUMS} lists; delete that file and try again, and if "
                "this comes back, do not use the repository"
            )


# --- which logit is which class ---------------------------------------------------------------------------------------


def known_images(name: str, known: Sequence[str] | None, source: ImageSource) -> ImageSource:
    """Return the images of `source` whose classes are among the `known` ones; all where one side has no names.

    Raises:
        ValueError: there are none.
    """
    if not _by_name(known, source.label_names):
        return source
    shared = {*(known or ())}.intersection(source.label_names)
    part = source.of_classes(shared)
    if not len(part):
        raise ValueError(
            f"{name} knows none of the classes that {source.name} has images of ({some_of(source.label_names)}); it "
            f"knows {some_of(known or ())}: call the classes what the model calls them, or take another model"
        )
    return part if part.num_classes < source.num_classes else source


def left_out(source: ImageSource, known: ImageSource) -> dict[str, Any]:
    """What of `source` is not among its `known` images, for records."""
    out = [label for label in source.label_names if label not in known.label_names]
    return {"left_out_images": len(source) - len(known), "left_out_classes": out}


def number_classes(name: str, model: nn.Module, source: ImageSource) -> ImageSource:
    """Return `source` with its classes numbered as the logits of `model` are.

    Raises:
        ValueError: `model` does not know one of them; see :func:`match_classes`.
    """
    known = label_names(model)
    numbers = match_classes(name, known, _logits(model), source)
    return source if known is None or numbers == [*range(len(known))] else source.with_classes(known)


def order_logits(name: str, model: nn.Module, source: TrainSource, only: bool = False) -> None:
    """Order the logits of `model` as `source` numbers its classes: those first, then the others.

    Args:
        name: of the model, for the error.
        model: changed in place.
        source: what numbers the classes.
        only: leave the others out.

    Raises:
        ValueError: `model` does not know a class of `source`; see :func:`match_classes`.
    """
    network: Any = model  # to mypy, whatever a module holds is a tensor
    numbers = match_classes(name, label_names(model), network.num_classes, source)
    if not only:
        numbers += sorted(set(range(network.num_classes)) - set(numbers))
    if numbers == [*range(network.num_classes)]:
        return
    head = network.get_classifier()
    if not isinstance(head, (nn.Linear, nn.Conv2d)):
        raise ValueError(
            f"{name} has its classes in another order than {source.name}, and its head ({type(head).__name__}) "
            "cannot be put in order; order the classes of the data as the model has them"
        )
    for parameter in head.parameters():
        parameter.data = parameter.data[numbers].clone()
    network.num_classes = len(numbers)


def match_classes(name: str, known: Sequence[str] | None, logits: int, source: TrainSource) -> list[int]:
    """Return for every class of `source` the number of its logit: by name where both sides have names.

    Args:
        name: whose logits, for the error.
        known: the names of its classes; None where it has none, and classes are as good as their numbers.
        logits: how many there are.
        source: may lack classes that the model knows.

    Raises:
        ValueError: a class cannot be matched.
    """
    if tuple(known or ()) == source.label_names:
        return [*range(logits)]
    if known is None or not _by_name(known, source.label_names):
        if logits != source.num_classes:
            raise ValueError(
                f"{name} tells {logits} classes apart but {source.name} has {source.num_classes}, and they have no "
                "names that tell which are which; give data with the classes that it was trained on"
            )
        return [*range(logits)]
    place = {label: number for number, label in enumerate(known)}
    if unknown := [label for label in source.label_names if label not in place]:
        raise ValueError(
            f"{name} does not know {some_of(unknown)} of {source.name} (it knows {some_of(known)}); leave those images "
            "out, call the classes what the model calls them, or take another model"
        )
    times = Counter(known) | Counter(source.label_names)
    if twice := [label for label in dict.fromkeys(source.label_names) if times[label] > 1]:
        raise ValueError(
            f"the classes of {name} and {source.name} cannot be told apart by their names: {some_of(twice)} twice; "
            "give each a name of its own"
        )
    return [place[label] for label in source.label_names]


def label_names(model: nn.Module) -> tuple[str, ...] | None:
    """The names of the classes of `model`, None where its config has none."""
    names = getattr(model, "pretrained_cfg", {}).get("label_names")
    return tuple(names) if isinstance(names, Sequence) and len(names) == model.num_classes else None


def _logits(model: Any) -> int:
    return model.num_classes


def _by_name(known: Sequence[str] | None, labels: Sequence[str]) -> bool:
    """Whether classes are matched by name: not where one side has no names, and numbers stand for the classes."""
    if known is None:
        return False
    return not {*known}.isdisjoint(labels) or (_are_names(known) and _are_names(labels))


def _are_names(labels: Sequence[str]) -> bool:
    return tuple(labels) != tuple(map(str, range(len(labels))))
