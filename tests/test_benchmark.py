"""recipes.studies.benchmark: that its figures are what they are called, and prices that do not depend on the clock."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from recipes.studies import benchmark
from recipes.studies.benchmark import BenchmarkConfig
from recipes.studies.imagenet_cost import imagenet_page
from recipes.studies.prices import TrainingStep, open_bench, twins
from recipes.studies.timing import Row, compare, interleave, peak_memory, summary

# --- figures ----------------------------------------------------------------------------------------------------------


def test_steps_take_turns_and_the_first_rounds_do_not_count() -> None:
    taken: list[str] = []
    steps = {name: (lambda name=name: taken.append(name)) for name in "abc"}
    times = interleave(steps, rounds=3, warmup=1)
    assert "".join(taken) == "abcbcacababc"
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_ratio_is_the_median_of_those_of_the_same_round() -> None:
    # Rounds of 2/1, 9/3 and 40/10: the medians 9 and 3 alone would give 3 and hide that the rounds differ.
    row = compare("part", "what", [2.0, 9.0, 40.0], [1.0, 3.0, 10.0], bound="<=", target=3.0)
    assert (row.median, row.low, row.high, row.n) == (3.0, 2.0, 4.0, 3)
    assert row.seconds == (9.0, 3.0)
    assert row.met


@pytest.mark.parametrize(("bound", "target", "met"), [("<=", 2.0, True), ("<=", 1.9, False), (">=", 2.1, False)])
def test_a_target_is_met_or_not(bound: str, target: float, met: bool) -> None:
    assert summary("part", "what", [2.0], bound=bound, target=target).met is met


def test_peak_memory_is_what_lies_there_and_the_worst_moment_on_top() -> None:
    batch = torch.ones(1000, 1000)  # 4 MB

    def step() -> None:
        first = batch * 2
        second = first * 2  # 8 MB on top of the batch
        del first
        second.sum()

    assert peak_memory(step, nn.Identity(), [batch]) == pytest.approx(12e6, rel=0.01)


# --- prices -----------------------------------------------------------------------------------------------------------


def test_tffd_needs_three_percent_more_memory_at_most_than_plain_training() -> None:
    with open_bench("digits") as bench:
        tffd, plain = (TrainingStep(recipe, bench).memory for recipe in twins("tffd_resnet20", 32, 128).values())
    assert 1 < tffd / plain <= 1.03


# --- pages ------------------------------------------------------------------------------------------------------------


def record(folder: Path) -> None:
    rows = [
        Row("methods", "Tf-FD / plain", 1.01, 1.0, 1.02, 9),
        Row("steps", "resnet50 at 224 px, batch 8, eager", 1.04, 1.03, 1.05, 9),
        Row("importing", "import", 40.0, 39.0, 41.0, 5, unit="ms", bound="<=", target=150.0),
        Row("streaming", "images/s from the disk, 2 workers", 200.0, 190.0, 210.0, 3, unit="images/s"),
    ]
    about = {"hardware": "a CPU", "threads": 2, "packages": {"torch": "2", "timm": "1"}, "commit": None}
    measured = {row.part: about for row in rows} | {"importing": about | {"threads": 1}}
    content = {"measured": measured, "rows": [dataclasses.asdict(row) for row in rows]}
    (folder / "benchmark.json").write_text(json.dumps(content))


def test_the_page_and_the_picture_come_from_the_record(tmp_path: Path) -> None:
    record(tmp_path)
    benchmark.main(BenchmarkConfig(output=tmp_path, report=True))
    page = (tmp_path / "README.md").read_text()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if "| import" in line]
    assert "Measured on a CPU, 2 thread(s), torch 2, timm 1, at commit unknown (methods, steps, streaming)." in page
    assert "Measured on a CPU, 1 thread(s), torch 2, timm 1, at commit unknown (importing)." in page
    assert cells[-1] == ["import", "40.0 ms", "39.0 to 41.0", "5", "<= 150", "yes"]
    assert (tmp_path / "methods.png").read_bytes().startswith(b"\x89PNG")


def test_the_words_about_a_part_are_paragraphs_and_no_code() -> None:
    page = (benchmark.RESULTS / "README.md").read_text()
    assert "\n\nBeside it what memory allows" in page
    assert "\n    " not in page


def test_a_part_that_does_not_exist_is_refused_and_so_is_a_report_on_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no part step; choose from steps, remains"):
        benchmark.main(BenchmarkConfig(parts=("step",), output=tmp_path))
    with pytest.raises(ValueError, match=r"holds no figures: run the benchmark without --report first"):
        benchmark.main(BenchmarkConfig(report=True, output=tmp_path))


def test_imagenet_on_paper_follows_from_the_ratios(tmp_path: Path) -> None:
    record(tmp_path)
    benchmark.main(BenchmarkConfig(output=tmp_path, report=True))
    page = (tmp_path / "imagenet.md").read_text()
    # ResNet-50: 25.557 M gradients of 4 bytes, 7/8 of them sent twice; 256 + 512 + 1024 + 2048 channels.
    assert "178.9 MB" in page
    assert "26.9 KB" in page
    # Its features: 256 x 56^2 + 512 x 28^2 + 1024 x 14^2 + 2048 x 7^2 numbers.
    assert "6.02 MB" in page
    assert "108 MB/s" in page  # 138 GB / 1,281,167 images x 1,000 a second
    # 1,281,167 images, 100 epochs, 1,000 a second: 35.6 hours, 37.0 at 1.04; a worker decodes 100 a second.
    assert "35.6" in page
    assert "37.0" in page
    row = next(line for line in page.splitlines() if "1,281,167" in line)
    assert [cell.strip() for cell in row.strip("|").split("|")][5] == "10"


def test_imagenet_on_paper_waits_until_steps_were_measured(tmp_path: Path) -> None:
    record(tmp_path)
    place = tmp_path / "benchmark.json"
    content = json.loads(place.read_text())
    del content["measured"]["steps"]
    content["rows"] = [row for row in content["rows"] if row["part"] != "steps"]
    place.write_text(json.dumps(content))
    benchmark.main(BenchmarkConfig(output=tmp_path, report=True))
    assert (tmp_path / "README.md").exists()
    assert not (tmp_path / "imagenet.md").exists()


def test_the_committed_pages_are_what_the_committed_figures_make_to_the_byte() -> None:
    place = benchmark.RESULTS
    measured = json.loads((place / "benchmark.json").read_text())
    assert benchmark.page(measured) == (place / "README.md").read_text()
    assert imagenet_page(measured) == (place / "imagenet.md").read_text()
    assert (place / "methods.png").exists()
