"""Streaming from parquet: the images of every epoch, who reads what, resume, and what cannot be streamed."""

from __future__ import annotations

import io
import json
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
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
from processes import elsewhere
from test_data_loaders import RRC, SPEC, assert_equal, batch_sizes, by_index, seen
from test_data_sources import README, classes, images, png, write_images, write_parquet
from test_training import BASE, assert_same_weights, recipe, without_times

from tffd_zoo.data import Loader, StreamedSource, UnreadableImageError, open_source, open_streamed, streaming
from tffd_zoo.data.loaders import train_loader
from tffd_zoo.data.memory import AUGMENTS, Augment, seeded_generator
from tffd_zoo.data.streaming import RowGroup
from tffd_zoo.recipe import differences, recipe_from_cli
from tffd_zoo.run_record import read_metrics
from tffd_zoo.tasks import CSKDConfig, PSKDConfig
from tffd_zoo.training import train

PAD = AUGMENTS["pad_crop_flip"]


def write_rows(folder: Path, rows_of_files: Sequence[int], rows_per_group: int, split: str = "train") -> Path:
    """Parquet files of so many rows. Image i has the pixels of number i, unlike any other, and the label i modulo 3."""
    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    for number, rows in enumerate(rows_of_files):
        file = folder / f"{split}-{number:05}-of-{len(rows_of_files):05}.parquet"
        numbers = range(first, first + rows)
        features = {"image": datasets.Image(), "label": classes("ant", "bee", "cod")}
        write_parquet(file, features, image=images(numbers), label=[i % 3 for i in numbers])
        pq.write_table(pq.read_table(file), file, row_group_size=rows_per_group)
        first += rows
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """101 images in 3 files and 15 row groups, of 7 rows and fewer."""
    return write_rows(tmp_path_factory.mktemp("data"), [50, 7, 44], rows_per_group=7)


@pytest.fixture(scope="module")
def source(folder: Path) -> StreamedSource:
    return open_streamed(str(folder), "train")


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lanes of 4 images a batch, a buffer of 2 batches and 1 image of read-ahead, so that small data has many."""
    for name, value in {"IMAGES_PER_LANE": 4, "BUFFER": 1, "BUFFER_BATCHES": 2, "READ_AHEAD": 1}.items():
        monkeypatch.setattr(streaming, name, value)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The row groups that are read from now on, in order."""
    read: list[int] = []
    read_group = StreamedSource._read_group

    def noting(self: StreamedSource, group: int, footer: Any) -> Any:
        read.append(group)
        return read_group(self, group, footer)

    monkeypatch.setattr(StreamedSource, "_read_group", noting)
    return read


def stream(source: StreamedSource, batch_size: int, **options: Any) -> Loader:
    return train_loader(source, SPEC, batch_size, **{"seed": 0, "workers": 0, **options})


def ranks(source: StreamedSource, batch_size: int, world_size: int, **options: Any) -> list[Loader]:
    return [stream(source, batch_size, rank=rank, world_size=world_size, **options) for rank in range(world_size)]


@pytest.mark.usefixtures("small_buffers")
class TestSharding:
    @pytest.mark.parametrize("world_size", [1, 2, 3])
    @pytest.mark.parametrize("batch_size", [3, 8, 16, 200])
    def test_the_ranks_together_see_every_image_once_in_equally_many_batches(
        self, source: StreamedSource, batch_size: int, world_size: int
    ) -> None:
        shares = ranks(source, batch_size, world_size)
        left_out = 101 % (batch_size * world_size) if 101 % (batch_size * world_size) < world_size else 0
        for epoch in (0, 1):
            every = seen(*shares, epoch=epoch)
            assert len(every) == len(set(every)) == 101 - left_out
        assert len({len(share) for share in shares}) == 1
        assert [len(batch_sizes(share)) for share in shares] == [len(share) for share in shares]

    @pytest.mark.parametrize("world_size", [2, 3, 4])
    @pytest.mark.parametrize("augment", [PAD, RRC])
    def test_ranks_side_by_side_are_one_process_with_their_global_batch(
        self, source: StreamedSource, augment: Augment, world_size: int
    ) -> None:
        shares = ranks(source, 24 // world_size, world_size, augment=augment)
        whole = stream(source, 24, augment=augment)
        for *parts, both in zip(*(loader.epoch(2) for loader in (*shares, whole)), strict=True):
            for name in ("positions", "targets", "images"):
                assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(both, name))
            losses = torch.rand(101, dtype=torch.float64)
            means = [part.weight * losses[part.positions].mean() for part in parts]
            assert sum(means) / world_size == pytest.approx(losses[both.positions].mean())
        assert len(both.positions) == 5  # the last one is smaller and uneven

    def test_epochs_and_seeds_have_orders_of_their_own_and_each_the_same_again(self, source: StreamedSource) -> None:
        orders = [seen(stream(source, 16, seed=seed), epoch=epoch) for seed in (0, 1) for epoch in (0, 1)]
        assert len({tuple(order) for order in orders}) == 4
        assert seen(stream(source, 16, seed=1), epoch=1) == orders[3]

    def test_drop_last_leaves_out_the_smaller_batch(self, source: StreamedSource) -> None:
        loader = stream(source, 16, drop_last=True)
        assert batch_sizes(loader) == [16] * 6
        assert "without the last 5 images" in loader.describe()


class TestOrder:
    def make(self, groups: int, rows: int) -> StreamedSource:
        """A source that is never read."""
        return StreamedSource(
            "d", "train", ("f",), tuple(RowGroup(0, g, g * rows, rows) for g in range(groups)), ("a",), "i", "l"
        )

    def test_images_meet_those_of_many_row_groups_and_no_batch_is_a_run_of_one(self) -> None:
        order = self.make(groups=100, rows=100).order(seeded_generator(0), 128)
        of_group = [batch.div(100, rounding_mode="floor").unique() for batch in order.split(128)]
        assert min(map(len, of_group[:-1])) >= 10  # in 4 lanes; the buffers are less full at both ends of an epoch
        assert sum(map(len, of_group)) / len(of_group) > 30  # each lane's buffer holds 1,024 images

    def test_an_image_moves_half_the_buffer_either_way_in_its_lane_and_no_further_than_all_of_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(streaming, "BUFFER", 640)
        monkeypatch.setattr(streaming, "BUFFER_BATCHES", 1)
        order = self.make(groups=1, rows=10_000).order(seeded_generator(0), 40)  # one lane: in order but for the buffer
        moved = order - torch.arange(10_000)
        assert moved.abs().max() <= 640
        assert moved[1000:-1000].max() > 290 < -moved[1000:-1000].min()
        assert moved.abs().double().mean() == pytest.approx(160, rel=0.1)

    def test_every_row_group_may_come_first(self) -> None:
        source = self.make(groups=5, rows=2000)
        firsts = [int(source.order(seeded_generator(epoch), 32)[0]) // 2000 for epoch in range(100)]
        assert min(Counter(firsts)[group] for group in range(5)) >= 8


class TestReading:
    def test_pixels_and_labels_are_those_of_the_map_style_loader(
        self, folder: Path, source: StreamedSource, tmp_path: Path
    ) -> None:
        whole = open_source(str(folder), "train", cache_dir=str(tmp_path))
        assert (len(source), source.label_names) == (len(whole), whole.label_names)
        for augment in (PAD, RRC, AUGMENTS["none"]):
            plain = train_loader(whole, SPEC, 16, 3, augment=augment, workers=0, in_memory=False)
            expected = by_index(plain, epoch=1)
            for batch in stream(source, 16, seed=3, augment=augment).epoch(1):
                assert torch.equal(batch.targets, whole.labels[batch.positions])
                for index, image in zip(batch.positions.tolist(), batch.images, strict=True):
                    assert torch.equal(image, expected[index])

    @pytest.mark.parametrize("world_size", [1, 2, 4])
    def test_a_rank_reads_the_row_groups_of_its_lanes_alone(
        self, world_size: int, small_buffers: None, reads: list[int], tmp_path: Path
    ) -> None:
        source = open_streamed(str(write_rows(tmp_path, [400], rows_per_group=4)), "train")
        list(stream(source, 16 // world_size, rank=world_size - 1, world_size=world_size).epoch(0))
        lanes = 4 // world_size
        assert 100 / world_size <= len(reads) <= 100 / world_size + lanes  # a lane ends inside a row group
        assert len(set(reads)) >= len(reads) - lanes

    def test_row_groups_are_read_shortly_before_they_are_needed_and_let_go(
        self, small_buffers: None, reads: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = open_streamed(str(write_rows(tmp_path, [400], rows_per_group=4)), "train")
        held: list[int] = []
        take = StreamedSource._take

        def counting(self: StreamedSource, share: Any, groups: Any) -> Any:
            held.append(len(groups))
            return take(self, share, groups)

        monkeypatch.setattr(StreamedSource, "_take", counting)
        assert not reads  # opening has read the footer alone
        epoch = stream(source, 16).epoch(0)
        next(epoch)
        assert len(reads) < 30
        list(epoch)
        assert len(reads) >= 100
        assert max(held) < 40

    def test_workers_and_this_process_give_the_same_bits(self, source: StreamedSource) -> None:
        for augment in (PAD, RRC):
            here, there = (list(stream(source, 16, augment=augment, workers=workers).epoch(1)) for workers in (0, 2))
            assert_equal(there, here)


class TestResume:
    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("augment", [PAD, RRC])
    def test_an_epoch_taken_up_in_the_middle_has_the_same_bits(
        self, source: StreamedSource, augment: Augment, workers: int
    ) -> None:
        uninterrupted = stream(source, 8, augment=augment, workers=workers)
        list(uninterrupted.epoch(0))
        expected = list(uninterrupted.epoch(1))
        assert_equal(list(stream(source, 8, augment=augment, workers=workers).epoch(1, start_batch=5)), expected[5:])
        interrupted = uninterrupted.epoch(2)
        next(interrupted)
        assert_equal(list(uninterrupted.epoch(1, start_batch=9)), expected[9:])
        assert list(uninterrupted.epoch(1, start_batch=13)) == []

    def test_what_is_skipped_is_neither_decoded_nor_read(
        self, small_buffers: None, reads: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = open_streamed(str(write_rows(tmp_path, [400], rows_per_group=4)), "train")
        decoded: list[int] = []
        decode = streaming.decode_rgb
        monkeypatch.setattr(streaming, "decode_rgb", lambda data: decoded.append(len(data)) or decode(data))
        list(stream(source, 16).epoch(0, start_batch=20))
        assert len(decoded) == 400 - 20 * 16
        assert len(reads) < 50  # of 100; 80 images are left, and a buffer of 32


HUB_SCRIPT = """
import os, sys, urllib.error, urllib.request
from tffd_zoo.data import ImageSpec, open_streamed, train_loader
source = open_streamed("org/birds", "train")
print(len(source), source.label_names, source.revision)
try:
    urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/opened")
except urllib.error.HTTPError:
    pass  # the Hub knows no such page, but has a line of it in its log
spec = ImageSpec(input_size=(3, 16, 16))
rank, world_size = map(int, sys.argv[1:])
loader = train_loader(source, spec, 32, seed=0, rank=rank, world_size=world_size, workers=2)
print(sorted(index for batch in loader for index in batch.positions.tolist()))
"""


def noise(number: int, size: int = 64) -> dict[str, Any]:
    """An image of 12 KB: its file has to be much larger than a footer."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format="png")
    return {"bytes": buffer.getvalue(), "path": f"{number}.png"}


def fetched(hub: LoopbackHub, part: slice) -> list[tuple[int, int]]:
    """The byte ranges that the CDN gave out in that part of the log."""
    ranges = []
    for request, status in hub.requests("GET", "^/cdn/", part):
        assert status == 206, "a whole file was fetched"
        first, last = map(int, re.findall(r"\d+", request.headers["range"]))
        ranges.append((first, last))
    return ranges


def size(ranges: Sequence[tuple[int, int]]) -> int:
    return sum(last + 1 - first for first, last in ranges)


def test_of_a_hub_data_set_footers_are_fetched_first_and_then_what_each_rank_needs(tmp_path: Path) -> None:
    files = {"README.md": README}
    for number in range(2):
        rows = [noise(60 * number + i) for i in range(60)]
        table = pa.table({"image": rows, "label": [i % 3 for i in range(60)], "unused": ["x" * 5000] * 60})
        sink = io.BytesIO()
        pq.write_table(table, sink, row_group_size=12, compression="none", use_dictionary=False)
        files[f"images/train-{number:05}-of-00002.parquet"] = sink.getvalue()
    files["images/test-00000-of-00001.parquet"] = b"no parquet at all"
    with LoopbackHub() as hub:
        commit = hub.add("org/birds", files, repo_type="dataset").head.sha
        whole = sum(len(data) for path, data in files.items() if "train" in path)
        shares = []
        for rank in range(2):
            hub.log.clear()
            done = hub.python(["-c", HUB_SCRIPT, str(rank), "2"], tmp_path / f"home{rank}")
            assert done.returncode == 0, done.stderr
            opened, share = done.stdout.splitlines()
            assert opened == f"120 ('0', '1', '2') {commit}"
            (then,) = [i for i, (request, _) in enumerate(hub.log) if request.path == "/opened"]
            footers = fetched(hub, slice(then))
            assert len(footers) == 2
            assert size(footers) <= 2 * 64 * 1024  # what pyarrow reads of a file's end
            shares += json.loads(share)
            ranges = fetched(hub, slice(then, None))
            # the footers once more, and 5 row groups of 10, or 6 where the lane ends inside one
            assert whole * 0.3 < size(ranges) - size(footers) < whole * 0.45  # a third of a file is the unused column
            assert len(ranges) <= 2 + 6
            assert not [request for request, _ in hub.log if "test-00000" in request.path]
        assert sorted(shares) == list(range(120))


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = write_rows(tmp_path_factory.mktemp("splits"), [200, 184], rows_per_group=20)
    return write_rows(data, [30], rows_per_group=30, split="test")


def test_a_streaming_run_killed_in_mid_epoch_and_resumed_ends_with_the_bits_of_one_that_never_was(
    splits: Path, tmp_path: Path
) -> None:
    def streamed(run: str) -> Any:
        data = {"source": str(splits), "streaming": True, "augment": "rrc_flip"}
        return recipe(tmp_path / run, data=data, optim={"batch_size": 32}, run={"checkpoint_every": 3})

    train(streamed("uninterrupted"))
    process = elsewhere(train, streamed("killed"))
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while len(read_metrics(metrics)) < 8 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.join()
    assert 8 <= read_metrics(metrics)[-1]["step"] < 12, "not killed in mid-epoch"

    train(streamed("killed"))
    assert_same_weights(tmp_path / "killed", tmp_path / "uninterrupted")
    records = [without_times(read_metrics(tmp_path / run / "metrics.jsonl")) for run in ("killed", "uninterrupted")]
    assert records[0] == records[1]
    assert records[0][-1]["images"] == 30


def test_streaming_is_a_flag_and_another_run_but_one_older_than_the_flag_goes_on() -> None:
    assert recipe_from_cli({"base": BASE}, "", ["--streaming"]).data.streaming
    mine = BASE.to_dict()
    older = {**mine, "data": {name: value for name, value in mine["data"].items() if name != "streaming"}}
    assert differences(mine, older) == []
    streamed = replace(BASE, data=replace(BASE.data, streaming=True)).to_dict()
    assert differences(streamed, older) == ["data.streaming: None there, True here"]


# --- what cannot be streamed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"holdout": 5}}, "--holdout needs the labels of all images first, and --streaming .* leave one"),
        ({"data": {"skip_unreadable": True}}, "--skip-unreadable needs the pixels of all images first"),
        ({"data": {"in_memory": True}}, "not kept in memory; leave out --streaming or --in-memory"),
        ({"cs_kd": CSKDConfig()}, "CS-KD pairs images by their labels, and --streaming .* choose one"),
        ({"ps_kd": PSKDConfig()}, "PS-KD starts from the labels of all images, and --streaming .* choose one"),
        ({"data": {"source": "digits"}}, "--streaming reads parquet, .* not 'digits'; leave --streaming out"),
    ],
)
def test_what_needs_every_image_first_is_refused_before_anything_is_written(
    changes: dict[str, Any], message: str, splits: Path, tmp_path: Path
) -> None:
    data = {"source": str(splits), "streaming": True, **changes.pop("data", {})}
    with pytest.raises(ValueError, match=message) as caught:
        train(recipe(tmp_path / "run", data=data, tffd=None, **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_folder_of_images_and_other_formats_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "images" / "train" / "ant", [0])
    with pytest.raises(ValueError, match=r"reads parquet, .* not a folder of images; leave --streaming out"):
        open_streamed(str(tmp_path / "images"), "train")
    write_images(tmp_path / "table" / "train", [0])
    (tmp_path / "table" / "train" / "metadata.csv").write_text("file_name,label\n0.png,1\n")
    with pytest.raises(ValueError, match="table is stored as imagefolder; leave --streaming out"):
        open_streamed(str(tmp_path / "table"), "train")
    with pytest.raises(ValueError, match=r"not '\./missing'; leave --streaming out, or give --data"):
        open_streamed("./missing", "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="is empty; give --data"):
        open_streamed(str(tmp_path / "empty"), "train")


def test_a_split_or_column_that_does_not_exist_is_refused_naming_those_that_do(folder: Path) -> None:
    with pytest.raises(ValueError, match="has no split validation; it has train"):
        open_streamed(str(folder), "validation")
    with pytest.raises(ValueError, match=r"has no column species; name one .* with --label-column: image, label"):
        open_streamed(str(folder), "train", label_column="species")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named(tmp_path: Path, workers: int) -> None:
    rows = [*images([0, 1]), {"bytes": b"text", "path": None}, None]
    for broken, reason in ((2, "not an image"), (3, "it is empty")):
        write_parquet(tmp_path / "d" / "train.parquet", image=[*rows[:2], rows[broken], rows[0]][:3], label=[0, 1, 0])
        loader = stream(open_streamed(str(tmp_path / "d"), "train"), 3, workers=workers)
        with pytest.raises(UnreadableImageError) as caught:
            list(loader)
        message = str(caught.value)
        assert message.startswith(f"cannot read row 2 of {tmp_path / 'd' / 'train.parquet'}: {reason}; replace")
        assert "leave --streaming out and skip such images with --skip-unreadable" in message


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 7, 0], r"row 1 of .*train.parquet has label 7, outside its 2 classes; choose"),
        ([0, 1, -1], r"row 2 of .*train.parquet has label -1, outside"),
        ([0, None, 1], r"row 1 of .*train.parquet has label None, outside"),
    ],
)
def test_labels_outside_the_classes_are_refused_when_they_are_read(
    labels: list[int | None], message: str, tmp_path: Path
) -> None:
    features = {"image": datasets.Image(), "label": classes("a", "b")}
    write_parquet(tmp_path / "d" / "train.parquet", features, image=images(range(3)), label=labels)
    with pytest.raises(ValueError, match=message):
        list(stream(open_streamed(str(tmp_path / "d"), "train"), 3))


def test_numbers_for_labels_are_counted_from_the_footers(tmp_path: Path) -> None:
    file = tmp_path / "d" / "train.parquet"
    write_parquet(file, image=[png(i) for i in range(3)], label=[0, 4, 1])
    source = open_streamed(str(tmp_path / "d"), "train", image_column="image")
    assert source.label_names == ("0", "1", "2", "3", "4")
    assert sorted(target for batch in stream(source, 2) for target in batch.targets.tolist()) == [0, 1, 4]
    pq.write_table(pq.read_table(file), file, write_statistics=False)
    with pytest.raises(ValueError, match="don't tell how many classes column label has: make it a ClassLabel"):
        open_streamed(str(tmp_path / "d"), "train", image_column="image")


def test_a_damaged_file_is_named_when_it_is_opened_or_read(tmp_path: Path) -> None:
    write_rows(tmp_path, [40, 40], rows_per_group=40)
    source = open_streamed(str(tmp_path), "train")
    file = tmp_path / "train-00001-of-00002.parquet"
    data = file.read_bytes()
    file.write_bytes(data[:100] + bytes(1000) + data[1100:])
    with pytest.raises(ValueError, match=r"cannot read .*train-00001-of-00002.parquet.*check the file or the conn"):
        list(stream(source, 8))
    file.write_bytes(data[:-20])
    with pytest.raises(ValueError, match=r"cannot read the footer of .*train-00001-of-00002.parquet \(ArrowInvalid"):
        open_streamed(str(tmp_path), "train")
