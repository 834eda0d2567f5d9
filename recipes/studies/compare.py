"""Run a study, the same recipes over several seeds, and report on it.

    python -m recipes.studies.compare STUDY              run what is missing, one run after the other; resume the rest
    python -m recipes.studies.compare STUDY --list       the runs of the study and how far they are
    python -m recipes.studies.compare STUDY --report     collect the records of finished runs, make the page from all
    python -m recipes.studies.compare STUDY --shard 1/3  one of three machines' share

The studies are in studies.py. Records are collected in recipes/results/records, once for all studies, and the reports
that are made from them go to recipes/results/STUDY. A collected run is not made again.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import tyro

from tffd_zoo.cli import run_cli
from tffd_zoo.markdown import markdown_table
from tffd_zoo.recipe import Recipe, differences, vary
from tffd_zoo.run_record import METRICS_LINES, RunRecord, read_metrics, read_recipe
from tffd_zoo.training import train

from .report import Row, Study, changes_of_record, collect, record_folder, write_report
from .studies import STUDIES

RUNS = Path("runs")
RESULTS = Path(__file__).parents[1] / "results"
WEIGHTS = Path("weights") / "last.safetensors"
MODULE = "recipes.studies.compare"

State = Literal["done", "collected", "unfinished", "missing", "another recipe"]


@dataclass(frozen=True)
class CompareConfig:
    """Run a study, the same recipes over several seeds, and report on it."""

    study: tyro.conf.Positional[Annotated[str, tyro.conf.arg(help=f"One of {', '.join(STUDIES)}.")]]
    list: bool = False
    """Show the runs and how far they are, and do nothing."""
    report: bool = False
    """Copy the records of finished runs to the results and make the page from those; run nothing."""
    seeds: tuple[int, ...] | None = None
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
    epochs: int | None = None
    """Overrides the recipes' length."""
    holdout: int | None = None
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


@dataclass(frozen=True)
class Run:
    """A recipe with a seed and a place."""

    recipe: Recipe
    records: Path | None = None
    """Where its record may lie already; None where the run itself is needed, for its weights."""

    @property
    def folder(self) -> Path:
        return self.recipe.folder

    @property
    def log(self) -> Path:
        """What the run prints."""
        return self.folder.with_name(f"{self.folder.name}.log")

    def __str__(self) -> str:
        return f"{self.recipe.name} seed {self.recipe.run.seed}"

    def state(self) -> State:
        """How far the run is, by what lies in its folder and among the records."""
        if self.conflict():
            return "another recipe"
        if not (self.folder / "recipe.json").exists():
            return "collected" if self.record else "missing"
        exported = (self.folder / "export" / "SHA256SUMS").exists()
        # A run that was cut short by --max-steps has an export too.
        if exported and self.epochs_done() >= self.recipe.optim.epochs:
            return "done"
        return "collected" if self.record else "unfinished"

    @property
    def record(self) -> Path | None:
        """The collected record of this very run."""
        if self.records is None or changes_of_record(self.recipe.to_dict(), self.records) != []:
            return None
        return record_folder(self.recipe.to_dict(), self.records)

    def conflict(self) -> str:
        """Where a run of another recipe has the place of this one, and in which fields it differs; empty if none."""
        recipe = self.recipe.to_dict()
        found = read_recipe(self.folder)
        changes = {self.folder: None if found is None else differences(recipe, found)}
        if self.records is not None:
            changes[record_folder(recipe, self.records)] = changes_of_record(recipe, self.records)
        return "; ".join(
            f"{place} holds a run of another recipe ({'; '.join(fields)})"
            for place, fields in changes.items()
            if fields
        )

    def epochs_done(self) -> float:
        evaluations = self._evaluations()
        return evaluations[-1]["epoch"] if evaluations else 0.0

    def last_top1(self) -> float | None:
        evaluations = self._evaluations()
        return evaluations[-1]["top1"] if evaluations else None

    def _evaluations(self) -> Sequence[Mapping[str, Any]]:
        lies = self.folder / METRICS_LINES
        if not lies.exists() and self.record is not None:
            return RunRecord.read_finished(self.record).evaluations
        return [record for record in read_metrics(lies) if record["kind"] == "eval"]


# --- what there is to run ---------------------------------------------------------------------------------------------


def planned_runs(study: Study, config: CompareConfig) -> list[Run]:
    """The runs of this machine: one seed of every recipe before the next, and what a run needs before it.

    Raises:
        ValueError: a shard that cannot be.
    """
    shard, slash, shards = config.shard.partition("/")
    if not (slash and shard.isdecimal() and shards.isdecimal() and 1 <= int(shard) <= int(shards)):
        raise ValueError(f"--shard {config.shard} is none; give i/n with 1 <= i <= n, such as 1/3")
    seeds = {row.name: row.seeds or config.seeds or study.seeds for row in study.rows}
    rounds = range(max(map(len, seeds.values())))
    plan = [(row, seeds[row.name][k]) for k in rounds for row in study.rows if k < len(seeds[row.name])]
    needed: dict[tuple[str, int], Run] = {}
    for row, seed in plan[int(shard) - 1 :: int(shards)]:
        run = Run(resolve(row, seed, study, config), config.records)
        teacher = teacher_of(row, study)
        if teacher is not None and run.state() not in ("done", "collected"):
            its_seed = teacher.recipe.run.seed
            needed[teacher.name, its_seed] = Run(resolve(teacher, its_seed, study, config))
        needed.setdefault((row.name, seed), run)
    return [*needed.values()]


def resolve(row: Row, seed: int, study: Study, config: CompareConfig) -> Recipe:
    """The recipe of one run: the row's, with the seed, the place and the overrides of the command."""
    data = {"source": config.data, "holdout": config.holdout}
    recipe = vary(
        row.recipe,
        row.name,
        data={field: value for field, value in data.items() if value is not None},
        optim={} if config.epochs is None else {"epochs": config.epochs},
        run={"seed": seed, "output": None},
    )
    teacher = teacher_of(row, study)
    if teacher is not None:
        trained = resolve(teacher, teacher.recipe.run.seed, study, config)
        recipe = vary(recipe, row.name, teacher={"weights": trained.folder / WEIGHTS})
    return vary(recipe, row.name, run={"output": (config.output or RUNS) / recipe.folder.name})


def teacher_of(row: Row, study: Study) -> Row | None:
    """The row of the study that trains the frozen teacher of this one."""
    teacher = row.recipe.teacher
    weights = None if teacher is None else teacher.weights
    return next((each for each in study.rows if each.recipe.folder / WEIGHTS == weights), None)


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


# --- running ----------------------------------------------------------------------------------------------------------


class Child:
    """A process that is told of every signal that this one gets; both leave together.

    The child has a session of its own: a Ctrl-C reaches it once, from here, and it stops with a checkpoint.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.signal: int | None = None
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Child:
        self._previous = {number: signal.signal(number, self._pass_on) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def run(self, command: Sequence[str], log: Path) -> int:
        """Run `command` to its end, with what it prints added to `log`; return its exit code."""
        log.parent.mkdir(parents=True, exist_ok=True)
        # In a log a line of the progress bar a minute will do, and an error has to come last.
        environment = {**os.environ, "TQDM_MININTERVAL": "60", "PYTHONUNBUFFERED": "1"}
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
            if self.signal is not None:  # it came while the process was being made
                self.process.send_signal(self.signal)
            return self.process.wait()


def run_all(study: Study, runs: Sequence[Run], command: Callable[[Run], list[str]]) -> None:
    """Make every run that is not done, each in a process of its own; one that fails does not keep the others back.

    Raises:
        SystemExit: 1 if a run failed, 128 + the signal's number if one told this process to stop.
    """
    done_before, done, failed = 0, 0, []
    with Child() as child:
        for position, run in enumerate(runs, start=1):
            state = run.state()
            if state in ("done", "collected"):
                done_before += 1
                continue
            at = f"[{position}/{len(runs)}] {run}"
            if state == "another recipe":
                failed.append(run)
                print(f"{at}: {run.conflict()}; pass --output with another folder", flush=True)
                continue
            print(f"{at}: {'starting' if state == 'missing' else 'resuming'}, log in {run.log}", flush=True)
            started = time.monotonic()
            code = child.run(command(run), run.log)
            if child.signal is not None:
                print(f"\nstopped in {run}; the same command goes on from there", flush=True)
                raise SystemExit(128 + child.signal)
            minutes = (time.monotonic() - started) / 60
            if code == 0 and run.state() == "done":
                done += 1
                print(f"{at}: done in {minutes:.1f} min, top-1 {run.last_top1():.2f}", flush=True)
            else:
                failed.append(run)
                print(f"{at}: failed with exit code {code}: {_last_line(run.log)} (see {run.log})", flush=True)
    summary = f"{study.name}: {len(runs)} runs, {done} done now, {done_before} before, {len(failed)} failed"
    print(f"{summary}: {', '.join(map(str, failed))}" if failed else summary, flush=True)
    if failed:
        raise SystemExit(1)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


# --- the commands -----------------------------------------------------------------------------------------------------


def show(runs: Sequence[Run]) -> str:
    """Table of the runs and how far they are."""
    rows = []
    for run in runs:
        top1, optim = run.last_top1(), run.recipe.optim
        progress = [f"{run.epochs_done():g} of {optim.epochs}", "-" if top1 is None else f"{top1:.2f}"]
        rows.append([run.recipe.name, str(run.recipe.run.seed), run.state(), *progress, str(run.folder)])
    return markdown_table(["recipe", "seed", "state", "epochs", "top-1", "folder"], rows)


def report(study: Study, runs: Sequence[Run], config: CompareConfig) -> Path:
    """Collect the records of the finished runs among `runs`, and make the page from all that were ever collected."""
    for run in runs:
        if run.state() == "done" and collect(run.folder, config.records):
            print(f"collected {run}")
    return write_report(study, config.records, config.pages / study.name)


def main(config: CompareConfig, studies: dict[str, Study] = STUDIES) -> None:
    """Do what `config` says with one of `studies`."""
    if config.study not in studies:
        raise ValueError(f"there is no study '{config.study}'; choose one of {', '.join(studies)}")
    study = studies[config.study]
    if config.run is not None:
        row = study.row(config.run)
        if config.seeds is None or len(config.seeds) != 1:
            usual = (row.seeds or study.seeds)[0]
            raise ValueError(f"--run {row.name} is one run: give it one seed, such as --seeds {usual}")
        train(resolve(row, config.seeds[0], study, config))
        return
    runs = planned_runs(study, config)
    if config.list:
        print(show(runs))
    elif config.report:
        print(report(study, runs, config))
    else:
        run_all(study, runs, lambda run: command_of(run, config))


if __name__ == "__main__":
    run_cli(main, CompareConfig)
