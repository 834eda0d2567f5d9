"""Every experiment of recipes/train_cifar100.py: it starts, takes a step, and differs from its twin in what it says."""

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

from tffd_zoo.data import ImageSource, open_source
from tffd_zoo.recipe import Recipe, differences, vary
from tffd_zoo.tasks import DistillationTask, DropConfig, PSKDConfig
from tffd_zoo.training import build, train

ROOT = Path(__file__).parents[1]
PRESETS: dict[str, Recipe] = runpy.run_path(str(ROOT / "recipes" / "train_cifar100.py"))["PRESETS"]
EXPERIMENTS = {name: recipe for name, recipe in PRESETS.items() if f"short-{name}" in PRESETS}
TEACHERS = {name: recipe for name, recipe in EXPERIMENTS.items() if name.startswith("teacher-")}


@pytest.fixture(scope="module")
def digits() -> ImageSource:
    return open_source("digits", "train")


@pytest.fixture(scope="module")
def trained_teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of all teachers, not that they ever ran."""
    folder = tmp_path_factory.mktemp("teachers")
    for recipe in TEACHERS.values():
        file = folder / recipe.folder / "weights" / "last.safetensors"
        file.parent.mkdir(parents=True)
        save_file(timm.create_model(recipe.model, num_classes=10).state_dict(), file)
    return folder


def task_and_batch(recipe: Recipe, digits: ImageSource) -> tuple[DistillationTask, tuple[torch.Tensor, ...]]:
    """What the loop makes of a recipe, and four images."""
    torch.manual_seed(0)
    model = timm.create_model(recipe.model, num_classes=10)
    spec = build.image_spec(vary(recipe, recipe.name, data={"image_size": 8}), model)
    mixup = build.make_mixup(vary(recipe, recipe.name, data={"drop_last": True}), digits, 1)
    task = build.make_task(recipe, model, spec, digits, batches_per_epoch=1)
    images, targets = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    if mixup is not None:
        images, targets = mixup(images, targets)
    return task, (images, targets, torch.arange(4))


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name not in TEACHERS])
def test_an_experiment_takes_a_step(
    name: str, digits: ImageSource, trained_teachers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained_teachers)
    recipe = EXPERIMENTS[name]
    task, batch = task_and_batch(recipe, digits)
    result = task(*batch)
    result["loss"].backward()
    assert result["loss"].isfinite()
    assert task.get_eval_model().state_dict().keys() == timm.create_model(recipe.model).state_dict().keys()
    assert all(p.grad is not None for p in task.parameters() if p.requires_grad)
    assert (recipe.tffd is not None) == bool({"intra", "inter"} & set(result))


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name not in TEACHERS])
def test_the_losses_of_an_experiment_in_bf16_are_float32_numbers_near_those_of_float32(
    name: str, digits: ImageSource, trained_teachers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained_teachers)
    task, batch = task_and_batch(EXPERIMENTS[name], digits)
    results = []
    for reduced in (False, True):
        torch.manual_seed(1)  # what is dropped
        with torch.autocast("cpu", torch.bfloat16, enabled=reduced):
            results.append(copy.deepcopy(task)(*batch))
    exact, rounded = results
    losses = {"loss", "ce", *task.weights}
    assert losses <= exact.keys()
    for loss in losses:
        assert rounded[loss].dtype == torch.float32
        # bf16 has 8 bits; a channel or two may change its place in the order, too.
        torch.testing.assert_close(rounded[loss], exact[loss], rtol=0.01 if loss in ("loss", "ce") else 0.1, atol=0)


def test_names_are_those_of_the_recipes_and_every_run_has_a_folder_of_its_own() -> None:
    assert all(name == recipe.name for name, recipe in PRESETS.items())
    folders = [recipe.folder for recipe in PRESETS.values()]
    assert len(set(folders)) == len(folders) == len(PRESETS)


@pytest.mark.parametrize("prefix", ["", "short-"])
def test_a_short_experiment_differs_from_its_twin_as_the_long_one_does(prefix: str) -> None:
    def changes(name: str, twin: str) -> set[str]:
        found = differences(PRESETS[prefix + name].to_dict(), PRESETS[prefix + twin].to_dict())
        return {line.split(":")[0] for line in found} - {"name", "tag"}

    assert changes("salience-entropy", "share") == {"tffd.salience"}
    assert changes("loss-sp", "share") == {"tffd.intra_loss", "tffd.inter_loss"}
    assert changes("share-20", "share") == {"tffd.share_intra", "tffd.share_inter"}
    assert changes("inter", "share") == {"tffd.lambda_intra", "tffd.share_intra"}
    assert changes("tffd-cutmix", "share") == changes("cutmix", "plain") == {"optim.cutmix"}
    assert changes("tffd-dropblock", "share") == changes("dropblock", "plain") == {"drop"}
    assert changes("cs-kd", "plain") == {"cs_kd", "optim.batch_size"}
    assert changes("branches", "plain") == {"teacher"}
    assert changes("kd-resnet20", "plain") == {"teacher"}
    assert changes("tffd-kd-resnet20", "kd-resnet20") == {"tffd"}


def test_a_teacher_is_looked_for_where_its_own_recipe_leaves_it() -> None:
    for name, recipe in PRESETS.items():
        if recipe.teacher is not None and recipe.teacher.weights is not None:
            trained = PRESETS[("short-" if name.startswith("short-") else "") + f"teacher-{recipe.teacher.model[5:]}"]
            assert recipe.teacher.model == trained.model
            assert recipe.teacher.weights == trained.folder / "weights" / "last.safetensors"
            assert trained.run.seed != recipe.run.seed


def test_a_run_from_before_a_section_was_thought_of_is_still_the_same_run() -> None:
    recipe = PRESETS["short-share"]
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
