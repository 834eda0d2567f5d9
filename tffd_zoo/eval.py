"""Evaluate image classifiers on a split of any labelled images.

    python -m tffd_zoo.eval tffd_resnet20 tffd_resnet20.ce_c100 --data uoft-cs/cifar100
    python -m tffd_zoo.eval tffd_resnet20 --against tffd_resnet20.ce_c100 --data uoft-cs/cifar100 --suite standard

Several processes share the images and give the same counts: start it with `accelerate launch -m` or `torchrun -m`.
"""

from __future__ import annotations

import atexit
import csv
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from timm.data.model_config import resolve_input_data_config
from torch import nn

from .allocator import tune_memory
from .atomic import replacing_file, write_text
from .cli import run_cli
from .data import EVAL_SPLITS, ImageSource, ImageSpec, Loader, NoSuchSplit, eval_loader, open_source
from .data.image_source import some_of
from .evaluation import FIGURES, evaluate, evaluation_record
from .loading import check_model_name, expand_names, known_images, label_names, left_out, load_model, order_logits
from .markdown import markdown_table
from .processes import main_process_first
from .ranges import COUNT, NOT_NEGATIVE, check_ranges
from .suite import STANDARD, Subject, SuiteConfig, run_suite
from .threads import use_threads

PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class EvalConfig:
    """Evaluate image classifiers: top-1, top-5, NLL, calibration error, parameters, multiply-adds and images/s.

    Each model gets the images as its own config wants them. ECE has 15 equal-width bins.
    """

    models: tyro.conf.Positional[tuple[str, ...]]
    """Registered names with or without tag (tffd_resnet20.c100), patterns of them ('tffd_*.*c100'),
    hf-hub:org/name[@revision] or local-dir:FOLDER."""
    data: str
    """A Hub data set id, a folder of parquet files, an image folder, or 'digits' (ships with scikit-learn)."""
    split: str | None = None
    """Split to evaluate on; validation, or else test, when not given."""
    batch_size: Annotated[int | None, COUNT] = None
    """Images per batch and process; when not given 64 on a CPU, whose caches hold no more, and 256 elsewhere."""
    image_column: str | None = None
    """Column of the images; found by its name or type when not given."""
    label_column: str | None = None
    """Column of the labels; found by its name or type when not given."""
    revision: str | None = None
    """Revision of a Hub data set."""
    skip_unreadable: bool = False
    """Leave unreadable images out instead of stopping at them."""
    workers: Annotated[int | None, NOT_NEGATIVE] = None
    """Processes that decode images, when they do not fit in memory; one per core when not given."""
    device: str | None = None
    """Where to run: cpu, cuda, cuda:1, mps; the fastest there is when not given."""
    threads: Annotated[int | None, COUNT] = None
    """Threads of each process; when not given OMP_NUM_THREADS, or else the cores divided by the processes that share
    them."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision."""
    json: Path | None = None
    """Write the figures and all that they depend on to this file, as JSON."""
    csv: Path | None = None
    """Write them to this file, as CSV."""
    more: tyro.conf.OmitArgPrefixes[SuiteConfig] = field(default_factory=SuiteConfig)
    """Calibration, corruptions, unknown images, transfer and more, beside or in place of the figures above."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.more.suite is not None and (self.json or self.csv):
            raise ValueError("--suite writes JSON and CSV into the folder --out; leave --json and --csv out")
        unused = [name for name, value in vars(self.more).items() if value != getattr(SuiteConfig(), name)]
        if self.more.suite is None and unused:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
            raise ValueError(f"{flags} does nothing without --suite; add --suite {STANDARD}")


def main(config: EvalConfig) -> None:
    """Evaluate every model of `config`, then print the table and write what was asked for.

    Raises:
        ValueError, OSError: a model or the data cannot be used; the models evaluated before it are reported all the
            same.
    """
    models = expand_names(config.models)
    for name in models:
        check_model_name(name)
    tune_memory()
    state, device = _processes_and_device(config.device)
    threads = use_threads(config.threads, state.num_processes)
    source = _open(config, state)
    if state.is_main_process:
        print(source.describe(), file=sys.stderr)
    if config.more.suite is not None:
        _run_suite(config, models, source, state, device)
        return

    loaders: dict[tuple[ImageSpec, str], Loader] = {}
    records: list[dict[str, Any]] = []
    try:
        for name in models:
            model, spec, known = _load(name, source, state, device)
            images = spec, known.fingerprint
            if images not in loaders:
                loaders[images] = eval_loader(
                    known,
                    spec,
                    _batch_size(config, device),
                    rank=state.process_index,
                    world_size=state.num_processes,
                    workers=config.workers,
                    memory_format=torch.channels_last,
                )
            result = evaluate(
                model,
                loaders[images],
                device=device,
                distributed=state.num_processes > 1,
                amp_dtype=PRECISIONS[config.precision],
                memory_format=torch.channels_last,
            )
            record = evaluation_record(model, result, known, spec)
            settings = {
                **left_out(source, known),
                "batch_size": _batch_size(config, device),
                "precision": config.precision,
                "processes": state.num_processes,
                "threads": threads,
            }
            records.append({"model": name, **record, "evaluation": record["evaluation"] | settings})
    finally:
        if state.is_main_process and records:
            print(table(records))
            write_records(records, config.json, config.csv)


def _open(
    config: EvalConfig, state: PartialState, split: str | None = None, label_column: str | None = None
) -> ImageSource:
    """Open a split, that to evaluate on when not given, with the labels of a column."""
    with main_process_first(state):
        try:
            return open_source(
                config.data,
                split or config.split or EVAL_SPLITS,
                image_column=config.image_column,
                label_column=label_column or config.label_column,
                revision=config.revision,
                skip_unreadable=config.skip_unreadable,
            )
        except NoSuchSplit as error:
            raise ValueError(f"{error}; name the one to evaluate on with --split") from error


def _load(
    name: str, source: ImageSource, state: PartialState, device: torch.device
) -> tuple[nn.Module, ImageSpec, ImageSource]:
    """The model on its device, how it wants its images, and those of `source` whose classes it knows."""
    with main_process_first(state):
        model = load_model(name)
    known = known_images(name, label_names(model), source)
    order_logits(name, model, known)
    lacking = [label for label in label_names(model) or () if label not in known.label_names]
    if state.is_main_process:
        if out := left_out(source, known)["left_out_classes"]:
            print(
                f"{name} does not know {some_of(out)} of {source.name}: evaluated on {known.num_classes} of "
                f"{source.num_classes} classes, {len(source) - len(known):,} of {len(source):,} images left out",
                file=sys.stderr,
            )
        if lacking and model.num_classes != known.num_classes:
            print(f"{name} also knows {some_of(lacking)}, of which there are no images", file=sys.stderr)
    model = model.to(device).to(memory_format=torch.channels_last)
    return model, ImageSpec(**resolve_input_data_config(model, use_test_size=True)), known


def _ordered_names(model: nn.Module, source: ImageSource) -> tuple[str, ...] | None:
    """The names of the logits once :func:`order_logits` has put those of `source` first."""
    known = label_names(model)
    if known is None or not set(source.label_names) <= set(known):
        return known
    return (*source.label_names, *(label for label in known if label not in source.label_names))


def _run_suite(
    config: EvalConfig, models: Sequence[str], source: ImageSource, state: PartialState, device: torch.device
) -> None:
    def make_subject(name: str) -> Subject:
        model, spec, known = _load(name, source, state, device)
        return Subject(
            name,
            model,
            spec,
            _ordered_names(model, known),
            device,
            _batch_size(config, device),
            PRECISIONS[config.precision],
            config.workers,
            state.process_index,
            state.num_processes,
        )

    run_suite(config.more, models, source, partial(_open, config, state), make_subject)


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the figures of several models as a table."""
    figures = [figure.heading for figure in FIGURES.values()]
    header = ["model", *figures, "params, M", "multiply-adds, M", "images", "images/s"]
    rows = [
        [
            record["model"],
            *(figure.shown(record.get(name)) for name, figure in FIGURES.items()),
            f"{record['params'] / 1e6:.2f}",
            f"{record['macs'] / 1e6:.1f}",
            _images(record),
            f"{record['images_per_second']:.0f}",
        ]
        for record in records
    ]
    return markdown_table(header, rows)


def _images(record: Mapping[str, Any]) -> str:
    """How many images a figure is of, and of how many, where some were left out."""
    out = record["evaluation"]["left_out_images"]
    return f"{record['images']} of {record['images'] + out}" if out else f"{record['images']}"


def write_records(records: Sequence[Mapping[str, Any]], json_file: Path | None, csv_file: Path | None) -> None:
    """Write the records whole or not at all; in CSV the evaluation settings are columns of their own."""
    if json_file:
        write_text(json_file, json.dumps(records, indent=2) + "\n")
    if csv_file:
        rows = [{key: value for key, value in record.items() if key != "evaluation"} for record in records]
        with replacing_file(csv_file) as aside, aside.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], *records[0]["evaluation"]])
            writer.writeheader()
            writer.writerows(row | record["evaluation"] for row, record in zip(rows, records, strict=True))


def _batch_size(config: EvalConfig, device: torch.device) -> int:
    # the feature maps of 256 CIFAR images do not fit into a CPU's cache: ResNet-20 takes half as long again
    return config.batch_size or (64 if device.type == "cpu" else 256)


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
