"""The small records of finished runs: copied out of the run folders, to be committed, and read again for a report."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tffd_zoo.atomic import replacing_folder
from tffd_zoo.export import without_local_paths
from tffd_zoo.recipe import differences
from tffd_zoo.training.run_folder import read_json, read_metrics, write_json

METRICS = "metrics.jsonl"
SHARE = "grad_ratio/"


@dataclass(frozen=True)
class RunRecord:
    """What a finished run recorded."""

    recipe: Mapping[str, Any]
    environment: Mapping[str, Any]
    data: Mapping[str, Any]
    metrics: tuple[Mapping[str, Any], ...]

    @classmethod
    def read(cls, folder: Path) -> RunRecord:
        """Read the records in `folder`.

        Raises:
            FileNotFoundError: one of them is missing.
            ValueError: one of them is damaged, or the run has not ended.
        """
        try:
            recipe, environment, data = (
                read_json(folder / f"{name}.json") for name in ("recipe", "environment", "data")
            )
            record = cls(recipe, environment, data, tuple(read_metrics(folder / METRICS)))
        except json.JSONDecodeError as error:
            raise ValueError(f"a record in {folder} is damaged ({error}); collect the run again") from error
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
        """One record per epoch."""
        return [record for record in self.metrics if record["kind"] == "eval"]

    @property
    def finished(self) -> bool:
        return bool(self.evaluations) and self.evaluations[-1]["epoch"] >= self.recipe["optim"]["epochs"]

    @property
    def last(self) -> float:
        """Top-1 (%) after the last epoch."""
        return self.evaluations[-1]["top1"]

    @property
    def best(self) -> float:
        """Highest top-1 (%) of any epoch."""
        return max(record["top1"] for record in self.evaluations)

    @property
    def images_per_second(self) -> float | None:
        """Median over the run, so that compilation and interruptions don't count; None of a run too short to tell."""
        rates = [record["images_per_second"] for record in self.metrics if record["kind"] == "train"]
        return statistics.median(rates) if rates else None

    @property
    def shares(self) -> dict[str, list[tuple[float, float]]]:
        """For every measured loss its gradient share (a fraction), as (epoch, mean over that epoch)."""
        found: dict[str, list[tuple[float, float]]] = {}
        for record in self.evaluations:
            for name, value in record["train"].items():
                if name.startswith(SHARE):
                    found.setdefault(name.removeprefix(SHARE), []).append((record["epoch"], value))
        return found


def record_folder(recipe: Mapping[str, Any], records: Path) -> Path:
    """Where among `records` the record of a run of `recipe` lies, or would."""
    return records / f"{recipe['name']}-s{recipe['run']['seed']}"


def changes_of_record(recipe: Mapping[str, Any], records: Path) -> list[str] | None:
    """Fields in which the collected record with the name and seed of `recipe` is of another recipe; None without one.

    Places count for nothing: they have other names on every machine, and `data.json` says which images they were.
    """
    recorded = record_folder(recipe, records) / "recipe.json"
    return differences(_placeless(recipe), _placeless(read_json(recorded))) if recorded.exists() else None


def collect(run: Path, records: Path) -> bool:
    """Copy the records of a finished run to `records`/<recipe>-s<seed>, with the paths of this machine cut.

    What is there already stays: a report never changes under the reader's eyes.

    Returns:
        Whether something was copied.

    Raises:
        ValueError: `run` has not ended, or the place holds a run of another recipe.
    """
    record = RunRecord.read(run)
    destination = record_folder(record.recipe, records)
    changes = changes_of_record(record.recipe, records)
    if changes:
        raise ValueError(
            f"{destination} holds a run of another recipe ({'; '.join(changes)}); "
            "pass --results with another folder, or remove it"
        )
    if changes is not None:
        return False
    data = {key: value for key, value in record.data.items() if key != "label_names"}
    with replacing_folder(destination) as aside:
        write_json(aside / "recipe.json", without_local_paths(record.recipe))
        write_json(aside / "environment.json", without_local_paths(record.environment))
        write_json(aside / "data.json", without_local_paths(data))
        (aside / METRICS).write_text("".join(json.dumps(line) + "\n" for line in record.metrics))
    return True


def _placeless(recipe: Mapping[str, Any]) -> dict[str, Any]:
    teacher = recipe.get("teacher")
    return {
        **recipe,
        "data": {**recipe["data"], "source": None},
        "teacher": teacher and {**teacher, "weights": teacher["weights"] and Path(teacher["weights"]).name},
    }
