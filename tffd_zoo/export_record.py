"""What an export holds, read from its folder and checked: every file by its hash, and the facts against each other.

The one reader of an export; `export` is what writes it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.utils.sha import sha_fileobj
from safetensors import SafetensorError, safe_open

from .atomic import restore_folder
from .evaluation import EvalResult
from .json_files import read_json, read_text
from .run_record import CURVES, ENVIRONMENT, EXPORT, RECIPE

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
METRICS = "metrics.json"
CARD = "README.md"
SUMS = "SHA256SUMS"
SIGNATURE = "model.sig"
"""Over the sums, where it is signed."""
REQUIRED_FILES = (WEIGHTS, CONFIG, RECIPE, METRICS, CARD)
ALL_FILES = {*REQUIRED_FILES, ENVIRONMENT, CURVES, SUMS, SIGNATURE}
"""All that an export may hold. There is no pickle among them."""

AGAIN = "export or download it again"


@dataclass(frozen=True)
class ExportInfo:
    """What a verified export holds."""

    folder: Path
    architecture: str
    """The name in this zoo, `tffd_resnet18`; `config["architecture"]` is the one that timm builds, `resnet18`."""
    tag: str
    """`c100` (Tf-FD), `ce_c100` (plain) and so on."""
    config: dict[str, Any]
    """timm's `config.json`: architecture, classes with their names, preprocessing, constructor arguments."""
    recipe: dict[str, Any]
    metrics: dict[str, Any]
    """Figures of these weights, with their evaluation settings."""
    sha256: dict[str, str]
    """Hash of every file, by name."""

    @property
    def name(self) -> str:
        """Architecture and tag as timm joins them: `tffd_resnet20.c100`."""
        return f"{self.architecture}.{self.tag}"

    @property
    def weights(self) -> Path:
        return self.folder / WEIGHTS

    @property
    def temperature(self) -> float | None:
        """What predictions divide the logits by; None: these weights were not calibrated."""
        return self.config["tffd_zoo"].get("temperature")

    @property
    def environment(self) -> dict[str, Any]:
        """Versions and hardware of the run; nothing where they were not given."""
        return read_json(self.folder / ENVIRONMENT, AGAIN) if ENVIRONMENT in self.sha256 else {}

    @property
    def loading_line(self) -> str:
        """The line of Python that loads it."""
        return f'timm.create_model("local-dir:{self.folder}", pretrained=True)'


def find_export(folder: Path) -> Path:
    """The export that `folder` is, or that the run in `folder` has.

    Raises:
        FileNotFoundError: there is none.
    """
    for candidate in (folder, folder / EXPORT):
        if (candidate / SUMS).is_file():
            return candidate
    raise FileNotFoundError(f"{folder} is neither an export nor the folder of a run that has one; finish the run first")


def verify_export(folder: Path | str) -> ExportInfo:
    """Check every file of an export against `SHA256SUMS`, and what they say against each other; no tensor is used.

    Raises:
        FileNotFoundError: `folder` is no export, or a file is missing.
        ValueError: a file was changed or added, the weights are no safetensors file, or the files contradict each
            other.
    """
    folder = Path(folder)
    restore_folder(folder)
    if not (folder / SUMS).exists():
        raise FileNotFoundError(
            f"{folder} is not an export: it has no {SUMS}; write one with python -m tffd_zoo.export"
        )
    sha256 = read_sums(folder)
    for name in sorted({*sha256, *REQUIRED_FILES}):
        if name not in sha256:
            raise ValueError(f"{folder}: {SUMS} does not list {name}, so it cannot be trusted; export again")
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder}: {name} is missing; {AGAIN}")
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: {name} is no regular file; {AGAIN}")
        if file_sha256(folder / name) != sha256[name]:
            raise ValueError(f"{folder}: {name} is not the file that was exported (its sha256 differs); export again")
    strangers = {path.name for path in folder.iterdir()} - {*sha256, SUMS, SIGNATURE}
    if strangers:
        raise ValueError(f"{folder} holds {', '.join(sorted(strangers))}, no part of the export; move it elsewhere")

    config, recipe, metrics = (read_json(folder / name, AGAIN) for name in (CONFIG, RECIPE, METRICS))
    try:
        provenance = _check_weights(folder / WEIGHTS, config, sha256)
        _check_facts(config, metrics)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(f"{folder}: {what}; {AGAIN}") from None
    return ExportInfo(folder, provenance["architecture"], provenance["tag"], config, recipe, metrics, sha256)


def _check_weights(weights: Path, config: Mapping[str, Any], sha256: Mapping[str, str]) -> dict[str, str]:
    """Hold what the weights' file says of itself against the files beside it, and return it.

    Raises:
        ValueError: they are from different exports, or the head has another number of classes than the config.
    """
    provenance = config.get("tffd_zoo") or {}
    classes, head = config["num_classes"], config["pretrained_cfg"].get("classifier")
    heads = [head] if isinstance(head, str) else head or []
    try:
        with safe_open(weights, framework="pt") as file:
            metadata = file.metadata() or {}
            names = {f"{name}.{part}" for name in heads for part in ("weight", "bias")} & {*file.keys()}
            rows = {name: file.get_slice(name).get_shape()[0] for name in sorted(names)}
    except SafetensorError as error:
        raise ValueError(f"{WEIGHTS} is not a safetensors file ({error})") from None
    for key in ("architecture", "tag", "recipe_sha256"):
        if metadata.get(key) != provenance.get(key) or key not in metadata:
            raise ValueError(
                f"{WEIGHTS} says {key} {metadata.get(key)!r} and {CONFIG} {provenance.get(key)!r}; "
                "they come from different exports"
            )
    if metadata["recipe_sha256"] != sha256[RECIPE]:
        raise ValueError(f"{RECIPE} is not the recipe that {WEIGHTS} was trained with (another hash)")
    for name, found in rows.items():
        if found != classes:
            raise ValueError(f"{CONFIG} says {classes} classes, and {name} in {WEIGHTS} is for {found}")
    return metadata


def _check_facts(config: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
    """Hold the label names against the number of classes, and the preprocessing against that of the evaluation."""
    classes, names = config["num_classes"], config["label_names"]
    if len(names) != classes:
        raise ValueError(f"{CONFIG} says {classes} classes and names {len(names)}")
    EvalResult.from_json(metrics)
    evaluation, preprocessing = metrics["evaluation"], config["pretrained_cfg"]
    for key in ("mean", "std"):
        if key in evaluation and list(evaluation[key]) != list(preprocessing[key]):
            raise ValueError(
                f"{METRICS} is from images normalised with {key} {evaluation[key]}, and {CONFIG} says "
                f"{preprocessing[key]}"
            )


def is_of_this_package(weights: Path) -> bool:
    """Whether a weights file says of itself that it is from an export, whatever lies beside it."""
    try:
        with safe_open(weights, framework="pt") as file:
            return "recipe_sha256" in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


# --- hashes -----------------------------------------------------------------------------------------------------------


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return sha_fileobj(file).hex()


def read_sums(folder: Path) -> dict[str, str]:
    """Read `SHA256SUMS`, as `sha256sum` writes it, into hashes by file name.

    Raises:
        ValueError: a line is damaged, or names a file elsewhere.
    """
    sums = {}
    for number, line in enumerate(read_text(folder / SUMS, AGAIN).splitlines(), start=1):
        found = re.fullmatch(r"([0-9a-f]{64}) [ *]([^/\\]+)", line)
        if not found or found[2] in (".", ".."):
            raise ValueError(f"{folder / SUMS}, line {number} is damaged (no sha256 and name of a file); {AGAIN}")
        sums[found[2]] = found[1]
    return sums


def write_sums(folder: Path) -> None:
    """Write `SHA256SUMS` over all other files of `folder`; `sha256sum -c SHA256SUMS` checks it too."""
    names = sorted(path.name for path in folder.iterdir() if path.name not in (SUMS, SIGNATURE))
    (folder / SUMS).write_text("".join(f"{file_sha256(folder / name)}  {name}\n" for name in names))
