"""The records of finished runs, one file each: taken out of the run folders, to be committed, and read for a report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tffd_zoo.atomic import write_text
from tffd_zoo.json_files import read_json
from tffd_zoo.known_data import portable, portable_recipe, portable_source
from tffd_zoo.recipe import differences
from tffd_zoo.run_record import RunRecord

MEND = "restore it from git, or remove it and collect the run again"


def record_file(recipe: Mapping[str, Any], records: Path) -> Path:
    """Where among `records` the record of a run of `recipe` lies, or would."""
    return records / f"{recipe['name']}-s{recipe['run']['seed']}.json"


def commit_of(environment: Mapping[str, Any]) -> str:
    """The commit that a recorded environment names, as pages write it."""
    commit, _, dirty = (environment["commit"] or "unknown").partition("-")
    return f"{commit[:10]}{' with changes' if dirty else ''}"


def read_record(file: Path) -> RunRecord:
    """The run that was collected in `file`.

    Raises:
        ValueError: the file is damaged.
    """
    record = read_json(file, MEND)
    try:
        return RunRecord(record["recipe"], record["environment"], record["data"], tuple(record["metrics"]))
    except KeyError as error:
        raise ValueError(f"{file} is damaged (it lacks {error}); {MEND}") from error


def read_records(records: Path) -> list[RunRecord]:
    """All collected runs, by recipe and seed."""
    found = [read_record(file) for file in records.glob("*.json")]
    return sorted(found, key=lambda record: (record.name, record.seed))


def collect(run: Path, records: Path) -> bool:
    """Put the record of a finished run into `records`/<recipe>-s<seed>.json, with the paths of this machine cut.

    What is there already stays: a report never changes under the reader's eyes.

    Returns:
        Whether something was written.

    Raises:
        ValueError: `run` has not ended, or the place holds a run of another recipe.
    """
    record = RunRecord.read_finished(run)
    file = record_file(record.recipe, records)
    if file.exists():
        if fields := changes(record.recipe, read_record(file).recipe):
            raise ValueError(
                f"{file} is the record of another recipe ({'; '.join(fields)}); "
                "pass --results with another folder, or remove it"
            )
        return False
    revision = record.data["revision"]
    data = {key: value for key, value in record.data.items() if key != "label_names"}
    data["source"] = portable_source(data["source"], revision)
    recipe, environment = portable_recipe(record.recipe, revision), portable(record.environment)
    write_record(RunRecord(recipe, environment, portable(data), record.metrics), file)
    return True


def write_record(record: RunRecord, file: Path) -> None:
    """Write JSON with a line for each part and for each line of the metrics."""
    parts = [f'"{name}":{_compact(getattr(record, name))}' for name in ("recipe", "environment", "data")]
    lines = ",\n".join(map(_compact, record.metrics))
    write_text(file, "{\n" + ",\n".join(parts) + f',\n"metrics":[\n{lines}\n]\n}}\n')


def _compact(value: Mapping[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))


def changes(recipe: Mapping[str, Any], recorded: Mapping[str, Any]) -> list[str]:
    """Fields in which `recipe` asks for another run than the recorded one.

    Places count for nothing: they have other names on every machine, and the record's data says which images they were.
    """
    return differences(_placeless(recipe), _placeless(with_names_of_today(recorded)))


RENAMED = {
    "optim": {"warmup_epochs": "lr_warmup_epochs"},
    "tffd": {"repair_every": "rank_every", "warmup": "warmup_fraction"},
    "teacher": {"warmup": "warmup_fraction"},
}
"""Fields that had another name, and the same meaning, when the older records were made."""


def with_names_of_today(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded recipe, its fields called what they are called now."""

    def renamed(section: str, names: Mapping[str, str]) -> dict[str, Any] | None:
        values = recipe.get(section)
        return values and {names.get(field, field): value for field, value in values.items()}

    return {**recipe, **{section: renamed(section, names) for section, names in RENAMED.items()}}


def _placeless(recipe: Mapping[str, Any]) -> dict[str, Any]:
    teacher = recipe.get("teacher")
    return {
        **recipe,
        "data": {**recipe["data"], "source": None},
        "teacher": teacher and {**teacher, "weights": teacher["weights"] and Path(teacher["weights"]).name},
    }
