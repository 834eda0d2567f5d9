"""What a recipe trains and evaluates on: splits that are found, classes that are numbered alike."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_data_sources import images, write_images, write_parquet

from tffd_zoo.recipe import DataConfig
from tffd_zoo.training.build import open_sources


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("train/ant", "train/bee"):
        write_images(tmp_path / name, [0, 1])
    return tmp_path


def test_the_split_to_evaluate_on_is_found_validation_before_test(root: Path) -> None:
    write_images(root / "test" / "images", [2])  # without labels
    write_images(root / "val" / "bee", [3])
    train, evaluation = open_sources(DataConfig(str(root)))
    assert train.label_names == evaluation.label_names == ("ant", "bee")
    assert (evaluation.split, evaluation.labels.tolist()) == ("validation", [1])
    assert open_sources(DataConfig(str(root), eval_split="val"))[1].split == "validation"


def test_a_class_without_training_images_comes_last_and_is_named(root: Path) -> None:
    for name in ("val/bee", "val/ape"):
        write_images(root / name, [3])
    train, evaluation = open_sources(DataConfig(str(root)))
    assert train.label_names == evaluation.label_names == ("ant", "bee", "ape")
    assert evaluation.labels.tolist() == [2, 1]
    assert train.describe() == f"4 images of 3 classes (none of ape) from {root} (train)"
    assert evaluation.describe() == f"2 images of 3 classes (none of ant) from {root} (validation)"


def test_text_labels_of_two_splits_are_one_set_of_classes(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", image=images([0, 1, 2]), label=["c", "a", "b"])
    write_parquet(tmp_path / "test.parquet", image=images([3, 4]), label=["c", "b"])
    train, evaluation = open_sources(DataConfig(str(tmp_path)))
    assert train.label_names == evaluation.label_names == ("a", "b", "c")
    assert evaluation.labels.tolist() == [2, 1]


def test_splits_that_share_no_class_are_refused(root: Path) -> None:
    write_images(root / "test" / "images", [2])
    with pytest.raises(ValueError, match=r"train and test of .* share no class \(ant, bee; images\); name a labelled"):
        open_sources(DataConfig(str(root)))


def test_without_a_split_to_evaluate_on_the_ways_out_are_named(root: Path) -> None:
    with pytest.raises(ValueError, match=r"no split validation or test; it has train; .*--eval-split.*--holdout N"):
        open_sources(DataConfig(str(root)))
    train, held_out = open_sources(DataConfig(str(root), holdout=2))
    assert (len(train), len(held_out)) == (2, 2)


def test_one_class_is_nothing_to_learn(tmp_path: Path) -> None:
    write_images(tmp_path / "images", range(3))
    with pytest.raises(ValueError, match=r"one class \(images\) leaves nothing to tell apart; give --data a"):
        open_sources(DataConfig(str(tmp_path)))
