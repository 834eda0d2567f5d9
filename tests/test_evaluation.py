"""Evaluation: figures worked out by hand, timm's own validation as oracle, and the same counts on two processes."""

from __future__ import annotations

import csv
import json
import math
import subprocess
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
from accelerate import PartialState
from loopback_hub import LoopbackHub
from PIL import Image
from processes import on_two_processes
from timm.data import create_dataset, create_loader
from timm.data.model_config import resolve_input_data_config
from timm.utils import AverageMeter, accuracy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import tffd_zoo.eval
from tffd_zoo.data import eval_loader
from tffd_zoo.eval import EvalConfig, main
from tffd_zoo.evaluation import EvalResult, evaluate, model_cost
from tffd_zoo.export import export

ROOT = Path(__file__).parents[1]


class Flatten(nn.Module):
    """A classifier whose logits are its input, so that a test chooses them."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def evaluate_logits(
    logits: Sequence[Sequence[float]] | Tensor, targets: Sequence[int], batch_size: int = 2
) -> EvalResult:
    images = torch.as_tensor(logits, dtype=torch.float32)[:, :, None, None]
    batches = zip(images.split(batch_size), torch.as_tensor(targets).split(batch_size), strict=True)
    return evaluate(Flatten(), batches, device="cpu", progress=False)


def logits_of(probabilities: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[math.log(p) for p in row] for row in probabilities]


def test_top1_and_top5_count_images_over_all_batches() -> None:
    rising = [0, 1, 2, 3, 4, 5, 6]  # class 6 first, class 2 fifth
    result = evaluate_logits([rising] * 5, [6, 2, 1, 6, 0])
    assert (result.images, result.correct1, result.correct5) == (5, 2, 3)
    assert result.top1 == pytest.approx(40)
    assert result.top5 == pytest.approx(60)


def test_top5_of_three_classes_counts_every_image() -> None:
    assert evaluate_logits([[3, 2, 1]] * 4, [0, 1, 2, 2]).correct5 == 4


def test_nll_is_the_mean_of_the_images_even_where_the_last_batch_is_smaller() -> None:
    result = evaluate_logits(logits_of([[0.5, 0.5], [0.8, 0.2], [0.9, 0.1]]), [0, 0, 1])
    assert result.nll == pytest.approx(-(math.log(0.5) + math.log(0.8) + math.log(0.1)) / 3, rel=1e-6)


def test_calibration_error_by_hand() -> None:
    # bins of 1/15: two images at 0.9 (bin 13), one of them right; one at 0.7 (bin 10), right
    result = evaluate_logits(logits_of([[0.9, 0.1], [0.9, 0.1], [0.7, 0.3]]), [0, 1, 0])
    assert result.ece == pytest.approx(100 * (2 * abs(1 / 2 - 0.9) + 1 * abs(1 - 0.7)) / 3, rel=1e-5)


def test_calibration_error_does_not_average_away_within_the_whole_but_only_within_a_bin() -> None:
    # over all images accuracy and confidence are equal (0.7), but neither bin is calibrated
    result = evaluate_logits(logits_of([[0.9, 0.1], [0.5, 0.3]]), [1, 0])
    assert result.ece == pytest.approx(100 * (0.9 + (1 - 0.5 / 0.8)) / 2, rel=1e-5)


def test_certainty_lies_in_the_last_bin() -> None:
    assert evaluate_logits([[1000.0, 0.0], [1000.0, 0.0]], [0, 1]).ece == pytest.approx(50)


def test_calibration_error_agrees_with_a_loop_over_bins() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(500, 10, generator=generator)
    targets = torch.randint(0, 10, (500,), generator=generator)
    confidence, predicted = (value.numpy() for value in logits.double().softmax(1).max(1))
    correct = predicted == targets.numpy()
    expected = 0.0
    for lower, upper in zip(np.arange(15) / 15, np.arange(1, 16) / 15, strict=True):
        inside = (confidence > lower) & (confidence <= upper)
        if inside.any():
            expected += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert evaluate_logits(logits, targets.tolist(), batch_size=64).ece == pytest.approx(100 * expected, rel=1e-5)


def test_nothing_to_evaluate_is_an_error() -> None:
    with pytest.raises(ValueError, match="no image"):
        evaluate(Flatten(), [], device="cpu", progress=False)


def test_logits_that_are_not_finite_have_no_accuracy() -> None:
    with pytest.raises(ValueError, match="not finite"):
        evaluate_logits([[float("nan"), 0.0], [1.0, 0.0]], [0, 0])


def test_every_module_comes_back_in_the_mode_it_had() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Sequential(nn.Dropout(0.5)), nn.Flatten())
    model[1][0].eval()
    modes = [module.training for module in model.modules()]
    statistics = model[0].running_mean.clone()
    evaluate(model, [(torch.randn(3, 2, 1, 1), torch.zeros(3, dtype=torch.int64))], device="cpu", progress=False)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model[0].running_mean, statistics)


def test_a_model_that_caches_for_inference_trains_on_and_is_evaluated_anew() -> None:
    model = timm.create_model("levit_128s", num_classes=2)  # keeps attention biases looked up, until train() is called
    batch = (torch.randn(2, 3, 224, 224), torch.tensor([0, 1]))
    evaluate(model, [batch], device="cpu", progress=False)
    model(batch[0]).sum().backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attention_biases" in name:
                parameter.normal_(std=10)
    fresh = timm.create_model("levit_128s", num_classes=2)
    fresh.load_state_dict(model.state_dict())
    results = [evaluate(m, [batch], device="cpu", progress=False).nll for m in (model, fresh)]
    assert results[0] == pytest.approx(results[1], rel=1e-6)


def test_mixed_precision_leaves_the_metrics_in_float32() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    batch = (torch.randn(8, 4, 1, 1), torch.randint(0, 3, (8,)))
    full = evaluate(model, [batch], device="cpu", progress=False)
    mixed = evaluate(model, [batch], device="cpu", progress=False, amp_dtype=torch.bfloat16)
    assert mixed.nll != full.nll
    assert mixed.nll == pytest.approx(full.nll, rel=0.05)


# --- cost -------------------------------------------------------------------------------------------------------------


def test_multiply_adds_of_grouped_convolution_and_linear_layer_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 10)
    )
    params, macs = model_cost(model, (4, 6, 6))
    assert params == (8 * 2 * 9 + 8) + 2 * 8 + (8 * 36 * 10 + 10)
    assert macs == 6 * 6 * 8 * 2 * 9 + 8 * 36 * 10
    assert model.training


def test_multiply_adds_of_resnet20_by_hand() -> None:
    stem = 3 * 16 * 9 * 32**2
    stage = 16 * 16 * 9 * 32**2  # one 3x3 convolution at full width: the same in every stage
    convolutions = 6 * stage + 2 * (5 * stage + stage // 2)  # the first of stages 2 and 3 sees half the channels
    projections = 16 * 32 * 16**2 + 32 * 64 * 8**2
    _, macs = model_cost(timm.create_model("tffd_resnet20", num_classes=100), (3, 32, 32))
    assert macs == stem + convolutions + projections + 64 * 100 == 40_818_944


def test_multiply_adds_of_attention_are_counted() -> None:
    class OneHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24, bias=False)

        def forward(self, images: Tensor) -> Tensor:
            query, key, value = self.qkv(images.flatten(2).mT)[:, None].chunk(3, dim=-1)
            return nn.functional.scaled_dot_product_attention(query, key, value)

    assert model_cost(OneHead(), (8, 4, 4))[1] == 16 * 8 * 24 + 2 * 16 * 16 * 8


# --- against timm -----------------------------------------------------------------------------------------------------


def timm_validate(model: nn.Module, root: Path, split: str, batch_size: int) -> dict[str, float]:
    """Evaluate as timm's validate.py does: its data set, loader, transforms, accuracy and meters."""
    config = resolve_input_data_config(model, {}, use_test_size=True)
    loader = create_loader(
        create_dataset("", root=str(root), split=split),
        input_size=config["input_size"],
        batch_size=batch_size,
        use_prefetcher=True,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
        num_workers=0,
        persistent_workers=False,
        device=torch.device("cpu"),
    )
    losses, top1, top5 = AverageMeter(), AverageMeter(), AverageMeter()
    model.eval()
    with torch.inference_mode():
        for images, targets in loader:
            logits = model(images)
            correct1, correct5 = accuracy(logits, targets, topk=(1, 5))
            losses.update(nn.functional.cross_entropy(logits, targets).item(), len(targets))
            top1.update(correct1.item(), len(targets))
            top5.update(correct5.item(), len(targets))
    return {"top1": top1.avg, "top5": top5.avg, "nll": losses.avg}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 83 small JPEG and PNG images of all shapes in 7 classes, split `val`."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for index in range(83):
        label = folder / "val" / f"class_{index % 7}"
        label.mkdir(parents=True, exist_ok=True)
        coarse = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        size = tuple(int(side) for side in random.integers(40, 90, 2))
        image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
        image.save(label / f"{index}.{'png' if index % 3 else 'jpg'}")
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with random weights whose test size, crop and normalisation are none of the defaults."""
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=7)
    for module in model.modules():  # untrained BatchNorm in evaluation mode would let one class win everywhere
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    nn.init.normal_(model.get_classifier().weight)
    folder = tmp_path_factory.mktemp("student") / "export"
    write_export(model, folder, [f"class_{label}" for label in range(7)])
    return folder


def write_export(model: nn.Module, folder: Path, label_names: Sequence[str]) -> None:
    result = EvalResult(1, 0, 0, {"top1": 0.0, "top5": 0.0, "nll": 1.0, "ece": 1.0}, 1.0)
    optim = {"epochs": 1, "batch_size": 1, "accumulate": 1, "sched": "constant", "opt": "sgd", "lr": 0.1}
    export(
        model,
        folder,
        architecture="resnet10t",
        tag="test",
        recipe={
            "name": "test",
            "data": {"source": "digits", "augment": "none", "train_split": "train", "eval_split": "test", "holdout": 0},
            "optim": {**optim, "weight_decay": 0.0, "label_smoothing": 0.0},
            "run": {"seed": 0, "precision": "no"},
        },
        metrics={**result.to_json(), "params": 1, "macs": 1, "evaluation": {"split": "test"}},
        label_names=label_names,
        data_config={
            "input_size": (3, 48, 48),
            "test_input_size": (3, 56, 56),
            "crop_pct": 0.8,
            "test_crop_pct": 0.9,
            "interpolation": "bicubic",
            "mean": (0.4, 0.5, 0.6),
            "std": (0.2, 0.25, 0.3),
        },
    )


def test_the_figures_are_those_of_timms_validation(photos: Path, student: Path, tmp_path: Path) -> None:
    ours = run(student, photos, tmp_path, batch_size=32)
    theirs = timm_validate(timm.create_model(f"local-dir:{student}", pretrained=True), photos, "val", batch_size=32)
    assert ours["images"] == 83
    assert 0 < ours["correct1"] < ours["correct5"] < 83, "a case that could tell a difference"
    assert ours["correct1"] == round(theirs["top1"] * 83 / 100, 3)  # timm's meters keep percent, in float32
    assert ours["correct5"] == round(theirs["top5"] * 83 / 100, 3)
    assert ours["nll"] == pytest.approx(theirs["nll"], rel=1e-5)
    assert ours["evaluation"]["input_size"] == [3, 56, 56], "the size that the model's config gives for tests"


# --- the command ------------------------------------------------------------------------------------------------------


def run(model: Path | str, data: Path | str, folder: Path, **options: object) -> dict:
    name = str(model) if isinstance(model, str) else f"local-dir:{model}"
    config = EvalConfig(
        models=(name,),
        data=str(data),
        json=folder / "figures.json",
        **{"split": "validation", "device": "cpu", "workers": 0, **options},
    )
    main(config)
    return json.loads((folder / "figures.json").read_text())[0]


def test_table_json_and_csv_hold_the_same_figures(
    photos: Path, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = run(student, photos, tmp_path, csv=tmp_path / "figures.csv")
    table = [cell.strip() for cell in capsys.readouterr().out.splitlines()[2].strip("| ").split("|")]
    assert table[:3] == [f"local-dir:{student}", f"{figures['top1']:.2f}", f"{figures['top5']:.2f}"]
    with (tmp_path / "figures.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (int(row["correct1"]), float(row["nll"])) == (figures["correct1"], figures["nll"])
    assert row["fingerprint"] == figures["evaluation"]["fingerprint"]


def test_models_that_want_the_same_images_share_them(
    photos: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    monkeypatch.setattr(
        tffd_zoo.eval, "eval_loader", lambda *args, **kw: made.append(eval_loader(*args, **kw)) or made[-1]
    )
    subprocess.run(["cp", "-r", str(student), str(tmp_path / "copy")], check=True)
    names = (f"local-dir:{student}", f"local-dir:{tmp_path / 'copy'}")
    main(EvalConfig(models=names, data=str(photos), split="validation", device="cpu", json=tmp_path / "figures"))
    first, second = json.loads((tmp_path / "figures").read_text())
    assert len(made) == 1
    assert first["correct1"] == second["correct1"]


def test_what_was_evaluated_before_a_model_failed_is_reported(photos: Path, student: Path, tmp_path: Path) -> None:
    models = (f"local-dir:{student}", f"local-dir:{tmp_path / 'absent'}")
    with pytest.raises(ValueError, match="absent"):
        main(EvalConfig(models=models, data=str(photos), split="validation", device="cpu", json=tmp_path / "figures"))
    assert len(json.loads((tmp_path / "figures").read_text())) == 1


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("tffd_resnet21", "no model 'tffd_resnet21'; did you mean .*tffd_resnet20"),
        ("resnet18.of_our_dreams", "no weights 'of_our_dreams'; choose one of .*resnet18.a1_in1k"),
        ("resnet10", "no model 'resnet10'"),
        ("botnet50ts_256", "has no weights"),
        ("org/name", "hf-hub:org/name"),
        ("ftp:org/name", "Unknown model source"),
    ],
)
def test_an_unknown_model_is_named_before_any_data_is_read(name: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        main(EvalConfig(models=(name,), data="/nowhere", device="cpu"))


def test_no_model_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one model"):
        main(EvalConfig(models=(), data="digits", device="cpu"))


def test_a_user_sees_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        tffd_zoo.eval.run_cli(main, EvalConfig, ["tffd_resnet21", "--data", "digits", "--device", "cpu"])
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("error: there is no model 'tffd_resnet21'")


def test_a_device_that_is_not_there_is_named(photos: Path, student: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--device nonsense cannot be used"):
        run(student, photos, tmp_path, device="nonsense")


def test_data_with_another_number_of_classes_is_refused(student: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tells 7 classes apart but digits has 10"):
        run(student, "digits", tmp_path, split="test")


def test_classes_in_another_order_are_matched_by_their_names(photos: Path, student: Path, tmp_path: Path) -> None:
    model = timm.create_model(f"local-dir:{student}", pretrained=True)
    order = [3, 0, 6, 5, 1, 2, 4]
    head = model.get_classifier()
    for parameter in (head.weight, head.bias):
        parameter.data = parameter.data[order]
    write_export(model, tmp_path / "turned", [f"class_{label}" for label in order])
    turned, straight = run(tmp_path / "turned", photos, tmp_path), run(student, photos, tmp_path)
    for figure in ("correct1", "correct5", "nll"):
        assert turned[figure] == pytest.approx(straight[figure], rel=1e-5)


def test_a_class_without_images_is_said_and_the_others_are_evaluated(
    photos: Path, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["cp", "-r", str(photos), str(tmp_path / "data")], check=True)
    subprocess.run(["rm", "-r", str(tmp_path / "data" / "val" / "class_0")], check=True)
    model = timm.create_model(f"local-dir:{student}", pretrained=True)
    with torch.no_grad():
        model.get_classifier().weight.zero_()
        model.get_classifier().bias.copy_(torch.tensor([0.0, 1.0, 0, 0, 0, 0, 0]))  # says class_1 of everything
    write_export(model, tmp_path / "stubborn", [f"class_{label}" for label in range(7)])
    result = run(tmp_path / "stubborn", tmp_path / "data", tmp_path)
    assert result["correct1"] == len(list((tmp_path / "data" / "val" / "class_1").iterdir()))
    said = capsys.readouterr().err
    assert f"{result['images']} images of 6 classes from" in said
    assert "also knows class_0, of which there are no images" in said


def test_a_class_that_the_model_does_not_know_is_left_out_and_said_to_be(
    photos: Path, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = timm.create_model(f"local-dir:{student}", pretrained=True)
    head = model.get_classifier()
    for parameter in (head.weight, head.bias):
        parameter.data = parameter.data.roll(-1, 0)
    write_export(model, tmp_path / "other", [*(f"class_{label}" for label in range(1, 7)), "zebra"])
    figures = run(tmp_path / "other", photos, tmp_path, csv=tmp_path / "figures.csv")
    said = capsys.readouterr()
    assert "does not know class_0 of " in said.err
    assert ": evaluated on 6 of 7 classes, 12 of 83 images left out" in said.err
    assert "also knows zebra, of which there are no images" in said.err
    assert "| 71 of 83 |" in said.out
    evaluation = figures["evaluation"]
    assert (figures["images"], evaluation["classes"], evaluation["model_classes"]) == (71, 6, 7)
    assert (evaluation["left_out_images"], evaluation["left_out_classes"]) == (12, ["class_0"])
    with (tmp_path / "figures.csv").open() as file:
        assert next(csv.DictReader(file))["left_out_images"] == "12"
    # the same logits, evaluated where the folder has no class_0 at all
    subprocess.run(["cp", "-r", str(photos), str(tmp_path / "data")], check=True)
    subprocess.run(["rm", "-r", str(tmp_path / "data" / "val" / "class_0")], check=True)
    alone = run(student, tmp_path / "data", tmp_path)
    assert (figures["correct1"], figures["correct5"]) == (alone["correct1"], alone["correct5"])
    assert figures["nll"] == pytest.approx(alone["nll"], rel=1e-6)


def test_models_that_know_other_classes_are_evaluated_each_on_its_own(
    photos: Path, student: Path, tmp_path: Path
) -> None:
    model = timm.create_model(f"local-dir:{student}", pretrained=True)
    write_export(model, tmp_path / "other", [f"class_{label}" for label in range(1, 8)])
    models = (f"local-dir:{student}", f"local-dir:{tmp_path / 'other'}")
    main(EvalConfig(models=models, data=str(photos), device="cpu", workers=0, json=tmp_path / "figures"))
    whole, part = json.loads((tmp_path / "figures").read_text())
    assert (whole["images"], whole["evaluation"]["left_out_images"]) == (83, 0)
    assert (part["images"], part["evaluation"]["left_out_images"]) == (71, 12)


def test_a_model_that_knows_none_of_the_classes_is_refused(photos: Path, student: Path, tmp_path: Path) -> None:
    model = timm.create_model(f"local-dir:{student}", pretrained=True)
    write_export(model, tmp_path / "other", [f"animal_{label}" for label in range(7)])
    with pytest.raises(ValueError, match=r"knows none of the classes that .* has images of \(class_0, .* it knows ani"):
        run(tmp_path / "other", photos, tmp_path)


def test_the_split_is_found_as_recipes_find_it(photos: Path, student: Path, tmp_path: Path) -> None:
    assert run(student, photos, tmp_path, split=None)["evaluation"]["split"] == "validation"
    assert run(student, photos / "val", tmp_path, split=None)["images"] == 83  # a folder called val is that split
    subprocess.run(["cp", "-r", str(photos / "val"), str(tmp_path / "photos")], check=True)
    with pytest.raises(ValueError, match="has no split validation or test; it has train; name the one to evaluate on"):
        run(student, tmp_path / "photos", tmp_path, split=None)
    subprocess.run(["cp", "-r", str(photos), str(tmp_path / "two")], check=True)
    subprocess.run(["cp", "-r", str(photos / "val"), str(tmp_path / "two" / "dev")], check=True)
    with pytest.raises(ValueError, match="dev and val, each of which may be the split validation; name one"):
        run(student, tmp_path / "two", tmp_path, split=None)
    assert run(student, tmp_path / "two", tmp_path, split="dev")["images"] == 83


def test_an_unreadable_image_stops_unless_it_is_to_be_skipped(photos: Path, student: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    subprocess.run(["cp", "-r", str(photos), str(data)], check=True)
    broken = data / "val" / "class_0" / "0.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"0\.jpg"):
        run(student, data, tmp_path)
    assert run(student, data, tmp_path, skip_unreadable=True)["images"] == 82


def test_a_changed_export_is_refused_before_it_is_loaded(photos: Path, student: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    subprocess.run(["cp", "-r", str(student), str(changed)], check=True)
    weights = changed / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match="not the file that was exported"):
        run(changed, photos, tmp_path)


def test_a_student_and_its_data_come_from_the_hub(photos: Path, student: Path, tmp_path: Path) -> None:
    paths = sorted((photos / "val").rglob("*.*"))
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=[f"class_{label}" for label in range(7)])}
    columns = {
        "image": [{"bytes": path.read_bytes(), "path": path.name} for path in paths],
        "label": [path.parent.name for path in paths],
    }
    parquet = tmp_path / "validation-00000-of-00001.parquet"
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(parquet)
    with LoopbackHub() as hub:
        hub.add("org/student", {path.name: path.read_bytes() for path in student.iterdir()})
        hub.add("org/photos", {f"data/{parquet.name}": parquet.read_bytes()}, repo_type="dataset")
        command = ["-m", "tffd_zoo.eval", "hf-hub:org/student@main", "--data", "org/photos", "--split", "validation"]
        options = ["--device", "cpu", "--workers", "0", "--json", str(tmp_path / "figures.json")]
        done = hub.python([*command, *options], tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    (figures,) = json.loads((tmp_path / "figures.json").read_text())
    alone = run(student, photos, tmp_path)
    assert (figures["images"], figures["correct1"], figures["correct5"]) == (83, alone["correct1"], alone["correct5"])


def evaluate_on_one_of_two(student: Path, photos: Path, folder: Path) -> None:
    main(
        EvalConfig(
            (f"local-dir:{student}",),
            str(photos),
            "validation",
            batch_size=32,
            workers=0,
            json=str(folder / "command.json"),
        )
    )
    rank = PartialState().process_index
    assert PartialState().num_processes == 2
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten())
    model[0].running_mean.fill_(float(rank))  # statistics are each process's own: rank 0's are the ones that count
    images = torch.arange(21.0).view(7, 3, 1, 1).cos()
    share = images[:6].split(2) if rank == 0 else images[6:].split(2)  # three batches and one
    batches = [(batch, torch.zeros(len(batch), dtype=torch.int64)) for batch in share]
    result = evaluate(DistributedDataParallel(model), batches, device="cpu", distributed=True, progress=False)
    (folder / f"rank{rank}.json").write_text(json.dumps(result.to_json()))


def test_two_processes_with_uneven_shares_give_the_figures_of_one(photos: Path, student: Path, tmp_path: Path) -> None:
    on_two_processes(evaluate_on_one_of_two, student, photos, tmp_path)
    (together,) = json.loads((tmp_path / "command.json").read_text())
    alone = run(student, photos, tmp_path, batch_size=32)
    assert together["evaluation"]["processes"] == 2
    for count in ("images", "correct1", "correct5"):
        assert together[count] == alone[count]
    for figure in ("nll", "ece"):
        assert together[figure] == pytest.approx(alone[figure], rel=1e-5)

    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten())
    images = torch.arange(21.0).view(7, 3, 1, 1).cos()
    expected = evaluate(model, [(images, torch.zeros(7, dtype=torch.int64))], device="cpu", progress=False)
    for rank in range(2):
        result = EvalResult.from_json(json.loads((tmp_path / f"rank{rank}.json").read_text()))
        assert (result.images, result.correct1, result.correct5) == (7, expected.correct1, 7)
        assert result.nll == pytest.approx(expected.nll, rel=1e-6)
        assert result.ece == pytest.approx(expected.ece, rel=1e-5)
