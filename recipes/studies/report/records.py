"""The small records of finished runs: copied out of the run folders, to be committed, and read again for a report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tffd_zoo.atomic import replacing_folder
from tffd_zoo.json_files import write_json
from tffd_zoo.known_data import portable, portable_recipe, portable_source
from tffd_zoo.recipe import differences
from tffd_zoo.run_record import DATA, ENVIRONMENT, METRICS_LINES, RECIPE, RunRecord, read_recipe


def record_folder(recipe: Mapping[str, Any], records: Path) -> Path:
    """Where among `records` the record of a run of `recipe` lies, or would."""
    return records / f"{recipe['name']}-s{recipe['run']['seed']}"


def changes(recipe: Mapping[str, Any], recorded: Mapping[str, Any]) -> list[str]:
    """Fields in which `recipe` asks for another run than the recorded one.

    Places count for nothing: they have other names on every machine, and `data.json` says which images they were.
    """
    return differences(_placeless(recipe), _placeless(recorded))


def collect(run: Path, records: Path) -> bool:
    """Copy the records of a finished run to `records`/<recipe>-s<seed>, with the paths of this machine cut.

    What is there already stays: a report never changes under the reader's eyes.

    Returns:
        Whether something was copied.

    Raises:
        ValueError: `run` has not ended, or the place holds a run of another recipe.
    """
    record = RunRecord.read_finished(run)
    destination = record_folder(record.recipe, records)
    if (recorded := read_recipe(destination)) is not None:
        if fields := changes(record.recipe, recorded):
            raise ValueError(
                f"{destination} holds a run of another recipe ({'; '.join(fields)}); "
                "pass --results with another folder, or remove it"
            )
        return False
    revision = record.data["revision"]
    data = {key: value for key, value in record.data.items() if key != "label_names"}
    data["source"] = portable_source(data["source"], revision)
    with replacing_folder(destination) as aside:
        write_json(aside / RECIPE, portable_recipe(record.recipe, revision))
        write_json(aside / ENVIRONMENT, portable(record.environment))
        write_json(aside / DATA, portable(data))
        (aside / METRICS_LINES).write_text("".join(json.dumps(line) + "\n" for line in record.metrics))
    return True


def _placeless(recipe: Mapping[str, Any]) -> dict[str, Any]:
    teacher = recipe.get("teacher")
    return {
        **recipe,
        "data": {**recipe["data"], "source": None},
        "teacher": teacher and {**teacher, "weights": teacher["weights"] and Path(teacher["weights"]).name},
    }
