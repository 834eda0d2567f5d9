"""The manifest of releases, and the loading of their weights: what is refused, and what of timm keeps working."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fresh_python
import huggingface_hub
import pytest
import safetensors
import timm
import torch
from safetensors.torch import save_file
from timm.models import register_model
from torch import nn

import tffd_zoo
from tffd_zoo.data import ImageSpec
from tffd_zoo.evaluation import EvalResult
from tffd_zoo.models import (
    HubFile,
    Metrics,
    PlainTwin,
    Release,
    Training,
    WheelFile,
    add_release,
    manifest,
    plain_twin_name,
)
from tffd_zoo.models import tffd_cifar_resnet as resnets
from tffd_zoo.models import tffd_imagenet as imagenet

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "tffd_resnet20.c100"
FIGURES = {"top1": 25.0, "top5": 60.0, "nll": 2.5, "ece": 4.0}


def make_weights(path: Path, architecture: str = "tffd_resnet20", seed: int = 0, num_classes: int = 100) -> Path:
    torch.manual_seed(seed)
    save_file(timm.create_model(architecture, num_classes=num_classes).state_dict(), path)
    return path


def describe(path: Path, **changes: Any) -> Release:
    """A release of the weights at `path`."""
    data = path.read_bytes()
    release = Release(
        architecture="tffd_resnet20",
        tag="c100",
        file=WheelFile(path),
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        input=ImageSpec((3, 32, 32), (0.5, 0.4, 0.3), (0.2, 0.2, 0.1), "bicubic", 0.875),
        label_set="cifar100",
        label_names=tuple(f"class {i}" for i in range(100)),
        license="apache-2.0",
        recipe={"name": "quick", "epochs": 2},
        metrics=Metrics("uoft-cs/cifar100", "test", EvalResult(200, 50, 120, FIGURES)),
        training=Training(epochs=2, hours=0.5, seed=0, hardware="two CPU cores"),
    )
    return replace(release, **changes)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_weights(tmp_path_factory.mktemp("export") / "model.safetensors")


@pytest.fixture
def manifest_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty manifest in the place of the package's own."""
    path = tmp_path / "package" / "manifest.json"
    path.parent.mkdir()
    path.write_text('{"label_sets": {}, "releases": []}')
    monkeypatch.setattr(manifest, "MANIFEST", path)
    return path


def register_again() -> None:
    """Have timm see the cfgs of two modules as they are now."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm says that names are overwritten
        register_model(resnets.tffd_resnet20)
        register_model(imagenet.tffd_resnet18)


@pytest.fixture
def register(manifest_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Release], Release]]:
    """Release something and register it with timm as the next start of Python would."""

    def add(release: Release) -> Release:
        stored = add_release(release)
        for module in (resnets, imagenet):
            monkeypatch.setattr(module, "default_cfgs", manifest.default_cfgs(module.ARCHITECTURES))
        register_again()
        return stored

    yield add
    monkeypatch.undo()
    register_again()


@pytest.fixture
def released(register: Callable[[Release], Release], weights: Path) -> Release:
    """`tffd_resnet20.c100`, in the wheel."""
    return register(describe(weights))


@pytest.fixture
def hub(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that the Hub client says it has downloaded."""
    served = tmp_path / "blob"
    shutil.copyfile(weights, served)

    def hf_hub_download(repo: str, filename: str, *, revision: str, cache_dir: Path | None, **_: Any) -> str:
        assert (repo, filename, revision) == ("tffd/resnet20", "model.safetensors", COMMIT)
        hf_hub_download.cache_dir = cache_dir
        return str(served)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return served


def same_weights(model: nn.Module, path: Path) -> bool:
    from safetensors.torch import load_file

    expected, got = load_file(path), model.state_dict()
    return expected.keys() == got.keys() and all(torch.equal(expected[key], got[key]) for key in expected)


@pytest.mark.parametrize(
    ("name", "twin"),
    [
        ("tffd_resnet20.c100", "tffd_resnet20.ce_c100"),
        ("tffd_resnet20.kd_c100", "tffd_resnet20.ce_c100"),
        ("tffd_resnet20.ce_c100", None),
    ],
)
def test_a_plain_twin_is_the_plain_one_of_the_same_architecture_and_data(name: str, twin: str | None) -> None:
    assert plain_twin_name(name) == twin


# The manifest that is shipped


def test_timm_lists_exactly_the_releases_of_the_shipped_manifest() -> None:
    releases = manifest.releases()
    names = {release.name for release in releases} | {release.architecture for release in releases}
    assert set(timm.list_pretrained("tffd_*")) <= names
    assert {release.name for release in releases} <= set(timm.list_pretrained("tffd_*"))


def test_the_weights_folder_holds_exactly_the_files_of_the_shipped_manifest() -> None:
    named = {release.file.path for release in manifest.releases() if isinstance(release.file, WheelFile)}
    assert set((manifest.MANIFEST.parent / "weights").glob("*")) == named
    assert sum(path.stat().st_size for path in named) <= manifest.WHEEL_LIMIT


def test_every_shipped_entry_has_the_very_recipe_that_its_weights_name_and_says_how_it_was_evaluated() -> None:
    for release in manifest.releases():
        assert {"weights", "precision", "device", "fingerprint"} <= release.metrics.evaluation.keys()
        if isinstance(release.file, WheelFile):
            with safetensors.safe_open(release.file.path, "pt") as file:
                recorded = file.metadata()["recipe_sha256"]
            assert hashlib.sha256((json.dumps(release.recipe, indent=2) + "\n").encode()).hexdigest() == recorded


# Releasing


def test_a_release_is_stored_and_read_back_unchanged(manifest_path: Path, weights: Path) -> None:
    release = describe(weights)
    stored = add_release(release)
    assert stored.file.path.parent == manifest_path.parent / "weights"
    assert stored.file.path.read_bytes() == weights.read_bytes()
    assert replace(stored, file=release.file) == release
    assert manifest.releases() == (stored,)
    assert manifest.release(NAME) == manifest.release("tffd_resnet20") == stored


def test_class_names_are_written_once_for_all_releases_that_share_them(manifest_path: Path, weights: Path) -> None:
    add_release(describe(weights))
    add_release(describe(weights, tag="ce_c100"))
    text = manifest_path.read_text()
    assert text.count('"class 99"') == 1
    assert [release.label_names[99] for release in manifest.releases()] == ["class 99", "class 99"]


def test_other_class_names_under_a_name_that_is_taken_are_refused(manifest_path: Path, weights: Path) -> None:
    add_release(describe(weights))
    other = describe(weights, tag="ce_c100", label_names=tuple(f"other {i}" for i in range(100)))
    with pytest.raises(ValueError, match="other class names under 'cifar100'"):
        add_release(other)


def test_a_release_survives_json(weights: Path) -> None:
    plain = PlainTwin({"name": "plain", "epochs": 2}, describe(weights).metrics)
    variants: tuple[dict[str, Any], ...] = ({}, {"file": HubFile("tffd/resnet20", COMMIT)}, {"plain_twin": plain})
    for release in (describe(weights, **changes) for changes in variants):
        entry = json.loads(json.dumps(release.to_json()))
        assert Release.from_json(entry, weights.parent) == release


def test_a_name_that_is_taken_is_replaced_only_when_asked(manifest_path: Path, weights: Path, tmp_path: Path) -> None:
    first = add_release(describe(weights))
    better = describe(make_weights(tmp_path / "better.safetensors", seed=1))
    with pytest.raises(ValueError, match="replaces=True"):
        add_release(better)
    assert manifest.releases() == (first,)
    second = add_release(better, replaces=True)
    assert manifest.releases() == (second,)
    assert list((manifest_path.parent / "weights").iterdir()) == [second.file.path]


def test_the_same_weights_can_be_released_again_with_other_figures(manifest_path: Path, weights: Path) -> None:
    first = add_release(describe(weights))
    training = replace(first.training, hours=1.5)
    again = add_release(replace(first, training=training), replaces=True)
    assert again.file.path.is_file()
    assert manifest.release(NAME).training.hours == 1.5


@pytest.mark.parametrize(
    ("architecture", "num_classes", "message"),
    [("tffd_resnet32", 100, "do not fit"), ("tffd_resnet20", 10, "do not fit"), ("tffd_resnet21", 100, "registered")],
)
def test_weights_that_their_architecture_cannot_load_are_not_released(
    manifest_path: Path, tmp_path: Path, architecture: str, num_classes: int, message: str
) -> None:
    before = manifest_path.read_bytes()
    path = make_weights(tmp_path / "model.safetensors", num_classes=num_classes)
    with pytest.raises(ValueError, match=message):
        add_release(describe(path, architecture=architecture))
    assert manifest_path.read_bytes() == before
    assert not (manifest_path.parent / "weights").exists()


def test_a_file_that_holds_no_tensors_is_not_released(manifest_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    torch.save(timm.create_model("tffd_resnet20").state_dict(), path)
    with pytest.raises(ValueError, match="not a safetensors file"):
        add_release(describe(path))


def test_weights_that_would_make_the_wheel_too_large_are_refused(
    manifest_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_release(describe(weights))
    monkeypatch.setattr(manifest, "WHEEL_LIMIT", 2 * weights.stat().st_size - 1)
    with pytest.raises(ValueError, match="publish it to the Hub"):
        add_release(describe(weights, tag="ce_c100"))
    monkeypatch.setattr(manifest, "WHEEL_LIMIT", 2 * weights.stat().st_size)
    add_release(describe(weights, tag="ce_c100"))


def test_a_failed_write_leaves_the_manifest_as_it_was(
    manifest_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_release(describe(weights))
    before = manifest_path.read_bytes()

    def disk_is_full(*_: Any, **__: Any) -> int:
        raise OSError(28, "No space left on device")

    release = describe(weights, tag="ce_c100")
    monkeypatch.setattr(Path, "write_text", disk_is_full)
    with pytest.raises(OSError, match="No space left"):
        add_release(release)
    assert manifest_path.read_bytes() == before
    assert [release.tag for release in manifest.releases()] == ["c100"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tag": "c100-v2"}, "may hold only"),
        ({"size": 0}, "size 0"),
        ({"size": "many"}, "not supported"),
        ({"sha256": "abc"}, "64 hex digits"),
        ({"license": ""}, "license"),
        ({"recipe": {}}, "recipe"),
        ({"label_names": []}, "name the classes"),
        ({"label_names": ["cat", "cat"]}, "same name"),
        ({"file": {"wheel": "model.bin"}}, "not a .safetensors"),
        ({"file": {"wheel": "../model.safetensors"}}, "plain file name"),
        ({"file": {"repo": "resnet20", "commit": COMMIT, "filename": "model.safetensors"}}, "organisation/name"),
        ({"file": {"repo": "tffd/resnet20", "commit": "main", "filename": "model.safetensors"}}, "40 hex digits"),
        ({"file": {"repo": "tffd/resnet20", "commit": COMMIT, "filename": "model.bin"}}, "not a .safetensors"),
        ({"file": {"url": "https://example.org"}}, "HubFile lacks commit, repo"),
        ({"author": "me"}, "Release has no author"),
        ({"file": None}, "keys"),
    ],
)
def test_an_entry_that_is_not_valid_is_named_with_its_field(
    weights: Path, changes: dict[str, Any], message: str
) -> None:
    entry = {**describe(weights).to_json(), **changes}
    with pytest.raises(ValueError, match=message) as error:
        Release.from_json(entry, weights.parent)
    assert str(error.value).startswith("manifest entry tffd_resnet20.")


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("input", {"size": [3, 32]}, "not \\(C, H, W\\)"),
        ("input", {"mean": [0.5]}, "one value for each channel"),
        ("input", {"std": [0.5, 0.5, 0]}, "not positive"),
        ("input", {"crop_pct": 87.5}, "crop_pct"),
        ("input", {"interpolation": "cubic"}, "interpolation 'cubic'"),
        ("metrics", {"correct1": 121}, "cannot be"),
        ("metrics", {"images": 0}, "cannot be"),
        ("metrics", {"top1": 26.0}, "25.0 %, not 26.0 %"),
        ("metrics", {"nll": float("nan")}, "out of range"),
        ("metrics", {"top6": 1.0}, "Metrics has no top6"),
        ("training", {"epochs": 0}, "positive"),
        ("training", {"hardware": ""}, "trained on"),
    ],
)
def test_a_figure_that_cannot_be_is_refused(weights: Path, part: str, changes: dict[str, Any], message: str) -> None:
    entry = describe(weights).to_json()
    with pytest.raises(ValueError, match=message):
        Release.from_json({**entry, part: {**entry[part], **changes}}, weights.parent)


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"releases": []', '{"releases": [{"label_set": "x"}], "label_sets": {}}', '{"releases": [1]}'],
)
def test_a_manifest_that_is_not_one_is_named(manifest_path: Path, text: str) -> None:
    manifest_path.write_text(text)
    with pytest.raises(ValueError, match=r"package/manifest\.json is (damaged|not a manifest)"):
        manifest.releases()


def test_a_manifest_with_one_name_twice_is_refused(manifest_path: Path, weights: Path) -> None:
    add_release(describe(weights))
    content = json.loads(manifest_path.read_text())
    content["releases"] *= 2
    manifest_path.with_name("twice.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{NAME} is there 2 times"):
        manifest.releases(manifest_path.with_name("twice.json"))


def test_an_unknown_release_is_answered_with_those_there_are(manifest_path: Path, weights: Path) -> None:
    with pytest.raises(ValueError, match="there are: none"):
        manifest.release("tffd_resnet20.c10")
    add_release(describe(weights))
    with pytest.raises(ValueError, match=f"there are: {NAME}"):
        manifest.release("tffd_resnet20.c10")


# What timm makes of it


def test_the_default_tag_is_tf_fd_then_come_the_baselines(manifest_path: Path, weights: Path) -> None:
    for tag in ("kd_in1k", "ce_in1k", "in1k"):
        add_release(describe(weights, tag=tag))
    cfgs = manifest.default_cfgs(resnets.ARCHITECTURES)
    assert list(cfgs["tffd_resnet20"].tags) == ["in1k", "ce_in1k", "kd_in1k"]
    assert list(cfgs["tffd_resnet32"].tags) == [""]
    assert not cfgs["tffd_resnet32"].default.has_weights


def test_a_release_is_listed_and_loads_by_name_and_by_architecture(released: Release, weights: Path) -> None:
    assert set(timm.list_pretrained("tffd_resnet20*")) == {NAME}
    for name in (NAME, "tffd_resnet20"):
        model = timm.create_model(name, pretrained=True)
        assert same_weights(model, weights)


def test_a_loaded_model_knows_its_labels_input_and_source_and_holds_no_second_copy(released: Release) -> None:
    cfg = timm.create_model(NAME, pretrained=True).pretrained_cfg
    assert cfg["label_names"] == tuple(f"class {i}" for i in range(100))
    assert cfg["num_classes"] == 100
    assert cfg["input_size"] == (3, 32, 32)
    assert (cfg["mean"], cfg["std"]) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    assert (cfg["crop_pct"], cfg["interpolation"]) == (0.875, "bicubic")
    assert (cfg["architecture"], cfg["tag"]) == ("tffd_resnet20", "c100")
    assert cfg["file"] == str(released.file.path)
    assert cfg["license"] == "apache-2.0"
    assert "state_dict" not in cfg
    assert not any(isinstance(value, dict) for value in cfg.values())


def test_an_imagenet_architecture_takes_classes_and_input_from_its_small_release(
    register: Callable[[Release], Release], tmp_path: Path
) -> None:
    path = make_weights(tmp_path / "model.safetensors", "tffd_resnet18")
    register(describe(path, architecture="tffd_resnet18"))
    model = timm.create_model("tffd_resnet18.c100", pretrained=True)
    assert model.num_classes == 100
    assert same_weights(model, path)
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)
    assert model.pretrained_cfg["pool_size"] == (1, 1)
    assert timm.create_model("tffd_resnet18", pretrained=True).num_classes == 100


def test_releasing_a_small_weight_does_not_change_the_architecture_without_weights(
    register: Callable[[Release], Release], tmp_path: Path
) -> None:
    path = make_weights(tmp_path / "model.safetensors", "tffd_resnet18")
    register(describe(path, architecture="tffd_resnet18"))
    model = timm.create_model("tffd_resnet18")
    assert model.num_classes == 1000
    assert model.pretrained_cfg["input_size"] == (3, 224, 224)
    timm.create_model("resnet18").load_state_dict(model.state_dict())


def test_another_number_of_classes_keeps_the_body_and_gets_a_fresh_head(released: Release, weights: Path) -> None:
    model = timm.create_model(NAME, pretrained=True, num_classes=7)
    assert model.num_classes == 7
    assert model.get_classifier().weight.shape == (7, 64)
    full = timm.create_model(NAME, pretrained=True)
    for key, value in full.state_dict().items():
        assert key.startswith("head") or torch.equal(model.state_dict()[key], value)
    assert timm.create_model(NAME, pretrained=True, num_classes=0).num_classes == 0


def test_grey_images_get_the_colour_filters_summed(released: Release) -> None:
    colour = timm.create_model(NAME, pretrained=True).eval()
    grey = timm.create_model(NAME, pretrained=True, in_chans=1).eval()
    torch.testing.assert_close(grey.stem.conv.weight, colour.stem.conv.weight.sum(1, keepdim=True))
    images = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(grey(images), colour(images.expand(2, 3, 32, 32)))


def test_features_only_extracts_from_the_released_weights(released: Release) -> None:
    model = timm.create_model(NAME, pretrained=True).eval()
    extractor = timm.create_model(NAME, pretrained=True, features_only=True, out_indices=(1, 3)).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = model.forward_intermediates(images, [1, 3], intermediates_only=True)
    assert all(map(torch.equal, extractor(images), expected))
    assert "label_names" in extractor.pretrained_cfg
    assert "state_dict" not in extractor.pretrained_cfg


def test_device_and_dtype_reach_a_released_model(released: Release) -> None:
    model = timm.create_model(NAME, pretrained=True, dtype=torch.float64)
    assert model.stem.conv.weight.dtype == torch.float64


def test_the_users_own_file_is_loaded_in_place_of_the_release(released: Release, tmp_path: Path) -> None:
    own = make_weights(tmp_path / "own.safetensors", seed=5)
    model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay={"file": str(own)})
    assert same_weights(model, own)
    model = timm.create_model(NAME, checkpoint_path=own)
    assert same_weights(model, own)
    state_dict = timm.create_model("tffd_resnet20").state_dict()
    model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay={"state_dict": dict(state_dict)})
    assert torch.equal(model.stem.conv.weight, state_dict["stem.conv.weight"])


def test_an_overlay_that_names_no_source_keeps_the_release_and_its_check(released: Release, weights: Path) -> None:
    model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay={"crop_pct": 0.5})
    assert same_weights(model, weights)
    assert model.pretrained_cfg["crop_pct"] == 0.5
    released.file.path.write_bytes(b"changed")
    with pytest.raises(ValueError, match="not the released file"):
        timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay={"crop_pct": 0.5})


def test_a_cfg_given_by_hand_that_names_a_released_file_is_checked_too(released: Release) -> None:
    cfg = timm.get_pretrained_cfg(NAME)
    released.file.path.write_bytes(b"changed")
    for given in (cfg, cfg.to_dict()):
        with pytest.raises(ValueError, match="not the released file"):
            timm.create_model("tffd_resnet20", pretrained=True, pretrained_cfg=given)


def test_an_architecture_without_a_release_says_so(manifest_path: Path) -> None:
    with pytest.raises(RuntimeError, match="No pretrained weights exist for tffd_resnet44"):
        timm.create_model("tffd_resnet44", pretrained=True)
    with pytest.raises(RuntimeError, match="Invalid pretrained tag"):
        timm.create_model("tffd_resnet20.c10", pretrained=True)


# Files that are not what was released


def flip_one_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_the_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def append_a_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def put_a_pickle(path: Path) -> None:
    torch.save(timm.create_model("tffd_resnet20").state_dict(), path)


def put_another_models_file(path: Path) -> None:
    make_weights(path, "tffd_resnet32")


def put_other_weights_of_the_same_model(path: Path) -> None:
    make_weights(path, seed=99)


def empty(path: Path) -> None:
    path.write_bytes(b"")


FAULTS = [
    *(flip_one_byte, cut_the_end, append_a_byte, empty),
    *(put_a_pickle, put_another_models_file, put_other_weights_of_the_same_model),
]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wheel_file_that_is_not_the_released_one_is_refused_before_a_tensor_is_used(
    released: Release, fault: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(released.file.path)
    parsed: list[object] = []
    monkeypatch.setattr("safetensors.torch.load", parsed.append)
    monkeypatch.setattr("torch.load", parsed.append)
    with pytest.raises(ValueError, match="not the released file") as error:
        timm.create_model(NAME, pretrained=True)
    assert not parsed
    message = str(error.value)
    assert "\n" not in message
    assert str(released.file.path) in message
    assert released.sha256 in message
    assert "pip install --force-reinstall --no-deps CLONE-OR-WHEEL" in message


def test_the_refusal_says_what_came(released: Release) -> None:
    path = released.file.path
    flip_one_byte(path)
    with pytest.raises(ValueError, match=hashlib.sha256(path.read_bytes()).hexdigest()):
        timm.create_model(NAME, pretrained=True)
    path.write_bytes(b"123")
    with pytest.raises(ValueError, match=f"3 bytes where {released.size:,} were released"):
        timm.create_model(NAME, pretrained=True)


def test_a_missing_wheel_file_is_named(released: Release) -> None:
    released.file.path.unlink()
    with pytest.raises(FileNotFoundError, match=r"are missing\. Reinstall"):
        timm.create_model(NAME, pretrained=True)


# The Hub


@pytest.fixture
def on_hub(register: Callable[[Release], Release], weights: Path, hub: Path) -> Release:
    """`tffd_resnet20.c100`, on the Hub."""
    return register(describe(weights, file=HubFile("tffd/resnet20", COMMIT)))


def test_hub_weights_load_from_the_pinned_commit(on_hub: Release, weights: Path, tmp_path: Path) -> None:
    model = timm.create_model(NAME, pretrained=True, cache_dir=tmp_path / "cache")
    assert same_weights(model, weights)
    assert model.pretrained_cfg["hf_hub_id"] == f"tffd/resnet20@{COMMIT}"
    assert model.pretrained_cfg["hf_hub_filename"] == "model.safetensors"
    assert huggingface_hub.hf_hub_download.cache_dir == tmp_path / "cache"
    assert timm.list_pretrained("tffd_resnet20*") == [NAME]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_hub_that_serves_other_bytes_is_refused(on_hub: Release, hub: Path, fault: Callable[[Path], None]) -> None:
    fault(hub)
    with pytest.raises(ValueError, match="not the released file") as error:
        timm.create_model(NAME, pretrained=True)
    message = str(error.value)
    assert on_hub.sha256 in message
    assert str(hub) in message
    assert "tffd/resnet20 does not serve" in message


def test_the_path_to_delete_is_that_of_the_bytes_not_of_the_link_to_them(
    on_hub: Release, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "snapshot.safetensors"
    link.symlink_to(hub)
    flip_one_byte(hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(link))
    with pytest.raises(ValueError, match=f"^{hub} is not"):
        timm.create_model(NAME, pretrained=True)


def test_a_hub_out_of_reach_is_named_with_the_repository(on_hub: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("Cannot reach the Hub.\nSecond line.")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(OSError, match=r"huggingface\.co/tffd/resnet20 at 0123456789abcdef") as error:
        timm.create_model(NAME, pretrained=True)
    assert "Cannot reach the Hub" in str(error.value)
    assert "HF_HUB_OFFLINE=1" in str(error.value)
    assert "\n" not in str(error.value)


def test_offline_without_a_cached_file_says_which_variable_to_unset(
    on_hub: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the real client again
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="tffd/resnet20") as error:
        on_hub.load(cache_dir=tmp_path)
    assert "unset HF_HUB_OFFLINE" in str(error.value)


# From a fresh start of Python, with no network


def test_a_release_of_today_loads_in_tomorrows_python_without_network(tmp_path: Path, weights: Path) -> None:
    package = Path(tffd_zoo.__file__).parent
    ignore = shutil.ignore_patterns("__pycache__", "weights")
    shutil.copytree(package, tmp_path / "site" / "tffd_zoo", ignore=ignore)
    copied_manifest = tmp_path / "site" / "tffd_zoo" / "models" / "manifest.json"
    copied_manifest.write_text('{"label_sets": {}, "releases": []}')
    add_release(describe(weights), manifest=copied_manifest)
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path / "site"),
        "HF_HOME": str(tmp_path / "empty"),
        "HF_HUB_OFFLINE": "1",
    }

    code = (
        "import timm, tffd_zoo\n"
        "print(timm.list_pretrained('tffd_*'))\n"
        "model = timm.create_model('tffd_resnet20', pretrained=True)\n"
        "print(model.pretrained_cfg['label_names'][99], model.pretrained_cfg['tag'], model.pretrained_cfg['file'])"
    )
    run = fresh_python.run(["-c", code], environment, tmp_path)
    assert run.returncode == 0, run.stderr
    stored = manifest.release(NAME, copied_manifest)
    assert run.stdout == f"['{NAME}']\nclass 99 c100 {stored.file.path}\n"


def test_a_name_of_no_release_is_told_with_those_there_are_or_has_none() -> None:
    assert manifest.known_release("tffd_resnet20") == manifest.release("tffd_resnet20.c100")
    assert manifest.known_release("resnet18") is None
    with pytest.raises(ValueError, match=r"no release is called 'resnet18'; there are: tffd_resnet18\.c100, "):
        manifest.release("resnet18")


def test_what_the_package_names_is_there() -> None:
    assert all(hasattr(tffd_zoo.models, name) for name in tffd_zoo.models.__all__)
