"""Accuracy under common corruptions: on the published arrays, on class folders, or on images made here.

What is made here lies in the layout of the published arrays, in the cache of the Hub's client, and is made once; it is
never called official.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from huggingface_hub import cached_assets_path
from tqdm import tqdm

from ..atomic import replacing_file
from ..data import ImageSource, open_source
from ..data.workers import WorkerPool, default_workers
from .classes import predict_by_class
from .corruptions import KINDS, SEVERITIES, SIZE, Pictures, corrupt, read_frost
from .measurement import Figures, Measurement, Part, Sample, percent
from .setting import Setting, pixels, test_subset
from .subject import Subject

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHUNK = 500
"""Images that a worker corrupts at a time."""
GENERATION = 1
"""Raised when the generated images change: those in the cache are then made again."""


class Corrupted(NamedTuple):
    """A kind at a severity."""

    kind: str
    severity: int

    @property
    def name(self) -> str:
        return f"{self.kind}.{self.severity}"


@dataclass(frozen=True)
class Arrays:
    """Corrupted images in the published layout: `<kind>.npy`, the whole split at severity 1, then at 2, and so on."""

    folder: Path
    split_size: int
    """Images of the split."""
    rows: np.ndarray
    """Which images of the split to use."""

    def read(self, what: Corrupted) -> np.ndarray:
        """(N, H, W, 3) uint8."""
        images = np.load(self.folder / f"{what.kind}.npy", mmap_mode="r")
        return images[(what.severity - 1) * self.split_size + self.rows]

    def available(self) -> tuple[list[Corrupted], list[str]]:
        """What can be used, and one line for whatever cannot."""
        found, problems = [], []
        for kind in KINDS:
            path = self.folder / f"{kind}.npy"
            if not path.exists():
                problems.append(f"{path.name} is missing")
                continue
            try:
                images = np.load(path, mmap_mode="r")
            except ValueError as error:
                problems.append(f"{path.name} is damaged ({error})")
                continue
            severities, rest = divmod(len(images), self.split_size)
            if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or rest or not severities:
                problems.append(
                    f"{path.name} holds {images.dtype} {images.shape}, not five times {self.split_size} images in RGB"
                )
                continue
            if severities < len(SEVERITIES):
                problems.append(f"{path.name} lacks the severities from {severities + 1} on")
            found += [Corrupted(kind, severity) for severity in SEVERITIES[:severities]]
        return found, problems


def open_arrays(folder: Path, source: ImageSource) -> Arrays:
    """Open the published arrays of the split that `source` is, or is a part of.

    Raises:
        ValueError: they are of other images, as far as labels tell.
    """
    labels_file = folder / "labels.npy"
    if not labels_file.exists():
        raise ValueError(f"{folder} holds arrays but no labels.npy; give the whole published folder")
    labels, rows, split_size = np.load(labels_file), source.rows.numpy(), len(source.images)
    if len(labels) not in (split_size, len(SEVERITIES) * split_size):
        raise ValueError(
            f"labels.npy holds {len(labels)} labels, but {source.name} has {split_size} images in split "
            f"{source.split}: these are arrays of another data set"
        )
    published, own = labels[:split_size][rows], source.labels.numpy()
    expected = own
    if labels.max() >= source.num_classes:  # some of the classes, numbered anew: they only have to divide the same way
        _, first, numbers = np.unique(own, return_index=True, return_inverse=True)
        expected = published[first][numbers]
    wrong = (published != expected).nonzero()[0]
    if len(wrong):
        index = int(wrong[0])
        raise ValueError(
            f"image {rows[index]} is of class {published[index]} in labels.npy and of class {expected[index]} in "
            f"{source.name} ({len(wrong)} such images): these are arrays of another data set, of other classes or in "
            "another order"
        )
    return Arrays(folder, split_size, rows)


def make_arrays(source: ImageSource, seed: int, frost: Path | None, workers: int | None = None) -> Arrays:
    """Corrupt the images of `source`, of 32 pixels, in all ways, or find them in the cache.

    Each file appears whole or not at all; what is there is kept. Of several processes one makes them, and the others
    wait for it.
    """
    key = json.dumps([GENERATION, source.name, source.fingerprint, seed, str(frost)])
    folder = cached_assets_path("tffd_zoo", "corruptions", hashlib.sha256(key.encode()).hexdigest()[:16])
    with FileLock(folder / "lock"):
        missing = [kind for kind in KINDS if not (folder / f"{kind}.npy").exists()]
        if missing:
            images, parts = pixels(source, SIZE), np.split(np.arange(len(source)), range(CHUNK, len(source), CHUNK))
            requests = [(kind, severity, part) for kind in missing for severity in SEVERITIES for part in parts]
            worker = partial(_corrupt_part, images, source.rows.numpy(), seed, read_frost(frost) if frost else ())
            pool = WorkerPool(worker, default_workers() if workers is None else workers)
            with tqdm(total=len(requests), desc="corrupt", unit="batch", leave=False, disable=None) as bar:
                made = iter(pool.map(requests))
                for kind in missing:
                    _write(folder / f"{kind}.npy", made, len(source), bar)
    return Arrays(folder, len(source), np.arange(len(source)))


def _corrupt_part(
    images: np.ndarray, rows: np.ndarray, seed: int, frost: Pictures, request: tuple[str, int, np.ndarray]
) -> torch.Tensor:
    kind, severity, part = request
    return torch.from_numpy(corrupt(images[part], kind, severity, seed, rows[part].tolist(), frost))


def _write(path: Path, made: Iterator[torch.Tensor], images: int, bar: Any) -> None:
    with replacing_file(path) as aside:
        shape = (len(SEVERITIES) * images, SIZE, SIZE, 3)
        array = np.lib.format.open_memmap(aside, "w+", dtype=np.uint8, shape=shape)
        start = 0
        while start < len(array):
            part = next(made).numpy()
            array[start : start + len(part)] = part
            start += len(part)
            bar.update()
        array.flush()


def measure(subject: Subject, setting: Setting) -> Measurement:
    folder, source = setting.config.corruptions, test_subset(setting.source, setting.config.corruption_images)
    if folder is not None and not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give --corruptions a folder of arrays or of class folders")
    if folder is not None and not any(folder.glob("*.npy")):
        return _measure_folders(subject, folder)
    if folder is not None:
        arrays, images = open_arrays(folder, source), f"arrays in {folder.name}"
    else:
        _require_small(subject, source)
        with_frost = "the published frost" if setting.config.frost else "stand-ins for frost"
        images = f"generated, seed {setting.config.suite_seed}, {with_frost}"
        arrays = make_arrays(source, setting.config.suite_seed, setting.config.frost)
    found, problems = arrays.available()
    if not found:
        raise ValueError(f"nothing in {arrays.folder} can be used: {'; '.join(problems)}")
    targets = source.labels.numpy()
    images_in_all = len(found) * len(targets)
    subject.expect(images_in_all)
    start = time.perf_counter()
    bar = tqdm(found, "corruptions", leave=False, disable=None if subject.rank == 0 else True)
    correct = {what.name: subject.logits_of(arrays.read(what)).argmax(axis=1) == targets for what in bar}
    if subject.rank == 0:
        speed = images_in_all / (time.perf_counter() - start)
        print(f"{subject.name}: {images_in_all:,} corrupted images, {speed:,.0f} images/s", file=sys.stderr)
    return Measurement({"test": correct}, {"corrupted_images": images, "images": len(targets)}, tuple(problems))


def _require_small(subject: Subject, source: ImageSource) -> None:
    """Refuse a model of larger images, unless it takes such small ones enlarged: then they are as small themselves."""
    size = subject.spec.input_size[1:]
    if size != (SIZE, SIZE) and source.decode(0).size != (SIZE, SIZE):
        raise ValueError(
            f"corruptions are made for images of {SIZE} pixels, and {subject.name} takes {size[0]} x {size[1]}; give a "
            "folder of corrupted images, such as ImageNet-C, with --corruptions"
        )


def _measure_folders(subject: Subject, folder: Path) -> Measurement:
    """ImageNet-C's layout: KIND/SEVERITY/CLASS/IMAGE. Each such folder is a sample of its own."""
    samples, problems = {}, []
    for kind in sorted(path.name for path in folder.iterdir() if path.is_dir()):
        if kind not in KINDS:
            problems.append(f"{kind} is no known corruption")
            continue
        for severity in SEVERITIES:
            place = folder / kind / str(severity)
            what = Corrupted(kind, severity)
            try:
                predicted = predict_by_class(subject, open_source(str(place), "train"))
            except (ValueError, OSError) as error:
                problems.append(f"{what.name}: {error}")
            else:
                samples[what.name] = {what.name: predicted.correct}
    if not samples:
        raise ValueError(f"{folder} holds neither arrays nor folders KIND/SEVERITY: {'; '.join(problems)}")
    return Measurement(samples, {"corrupted_images": f"folders in {folder.name}"}, tuple(problems))


def figures(samples: Mapping[str, Sample]) -> Figures:
    """Top-1 of each kind at each severity, of each kind, of the benchmark's 15 kinds and of the 4 extra ones.

    A mean is there only when all that it is a mean of is.
    """
    top1 = {name: percent(correct) for sample in samples.values() for name, correct in sample.items()}
    kinds = {}
    for kind in KINDS:
        at = [top1.get(Corrupted(kind, severity).name) for severity in SEVERITIES]
        if None not in at:
            kinds[kind] = float(np.mean([value for value in at if value is not None]))
    means = {}
    for name, extra in (("mean", False), ("extra_mean", True)):
        members = [kind for kind, corruption in KINDS.items() if corruption.extra == extra]
        if all(kind in kinds for kind in members):
            means[name] = float(np.mean([kinds[kind] for kind in members]))
    return means | kinds | top1


def mce(ours: Figures, baseline: Figures) -> Figures:
    """Mean corruption error as `mce`, percent: each kind's error over the baseline's, averaged over the 15 kinds.

    Nothing where a kind is missing or the baseline makes no error. Hendrycks and Dietterich normalise ImageNet-C by
    AlexNet; for CIFAR there is no such convention, so the baseline must be named with the figure.
    """
    kinds = [kind for kind, corruption in KINDS.items() if not corruption.extra]
    if not all(kind in ours and baseline.get(kind, 100) < 100 for kind in kinds):
        return {}
    return {"mce": 100 * float(np.mean([(100 - ours[kind]) / (100 - baseline[kind]) for kind in kinds]))}


def draw(models: Mapping[str, Figures]) -> Figure:
    """Heat maps of top-1 by kind and severity, one a model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 + 2.6 * len(models), 6.2), layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
    shown = [
        kind
        for kind in KINDS
        if any(Corrupted(kind, severity).name in found for found in models.values() for severity in SEVERITIES)
    ]
    for axes, (name, found) in zip(panels, models.items(), strict=True):
        values = [[found.get(Corrupted(kind, s).name, np.nan) for s in SEVERITIES] for kind in shown]
        picture = axes.imshow(values, cmap="viridis", vmin=0, vmax=100, aspect="auto")
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                colour = "black" if value > 60 else "white"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=colour)
        axes.set_xticks(range(len(SEVERITIES)), [str(s) for s in SEVERITIES])
        axes.set_yticks(range(len(shown)), [kind.replace("_", " ") for kind in shown])
        axes.set(xlabel="severity", title=f"{name}\nmean of 15: {found.get('mean', float('nan')):.1f} %")
        axes.title.set_fontsize(8)
        axes.grid(visible=False)
    figure.colorbar(picture, ax=panels, label="top-1 (%)", shrink=0.5)
    return figure


PART = Part(
    "corruptions",
    measure,
    figures,
    depends=("corruption_images", "corruptions", "frost", "suite_seed"),
    draw=draw,
    relative=mce,
)
