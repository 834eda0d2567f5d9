"""Two small recipes, and the records that a run of one of them leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tffd_zoo.recipe import DataConfig, OptimConfig, Recipe, vary
from tffd_zoo.tasks import CANONICAL

PLAIN = Recipe(
    name="plain",
    model="tffd_resnet20",
    data=DataConfig(source="uoft-cs/cifar100"),
    optim=OptimConfig(epochs=2, batch_size=64, lr=0.1, weight_decay=5e-4),
)
TFFD = vary(PLAIN, "tffd", tffd=CANONICAL)


def write_run(folder: Path, recipe: Recipe, seed: int, top1: float, **changes: Any) -> Path:
    """The records of a run of two epochs that ends at `top1` and was a point better before."""
    run = folder / f"{recipe.name}-{seed}"
    run.mkdir(parents=True)
    rate = 1000.0 if recipe.tffd is None else 800.0
    shares = {"grad_ratio/intra": 0.05, "grad_ratio/inter": 0.02} if recipe.name == "tffd" else {}
    metrics = [
        {"kind": "train", "step": 1, "epoch": 0.5, "loss": 4.0, "images_per_second": rate / 10},
        {"kind": "train", "step": 2, "epoch": 1.0, "loss": 3.0, "images_per_second": rate},
        {"kind": "eval", "step": 2, "epoch": 1.0, "train": {"loss": 3.5, **shares}, "top1": top1 + 1},
        {"kind": "train", "step": 4, "epoch": 2.0, "loss": 2.0, "images_per_second": rate + 10 * seed},
        {"kind": "eval", "step": 4, "epoch": 2.0, "train": {"loss": 2.5, **shares}, "top1": top1},
    ]
    records = {
        "recipe": vary(recipe, recipe.name, run={"seed": seed, "output": run}).to_dict(),
        "environment": {
            "commit": "0123456789abcdef",
            "python": "3.11.7",
            "packages": {"torch": "2.14.1"},
            "device": "cpu",
            "hardware": "a CPU",
            "processes": 1,
            "threads": 2,
        },
        "data": {
            "source": "uoft-cs/cifar100",
            "revision": "e0c1d2",
            "train": {"split": "train", "images": 50000, "fingerprint": "a"},
            "eval": {"split": "test", "images": 10000, "fingerprint": "b"},
            "label_names": ["apple"],
        },
    }
    for name, record in records.items():
        (run / f"{name}.json").write_text(json.dumps({**record, **changes.get(name, {})}))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    return run
