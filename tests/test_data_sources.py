from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from loopback_hub import LoopbackHub
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import create_dataset

from tffd_zoo.data import ImageSource, UnreadableImageError, holdout, open_source

README = b"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: images/train-*
  - split: test
    path: images/test-*
---
"""


def pixels(number: int) -> np.ndarray:
    """The image of that number: 8x8, unlike any other."""
    return np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(number)).save(buffer, format="png")
    return buffer.getvalue()


def write_parquet(file: Path, features: dict[str, Any] | None = None, **columns: Sequence[Any]) -> None:
    """Write a table as the Hub does, with the features in its metadata (in no metadata, as pandas does, if None)."""
    table = pa.table(columns)
    if features is not None:
        info = {"info": {"features": datasets.Features(features).to_dict()}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file)


def images(numbers: Sequence[int]) -> list[dict[str, Any]]:
    return [{"bytes": png(number), "path": f"{number}.png"} for number in numbers]


def write_images(folder: Path, numbers: Sequence[int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / f"{number}.png").write_bytes(png(number))


def classes(*names: str) -> datasets.ClassLabel:
    return datasets.ClassLabel(names=list(names))


@pytest.fixture
def open_(tmp_path: Path) -> Callable[..., ImageSource]:
    """`open_source` with a cache of its own."""

    def open_with_cache(data: Path, split: str, **options: Any) -> ImageSource:
        return open_source(str(data), split, cache_dir=str(tmp_path / "cache"), **options)

    return open_with_cache


@pytest.fixture
def cifar_like(tmp_path: Path) -> Path:
    """A data set with CIFAR-100's columns."""
    features = {
        "img": datasets.Image(),
        "fine_label": classes("ant", "bee", "cod"),
        "coarse_label": classes("bug", "fish"),
    }
    columns = {"fine_label": [0, 1, 2], "coarse_label": [0, 0, 1]}
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", features, img=images(range(3)), **columns)
    return tmp_path / "data"


class TestParquet:
    def test_images_labels_and_class_names_are_those_of_the_table(self, cifar_like: Path, open_: Any) -> None:
        source = open_(cifar_like, "test")
        assert (len(source), source.num_classes, source.label_names) == (3, 3, ("ant", "bee", "cod"))
        assert source.labels.tolist() == [0, 1, 2]
        for index in range(3):
            assert source.image_bytes(index) == png(index)
            assert np.array_equal(source.decode(index), pixels(index))

    def test_the_fine_label_is_preferred_to_the_coarse_one_unless_it_is_named(
        self, cifar_like: Path, open_: Any
    ) -> None:
        assert open_(cifar_like, "test").label_column == "fine_label"
        coarse = open_(cifar_like, "test", label_column="coarse_label")
        assert (coarse.labels.tolist(), coarse.label_names) == ([0, 0, 1], ("bug", "fish"))

    def test_another_splits_file_is_never_opened(self, cifar_like: Path, open_: Any) -> None:
        (cifar_like / "train-00000-of-00001.parquet").write_bytes(b"no parquet at all")
        assert len(open_(cifar_like, "test")) == 3

    def test_a_table_that_pandas_wrote_is_read_by_the_shape_of_its_columns(self, tmp_path: Path, open_: Any) -> None:
        write_parquet(tmp_path / "d" / "train.parquet", picture=images([5, 6]), kind=[1, 0])
        source = open_(tmp_path / "d", "train")
        assert (source.image_column, source.label_column, source.label_names) == ("picture", "kind", ("0", "1"))
        assert np.array_equal(source.decode(1), pixels(6))

    def test_a_column_of_plain_bytes_serves_when_it_is_named(self, tmp_path: Path, open_: Any) -> None:
        write_parquet(tmp_path / "d" / "train.parquet", picture=[png(5)], kind=[0])
        assert np.array_equal(open_(tmp_path / "d", "train", image_column="picture").decode(0), pixels(5))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"label_column": "species"},
                "has no column species; name one that it has with --label-column: img, fine_label, coarse_label",
            ),
            (
                {"image_column": "image"},
                "has no column image; name one that it has with --image-column: img, fine_label, coarse_label",
            ),
            ({"image_column": "fine_label"}, "column fine_label of .* not images .* --image-column: img"),
            ({"label_column": "img"}, "column img of .* not classes .* --label-column: fine_label, coarse_label"),
        ],
    )
    def test_a_wrong_column_is_refused_naming_those_that_exist(
        self, options: dict[str, str], message: str, cifar_like: Path, open_: Any
    ) -> None:
        with pytest.raises(ValueError, match=message):
            open_(cifar_like, "test", **options)

    def test_two_label_columns_of_unknown_names_are_put_before_the_user(self, tmp_path: Path, open_: Any) -> None:
        write_parquet(tmp_path / "d" / "train.parquet", image=images([0]), genus=[0], species=[0])
        with pytest.raises(ValueError, match="several label columns; name one with --label-column: genus, species"):
            open_(tmp_path / "d", "train")

    def test_a_split_that_does_not_exist_is_refused_naming_those_that_do(self, cifar_like: Path, open_: Any) -> None:
        with pytest.raises(ValueError, match="has no split validation; it has test"):
            open_(cifar_like, "validation")

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            ([0, 7], "label 7 in row 1, outside its 2 classes"),
            ([-1, -1], "label -1 in row 0"),
            ([0, None], "lacks 1 label"),
        ],
    )
    def test_labels_outside_the_classes_are_refused(
        self, labels: list[int | None], message: str, tmp_path: Path, open_: Any
    ) -> None:
        features = {"image": datasets.Image(), "label": classes("a", "b")}
        write_parquet(tmp_path / "d" / "test.parquet", features, image=images([0, 1]), label=labels)
        with pytest.raises(ValueError, match=message):
            open_(tmp_path / "d", "test")

    def test_a_damaged_table_is_named(self, cifar_like: Path, open_: Any) -> None:
        file = cifar_like / "test-00000-of-00001.parquet"
        file.write_bytes(file.read_bytes()[:-20])
        with pytest.raises(ValueError, match=f"split test of {cifar_like} cannot be read: .*Parquet.*damaged"):
            open_(cifar_like, "test")

    def test_part_of_a_hub_repository_is_read_although_its_readme_promises_more(
        self, tmp_path: Path, open_: Any
    ) -> None:
        write_parquet(tmp_path / "d" / "images" / "test-00000-of-00001.parquet", image=images([3]), label=[0])
        (tmp_path / "d" / "README.md").write_bytes(README)
        assert len(open_(tmp_path / "d", "test")) == 1


class TestImageFolder:
    def test_class_folders_are_numbered_as_timm_numbers_them(self, tmp_path: Path) -> None:
        for number, name in enumerate(["class10", "class2", "Class1"]):
            write_images(tmp_path / "val" / name, [number, number + 10])
        source = open_source(str(tmp_path), "validation")
        reader = create_dataset("", str(tmp_path / "val")).reader
        assert source.label_names == ("Class1", "class2", "class10") == tuple(reader.class_to_idx)
        assert [(source.where(i), int(source.labels[i])) for i in range(len(source))] == reader.samples
        assert np.array_equal(source.decode(0), pixels(2))

    def test_a_class_that_one_split_lacks_does_not_shift_the_others(self, tmp_path: Path) -> None:
        for name in ("ant", "bee", "cod"):
            write_images(tmp_path / "train" / name, [0])
        for name in ("ant", "cod"):
            write_images(tmp_path / "test" / name, [1])
        test = open_source(str(tmp_path), "test")
        assert (test.labels.tolist(), test.label_names) == ([0, 2], ("ant", "bee", "cod"))

    def test_without_split_folders_every_image_is_for_training_and_no_other_split_exists(self, tmp_path: Path) -> None:
        write_images(tmp_path / "ant", [0, 1])
        write_images(tmp_path / "bee", [2])
        assert open_source(str(tmp_path), "train").labels.tolist() == [0, 0, 1]
        with pytest.raises(ValueError, match="has no split test; it has train"):
            open_source(str(tmp_path), "test")

    def test_images_outside_class_folders_are_refused(self, tmp_path: Path) -> None:
        write_images(tmp_path / "ant", [0])
        write_images(tmp_path, [1])
        with pytest.raises(ValueError, match="holds images outside class folders"):
            open_source(str(tmp_path), "train")

    def test_a_folder_with_a_metadata_file_is_left_to_datasets(self, tmp_path: Path, open_: Any) -> None:
        write_images(tmp_path / "d" / "train", [0, 1])
        (tmp_path / "d" / "train" / "metadata.csv").write_text("file_name,label\n0.png,1\n1.png,0\n")
        source = open_(tmp_path / "d", "train")
        assert source.labels.tolist() == [1, 0]
        assert np.array_equal(source.decode(1), pixels(1))

    def test_a_missing_folder_an_empty_one_a_file_and_one_without_images_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"there is no folder \./missing; give --data an existing folder"):
            open_source("./missing", "train")
        (tmp_path / "empty" / "train").mkdir(parents=True)
        with pytest.raises(FileNotFoundError, match="empty is empty; give --data"):
            open_source(str(tmp_path / "empty"), "train")
        (tmp_path / "notes").mkdir()
        (tmp_path / "notes" / "todo.xyz").write_text("nothing")
        with pytest.raises(ValueError, match="notes is not laid out as"):
            open_source(str(tmp_path / "notes"), "train")
        with pytest.raises(ValueError, match=r"todo.xyz is a file; give the folder"):
            open_source(str(tmp_path / "notes" / "todo.xyz"), "train")


class TestUnreadableImages:
    def test_a_truncated_file_is_named_when_it_is_needed(self, tmp_path: Path) -> None:
        write_images(tmp_path / "ant", [0, 1])
        (tmp_path / "ant" / "1.png").write_bytes(png(1)[:-40])
        source = open_source(str(tmp_path), "train")
        with pytest.raises(UnreadableImageError, match=r"cannot read .*ant/1.png: .*truncated.*--skip-unreadable"):
            source.decode(1)

    def test_a_row_without_an_image_is_named_by_its_number(self, tmp_path: Path, open_: Any) -> None:
        rows = [*images([0]), {"bytes": b"text", "path": "x.jpg"}, None]
        write_parquet(tmp_path / "d" / "train.parquet", image=rows, label=[0, 1, 0])
        source = open_(tmp_path / "d", "train")
        with pytest.raises(
            UnreadableImageError, match=r"cannot read row 1 of split train of .*\(x.jpg\): not an image"
        ):
            source.decode(1)
        with pytest.raises(UnreadableImageError, match=r"row 2 .*: not an image"):
            source.decode(2)

    def test_they_are_skipped_only_when_asked_and_the_count_is_logged(
        self, tmp_path: Path, open_: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        rows = [*images([0]), {"bytes": b"text", "path": None}, *images([2])]
        write_parquet(tmp_path / "d" / "train.parquet", image=rows, label=[0, 1, 2])
        assert len(open_(tmp_path / "d", "train")) == 3
        with caplog.at_level(logging.WARNING):
            source = open_(tmp_path / "d", "train", skip_unreadable=True)
        assert "skipped 1 unreadable images of 3" in caplog.text
        assert (source.labels.tolist(), source.num_classes) == ([0, 2], 3)
        assert np.array_equal(source.decode(1), pixels(2))


class TestDigits:
    def test_the_two_splits_are_scikit_learns_images_each_once_in_the_proportions_of_the_classes(self) -> None:
        digits = load_digits()
        train, test = open_source("digits", "train"), open_source("digits", "test")
        assert (len(train), len(test)) == (1437, 360)
        assert torch.cat([train.rows, test.rows]).sort().values.equal(torch.arange(1797))
        sizes = torch.bincount(torch.from_numpy(digits.target))
        assert (torch.bincount(test.labels) - sizes * 360 / 1797).abs().max() < 1
        for index in (0, 359):
            row = int(test.rows[index])
            grey = np.asarray(test.decode(index))[..., 0]
            assert np.array_equal(grey, np.round(digits.images[row] * 255 / 16))
            assert test.labels[index] == digits.target[row]

    def test_they_have_no_validation_split(self) -> None:
        with pytest.raises(ValueError, match="digits has no split validation; it has train, test"):
            open_source("digits", "validation")


class TestHoldout:
    def test_each_class_gives_its_share_and_the_largest_remainders_the_rest(self) -> None:
        source = open_source("digits", "train")
        source = source.subset(torch.cat([(source.labels == c).nonzero()[:n, 0] for c, n in ((0, 6), (1, 3), (2, 1))]))
        rest, held_out = holdout(source, 5)  # shares 3, 1.5, 0.5: rounded down 3, 1, 0, and the tie goes to class 1
        assert torch.bincount(held_out.labels, minlength=3)[:3].tolist() == [3, 2, 0]
        assert torch.cat([rest.rows, held_out.rows]).sort().values.equal(source.rows.sort().values)

    def test_it_depends_on_the_seed_alone_and_shares_the_storage(self) -> None:
        source = open_source("digits", "train")
        first, again, other = (holdout(source, 100, seed=seed)[1] for seed in (1, 1, 2))
        assert first.rows.equal(again.rows)
        assert not first.rows.equal(other.rows)
        assert first.images is source.images
        assert first.decode(3).tobytes() == source.decode(int((source.rows == first.rows[3]).nonzero())).tobytes()

    @pytest.mark.parametrize("n", [0, 1437, -3])
    def test_a_number_that_leaves_one_part_empty_is_refused(self, n: int) -> None:
        with pytest.raises(ValueError, match=f"cannot hold {n} images out of 1437; choose from 1 to 1436"):
            holdout(open_source("digits", "train"), n)


def test_the_fingerprint_follows_the_labels_their_names_and_the_choice_of_images() -> None:
    source = open_source("digits", "train")
    assert source.fingerprint == open_source("digits", "train").fingerprint
    others = [open_source("digits", "test"), source.subset(range(10)), source.subset([1, 0]), source.subset([0, 1])]
    assert len({source.fingerprint, *(other.fingerprint for other in others)}) == 5


OPEN = """
import sys
from tffd_zoo.data import open_source
for data, split, revision in eval(sys.argv[1]):
    try:
        source = open_source(data, split, revision=revision)
        print(len(source), source.revision, source.labels.tolist(), source.decode(0).size)
    except ValueError as error:
        print(str(error).replace(chr(10), " | "))
"""


def test_of_a_hub_data_set_one_split_is_downloaded_at_one_commit_and_found_again_offline(tmp_path: Path) -> None:
    files = {"README.md": README}
    for split, numbers in (("train", range(4)), ("test", range(2))):
        write_parquet(tmp_path / split, image=images(numbers), label=[0, 1, 0, 1][: len(numbers)])
        files[f"images/{split}-00000-of-00001.parquet"] = (tmp_path / split).read_bytes()
    with LoopbackHub() as hub:
        commit = hub.add("org/birds", files, repo_type="dataset").head.sha
        asked = [
            ("org/birds", "test", None),
            ("org/birds", "dev", None),
            ("org/birds", "test", "v9"),
            ("org/gone", "test", None),
        ]
        done = hub.python(OPEN, tmp_path / "home", repr(asked))
        assert done.stdout.splitlines() == [
            f"2 {commit} [0, 1] (8, 8)",
            "org/birds has no split dev; it has train, test",
            "org/birds has no revision v9 on the Hub",
            "org/gone is no folder, and on the Hub it is gated, private or missing. Log in with `hf auth login` and | "
            f"accept the terms at {hub.url}/datasets/org/gone, or give a copy on disk with --data FOLDER",
        ], done.stderr
        assert len(hub.requests("GET", "^/cdn/")) == 1  # the file of the test split; that of train never

        before = len(hub.requests())
        asked = [("org/birds", "test", None), ("org/birds", "train", None), ("org/gone", "test", None)]
        done = hub.python(OPEN, tmp_path / "home", repr(asked), HF_HUB_OFFLINE="1")
        assert done.stdout.splitlines() == [
            f"2 {commit} [0, 1] (8, 8)",
            "org/birds in the local cache has no split train; it has test",
            "org/gone is neither a folder nor in the local cache, and HF_HUB_OFFLINE is set. | "
            "Give a folder with --data FOLDER, or go online once (gated data want `hf auth login` first).",
        ], done.stderr
        assert len(hub.requests()) == before


def test_cifar100_has_a_hundred_test_images_of_each_class(data_root: Path, open_: Any) -> None:
    source = open_(data_root / "cifar100", "test")
    assert (source.image_column, source.label_column) == ("img", "fine_label")
    assert (source.label_names[0], source.label_names[99]) == ("apple", "worm")
    assert torch.bincount(source.labels).tolist() == [100] * 100
    assert source.decode(9_999).size == (32, 32)
