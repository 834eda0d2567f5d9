"""Build the zoo's page: a folder of plain files, also a Hub Space of kind `static`.

    python -m hub.build_site --to build/site
    python -m http.server --directory build/site --bind 127.0.0.1

Everything on it comes from the manifest, the records of runs and the weights. What is slow (deploying the students,
their confusion and their maps) is kept in a cache beside, by the hash of the weights, so that a new release costs
itself alone. It needs npm, once, for the runtime that classifies in the browser.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from recipes.studies.report.records import read_records
from recipes.studies.report.statistics import estimate, paired_differences
from tffd_zoo.atomic import replacing_folder
from tffd_zoo.cli import run_cli
from tffd_zoo.data import ImageSource, ImageSpec, eval_loader, open_source
from tffd_zoo.deploy import RECORD, deploy
from tffd_zoo.evaluation import CALIBRATION_BINS, confidence_and_success, eval_mode, model_cost
from tffd_zoo.inspect import InspectConfig, StageView, look_inside, mosaic
from tffd_zoo.json_files import read_json, write_json
from tffd_zoo.loading import load_model, number_classes
from tffd_zoo.model_card import Twin, known_twin
from tffd_zoo.models import Release, releases
from tffd_zoo.ranges import COUNT
from tffd_zoo.run_record import RunRecord

ROOT = Path(__file__).resolve().parents[1]
SOURCE = Path(__file__).with_name("site")
PAGES = ("index.html", "style.css", "page.js", "charts.js", "classify.js", "README.md")
RUNTIME = ("ort.wasm.min.js", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
"""What onnxruntime-web needs on a CPU."""
STUDENT = "classifier_quantized.onnx"
"""What classifies in the browser: preprocessing, the int8 student, softmax."""
FIGURES = "figures.json"
SAMPLES = 8
SAMPLE_SIDE = 96
MAP_IMAGES = 256
METHODS = {"ce_": "cross-entropy", "kd_": "Tf-FD+"}
"""By the prefix of the tag; without one it is Tf-FD."""
MEND = "remove it and build again"


@dataclass(frozen=True)
class SiteConfig:
    """Build the zoo's page from the manifest, the records of runs and the weights."""

    models: tyro.conf.Positional[tuple[str, ...]] = ()
    """Releases to show (tffd_resnet20.c100); all of them when none is named."""
    to: Path = Path("build/site")
    """Where the page goes; absent, empty, or an earlier page."""
    data: str | None = None
    """Images to measure on: a Hub id or a folder; what each release's own figures are from when not given."""
    records: Path = ROOT / "recipes" / "results" / "records"
    """Records of runs: curves, and gains over several seeds."""
    cache: Path = Path("build/site-cache")
    """Where what is slow is kept."""
    timings: Annotated[int, COUNT] = 100
    """Latencies are medians of so many runs on one image."""


def main(config: SiteConfig) -> None:
    """Build the page that `config` asks for.

    Raises:
        ValueError, OSError: a release, the data or npm cannot be used; an earlier page stays as it was.
    """
    known = {release.name: release for release in releases()}
    if unknown := set(config.models) - known.keys():
        raise ValueError(f"there is no release {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    chosen = [release for release in known.values() if not config.models or release.name in config.models]
    if config.to.exists() and any(config.to.iterdir()) and not (config.to / "zoo.js").exists():
        raise ValueError(f"{config.to} holds something else than a page; name another folder or move it away")
    runtime = runtime_files()
    students = [_Student(each, known_twin(each.name, each.recipe, [*known.values()]), config) for each in chosen]
    for student in students:
        student.measure()
    with replacing_folder(config.to) as aside:
        for page in PAGES:
            shutil.copyfile(SOURCE / page, aside / page)
        (aside / "runtime").mkdir()
        for file in runtime:
            shutil.copyfile(file, aside / "runtime" / file.name)
        zoo = {"students": [student.publish(aside) for student in students]}
        write_script(aside / "zoo.js", "ZOO", zoo)
        write_worker(aside)
    print(f"{config.to}: {len(students)} students; serve it with python -m http.server --directory {config.to}")


# --- a student --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Student:
    """One release, and what the page says of it."""

    release: Release
    twin: Twin | None
    """The plain run of the same recipe."""
    config: SiteConfig

    @property
    def cache(self) -> Path:
        return self.config.cache / f"{self.release.name}-{self.release.sha256[:8]}"

    def _open(self, split: str) -> ImageSource:
        evaluation = self.release.metrics.evaluation
        return open_source(
            self.config.data or self.release.metrics.dataset,
            split,
            image_column=evaluation.get("image_column") if self.config.data is None else None,
            label_column=evaluation.get("label_column") if self.config.data is None else None,
        )

    def measure(self) -> None:
        """Deploy and measure, unless the cache has it."""
        if (self.cache / FIGURES).exists():
            return
        test, train = self._open(self.release.metrics.split), self._open(self.release.recipe["data"]["train_split"])
        deployed = self.cache / "deployed"
        if not (deployed / RECORD).exists():
            deploy(self.release.name, test, train, deployed, timings=self.config.timings)
        model = load_model(self.release.name)
        test = number_classes(self.release.name, model, test)
        spec = ImageSpec.from_model(model)
        params, macs = model_cost(model, spec.input_size)
        confusion, bins = predict(model, test, spec)
        twin = self.twin.name if self.twin and self.twin.released else None
        data = self.config.data or self.release.metrics.dataset
        look = look_inside(
            InspectConfig(self.release.name, against=twin, data=data, split=test.split, images=MAP_IMAGES)
        )
        maps = self.cache / "maps"
        shutil.rmtree(maps, ignore_errors=True)
        maps.mkdir()
        save_image(look.image.permute(1, 2, 0), maps / "image.png")
        stages = {}
        for position, (name, views) in enumerate(look.models.items()):
            stages[name] = [draw_stage(view, maps / f"{position}-{stage}") for stage, view in enumerate(views)]
        samples = []
        for number, index in enumerate(sample_indices(test)):
            name = f"sample-{number}.png"
            test.decode(index).save(maps / name)
            samples.append({"file": name, "label": test.label_names[int(test.labels[index])]})
        figures = {
            "params": params,
            "macs": macs,
            "confusion": confusion.flatten().tolist(),
            "order": class_order(confusion).tolist(),
            "calibration": bins.tolist(),
            "stages": stages,
            "samples": samples,
        }
        write_json(self.cache / FIGURES, figures)

    def publish(self, site: Path) -> dict[str, Any]:
        """Copy the student's files to `site` and return what the page's scripts read."""
        figures = read_json(self.cache / FIGURES, MEND)
        deployed = read_json(self.cache / "deployed" / RECORD, MEND)
        folder = site / "students" / self.release.name
        shutil.copytree(self.cache / "maps", folder)
        shutil.copyfile(self.cache / "deployed" / "onnx" / STUDENT, folder / STUDENT)
        files = {file["file"]: file for file in deployed["files"]}
        metrics, training = self.release.metrics, self.release.training
        return {
            **figures,
            "name": self.release.name,
            "architecture": self.release.architecture,
            "method": method(self.release),
            "license": self.release.license,
            "labels": self.release.label_names,
            "pixels": self.release.input.input_size[-1],
            "data": f"{metrics.dataset}, {metrics.split}",
            "images": metrics.result.images,
            **{key: getattr(metrics.result, key) for key in ("top1", "top5", "nll", "ece")},
            **{key: getattr(training, key) for key in ("epochs", "hours", "seed")},
            "bytes": self.release.size,
            "folder": f"students/{self.release.name}",
            "model": f"students/{self.release.name}/{STUDENT}",
            "int8": files[f"onnx/{STUDENT}"],
            "float32": files["onnx/model.onnx"],
            "hardware": deployed["hardware"],
            "twin": self.twin.name if self.twin else None,
            "gain": gain(self.release, self.twin, self.config.records),
            "curve": curve(self.release.recipe, self.config.records),
            "twinCurve": curve(self.twin.recipe, self.config.records) if self.twin else None,
        }


def method(release: Release) -> str:
    """What the weights were trained with."""
    return next((name for prefix, name in METHODS.items() if release.tag.startswith(prefix)), "Tf-FD")


# --- figures ----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def predict(model: torch.nn.Module, source: ImageSource, spec: ImageSpec) -> tuple[Tensor, Tensor]:
    """Images by class and prediction, (C, C), and per bin of confidence images, correct ones and summed confidence."""
    classes = source.num_classes
    counts = torch.zeros(classes * classes, dtype=torch.int64)
    rows = []
    with eval_mode(model):
        for batch in eval_loader(source, spec, 256):
            logits = model(batch.images)
            rows.append(confidence_and_success(logits, batch.targets).double())
            counts += torch.bincount(batch.targets * classes + logits.argmax(dim=1), minlength=len(counts))
    confidence, success = torch.cat(rows).T.contiguous()
    bin_of_image = torch.bucketize(confidence, torch.linspace(0, 1, CALIBRATION_BINS + 1, dtype=torch.float64)[1:-1])
    columns = [torch.ones_like(confidence), success, confidence]
    bins = torch.stack([torch.bincount(bin_of_image, column, CALIBRATION_BINS) for column in columns], dim=1)
    return counts.view(classes, classes), bins


def class_order(confusion: Tensor) -> Tensor:
    """An order in which classes that are taken for each other stand close: that of the Fiedler vector.

    With W the symmetric confusions and D their sums, it is the second eigenvector of I - D^-1/2 W D^-1/2.
    """
    likeness = (confusion + confusion.T).double().fill_diagonal_(0) + 1e-3
    scale = likeness.sum(dim=1).rsqrt()
    laplacian = torch.eye(len(likeness), dtype=torch.float64) - scale[:, None] * likeness * scale
    return (torch.linalg.eigh(laplacian).eigenvectors[:, 1] * scale).argsort()


def runs_of(recipe: Mapping[str, Any], records: Path) -> dict[int, RunRecord]:
    """Finished runs of a recipe, by seed."""

    def same(recorded: Mapping[str, Any]) -> bool:
        told = [(one["name"], one["model"], one["optim"]["epochs"]) for one in (recorded, recipe)]
        return told[0] == told[1]

    return {run.seed: run for run in read_records(records) if run.finished and same(run.recipe)}


def gain(release: Release, twin: Twin | None, records: Path) -> dict[str, Any] | None:
    """Top-1 of the method less that of plain training: paired runs with a 95 % interval, else the one pair."""
    if twin is None:
        return None
    recipes = release.recipe, twin.recipe
    ours, theirs = ({seed: run.last for seed, run in runs_of(recipe, records).items()} for recipe in recipes)
    differences = list(paired_differences(ours, theirs).values())
    if len(differences) < 2:
        return {"mean": release.metrics.result.top1 - twin.metrics["top1"], "pairs": 1, "low": None, "high": None}
    mean = estimate(differences)
    return {"mean": mean.mean, "pairs": mean.n, "low": mean.low, "high": mean.high}


def curve(recipe: Mapping[str, Any], records: Path) -> list[tuple[float, float]] | None:
    """Top-1 by epoch of the very run of a recipe; None where its record was not kept."""
    run = runs_of(recipe, records).get(recipe["run"]["seed"])
    return None if run is None else [(line["epoch"], line["top1"]) for line in run.evaluations]


def sample_indices(source: ImageSource) -> list[int]:
    """Images of different classes, spread over the split."""
    spread = torch.linspace(0, source.num_classes - 1, SAMPLES + 2).long()[1:-1]
    return [int((source.labels == label).nonzero()[0]) for label in spread if (source.labels == label).any()]


# --- pictures ---------------------------------------------------------------------------------------------------------


def draw_stage(view: StageView, stem: Path, most: int = 32) -> dict[str, Any]:
    """Draw the salient and the redundant maps of a stage and return what is said about them."""
    files = {}
    for kind, channels in (("salient", view.salient), ("redundant", view.redundant)):
        tiles = view.maps[channels[:most]].float()
        low, high = tiles.amin((1, 2), keepdim=True), tiles.amax((1, 2), keepdim=True)
        picture = mosaic((tiles - low) / (high - low).clamp_min(1e-12))
        path = stem.with_name(f"{stem.name}-{kind}.png")
        save_image(torch.from_numpy(colormaps["magma"](picture.numpy())), path)  # nan, the gaps, is transparent
        files[kind] = {"file": path.name, "height": picture.shape[0], "width": picture.shape[1]}
    return {
        **files,
        "stage": view.name,
        "channels": len(view.salience),
        "rank": view.effective_rank,
        "likeness": view.likeness,
        "anyLikeness": view.any_likeness,
    }


def save_image(pixels: Tensor, path: Path) -> None:
    """Save (H, W, 3 or 4) values in [0, 1]."""
    Image.fromarray((pixels * 255).round().to(torch.uint8).numpy()).save(path)


# --- files ------------------------------------------------------------------------------------------------------------


def runtime_files() -> list[Path]:
    """The files of onnxruntime-web, installed from the npm registry when they are missing.

    Raises:
        ValueError: there is no npm, or it fails.
    """
    files = [SOURCE / "node_modules" / "onnxruntime-web" / "dist" / name for name in RUNTIME]
    if not all(file.exists() for file in files):
        npm = shutil.which("npm")
        if npm is None:
            raise ValueError("the page needs onnxruntime-web, and npm to install it: install Node.js 20 or newer")
        command = [npm, "ci", "--ignore-scripts", "--omit=dev", "--no-audit", "--no-fund"]
        done = subprocess.run(command, cwd=SOURCE, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"npm cannot install onnxruntime-web: {done.stderr.strip()}")
    return files


def write_script(path: Path, name: str, value: Mapping[str, Any]) -> None:
    """Write JSON as a script, which a page opened from a disk may load too."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    path.write_text(f"const {name} = {text};\n", encoding="utf-8")


def write_worker(site: Path) -> None:
    """Write the service worker that keeps the page for when there is no network; it lists the files and their hash."""
    files = sorted(path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file())
    small = ["./", *(name for name in files if not name.endswith((".onnx", ".wasm", ".md")))]
    constants = {"VERSION": sum_of(site / name for name in files), "FILES": small}
    lines = "".join(f"const {name} = {json.dumps(value)};\n" for name, value in constants.items())
    worker = (SOURCE / "worker.js").read_text(encoding="utf-8")
    (site / "worker.js").write_text(lines + worker, encoding="utf-8")


def sum_of(files: Iterable[Path]) -> str:
    """One short hash over all files."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    run_cli(main, SiteConfig)
