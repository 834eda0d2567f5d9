"""Reports: hand-worked statistics, what the sentences claim, and pages that come out the same byte for byte."""

from __future__ import annotations

import math
import random
import shutil
from pathlib import Path

import pytest
from run_records import PLAIN, TFFD, write_run

from recipes.studies.report import Published, Row, Study, collect, write_report
from recipes.studies.report.statistics import estimate, interval_factor, paired_differences, t_quantile
from tffd_zoo.recipe import vary

WORSE = vary(TFFD, "worse", data={"padding_mode": "reflect"})
NOISY = vary(TFFD, "noisy")
STUDY = Study(
    "trial",
    "does it help?",
    (
        Row(PLAIN, "cross-entropy alone", published=Published(69.06, "a poster")),
        Row(TFFD, "canonical", twin="plain", published=Published(70.62, "a poster", base=69.06)),
        Row(WORSE, "with another padding", twin="plain"),
        Row(NOISY, "as often up as down", twin="plain"),
    ),
    seeds=(0, 1, 2),
)
TOP1 = {
    "plain": [60.0, 61.0, 62.0],
    "tffd": [61.0, 62.1, 62.9],  # +1.0, +1.1, +0.9
    "worse": [59.0, 59.9, 61.1],  # -1.0, -1.1, -0.9
    "noisy": [61.0, 60.0, 62.0],  # +1, -1, 0
}


def collect_all(tmp_path: Path, seeds: int = 3, names: tuple[str, ...] = tuple(TOP1)) -> Path:
    """The folder of the collected records."""
    records = tmp_path / "results" / "records"
    for row in STUDY.rows:
        for seed in range(seeds if row.name in names else 0):
            collect(write_run(tmp_path / "runs", row.recipe, seed, TOP1[row.name][seed]), records)
    return records


def report(records: Path) -> Path:
    return write_report(STUDY, records, records.parent / "trial")


def table_row(page: str, name: str, section: str) -> list[str]:
    """Cells of the row of a recipe in the table of a section."""
    lines = page.split(f"## {section}\n")[1].split("\n## ")[0].splitlines()
    return next(
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith(f"| `{name}`")
    )


# --- statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    # a printed table of Student's t, 97.5 %
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_the_quantiles_are_those_of_the_printed_table(degrees: int, quantile: float) -> None:
    assert t_quantile(0.975, degrees) == pytest.approx(quantile, abs=5e-4)


def test_the_quantiles_of_one_and_two_degrees_have_closed_forms() -> None:
    for probability in (0.6, 0.9, 0.975, 0.999):
        alpha = 2 * probability - 1
        assert t_quantile(probability, 1) == pytest.approx(math.tan(math.pi * alpha / 2), rel=1e-9)
        assert t_quantile(probability, 2) == pytest.approx(alpha * math.sqrt(2 / (1 - alpha**2)), rel=1e-9)


def test_an_interval_worked_by_hand() -> None:
    # 1, 2, 3, 4, 5: mean 3, sum of squares 10, sd sqrt(10 / 4), t 2.776 with 4 degrees, sqrt(5) runs
    result = estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (result.mean, result.n) == (3.0, 5)
    assert result.sd == pytest.approx(1.5811388)
    assert result.half_width == pytest.approx(2.776445 * 1.5811388 / 2.2360680, rel=1e-6)
    assert (result.low, result.high) == pytest.approx((1.036757, 4.963243), abs=1e-5)
    assert result.verdict == "above"
    assert interval_factor(2) == pytest.approx(12.7062 / math.sqrt(2), rel=1e-5)


def test_the_interval_covers_the_mean_of_normal_values_nineteen_times_in_twenty() -> None:
    draw = random.Random(0)
    trials = [estimate([draw.gauss(1.0, 3.0) for _ in range(3)]) for _ in range(4000)]
    covered = sum(trial.low <= 1.0 <= trial.high for trial in trials) / len(trials)
    assert covered == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / 4000))


def test_one_value_has_neither_spread_nor_interval_nor_verdict() -> None:
    result = estimate([2.0])
    assert (result.sd, result.half_width, result.verdict) == (None, None, "unknown")


def test_differences_are_taken_between_runs_with_one_seed() -> None:
    assert paired_differences({0: 3.0, 1: 5.0, 7: 1.0}, {7: 4.0, 1: 1.0, 3: 9.0}) == {1: 4.0, 7: -3.0}


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_tables_show_hand_worked_means_differences_and_intervals(tmp_path: Path) -> None:
    page = report(collect_all(tmp_path)).read_text()

    assert table_row(page, "plain", "Accuracy")[2:] == ["2", "3", "61.00", "1.00", "62.00", "1.00", "69.06 [1]"]
    # differences 1.0, 1.1, 0.9: mean 1, sd 0.1, half-width 4.3027 * 0.1 / sqrt(3) = 0.248
    assert table_row(page, "tffd", "Against the twin")[1:] == [
        "`plain`", "3", "+1.00", "+0.75 to +1.25", "+1.00", "+0.75 to +1.25", "+1.56",
    ]  # fmt: skip
    # +1, -1, 0: sd 1, half-width 2.484
    assert table_row(page, "noisy", "Against the twin")[2:5] == ["3", "+0.00", "-2.48 to +2.48"]
    # median of 100, 1000 and 1000 over that of 80, 800 and 800
    assert table_row(page, "tffd", "Cost")[1:] == ["800", "1.25 (1.25 to 1.25)"]
    assert table_row(page, "tffd", "Gradient shares")[1:] == ["intra", "3", "5", "5"]


def test_the_sentences_say_what_is_significant_and_what_is_not(tmp_path: Path) -> None:
    page = report(collect_all(tmp_path)).read_text()
    assert "Better than the twin, the whole interval above zero: `tffd` (+1.00)." in page
    assert "Worse than the twin, the whole interval below zero: `worse` (-1.00)." in page
    assert "Not significant, zero lies in the interval: `noisy` (+0.00)." in page
    assert "There are 3 of them, not corrected for their number" in page
    assert "with 3 pairs the half-width is 2.5 standard deviations" in page
    assert "`worse` (data.padding_mode: zeros there, reflect here)" in page
    assert "Not measured: `plain`, `worse` and `noisy`." in page
    assert "the 10,000 images of split `test` of uoft-cs/cifar100" in page
    assert "not run yet" not in page


def test_one_seed_gets_no_interval_and_no_claim(tmp_path: Path) -> None:
    page = report(collect_all(tmp_path, seeds=1, names=("plain", "tffd"))).read_text()
    assert table_row(page, "tffd", "Against the twin")[2:5] == ["1", "+1.00", "none, n = 1"]
    assert "nothing can be said of significance: `tffd` (+1.00)" in page
    assert "Better than" not in page
    assert "**not run yet**: `plain` seed 1, `plain` seed 2, `tffd` seed 1" in page


def test_the_spread_over_seeds_is_the_scale_for_what_ran_once(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        collect(write_run(tmp_path / "runs", PLAIN, seed, 60.0 + seed), tmp_path / "records")
    collect(write_run(tmp_path / "runs", TFFD, 0, 63.0), tmp_path / "records")
    page = report(tmp_path / "records").read_text()
    assert "nothing but the seed have a standard deviation of 1.00 (`plain`, n = 3)." in page
    # Where every difference has an interval of its own, no other scale is wanted.
    assert "nothing but the seed" not in report(collect_all(tmp_path / "all")).read_text()


def test_held_out_images_are_not_called_the_test_set(tmp_path: Path) -> None:
    recipe = vary(PLAIN, "plain", data={"holdout": 5000})
    collect(write_run(tmp_path / "runs", recipe, 0, 60.0), tmp_path / "records")
    page = report(tmp_path / "records").read_text()
    assert "5,000 images held out of split `train` of uoft-cs/cifar100 (for choosing settings" in page
    assert "images of split `test`" not in page


def test_a_rebuilt_report_is_equal_byte_for_byte(tmp_path: Path) -> None:
    records = collect_all(tmp_path)
    page = report(records)
    files = ("README.md", "curves.png", "gains.png", "shares.png")
    first = {name: (page.parent / name).read_bytes() for name in files}
    elsewhere = tmp_path / "clone" / "of" / "it"
    shutil.copytree(records, elsewhere / "records")
    again = report(elsewhere / "records")
    assert again.parent == elsewhere / "trial"
    assert {name: (again.parent / name).read_bytes() for name in files} == first
    assert all(b"Matplotlib" not in first[name] for name in files[1:])


def test_a_report_follows_its_records(tmp_path: Path) -> None:
    records = collect_all(tmp_path)
    page = report(records)
    before = page.read_bytes()
    metrics = records / "tffd-s0" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"top1": 61.0', '"top1": 61.5'))
    pictures = {name: (page.parent / name).read_bytes() for name in ("curves.png", "gains.png")}
    assert report(records).read_bytes() != before
    assert all((page.parent / name).read_bytes() != picture for name, picture in pictures.items())


# --- records ----------------------------------------------------------------------------------------------------------


def test_collected_records_keep_no_path_of_this_machine(tmp_path: Path) -> None:
    here = tmp_path / "somewhere" / "cifar100"
    here.mkdir(parents=True)
    recipe = vary(TFFD, "tffd", data={"source": str(here)})
    run = write_run(tmp_path / "runs", recipe, 0, 60.0, data={"source": str(here), "revision": None})
    assert collect(run, tmp_path / "records")
    texts = [path.read_text() for path in (tmp_path / "records" / "tffd-s0").iterdir()]
    assert len(texts) == 4
    assert not any(str(tmp_path) in text for text in texts)
    assert any('"source": "cifar100"' in text for text in texts)


def test_collecting_again_changes_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs", TFFD, 0, 60.0)
    assert collect(run, tmp_path / "records")
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text().replace("60.0", "99.0"))
    assert not collect(run, tmp_path / "records")
    assert "99.0" not in (tmp_path / "records" / "tffd-s0" / "metrics.jsonl").read_text()


def test_a_run_of_another_recipe_does_not_take_the_place_of_a_collected_one(tmp_path: Path) -> None:
    collect(write_run(tmp_path / "runs", TFFD, 0, 60.0), tmp_path / "records")
    longer = write_run(tmp_path / "others", vary(TFFD, "tffd", optim={"lr": 0.2}), 0, 70.0)
    with pytest.raises(ValueError, match=r"another recipe \(optim.lr: 0.1 there, 0.2 here\); pass --results"):
        collect(longer, tmp_path / "records")


def test_an_unfinished_run_is_not_collected(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs", TFFD, 0, 60.0)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:3]))
    with pytest.raises(ValueError, match="has not ended"):
        collect(run, tmp_path / "records")
    assert not (tmp_path / "records").exists()


def test_a_record_that_is_missing_or_damaged_stops_the_report(tmp_path: Path) -> None:
    records = collect_all(tmp_path, names=("plain", "tffd"))
    (records / "tffd-s1" / "data.json").write_text('{"source": ')
    with pytest.raises(ValueError, match=r"tffd-s1.data.json is damaged"):
        report(records)
    (records / "tffd-s1" / "data.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"data\.json"):
        report(records)


def test_runs_on_different_images_are_not_compared(tmp_path: Path) -> None:
    records = tmp_path / "records"
    collect(write_run(tmp_path / "runs", PLAIN, 0, 60.0), records)
    others = {"eval": {"split": "train", "images": 5000, "fingerprint": "c"}}
    collect(write_run(tmp_path / "runs", TFFD, 0, 61.0, data=others), records)
    with pytest.raises(ValueError, match="'tffd' and its twin 'plain', seed 0, saw other images in eval"):
        report(records)


def test_a_study_without_runs_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no finished run of study 'trial'"):
        report(tmp_path)


def test_a_twin_has_to_be_another_recipe_of_the_study() -> None:
    with pytest.raises(ValueError, match="'tffd', the twin of 'worse', is no other recipe"):
        Study("s", "?", (Row(PLAIN, ""), Row(WORSE, "", twin="tffd")))
    with pytest.raises(ValueError, match="two recipes named plain"):
        Study("s", "?", (Row(PLAIN, ""), Row(PLAIN, "")))
