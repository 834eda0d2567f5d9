"""What a run recorded, and how its reader takes files that are damaged."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from run_records import PLAIN, TFFD, write_run

from tffd_zoo.run_record import RunRecord, read_metrics, read_recipe


def test_a_record_tells_of_the_last_and_the_best_epoch(tmp_path: Path) -> None:
    record = RunRecord.read(write_run(tmp_path, TFFD, 3, 70.0))
    assert (record.name, record.seed) == ("tffd", 3)
    assert (record.last, record.best) == (70.0, 71.0)  # the first epoch of two was a point better
    assert record.evaluation("last")["epoch"] == 2
    assert record.evaluation("best")["epoch"] == 1
    assert record.finished
    assert record.images_per_second == 800  # the median of 80, 800 and 830: the first line counts for little
    assert record.shares == {"intra": [(1, 0.05), (2, 0.05)], "inter": [(1, 0.02), (2, 0.02)]}


def test_a_run_without_an_epoch_has_a_record_and_is_not_finished(tmp_path: Path) -> None:
    run = write_run(tmp_path, PLAIN, 0, 70.0)
    (run / "metrics.jsonl").write_text("")
    assert RunRecord.read(run).epochs_done == 0
    with pytest.raises(ValueError, match="has not ended"):
        RunRecord.read_finished(run)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    assert read_recipe(tmp_path) is None
    run = write_run(tmp_path, PLAIN, 0, 70.0)
    (run / "data.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"plain-0 holds no record of a run: it has no data\.json"):
        RunRecord.read(run)


def test_a_metrics_line_that_a_killed_process_left_unfinished_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1, "epoch": 0.5}\n{"kind": "tr')
    assert read_metrics(path) == [{"kind": "train", "step": 1, "epoch": 0.5}]


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_text(""),
        lambda file: file.write_text("{"),
        lambda file: file.write_text("[]\n"),
        lambda file: file.write_text("null\n"),
        lambda file: file.write_text("{}\n"),
        lambda file: file.write_bytes(b"\x80\xff\n"),
        lambda file: file.write_bytes(bytes(40)),
        lambda file: (file.unlink(), os.mkfifo(file)),
        lambda file: (file.unlink(), file.mkdir()),
    ],
    ids=["empty", "cut", "a list", "null", "nothing in it", "no text", "zeros", "a pipe", "a folder"],
)
@pytest.mark.parametrize("name", ["recipe.json", "environment.json", "data.json", "metrics.jsonl"])
def test_a_damaged_file_is_named_in_one_line_with_the_mend(
    tmp_path: Path, name: str, damage: Callable[[Path], object]
) -> None:
    run = write_run(tmp_path, PLAIN, 0, 70.0)
    damage(run / name)
    if name == "metrics.jsonl" and (run / name).is_file() and b"\n" not in (run / name).read_bytes():
        assert RunRecord.read(run).metrics == ()  # an unfinished line, or none yet
        return
    with pytest.raises(ValueError, match=rf"{name}(, line 1)? is (damaged|no regular file)") as caught:
        RunRecord.read(run)
    assert "restore" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_damaged_line_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = json.dumps({"kind": "train", "step": 1, "epoch": 0.5})
    for bad in ("{", "3", '{"kind": "train", "epoch": 1}'):
        path.write_text(f"{good}\n{bad}\n{good}\n")
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is damaged .*; delete that line"):
            read_metrics(path)
