"""What data sets are called in tags and cards, and that no place of this machine is published."""

from __future__ import annotations

from pathlib import Path

import pytest

from tffd_zoo.known_data import DATASETS, data_tag, find_dataset, portable, portable_source


@pytest.mark.parametrize(
    ("source", "classes", "tag"),
    [
        ("uoft-cs/cifar100", 100, "c100"),
        ("/data/cifar100", 100, "c100"),
        ("cifar-100", 100, "c100"),
        ("ILSVRC/imagenet-1k", 1000, "in1k"),
        ("../imagenet", 1000, "in1k"),
        ("digits", 10, "digits"),
        ("pets", 2, "pets"),
        ("/home/someone/My Pets (2024)/", 2, "mypets2024"),
        ("timm/oxford-iiit-pet", 37, "oxfordiiitpet"),
        ("org/ce_birds", 5, "cebirds"),  # an underscore would make a plain twin of it
        ("Vögel", 5, "vogel"),
        ("猫", 2, "own2"),
    ],
)
def test_a_tag_names_the_data_that_it_was_trained_on(source: str, classes: int, tag: str) -> None:
    assert data_tag(source, classes) == tag


@pytest.mark.parametrize(
    ("source", "classes"),
    [
        ("in1k", 2),
        ("imagenet", 2),
        ("ILSVRC/imagenet-1k", 100),
        ("someone/in1k", 1000),
        ("someone/imagenet", 1000),
        ("uoft-cs/cifar100", 20),
        ("./digits", 10),
    ],
)
def test_no_other_data_gets_the_tag_or_the_name_of_a_known_set(source: str, classes: int) -> None:
    assert data_tag(source, classes) == f"own{classes}"
    assert find_dataset(source, classes) not in DATASETS.values()


def test_a_data_set_on_the_hub_is_named_by_its_id_and_a_folder_by_its_name() -> None:
    assert find_dataset("org/birds", 7).hub_id == "org/birds"
    assert (find_dataset("birds", 7).name, find_dataset("birds", 7).hub_id) == ("birds", None)
    assert find_dataset("cifar100", 100) == DATASETS["c100"]


def test_a_folder_goes_by_its_name_and_a_hub_id_stays() -> None:
    assert portable_source("data/pets", revision=None) == "pets"
    assert portable_source("data/pets", revision="0123abc") == "data/pets"


def test_only_what_has_the_form_of_a_path_is_cut_whatever_lies_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tffd", "cosine", "no"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    settings = {"name": "tffd", "sched": "cosine", "precision": "no", "path": "/a/b", "list": ["~/c", "./d", 1, None]}
    cut = {**settings, "path": "b", "list": ["c", "d", 1, None]}
    assert portable(settings) == cut
    assert portable("local-dir:/runs/a/export") == "local-dir:export"
    assert portable("hf-hub:org/name") == "hf-hub:org/name"
