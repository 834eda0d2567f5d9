"""The card of one set of weights, made from what its run recorded: recipe, metrics and those of its plain twin.

Every figure and every claim in a card comes from those records; a card claims nothing that they do not show.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from .data.splits import same_split
from .evaluation import FIGURES
from .known_data import Dataset, find_dataset
from .markdown import bullets, code, escaped, markdown_table
from .models import Release, plain_twin_name
from .tasks import METHODS

LICENSE = "apache-2.0"
CITATION = """\
@inproceedings{li2022tffd,
  title     = {Self-Regulated Feature Learning via Teacher-free Feature Distillation},
  author    = {Li, Lujun},
  booktitle = {European Conference on Computer Vision (ECCV)},
  year      = {2022},
  doi       = {10.1007/978-3-031-19809-0_20}
}"""


CHOSEN_ON_ITS_TEST = "The best epoch was chosen on the very images that the figures are from, which flatters them."


@dataclass(frozen=True)
class Twin:
    """A run to compare with: the same without Tf-FD."""

    name: str
    recipe: Mapping[str, Any]
    metrics: Mapping[str, Any]
    released: bool = True


@dataclass(frozen=True)
class CardInfo:
    """What a release card is made from."""

    architecture: str
    tag: str
    config: Mapping[str, Any]
    """timm's `config.json`."""
    recipe: Mapping[str, Any]
    metrics: Mapping[str, Any]
    environment: Mapping[str, Any] | None = None
    """Versions and hardware of the run."""
    has_curves: bool = False
    """`curves.png` lies beside the card."""
    twin: Twin | None = None
    repo: str | None = None
    """`org/name` on the Hub, with `@revision` if it is pinned; None before it is published."""

    @property
    def name(self) -> str:
        return f"{self.architecture}.{self.tag}"

    @property
    def dataset(self) -> Dataset:
        return find_dataset(self.recipe["data"]["source"], self.config["num_classes"])

    @property
    def data_name(self) -> str:
        """What the card calls the data set."""
        return escaped(self.dataset.name)

    @property
    def timms_own(self) -> bool:
        """timm builds it without this package."""
        return not self.config["architecture"].startswith("tffd_")


def render_card(info: CardInfo) -> str:
    """Return the card of one release: front matter that the Hub accepts, then Markdown."""
    sections = [
        f"---\n{_front_matter(info)}\n---\n\n# {info.name}",
        _summary(info),
        "## Load it\n\n" + _loading(info),
        "## Results\n\n" + _results(info),
        *(["## Curves\n\n![Loss and accuracy over the epochs](curves.png)"] if info.has_curves else []),
        "## How it was trained\n\n" + _training(info),
        "## How it was evaluated\n\n" + _evaluation(info),
        "## What was not shown\n\n" + _limits(info),
        "## Licence and citation\n\n" + _licence(info),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(info: CardInfo) -> str:
    dataset, metrics = info.dataset, info.metrics
    results = [
        EvalResult(
            task_type="image-classification",
            task_name="Image classification",
            dataset_type=dataset.hub_id or info.tag.rpartition("_")[2],  # the Hub takes an id here, and no prose
            dataset_name=dataset.name,
            dataset_split=metrics["evaluation"].get("split"),
            dataset_revision=metrics["evaluation"].get("revision"),
            metric_type=figure.hub_metric,
            metric_name=f"{figure.title} {figure.hub_metric} ({figure.unit})",
            metric_value=round(metrics[name], 4),
        )
        for name, figure in FIGURES.items()
        if figure.hub_metric and name in metrics
    ]
    data = ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        license=LICENSE,
        datasets=[dataset.hub_id] if dataset.hub_id else None,
        metrics=["accuracy"],
        tags=[
            "image-classification",
            "timm",
            *(["tf-fd", "knowledge-distillation"] if info.recipe.get("tffd") else []),
        ],
        model_name=info.name,
        eval_results=results,
    )
    return data.to_yaml()


def _summary(info: CardInfo) -> str:
    metrics = info.metrics
    height, width = info.config["pretrained_cfg"]["input_size"][-2:]
    return (
        f"`{info.architecture}` ({metrics['params'] / 1e6:.2f} M parameters, {metrics['macs'] / 1e6:,.1f} M "
        f"multiply-adds at {height} x {width} pixels), trained on {info.data_name} {_method(info.recipe)}. "
        f"Top-1 {metrics['top1']:.2f} %: {metrics['correct1']:,} of {metrics['images']:,} images."
    )


def _method(recipe: Mapping[str, Any]) -> str:
    """Say in words what taught the model beside the labels."""
    parts = [method.describe(recipe[section]) for section, method in METHODS.items() if recipe.get(section)]
    return f"with {' and '.join(parts)}" if parts else "with cross-entropy alone"


def short_method(recipe: Mapping[str, Any]) -> str:
    """Name what taught the model beside the labels."""
    return " + ".join(method.label for section, method in METHODS.items() if recipe.get(section)) or "cross-entropy"


def _loading(info: CardInfo) -> str:
    source = f"hf-hub:{info.repo}" if info.repo else "local-dir:FOLDER"
    lines = [
        "import timm",
        *([] if info.timms_own else ["import tffd_zoo  # registers the architecture with timm"]),
        "from PIL import Image",
        "",
        f'model = timm.create_model("{source}", pretrained=True).eval()',
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
        'logits = model(transform(Image.open("image.png").convert("RGB"))[None])',
        'print(model.pretrained_cfg["label_names"][logits.argmax().item()])',
    ]
    timm_alone = f"This is timm's own `{info.config['architecture']}`; nothing but timm is needed.\n\n"
    note = timm_alone if info.timms_own else ""
    name = f'"{info.repo.partition("@")[0]}"' if info.repo else '"FOLDER"'
    transformers = f'`transformers.pipeline("image-classification", model={name})` loads it too'
    if not info.timms_own:
        transformers += (
            ", once `tffd_zoo` is imported: without that, as in the snippet that the Hub offers, timm says `Unknown "
            "model` and transformers asks for a newer timm, which would not help. Programs that do not import it run "
            "as `python -m tffd_zoo PROGRAM [ARGS]`"
        )
    check = f"`hf cache verify {info.repo}`" if info.repo else "`sha256sum -c SHA256SUMS`"
    hashes = f"timm compares no hashes here: {check} does, and `python -m tffd_zoo.eval` goes by `SHA256SUMS`."
    return note + "```python\n" + "\n".join(lines) + f"\n```\n\n{transformers}. {hashes}"


def _results(info: CardInfo) -> str:
    header = ["weights", *(figure.heading for figure in FIGURES.values()), "epochs", "seed"]
    rows = [_result_row(info.name, info.recipe, info.metrics)]
    remark = ""
    if info.twin is not None:
        rows.append(_result_row(info.twin.name, info.twin.recipe, info.twin.metrics))
        remark = "These weights are " + comparison(Twin(info.name, info.recipe, info.metrics), info.twin)
    elif info.recipe.get("tffd"):
        remark = "There is no plain twin of this run (same recipe without Tf-FD), so no gain by Tf-FD is claimed."
    return f"{markdown_table(header, rows)}\n\n{remark}".rstrip()


def known_twin(name: str, recipe: Mapping[str, Any], released: Sequence[Release]) -> Twin | None:
    """The plain twin of the run that is called `name`: as it is released, or told by the entry of this very run."""
    twin = plain_twin_name(name)
    by_name = {release.name: release for release in released}
    if twin in by_name:
        return Twin(twin, by_name[twin].recipe, by_name[twin].metrics.to_json())
    told = by_name[name].plain_twin if name in by_name and by_name[name].recipe == recipe else None
    return Twin(twin, told.recipe, told.metrics.to_json(), released=False) if twin and told else None


def comparison(run: Twin, twin: Twin) -> str:
    """Say how a run stands to its twin, and what one pair of runs cannot tell."""
    difference = round(run.metrics["top1"] - twin.metrics["top1"], 2)
    above = f"{abs(difference):.2f} points of top-1 {'above' if difference > 0 else 'below'}"
    stands = above if difference else "level in top-1 with"
    which = f"`{twin.name}`" if twin.released else f"`{twin.name}`, which is not released"
    verdict = (
        f"{stands} {which}. That is one run against one run: how much the seed alone moves the figure was not "
        "measured here, so the difference says nothing about significance."
    )
    changed = unequal_settings(run, twin)
    if changed:
        verdict += f" The two runs also differ in {', '.join(changed)}, so it is not the effect of one change."
    return verdict


def _result_row(name: str, recipe: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[str]:
    return [
        f"`{name}`",
        *figures_shown(metrics),
        f"{_trained_epochs(recipe, metrics):g}",
        str(recipe["run"]["seed"]),
    ]


def figures_shown(values: Mapping[str, Any]) -> list[str]:
    """Every figure as text."""
    return [figure.shown(values.get(name)) for name, figure in FIGURES.items()]


def _trained_epochs(recipe: Mapping[str, Any], metrics: Mapping[str, Any]) -> float:
    """Length of the run, which may have been cut short of what its recipe says."""
    return metrics.get("trained_epochs", recipe["optim"]["epochs"])


def unequal_settings(run: Twin, twin: Twin) -> list[str]:
    """Name the settings of data, optimisation and seed in which two runs differ, and whether their weights do."""
    operational = {"source", "workers", "in_memory"}
    changed = [
        key
        for section in ("data", "optim")
        for key in sorted({*run.recipe[section], *twin.recipe[section]} - operational)
        if run.recipe[section].get(key) != twin.recipe[section].get(key)
    ]
    if run.recipe["run"]["seed"] != twin.recipe["run"]["seed"]:
        changed.append("seed")
    weights = [which_weights(each.metrics) for each in (run, twin)]
    if weights[0] != weights[1]:
        changed.append(f"weights ({' and '.join(weights)})")
    return changed


def _training(info: CardInfo) -> str:
    optim, data, run = info.recipe["optim"], info.recipe["data"], info.recipe["run"]
    environment = info.environment or {}
    batch = f"batch {optim['batch_size']}"
    if environment.get("processes", 1) > 1:
        batch += f" on each of {environment['processes']} processes"
    if optim["accumulate"] > 1:
        batch += f", {optim['accumulate']} batches per step"
    schedule = optim["sched"]
    if schedule == "multistep":
        milestones = ", ".join(f"{fraction * optim['epochs']:g}" for fraction in optim["milestones"])
        schedule += f", x{optim['decay_rate']:g} at epochs {milestones}"
    augmentation = [code(data[field]) for field in ("augment", "auto_augment") if data.get(field)]
    augmentation += [f"{name} {optim[name]:g}" for name in ("mixup", "cutmix") if optim.get(name)]
    trained = _trained_epochs(info.recipe, info.metrics)
    cut_short = "" if trained == optim["epochs"] else f" (stopped after {trained:.3g})"
    lines = [
        *([f"started from the weights of {code(info.recipe['model'])}"] if info.recipe.get("pretrained") else []),
        f"recipe {code(info.recipe['name'])}: {optim['epochs']} epochs{cut_short}, {batch}",
        f"optimizer {escaped(optim['opt'])}, learning rate {optim['lr']:g} ({schedule}), "
        f"weight decay {optim['weight_decay']:g}, label smoothing {optim['label_smoothing']:g}",
        f"augmentation {', '.join(augmentation)}; split {code(data['train_split'])} of {info.data_name}",
        f"seed {run['seed']}, one run; precision {run['precision'] if run['precision'] != 'no' else 'float32'}",
    ]
    if environment.get("hardware"):
        hours = environment.get("hours")
        took = f", {hours:.2g} hours (wall-clock, with whatever else ran there)" if hours else ""
        lines.append(f"hardware: {escaped(environment['hardware'])}{took}")
    if environment.get("packages"):
        lines.append("versions: " + ", ".join(f"{name} {version}" for name, version in environment["packages"].items()))
    return bullets(lines) + "\n\n`recipe.json` holds every setting."


def _evaluation(info: CardInfo) -> str:
    evaluation, metrics = info.metrics["evaluation"], info.metrics
    preprocessing = info.config["pretrained_cfg"]
    height, width = preprocessing["input_size"][-2:]
    held_out = bool(evaluation.get("held_out"))
    classes, of = evaluation.get("classes"), evaluation.get("model_classes")
    some = f" of {classes} of its {of} classes" if classes and classes != of else ""
    images = (
        f"{metrics['images']:,} images{some}{' held out of' if held_out else ','} split {code(evaluation['split'])}"
    )
    lines = [
        f"{images} of {info.data_name}, each once",
        f"{height} x {width} pixels, {preprocessing['interpolation']} resizing, crop {preprocessing['crop_pct']:g} "
        f"({preprocessing['crop_mode']})",
        *(f"{figure.title}: {figure.meaning} ({figure.better} is better)" for figure in FIGURES.values()),
    ]
    if "weights" in metrics:
        which, _, ema = metrics["weights"].partition("_")
        average = "moving average of the " if ema else ""
        chosen = ", chosen by top-1" if which == "best" else ""
        lines.append(f"{average}weights of the {which} epoch ({_weights_epoch(metrics):g}){chosen}")
    if held_out:
        return bullets(lines)
    source = f"hf-hub:{info.repo}" if info.repo else "local-dir:FOLDER"
    data = info.dataset.hub_id or info.recipe["data"]["source"]
    command = ["python", "-m", "tffd_zoo.eval", source, "--data", data, "--split", evaluation["split"]]
    return f"{bullets(lines)}\n\nRepeat it: {code(shlex.join(command))}"


def which_weights(metrics: Mapping[str, Any]) -> str:
    """Those of its run that figures are of, from an export's metrics or those of a manifest's entry."""
    return metrics.get("weights") or metrics.get("evaluation", {}).get("weights", "last")


def _weights_epoch(metrics: Mapping[str, Any]) -> float:
    """The epoch that the weights are from; exports of version 0.1 call it `epoch`."""
    return metrics["weights_epoch"] if "weights_epoch" in metrics else metrics["epoch"]


def _limits(info: CardInfo) -> str:
    evaluation = {**info.metrics["evaluation"], "weights": which_weights(info.metrics)}
    lines = ["One run with one seed: no mean, no spread, no significance."]
    if chosen_on_its_test(info.recipe, evaluation["split"], evaluation):
        lines.append(CHOSEN_ON_ITS_TEST)
    trained, usual = _trained_epochs(info.recipe, info.metrics), info.dataset.usual_epochs
    if usual and trained < usual:
        lines.append(
            f"What a full schedule gives: this was a run of {trained:.3g} epochs, where the literature's figures on "
            f"{info.data_name} are mostly from {usual}, and they are not to be compared."
        )
    if _trained_on_its_test(info):
        lines.append("The figures are from images that it was trained on: they say nothing about new ones.")
    lines += [
        f"Nothing outside {info.data_name}: no other images, no shift, no corruption, no transfer to other tasks.",
        "No check of how errors fall on groups of people or kinds of images.",
    ]
    return bullets(lines)


def chosen_on_its_test(recipe: Mapping[str, Any], split: str, evaluation: Mapping[str, Any]) -> bool:
    """Whether the figures are from the images by which the epoch was chosen."""
    data = recipe["data"]
    chosen_on = data["train_split"] if data["holdout"] else data["eval_split"] or split
    return (
        evaluation.get("weights", "last").startswith("best")
        and same_split(split, chosen_on)
        and evaluation.get("held_out", 0) == data["holdout"]
    )


def _trained_on_its_test(info: CardInfo) -> bool:
    """Whether the figures are from the images of the training."""
    evaluation = info.metrics["evaluation"]
    return same_split(evaluation["split"], info.recipe["data"]["train_split"]) and not evaluation.get("held_out", 0)


def _licence(info: CardInfo) -> str:
    return (
        f"The weights are released under {LICENSE}; {info.data_name} has terms of its own. The method is Li's:\n\n"
        f"```bibtex\n{CITATION}\n```"
    )
