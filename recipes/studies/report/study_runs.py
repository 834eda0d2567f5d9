"""The recorded runs of one study, paired by seed with those of their twins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tffd_zoo.run_record import RunRecord

from .records import read_records
from .statistics import Estimate, Spread, estimate_gain, paired_differences, spread_of_runs
from .study import Row, Study

Figure = Callable[[RunRecord], float]


@dataclass(frozen=True)
class StudyRuns:
    """The records of a study, by recipe and seed."""

    study: Study
    by_name: Mapping[str, Mapping[int, RunRecord]]

    @classmethod
    def read(cls, study: Study, records: Path) -> StudyRuns:
        runs = cls.of(study, read_records(records))
        if not runs.all:
            raise FileNotFoundError(f"{records} holds no finished run of study '{study.name}': run the study first")
        return runs

    @classmethod
    def of(cls, study: Study, records: Iterable[RunRecord]) -> StudyRuns:
        """Those of `records` that are runs of the study."""
        by_name: dict[str, dict[int, RunRecord]] = {row.name: {} for row in study.rows}
        for record in records:
            if record.name in by_name:
                by_name[record.name][record.seed] = record
        runs = cls(study, by_name)
        runs._check_pairs()
        return runs

    def _check_pairs(self) -> None:
        for row, seed, ours, theirs in self.pairs():
            for role in ("train", "eval"):
                if ours.data[role] != theirs.data[role]:
                    raise ValueError(
                        f"'{row.name}' and its twin '{row.twin}', seed {seed}, saw other images in {role} "
                        f"({ours.data[role]} and {theirs.data[role]}): run both on the same data"
                    )

    @property
    def rows(self) -> list[Row]:
        """Those that have a run."""
        return [row for row in self.study.rows if self.by_name[row.name]]

    @property
    def compared(self) -> list[Row]:
        """Those that have a run with the seed of a run of their twin."""
        return [row for row in self.rows if row.twin and self.by_name[row.name].keys() & self.by_name[row.twin].keys()]

    @property
    def all(self) -> list[RunRecord]:
        return [run for runs in self.by_name.values() for run in runs.values()]

    @property
    def epochs(self) -> list[int]:
        """The lengths of the runs, shortest first."""
        return sorted({run.recipe["optim"]["epochs"] for run in self.all})

    def pairs(self) -> Iterable[tuple[Row, int, RunRecord, RunRecord]]:
        for row in self.compared:
            ours, theirs = self.by_name[row.name], self.by_name[row.twin or ""]
            for seed in sorted(ours.keys() & theirs.keys()):
                yield row, seed, ours[seed], theirs[seed]

    def values(self, name: str, figure: Figure) -> dict[int, float]:
        return {seed: figure(run) for seed, run in self.by_name[name].items()}

    def difference(self, row: Row, figure: Figure) -> list[float]:
        """Paired differences of a figure to the twin, by seed."""
        assert row.twin is not None
        return [*paired_differences(self.values(row.name, figure), self.values(row.twin, figure)).values()]

    def spread(self, twin: str, figure: Figure) -> Spread | None:
        """How far runs lie apart by chance, of a twin and all rows that are compared with it."""
        names = [twin, *(row.name for row in self.compared if row.twin == twin)]
        return spread_of_runs([self.values(name, figure) for name in names])

    def gain(self, row: Row, figure: Figure) -> Estimate:
        """The mean of those differences and its interval."""
        return estimate_gain(self.difference(row, figure), self.spread(row.twin or "", figure))


def last(run: RunRecord) -> float:
    """Top-1 (%) after the last epoch."""
    return run.last


def last_average(run: RunRecord) -> float:
    """That of the moving average of the weights."""
    return run.evaluation("last_ema")["ema_top1"]
