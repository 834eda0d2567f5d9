"""Which logit is which class: by name where both sides have names, by number only where one has none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from tffd_zoo.atomic import save_tensors
from tffd_zoo.data import ImageSource
from tffd_zoo.data.image_source import InMemory
from tffd_zoo.loading import known_images, left_out, match_classes, number_classes, order_logits
from tffd_zoo.tasks import TeacherConfig
from tffd_zoo.training.build import load_teacher


def images_of(*names: str) -> ImageSource:
    """One image of each class."""
    number = torch.arange(len(names))
    return ImageSource("photos", "test", InMemory([b""] * len(names), "photos"), number, number, names, "i", "l")


def a_model(names: Sequence[str] | None, classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("tffd_resnet20", num_classes=classes).eval()
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": names}
    return model


@pytest.mark.parametrize(
    ("known", "there", "numbers"),
    [
        (["ant", "bee", "cow"], ["ant", "bee", "cow"], [0, 1, 2]),
        (["ant", "bee", "cow"], ["cow", "ant"], [2, 0]),
        (None, ["x", "y", "z"], [0, 1, 2]),  # the model has no names
        (["ant", "bee", "cow"], ["0", "1", "2"], [0, 1, 2]),  # the data have none
        (["crane", "ant", "crane"], ["crane", "ant", "crane"], [0, 1, 2]),  # a bird and a machine
        (["0", "1", "2"], ["0", "2"], [0, 2]),  # folders of digits, one of which is empty
        (["0", "1", "2"], ["0", "1"], [0, 1]),
    ],
)
def test_classes_are_matched(known: list[str] | None, there: list[str], numbers: list[int]) -> None:
    assert match_classes("m", known, 3, images_of(*there)) == numbers


@pytest.mark.parametrize(
    ("known", "there", "message"),
    [
        (["a", "b", "c"], ["b", "c", "d"], r"m does not know d of photos \(it knows a, b, c\)"),
        (["a", "b", "c"], ["0", "1"], "m tells 3 classes apart but photos has 2"),
        (None, ["a", "b"], "m tells 3 classes apart but photos has 2"),
        (["crane", "ant", "crane"], ["ant", "crane"], "cannot be told apart by their names: crane twice"),
    ],
)
def test_what_cannot_be_matched_is_refused(known: list[str] | None, there: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        match_classes("m", known, 3, images_of(*there))


@pytest.mark.parametrize(
    ("known", "there", "left"),
    [
        (["a", "b", "c"], ["b", "c", "d"], ["b", "c"]),
        (["a", "b", "c"], ["d", "c"], ["c"]),
        (["a", "b", "c"], ["a", "c"], ["a", "c"]),
        (["a", "b", "c"], ["0", "1", "2"], ["0", "1", "2"]),  # matched by number, or refused, later
        (None, ["a", "b"], ["a", "b"]),
    ],
)
def test_images_of_unknown_classes_are_left_out(known: list[str] | None, there: list[str], left: list[str]) -> None:
    source = images_of(*there)
    part = known_images("m", known, source)
    assert [*part.label_names] == left
    assert part.rows.tolist() == [there.index(name) for name in left]  # the images of those classes...
    assert part.labels.tolist() == [*range(len(left))]  # ...numbered anew
    assert left_out(source, part)["left_out_classes"] == [name for name in there if name not in left]


def test_a_model_that_knows_no_class_has_nothing_to_be_evaluated_on() -> None:
    with pytest.raises(
        ValueError, match=r"m knows none of the classes that photos has images of \(d, e\); it knows a, b"
    ):
        known_images("m", ["a", "b"], images_of("d", "e"))


def test_either_side_can_be_brought_into_the_order_of_the_other() -> None:
    model, source = a_model(["ant", "bee", "cow"]), images_of("cow", "ant")
    numbered = number_classes("m", model, source)
    assert (numbered.label_names, numbered.labels.tolist()) == (("ant", "bee", "cow"), [2, 0])

    images = torch.randn(2, 3, 32, 32)
    ant, bee, cow = model(images).unbind(1)
    order_logits("m", model, source)
    torch.testing.assert_close(model(images), torch.stack([cow, ant, bee], 1))
    other = a_model(["ant", "bee", "cow"])
    order_logits("m", other, source, only=True)
    torch.testing.assert_close(other(images), torch.stack([cow, ant], 1))
    assert other.num_classes == 2


def test_the_weights_of_a_run_teach_the_classes_that_they_name(tmp_path: Path) -> None:
    model = a_model(["ant", "bee", "cow"])
    weights = tmp_path / "last.safetensors"
    save_tensors(model.state_dict(), weights, label_names=json.dumps(["ant", "bee", "cow"]))
    config = TeacherConfig(model="tffd_resnet20", weights=weights)
    images = torch.randn(2, 3, 32, 32)
    teacher = load_teacher(config, images_of("cow", "ant")).eval()
    torch.testing.assert_close(teacher(images), model(images)[:, [2, 0]])
    with pytest.raises(ValueError, match="does not know dog of photos"):
        load_teacher(config, images_of("bee", "cow", "dog"))


def test_two_classes_of_one_name_keep_their_places_and_are_not_renumbered() -> None:
    source = images_of("crane", "ant", "crane")
    assert source.with_classes(["crane", "ant", "crane", "zebra"]).labels.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="cannot be told apart by their names: crane twice"):
        source.with_classes(["ant", "crane", "crane"])
