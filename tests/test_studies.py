"""Every row of every study: it starts, takes a step, and differs from its twin in what it says."""

from __future__ import annotations

import copy
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from recipes.studies.compare import RESULTS
from recipes.studies.report import Study, index_text, report_text
from recipes.studies.report.records import read_records
from recipes.studies.studies import PILOT, STUDIES
from tffd_zoo.data import ImageSource, open_source
from tffd_zoo.recipe import Recipe, differences, vary
from tffd_zoo.tasks import DistillationTask, DropConfig, PSKDConfig
from tffd_zoo.training import build, train

ROOT = Path(__file__).parents[1]
PRESETS: dict[str, Recipe] = runpy.run_path(str(ROOT / "recipes" / "train_cifar100.py"))["PRESETS"]
ROWS = {row.name: (study, row) for study in STUDIES.values() for row in study.rows}
RECIPES = {name: study.recipe(name) for name, (study, _) in ROWS.items()}


@pytest.fixture(scope="module")
def digits() -> ImageSource:
    return open_source("digits", "train")


@pytest.fixture(scope="module")
def trained_teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of all teachers, not that they ever ran."""
    folder = tmp_path_factory.mktemp("teachers")
    taught = [recipe for recipe in (*RECIPES.values(), *PRESETS.values()) if recipe.teacher and recipe.teacher.weights]
    for file, model in sorted({(r.teacher.weights, r.teacher.model) for r in taught if r.teacher}):
        assert file is not None
        torch.manual_seed(0)
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        save_file(timm.create_model(model, num_classes=10).state_dict(), folder / file)
    return folder


def task_and_batch(recipe: Recipe, digits: ImageSource) -> tuple[DistillationTask, tuple[torch.Tensor, ...]]:
    """What the loop makes of a recipe, and four images."""
    torch.manual_seed(0)
    model = timm.create_model(recipe.model, num_classes=10)
    spec = build.image_spec(vary(recipe, recipe.name, data={"image_size": 8}), model)
    mixup = build.make_mixup(vary(recipe, recipe.name, data={"drop_last": True}), digits, 1)
    task = build.make_task(recipe, model, spec, digits, batches_per_epoch=1)
    images, targets = torch.randn(16, 3, 8, 8), torch.tensor([0, 1, 2, 3] * 4)
    if mixup is not None:
        images, targets = mixup(images, targets)
    return task, (images, targets, torch.arange(16))


def method(recipe: Recipe) -> str:
    """All that makes the task; rows that agree in it need one trial between them."""
    whole = recipe.to_dict()
    smoothing, cutmix = whole["optim"]["label_smoothing"], whole["optim"]["cutmix"]
    return json.dumps([whole | dict.fromkeys(("name", "model", "optim", "run", "data")), smoothing, cutmix])


METHODS = {method(recipe): name for name, recipe in (RECIPES | PRESETS).items()}


@pytest.mark.parametrize("name", sorted(METHODS.values()))
def test_a_recipe_takes_a_step_and_its_losses_in_bf16_are_float32_numbers_near_those_of_float32(
    name: str, digits: ImageSource, trained_teachers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained_teachers)
    recipe = (PRESETS | RECIPES)[name]
    task, batch = task_and_batch(recipe, digits)
    task.choose_lambdas([batch])
    results = []
    for reduced in (False, True):
        torch.manual_seed(1)  # what is dropped
        trial = copy.deepcopy(task)
        with torch.autocast("cpu", torch.bfloat16, enabled=reduced):
            results.append(trial(*batch))
        results[-1]["loss"].backward()
        assert all(p.grad is not None for p in trial.parameters() if p.requires_grad)
    exact, rounded = results
    losses = {"loss", "ce", *task.weights}
    assert losses <= exact.keys()
    assert task.get_eval_model().state_dict().keys() == timm.create_model(recipe.model).state_dict().keys()
    assert (recipe.tffd is not None) == bool({"intra", "inter"} & set(exact))
    for loss in losses:
        assert exact[loss].isfinite()
        assert rounded[loss].dtype == torch.float32
        # bf16 has 8 bits; a channel or two may change its place in the order, too.
        torch.testing.assert_close(rounded[loss], exact[loss], rtol=0.01 if loss in ("loss", "ce") else 0.1, atol=0)


def test_names_are_those_of_the_recipes_and_every_run_has_a_folder_of_its_own() -> None:
    assert all(name == recipe.name for name, recipe in PRESETS.items())
    folders = [recipe.folder for recipe in (*PRESETS.values(), *RECIPES.values())]
    assert len(set(folders)) == len(folders)


def test_a_row_that_several_studies_have_is_one_run() -> None:
    for study in STUDIES.values():
        for row in study.rows:
            assert study.recipe(row.name) == RECIPES[row.name]
            assert study.seeds_of(row) == ROWS[row.name][0].seeds_of(ROWS[row.name][1])


def test_a_row_differs_from_its_twin_in_what_it_says() -> None:
    def changes(name: str) -> set[str]:
        twin = ROWS[name][1].twin
        assert twin is not None
        found = differences(RECIPES[name].to_dict(), RECIPES[twin].to_dict())
        return {line.split(":")[0] for line in found} - {"name"}

    assert changes("screen-salience-entropy") == {"tffd"}
    assert changes("screen-tffd-cutmix") == {"tffd"}
    assert changes("screen-cutmix") == {"optim.cutmix"}
    assert changes("screen-dropblock") == {"drop"}
    assert changes("screen-cs-kd") == {"cs_kd", "optim.batch_size"}
    assert changes("screen-branches") == {"teacher"}
    assert changes("screen-kd-resnet20") == {"teacher"}
    assert changes("budget-batch64") == {"optim.batch_size", "optim.lr"}
    assert changes("zoo-resnet20-90") == {"tffd", "run.compile"}  # of the losses alone, which its twin has not
    assert changes("zoo-resnet8x4-50") == {"tffd"}
    assert RECIPES["screen-share-20"].tffd.share_intra == 0.2  # type: ignore[union-attr]


def test_a_teacher_is_from_a_seed_that_its_student_does_not_have() -> None:
    for name, (study, row) in ROWS.items():
        if row.teacher is not None:
            assert RECIPES[name].teacher.model == RECIPES[row.teacher].model  # type: ignore[union-attr]
            assert not {*study.seeds_of(row)} & {*study.seeds_of(study.row(row.teacher))}


# --- what is committed ------------------------------------------------------------------------------------------------


RECORDED = {record.name for record in read_records(RESULTS / "records")}
REPORTED = [study for study in STUDIES.values() if RECORDED & {row.name for row in study.rows}]


@pytest.mark.parametrize("study", REPORTED, ids=lambda study: study.name)
def test_a_committed_page_is_what_its_records_make_to_the_byte(study: Study) -> None:
    page = RESULTS / study.name / "README.md"
    text = page.read_text()
    assert report_text(study, RESULTS / "records") == text
    assert ("](gains.png)" in text) == (page.parent / "gains.png").exists()


def test_the_page_over_all_studies_is_made_of_their_records() -> None:
    assert index_text(STUDIES.values(), RESULTS / "records", RESULTS) == (RESULTS / "README.md").read_text()
    assert not [file for file in (RESULTS / "records").iterdir() if file.suffix != ".json"]
    assert RECIPES.keys() >= RECORDED


@pytest.mark.parametrize("page", ["README.md", "MODEL_CARD.md"])
def test_what_we_say_of_tffd_is_what_the_page_over_all_studies_says(page: str) -> None:
    answer = (RESULTS / "README.md").read_text().split("## Does Tf-FD help?\n\n")[1].splitlines()[0]
    assert answer.strip(".") in " ".join((ROOT / page).read_text().split())


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_from_before_a_section_was_thought_of_is_still_the_same_run() -> None:
    recipe = PILOT.recipe("short-share")
    saved: dict[str, Any] = json.loads(json.dumps(recipe.to_dict()))
    for section in ("teacher", "byot", "cs_kd", "tf_kd", "ps_kd", "drop"):
        assert saved.pop(section) is None
    assert differences(recipe.to_dict(), saved) == []
    other = vary(recipe, recipe.name, ps_kd=PSKDConfig())
    assert differences(other.to_dict(), saved) == ["ps_kd: None there, {'alpha': 0.8} here"]


def test_a_run_that_remembers_and_draws_ends_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    def run(folder: str, **changes: Any) -> dict[str, torch.Tensor]:
        recipe = vary(
            PRESETS["quickstart"],
            "test",
            tffd=None,
            ps_kd=PSKDConfig(),
            drop=DropConfig(drop_block=0.3, dropout=0.1),
            data={"image_size": 8},
            optim={"epochs": 2, "batch_size": 512},
            run={"output": tmp_path / folder, "log_every": 1, **changes},
        )
        train(recipe)
        return load_file(tmp_path / folder / "weights" / "last.safetensors")

    whole = run("whole")
    run("stopped", max_steps=4)  # inside the second epoch
    stopped = run("stopped")
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
