"""The runs of a study: what each needs, where it lies, and how far it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tffd_zoo.recipe import Recipe, differences, vary
from tffd_zoo.run_record import METRICS_LINES, read_metrics, read_recipe

from .report import Row, Study, changes, read_record, record_file
from .report.records import with_names_of_today
from .report.study import taught_by

RUNS = Path("runs")

State = Literal["done", "collected", "unfinished", "missing", "another recipe"]


@dataclass(frozen=True)
class Overrides:
    """What a command changes in every recipe of a study."""

    output: Path | None = None
    """Where the run folders lie; 'runs' when not given."""
    data: str | None = None
    epochs: int | None = None
    holdout: int | None = None


@dataclass(frozen=True)
class Run:
    """A recipe with a seed and a place."""

    recipe: Recipe
    records: Path
    """Where its record lies once it is collected."""
    teacher: Run | None = None
    """The run that has to be done before, for its weights."""
    wanted: Literal["record", "weights"] = "record"
    """What is needed of it: a collected record serves in place of the run, but not for its weights."""

    @property
    def folder(self) -> Path:
        return self.recipe.folder

    @property
    def log(self) -> Path:
        """What the run prints."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def record(self) -> Path:
        """Its place among the records."""
        return record_file(self.recipe.to_dict(), self.records)

    def __str__(self) -> str:
        return f"{self.recipe.name} seed {self.recipe.run.seed}"

    @property
    def finished(self) -> bool:
        return self.state() in ("done", "collected")

    def state(self) -> State:
        """How far the run is, by what lies in its folder and among the records."""
        if self.conflict():
            return "another recipe"
        started = (self.folder / "recipe.json").exists()
        exported = (self.folder / "export" / "SHA256SUMS").exists()
        # A run that was cut short by --max-steps has an export too.
        if started and exported and self.epochs_done() >= self.recipe.optim.epochs:
            return "done"
        if self.wanted == "record" and self.record.exists():
            return "collected"
        return "unfinished" if started else "missing"

    def conflict(self) -> str:
        """Where a run of another recipe has the place of this one, and in which fields it differs; empty if none."""
        recipe, found = self.recipe.to_dict(), []
        started = read_recipe(self.folder)
        if started and (fields := differences(recipe, with_names_of_today(started))):
            found.append(f"{self.folder} holds a run of another recipe ({'; '.join(fields)})")
        if self.record.exists() and (fields := changes(recipe, read_record(self.record).recipe)):
            found.append(f"{self.record} is the record of another recipe ({'; '.join(fields)})")
        return "; ".join(found)

    def epochs_done(self) -> float:
        evaluations = self._evaluations()
        return evaluations[-1]["epoch"] if evaluations else 0.0

    def last_top1(self) -> float | None:
        evaluations = self._evaluations()
        return evaluations[-1]["top1"] if evaluations else None

    def _evaluations(self) -> Sequence[Mapping[str, Any]]:
        lies = self.folder / METRICS_LINES
        if not lies.exists() and self.record.exists():
            return read_record(self.record).evaluations
        return [record for record in read_metrics(lies) if record["kind"] == "eval"]


def planned_runs(
    study: Study, records: Path, overrides: Overrides, seeds: tuple[int, ...] | None = None, shard: str = "1/1"
) -> list[Run]:
    """The runs of this machine: one seed of every row before the next, and what a run needs before it.

    Args:
        study: names the recipes and their seeds.
        records: where the records of finished runs lie.
        overrides: what the command changes in them.
        seeds: in place of the study's own.
        shard: i/n for every n-th run, from the i-th on.

    Raises:
        ValueError: a shard that cannot be.
    """
    number, slash, shards = shard.partition("/")
    if not (slash and number.isdecimal() and shards.isdecimal() and 1 <= int(number) <= int(shards)):
        raise ValueError(f"--shard {shard} is none; give i/n with 1 <= i <= n, such as 1/3")
    by_row = {row.name: row.seeds or seeds or study.seeds for row in study.rows}
    rounds = range(max(map(len, by_row.values())))
    plan = [(row, by_row[row.name][k]) for k in rounds for row in study.rows if k < len(by_row[row.name])]
    needed: dict[tuple[str, int], Run] = {}
    for row, seed in plan[int(number) - 1 :: int(shards)]:
        run = Run(resolve(row, seed, study, overrides), records)
        if row.teacher is not None and not run.finished:
            teacher = study.row(row.teacher)
            its_seed = study.seeds_of(teacher)[0]
            trained = Run(resolve(teacher, its_seed, study, overrides), records, wanted="weights")
            needed[teacher.name, its_seed] = trained
            run = Run(run.recipe, records, trained)
        needed.setdefault((row.name, seed), run)
    return [*needed.values()]


def resolve(row: Row, seed: int, study: Study, overrides: Overrides) -> Recipe:
    """The recipe of one run: the row's, with the seed, the place and the overrides of the command."""
    data = {"source": overrides.data, "holdout": overrides.holdout}
    recipe = vary(
        study.recipe(row.name),
        row.name,
        data={field: value for field, value in data.items() if value is not None},
        optim={} if overrides.epochs is None else {"epochs": overrides.epochs},
        run={"seed": seed},
    )
    if row.teacher is not None:
        teacher = study.row(row.teacher)
        recipe = taught_by(recipe, resolve(teacher, study.seeds_of(teacher)[0], study, overrides).folder)
    return vary(recipe, row.name, run={"output": (overrides.output or RUNS) / recipe.folder.name})
