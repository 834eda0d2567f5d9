"""The benchmark's page about ImageNet: what training on it costs with and without Tf-FD, on paper.

No run of this size was made. The page says what a machine has to deliver: images decoded, bytes read, activations and
gradients moved; and what Tf-FD adds to it, by the ratios that benchmark.py measured.
"""

from __future__ import annotations

from typing import Any

import torch
from timm import create_model

from tffd_zoo.evaluation import model_cost
from tffd_zoo.markdown import markdown_table
from tffd_zoo.stages import find_stages

from .timing import Row

# Images, classes and GB of the training archives, as image-net.org gives them (21k: the release of autumn 2011), and
# the usual number of epochs.
DATASETS = {"ImageNet-1k": (1_281_167, 1000, 138, 100), "ImageNet-21k": (14_197_122, 21_841, 1310, 30)}
MODELS = ("tffd_resnet18", "tffd_resnet50")
SPEEDS = (1_000, 10_000)
PROCESSES = 8


def models_table() -> str:
    """What one image costs a model, and what its gradients cost a step."""
    rows = []
    for name in MODELS:
        model = create_model(name, num_classes=1000)
        parameters, multiply_adds = model_cost(model, (3, 224, 224))
        stages = find_stages(model)
        with torch.no_grad():
            features = model.eval().forward_intermediates(
                torch.zeros(1, 3, 224, 224), indices=list(stages.indices), intermediates_only=True
            )
        floats = sum(feature.numel() for feature in features)
        ring = 2 * (PROCESSES - 1) / PROCESSES
        rows.append([
            name,
            f"{multiply_adds / 1e9:.2f} G",
            f"{4 * floats / 1e6:.2f} MB",
            f"{4 * ring * parameters / 1e6:.1f} MB",
            f"{4 * ring * sum(stages.channels) / 1e3:.1f} KB",
        ])  # fmt: skip
    header = [
        "model, 224 px", "multiply-adds forward, an image", "its stage features, float32",
        f"gradients a step, {PROCESSES} processes", "Tf-FD's saliences a step",
    ]  # fmt: skip
    return markdown_table(header, rows)


def data_table(decoded: Row | None, ratios: dict[str, Row]) -> str:
    """What a whole run asks of the machine, at some speeds of plain training."""
    cores = decoded.median / 2 if decoded else None  # of 2 workers
    rows = []
    for name, (images, classes, gigabytes, epochs) in DATASETS.items():
        for speed in SPEEDS:
            hours = images * epochs / speed / 3600
            rows.append([
                f"{name}: {images:,} images, {classes:,} classes",
                f"{gigabytes:,} GB",
                f"{epochs}",
                f"{speed:,}",
                f"{1e3 * speed * gigabytes / images:,.0f} MB/s",
                "-" if cores is None else f"{speed / cores:,.0f}",
                f"{hours:,.1f}",
                *(f"{hours * ratio.median:,.1f}" for ratio in ratios.values()),
            ])  # fmt: skip
    header = [
        "data", "files", "epochs", "images/s", "read", "cores that decode", "hours, plain",
        *(f"hours, Tf-FD as {name}" for name in ratios),
    ]  # fmt: skip
    return markdown_table(header, rows)


def imagenet_page(record: dict[str, Any]) -> str:
    """The Markdown page, from a record that has the part `steps`."""
    rows = [Row(**row) for row in record["rows"]]
    decoded = next((row for row in rows if row.part == "streaming" and row.unit == "images/s"), None)
    ratios = {row.what: row for row in rows if row.part == "steps" and "at 224 px" in row.what}
    streamed = next((row for row in rows if row.part == "streaming" and row.unit == "x"), None)
    measured = "; ".join(f"{row.what}: {row.median:.3f} ({row.low:.3f} to {row.high:.3f})" for row in ratios.values())
    text = [
        "# ImageNet on paper",
        "Made by `python -m recipes.studies.benchmark` from `benchmark.json`; no run of this size was made, and no "
        "GPU was measured. Tf-FD over plain training, measured on "
        f"{record['measured']['steps']['hardware']}: {measured}.",
        "## What a model moves",
        models_table(),
        "The losses read the stage features and write their gradients in several passes, nothing else; on a GPU as on "
        "a CPU that is bandwidth, not arithmetic. Gradients are those of ring all-reduce, float32, sent by each "
        "process. Tf-FD has no parameters, so they stay as they are; what it adds is one sum over the processes of "
        "one number a channel, so that all agree on the ranking.",
        "## What a run asks for",
        data_table(decoded, ratios),
        "Images/s is the speed of plain training that the accelerators reach, a premise and no measurement; the loader "
        "has to keep up with it, and Tf-FD asks no more of it."
        + (
            f" A core decoded and augmented {decoded.median / 2:.0f} of the benchmark's photographs a second; larger "
            "files take longer."
            if decoded
            else ""
        )
        + (f" Streamed images come at {streamed.median:.2f} times the speed of those on the disk." if streamed else "")
        + " ImageNet-21k has no place on many disks: `--streaming` reads it while it trains.",
    ]
    return "\n\n".join(text) + "\n"
