"""hub/release.py: from an export to an entry of the manifest with its weights beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from small_export import small_export

from hub.release import ReleaseConfig, main
from tffd_zoo.data import ImageSpec, eval_loader, open_source
from tffd_zoo.evaluation import evaluate
from tffd_zoo.export_record import write_sums
from tffd_zoo.models import releases


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_export(tmp_path_factory.mktemp("run"))


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "manifest.json"
    path.write_text('{"label_sets": {}, "releases": []}')
    return path


def test_an_export_becomes_a_release_whose_weights_and_figures_are_its_own(run: Path, manifest: Path) -> None:
    main(ReleaseConfig(run, manifest=manifest))
    (entry,) = releases(manifest)
    assert entry.name == "tffd_resnet20.digits"
    weights = load_file(run / "export" / "model.safetensors")
    loaded = entry.load()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    metrics = json.loads((run / "export" / "metrics.json").read_text())
    figures = ("images", "correct1", "correct5", "top1", "top5", "nll", "ece")
    assert {name: getattr(entry.metrics.result, name) for name in figures} == {name: metrics[name] for name in figures}
    assert (entry.metrics.dataset, entry.metrics.split, entry.label_set) == ("digits", "test", "digits")
    settings = entry.metrics.evaluation
    assert (entry.input.crop_mode, settings["device"]) == ("center", "cpu")
    assert settings["fingerprint"] == metrics["evaluation"]["fingerprint"]
    assert entry.recipe == json.loads((run / "export" / "recipe.json").read_text())
    assert (entry.training.epochs, entry.training.hours, entry.training.hardware) == (2, 0.25, "a small machine")
    assert entry.input.input_size == (3, 16, 16)


def test_a_release_is_replaced_only_when_that_is_asked_for(run: Path, manifest: Path, tmp_path: Path) -> None:
    main(ReleaseConfig(run, manifest=manifest))
    (first,) = releases(manifest)
    better = small_export(tmp_path / "better", seed=1)
    with pytest.raises(ValueError, match="is released already; --replace"):
        main(ReleaseConfig(better, manifest=manifest))
    assert releases(manifest) == (first,)
    main(ReleaseConfig(better, replace=True, manifest=manifest))
    (second,) = releases(manifest)
    assert second.sha256 != first.sha256
    assert list((manifest.parent / "weights").iterdir()) == [second.file.path], "the weights replaced are gone"


def test_what_is_no_export_or_lacks_its_training_time_is_refused(run: Path, manifest: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither an export nor the folder of a run"):
        main(ReleaseConfig(tmp_path, manifest=manifest))
    shutil.copytree(run / "export", tmp_path / "export")
    (tmp_path / "export" / "environment.json").write_text('{"hardware": "a small machine"}')
    write_sums(tmp_path / "export")
    with pytest.raises(ValueError, match="pass --hours"):
        main(ReleaseConfig(tmp_path, manifest=manifest))
    assert releases(manifest) == ()
    main(ReleaseConfig(tmp_path, hours=1.5, manifest=manifest))
    assert releases(manifest)[0].training.hours == 1.5


@pytest.mark.parametrize("half", [False, True])
def test_a_plain_twin_that_is_not_released_is_told_by_the_entry(
    run: Path, manifest: Path, tmp_path: Path, half: bool
) -> None:
    twin = small_export(tmp_path / "twin", seed=1, tag="ce_digits")
    main(ReleaseConfig(run, twin=twin, half=half, data="digits" if half else None, manifest=manifest))
    (entry,) = releases(manifest)
    measured = json.loads((twin / "export" / "metrics.json").read_text())
    assert entry.plain_twin is not None
    assert entry.plain_twin.recipe["tffd"] is None
    told = entry.plain_twin.metrics
    assert (told.dataset, told.split, told.result.images) == ("digits", "test", measured["images"])
    assert (told.result.nll == measured["nll"]) == (not half), "the twin is rounded as the release is"
    assert told.result.nll == pytest.approx(measured["nll"], rel=1e-2)
    assert told.result.nll != entry.metrics.result.nll
    main(ReleaseConfig(run, replace=True, manifest=manifest))
    assert releases(manifest)[0].plain_twin is None


def test_what_is_no_plain_twin_or_is_released_itself_is_refused(run: Path, manifest: Path, tmp_path: Path) -> None:
    plain = small_export(tmp_path / "plain", tag="ce_digits")
    with pytest.raises(ValueError, match=r"no plain twin of .*: it is tffd_resnet20\.digits, and that would"):
        main(ReleaseConfig(run, twin=run, manifest=manifest))
    with pytest.raises(ValueError, match=r"no plain twin of tffd_resnet20\.ce_digits: that is plain itself"):
        main(ReleaseConfig(plain, twin=plain, manifest=manifest))
    other = small_export(tmp_path / "other", tag="ce_digits", recipe_seed=3)
    with pytest.raises(ValueError, match=r"no plain twin of tffd_resnet20\.digits: they differ in seed"):
        main(ReleaseConfig(run, twin=other, manifest=manifest))
    assert releases(manifest) == ()
    main(ReleaseConfig(plain, manifest=manifest))
    with pytest.raises(ValueError, match=r"tffd_resnet20\.ce_digits is released, .*: leave --twin out"):
        main(ReleaseConfig(run, twin=plain, manifest=manifest))


def test_half_the_size_means_other_weights_and_figures_measured_on_them(run: Path, manifest: Path) -> None:
    with pytest.raises(ValueError, match="pass --data, the images to measure them on again"):
        main(ReleaseConfig(run, half=True, manifest=manifest))
    assert not releases(manifest)

    main(ReleaseConfig(run, half=True, data="digits", manifest=manifest))
    (entry,) = releases(manifest)
    file = run / "export" / "model.safetensors"
    assert entry.size < 0.6 * file.stat().st_size
    model = timm.create_model("tffd_resnet20", num_classes=10)
    model.load_state_dict(entry.load())
    exported = load_file(file)
    for name, tensor in model.state_dict().items():
        rounded = exported[name].half() if exported[name].is_floating_point() else exported[name]
        assert torch.equal(tensor, rounded.to(tensor.dtype)), name

    spec = ImageSpec.from_model(model, input_size=entry.input.input_size)
    result = evaluate(model, eval_loader(open_source("digits", "test"), spec, 256), device="cpu", progress=False)
    assert (entry.metrics.result.correct1, entry.metrics.result.correct5) == (result.correct1, result.correct5)
    assert entry.metrics.result.nll == pytest.approx(result.nll, rel=1e-6)
    assert entry.metrics.result.nll != json.loads((run / "export" / "metrics.json").read_text())["nll"]
