"""Exports and tasks in Hugging Face transformers: the real library, without network."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from small_export import small_export
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)

from tffd_zoo import CANONICAL, TfFDTask


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError(f"no test of these may reach for the network: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_export(tmp_path_factory.mktemp("run")) / "export"


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def by_timm(folder: Path) -> nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def test_the_pipeline_gives_the_names_and_the_probabilities_of_the_export(exported: Path, picture: Image.Image) -> None:
    classify = pipeline("image-classification", model=str(exported))
    model = by_timm(exported)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.inference_mode():
        expected = model(transform(picture)[None]).softmax(dim=1)[0]
    answers = classify(picture, top_k=10)
    names = model.pretrained_cfg["label_names"]
    assert {answer["label"]: answer["score"] for answer in answers} == pytest.approx(
        dict(zip(names, expected.tolist(), strict=True))
    )
    assert answers[0]["label"] == names[expected.argmax()]


def test_logits_and_features_are_those_of_timm_to_the_bit_and_survive_saving(exported: Path, tmp_path: Path) -> None:
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model = by_timm(exported)
    theirs = AutoModelForImageClassification.from_pretrained(exported).eval()
    theirs.save_pretrained(tmp_path / "saved")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "saved").eval()
    backbone = AutoModel.from_pretrained(exported).eval()
    with torch.inference_mode():
        logits = model(images)
        assert torch.equal(theirs(images).logits, logits)
        assert torch.equal(again(images).logits, logits)
        pooled = model.forward_head(model.forward_features(images), pre_logits=True)
        assert torch.equal(backbone(images).pooler_output, pooled)
    assert theirs.config.id2label == again.config.id2label == dict(enumerate(model.pretrained_cfg["label_names"]))
    assert AutoImageProcessor.from_pretrained(tmp_path / "saved").data_config["input_size"] == (3, 16, 16)


def trainer(folder: Path) -> Trainer:
    """Two epochs of two steps on noise, a checkpoint after each."""
    torch.manual_seed(0)
    task = TfFDTask(timm.create_model("tffd_resnet20", num_classes=10), CANONICAL, epochs=2, batches_per_epoch=2)
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    dataset = [{"input": image, "target": index} for index, image in enumerate(images)]
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        label_names=["target"],
        save_strategy="epoch",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    return Trainer(model=task, args=arguments, train_dataset=dataset, eval_dataset=dataset)


def test_trainer_trains_a_task_evaluates_its_logits_and_resumes_to_the_bit(tmp_path: Path) -> None:
    whole = trainer(tmp_path)
    whole.train()
    assert int(whole.model.batches_seen) == 4
    found = whole.predict(whole.eval_dataset)
    with torch.inference_mode():
        images = torch.stack([example["input"] for example in whole.eval_dataset])
        torch.testing.assert_close(
            torch.from_numpy(found.predictions[0]), whole.model.get_eval_model().eval()(images), rtol=1e-4, atol=1e-5
        )

    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    ours, theirs = whole.model.state_dict(), resumed.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
