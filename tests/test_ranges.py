"""Settings out of their range: one line, before anything is made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_training import BASE, recipe

from tffd_zoo.eval import EvalConfig
from tffd_zoo.recipe import recipe_from_cli, vary
from tffd_zoo.training import train


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("data", {"holdout": -1, "image_size": 0, "workers": -1}),
        ("optim", {"epochs": 0, "batch_size": 0, "lr": 0.0, "weight_decay": -1e-4, "momentum": 1.0, "decay_rate": 0.0}),
        (
            "optim",
            {"lr_warmup_epochs": -1.0, "layer_decay": 0.0, "layer_decay_min": 2.0, "freeze": -1, "clip_grad": 0.0},
        ),
        ("optim", {"accumulate": 0, "label_smoothing": 2.0, "mixup": -0.1, "cutmix": -0.1, "clip_grad": 0.0}),
        ("optim", {"lr": float("nan"), "weight_decay": float("inf"), "milestones": (0.5, 1.5), "ema_decay": 1.5}),
        (
            "run",
            {"seed": -1, "threads": 0, "checkpoint_every": 0, "keep_checkpoints": 0, "log_every": 0, "max_steps": 0},
        ),
        ("run", {"measure_every": -1}),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_flag(section: str, values: dict[str, Any]) -> None:
    for name, value in values.items():
        with pytest.raises(ValueError, match=rf"^--{name.replace('_', '-')} \S+ is out of range; choose "):
            vary(BASE, "test", **{section: {name: value}})


def test_the_range_is_said() -> None:
    for changes, said in (
        ({"accumulate": 0}, "--accumulate 0 is out of range; choose 1 or more"),
        ({"label_smoothing": 2.0}, "--label-smoothing 2 is out of range; choose 0 to below 1"),
        ({"lr": -0.1}, "--lr -0.1 is out of range; choose above 0"),
        ({"milestones": (0.5, 0.2)}, "--milestones 0.5 0.2 go back in time; put them in order"),
    ):
        with pytest.raises(ValueError, match=said):
            replace(BASE.optim, **changes)


def test_the_command_line_and_the_evaluation_refuse_them_too() -> None:
    with pytest.raises(ValueError, match=r"--ema-decay 1\.5 is out of range"):
        recipe_from_cli({"test": BASE}, "", ["--ema-decay", "1.5"])
    with pytest.raises(ValueError, match="--batch-size 0 is out of range; choose 1 or more"):
        EvalConfig(models=("tffd_resnet20",), data="digits", batch_size=0)


def test_a_size_that_the_network_cannot_take_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vit_tiny_patch16_224 cannot take images of 32 px \(.*\); .* its own 224 px"):
        train(recipe(tmp_path / "run", model="vit_tiny_patch16_224", data={"image_size": 32}, tffd=None))
    assert not (tmp_path / "run").exists()
