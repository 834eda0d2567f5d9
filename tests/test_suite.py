"""The suite's parts: figures by hand and by other libraries; a run that resumes, pairs and survives failures."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from PIL import Image
from processes import on_two_processes
from small_export import small_export
from torch import nn

from tffd_zoo.data import ImageSource, ImageSpec, open_source
from tffd_zoo.eval import EvalConfig
from tffd_zoo.eval import main as evaluate_models
from tffd_zoo.loading import expand_names, load_model
from tffd_zoo.suite import calibration, corrupted, duplicates, ood, run, shifts, transfer
from tffd_zoo.suite.classes import class_indices
from tffd_zoo.suite.corruptions import KINDS
from tffd_zoo.suite.cost import activations, peak_memory
from tffd_zoo.suite.measurement import Measurement, Part, percent
from tffd_zoo.suite.page import page, tables
from tffd_zoo.suite.pairs import differences, mcnemar, mean_over_pairs
from tffd_zoo.suite.setting import SuiteConfig, parse_named, pixels
from tffd_zoo.suite.subject import Predictions, Subject

pytest.importorskip("cv2")  # the extra `suite`
pytest.importorskip("pytorch_ood")
torchmetrics = pytest.importorskip("torchmetrics.functional.classification")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def random_probabilities(rng: np.random.Generator, images: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    probabilities = calibration.softmax(2 * rng.standard_normal((images, classes)).astype(np.float32))
    return probabilities, rng.integers(0, classes, images)


# -- calibration -------------------------------------------------------------------------------------------------------


def test_calibration_error_by_hand_and_by_torchmetrics(rng: np.random.Generator) -> None:
    confidence = np.array([0.9, 0.9, 0.7])
    assert calibration.calibration_error(confidence, np.array([True, False, True])) == pytest.approx(
        100 * (2 * abs(1 / 2 - 0.9) + abs(1 - 0.7)) / 3
    )
    probabilities, targets = random_probabilities(rng, 400, 10)
    ours = calibration.calibration_error(probabilities.max(1), probabilities.argmax(1) == targets)
    theirs = torchmetrics.multiclass_calibration_error(
        torch.from_numpy(probabilities), torch.from_numpy(targets), num_classes=10, n_bins=15, norm="l1"
    )
    assert ours == pytest.approx(100 * theirs.item(), rel=1e-4)


def test_adaptive_error_by_hand() -> None:
    confidence = np.array([0.95, 0.5, 0.6, 0.9])
    hit = np.array([False, True, True, True])
    # two bins of two images: 0.5 and 0.6, both right; 0.9 and 0.95, one of them right
    expected = 100 * (abs(2 - 1.1) + abs(1 - 1.85)) / 4
    assert calibration.adaptive_error(confidence, hit, bins=2) == pytest.approx(expected)


def test_classwise_error_is_the_mean_over_classes_of_torchmetrics_binary_one(rng: np.random.Generator) -> None:
    probabilities, targets = random_probabilities(rng, 300, 4)
    theirs = [
        torchmetrics.binary_calibration_error(
            torch.from_numpy(probabilities[:, label].copy()),
            torch.from_numpy((targets == label).astype(int)),
            n_bins=15,
        ).item()
        for label in range(4)
    ]
    assert calibration.classwise_error(probabilities, targets) == pytest.approx(100 * np.mean(theirs), rel=1e-4)


def test_brier_by_hand() -> None:
    probabilities = np.array([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]])
    expected = ((0.25 + 0.09 + 0.64) + (0.81 + 0.64 + 0.01)) / 2
    assert calibration.brier(probabilities, np.array([2, 0])) == pytest.approx(expected)


def test_the_temperature_undoes_a_known_overconfidence(rng: np.random.Generator) -> None:
    logits = 2 * rng.standard_normal((20_000, 5))
    chances = calibration.softmax(logits.astype(np.float32))
    targets = (chances.cumsum(1) > rng.random((20_000, 1))).argmax(1)
    assert calibration.fit_temperature(logits, targets) == pytest.approx(1, abs=0.03)
    assert calibration.fit_temperature(3 * logits, targets) == pytest.approx(3, abs=0.09)


# -- pairs -------------------------------------------------------------------------------------------------------------


def test_mcnemar_by_hand() -> None:
    ours = np.array([True] * 1 + [False] * 5 + [True] * 10)
    theirs = np.array([False] * 1 + [True] * 5 + [True] * 10)
    assert mcnemar(ours, theirs) == pytest.approx(2 * (1 + 6) / 2**6)  # at most 1 of 6 on one side
    assert mcnemar(ours, ours) == 1


def mean_of(name: str) -> Part:
    return Part("mean", lambda subject, setting: Measurement(), lambda samples: {name: percent(samples["test"][name])})


def test_the_interval_of_a_difference_is_that_of_paired_images(rng: np.random.Generator) -> None:
    ours = rng.random(2000) < 0.6
    theirs = ours ^ (rng.random(2000) < 0.1)
    pair = [Measurement({"test": {"top1": values}}) for values in (ours, theirs)]
    (found,) = differences(mean_of("top1"), *pair, resamples=2000, seed=0)
    apart = 100 * (ours.astype(float) - theirs)
    half = 1.96 * apart.std() / 2000**0.5
    assert found.difference == pytest.approx(apart.mean())
    assert (found.low, found.high) == pytest.approx((apart.mean() - half, apart.mean() + half), abs=0.15)
    assert found.mcnemar_p == mcnemar(ours, theirs)


def test_models_measured_on_other_images_are_not_paired() -> None:
    pair = [Measurement({"test": {"top1": np.ones(n, bool)}}) for n in (5, 6)]
    assert differences(mean_of("top1"), *pair, resamples=10, seed=0) == []


def test_over_several_pairs_the_interval_is_students() -> None:
    mean, low, high = mean_over_pairs([1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx((2, 2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-3)


def test_a_pattern_stands_for_the_weights_that_match_it() -> None:
    assert expand_names(["tffd_resnet20.*", "resnet18"]) == ["tffd_resnet20.c100", "tffd_resnet20.ce_c100", "resnet18"]
    with pytest.raises(ValueError, match="no weights match"):
        expand_names(["nothing_*"])
    with pytest.raises(ValueError, match="name at least one model"):
        expand_names([])


def test_models_pair_with_their_plain_twins_or_as_told() -> None:
    models = ["tffd_resnet20.c100", "tffd_resnet20.kd_c100", "tffd_resnet20.ce_c100", "tffd_resnet18.c100"]
    twin = models[2]
    assert run.pair_up(models, ()) == [(models[0], twin), (models[1], twin)]
    assert run.pair_up(models, [twin]) == [(models[0], twin), (models[1], twin), (models[3], twin)]
    with pytest.raises(ValueError, match="names 2 models for 4"):
        run.pair_up(models, models[:2])


# -- images of another size --------------------------------------------------------------------------------------------


def test_small_arrays_are_enlarged_as_the_images_of_the_split_are(tmp_path: Path) -> None:
    for number, image in enumerate(np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)):
        (tmp_path / str(number % 2)).mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / str(number % 2) / f"{number}.png")
    source = open_source(str(tmp_path), "train")
    torch.manual_seed(0)
    model = timm.create_model("tffd_resnet18", num_classes=2).eval()
    subject = Subject("large", model, ImageSpec((3, 64, 64), (0.5,) * 3, (0.2,) * 3, "bilinear", 1.0), batch_size=2)
    expected = subject.predict(source)
    found = subject.predict_arrays(pixels(source, 32))
    np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(subject.logits_of(pixels(source, 32)), expected.logits, rtol=1e-4, atol=1e-5)
    assert not np.allclose(subject.logits_of(pixels(source, 16)), expected.logits, rtol=1e-2)


@pytest.mark.parametrize(("side", "refused"), [(32, False), (48, True)])
def test_corruptions_are_for_small_images_whatever_a_model_enlarges_them_to(
    side: int, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corrupted, "KINDS", {"brightness": KINDS["brightness"]})
    use_cache(monkeypatch, tmp_path / "assets")
    for name, colour in {"red": (200, 9, 9), "green": (9, 200, 9)}.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (side, side), colour).save(tmp_path / "data" / name / "0.png")
    source = open_source(str(tmp_path / "data"), "train")
    subject = Subject("colour", Colour(), replace(SPEC, input_size=(3, 64, 64)), ("green", "red"), batch_size=4)
    setting = run.Setting(SuiteConfig(), source, lambda split, column: source)
    if refused:
        with pytest.raises(ValueError, match="made for images of 32 pixels, and colour takes 64 x 64"):
            corrupted.measure(subject, setting)
    else:
        assert len(corrupted.measure(subject, setting).samples["test"]) == 5


# -- unknown images ----------------------------------------------------------------------------------------------------


def test_auroc_and_fpr95_by_hand() -> None:
    known = np.arange(20, dtype=np.float32)  # the threshold that lets 19 of 20 pass is 18
    unknown = np.array([18, 18.5, 30, 40], dtype=np.float32)
    auroc, fpr95 = ood.separation(known, unknown)
    wins = (18 + 0.5) + 19 + 20 + 20
    assert auroc == pytest.approx(100 * wins / 80)
    assert fpr95 == pytest.approx(25)


def test_auroc_agrees_with_scikit_learn(rng: np.random.Generator) -> None:
    from sklearn.metrics import roc_auc_score

    known, unknown = rng.standard_normal(300), 0.7 + rng.standard_normal(200)
    expected = roc_auc_score([0] * 300 + [1] * 200, np.concatenate([known, unknown]))
    assert ood.separation(known, unknown)[0] == pytest.approx(100 * expected)


# -- duplicates --------------------------------------------------------------------------------------------------------


def test_copies_are_found_mirrored_and_brightened_and_others_are_not(rng: np.random.Generator) -> None:
    train = rng.integers(0, 200, (50, 16, 16, 3)).astype(np.uint8)
    test = np.concatenate([train[3:4], train[7:8, :, ::-1], train[9:10] + 40, rng.integers(0, 200, (1, 16, 16, 3))])
    likeness = duplicates.nearest_likeness(test.astype(np.uint8), train)
    assert likeness[:3] == pytest.approx(1, abs=1e-5)
    assert likeness[3] < 0.5
    assert duplicates.nearest_likeness(np.full((1, 16, 16, 3), 9, np.uint8), train) == pytest.approx(0, abs=1e-3)


def test_the_published_list_is_taken_without_pairs_that_only_look_alike(tmp_path: Path) -> None:
    for number, image in enumerate(np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), np.uint8)):
        place = tmp_path / "train" / str(number // 3)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{number}.png")
    whole = open_source(str(tmp_path / "train"), "train")
    path = tmp_path / "duplicates.csv"
    path.write_text("TestID,TrainID,Distance,Judgment\n1,1,0.0,0\n3,6,0.2,1\n4,7,0.4,2\n")
    setting = run.Setting(SuiteConfig(duplicates=path), whole.subset([4, 3, 1]), lambda split, column: whole)
    sample = duplicates.measure(colour_subject(), setting).samples["test"]
    assert sample["duplicate"].tolist() == [False, True, True]


@pytest.mark.parametrize("row", ["1,5,0.0,0", "1,900,0.0,0"])
def test_a_list_that_counts_in_another_order_is_refused(row: str, tmp_path: Path) -> None:
    digits = open_source("digits", "test").subset(range(8))
    path = tmp_path / "duplicates.csv"
    path.write_text(f"TestID,TrainID,Distance,Judgment\n{row}\n")
    with pytest.raises(ValueError, match="not in the order of the published CIFAR"):
        duplicates.require_order(duplicates.read_list(path), digits, digits)


def test_another_table_is_no_list_of_duplicates(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no columns TestID"):
        duplicates.read_list(path)


def test_accuracy_without_duplicates_by_hand() -> None:
    sample = {"top1": np.array([True, True, False, True]), "duplicate": np.array([True, False, False, False])}
    found = duplicates.figures({"test": sample})
    assert found["top1"] == 75
    assert found["top1_without"] == pytest.approx(200 / 3)
    assert found["top1_on_duplicates"] == 100
    assert found["duplicate_share"] == 25


# -- transfer and shifts -----------------------------------------------------------------------------------------------


def test_probes_of_separable_features_are_right_and_of_noise_are_not(rng: np.random.Generator) -> None:
    def predictions(features: np.ndarray, targets: np.ndarray) -> Predictions:
        return Predictions(features, features, targets)

    targets = np.arange(90) % 3
    apart = 10 * np.eye(3)[targets] + 0.1 * rng.standard_normal((90, 3))
    train, test = predictions(apart, targets), predictions(apart[::-1], targets[::-1])
    assert all(percent(correct) == 100 for correct in transfer.probe(train, test, seed=0).values())
    noise = predictions(rng.standard_normal((90, 3)), targets)
    assert percent(transfer.probe(train, noise, seed=0)["knn"]) < 60


def test_few_shots_are_as_many_of_each_class() -> None:
    targets = np.repeat([0, 1, 5], 20)
    rows = transfer.few(targets, 4, np.random.default_rng(0))
    assert np.bincount(targets[rows]).tolist() == [4, 4, 0, 0, 0, 4]
    assert len(set(rows.tolist())) == 12


def test_real_labels_allow_several_classes_and_skip_images_without_any() -> None:
    logits = np.eye(4)[[0, 1, 2, 3]]
    assert shifts.real_correct(logits, [[0, 2], [0], [], [3]]).tolist() == [True, False, True]


class Colour(nn.Module):
    """A classifier of red, green and blue images, under as much of timm's contract as the suite needs."""

    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(5.0))

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def forward_head(self, maps: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        pooled = maps.mean((2, 3))
        return pooled if pre_logits else self.scale * pooled

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(images))


SPEC = ImageSpec((3, 32, 32), (0.0,) * 3, (1.0,) * 3, "bilinear", 1.0)


def colour_subject() -> Subject:
    return Subject("colour", Colour(), SPEC, ("red", "green", "blue"), batch_size=4)


def write_folder(folder: Path, colours: dict[str, tuple[int, int, int]], count: int = 2) -> None:
    for name, colour in colours.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (32, 32), tuple(max(0, value - number) for value in colour)).save(
                folder / name / f"{number}.png"
            )


RGB = {"1 red": (200, 9, 9), "2 green": (9, 200, 9), "3 blue": (9, 9, 200)}


def test_classes_of_another_test_set_are_found_by_name_and_scored_among_themselves(tmp_path: Path) -> None:
    write_folder(tmp_path / "some", {"Green": (250, 200, 9), "blue": (9, 9, 200)})  # Green is redder than green
    source = open_source(str(tmp_path / "some"), "train")
    subject = colour_subject()
    assert class_indices(subject, source).tolist() == [2, 1]
    assert corrupted.predict_by_class(subject, source).correct.all()
    write_folder(tmp_path / "other", {"green": (0, 9, 0), "pink": (9, 0, 9)})
    with pytest.raises(ValueError, match="no class 'pink'"):
        class_indices(subject, open_source(str(tmp_path / "other"), "train"))


def test_classes_of_imagenet_go_by_wordnet_id_word_and_number(tmp_path: Path) -> None:
    model = timm.create_model("tffd_resnet20", num_classes=1000)
    subject = Subject("imagenet", model, SPEC)
    for names, expected in (
        (("n01440764", "n01443537"), [0, 1]),
        (("tench", "goldfish"), [1, 0]),  # in the natural order of the folders: goldfish, tench
        (("0", "1"), [0, 1]),
    ):
        folder = tmp_path / names[0]
        write_folder(folder, dict.fromkeys(names, (9, 9, 9)), 1)
        assert class_indices(subject, open_source(str(folder), "train")).tolist() == expected


def test_the_sample_of_imagenet_is_measured_on_made_shifts_and_real_labels(data_root: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=1000).eval()
    spec = ImageSpec((3, 64, 64))
    subject = Subject("imagenet", model, spec, batch_size=64)
    sample = open_source(str(data_root / "imagenet1k_sample"), "validation")
    real = tmp_path / "real.json"
    predicted = subject.predict(sample.subset(range(20))).logits.argmax(1).tolist()
    real.write_text(json.dumps([[label] for label in predicted] + [[]] * (len(sample) - 20)))
    for synset in ("n01440764", "n01443537"):
        place = tmp_path / "c" / "fog" / "3" / synset
        place.mkdir(parents=True)
        sample.decode(0).save(place / "a.JPEG")
    config = SuiteConfig(shifts=(f"real={real}", f"r={tmp_path / 'c' / 'fog' / '3'}", f"a={tmp_path}/none"))
    setting = run.Setting(config, sample.subset(range(20)), lambda split, column: sample)
    found = shifts.measure(subject, setting)
    assert shifts.figures(found.samples)["real_top1"] == 100
    assert found.facts["r_classes"] == 2
    assert len(found.problems) == 1
    assert "none" in found.problems[0]
    folders = replace(setting, config=SuiteConfig(corruptions=tmp_path / "c"))
    measured = corrupted.measure(subject, folders)
    assert list(measured.samples) == ["fog.3"]
    assert len(measured.problems) == 4  # severities 1, 2, 4 and 5


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="--corruption-images 0 is out of range; choose 1 or more"):
        SuiteConfig(corruption_images=0)


def test_named_data_are_taken_apart() -> None:
    assert parse_named("a=b/c", ("train", "test")) == ("a", "b/c", ("train", "test"))
    assert parse_named("a=b/c:x:y", ("train", "test")) == ("a", "b/c", ("x", "y"))
    with pytest.raises(ValueError, match=r"'plain' is not NAME=DATA\[:train\]\[:test\]"):
        parse_named("plain", ("train", "test"))


# -- cost --------------------------------------------------------------------------------------------------------------


def test_activations_of_resnet20_by_hand() -> None:
    stage1, stage2, stage3 = 7 * 16 * 32**2, 7 * 32 * 16**2, 7 * 64 * 8**2  # stem or projection, and six convolutions
    model = timm.create_model("tffd_resnet20", num_classes=100)
    assert activations(model, torch.zeros(1, 3, 32, 32)) == stage1 + stage2 + stage3 + 100


def test_peak_memory_by_hand() -> None:
    images = torch.zeros(1, 4, 64, 64)  # 64 KiB; two ReLUs in a row hold two such maps beside them
    assert peak_memory(nn.Sequential(nn.ReLU(), nn.ReLU(), nn.ReLU()), images) == 3 * 4 * 4 * 64**2


# -- corrupted images --------------------------------------------------------------------------------------------------


@pytest.fixture
def colours(tmp_path: Path) -> ImageSource:
    write_folder(tmp_path / "colours" / "test", RGB)
    return open_source(str(tmp_path / "colours"), "test")


@pytest.fixture
def made(colours: ImageSource, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> corrupted.Arrays:
    use_cache(monkeypatch, tmp_path / "assets")
    return corrupted.make_arrays(colours, seed=0, frost=None, workers=0)


def use_cache(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def assets(library: str, namespace: str, name: str) -> Path:
        (folder / namespace / name).mkdir(parents=True, exist_ok=True)
        return folder / namespace / name

    monkeypatch.setattr(corrupted, "cached_assets_path", assets)
    monkeypatch.setattr(duplicates, "cached_assets_path", assets)


def measure_in(folder: Path, source: ImageSource) -> Measurement:
    np.save(folder / "labels.npy", np.tile(source.labels.numpy(), 5))
    setting = run.Setting(SuiteConfig(corruptions=folder), source, lambda split, column: source)
    return corrupted.measure(colour_subject(), setting)


def test_made_arrays_have_the_published_layout_and_are_made_once(
    made: corrupted.Arrays, colours: ImageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sorted(path.stem for path in made.folder.glob("*.npy")) == sorted(KINDS)
    assert np.load(made.folder / "fog.npy").shape == (5 * len(colours), 32, 32, 3)
    monkeypatch.setattr(corrupted, "corrupt", lambda *_: pytest.fail("made again"))
    assert corrupted.make_arrays(colours, seed=0, frost=None, workers=0).folder == made.folder


def test_a_subset_of_the_images_is_corrupted_as_the_whole_is(made: corrupted.Arrays, colours: ImageSource) -> None:
    part = corrupted.make_arrays(colours.subset([1, 4]), seed=0, frost=None, workers=0)
    what = corrupted.Corrupted("snow", 4)
    assert np.array_equal(part.read(what), made.read(what)[[1, 4]])


def test_colours_survive_the_corruptions_that_keep_them(made: corrupted.Arrays, colours: ImageSource) -> None:
    measured = measure_in(made.folder, colours)
    found = corrupted.figures(measured.samples)
    assert not measured.problems
    assert found["gaussian_blur"] == found["gaussian_noise.5"] == 100
    assert found["mean"] == pytest.approx(np.mean([found[kind] for kind, c in KINDS.items() if not c.extra]))


def test_mean_corruption_error_by_hand() -> None:
    kinds = [kind for kind, corruption in KINDS.items() if not corruption.extra]
    ours, baseline = dict.fromkeys(kinds, 70.0), dict.fromkeys(kinds, 60.0)
    ours["fog"] = 40.0
    assert corrupted.mce(ours, baseline)["mce"] == pytest.approx((14 * 75 + 150) / 15)
    assert corrupted.mce(baseline, baseline)["mce"] == pytest.approx(100)
    assert corrupted.mce(ours, baseline | {"fog": 100.0}) == {}
    del ours["snow"]
    assert corrupted.mce(ours, baseline) == {}


def test_a_missing_kind_and_a_missing_severity_leave_the_others(made: corrupted.Arrays, colours: ImageSource) -> None:
    (made.folder / "fog.npy").unlink()
    np.save(made.folder / "snow.npy", np.load(made.folder / "snow.npy")[: 4 * len(colours)])
    np.save(made.folder / "frost.npy", np.load(made.folder / "frost.npy")[:-1])
    measured = measure_in(made.folder, colours)
    assert "snow.4" in measured.samples["test"]
    assert "snow.5" not in measured.samples["test"]
    assert [text.split()[0] for text in measured.problems] == ["snow.npy", "frost.npy", "fog.npy"]
    assert "lacks the severities from 5 on" in measured.problems[0]
    found = corrupted.figures(measured.samples)
    assert "mean" not in found
    assert "extra_mean" in found


@pytest.mark.parametrize(("labels", "reason"), [([0, 1], "holds 2 labels"), ([2, 2, 1, 1, 0, 0], "in another order")])
def test_arrays_of_other_images_are_refused(
    labels: list[int], reason: str, made: corrupted.Arrays, colours: ImageSource
) -> None:
    np.save(made.folder / "labels.npy", labels)
    with pytest.raises(ValueError, match=reason):
        corrupted.open_arrays(made.folder, colours)


def test_arrays_serve_a_model_that_knows_some_of_the_classes(made: corrupted.Arrays, colours: ImageSource) -> None:
    some = colours.of_classes(colours.label_names[1:])  # numbered from 0 again
    np.save(made.folder / "labels.npy", colours.labels.numpy())
    assert corrupted.open_arrays(made.folder, some).rows.tolist() == some.rows.tolist()
    labels = colours.labels.clone()
    labels[some.rows[0]] = 0
    np.save(made.folder / "labels.npy", labels.numpy())
    with pytest.raises(ValueError, match=r"\(1 such images\): these are arrays of another"):
        corrupted.open_arrays(made.folder, some)


def test_for_many_images_a_network_is_compiled_and_sees_them_as_before(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8)  # with statistics that folding must take along
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    model.num_classes = 10
    subject = Subject("small", model.eval(), SPEC, batch_size=4)
    images = rng.integers(0, 256, (10, 32, 32, 3), np.uint8)  # two whole batches and half of one
    before = subject.logits_of(images)
    monkeypatch.setattr("tffd_zoo.suite.subject.COMPILED_FROM", 11)
    subject.expect(10)
    assert subject._compiled is None
    subject.expect(11)
    compiled, batches = subject._compiled, []
    assert compiled is not None
    subject._compiled = lambda images: batches.append(len(images)) or compiled(images)
    assert subject.logits_of(images) == pytest.approx(before, rel=1e-4, abs=1e-5)
    assert batches == [4, 4]


def test_without_a_compiler_a_network_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def without_compiler(images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("there is no C++ compiler\nand a long explanation")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: without_compiler)
    subject = colour_subject()
    subject.expect(10**6)
    assert caplog.messages == ["colour cannot be compiled, so it takes longer: there is no C++ compiler"]
    assert subject.logits_of(np.zeros((4, 32, 32, 3), np.uint8)).shape == (4, 3)


def test_a_heat_map_is_drawn_of_what_there_is() -> None:
    figure = corrupted.draw({"one": {"fog.1": 50.0, "fog.2": 40.0}, "two": {"snow.3": 10.0}})
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["snow", "fog"]


# -- the run -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def suite(colours: ImageSource, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """Run parts on two models that see colours."""
    use_cache(monkeypatch, tmp_path / "assets")
    monkeypatch.setattr(run, "check_model_name", lambda name: None)

    def make_subject(name: str) -> Subject:
        subject = colour_subject()
        subject.name = name
        subject.label_names = (*colours.label_names[:2], "4 grey") if name == "other" else colours.label_names
        with torch.no_grad():
            subject.model.scale.mul_({"good": 1, "other": 1, "plain": 0.5, "broken": float("nan")}[name])
        return subject

    def run_parts(parts: str, models: tuple[str, ...] = ("good",), **settings: object) -> Path:
        config = SuiteConfig(
            suite=parts,
            out=tmp_path / "out",
            kept=tmp_path / "kept",
            fit_images=4,
            train_split="test",
            resamples=20,
            **settings,  # type: ignore[arg-type]
        )
        run.run_suite(config, models, colours, lambda split, column: colours, make_subject)
        return tmp_path / "out"

    return run_parts


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_parts_become_tables_and_differences(suite: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    out = suite("clean,calibration", against=("plain",))
    assert [(row["model"], row["top1"]) for row in read_csv(out / "clean.csv")] == [("good", "100"), ("plain", "100")]
    pairs = {row["figure"]: row for row in read_csv(out / "pairs.csv") if row["part"] == "clean"}
    assert float(pairs["top1"]["difference"]) == 0
    assert float(pairs["nll"]["high"]) < 0  # good is surer, and right
    said, written = capsys.readouterr().out, (out / "README.md").read_text()
    shown = [line for line in said.splitlines() if line.startswith("| ")]
    assert shown == [line for line in written.splitlines() if line.startswith("| ")]  # the page's tables
    assert shown[2].split()[1:4] == ["good", "|", "100"]
    assert "Accuracy\n\n| model" in said
    assert "good minus plain\n\n| part" in said


def test_differences_of_an_earlier_run_do_not_stay(
    suite: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert (suite("clean", against=("plain",)) / "pairs.csv").exists()
    capsys.readouterr()
    assert not (suite("clean") / "pairs.csv").exists()
    assert "minus" not in capsys.readouterr().out


def test_a_terminal_shows_the_parts_that_ran_and_no_earlier_ones(
    suite: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    suite("calibration")
    capsys.readouterr()
    assert "## Calibration" in (suite("clean") / "README.md").read_text()
    assert "Calibration" not in capsys.readouterr().out


def test_a_page_is_made_of_the_tables_alone(suite: Callable[..., Path]) -> None:
    out = suite("clean,calibration", against=("plain",))
    written = (out / "README.md").read_text()
    assert page(out) == written
    assert "## Accuracy" in written
    assert "## Differences" in written
    (out / "pairs.csv").unlink()
    assert "## Differences" not in page(out)


def table_of(text: str, first: str) -> list[list[str]]:
    """The cells of the table whose first heading this is."""
    lines = text[text.index(f"| {first}") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]


def test_the_page_has_a_row_for_each_set_of_images_whose_figures_a_part_has(tmp_path: Path) -> None:
    (tmp_path / "ood.csv").write_text(
        "model,far_softmax_auroc,far_knn_auroc,far_off_softmax_auroc,neighbours,far_images,far_off_images\n"
        "a,50.125,100,99.5,50,2000,9\n"
        "b,7,,1.25,50,2000,9\n"
    )
    assert table_of(page(tmp_path), "model") == [
        ["model", "unknown", "softmax_auroc", "knn_auroc", "images", "neighbours"],
        ["a", "far", "50.12", "100", "2,000", "50"],
        ["a", "far_off", "99.50", "", "9", "50"],
        ["b", "far", "7.00", "", "2,000", "50"],
        ["b", "far_off", "1.25", "", "9", "50"],
    ]


def test_the_page_shows_a_part_whose_sets_could_not_be_had(tmp_path: Path) -> None:
    (tmp_path / "ood.csv").write_text("model,neighbours\na,50\n")
    assert table_of(page(tmp_path), "model") == [["model", "neighbours"], ["a", "50"]]


def test_the_page_gives_differences_to_two_digits_of_their_interval_pair_by_pair(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text(
        "part,figure,model,against,value,value_against,difference,low,high,mcnemar_p\n"
        "clean,top1,a,b,67.97,68.25,-0.28,-1.1,0.51,0.511084\n"
        "clean,nll,a,b,1.11989,1.12367,-0.00378,-0.0247,0.01628,\n"
        "clean,top1,c,b,50,62.4,-12.4,-24,-1,2.71e-05\n"
        "clean,top1,mean of 2 pairs,,,,-6.39,-83.9,71.3,\n"
    )
    text = page(tmp_path)
    assert re.findall("^### (.*)", text, flags=re.MULTILINE) == ["a minus b", "c minus b", "mean of 2 pairs"]
    first, second, third = (table_of(block, "part")[1:] for block in text.split("### ")[1:])
    assert first == [
        ["clean", "top1", "67.97", "68.25", "-0.28", "-1.10", "0.51", "0.51"],
        ["clean", "nll", "1.120", "1.124", "-0.004", "-0.025", "0.016", ""],
    ]
    assert second == [["clean", "top1", "50", "62", "-12", "-24", "-1", "2.7e-05"]]
    assert third == [["clean", "top1", "", "", "-6", "-84", "71", ""]]


ROOT = Path(__file__).parents[1]
ZOO = ROOT / "recipes" / "results" / "zoo"


@pytest.mark.skipif(not (ZOO / "README.md").exists(), reason="no results of the zoo")
def test_the_committed_page_and_json_of_the_zoo_are_those_of_its_tables() -> None:
    assert page(ZOO) == (ZOO / "README.md").read_text(encoding="utf-8")
    assert tables(ZOO) == json.loads((ZOO / "suite.json").read_text(encoding="utf-8"))


def test_the_json_holds_the_rows_of_the_tables_with_numbers_as_numbers(suite: Callable[..., Path]) -> None:
    out = suite("clean,calibration", against=("plain",))
    found = json.loads((out / "suite.json").read_text())
    assert list(found) == ["clean", "calibration", "pairs"]
    assert found["clean"][0] == {"model": "good", "top1": 100, "top5": 100, "images": 6} | {
        "nll": pytest.approx(float(read_csv(out / "clean.csv")[0]["nll"]), abs=0)
    }
    assert found["pairs"][2]["figure"] == "nll"
    assert found["pairs"][2]["mcnemar_p"] is None
    suite("clean")  # a later run of one part leaves the rows of the others
    again = json.loads((out / "suite.json").read_text())
    assert len(again["clean"]) == 1
    assert again["calibration"] == found["calibration"]


def test_flags_that_would_do_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="--against, --ood does nothing without --suite; add --suite standard"):
        EvalConfig(("tffd_resnet20",), "digits", more=SuiteConfig(against=("other",), ood=()))
    with pytest.raises(ValueError, match="into the folder --out; leave --json and --csv out"):
        EvalConfig(("tffd_resnet20",), "digits", json=Path("figures.json"), more=SuiteConfig(suite="clean"))


def evaluate_with_cache(config: EvalConfig, assets: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        use_cache(patch, assets)
        evaluate_models(config)


def test_two_processes_measure_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = f"local-dir:{small_export(tmp_path / 'run', size=32) / 'export'}"
    parts = "clean,calibration,corruptions,duplicates,ood,transfer"
    few = SuiteConfig(
        suite=parts, images=41, fit_images=60, corruption_images=11, out=tmp_path / "one", kept=tmp_path / "kept"
    )
    use_cache(monkeypatch, tmp_path / "assets")
    evaluate_models(EvalConfig((model,), "digits", device="cpu", more=few))
    shared = replace(few, out=tmp_path / "two", kept=tmp_path / "kept2")
    # both begin without corrupted images and make them once
    on_two_processes(
        evaluate_with_cache, EvalConfig((model,), "digits", device="cpu", more=shared), tmp_path / "assets2"
    )
    for part in parts.split(","):
        alone, together = read_csv(tmp_path / "one" / f"{part}.csv"), read_csv(tmp_path / "two" / f"{part}.csv")
        assert together == alone, part
    ours, theirs = ({path.name for path in (tmp_path / kept).rglob("*.npz")} for kept in ("kept", "kept2"))
    assert ours == theirs, "what two measured is there for one, and the other way round"


def examine_on_one_of_two(folder: Path) -> None:
    dist.init_process_group("gloo")
    run.PartialState()
    rank = dist.get_rank()
    source = open_source(str(folder / "colours"), "test")

    def early(subject: Subject, setting: run.Setting) -> Measurement:
        if rank == 1:  # where process 0 waits for its rows
            raise OSError("no room")
        subject.predict(setting.source)
        return Measurement()

    def late(subject: Subject, setting: run.Setting) -> Measurement:
        subject.predict(setting.source)
        if rank == 0:  # when process 1 is done
            raise OSError("no room here")
        return Measurement()

    def sound(subject: Subject, setting: run.Setting) -> Measurement:
        return Measurement({}, {"images": len(subject.predict(setting.source.subset([0, 1, 2])).targets)})

    subject = colour_subject()
    subject.rank, subject.world_size = rank, 2
    results = run.Results()
    parts = [Part(measure.__name__, measure, lambda samples: {}) for measure in (early, late, sound)]
    setting = run.Setting(SuiteConfig(kept=folder / "kept"), source, lambda split, column: source)
    measured = run.examine(subject, parts, setting, results)
    (folder / f"{rank}.json").write_text(json.dumps([results.problems, measured["sound"].facts]))
    dist.destroy_process_group()


def test_a_part_that_fails_on_one_process_is_told_by_all_and_they_go_on(colours: ImageSource, tmp_path: Path) -> None:
    on_two_processes(examine_on_one_of_two, tmp_path)
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert told[0] == [["early of colour: process 1: no room", "late of colour: no room here"], {"images": 3}]
    assert told[1] == [["early of colour: no room", "late of colour: process 0: no room here"], {"images": 3}]


def evaluate_one_that_is_lost(config: EvalConfig, folder: Path, lost_on: int | None) -> None:
    """Evaluate where the first model cannot be loaded, on one process or (None) on all, and keep what was said."""
    rank = int(os.environ["RANK"])

    def load_or_not(name: str) -> torch.nn.Module:
        if name == config.models[0] and lost_on in (None, rank):
            raise OSError(f"{name} is gone")
        return load_model(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tffd_zoo.eval.load_model", load_or_not)
        with pytest.raises(ValueError, match="1 of these") as failed:
            evaluate_models(config)
    (folder / f"{rank}.txt").write_text(str(failed.value))


@pytest.mark.parametrize("lost_on", [0, 1, None])
def test_a_model_that_cannot_be_loaded_on_a_process_is_left_out_by_all_and_they_go_on(
    tmp_path: Path, lost_on: int | None
) -> None:
    good = f"local-dir:{small_export(tmp_path / 'run', size=32) / 'export'}"
    shutil.copytree(tmp_path / "run" / "export", tmp_path / "copy")
    few = SuiteConfig(suite="clean", images=9, out=tmp_path / "out", kept=tmp_path / "kept")
    config = EvalConfig((f"local-dir:{tmp_path / 'copy'}", good), "digits", device="cpu", more=few)
    on_two_processes(evaluate_one_that_is_lost, config, tmp_path, lost_on)
    assert all((tmp_path / f"{rank}.txt").exists() for rank in range(2))
    assert [row["model"] for row in read_csv(tmp_path / "out" / "clean.csv")] == [good]


def test_what_was_measured_is_not_measured_again(suite: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    before = read_csv(suite("clean") / "clean.csv")
    monkeypatch.setattr(Subject, "_run", lambda *_, **__: pytest.fail("measured again"))
    assert read_csv(suite("clean") / "clean.csv") == before


def test_a_model_that_lacks_a_class_is_measured_on_the_others_and_held_against_none_that_has_it(
    suite: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="1 of these could not be had"):
        suite("clean,calibration", ("good", "other"), against=("plain",))
    said = capsys.readouterr()
    assert "missing: other is not held against plain: they know other classes of these images" in said.err
    rows = {row["model"]: row for row in csv.DictReader((tmp_path / "out" / "clean.csv").open())}
    assert [(row["images"], row["left_out_images"]) for row in rows.values()] == [("6", "0"), ("4", "2"), ("6", "0")]
    assert rows["other"]["left_out_classes"] == "['3 blue']"
    assert {row["model"] for row in csv.DictReader((tmp_path / "out" / "pairs.csv").open())} == {"good"}


def test_a_temperature_is_fitted_on_images_numbered_as_the_logits_are(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", RGB | {"0 grey": (99, 99, 99)})
    subject = colour_subject()
    subject.label_names = tuple(RGB)
    train = open_source(str(tmp_path), "train")
    setting = run.Setting(SuiteConfig(), train, lambda split, column: train, subject.known)
    assert train.label_names == ("0 grey", *RGB)
    assert (len(setting.train), len(setting.fit_source)) == (8, 6)
    assert subject.predict(setting.fit_source).correct.all()


def test_a_part_that_fails_leaves_the_others(suite: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="1 of these could not be had"):
        suite("clean,ood,calibration", ood=("here=nowhere",))
    assert "missing: ood of good: here=nowhere: there is no folder nowhere" in capsys.readouterr().err


def test_a_model_that_is_broken_leaves_the_others(
    suite: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="1 of these"):
        suite("clean", ("broken", "good"))
    assert "clean of broken: the logits of broken are not finite" in capsys.readouterr().err


def test_measurements_come_back_as_they_were(tmp_path: Path) -> None:
    kept = Measurement({"a": {"x": np.arange(3), "y": np.ones((3, 2), bool)}}, {"n": 3, "word": "w"}, ("why",))
    kept.save(tmp_path / "folder" / "kept.npz")
    again = Measurement.load(tmp_path / "folder" / "kept.npz")
    assert (again.facts, again.problems) == (kept.facts, kept.problems)
    assert again.samples["a"]["y"].shape == (3, 2)
    assert again.samples["a"]["x"].tolist() == [0, 1, 2]


def test_parts_that_do_not_exist_are_named() -> None:
    with pytest.raises(ValueError, match="no part 'weather'; give standard, or some of clean,calibration"):
        run.parse_suite("clean,weather")
    assert [part.name for part in run.parse_suite("cost, clean")] == ["cost", "clean"]


def test_a_release_says_how_many_images_it_held_out() -> None:
    assert run.held_out("tffd_resnet20.c100") == 0
    assert run.held_out("resnet18") is None
