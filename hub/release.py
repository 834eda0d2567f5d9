"""Release an export: from its records to an entry of the manifest, its weights in the wheel.

    python hub/release.py runs/tffd-tffd_resnet20-s0

It writes into the clone that it lies in, not into what pip has installed, and says where. From the next start of Python
on, `timm.create_model("tffd_resnet20", pretrained=True)` loads them without network. What is too large for the wheel
goes to the Hub: `hub/publish.py --add-to-manifest`.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import tyro
from accelerate import PartialState

from tffd_zoo.cli import run_cli
from tffd_zoo.data import ImageSpec, eval_loader, open_source
from tffd_zoo.data.memory import AUGMENTS
from tffd_zoo.evaluation import EvalResult, evaluate, evaluation_record
from tffd_zoo.export import export
from tffd_zoo.export_record import WEIGHTS, ExportInfo, find_export, verify_export
from tffd_zoo.known_data import find_dataset
from tffd_zoo.loading import load_model, number_classes
from tffd_zoo.model_card import Twin, unequal_settings
from tffd_zoo.models import (
    HubFile,
    Metrics,
    PlainTwin,
    Release,
    Training,
    WheelFile,
    add_release,
    known_release,
    plain_twin_name,
    releases,
)
from tffd_zoo.ranges import POSITIVE
from tffd_zoo.run_record import CURVES, ENVIRONMENT

MANIFEST = Path(__file__).parents[1] / "tffd_zoo" / "models" / "manifest.json"
"""That of this clone."""
TOLD_ELSEWHERE = {"data", "split", "input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode"}
"""Settings of an evaluation that an entry has under names of its own."""


@dataclass(frozen=True)
class ReleaseConfig:
    """Put an export into the manifest and its weights into the package."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN-OR-EXPORT")]
    """An export, or the folder of a run that has one."""
    replace: bool = False
    """Put it in the place of the release of the same name."""
    hours: Annotated[float | None, POSITIVE] = None
    """Wall-clock hours of training, where the export does not say."""
    half: bool = False
    """Round the weights to float16, half the size, and measure the figures anew on them; needs --data."""
    twin: Path | None = None
    """Its plain twin, a run or an export that is not released itself: the entry tells what that reaches."""
    data: str | None = None
    """The images that the figures are from: a Hub id or a folder."""
    manifest: Path = MANIFEST
    """The manifest, that of this clone when not given; the weights go to weights/ beside it."""


def main(config: ReleaseConfig) -> None:
    """Check the export, add it, and say what it is called.

    Raises:
        ValueError, OSError: the export or its entry is not right; nothing was changed.
    """
    info = verify_export(find_export(config.source))
    twin = verify_export(find_export(config.twin)) if config.twin else None
    if twin and (reason := no_twin(info, twin)):
        raise ValueError(f"{twin.folder} is no plain twin of {info.name}: {reason}")
    if twin and known_release(twin.name, config.manifest):
        raise ValueError(f"{twin.name} is released, and its entry tells what it reaches: leave --twin out")
    print(f"{info.name} goes to {config.manifest} and weights/ beside it")
    with TemporaryDirectory() as scratch:
        if config.half:
            if config.data is None:
                raise ValueError("--half changes the weights: pass --data, the images to measure them on again")
            info = in_half(info, config.data, Path(scratch) / "export")
            twin = twin and in_half(twin, config.data, Path(scratch) / "twin")
        told = PlainTwin(twin.recipe, metrics_of(twin)) if twin else None
        entry = release_of(info, WheelFile(info.weights), config.hours, told)
        stored = add_release(entry, replaces=config.replace, manifest=config.manifest)
    print(f'{config.manifest} has {stored.name}: timm.create_model("{stored.name}", pretrained=True)')


def in_half(info: ExportInfo, data: str, folder: Path) -> ExportInfo:
    """Export `info` once more to `folder`, its weights rounded to float16 and its figures measured on those.

    Raises:
        ValueError, OSError: the images cannot be used, or are others than the export's.
    """
    evaluation = info.metrics["evaluation"]
    columns = {name: info.recipe["data"][name] for name in ("image_column", "label_column")}
    if evaluation.get("held_out"):
        raise ValueError(f"{info.name} was measured on held-out images of its training; only a split can be read again")
    source = open_source(data, evaluation["split"], **columns)
    model = load_model(f"local-dir:{info.folder}")
    source = number_classes(info.name, model, source)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.half())
    spec = ImageSpec.from_model(model).matching(AUGMENTS[info.recipe["data"]["augment"]])
    device = PartialState().device
    result = evaluate(model.to(device), eval_loader(source, spec, 256), device=device)
    record = evaluation_record(model, result, source, spec)
    settings = record["evaluation"] | {"held_out": 0, "precision": "no", "stored_as": "float16"}
    return export(
        model.cpu(),
        folder,
        architecture=info.architecture,
        tag=info.tag,
        recipe=info.recipe,
        metrics={**info.metrics, **record, "evaluation": settings},
        label_names=info.config["label_names"],
        data_config=asdict(spec),
        environment=info.environment or None,
        curves=info.folder / CURVES if CURVES in info.sha256 else None,
        half=True,
        temperature=info.temperature,
    )


def no_twin(info: ExportInfo, twin: ExportInfo) -> str:
    """Why `twin` is not the plain twin of `info`, in words; empty where it is."""
    name = plain_twin_name(info.name)
    if name is None:
        return "that is plain itself"
    if twin.name != name:
        return f"it is {twin.name}, and that would be {name}"
    changed = unequal_settings(*(Twin(each.name, each.recipe, each.metrics) for each in (info, twin)))
    return f"they differ in {', '.join(changed)}" if changed else ""


def release_of(
    info: ExportInfo, file: WheelFile | HubFile, hours: float | None = None, plain_twin: PlainTwin | None = None
) -> Release:
    """The manifest entry of an export.

    Args:
        info: the export.
        file: where its weights lie.
        hours: wall-clock hours of training, where `environment.json` does not say.
        plain_twin: what is known of its plain twin, where that is not released.

    Raises:
        ValueError: a figure is missing or cannot be.
    """
    hours = hours or info.environment.get("hours")
    if not hours:
        raise ValueError(f"{info.folder}: {ENVIRONMENT} does not say how long the training took; pass --hours")
    preprocessing = info.config["pretrained_cfg"]
    label_names = tuple(info.config["label_names"])
    return Release(
        architecture=info.architecture,
        tag=info.tag,
        file=file,
        size=info.weights.stat().st_size,
        sha256=info.sha256[WEIGHTS],
        input=ImageSpec(**{each.name: preprocessing[each.name] for each in fields(ImageSpec)}),
        label_set=_label_set(label_names, _hub_id(info) or info.tag),
        label_names=label_names,
        license=preprocessing["license"],
        recipe=info.recipe,
        metrics=metrics_of(info),
        temperature=info.temperature,
        training=Training(
            epochs=info.metrics.get("trained_epochs", info.recipe["optim"]["epochs"]),
            hours=hours,
            seed=info.recipe["run"]["seed"],
            hardware=info.environment.get("hardware", ""),
        ),
        plain_twin=plain_twin,
    )


def metrics_of(info: ExportInfo) -> Metrics:
    """The figures of an export as the manifest has them."""
    evaluation = info.metrics["evaluation"]
    return Metrics(
        dataset=_hub_id(info) or evaluation["data"],
        split=evaluation["split"],
        result=replace(EvalResult.from_json(info.metrics), seconds=None),
        evaluation={
            **{name: info.metrics[name] for name in ("weights", "weights_epoch") if name in info.metrics},
            **{name: value for name, value in evaluation.items() if name not in TOLD_ELSEWHERE},
        },
    )


def _hub_id(info: ExportInfo) -> str | None:
    """Of the data set, where that is known."""
    return find_dataset(info.recipe["data"]["source"], len(info.config["label_names"])).hub_id


def _label_set(label_names: tuple[str, ...], data: str) -> str:
    """What the manifest calls these class names already, else a plain form of the data set's name."""
    known = (entry.label_set for entry in releases() if entry.label_names == label_names)
    return next(known, re.sub(r"[^a-z0-9]+", "_", data.split("/")[-1].lower()))


if __name__ == "__main__":
    run_cli(main, ReleaseConfig)
