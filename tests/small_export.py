"""A run folder with an export that takes a second to make, for tests of what is done with exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config

from tffd_zoo.data import ImageSpec, eval_loader, open_source
from tffd_zoo.evaluation import evaluate, evaluation_record
from tffd_zoo.export import export
from tffd_zoo.recipe import DataConfig, OptimConfig, Recipe, RunConfig
from tffd_zoo.tasks import CANONICAL


def small_export(
    folder: Path, seed: int = 0, tag: str = "digits", size: int = 16, recipe_seed: int = 0, **metrics: Any
) -> Path:
    """A run folder whose export is a tiny ResNet with the weights of `seed`, evaluated on digits of `size` pixels."""
    torch.manual_seed(seed)
    source = open_source("digits", "test")
    model = timm.create_model("tffd_resnet20", num_classes=10).eval()
    spec = ImageSpec.from_model(model, input_size=(3, size, size))
    result = evaluate(model, eval_loader(source, spec, 256), device="cpu", progress=False)
    recipe = Recipe(
        name="tffd",
        model="tffd_resnet20",
        data=DataConfig(source="digits"),
        optim=OptimConfig(epochs=2, batch_size=64, lr=0.1, weight_decay=5e-4),
        tffd=None if tag.startswith("ce_") else CANONICAL,
        run=RunConfig(seed=recipe_seed),
    )
    export(
        model,
        folder / "export",
        architecture="tffd_resnet20",
        tag=tag,
        recipe=recipe.to_dict(),
        metrics=evaluation_record(model, result, source, spec) | metrics,
        label_names=source.label_names,
        data_config=resolve_model_data_config(model) | {"input_size": (3, size, size)},
        environment={"hardware": "a small machine", "hours": 0.25},
    )
    return folder
