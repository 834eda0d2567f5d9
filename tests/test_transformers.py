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
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline


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
