"""Deployments: every file against PyTorch, the resizing against Pillow, the folder in transformers.js."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from node_packages import node_modules
from PIL import Image
from small_export import small_export
from timm.data import create_transform
from torch import Tensor, nn

from tffd_zoo.data import ImageSource, ImageSpec, open_source
from tffd_zoo.deploy import check_close, deploy, summary, table
from tffd_zoo.deployment import Classifier, Preprocess

IMAGES = 60


@pytest.fixture(scope="module")
def name(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"local-dir:{small_export(tmp_path_factory.mktemp('run')) / 'export'}"


@pytest.fixture(scope="module")
def model(name: str) -> nn.Module:
    return timm.create_model(name, pretrained=True).eval()


@pytest.fixture(scope="module")
def test_images() -> ImageSource:
    return open_source("digits", "test").subset(range(IMAGES))


@pytest.fixture(scope="module")
def folder(name: str, test_images: ImageSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deployed") / "digits"
    deploy(name, test_images, open_source("digits", "train"), folder, calibration_images=64, timings=2)
    return folder


@pytest.fixture(scope="module")
def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "deploy.json").read_text())


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def by_timm(model: nn.Module, images: list[Image.Image]) -> Tensor:
    """Logits as a user of timm computes them."""
    transform = create_transform(**timm.data.resolve_model_data_config(model))
    with torch.inference_mode():
        return model(torch.stack([transform(image) for image in images]))


def run(path: Path, array: np.ndarray) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    (output,) = session.run(None, {given.name: array})
    return torch.from_numpy(output)


# --- resizing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
def test_preprocessing_is_pillows_but_for_a_grey_level_here_and_there(interpolation: str, crop_pct: float) -> None:
    spec = ImageSpec((3, 32, 32), interpolation=interpolation, crop_pct=crop_pct)
    transform = create_transform(**dataclasses.asdict(spec))
    for width, height in ((32, 32), (53, 70), (91, 33), (24, 20)):
        image = picture(width, height)
        found = Preprocess(spec)(torch.tensor(np.asarray(image))[None])[0]
        levels = (found - transform(image)).abs() * 255 * torch.tensor(spec.std).view(3, 1, 1)
        assert levels.max() < 1.01
        assert (levels > 0.5).double().mean() < 0.2


def test_what_cannot_be_put_into_a_file_is_said() -> None:
    with pytest.raises(ValueError, match="crop mode squash, to 32 x 32 pixels cannot be put into a file"):
        Preprocess(ImageSpec((3, 32, 32), crop_mode="squash"))


def test_a_temperature_divides_the_logits(model: nn.Module) -> None:
    image = picture(16, 16)
    classify = Classifier(model, ImageSpec.from_model(model), temperature=2.0)
    with torch.inference_mode():
        found = classify(torch.tensor(np.asarray(image))[None])
    torch.testing.assert_close(found, (by_timm(model, [image]) / 2).softmax(dim=1))


# --- the files --------------------------------------------------------------------------------------------------------


def test_float32_gives_what_timm_gives_for_any_batch_and_size(folder: Path, model: nn.Module) -> None:
    images = [picture(16, 16) for _ in range(3)]
    pixels = torch.stack([create_transform(**timm.data.resolve_model_data_config(model))(image) for image in images])
    logits = by_timm(model, images)
    torch.testing.assert_close(run(folder / "onnx/model.onnx", pixels.numpy()), logits, atol=1e-4, rtol=1e-4)
    together = np.stack([np.asarray(image) for image in images])
    found = run(folder / "onnx/classifier.onnx", together)
    torch.testing.assert_close(found, logits.softmax(dim=1), atol=1e-4, rtol=1e-3)
    larger = picture(41, 29)
    found = run(folder / "onnx/classifier.onnx", np.asarray(larger)[None])
    torch.testing.assert_close(found, by_timm(model, [larger]).softmax(dim=1), atol=0.02, rtol=0.05)


def test_torch_export_gives_the_same_without_the_code_of_the_model(folder: Path, model: nn.Module) -> None:
    images = [picture(16, 16) for _ in range(3)]
    metadata = {"labels": ""}
    program = torch.export.load(folder / "classifier.pt2", extra_files=metadata)
    with torch.inference_mode():
        found = program.module()(torch.from_numpy(np.stack([np.asarray(image) for image in images])))
    torch.testing.assert_close(found, by_timm(model, images).softmax(dim=1), atol=1e-5, rtol=1e-4)
    assert json.loads(metadata["labels"]) == [str(digit) for digit in range(10)]


def test_each_onnx_file_says_what_it_is(folder: Path) -> None:
    for path in folder.glob("onnx/*.onnx"):
        session = onnxruntime.InferenceSession(path)
        metadata = session.get_modelmeta().custom_metadata_map
        assert metadata["model"] == "tffd_resnet20.digits"
        assert json.loads(metadata["labels"]) == [str(digit) for digit in range(10)]
        file = onnx.load(path)
        onnx.checker.check_model(file)
        assert {entry.domain: entry.version for entry in file.opset_import}[""] == 18
        (given,), (output,) = session.get_inputs(), session.get_outputs()
        assert given.shape in (["batch", 3, 16, 16], ["batch", "height", "width", 3])
        assert output.shape == ["batch", 10]
        assert str(Path.home()).encode() not in path.read_bytes()
        assert b"site-packages" not in path.read_bytes()


def test_int8_has_int8_weights_with_a_scale_for_each_channel(folder: Path) -> None:
    graph = onnx.load(folder / "onnx/model_quantized.onnx").graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    producers = {node.output[0]: node for node in graph.node}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 21  # 19 of 3 x 3 and two projections
    for node in convolutions:
        weight, scale, _ = producers[node.input[1]].input
        assert tensors[weight].data_type == onnx.TensorProto.INT8
        assert list(tensors[scale].dims) == [tensors[weight].dims[0]]


def test_the_figures_are_those_that_the_files_give(
    folder: Path, record: dict[str, Any], model: nn.Module, test_images: ImageSource
) -> None:
    images = [test_images.decode(index) for index in range(IMAGES)]
    expected = by_timm(model, images).argmax(dim=1)
    assert record["pytorch"]["top1"] == pytest.approx(100 * (expected == test_images.labels).sum().item() / IMAGES)
    assert len(record["files"]) == 8
    for file in record["files"]:
        path = folder / file["file"]
        assert file["bytes"] == path.stat().st_size
        if path.name.startswith("classifier") and path.suffix == ".onnx":
            found = run(path, np.stack([np.asarray(image) for image in images])).argmax(dim=1)
            assert file["top1"] == pytest.approx(100 * (found == test_images.labels).sum().item() / IMAGES)
            assert file["same_class"] == pytest.approx(100 * (found == expected).sum().item() / IMAGES)
        assert all(file["latency_ms"][threads] > 0 for threads in ("1", "2"))
    sizes = {file["file"]: file["bytes"] for file in record["files"]}
    assert sizes["onnx/model_fp16.onnx"] < 0.6 * sizes["onnx/model.onnx"]
    assert sizes["onnx/model_quantized.onnx"] < 0.4 * sizes["onnx/model.onnx"]


def test_the_card_shows_the_figures_and_its_snippet_runs(
    folder: Path, record: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    card = (folder / "README.md").read_text()
    assert table(record) in card
    assert summary(record) in card
    picture(16, 16).save(tmp_path / "image.png")
    (tmp_path / "onnx").symlink_to(folder / "onnx")
    monkeypatch.chdir(tmp_path)
    exec(card.split("```python\n")[1].split("```")[0], {})
    (answer,) = run(folder / "onnx/classifier_quantized.onnx", np.asarray(picture(16, 16))[None]).argmax(dim=1).tolist()
    assert capsys.readouterr().out.strip() == str(answer)


# --- what is said -----------------------------------------------------------------------------------------------------


def figures(int8: float, difference: float = 0.0) -> dict[str, Any]:
    files = [
        {"file": "onnx/model.onnx", "precision": "float32", "gives": "logits", "largest_difference": difference},
        {"file": "onnx/model_quantized.onnx", "precision": "int8", "gives": "logits", "top1": int8},
    ]
    return {"pytorch": {"top1": 60.0, "largest_logit": 9.0}, "files": files}


def test_the_loss_of_int8_is_said() -> None:
    assert summary(figures(59.75)) == "int8 changes top-1 by -0.25 points, within the 0.5 that may be lost."
    assert summary(figures(59.25)) == "int8 changes top-1 by -0.75 points, more than the 0.5 that may be lost."


def test_a_float32_file_that_computes_something_else_is_refused() -> None:
    check_close(figures(60.0, difference=0.009))  # a thousandth of 1 + 9 may be lost
    for difference in (0.011, float("nan")):
        with pytest.raises(ValueError, match=r"onnx/model\.onnx is off PyTorch's logits"):
            check_close(figures(60.0, difference=difference))


def test_what_is_no_deployment_is_not_replaced(name: str, test_images: ImageSource, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ValueError, match="is no deployment; name another folder"):
        deploy(name, test_images, test_images, tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_a_missing_extra_is_named(test_images: ImageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tffd_zoo.deployment")
    monkeypatch.delattr("tffd_zoo.deployment")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ValueError, match=r"pip install 'tffd_zoo\[deploy\]'"):
        deploy("tffd_resnet20.c100", test_images, test_images, tmp_path / "new")


# --- transformers.js --------------------------------------------------------------------------------------------------


def test_transformers_js_loads_the_folder_and_gives_the_same_probabilities(folder: Path, tmp_path: Path) -> None:
    modules = node_modules()
    picture(16, 16).save(tmp_path / "image.png")
    script = Path(__file__).with_name("transformers_js.mjs")
    command = ["node", str(script), str(modules), str(folder), str(tmp_path / "image.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    for dtype, suffix in {"fp32": "", "fp16": "_fp16", "q8": "_quantized"}.items():
        expected = run(folder / f"onnx/classifier{suffix}.onnx", np.asarray(picture(16, 16))[None])[0]
        found = {answer["label"]: answer["score"] for answer in answers[dtype]}
        probabilities = {str(label): value for label, value in enumerate(expected.tolist())}
        assert found == pytest.approx(probabilities, abs=0.002 if dtype == "fp32" else 0.05)
        assert answers[dtype][0]["label"] == str(expected.argmax().item())
