"""Evaluate image classifiers on a split of any labelled images.

    python -m tffd_zoo.eval tffd_resnet20 tffd_resnet20.ce_c100 --data uoft-cs/cifar100

Several processes share the images and give the same counts: start it with `accelerate launch -m` or `torchrun -m`.
"""

from __future__ import annotations

import atexit
import csv
import difflib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import tyro
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from timm.data.model_config import resolve_input_data_config
from timm.models import is_model, parse_model_name, split_model_name_tag
from timm.models._hub import hf_split
from torch import nn

from . import models  # noqa: F401 (registers the zoo's architectures with timm)
from .allocator import keep_freed_memory
from .atomic import replacing_file
from .cards import markdown_table
from .cli import run_cli
from .data import ImageSpec, Loader, TrainSource, eval_loader, open_source
from .evaluation import evaluate, evaluation_record
from .export import CONFIG, SUMS, WEIGHTS, file_sha256, read_sums, verify_export
from .models.weights import reason_of

_logger = logging.getLogger(__name__)

PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class EvalConfig:
    """Evaluate image classifiers: top-1, top-5, NLL, calibration error, parameters, multiply-adds and images/s.

    Each model gets the images as its own config wants them. ECE has 15 equal-width bins.
    """

    models: tyro.conf.Positional[tuple[str, ...]]
    """Registered names with or without tag (tffd_resnet20.c100), hf-hub:org/name[@revision] or local-dir:FOLDER."""
    data: str
    """A Hub data set id, a folder of parquet files, an image folder, or 'digits' (ships with scikit-learn)."""
    split: str = "test"
    """Split to evaluate on."""
    batch_size: int = 256
    """Images per batch and process."""
    image_column: str | None = None
    """Column of the images; found by its type when not given."""
    label_column: str | None = None
    """Column of the labels; found by its type when not given."""
    revision: str | None = None
    """Revision of a Hub data set."""
    skip_unreadable: bool = False
    """Leave unreadable images out instead of stopping at them."""
    workers: int | None = None
    """Processes that decode images, when they do not fit in memory; one per core when not given."""
    device: str | None = None
    """Where to run: cpu, cuda, cuda:1, mps; the fastest there is when not given."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision."""
    json: Path | None = None
    """Write the figures and all that they depend on to this file, as JSON."""
    csv: Path | None = None
    """Write them to this file, as CSV."""


def main(config: EvalConfig) -> None:
    """Evaluate every model of `config`, then print the table and write what was asked for.

    Raises:
        ValueError, OSError: a model or the data cannot be used; the models evaluated before it are reported all the
            same.
    """
    if not config.models:
        raise ValueError("name at least one model, for example tffd_resnet20")
    for name in config.models:
        check_model_name(name)
    keep_freed_memory()
    state, device = _processes_and_device(config.device)
    with state.main_process_first():  # one process downloads, the others find it there
        source = open_source(
            config.data,
            config.split,
            image_column=config.image_column,
            label_column=config.label_column,
            revision=config.revision,
            skip_unreadable=config.skip_unreadable,
        )

    loaders: dict[ImageSpec, Loader] = {}
    records: list[dict[str, Any]] = []
    try:
        for name in config.models:
            with state.main_process_first():
                model = load_model(name)
            check_labels(name, model, source)
            model = model.to(device).to(memory_format=torch.channels_last)
            spec = ImageSpec(**resolve_input_data_config(model, use_test_size=True))
            if spec not in loaders:
                loaders[spec] = eval_loader(
                    source,
                    spec,
                    config.batch_size,
                    rank=state.process_index,
                    world_size=state.num_processes,
                    workers=config.workers,
                    memory_format=torch.channels_last,
                )
            result = evaluate(
                model,
                loaders[spec],
                device=device,
                distributed=state.num_processes > 1,
                amp_dtype=PRECISIONS[config.precision],
                memory_format=torch.channels_last,
            )
            record = evaluation_record(model, result, source, spec)
            settings = {
                "batch_size": config.batch_size,
                "precision": config.precision,
                "processes": state.num_processes,
            }
            records.append({"model": name, **record, "evaluation": record["evaluation"] | settings})
    finally:
        if state.is_main_process and records:
            print(table(records))
            write_records(records, config.json, config.csv)


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
        raise ValueError(f"{architecture} has no weights to evaluate; give an export of your own as local-dir:FOLDER")
    if tag and name not in pretrained:
        raise ValueError(f"{architecture} has no weights {tag!r}; choose one of {', '.join(pretrained)}")


def load_model(name: str) -> nn.Module:
    """Load a registered name, `hf-hub:org/name[@revision]` or `local-dir:FOLDER` with its weights.

    An export is checked against its hashes first, on the Hub too.

    Raises:
        ValueError: it cannot be had; says why.
        FileNotFoundError: a file of an export is missing.
    """
    source, model_id = parse_model_name(name)
    if source == "local-dir" and (Path(model_id) / SUMS).exists():
        verify_export(model_id)
    try:
        if source == "hf-hub":
            _verify_download(model_id)
        return timm.create_model(name, pretrained=True)
    except (RuntimeError, SafetensorError) as error:  # how timm, torch and safetensors refuse
        raise ValueError(f"{name} cannot be loaded: {' '.join(str(error).split())}") from error
    except Exception as error:  # the Hub client's own errors and those of its HTTP library have no common base
        if source == "hf-hub":
            raise ValueError(f"{name} cannot be loaded: {reason_of(error)}") from error
        if isinstance(error, OSError):
            raise ValueError(f"{name} cannot be loaded: {' '.join(str(error).split())}") from error
        raise


def _verify_download(model_id: str) -> None:
    """Compare an export on the Hub with its `SHA256SUMS`: neither timm nor the Hub's client looks at the bytes.

    What was not exported by this package, or is in the cache without its sums, is left to timm.

    Raises:
        ValueError: a file that timm would load is another one.
    """
    repo, revision = hf_split(model_id)
    config = Path(hf_hub_download(repo, CONFIG, revision=revision))
    if "tffd_zoo" not in json.loads(config.read_text()):
        return
    try:
        sums = read_sums(Path(hf_hub_download(repo, SUMS, revision=revision)).parent)
    except EntryNotFoundError:
        return
    for path in (config, Path(hf_hub_download(repo, WEIGHTS, revision=revision))):
        if file_sha256(path) != sums.get(path.name):
            raise ValueError(
                f"{path.resolve()} is not the {path.name} that {SUMS} lists; delete that file and try again, and if "
                "this comes back, do not use the repository"
            )


def check_labels(name: str, model: nn.Module, source: TrainSource) -> None:
    """Make sure that logit i of `model` and label i of `source` are the same class, as far as can be known.

    Raises:
        ValueError: the number of classes differs, or the same names stand in another order.
    """
    if model.num_classes != source.num_classes:
        raise ValueError(
            f"{name} tells {model.num_classes} classes apart but {source.name} has {source.num_classes}; "
            "give data with the classes that it was trained on"
        )
    label_names = getattr(model, "pretrained_cfg", {}).get("label_names")
    if not isinstance(label_names, Sequence) or tuple(label_names) == source.label_names:
        return
    index, ours, theirs = next(
        (index, ours, theirs)
        for index, (ours, theirs) in enumerate(zip(label_names, source.label_names, strict=True))
        if ours != theirs
    )
    difference = f"class {index} is {ours!r} to {name} and {theirs!r} in {source.name}"
    if set(label_names) == set(source.label_names):
        raise ValueError(f"{difference}; order the classes of the data as the model has them")
    _logger.warning("%s: the figures only mean something if these are two names of one thing", difference)


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the figures of several models as a table."""
    header = ["model", "top-1 %", "top-5 %", "NLL", "ECE %", "params, M", "multiply-adds, M", "images", "images/s"]
    rows = [
        [
            record["model"],
            f"{record['top1']:.2f}",
            f"{record['top5']:.2f}",
            f"{record['nll']:.4f}",
            f"{record['ece']:.2f}",
            f"{record['params'] / 1e6:.2f}",
            f"{record['macs'] / 1e6:.1f}",
            f"{record['images']}",
            f"{record['images_per_second']:.0f}",
        ]
        for record in records
    ]
    return markdown_table(header, rows)


def write_records(records: Sequence[Mapping[str, Any]], json_file: Path | None, csv_file: Path | None) -> None:
    """Write the records whole or not at all; in CSV the evaluation settings are columns of their own."""
    if json_file:
        with replacing_file(json_file) as aside:
            aside.write_text(json.dumps(records, indent=2) + "\n")
    if csv_file:
        rows = [{key: value for key, value in record.items() if key != "evaluation"} for record in records]
        with replacing_file(csv_file) as aside, aside.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], *records[0]["evaluation"]])
            writer.writeheader()
            writer.writerows(row | record["evaluation"] for row, record in zip(rows, records, strict=True))


def _processes_and_device(wanted: str | None) -> tuple[PartialState, torch.device]:
    """Join the other processes, if there are any, and find the device of this one."""
    # Unless told that it is to use CPUs, accelerate leaves processes without a GPU strangers to each other.
    no_gpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=wanted == "cpu" or (wanted is None and no_gpu))
    atexit.register(state.destroy_process_group)  # left to the interpreter's end, gloo's threads can abort it
    if wanted in (None, "cpu"):
        return state, state.device
    if state.num_processes > 1:
        raise ValueError(f"each process has a device of its own; leave out --device {wanted}")
    try:
        return state, torch.empty(0, device=wanted).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {wanted} cannot be used: {str(error).splitlines()[0]}") from error


if __name__ == "__main__":
    run_cli(main, EvalConfig)
