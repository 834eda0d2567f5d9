"""What a run recorded, read from its folder: recipe, environment, data and the lines of its metrics.

The one reader of a run, for exports, curves, studies and their reports; `training.run_folder` is what writes it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from .json_files import parse_json, read_json, read_text

RECIPE = "recipe.json"
ENVIRONMENT = "environment.json"
DATA = "data.json"
METRICS_LINES = "metrics.jsonl"
CURVES = "curves.png"
CHECKPOINTS = "checkpoints"
WEIGHTS = "weights"
EXPORT = "export"

RunWeights = Literal["last", "best", "last_ema", "best_ema"]
"""The weights of a run: after the last epoch or of the best evaluation, or their moving averages."""

KEYS = {
    RECIPE: ("name", "model", "data", "optim", "run"),
    ENVIRONMENT: ("device", "packages"),
    DATA: ("source", "revision", "eval"),
}
"""What every run's records have."""
MEND = "restore it from a copy, or remove the folder of the run and start it again"
SHARE = "grad_ratio/"


@dataclass(frozen=True)
class RunRecord:
    """What a run recorded, finished or not."""

    recipe: Mapping[str, Any]
    environment: Mapping[str, Any]
    data: Mapping[str, Any]
    metrics: tuple[Mapping[str, Any], ...]
    """All lines of the metrics file, oldest first."""

    @classmethod
    def read(cls, folder: Path) -> RunRecord:
        """Read the records in `folder`.

        Raises:
            FileNotFoundError: one of them is missing.
            ValueError: one of them is damaged.
        """
        for name in (RECIPE, ENVIRONMENT, DATA, METRICS_LINES):
            if not (folder / name).exists():
                raise FileNotFoundError(f"{folder} holds no record of a run: it has no {name}")
        recipe, environment, data = (_read(folder / name, keys) for name, keys in KEYS.items())
        return cls(recipe, environment, data, tuple(read_metrics(folder / METRICS_LINES)))

    @classmethod
    def read_finished(cls, folder: Path) -> RunRecord:
        """Read the records of a run that has to have ended.

        Raises:
            FileNotFoundError, ValueError: as `read`, and of a run that has not ended.
        """
        record = cls.read(folder)
        if not record.finished:
            raise ValueError(f"the run in {folder} has not ended; finish it, or remove that folder")
        return record

    @property
    def name(self) -> str:
        return self.recipe["name"]

    @property
    def seed(self) -> int:
        return self.recipe["run"]["seed"]

    @cached_property
    def evaluations(self) -> list[Mapping[str, Any]]:
        """One line per epoch."""
        return [line for line in self.metrics if line["kind"] == "eval"]

    @property
    def finished(self) -> bool:
        return self.epochs_done >= self.recipe["optim"]["epochs"]

    @property
    def epochs_done(self) -> float:
        """How far the run is."""
        return self.evaluations[-1]["epoch"] if self.evaluations else 0.0

    def evaluation(self, weights: RunWeights) -> Mapping[str, Any]:
        """The evaluation that these weights of the run are from."""
        which, _, ema = weights.partition("_")
        top1 = "ema_top1" if ema else "top1"
        return self.evaluations[-1] if which == "last" else max(self.evaluations, key=lambda line: line[top1])

    @property
    def last(self) -> float:
        """Top-1 (%) after the last epoch."""
        return self.evaluation("last")["top1"]

    @property
    def best(self) -> float:
        """Highest top-1 (%) of any epoch."""
        return self.evaluation("best")["top1"]

    @property
    def images_per_second(self) -> float | None:
        """Median over the run, so that compilation and interruptions don't count; None of a run too short to tell."""
        rates = [line["images_per_second"] for line in self.metrics if line["kind"] == "train"]
        return statistics.median(rates) if rates else None

    @property
    def shares(self) -> dict[str, list[tuple[float, float]]]:
        """For every measured loss its gradient share (a fraction), as (epoch, mean over that epoch)."""
        found: dict[str, list[tuple[float, float]]] = {}
        for line in self.evaluations:
            for name, value in line["train"].items():
                if name.startswith(SHARE):
                    found.setdefault(name.removeprefix(SHARE), []).append((line["epoch"], value))
        return found


def _read(path: Path, keys: Iterable[str]) -> dict[str, Any]:
    """Read a record that has to have `keys`."""
    record = read_json(path, MEND)
    if missing := [key for key in keys if key not in record]:
        raise ValueError(f"{path} is damaged (it lacks {', '.join(missing)}); {MEND}")
    return record


def weights_file(run: Path, which: str) -> Path:
    """Where the `last`, `best`, `last_ema` or `best_ema` weights of a run lie."""
    return run / WEIGHTS / f"{which}.safetensors"


def read_recipe(folder: Path) -> dict[str, Any] | None:
    """The recipe of the run in `folder`; None where there is no run."""
    return read_json(folder / RECIPE, MEND) if (folder / RECIPE).exists() else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics file, oldest first; a last one that a killed process left unfinished is none.

    Raises:
        ValueError: a line is damaged; says which.
    """
    if not path.exists():
        return []
    mend = "delete that line, whose figures are lost, or restore the file from a copy"
    lines = []
    for number, text in enumerate(read_text(path, mend).rpartition("\n")[0].splitlines(), start=1):
        where = f"{path}, line {number}"
        line = parse_json(text, where, mend)
        if missing := {"kind", "step", "epoch"} - line.keys():
            raise ValueError(f"{where} is damaged (it lacks {', '.join(sorted(missing))}); {mend}")
        lines.append(line)
    return lines
