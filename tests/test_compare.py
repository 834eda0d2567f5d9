"""recipes.studies.compare: what it runs, skips and resumes, what it survives, and how it stops."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from threading import Thread
from typing import Any

import pytest
import tyro
from run_records import PLAIN, write_run

from recipes.studies import compare, jobs
from recipes.studies.compare import CompareConfig, command_of
from recipes.studies.jobs import run_all
from recipes.studies.report import Row, Study, collect
from recipes.studies.runs import Run, resolve
from recipes.studies.studies import STUDIES
from tffd_zoo.recipe import vary
from tffd_zoo.run_record import read_metrics
from tffd_zoo.tasks import CANONICAL, TeacherConfig

ROWS = (Row("plain", "cross-entropy"), Row("tffd", "Tf-FD", {"tffd": CANONICAL}, twin="plain"))
STUDY = Study("trial", "does it help?", PLAIN, ROWS, seeds=(0, 1))
TAUGHT = Study(
    "taught",
    "does a teacher help?",
    PLAIN,
    (
        Row("teacher", "the teacher", {"model": "tffd_resnet56"}, seeds=(100,)),
        *ROWS,
        Row("offline", "", {"teacher": TeacherConfig("offline", "tffd_resnet56")}, "plain", "teacher"),
    ),
    seeds=(0, 1),
)

# Stands in for training: leaves what a finished run leaves, and a line in a list of calls.
TRAINER = """
import os, pathlib, shutil, signal, sys, time
folder, calls, made, action = map(pathlib.Path, sys.argv[1:])
with calls.open("a") as file:
    file.write(folder.name + "\\n")
print("training", folder.name, "with", os.environ.get("OMP_NUM_THREADS"), "threads")
if action.name == "crash":
    sys.exit("no space left on device")
if action.name == "meet":  # another one that runs at the same time
    while len(calls.read_text().split()) < 2:
        time.sleep(0.01)
if action.name in ("interrupt", "wait"):
    caught = []
    signal.signal(signal.SIGINT, lambda *_: caught.append(1))
    (folder.parent / f"{folder.name}.ready").touch()
    if action.name == "interrupt":
        while len(list(folder.parent.glob("*.ready"))) < 2:
            time.sleep(0.01)
        os.kill(os.getppid(), signal.SIGINT)
    while not caught:
        time.sleep(0.01)
    time.sleep(0.3)
    (folder.parent / f"{folder.name}.caught").write_text(str(len(caught)))
    sys.exit(130)
shutil.copytree(made, folder)
(folder / "export").mkdir()
(folder / "export" / "SHA256SUMS").write_text("")
"""


def trainer(calls: Path, **actions: str) -> Callable[[Run], list[str]]:
    """Commands of the stand-in; `actions` by the name of a recipe."""

    def command(run: Run) -> list[str]:
        made = write_run(Path(mkdtemp(dir=calls.parent)), run.recipe, run.recipe.run.seed, 60.0)
        action = actions.get(run.recipe.name, "none")
        return [sys.executable, "-S", "-c", TRAINER, *map(str, (run.folder, calls, made, action))]

    return command


def plan(tmp_path: Path, study: Study = STUDY, **flags: Any) -> list[Run]:
    return [*CompareConfig(study.name, **{"output": tmp_path / "runs", **flags}).plan(study)]


def called(calls: Path) -> list[str]:
    return [name.replace("-tffd_resnet20", "") for name in calls.read_text().split()] if calls.exists() else []


# --- what is run ------------------------------------------------------------------------------------------------------


def test_a_study_runs_one_seed_of_every_recipe_before_the_next_and_then_nothing_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = tmp_path / "calls"
    run_all("trial", plan(tmp_path), trainer(calls))
    assert called(calls) == ["plain-s0", "tffd-s0", "plain-s1", "tffd-s1"]
    assert capsys.readouterr().out.splitlines()[-1] == "trial: 4 runs, 4 done now, 0 before, 0 failed"
    assert (
        (tmp_path / "runs" / "tffd-tffd_resnet20-s1.log").read_text().startswith("training tffd-tffd_resnet20-s1 with")
    )

    run_all("trial", plan(tmp_path), trainer(calls))
    assert len(called(calls)) == 4
    assert capsys.readouterr().out == "trial: 4 runs, 0 done now, 4 before, 0 failed\n"


def test_a_run_that_is_not_done_is_started_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls, runs = tmp_path / "calls", plan(tmp_path, seeds=(0,))
    run_all("trial", runs, trainer(calls))
    shutil.rmtree(tmp_path / "runs" / "results")
    shutil.rmtree(runs[0].folder / "export")  # killed before the export
    metrics = runs[1].folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:-1]))  # stopped by --max-steps, which exports too
    assert [run.state() for run in runs] == ["unfinished", "unfinished"]

    with pytest.raises(SystemExit):  # the stand-in cannot resume: it finds its folder
        run_all("trial", runs, trainer(calls))
    assert called(calls)[2:] == ["plain-s0", "tffd-s0"]
    assert "plain seed 0: resuming" in capsys.readouterr().out


def test_a_failing_run_is_named_and_keeps_no_other_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls = tmp_path / "calls"
    with pytest.raises(SystemExit) as left:
        run_all("trial", plan(tmp_path), trainer(calls, plain="crash"))
    assert left.value.code == 1
    assert called(calls) == ["plain-s0", "tffd-s0", "plain-s1", "tffd-s1"]
    out = capsys.readouterr().out
    assert "[1/4] plain seed 0: failed with exit code 1: no space left on device" in out
    assert out.splitlines()[-1] == ("trial: 4 runs, 2 done now, 0 before, 2 failed: plain seed 0, plain seed 1")


def test_a_folder_with_another_recipe_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls = tmp_path / "calls"
    run_all("trial", plan(tmp_path, seeds=(0,)), trainer(calls))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")}
    with pytest.raises(SystemExit) as left:
        run_all("trial", plan(tmp_path, seeds=(0,), epochs=7), trainer(calls))
    assert left.value.code == 1
    assert "(optim.epochs: 2 there, 7 here); pass --output" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")} == before


def test_an_interrupt_reaches_every_run_once_and_ends_the_study(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls, handler = tmp_path / "calls", signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as left:
        run_all("trial", plan(tmp_path), trainer(calls, plain="interrupt", tffd="wait"), jobs=2)
    assert left.value.code == 128 + signal.SIGINT
    assert sorted(called(calls)) == ["plain-s0", "tffd-s0"]
    assert [path.read_text() for path in (tmp_path / "runs").glob("*.caught")] == ["1", "1"]
    out = capsys.readouterr().out
    assert "[1/4] plain seed 0: stopped after 0 epochs" in out
    assert out.splitlines()[-1] == "stopped; the same command goes on from there"
    assert signal.getsignal(signal.SIGINT) is handler


# --- side by side -----------------------------------------------------------------------------------------------------


def test_runs_go_side_by_side_with_their_part_of_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "cores_per_process", lambda processes: 9 // processes)
    calls, runs = tmp_path / "calls", plan(tmp_path, seeds=(0,))
    run_all("trial", runs, trainer(calls, plain="meet", tffd="meet"), jobs=2)  # alone, the first would wait for ever
    assert [run.log.read_text().split()[-2] for run in runs] == ["4", "4"]


def test_a_student_waits_for_its_teacher_and_nobody_else_does(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    runs = plan(tmp_path, TAUGHT, seeds=(0,))
    students_first = [*runs[1:], runs[0]]
    run_all("taught", students_first, trainer(calls), jobs=4)
    assert sorted(called(calls)[:3]) == ["plain-s0", "teacher-tffd_resnet56-s100", "tffd-s0"]
    assert called(calls)[3:] == ["offline-s0"]


def test_a_student_is_not_started_when_its_teacher_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls = tmp_path / "calls"
    with pytest.raises(SystemExit):
        run_all("taught", plan(tmp_path, TAUGHT, seeds=(0,)), trainer(calls, teacher="crash"), jobs=2)
    assert "offline-s0" not in called(calls)
    assert "[4/4] offline seed 0: not started, for its teacher failed: teacher seed 100" in capsys.readouterr().out


def test_no_jobs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--jobs 0 runs nothing; give 1 or more"):
        run_all("trial", plan(tmp_path), trainer(tmp_path / "calls"), jobs=0)


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_shards_share_the_runs_and_each_trains_the_teachers_that_it_needs_first(tmp_path: Path) -> None:
    shards = [[str(run) for run in plan(tmp_path, TAUGHT, shard=f"{i}/2")] for i in (1, 2)]
    assert shards == [
        ["teacher seed 100", "tffd seed 0", "plain seed 1", "offline seed 1"],
        ["plain seed 0", "teacher seed 100", "offline seed 0", "tffd seed 1"],
    ]


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "-1/2"])
def test_a_shard_that_cannot_be_is_refused(tmp_path: Path, shard: str) -> None:
    with pytest.raises(ValueError, match=r"give i/n with 1 <= i <= n"):
        plan(tmp_path, shard=shard)


def test_overrides_reach_every_run_and_its_teacher(tmp_path: Path) -> None:
    runs = plan(tmp_path, TAUGHT, epochs=3, holdout=50, data="digits", seeds=(7,))
    assert [str(run) for run in runs] == ["teacher seed 100", "plain seed 7", "tffd seed 7", "offline seed 7"]
    for run in runs:
        data, optim = run.recipe.data, run.recipe.optim
        assert (optim.epochs, data.holdout, data.source) == (3, 50, "digits")
    assert runs[3].recipe.teacher is not None
    assert runs[3].recipe.teacher.weights == runs[0].folder / "weights" / "last.safetensors"
    assert runs[0].folder.parent == tmp_path / "runs"


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_the_command_of_a_run_makes_that_very_run(study: Study) -> None:
    config = CompareConfig(study.name, output=Path("elsewhere"), data="digits", epochs=5, holdout=100)
    for run in config.plan(study):
        *launched, module, name = (command := command_of(run, config))[:4]
        assert (launched, module, name) == ([sys.executable, "-m"], "recipes.studies.compare", study.name)
        parsed = tyro.cli(CompareConfig, args=command[3:])
        assert parsed.run is not None
        assert parsed.seeds is not None
        assert resolve(study.row(parsed.run), *parsed.seeds, study, parsed.overrides) == run.recipe


def test_a_launcher_goes_before_the_script(tmp_path: Path) -> None:
    run = plan(tmp_path)[0]
    command = command_of(run, CompareConfig("trial", launcher="accelerate launch --num_processes 2"))
    assert command[:4] == ["accelerate", "launch", "--num_processes", "2"]
    assert command[4:6] == ["-m", "recipes.studies.compare"]


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_every_recipe_of_a_study_sees_the_images_of_its_twin_and_has_a_name_in_its_tables(study: Study) -> None:
    for row in study.rows:
        assert row.what
        if row.twin:
            mine, twin = study.recipe(row.name), study.recipe(row.twin)
            assert mine.model == twin.model
            assert mine.optim.epochs == twin.optim.epochs
            ours, theirs = mine.data, twin.data
            assert (ours.source, ours.holdout, ours.eval_split) == (theirs.source, theirs.holdout, theirs.eval_split)


# --- the commands -----------------------------------------------------------------------------------------------------


def test_the_list_shows_how_far_every_run_is_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_all("trial", plan(tmp_path, seeds=(0,))[:1], trainer(tmp_path / "calls"))
    capsys.readouterr()
    before = sorted((tmp_path / "runs").rglob("*"))
    compare.main(CompareConfig("trial", list=True, output=tmp_path / "runs"), {"trial": STUDY})
    rows = [[cell.strip() for cell in line.split("|")[1:6]] for line in capsys.readouterr().out.splitlines()]
    assert ["plain", "0", "done", "2 of 2", "60.00"] in rows
    assert ["tffd", "1", "missing", "0 of 2", "-"] in rows
    assert sorted((tmp_path / "runs").rglob("*")) == before


def test_a_report_is_rebuilt_from_collected_records_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    for recipe, top1 in ((STUDY.recipe("plain"), 60.0), (STUDY.recipe("tffd"), 61.0)):
        done = write_run(tmp_path / "made", recipe, 0, top1)
        (done / "export").mkdir()
        (done / "export" / "SHA256SUMS").write_text("")
        runs.mkdir(exist_ok=True)
        done.rename(runs / vary(recipe, recipe.name, run={"seed": 0}).folder.name)
    config = CompareConfig("trial", report=True, output=runs)
    compare.main(config, {"trial": STUDY})
    page = runs / "results" / "trial" / "README.md"
    first = page.read_bytes()
    assert "`tffd` (+1.00)" in page.read_text()
    assert "collected plain seed 0" in capsys.readouterr().out

    page.unlink()
    elsewhere = CompareConfig("trial", report=True, output=tmp_path / "nothing", results=runs / "results")
    compare.main(elsewhere, {"trial": STUDY})
    assert page.read_bytes() == first


def test_a_collected_run_is_not_made_again_when_its_folder_is_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags: dict[str, Any] = {"results": tmp_path / "results", "seeds": (0,)}
    records = tmp_path / "results" / "records"
    for run in plan(tmp_path, TAUGHT, **flags):
        if run.recipe.name != "tffd":
            collect(write_run(tmp_path / "made", run.recipe, run.recipe.run.seed, 60.0), records)
    calls = tmp_path / "calls"
    run_all("taught", plan(tmp_path, TAUGHT, **flags), trainer(calls))
    assert called(calls) == ["tffd-s0"]
    assert capsys.readouterr().out.splitlines()[-1] == "taught: 4 runs, 1 done now, 3 before, 0 failed"
    compare.main(CompareConfig("taught", list=True, output=tmp_path / "runs", **flags), {"taught": TAUGHT})
    rows = [[cell.strip() for cell in line.split("|")[1:6]] for line in capsys.readouterr().out.splitlines()]
    assert ["offline", "0", "collected", "2 of 2", "60.00"] in rows


def test_a_collected_teacher_is_trained_again_when_a_student_still_needs_its_weights(tmp_path: Path) -> None:
    flags: dict[str, Any] = {"results": tmp_path / "results", "seeds": (0,)}
    teacher = plan(tmp_path, TAUGHT, **flags)[0]
    collect(write_run(tmp_path / "made", teacher.recipe, 100, 60.0), tmp_path / "results" / "records")
    assert [run.state() for run in plan(tmp_path, TAUGHT, **flags)] == ["missing"] * 4


def test_a_record_of_another_recipe_stops_a_run_before_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    collect(write_run(tmp_path / "made", vary(PLAIN, "plain", optim={"lr": 0.2}), 0, 60.0), tmp_path / "records")
    calls = tmp_path / "calls"
    with pytest.raises(SystemExit):
        run_all("trial", plan(tmp_path, results=tmp_path, seeds=(0,)), trainer(calls))
    assert called(calls) == ["tffd-s0"]
    assert "plain-s0.json is the record of another recipe (optim.lr: 0.2 there, 0.1 here)" in capsys.readouterr().out


def test_a_study_or_recipe_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(ValueError, match="there is no study 'pilots'; choose one of pilot"):
        compare.main(CompareConfig("pilots"))
    with pytest.raises(ValueError, match="no recipe 'tfd'; choose one of plain, tffd"):
        compare.main(CompareConfig("trial", run="tfd", seeds=(0,)), {"trial": STUDY})
    with pytest.raises(ValueError, match="one run: give it one seed, such as --seeds 0"):
        compare.main(CompareConfig("trial", run="tffd"), {"trial": STUDY})


def test_a_study_is_stopped_resumed_and_reported_by_one_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(Path(compare.__file__).parents[2])
    # 57 images are left to train on, and epochs enough that none is through with them before it is told to stop.
    config = CompareConfig("digits", output=tmp_path, epochs=5, seeds=(0,), holdout=1380, jobs=2)
    metrics = [tmp_path / f"{name}-tffd_resnet20-s0" / "metrics.jsonl" for name in ("digits-plain", "digits-share")]

    def stop_once_one_has_begun() -> None:
        while not any(file.exists() for file in metrics):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    Thread(target=stop_once_one_has_begun, daemon=True).start()
    with pytest.raises(SystemExit) as left:
        compare.main(config)
    assert left.value.code == 128 + signal.SIGTERM
    assert "stopped after" in capsys.readouterr().out

    compare.main(config)
    resumed = capsys.readouterr().out
    assert "resuming" in resumed
    assert "0 failed" in resumed
    for file in metrics:
        assert [line["epoch"] for line in read_metrics(file) if line["kind"] == "eval"] == [1, 2, 3, 4, 5]

    compare.main(CompareConfig("digits", report=True, output=tmp_path))
    page = (tmp_path / "results" / "digits" / "README.md").read_text()
    assert "1,380 images held out of split `train` of digits" in page
    assert "`digits-share`" in page
