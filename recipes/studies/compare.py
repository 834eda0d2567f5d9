"""Run a study, the same recipes over several seeds, and report on it.

    python -m recipes.studies.compare STUDY              run what is missing, one run after the other; resume the rest
    python -m recipes.studies.compare STUDY --jobs 4     four at a time
    python -m recipes.studies.compare STUDY --list       the runs of the study and how far they are
    python -m recipes.studies.compare STUDY --report     the page from all records
    python -m recipes.studies.compare STUDY --shard 1/3  one of three machines' share

Ctrl-C or SIGTERM stops all runs with a checkpoint, and the same command goes on from there. The studies are in
studies.py. The record of a finished run goes to recipes/results/records, once for all studies, and the pages that are
made from them to recipes/results/STUDY. A run that has a record is not made again.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from tffd_zoo.cli import run_cli
from tffd_zoo.markdown import markdown_table
from tffd_zoo.ranges import COUNT, NOT_NEGATIVE, SEED
from tffd_zoo.training import train

from .jobs import run_all
from .report import Study, collect, write_index, write_report
from .runs import Overrides, Run, planned_runs, resolve
from .studies import STUDIES

RESULTS = Path(__file__).parents[1] / "results"
MODULE = "recipes.studies.compare"


@dataclass(frozen=True)
class CompareConfig:
    """Run a study, the same recipes over several seeds, and report on it."""

    study: tyro.conf.Positional[Annotated[str, tyro.conf.arg(help=f"One of {', '.join(STUDIES)}.")]]
    list: bool = False
    """Show the runs and how far they are, and do nothing."""
    report: bool = False
    """Make the page from the records, those of runs that finished elsewhere included; run nothing."""
    jobs: Annotated[int, COUNT] = 1
    """Runs side by side, from one queue; the cores are divided between them, and a GPU is shared."""
    seeds: Annotated[tuple[int, ...] | None, SEED] = None
    """Seeds to run, instead of the study's own."""
    shard: str = "1/1"
    """i/n: every n-th run, from the i-th on, so that n machines share a study. Each trains the frozen teachers of its
    runs first; machines with one disk had better train those beforehand, with --run."""
    output: Path | None = None
    """Where the run folders lie; 'runs' when not given. Studies share the runs of the recipes that they share."""
    results: Path | None = None
    """Where records and pages go; recipes/results, or OUTPUT/results when --output is given."""
    data: str | None = None
    """Where the images are: overrides the recipes', as every run's --data does."""
    epochs: Annotated[int | None, COUNT] = None
    """Overrides the recipes' length."""
    holdout: Annotated[int | None, NOT_NEGATIVE] = None
    """Overrides the recipes': hold so many training images out to evaluate on, and leave the test images alone."""
    launcher: str = ""
    """Start every run with this, such as 'accelerate launch --num_processes 2'; by Python alone when not given."""
    run: str | None = None
    """Run this one recipe of the study, here and now; needs one of --seeds."""

    @property
    def pages(self) -> Path:
        return self.results or (self.output / "results" if self.output else RESULTS)

    @property
    def records(self) -> Path:
        return self.pages / "records"

    @property
    def overrides(self) -> Overrides:
        return Overrides(self.output, self.data, self.epochs, self.holdout)

    def plan(self, study: Study) -> Sequence[Run]:
        """The runs of this command."""
        return planned_runs(study, self.records, self.overrides, self.seeds, self.shard)


def command_of(run: Run, config: CompareConfig) -> list[str]:
    """The command that makes `run` and nothing else: this one, told the same."""
    flags = {
        "--run": run.recipe.name,
        "--seeds": run.recipe.run.seed,
        "--output": config.output,
        "--data": config.data,
        "--epochs": config.epochs,
        "--holdout": config.holdout,
    }
    given = [word for flag, value in flags.items() if value is not None for word in (flag, str(value))]
    return [*(shlex.split(config.launcher) or [sys.executable]), "-m", MODULE, config.study, *given]


def show(runs: Sequence[Run]) -> str:
    """Table of the runs and how far they are."""
    rows = []
    for run in runs:
        top1, optim = run.last_top1(), run.recipe.optim
        progress = [f"{run.epochs_done():g} of {optim.epochs}", "-" if top1 is None else f"{top1:.2f}"]
        rows.append([run.recipe.name, str(run.recipe.run.seed), run.state(), *progress, str(run.folder)])
    return markdown_table(["recipe", "seed", "state", "epochs", "top-1", "folder"], rows)


def report(study: Study, studies: Iterable[Study], runs: Sequence[Run], config: CompareConfig) -> Path:
    """Collect the records of the finished runs among `runs`; make the study's page, and the one over all `studies`."""
    for run in runs:
        if run.state() == "done" and collect(run.folder, config.records):
            print(f"collected {run}")
    page = write_report(study, config.records, config.pages / study.name)
    write_index(studies, config.records, config.pages)
    return page


def main(config: CompareConfig, studies: dict[str, Study] = STUDIES) -> None:
    """Do what `config` says with one of `studies`."""
    if config.study not in studies:
        raise ValueError(f"there is no study '{config.study}'; choose one of {', '.join(studies)}")
    study = studies[config.study]
    if config.run is not None:
        row = study.row(config.run)
        if config.seeds is None or len(config.seeds) != 1:
            usual = study.seeds_of(row)[0]
            raise ValueError(f"--run {row.name} is one run: give it one seed, such as --seeds {usual}")
        train(resolve(row, config.seeds[0], study, config.overrides))
        return
    runs = config.plan(study)
    if config.list:
        print(show(runs))
    elif config.report:
        print(report(study, studies.values(), runs, config))
    else:
        run_all(study.name, runs, lambda run: command_of(run, config), config.jobs)


if __name__ == "__main__":
    run_cli(main, CompareConfig)
