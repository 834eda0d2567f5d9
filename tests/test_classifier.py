"""tffd_zoo.load and tffd_zoo.predict: predictions as the evaluation makes them, from whatever holds an image."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from small_export import small_export

import tffd_zoo
from hub.release import release_of
from tffd_zoo.classifier import Guess
from tffd_zoo.data import open_source
from tffd_zoo.export import export
from tffd_zoo.export_record import verify_export
from tffd_zoo.models.manifest import Release, WheelFile
from tffd_zoo.predict import PredictConfig, chart, main


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_export(tmp_path_factory.mktemp("run")) / "export"


@pytest.fixture(scope="module")
def released() -> tffd_zoo.Classifier:
    return tffd_zoo.load("tffd_resnet20.ce_c100")


def noise(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8)


def test_predictions_are_those_of_the_evaluation(exported: Path) -> None:
    classifier = tffd_zoo.load(f"local-dir:{exported}")
    source = open_source("digits", "test")
    guesses = classifier.predict([source.decode(index) for index in range(len(source))])
    metrics = json.loads((exported / "metrics.json").read_text())
    labels = source.labels.tolist()
    assert sum(g[0].class_id == label for g, label in zip(guesses, labels, strict=True)) == metrics["correct1"]
    assert (
        sum(label in [guess.class_id for guess in g] for g, label in zip(guesses, labels, strict=True))
        == metrics["correct5"]
    )
    truth = classifier.probabilities([source.decode(index) for index in range(len(source))])[
        torch.arange(len(labels)), source.labels
    ]
    assert -truth.double().log().mean().item() == pytest.approx(metrics["nll"], rel=1e-5)


def test_a_temperature_travels_with_the_export_and_the_manifest_and_softens_predictions(
    exported: Path, tmp_path: Path
) -> None:
    plain, info = tffd_zoo.load(f"local-dir:{exported}"), verify_export(exported)
    calibrated = export(
        plain.model,
        tmp_path / "export",
        architecture=info.architecture,
        tag=info.tag,
        recipe=info.recipe,
        metrics=info.metrics,
        label_names=info.config["label_names"],
        data_config={"input_size": (3, 16, 16)},
        environment={"hardware": "a small machine", "hours": 0.25},
        temperature=2.0,
    )
    softened = tffd_zoo.load(f"local-dir:{calibrated.folder}")
    image = Image.fromarray(noise())
    expected = plain.probabilities([image]).log().div(2).softmax(dim=1)
    torch.testing.assert_close(softened.probabilities([image]), expected)
    entry = release_of(calibrated, WheelFile(calibrated.weights))
    assert (plain.temperature, softened.temperature, entry.temperature) == (1, 2, 2)
    assert Release.from_json(entry.to_json(), calibrated.folder).temperature == 2


def test_a_temperature_that_is_not_positive_is_refused(exported: Path, tmp_path: Path) -> None:
    info = verify_export(exported)
    model = tffd_zoo.load(f"local-dir:{exported}").model
    with pytest.raises(ValueError, match="temperature 0 is not positive"):
        export(
            model,
            tmp_path / "export",
            architecture=info.architecture,
            tag=info.tag,
            recipe=info.recipe,
            metrics=info.metrics,
            label_names=info.config["label_names"],
            temperature=0,
        )


def test_one_image_is_the_same_in_every_form(released: tffd_zoo.Classifier, tmp_path: Path) -> None:
    pixels = noise()
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "noise.png")
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    forms = [picture, tmp_path / "noise.png", str(tmp_path / "noise.png"), pixels, tensor, tensor / 255]
    first, *others = [released.predict(form) for form in forms]
    assert all(other == first for other in others)
    for guesses in released.predict(forms):
        assert [guess.label for guess in guesses] == [guess.label for guess in first]
        assert [guess.probability for guess in guesses] == pytest.approx([g.probability for g in first], rel=1e-4)
    assert [guess.probability for guess in first] == sorted((guess.probability for guess in first), reverse=True)
    assert first[0].label == released.label_names[first[0].class_id]
    assert len(first) == 5
    assert released.predict([]) == []


def test_a_network_put_in_training_mode_predicts_as_ever_and_stays_in_it(released: tffd_zoo.Classifier) -> None:
    before = released.predict(noise())
    assert not released.model.training
    released.model.train()
    state = {name: tensor.clone() for name, tensor in released.model.state_dict().items()}
    assert released.predict(noise()) == before
    assert released.model.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in released.model.state_dict().items())
    released.model.eval()


def test_a_release_brings_its_metadata_and_timms_weights_their_names(released: tffd_zoo.Classifier) -> None:
    entry = released.release
    assert entry is tffd_zoo.models.release("tffd_resnet20.ce_c100")
    assert (entry.license, entry.metrics.split, entry.recipe["model"]) == ("apache-2.0", "test", "tffd_resnet20")
    assert entry.size == entry.file.fetch().stat().st_size
    model = timm.create_model("resnet18.a1_in1k")
    assert tffd_zoo.classifier._label_names(model)[207] == "golden retriever"
    assert tffd_zoo.classifier._label_names(timm.create_model("resnet18", num_classes=2)) == ("class 0", "class 1")


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        (noise().astype(np.float32), r"shape \(40, 48, 3\) and type float32 is no image; give \(H, W, 3\) of uint8"),
        (torch.zeros(40, 48, 3), r"a tensor of shape \(40, 48, 3\) is no image; give \(3, H, W\), or a list"),
        (torch.randn(3, 40, 48), "give pixels as they are, not normalised"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "give uint8, or floats"),
        (7, "int is no image; give a PIL image, a path, an array or a tensor"),
    ],
)
def test_what_is_no_image_is_refused(image: object, complaint: str, released: tffd_zoo.Classifier) -> None:
    with pytest.raises(ValueError, match=complaint):
        released.predict(image)  # type: ignore[arg-type]


def test_a_picture_is_seen_as_a_person_sees_it_in_every_form(released: tffd_zoo.Classifier, tmp_path: Path) -> None:
    pixels = noise()
    upright = released.predict(pixels)
    lying = Image.fromarray(np.rot90(pixels).copy())
    exif = lying.getexif()
    exif[0x0112] = 6  # to be shown turned by a quarter, clockwise
    lying.save(tmp_path / "lying.png", exif=exif)
    assert released.predict(tmp_path / "lying.png") == upright
    with Image.open(tmp_path / "lying.png") as opened:
        assert released.predict(opened) == upright

    transparent = np.dstack([pixels, np.zeros((40, 48), dtype=np.uint8)])
    white = released.predict(np.full_like(pixels, 255))
    assert released.predict(transparent) == released.predict(Image.fromarray(transparent)) == white


def test_a_file_that_is_no_image_is_named(released: tffd_zoo.Classifier, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("no pixels here")
    with pytest.raises(ValueError, match=r"cannot read .*notes\.png: not an image"):
        released.predict([tmp_path / "notes.png"])
    with pytest.raises(FileNotFoundError, match=r"absent\.png"):
        released.predict("absent.png")


def test_the_command_draws_bars_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = (tmp_path / "one.png", tmp_path / "two.png")
    for seed, file in enumerate(files):
        Image.fromarray(noise(seed)).save(file)
    main(PredictConfig("tffd_resnet20", files, top_k=3, json=True))
    records = json.loads(capsys.readouterr().out)
    classifier = tffd_zoo.load("tffd_resnet20")
    assert [record["image"] for record in records] == [str(file) for file in files]
    for record, file in zip(records, files, strict=True):
        expected = classifier.predict(file, top_k=3)
        assert [guess["label"] for guess in record["guesses"]] == [guess.label for guess in expected]
        assert [guess["probability"] for guess in record["guesses"]] == pytest.approx(
            [g.probability for g in expected], rel=1e-4
        )

    main(PredictConfig("tffd_resnet20", files, top_k=2))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(files[0])
    assert len(lines) == 7
    assert chart([Guess("cat", 0.5, 3), Guess("leopard", 0.001, 1)]) == "  cat       50.0%  " + "█" * 15 + (
        "\n  leopard    0.1%"
    )
    with pytest.raises(ValueError, match="at least one image file"):
        main(PredictConfig("tffd_resnet20", ()))
