"""From a trained model to a folder that any timm program can load: written whole or not at all, checked by hash.

An export holds `model.safetensors`, timm's `config.json`, `recipe.json`, `metrics.json`, `README.md` (the card),
`environment.json` and `curves.png` when given, and `SHA256SUMS` over them all. It never holds a pickle.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.models._hub import save_config_for_hf
from timm.utils.model import unwrap_model
from torch import Tensor, nn

from ._version import __version__
from .atomic import replacing_folder, save_tensors
from .cli import run_cli
from .evaluation import EvalResult, model_cost
from .export_record import (
    AGAIN,
    CARD,
    CONFIG,
    METRICS,
    SIGNATURE,
    SUMS,
    WEIGHTS,
    ExportInfo,
    verify_export,
    write_sums,
)
from .json_files import read_json
from .known_data import data_tag, portable, portable_recipe, portable_source
from .loading import size_arguments
from .model_card import LICENSE, CardInfo, Twin, render_card
from .models import tffd_imagenet
from .ranges import POSITIVE
from .run_record import CURVES, DATA, ENVIRONMENT, EXPORT, METRICS_LINES, RECIPE, RunRecord, RunWeights, weights_file
from .run_record import MEND as MEND_OF_RUN
from .tasks import method_tag

NOT_TIMMS_WEIGHTS = dict.fromkeys(("origin_url", "paper_name", "paper_ids", "description", "notes"))
"""What an architecture's config says of the weights that timm has for it, and not of ours."""
MEND = "make it with timm.create_model, and give what was changed afterwards as arguments there"


def export(
    model: nn.Module,
    folder: Path | str,
    *,
    architecture: str,
    tag: str,
    recipe: Mapping[str, Any],
    metrics: Mapping[str, Any],
    label_names: Sequence[str],
    data_config: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
    curves: Path | str | None = None,
    twin: Twin | None = None,
    half: bool = False,
    temperature: float | None = None,
) -> ExportInfo:
    """Write `model` to `folder` as timm loads it: `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    The folder is written aside, loaded again, compared with `model` tensor by tensor, and only then takes the place of
    an export that was there before; on any failure, a full disk included, that one stays as it was.

    Args:
        model: made by `timm.create_model`, which records the constructor arguments that `config.json` repeats;
            wrappers of DDP and `torch.compile` are taken off.
        folder: where to; absent, empty, or an earlier export.
        architecture: registered name. Where it stands for an architecture of timm's own (`tffd_resnet18`),
            `config.json` names timm's, so that loading needs no import of this package.
        tag: what was trained, `c100` for Tf-FD on CIFAR-100.
        recipe: the resolved recipe of the run, as `Recipe.to_dict` gives it. Here and in `metrics` and `environment`,
            local paths are cut down to their last part: an export is made to be published, and the same wherever it was
            made.
        metrics: figures of these weights, ready for JSON: those of `EvalResult.to_json`, `params`, `macs`, and
            `evaluation` with the settings that they were measured at (`data`, `split`, ...), as `evaluation_record`
            gives them; where known, which `weights` of the run they are, the
            epoch that those are from (`weights_epoch`), and the run's length (`trained_epochs`).
        label_names: one per class, in the order of the logits.
        data_config: preprocessing for evaluation in timm's words (input_size, mean, std, interpolation, crop_pct,
            crop_mode); what is absent comes from the model's own config.
        environment: versions and hardware of the run.
        curves: picture of the run, PNG.
        twin: the plain run that the card compares with.
        half: store the weights in float16, which has to hold them exactly: round them before measuring `metrics`.
        temperature: what predictions divide the logits by, fitted on images that training did not see.

    Raises:
        ValueError: the names do not fit the classes, a figure is missing, a weight is not finite, or `folder` holds
            something else.
    """
    folder = Path(folder)
    model = unwrap_model(model)
    _check_replaceable(folder)
    if not re.fullmatch(r"[a-z0-9_]+", tag):
        raise ValueError(f"tag {tag!r} cannot be released: small letters, digits and '_', such as ce_c100")
    if len(label_names) != model.num_classes:
        raise ValueError(
            f"{len(label_names)} label names for a model of {model.num_classes} classes; give one for each"
        )
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature {temperature} is not positive; 1 leaves the logits as they are")
    EvalResult.from_json(metrics)  # refuses what is missing
    if missing := {"params", "macs", "evaluation"} - metrics.keys():
        raise ValueError(f"metrics lack {', '.join(sorted(missing))}; take them from evaluation_record")
    tensors = model.state_dict()
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"weight {name!r} is not finite, so there is nothing worth exporting; use earlier weights")

    stored = {name: t.half() if half and t.is_floating_point() else t for name, t in tensors.items()}
    evaluation = metrics["evaluation"]
    revision = evaluation.get("revision")
    if "data" in evaluation:
        evaluation = {**evaluation, "data": portable_source(evaluation["data"], revision)}
    recipe = portable_recipe(recipe, revision)
    metrics, environment = portable({**metrics, "evaluation": evaluation}), portable(environment)
    recipe_json = _to_json(recipe)
    timms_own = architecture in tffd_imagenet.ARCHITECTURES
    provenance = {
        "architecture": architecture,
        "tag": tag,
        "recipe_sha256": hashlib.sha256(recipe_json.encode()).hexdigest(),
        "tffd_zoo_version": __version__,
    }
    with replacing_folder(folder) as aside:
        save_tensors(stored, aside / WEIGHTS, **provenance)
        save_config_for_hf(
            model,
            str(aside / CONFIG),
            model_config={
                "label_names": list(label_names),
                "tffd_zoo": provenance if temperature is None else {**provenance, "temperature": temperature},
                "pretrained_cfg": {
                    **NOT_TIMMS_WEIGHTS,
                    "architecture": architecture.removeprefix("tffd_") if timms_own else architecture,
                    "tag": tag,
                    "license": LICENSE,
                },
            },
            data_config=dict(data_config) if data_config else None,
        )
        # transformers passes the number of classes itself and stops where it finds it twice; timm reads it at the root.
        config = read_json(aside / CONFIG, AGAIN)
        config.get("model_args", {}).pop("num_classes", None)
        (aside / CONFIG).write_text(_to_json(config))
        (aside / RECIPE).write_text(recipe_json)
        (aside / METRICS).write_text(_to_json(metrics))
        if environment is not None:
            (aside / ENVIRONMENT).write_text(_to_json(environment))
        if curves is not None:
            shutil.copyfile(curves, aside / CURVES)
        _write_card(aside, twin=twin)
        _check_reload(aside, tensors)
    return verify_export(folder)


def export_run(
    run: Path | str,
    weights: RunWeights = "last",
    folder: Path | str | None = None,
    temperature: float | None = None,
) -> ExportInfo:
    """Export the weights of a training run, with the figures that it recorded for them.

    Args:
        run: folder of the run.
        weights: those of the last epoch or of the best evaluation, or their moving averages.
        folder: where to; `RUN/export` when not given.
        temperature: as :func:`export` takes it.

    Raises:
        FileNotFoundError: `run` is no run, or has no such weights (yet).
        ValueError: the weights are not those of the recipe's model.
    """
    run = Path(run)
    record = RunRecord.read(run)
    recipe, data = record.recipe, record.data
    if missing := {"spec", "label_names"} - data.keys():
        raise ValueError(f"{run / DATA} is damaged (it lacks {', '.join(sorted(missing))}); {MEND_OF_RUN}")
    file = weights_file(run, weights)
    if not (record.evaluations and file.is_file()):
        lacks = file.relative_to(run) if record.evaluations else "finished epoch"
        raise FileNotFoundError(f"{run} is not a run that can be exported: it has no {lacks}")
    line = record.evaluation(weights)
    prefix = "ema_" if weights.endswith("_ema") else ""
    environment = {**record.environment, **({"hours": line["hours"]} if "hours" in line else {})}

    with torch.random.fork_rng(devices=[]):
        size = size_arguments(recipe["model"], recipe["data"].get("image_size"))
        model = timm.create_model(recipe["model"], num_classes=len(data["label_names"]), **size)
    try:
        with safe_open(file, framework="pt") as weights_of_step:
            step = (weights_of_step.metadata() or {}).get("step", str(line["step"]))
        if step != str(line["step"]):
            raise ValueError(
                f"{file} holds the weights of step {step}, and the figures recorded for them are of step "
                f"{line['step']}; the command of the run, given again, brings them together"
            )
        model.load_state_dict(load_file(file))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{file} does not hold the weights of {recipe['model']}: {_one_line(error)}") from error
    params, macs = model_cost(model, data["spec"]["input_size"])
    metrics = {
        **_result_of(line, prefix, run).to_json(),
        "params": params,
        "macs": macs,
        "weights": weights,
        "weights_epoch": line["epoch"],
        "trained_epochs": record.epochs_done,
        "evaluation": {
            "data": data["source"],
            "revision": data["revision"],
            **{key: data["eval"][key] for key in ("split", "fingerprint", "classes") if key in data["eval"]},
            "model_classes": len(data["label_names"]),
            "held_out": recipe["data"]["holdout"],
            **{key: recipe["data"][key] for key in ("image_column", "label_column")},
            **data["spec"],
            "precision": recipe["run"]["precision"],
            "device": environment["device"],
            **{key: environment["packages"][key] for key in ("torch", "timm")},
        },
    }
    curves = run / CURVES
    return export(
        model,
        folder or run / EXPORT,
        architecture=model.pretrained_cfg["architecture"],
        tag=_tag_of_run(recipe, data),
        recipe=recipe,
        metrics=metrics,
        label_names=data["label_names"],
        data_config=data["spec"],
        environment=environment,
        curves=curves if curves.exists() else None,
        temperature=temperature,
    )


def rewrite_card(folder: Path | str, *, twin: Twin | None = None, repo: str | None = None) -> ExportInfo:
    """Write the card of an export anew, now that its plain twin or its place on the Hub is known."""
    verify_export(folder)
    with replacing_folder(folder) as aside:
        shutil.copytree(folder, aside, dirs_exist_ok=True)
        (aside / SIGNATURE).unlink(missing_ok=True)  # it is of the old card
        _write_card(aside, twin=twin, repo=repo)
    return verify_export(folder)


def _write_card(folder: Path, *, twin: Twin | None = None, repo: str | None = None) -> None:
    """Write the card from the records in `folder`, and the sums that cover it."""
    config = read_json(folder / CONFIG, AGAIN)
    card = render_card(
        CardInfo(
            architecture=config["tffd_zoo"]["architecture"],
            tag=config["tffd_zoo"]["tag"],
            config=config,
            recipe=read_json(folder / RECIPE, AGAIN),
            metrics=read_json(folder / METRICS, AGAIN),
            environment=read_json(folder / ENVIRONMENT, AGAIN) if (folder / ENVIRONMENT).exists() else None,
            has_curves=(folder / CURVES).exists(),
            twin=twin,
            repo=repo,
        )
    )
    (folder / CARD).write_text(card)
    write_sums(folder)


def _result_of(line: Mapping[str, Any], prefix: str, run: Path) -> EvalResult:
    try:
        return EvalResult.from_json(line, prefix)
    except ValueError as error:
        raise ValueError(f"{run / METRICS_LINES}: {error}") from error


def _tag_of_run(recipe: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    """What taught it and what it was trained on."""
    trained_on = data_tag(portable_source(data["source"], data["revision"]), len(data["label_names"]))
    return "_".join(filter(None, [method_tag(recipe), trained_on]))


def _to_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def _check_replaceable(folder: Path) -> None:
    """Refuse a place that holds anything but an earlier export: replacing it would lose what is there."""
    if folder.is_dir() and ((folder / SUMS).is_file() or not any(folder.iterdir())):
        return
    if folder.exists():
        raise ValueError(f"{folder} exists and is no export; name another folder or move it away")


def _check_reload(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Load `folder` through timm and compare it with what went in, bit by bit."""
    try:
        with torch.random.fork_rng(devices=[]):  # a run may export on its way; building a model draws random numbers
            loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).state_dict()
        same = all(torch.equal(loaded[name], tensor.cpu()) for name, tensor in tensors.items())
    except (RuntimeError, KeyError) as error:  # another architecture, or other arguments: shapes and names do not fit
        raise ValueError(f"timm does not rebuild this model from its config ({_one_line(error)}); {MEND}") from error
    if not same:
        raise ValueError(f"timm rebuilds this model with other weights; {MEND}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@dataclass(frozen=True)
class ExportConfig:
    """Export the weights of a training run to a folder that timm loads."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    weights: RunWeights = "last"
    """Weights of the last epoch or of the best evaluation, or their moving averages."""
    out: Path | None = None
    """Where to; RUN/export when not given. An earlier export there is replaced."""
    temperature: Annotated[float | None, POSITIVE] = None
    """What predictions divide the logits by: what `eval local-dir:RUN/export --suite calibration` fitted on training
    images that the recipe held out."""


def main(config: ExportConfig) -> None:
    """Export what `config` names and say how to load it."""
    info = export_run(config.run, config.weights, config.out, config.temperature)
    print(f"{info.name}, top-1 {info.metrics['top1']:.2f} %\nload it: {info.loading_line}")


if __name__ == "__main__":
    run_cli(main, ExportConfig)
