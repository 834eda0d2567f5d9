"""Reports: hand-worked statistics, what the sentences claim, and pages that come out the same byte for byte."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from run_records import PLAIN, TFFD, write_run

from recipes.studies.report import Published, Row, Study, changes, collect, index_text, report_text, write_report
from recipes.studies.report.charts import draw_lengths
from recipes.studies.report.statistics import Spread, estimate, estimate_gain, paired_differences, spread_of_runs
from tffd_zoo.recipe import vary
from tffd_zoo.tasks import CANONICAL, TeacherConfig

LAST = "After the last epoch"
STUDY = Study(
    "trial",
    "does it help?",
    PLAIN,
    (
        Row("plain", "cross-entropy alone", published=Published(69.06, "a poster")),
        Row("tffd", "canonical", {"tffd": CANONICAL}, "plain", published=Published(70.62, "a poster", base=69.06)),
        Row("worse", "with another padding", {"tffd": CANONICAL, "data": {"padding_mode": "reflect"}}, "plain"),
        Row("noisy", "as often up as down", {"tffd": CANONICAL}, "plain"),
    ),
    seeds=(0, 1, 2),
)
TOP1 = {
    "plain": [60.0, 61.0, 62.0],
    "tffd": [61.0, 62.1, 62.9],  # +1.0, +1.1, +0.9
    "worse": [59.0, 59.9, 61.1],  # -1.0, -1.1, -0.9
    "noisy": [60.4, 60.6, 62.0],  # +0.4, -0.4, 0
}


def collect_all(tmp_path: Path, seeds: int = 3, names: tuple[str, ...] = tuple(TOP1)) -> Path:
    """The folder of the collected records."""
    records = tmp_path / "results" / "records"
    for row in STUDY.rows:
        for seed in range(seeds if row.name in names else 0):
            collect(write_run(tmp_path / "runs", STUDY.recipe(row.name), seed, TOP1[row.name][seed]), records)
    return records


def collect_pair(tmp_path: Path, seed: int, **environment: object) -> Path:
    """A pair of runs, of which that with Tf-FD has something else in its environment; the folder of the records."""
    plain, tffd = (write_run(tmp_path / "runs", recipe, seed, 60.0) for recipe in (PLAIN, TFFD))
    about = tffd / "environment.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | environment))
    for run in (plain, tffd):
        collect(run, tmp_path / "records")
    return tmp_path / "records"


def report(records: Path) -> Path:
    return write_report(STUDY, records, records.parent / "trial")


def table_row(page: str, name: str, section: str) -> list[str]:
    """Cells of the row of a recipe in the table of a section."""
    lines = page.split(f"## {section}\n")[1].split("\n## ")[0].splitlines()
    return next(
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith(f"| `{name}`")
    )


# --- statistics -------------------------------------------------------------------------------------------------------


def test_an_interval_worked_by_hand() -> None:
    # 1, 2, 3, 4, 5: mean 3, sum of squares 10, sd sqrt(10 / 4), t 2.776 with 4 degrees, sqrt(5) runs
    result = estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (result.mean, result.n) == (3.0, 5)
    assert result.sd == pytest.approx(1.5811388)
    assert result.half_width() == pytest.approx(2.776445 * 1.5811388 / 2.2360680, rel=1e-6)
    assert (result.low, result.high) == pytest.approx((1.036757, 4.963243), abs=1e-5)
    assert result.verdict == "above"
    # a printed table of Student's t with 4 degrees, 99.5 %: at this level zero is not excluded
    assert result.half_width(0.99) == pytest.approx(4.604 * 1.5811388 / 2.2360680, rel=1e-3)
    assert result.excludes_zero()
    assert not result.excludes_zero(0.99)


def test_one_value_has_neither_spread_nor_interval_nor_verdict() -> None:
    result = estimate([2.0])
    assert (result.sd, result.error, result.verdict) == (None, None, "unknown")


def test_differences_are_taken_between_runs_with_one_seed() -> None:
    assert paired_differences({0: 3.0, 1: 5.0, 7: 1.0}, {7: 4.0, 1: 1.0, 3: 9.0}) == {1: 4.0, 7: -3.0}


def test_the_spread_of_runs_is_what_recipes_and_seeds_do_not_explain() -> None:
    # Means of rows 1, 2 and 6, of columns 7/3 and 11/3, of all 3. Less those of its row and column, plus that of all, a
    # value is -1/3 1/3, 2/3 -2/3 and -1/3 1/3: squares of 12/9 in all, over (3 - 1)(2 - 1) degrees.
    layout = [{0: 0.0, 1: 2.0}, {0: 2.0, 1: 2.0}, {0: 5.0, 1: 7.0}]
    assert spread_of_runs(layout) == Spread(pytest.approx(math.sqrt(2 / 3)), 2)


def test_two_recipes_have_the_interval_of_students_paired_t() -> None:
    ours, theirs = {0: 61.0, 1: 62.1, 2: 62.9}, {0: 60.3, 1: 61.0, 2: 62.0}
    differences = [*paired_differences(ours, theirs).values()]
    spread = spread_of_runs([theirs, ours])
    assert estimate_gain(differences, spread).half_width() == pytest.approx(estimate(differences).half_width())


def test_a_run_that_nothing_is_held_against_says_nothing_of_the_spread() -> None:
    pair = [{0: 1.0, 1: 2.0}, {0: 3.0, 1: 5.0}]
    assert spread_of_runs(pair) == Spread(pytest.approx(0.5), 1)  # differences 2 and 3: sd sqrt(1/2), over sqrt(2)
    assert spread_of_runs([*pair, {0: 9.0}]) == Spread(pytest.approx(0.5), 1)  # one run of a recipe
    assert spread_of_runs([{**pair[0], 2: 9.0}, pair[1]]) == Spread(pytest.approx(0.5), 1)  # the only run of a seed
    assert spread_of_runs([{0: 1.0}, {0: 3.0}]) is None


def test_a_single_pair_has_no_interval_however_well_the_spread_is_known() -> None:
    assert estimate_gain([2.0], Spread(0.5, 20)).error is None


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_tables_show_hand_worked_means_differences_and_intervals(tmp_path: Path) -> None:
    page = report_text(STUDY, collect_all(tmp_path))

    assert table_row(page, "plain", LAST)[2:] == ["2", "3", "61.00", "1.00", "-", "-", "-", "69.06 [1]"]
    # Less the means of rows and seeds the values are -.1 .1 0, -.1 .2 -.1, -.1 0 .1 and .3 -.3 0. Their squares sum to
    # .28 and have (4 - 1)(3 - 1) degrees: sd .216, half-width 2.4469 * .216 * sqrt(2 / 3) = .432.
    assert table_row(page, "tffd", LAST)[6:] == ["`plain`", "+1.00", "+0.57 to +1.43", "70.62, +1.56 [1]"]
    assert table_row(page, "noisy", LAST)[7:9] == ["+0.00", "-0.43 to +0.43"]
    # median of 100, 1000 and 1000 over that of 80, 800 and 800
    assert table_row(page, "tffd", "Cost")[1:] == ["800", "1.25 (1.25 to 1.25)"]
    assert table_row(page, "tffd", "Gradient shares")[1:] == ["intra", "3", "5", "5"]


@pytest.mark.parametrize(("what", "value"), [("hardware", "another CPU"), ("threads", 1)])
def test_runs_on_unlike_machines_give_no_ratio_of_times(tmp_path: Path, what: str, value: object) -> None:
    page = report_text(STUDY, collect_pair(tmp_path, 0, **{what: value}))
    assert table_row(page, "tffd", "Cost")[1:] == ["800", "-"]


def test_a_ratio_of_times_by_different_commits_is_starred_and_makes_way_for_one_of_the_same(tmp_path: Path) -> None:
    page = report_text(STUDY, collect_pair(tmp_path, 1, commit="fedcba9876543210"))
    # medians of 100, 1000, 1010 and of 80, 800, 810
    assert table_row(page, "tffd", "Cost")[1:] == ["800", "1.25 *"]
    assert "* Of runs by different commits, between which the code may have become faster or slower." in page
    page = report_text(STUDY, collect_pair(tmp_path, 0))
    assert table_row(page, "tffd", "Cost")[1:] == ["800", "1.25"]
    assert "different commits" not in page


def test_the_sentences_say_what_is_significant_and_what_is_not(tmp_path: Path) -> None:
    page = report_text(STUDY, collect_all(tmp_path))
    assert "Better than the twin, the whole interval above zero: `tffd` (+1.00)." in page
    assert "Worse than the twin, the whole interval below zero: `worse` (-1.00)." in page
    assert "Not significant, zero lies in the interval: `noisy` (+0.00)." in page
    assert "(all recipes are taken to scatter alike): 0.22 with 6 degrees of freedom (`plain` and its rows)." in page
    # 3 intervals, each at 1 - 0.05 / 3: t 3.29 with 6 degrees, half-width 0.58
    assert "Without any effect each of the 3 excludes zero in 1 of 20 studies" in page
    assert "widened for their number (Bonferroni), `tffd` and `worse` still do." in page
    assert "`worse` (data.padding_mode: zeros there, reflect here)" in page
    assert "Not measured: `plain`, `worse` and `noisy`." in page
    assert "the 10,000 images of split `test` of uoft-cs/cifar100" in page
    assert "not run yet" not in page


def test_one_seed_gets_no_interval_and_no_claim(tmp_path: Path) -> None:
    page = report_text(STUDY, collect_all(tmp_path, seeds=1, names=("plain", "tffd")))
    assert table_row(page, "tffd", LAST)[3:9] == ["1", "61.00", "-", "`plain`", "+1.00", "none, n = 1"]
    assert "nothing can be said of significance: `tffd` (+1.00)" in page
    assert "Better than" not in page
    assert "**seeds not run yet**: `plain` 1 and 2; `tffd` 1 and 2; `worse`" in page


def test_the_spread_over_seeds_is_the_scale_for_what_ran_once(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        collect(write_run(tmp_path / "runs", PLAIN, seed, 60.0 + seed), tmp_path / "records")
    collect(write_run(tmp_path / "runs", TFFD, 0, 63.0), tmp_path / "records")
    page = report_text(STUDY, tmp_path / "records")
    assert "nothing but the seed have a standard deviation of 1.00 (`plain`, n = 3)." in page
    # Where every difference has an interval of its own, no other scale is wanted.
    assert "nothing but the seed" not in report_text(STUDY, collect_all(tmp_path / "all"))


def test_a_moving_average_of_the_weights_has_a_table_of_its_own(tmp_path: Path) -> None:
    for name, top1 in (("plain", 60.0), ("tffd", 62.0)):
        run = write_run(tmp_path / "runs", STUDY.recipe(name), 0, top1)
        metrics = run / "metrics.jsonl"
        metrics.write_text(metrics.read_text().replace('"top1": 6', '"ema_top1": 7.5, "top1": 6'))
        collect(run, tmp_path / "records")
    page = report_text(STUDY, tmp_path / "records")
    assert table_row(page, "tffd", "The moving average of the weights")[4:8] == ["7.50", "-", "`plain`", "+0.00"]
    assert table_row(page, "tffd", LAST)[4:8] == ["62.00", "-", "`plain`", "+2.00"]


def test_the_index_counts_what_excludes_zero_and_links_to_every_page(tmp_path: Path) -> None:
    other = Study("unrun", "what else?", PLAIN, (Row("elsewhere", "never run"),))
    index = index_text([STUDY, other], collect_all(tmp_path), tmp_path)
    row = next(line for line in index.splitlines() if line.startswith("| [trial](trial/README.md)"))
    assert [cell.strip() for cell in row.strip("|").split("|")][2:] == ["12 of 2 epochs, test images", *"1110"]
    assert "3 have an interval" in index
    assert "2 of those exclude zero: `tffd` (+1.00, n = 3) and `worse` (-1.00, n = 3)." in index
    assert "unrun" not in index
    assert "Does Tf-FD help?" not in index


def test_the_index_opens_with_what_the_deciding_studies_say_of_tffd(tmp_path: Path) -> None:
    study = replace(STUDY, decides=True)
    index = index_text([study], collect_all(tmp_path / "all"), tmp_path)
    assert "of 2 epochs and more, of the 3 settings of Tf-FD with several seeds the whole 95 % interval is b" in index
    better = "better than plain training for `tffd` (tffd_resnet20, 2 epochs: +1.00 points, +0.57 to +1.43, n = 3), "
    worse = "and worse for `worse` (tffd_resnet20, 2 epochs: -1.00 points, -1.43 to -0.57, n = 3)."
    assert better + worse in index  # -1 and +1 by .432
    assert "widened for the number of settings (Bonferroni), they exclude zero for `tffd` and `worse`." in index
    assert "3 settings of Tf-FD ran with 3 seeds: 1 shown to be better than the twin, 1 shown to be worse, 1 u" in index
    assert "The intervals (95 %) reach from -1.43 to +1.43 points" in index  # -1 and +1 by .432
    assert "(trial/gains.png)" in index

    once = index_text([study], collect_all(tmp_path / "once", seeds=1), tmp_path)
    assert "no setting of Tf-FD has several seeds, so nothing is shown." in once
    assert "shows nothing by itself: `tffd` (+1.00), `worse` (-1.00) and `noisy` (+0.40)." in once
    assert "The intervals (95 %) reach" not in once

    pair = index_text([study], collect_all(tmp_path / "pair", names=("plain", "tffd")), tmp_path)
    assert "1 setting of Tf-FD ran with 3 seeds: 1 shown to be better than the twin, 0 shown to be worse, 0 u" in pair
    assert "The interval (95 %) reaches from " in pair
    single = index_text([study], collect_all(tmp_path / "single", seeds=1, names=("plain", "tffd")), tmp_path)
    assert "One pair of runs, which shows nothing by itself: `tffd` (+1.00)." in single

    assert "Does Tf-FD help?" not in index_text([study], collect_all(tmp_path / "plain", names=("plain",)), tmp_path)


def test_a_gain_that_stands_alone_can_fall_once_every_setting_that_was_tried_is_counted(tmp_path: Path) -> None:
    study = replace(STUDY, decides=True)
    records = collect_all(tmp_path, names=("plain", "worse", "noisy"))
    for seed, top1 in enumerate(TOP1["tffd"]):  # +0.5 in place of +1
        collect(write_run(tmp_path / "runs", STUDY.recipe("tffd"), seed, top1 - 0.5), records)
    # Student's t with 6 degrees: 2.447 at 95 %, so +0.5 by .432; 3.287 at 98.33 %, for three settings, so by .580
    alone = (
        "of the 3 settings of Tf-FD with several seeds the whole 95 % interval is better than plain training for `tffd`"
    )
    left = "Once the intervals are widened for the number of settings (Bonferroni), they exclude zero for `worse`."
    for studies in ([study], [study, replace(study, name="again")]):  # a setting of two studies is one setting
        index = index_text(studies, records, tmp_path)
        assert alone in index
        assert left in index


def test_held_out_images_are_not_called_the_test_set(tmp_path: Path) -> None:
    recipe = vary(PLAIN, "plain", data={"holdout": 5000})
    collect(write_run(tmp_path / "runs", recipe, 0, 60.0), tmp_path / "records")
    page = report_text(STUDY, tmp_path / "records")
    assert "5,000 images held out of split `train` of uoft-cs/cifar100 (for choosing settings" in page
    assert "images of split `test`" not in page


def test_a_rebuilt_report_is_equal_byte_for_byte(tmp_path: Path) -> None:
    records = collect_all(tmp_path)
    page = report(records)
    files = ("README.md", "gains.png")
    first = {name: (page.parent / name).read_bytes() for name in files}
    elsewhere = tmp_path / "clone" / "of" / "it"
    shutil.copytree(records, elsewhere / "records")
    again = report(elsewhere / "records")
    assert again.parent == elsewhere / "trial"
    assert {name: (again.parent / name).read_bytes() for name in files} == first
    assert all(b"Matplotlib" not in first[name] for name in files[1:])


def test_top1_is_drawn_against_epochs_where_recipes_ran_in_several_lengths(tmp_path: Path) -> None:
    rows = [
        Row(f"{name}-{epochs}", name, {"optim": {"epochs": epochs}}) for epochs in (1, 2) for name in ("plain", "tffd")
    ]
    study = Study("lengths", "what do more epochs give?", PLAIN, (*rows, Row("other", "in one length")))
    records = tmp_path / "results" / "records"
    for row, top1 in zip(rows, (60.0, 61.0, 64.0, 63.0), strict=True):
        collect(write_run(tmp_path / "runs", study.recipe(row.name), 0, top1), records)
    collect(write_run(tmp_path / "runs", study.recipe("plain-2"), 1, 65.0), records)
    collect(write_run(tmp_path / "runs", study.recipe("other"), 0, 50.0), records)
    page = write_report(study, records, tmp_path / "page")
    assert "![Top-1 against the number of epochs](lengths.png)" in page.read_text()
    assert (tmp_path / "page" / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert "lengths.png" not in report(collect_all(tmp_path / "one length")).read_text()


def test_the_curve_of_lengths_goes_through_the_means_and_shows_every_run() -> None:
    axes = draw_lengths({"plain": {8: [64.0, 65.0], 4: [60.0]}, "tffd": {4: [61.0], 8: [63.0]}}).axes[0]
    drawn = [[tuple(map(float, point)) for point in line.get_xydata()] for line in axes.get_lines()]
    assert drawn == [[(4, 60), (8, 64.5)], [(4, 60), (8, 64), (8, 65)], [(4, 61), (8, 63)], [(4, 61), (8, 63)]]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["4", "8"]


def test_the_curve_of_lengths_shows_what_ran_in_one_length_as_dots() -> None:
    axes = draw_lengths({"plain": {4: [60.0], 8: [64.0]}, "tffd": {8: [63.0, 65.0]}}).axes[0]
    *_, dots = axes.get_lines()
    assert [tuple(map(float, point)) for point in dots.get_xydata()] == [(8, 63), (8, 65)]
    handles, labels = axes.get_legend_handles_labels()
    assert labels == ["plain", "tffd"]
    assert handles[1] is dots


def test_a_report_follows_its_records(tmp_path: Path) -> None:
    records = collect_all(tmp_path)
    page = report(records)
    before = page.read_bytes()
    record, picture = records / "tffd-s0.json", (page.parent / "gains.png").read_bytes()
    record.write_text(record.read_text().replace('"top1":61.0', '"top1":61.5'))
    assert report(records).read_bytes() != before
    assert (page.parent / "gains.png").read_bytes() != picture


# --- records ----------------------------------------------------------------------------------------------------------


def test_collected_records_keep_no_path_of_this_machine(tmp_path: Path) -> None:
    here = tmp_path / "somewhere" / "cifar100"
    here.mkdir(parents=True)
    recipe = vary(TFFD, "tffd", data={"source": str(here)})
    run = write_run(tmp_path / "runs", recipe, 0, 60.0, data={"source": str(here), "revision": None})
    assert collect(run, tmp_path / "records")
    text = (tmp_path / "records" / "tffd-s0.json").read_text()
    assert str(tmp_path) not in text
    assert '"source":"cifar100"' in text


def test_collecting_again_changes_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs", TFFD, 0, 60.0)
    assert collect(run, tmp_path / "records")
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text().replace("60.0", "99.0"))
    assert not collect(run, tmp_path / "records")
    assert "99.0" not in (tmp_path / "records" / "tffd-s0.json").read_text()


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


def test_a_damaged_record_stops_the_report(tmp_path: Path) -> None:
    records = collect_all(tmp_path, names=("plain", "tffd"))
    (records / "tffd-s1.json").write_text('{"recipe": ')
    with pytest.raises(ValueError, match=r"tffd-s1.json is damaged"):
        report(records)
    (records / "tffd-s1.json").write_text('{"recipe": {}}')
    with pytest.raises(ValueError, match=r"tffd-s1.json is damaged \(it lacks 'environment'\); restore it from git"):
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


# --- studies ----------------------------------------------------------------------------------------------------------


def test_a_recipe_is_that_of_the_twin_with_what_the_row_changes() -> None:
    assert STUDY.recipe("plain") == PLAIN
    assert STUDY.recipe("worse") == vary(PLAIN, "worse", tffd=CANONICAL, data={"padding_mode": "reflect"})
    deeper = Study("s", "?", PLAIN, (*STUDY.rows, Row("deeper", "", {"tffd": {"ratio": 0.9}}, "worse", seeds=(7,))))
    assert deeper.recipe("deeper") == vary(STUDY.recipe("worse"), "deeper", tffd={"ratio": 0.9}, run={"seed": 7})


def test_a_student_learns_from_the_last_weights_of_its_teachers_run() -> None:
    rows = (
        Row("big", "", {"model": "tffd_resnet56"}, seeds=(100,)),
        Row("taught", "", {"teacher": TeacherConfig("offline", "tffd_resnet56")}, teacher="big"),
    )
    teacher = Study("s", "?", PLAIN, rows).recipe("taught").teacher
    assert teacher is not None
    assert teacher.weights == Path("runs/big-tffd_resnet56-s100/weights/last.safetensors")


@pytest.mark.parametrize("role", ["twin", "teacher"])
def test_a_twin_or_teacher_is_a_row_before(role: str) -> None:
    with pytest.raises(ValueError, match=f"'tffd', the {role} of 'worse', is no row before it; choose one of plain"):
        Study("s", "?", PLAIN, (Row("plain", ""), Row("worse", "", **{role: "tffd"}), Row("tffd", "")))
    with pytest.raises(ValueError, match="two rows named plain"):
        Study("s", "?", PLAIN, (Row("plain", ""), Row("plain", "")))


def test_a_record_from_before_a_field_was_renamed_is_still_of_the_same_run(tmp_path: Path) -> None:
    recorded = STUDY.recipe("tffd").to_dict()
    recorded["optim"]["warmup_epochs"] = recorded["optim"].pop("lr_warmup_epochs")
    recorded["tffd"]["repair_every"] = recorded["tffd"].pop("rank_every")
    recorded["tffd"]["warmup"] = recorded["tffd"].pop("warmup_fraction")
    assert changes(STUDY.recipe("tffd").to_dict(), recorded) == []
    recorded["tffd"]["warmup"] = 0.5
    assert [line.split(":")[0] for line in changes(STUDY.recipe("tffd").to_dict(), recorded)] == [
        "tffd.warmup_fraction"
    ]
