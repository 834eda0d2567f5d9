from __future__ import annotations

import io
import json
import logging
import os
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

    def test_a_column_of_plain_bytes_serves_when_its_name_is_known_or_given(self, tmp_path: Path, open_: Any) -> None:
        write_parquet(tmp_path / "d" / "train.parquet", image=[png(5)], thing=[png(6)], kind=[0])
        assert np.array_equal(open_(tmp_path / "d", "train").decode(0), pixels(5))
        assert np.array_equal(open_(tmp_path / "d", "train", image_column="thing").decode(0), pixels(6))

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

    @pytest.mark.parametrize(
        ("columns", "asked"),
        [
            ({"genus": [0], "species": [0]}, "several label columns; .*: genus, species"),
            ({"genus": ["Apis"], "species": [0]}, "several label columns; .*: genus, species"),
            ({"label": [0], "class": ["bee"]}, "several label columns; .*: label, class"),
            ({"image_id": [7]}, "no column that is surely the label's; .*: image, image_id"),
            ({"label": [0.5], "image_id": [7]}, "column label of .* holds .*float64.*, not classes"),
            ({"label": [[0, 1]], "image_id": [7]}, "column label of .* holds List.*, not classes"),
            ({"label": [0], "picture": images([0])}, "several image columns; .*: image, picture"),
        ],
    )
    def test_what_could_be_meant_is_put_before_the_user_and_never_guessed(
        self, columns: dict[str, Any], asked: str, tmp_path: Path, open_: Any
    ) -> None:
        write_parquet(tmp_path / "d" / "train.parquet", **{"image": images([0]), **columns})
        with pytest.raises(ValueError, match=asked):
            open_(tmp_path / "d", "train")

    @pytest.mark.parametrize("as_pandas_does", [False, True])
    def test_a_columns_name_outranks_its_type_and_text_labels_are_classes_in_natural_order(
        self, as_pandas_does: bool, tmp_path: Path, open_: Any
    ) -> None:
        labels = pa.array(["dog", "cat 10", "cat 2", "dog"])
        if as_pandas_does:
            labels = labels.dictionary_encode()
        columns = {"image_id": [7, 8, 9, 10], "width": [8] * 4, "image": images(range(4)), "label": labels}
        write_parquet(tmp_path / "d" / "train.parquet", **columns)
        source = open_(tmp_path / "d", "train")
        assert (source.label_column, source.label_names) == ("label", ("cat 2", "cat 10", "dog"))
        assert source.labels.tolist() == [2, 1, 0, 2]

    def test_a_declared_class_outranks_plain_numbers(self, tmp_path: Path, open_: Any) -> None:
        features = {"photo": datasets.Image(), "rank": datasets.Value("int64"), "kind": classes("ant", "bee")}
        write_parquet(tmp_path / "d" / "train.parquet", features, photo=images([0, 1]), rank=[5, 9], kind=[1, 0])
        assert open_(tmp_path / "d", "train").label_column == "kind"

    def test_rows_without_a_text_label_and_numbers_that_are_surely_ids_are_refused(
        self, tmp_path: Path, open_: Any
    ) -> None:
        write_parquet(tmp_path / "blank" / "train.parquet", image=images([0, 1, 2]), label=["ant", " ", None])
        with pytest.raises(ValueError, match="lacks 2 labels"):
            open_(tmp_path / "blank", "train")
        write_parquet(tmp_path / "ids" / "train.parquet", image=images([0]), label=[10**6])
        with pytest.raises(ValueError, match="goes up to 1000000: ids rather than classes"):
            open_(tmp_path / "ids", "train")

    def test_paths_in_a_table_start_at_its_folder(self, tmp_path: Path, open_: Any) -> None:
        write_images(tmp_path / "d" / "pictures", [4])
        columns = {"file_name": ["pictures/4.png", "pictures/gone.png"], "label": ["ant", "bee"]}
        write_parquet(tmp_path / "d" / "train.parquet", **columns)
        source = open_(tmp_path / "d", "train")
        assert np.array_equal(source.decode(0), pixels(4))
        with pytest.raises(UnreadableImageError, match=r"row 1 .*gone\.png\): No such file"):
            source.decode(1)
        assert len(open_(tmp_path / "d", "train", skip_unreadable=True)) == 1

    def test_the_usual_names_of_a_split_are_one(self, tmp_path: Path, open_: Any) -> None:
        write_parquet(tmp_path / "d" / "validation-00000-of-00001.parquet", image=images([0]), label=[0])
        assert open_(tmp_path / "d", "val").split == "validation"

    def test_a_folder_of_one_split_answers_to_its_own_name(self, tmp_path: Path, open_: Any) -> None:
        write_parquet(tmp_path / "val" / "part-0.parquet", image=images([0, 1]), label=[0, 1])
        assert [len(open_(tmp_path / "val", name)) for name in ("val", "validation", "train")] == [2, 2, 2]
        write_parquet(tmp_path / "test" / "train-00000-of-00001.parquet", image=images([0]), label=[0])
        with pytest.raises(ValueError, match="has no split test; it has train"):
            open_(tmp_path / "test", "test")

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

    def test_the_classes_are_the_folders_right_under_the_split_whatever_lies_deeper(self, tmp_path: Path) -> None:
        for number, name in enumerate(["cat/2021", "cat/2022/may", "dev", "test/train"]):
            write_images(tmp_path / "train" / name, [number])
        source = open_source(str(tmp_path), "train")
        assert (source.labels.tolist(), source.label_names) == ([0, 0, 1, 2], ("cat", "dev", "test"))
        assert np.array_equal(source.decode(1), pixels(1))

    def test_a_class_folder_may_have_the_name_of_a_split(self, tmp_path: Path) -> None:
        for number, name in enumerate(["car", "dev", "train"]):
            write_images(tmp_path / name, [number])
        source = open_source(str(tmp_path), "train")
        assert (source.labels.tolist(), source.label_names) == ([0, 1, 2], ("car", "dev", "train"))

    def test_a_folder_that_may_be_a_class_or_a_split_is_put_before_the_user(self, tmp_path: Path) -> None:
        for name in ("dev/2021", "dev/2022", "ops/2021"):
            write_images(tmp_path / name, [0])
        with pytest.raises(ValueError, match=r"dev in .* may be a split or a class, for ops beside it .*/train, or"):
            open_source(str(tmp_path), "train")

    def test_only_the_split_that_was_asked_for_is_read(self, tmp_path: Path) -> None:
        for name in ("train/ant", "train/bee", "test/images", "extra/wasp"):
            write_images(tmp_path / name, [0])
        (tmp_path / "test" / "7.png").write_bytes(png(7))  # no class: matters to those who ask for the test split
        source = open_source(str(tmp_path), "train")
        assert source.label_names == ("ant", "bee")
        assert source.describe() == (
            f"2 images of 2 classes from {tmp_path} (train; left out: 1 folders beside the splits (extra))"
        )
        with pytest.raises(ValueError, match=r"test holds images outside class folders, such as 7\.png"):
            open_source(str(tmp_path), "test")

    def test_hidden_names_and_what_systems_leave_are_not_data_and_what_is_not_read_is_counted(
        self, tmp_path: Path
    ) -> None:
        for name in ("ant", "bee", ".ipynb_checkpoints", "__MACOSX/ant", "bee/.thumbnails"):
            write_images(tmp_path / "train" / name, [0])
        for name in ("._0.png", "Thumbs.db", "desktop.ini", ".DS_Store", "a.heic", "b.HEIC", "notes.txt", "README"):
            (tmp_path / "train" / "ant" / name).write_bytes(b"x")
        (tmp_path / "train" / "cow").mkdir()
        source = open_source(str(tmp_path), "train")
        assert source.describe() == (
            f"2 images of 2 classes from {tmp_path} (train; left out: 2 .heic (not among the formats), "
            "1 .txt (not among the formats), 7 hidden or of the system, 1 without a suffix, "
            "1 folders without an image that can be read (cow))"
        )

    @pytest.mark.parametrize(
        "suffix", ["png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "gif", "avif", "ppm", "jp2"]
    )
    def test_every_format_counts_and_the_order_of_the_classes_is_the_same_for_all(
        self, suffix: str, tmp_path: Path
    ) -> None:
        for number in (1, 2, 10):
            (tmp_path / str(number)).mkdir()
            Image.fromarray(pixels(number)).save(tmp_path / str(number) / f"x.{suffix.upper()}")
        source = open_source(str(tmp_path), "train")
        assert (source.label_names, source.labels.tolist()) == (("1", "2", "10"), [0, 1, 2])
        assert source.decode(2).size == (8, 8)

    @pytest.mark.parametrize("wanted", ["val", "valid", "validation", "dev"])
    def test_a_split_answers_to_the_name_of_its_folder_and_to_the_usual_ones(self, wanted: str, tmp_path: Path) -> None:
        for name in ("train/ant", "Val/ant", "fold7/ant"):
            write_images(tmp_path / name, [0])
        assert open_source(str(tmp_path), wanted).split == "validation"
        assert open_source(str(tmp_path), ("validation", "test")).split == "validation"
        assert open_source(str(tmp_path), "fold7").split == "fold7"
        with pytest.raises(ValueError, match="has no split test or eval; it has Val, train"):
            open_source(str(tmp_path), ("test", "eval"))

    def test_two_folders_that_may_be_the_split_are_put_before_the_user(self, tmp_path: Path) -> None:
        for name in ("train/ant", "val/ant", "dev/ant"):
            write_images(tmp_path / name, [0])
        assert open_source(str(tmp_path), "val").images.where(0).endswith("val/ant/0.png")
        with pytest.raises(ValueError, match="has dev and val, each of which may be the split validation; name one"):
            open_source(str(tmp_path), "validation")

    def test_the_folder_of_one_split_serves_under_its_own_name(self, tmp_path: Path) -> None:
        write_images(tmp_path / "test" / "ant", [0])
        assert len(open_source(str(tmp_path / "test"), "test")) == 1

    def test_a_link_to_a_folder_above_is_not_followed_for_ever(self, tmp_path: Path) -> None:
        write_images(tmp_path / "ant", [0])
        (tmp_path / "ant" / "up").symlink_to(tmp_path / "ant")
        assert len(open_source(str(tmp_path), "train")) == 1

    def test_a_path_that_exists_is_a_path_even_if_it_is_called_like_a_reader_or_a_data_set(
        self, tmp_path: Path, open_: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        write_parquet(tmp_path / "parquet" / "train.parquet", image=images([0]), label=[0])
        write_parquet(tmp_path / "neighbour" / "train.parquet", image=images([1, 2]), label=[0, 1])
        write_images(tmp_path / "digits" / "ant", [0])
        assert len(open_("parquet", "train")) == 1
        assert open_("digits", "train").label_names == ("ant",)

    def test_flags_that_mean_nothing_for_the_data_are_refused(self, tmp_path: Path) -> None:
        write_images(tmp_path / "ant", [0])
        with pytest.raises(ValueError, match=r"--image-column or --label-column \(kind\) means nothing for .*a folder"):
            open_source(str(tmp_path), "train", label_column="kind")
        with pytest.raises(ValueError, match=r"--revision \(v1\) means nothing"):
            open_source(str(tmp_path), "train", revision="v1")

    def test_without_split_folders_every_image_is_for_training_and_no_other_split_exists(self, tmp_path: Path) -> None:
        write_images(tmp_path / "ant", [0, 1])
        write_images(tmp_path / "bee", [2])
        assert open_source(str(tmp_path), "train").labels.tolist() == [0, 0, 1]
        with pytest.raises(ValueError, match="has no split test; it has train"):
            open_source(str(tmp_path), "test")

    def test_images_outside_class_folders_are_refused(self, tmp_path: Path) -> None:
        write_images(tmp_path / "d" / "ant", [0])
        write_images(tmp_path / "d", [1])
        write_images(tmp_path / "splits" / "train", [0])
        write_images(tmp_path / "splits" / "test", [0])
        for folder in ("d", "splits"):
            with pytest.raises(ValueError, match="holds images outside class folders"):
                open_source(str(tmp_path / folder), "train")

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
        with pytest.raises(UnreadableImageError, match=r"row 2 .*: it is empty"):
            source.decode(2)

    def test_what_cannot_even_be_opened_is_one_of_them(self, tmp_path: Path) -> None:
        write_images(tmp_path / "ant", [0])
        (tmp_path / "ant" / "1.png").symlink_to(tmp_path / "gone.png")
        os.mkfifo(tmp_path / "ant" / "2.png")
        (tmp_path / "ant" / "3.png").write_bytes(b"")
        source = open_source(str(tmp_path), "train")
        for position, reason in enumerate(["No such file or directory", "it is no file", "it is empty"], start=1):
            with pytest.raises(UnreadableImageError, match=rf"ant/{position}\.png: {reason}; replace"):
                source.decode(position)
        skipped = open_source(str(tmp_path), "train", skip_unreadable=True)
        assert "(train; left out: 3 unreadable (--skip-unreadable))" in skipped.describe()

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


def test_other_names_or_sizes_of_the_same_classes_are_other_images(tmp_path: Path, open_: Any) -> None:
    write_images(tmp_path / "a" / "ant", [0])
    write_images(tmp_path / "b" / "ant", [0])
    write_images(tmp_path / "c" / "ant", [1])
    (tmp_path / "b" / "ant" / "0.png").write_bytes(png(0) + b"!")
    for name, image in (("d", images([0])), ("e", images([1]))):
        write_parquet(tmp_path / name / "train.parquet", image=image, label=[0])
    write_parquet(tmp_path / "f" / "train.parquet", image=["a/ant/0.png"], label=[0])
    write_parquet(tmp_path / "g" / "train.parquet", image=[png(0) + b"!"], label=[0])
    outlines = {open_(tmp_path / name, "train").outline for name in "abcdefg"}
    assert len(outlines) == 7
    assert open_(tmp_path / "a", "train").outline in outlines


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
        done = hub.python(["-c", OPEN, repr(asked)], tmp_path / "home")
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
        done = hub.python(["-c", OPEN, repr(asked)], tmp_path / "home", HF_HUB_OFFLINE="1")
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
