from __future__ import annotations

import io
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor
from torchvision.transforms import AugMix, InterpolationMode, RandAugment, Resize, TrivialAugmentWide

from tffd_zoo.data import (
    Augment,
    Batch,
    ImageSource,
    ImageSpec,
    Loader,
    UnreadableImageError,
    eval_loader,
    loaders,
    open_source,
    train_loader,
)
from tffd_zoo.data.memory import AUGMENTS, CropsAndFlips, draw_crops_and_flips, pad_crop_flip, seeded_generator
from tffd_zoo.data.workers import WorkerPool, default_workers, workers_beside

SPEC = ImageSpec(input_size=(3, 16, 16), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), crop_pct=1.0)
RRC = AUGMENTS["rrc_flip"]
TELLS_WHO_SENT_A_SIGNAL = pytest.mark.skipif(
    sys.platform == "darwin", reason="macOS does not tell who sent a signal, so workers obey each one"
)
TRIVIAL = replace(AUGMENTS["pad_crop_turns"], auto_augment="trivial")


def signal_then_abs(number: int) -> int:
    os.kill(os.getpid(), signal.SIGTERM)
    return abs(number)


def answer_late(seconds: int) -> int:
    time.sleep(seconds)
    return seconds


@dataclass(frozen=True)
class Pngs:
    """Random images in memory, each of its own pixels."""

    encoded: Sequence[bytes]

    def __len__(self) -> int:
        return len(self.encoded)

    def read(self, row: int) -> bytes:
        return self.encoded[row]

    def where(self, row: int) -> str:
        return f"image {row}"


def make_source(images: int, width: int = 16, height: int = 16, classes: int = 3) -> ImageSource:
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(images):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, format="png")
        encoded.append(buffer.getvalue())
    return ImageSource(
        name="random images",
        split="train",
        images=Pngs(encoded),
        rows=torch.arange(images),
        labels=torch.arange(images) % classes,
        label_names=tuple(f"class {c}" for c in range(classes)),
        image_column="image",
        label_column="label",
    )


def seen(*loaders: Loader, epoch: int = 0) -> list[int]:
    return [index for loader in loaders for batch in loader.epoch(epoch) for index in batch.positions.tolist()]


def batch_sizes(loader: Loader) -> list[int]:
    return [len(batch.images) for batch in loader]


def assert_equal(batches: Sequence[Batch], others: Sequence[Batch]) -> None:
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert torch.equal(batch.positions, other.positions)
        assert torch.equal(batch.targets, other.targets)
        assert torch.equal(batch.images, other.images)
        assert batch.weight == other.weight


def by_index(loader: Loader, epoch: int = 0) -> dict[int, Tensor]:
    return {
        index: image
        for batch in loader.epoch(epoch)
        for index, image in zip(batch.positions.tolist(), batch.images, strict=True)
    }


def moved_and_normalised(pixels: Any, choices: CropsAndFlips, index: int, padding_mode: str) -> Any:
    """One image of 16 x 16 as training sees it, padded by 3 on every side: (16, 16, 3) float64."""
    edges = ((3, 3), (3, 3), (0, 0))
    padded = np.pad(pixels, edges, "reflect") if padding_mode == "reflect" else np.pad(pixels, edges)
    top, left = int(choices.top[index]), int(choices.left[index])
    cropped = padded[top : top + 16, left : left + 16]
    if choices.flip[index]:
        cropped = cropped[:, ::-1]
    return (cropped / np.float64(255) - SPEC.mean) / SPEC.std


class TestSharding:
    def test_an_epoch_shows_every_image_once_in_a_new_order(self) -> None:
        loader = train_loader(make_source(37), SPEC, 5, seed=0)
        first, second = (seen(loader, epoch=epoch) for epoch in (0, 1))
        assert sorted(first) == sorted(second) == list(range(37))
        assert first != second
        assert batch_sizes(loader) == [5] * 7 + [2]
        assert len(loader) == 8

    @pytest.mark.parametrize("images", [36, 37, 39])
    def test_the_ranks_together_see_every_image_once_in_equally_many_batches(self, images: int) -> None:
        shares = [train_loader(make_source(images), SPEC, 4, seed=3, rank=rank, world_size=3) for rank in range(3)]
        left_out = images % 12 if images % 12 < 3 else 0
        assert len(seen(*shares)) == len(set(seen(*shares))) == images - left_out
        assert len({len(share) for share in shares}) == 1
        assert (f"without the last {left_out} images" in shares[0].describe()) == (left_out > 0)

    @pytest.mark.parametrize("augment", [AUGMENTS["pad_crop_flip"], RRC, TRIVIAL])
    def test_two_ranks_side_by_side_are_one_process_with_the_doubled_batch(self, augment: Augment) -> None:
        source = make_source(21)
        first, second = (
            train_loader(source, SPEC, 4, seed=1, rank=rank, world_size=2, augment=augment, workers=0)
            for rank in (0, 1)
        )
        whole = train_loader(source, SPEC, 8, seed=1, augment=augment, workers=0)
        for a, b, both in zip(first.epoch(2), second.epoch(2), whole.epoch(2), strict=True):
            assert torch.equal(torch.cat([a.positions, b.positions]), both.positions)
            assert torch.equal(torch.cat([a.targets, b.targets]), both.targets)
            assert torch.equal(torch.cat([a.images, b.images]), both.images)
        assert (len(a.positions), len(b.positions)) == (3, 2)  # the last one, of 5

    def test_weighted_means_of_the_ranks_average_to_the_mean_of_the_global_batch(self) -> None:
        losses = torch.rand(23, dtype=torch.float64)
        shares = [train_loader(make_source(23), SPEC, 3, seed=0, rank=rank, world_size=3) for rank in range(3)]
        for batches in zip(*(share.epoch(0) for share in shares), strict=True):
            mean_of_ranks = sum(batch.weight * losses[batch.positions].mean() for batch in batches) / 3
            global_mean = losses[torch.cat([batch.positions for batch in batches])].mean()
            assert mean_of_ranks == pytest.approx(global_mean)
        assert [batch.weight for batch in batches] == pytest.approx([6 / 5, 6 / 5, 3 / 5])  # 2, 2 and 1 of 5 images

    def test_drop_last_leaves_out_the_smaller_batch(self) -> None:
        loader = train_loader(make_source(37), SPEC, 5, seed=0, drop_last=True)
        assert batch_sizes(loader) == [5] * 7
        assert "without the last 2 images" in loader.describe()

    @pytest.mark.parametrize(("images", "world_size"), [(10, 1), (10, 3), (4, 3), (2, 3)])
    def test_evaluation_sees_every_image_once_over_all_ranks_in_order(self, images: int, world_size: int) -> None:
        source = make_source(images)
        ranks = [eval_loader(source, SPEC, 3, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert seen(*ranks) == list(range(images))
        assert [len(batch_sizes(share)) for share in ranks] == [len(share) for share in ranks]
        sizes = [sum(batch_sizes(share)) for share in ranks]
        assert max(sizes) - min(sizes) <= 1

    def test_targets_are_the_labels_of_the_indices(self) -> None:
        source = make_source(10)
        for batch in [*train_loader(source, SPEC, 4, seed=0).epoch(0), *eval_loader(source, SPEC, 4)]:
            assert torch.equal(batch.targets, source.labels[batch.positions])


class TestResume:
    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("augment", [AUGMENTS["pad_crop_flip"], RRC, TRIVIAL])
    def test_an_epoch_taken_up_in_the_middle_has_the_same_bits(self, augment: Augment, workers: int) -> None:
        source = make_source(22, width=24, height=20)
        options: Any = {"augment": augment, "workers": workers, "in_memory": False}
        uninterrupted = train_loader(source, SPEC, 4, seed=5, **options)
        list(uninterrupted.epoch(0))
        expected = list(uninterrupted.epoch(1))
        assert_equal(list(train_loader(source, SPEC, 4, seed=5, **options).epoch(1, start_batch=2)), expected[2:])
        interrupted = uninterrupted.epoch(2)
        next(interrupted)
        assert_equal(list(uninterrupted.epoch(1, start_batch=4)), expected[4:])

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_memory_workers_and_this_process_give_the_same_bits(self, memory_format: torch.memory_format) -> None:
        source = make_source(11, width=24, height=20)
        made = [
            list(
                train_loader(
                    source, SPEC, 4, 5, in_memory=in_memory, workers=workers, memory_format=memory_format
                ).epoch(3)
            )
            for in_memory, workers in ((True, 0), (False, 0), (False, 2))
        ]
        assert_equal(made[0], made[1])
        assert_equal(made[0], made[2])
        assert all(batch.images.is_contiguous(memory_format=memory_format) for batches in made for batch in batches)


class TestAugmentation:
    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
    def test_batches_equal_an_image_by_image_oracle(
        self, padding_mode: Any, memory_format: torch.memory_format
    ) -> None:
        source = make_source(12)
        augment = Augment("pad", padding=3, padding_mode=padding_mode)
        loader = train_loader(source, SPEC, 5, seed=7, augment=augment, memory_format=memory_format)
        choices = draw_crops_and_flips(seeded_generator(7, loaders.CROPS, 4), 12, padding=3, hflip=0.5)
        assert 0 < choices.flip.sum() < 12
        for index, image in by_index(loader, epoch=4).items():
            expected = moved_and_normalised(np.asarray(source.decode(index)), choices, index, padding_mode)
            np.testing.assert_allclose(image.permute(1, 2, 0), expected, atol=1e-6)

    def test_crops_take_every_offset_and_flips_their_share(self) -> None:
        choices = draw_crops_and_flips(seeded_generator(0), 20_000, padding=4, hflip=0.3)
        for offsets in (choices.top, choices.left):
            assert (torch.bincount(offsets) / 20_000 - 1 / 9).abs().max() < 0.01
            assert len(torch.bincount(offsets)) == 9
        assert choices.flip.float().mean() == pytest.approx(0.3, abs=0.01)
        assert torch.corrcoef(torch.stack(choices).float()).triu(1).abs().max() < 0.02

    def test_the_images_given_are_left_as_they_were(self) -> None:
        images = torch.randint(0, 256, (4, 3, 6, 6), dtype=torch.uint8)
        before = images.clone()
        unmoved = CropsAndFlips(
            torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64), torch.ones(4).bool()
        )
        assert torch.equal(pad_crop_flip(images, unmoved, 0, "zeros"), images.flip(3))
        assert torch.equal(images, before)

    @pytest.mark.parametrize("augment", [AUGMENTS["pad_crop_flip"], RRC, TRIVIAL])
    def test_it_follows_seed_epoch_and_index_and_nothing_else(self, augment: Augment) -> None:
        source = make_source(9, width=20)
        loader = train_loader(source, SPEC, 4, seed=1, augment=augment, workers=0)
        images = by_index(loader)
        other_batches = by_index(train_loader(source, SPEC, 7, seed=1, augment=augment, workers=0))
        assert all(torch.equal(images[index], other_batches[index]) for index in range(9))
        for other in (
            by_index(loader, epoch=1),
            by_index(train_loader(source, SPEC, 4, 2, augment=augment, workers=0)),
        ):
            assert sum(torch.equal(images[index], other[index]) for index in range(9)) < 3

    @pytest.mark.parametrize("augment", [AUGMENTS["pad_crop_flip"], RRC, TRIVIAL])
    def test_copies_of_one_image_are_augmented_differently(self, augment: Augment) -> None:
        copies = make_source(1).subset([0] * 6)
        images = by_index(train_loader(copies, SPEC, 6, seed=0, augment=augment, workers=0))
        assert len({image.numpy().tobytes() for image in images.values()}) == 6

    def test_random_resized_crops_are_timms(self) -> None:
        source = make_source(6, width=40, height=30)
        augment = Augment("resized", hflip=1.0, scale=(1.0, 1.0), ratio=(4 / 3, 4 / 3))  # the whole image, flipped
        loader = train_loader(source, SPEC, 3, seed=0, augment=augment, workers=0)
        transform = create_transform(
            (3, 16, 16), is_training=True, no_aug=True, interpolation="bicubic", mean=SPEC.mean, std=SPEC.std
        )
        for index, image in by_index(loader).items():
            assert torch.equal(image.flip(2), transform(source.decode(index)))

    @pytest.mark.parametrize(
        ("name", "policy"), [("trivial", TrivialAugmentWide), ("rand", RandAugment), ("augmix", AugMix)]
    )
    def test_policies_are_torchvisions_and_change_the_whole_image_before_the_crop(self, name: Any, policy: Any) -> None:
        source = make_source(6, width=24, height=20)
        loader = train_loader(source, SPEC, 6, 7, augment=Augment("pad", padding=3, auto_augment=name), workers=0)
        resize = Resize((16, 16), InterpolationMode.BICUBIC)
        choices = draw_crops_and_flips(seeded_generator(7, loaders.CROPS, 2), 6, padding=3, hflip=0.5)
        changed = 0
        for index, image in by_index(loader, epoch=2).items():
            torch.manual_seed(seeded_generator(7, loaders.PIXELS, 2, index).initial_seed())
            resized = resize(source.decode(index))
            pixels = np.asarray(policy(interpolation=InterpolationMode.BILINEAR)(resized))
            changed += not np.array_equal(pixels, np.asarray(resized))
            expected = moved_and_normalised(pixels, choices, index, "zeros")
            np.testing.assert_allclose(image.permute(1, 2, 0), expected, atol=1e-6)
        assert changed > 3

    def test_a_policy_changes_the_crop_after_it_was_resized(self) -> None:
        source = make_source(6, width=40, height=30)
        whole = Augment("resized", hflip=0.0, scale=(1.0, 1.0), ratio=(4 / 3, 4 / 3))
        plain, changed = (
            by_index(train_loader(source, SPEC, 6, 0, augment=replace(whole, auto_augment=policy), workers=0))
            for policy in (None, "trivial")
        )
        assert sum(torch.equal(plain[index], changed[index]) for index in range(6)) < 3

    def test_the_callers_random_numbers_are_left_alone(self) -> None:
        source = make_source(6)
        torch.manual_seed(3)
        random.seed(3)
        expected = torch.rand(3), random.random()
        for workers in (0, 1):
            torch.manual_seed(3)
            random.seed(3)
            list(train_loader(source, SPEC, 3, seed=0, augment=RRC, workers=workers).epoch(0))
            assert torch.equal(torch.rand(3), expected[0])
            assert random.random() == expected[1]

    def test_none_shows_the_images_as_they_are(self) -> None:
        source = make_source(5)
        images = by_index(train_loader(source, SPEC, 2, seed=0, augment=AUGMENTS["none"]))
        plain = by_index(eval_loader(source, SPEC, 2))
        assert all(torch.equal(images[index], plain[index]) for index in range(5))

    def test_padding_is_an_eighth_of_the_input_unless_given_and_for_pad_alone(self) -> None:
        assert [Augment("pad").padding_at(size) for size in (32, 64)] == [4, 8]
        assert Augment("pad", padding=2).padding_at(64) == 2
        assert Augment("none", padding=2).padding_at(64) == 0


class TestEvaluationPixels:
    @pytest.mark.parametrize("in_memory", [True, False])
    @pytest.mark.parametrize(
        ("config", "width", "height"),
        [
            ({"input_size": (3, 16, 16), "crop_pct": 1.0}, 16, 16),
            ({"input_size": (3, 16, 16), "crop_pct": 0.875, "interpolation": "bilinear"}, 40, 30),
            ({"input_size": (3, 16, 24), "crop_pct": 0.9, "crop_mode": "squash"}, 40, 30),
            ({"input_size": (3, 16, 16), "crop_pct": 0.9, "crop_mode": "border", "mean": (0.1, 0.9, 0.5)}, 40, 30),
        ],
    )
    def test_are_timms_to_the_bit(self, config: dict[str, Any], width: int, height: int, in_memory: bool) -> None:
        model = timm.create_model("resnet10t", num_classes=3)
        resolved = resolve_data_config(config, model=model)
        source = make_source(4, width, height)
        spec = ImageSpec.from_model(model, **config)
        loader = eval_loader(source, spec, 3, in_memory=in_memory, workers=0)
        transform = create_transform(**resolved)
        for index, image in by_index(loader).items():
            assert torch.equal(image, transform(source.decode(index)))

    def test_of_cifar100_in_memory_are_timms_to_the_bit(self, data_root: Path, tmp_path: Path) -> None:
        source = open_source(str(data_root / "cifar100"), "test", cache_dir=str(tmp_path)).subset(range(0, 10_000, 200))
        config = {
            "input_size": (3, 32, 32),
            "mean": (0.5071, 0.4867, 0.4408),
            "std": (0.2675, 0.2565, 0.2761),
            "crop_pct": 1,
        }
        loader = eval_loader(source, ImageSpec(**config), 16)
        assert "in memory" in loader.describe()
        transform = create_transform(**config)
        for index, image in by_index(loader).items():
            assert torch.equal(image, transform(source.decode(index)))

    def test_of_imagenet_from_workers_are_timms_to_the_bit(self, data_root: Path, tmp_path: Path) -> None:
        source = open_source(str(data_root / "imagenet1k_sample"), "validation", cache_dir=str(tmp_path)).subset(
            range(6)
        )
        loader = eval_loader(source, ImageSpec(), 3, workers=2)
        assert "decoded by 2 workers" in loader.describe()
        transform = create_transform(**resolve_data_config({}, pretrained_cfg={"crop_pct": 0.875}))
        for index, image in by_index(loader).items():
            assert torch.equal(image, transform(source.decode(index)))


class TestPairs:
    def test_partners_are_other_images_of_the_same_class(self) -> None:
        source = make_source(20, classes=3)
        loader = train_loader(source, SPEC, 6, seed=0, pair_classes=True)
        assert len(loader) == 7
        firsts = []
        for batch in loader.epoch(0):
            first, second = batch.positions.tensor_split(2)
            assert torch.equal(source.labels[first], source.labels[second])
            assert (first != second).all()
            firsts += first.tolist()
        assert sorted(firsts) == list(range(20))

    def test_every_other_image_of_the_class_is_drawn_alike(self) -> None:
        partners = loaders._Partners(make_source(10, classes=2))
        drawn = partners.draw(torch.full((8_000,), 4), seeded_generator(0))
        assert (torch.bincount(drawn) / 8_000).tolist() == pytest.approx(
            [0.25, 0, 0.25, 0, 0, 0, 0.25, 0, 0.25], abs=0.03
        )

    def test_an_image_alone_in_its_class_is_its_own_partner(self) -> None:
        batch = next(train_loader(make_source(3, classes=3), SPEC, 6, seed=0, pair_classes=True).epoch(0))
        assert torch.equal(batch.positions[:3], batch.positions[3:])

    def test_two_ranks_draw_the_partners_of_one_process(self) -> None:
        source = make_source(22)
        halves = [train_loader(source, SPEC, 4, 1, rank=rank, world_size=2, pair_classes=True) for rank in (0, 1)]
        whole = train_loader(source, SPEC, 8, 1, pair_classes=True)
        for *ranks, both in zip(*(loader.epoch(1) for loader in (*halves, whole)), strict=True):
            first, second = zip(*(batch.positions.tensor_split(2) for batch in ranks), strict=True)
            assert torch.equal(torch.cat([*first, *second]), both.positions)


class TestChoices:
    def test_small_images_are_kept_in_memory_and_photographs_are_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        small, photographs = make_source(4), make_source(4, width=200, height=150)
        assert "in memory (0 MiB)" in eval_loader(small, SPEC, 2).describe()
        assert "decoded by 2 workers" in eval_loader(photographs, SPEC, 2, workers=2).describe()
        monkeypatch.setattr(loaders, "MEMORY_LIMIT", 4 * 3 * 16 * 16 - 1)
        assert "decoded as they are needed" in train_loader(small, SPEC, 2, seed=0, workers=0).describe()

    def test_the_description_says_what_a_batch_is_made_of(self) -> None:
        loader = train_loader(make_source(1200), SPEC, 4, seed=0, world_size=2, rank=1)
        assert loader.describe() == (
            "1,200 images of 3 classes from random images (train), in memory (1 MiB), "
            "batches of 4 on each of 2 processes, cropped after padding with zeros, flipped"
        )
        assert loader.dataset_size == 1200

    def test_a_spec_is_what_timm_resolves(self) -> None:
        model = timm.create_model("resnet10t")
        resolved = resolve_data_config({}, model=model)
        assert {name: getattr(ImageSpec.from_model(model), name) for name in resolved} == resolved
        assert ImageSpec.from_model(model, input_size=[3, 64, 64]) == ImageSpec.from_model(
            model, input_size=(3, 64, 64)
        )
        hash(ImageSpec(mean=[0.5, 0.5, 0.5]))  # as a config.json gives it

    def test_workers_share_the_cores_with_the_other_processes_of_this_machine(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("joblib.cpu_count", lambda: 12)
        assert (default_workers(), default_workers(2), default_workers(24)) == (8, 6, 1)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        assert default_workers(24) == 3

    def test_images_in_memory_lie_and_are_augmented_on_the_device_of_the_training(self) -> None:
        loader = train_loader(make_source(10), SPEC, 4, seed=1, device=torch.device("meta"))
        assert "in memory of meta" in loader.describe()
        batches = list(loader)
        assert [batch.images.shape[0] for batch in batches] == [4, 4, 2]
        assert all(batch.images.device.type == "meta" and batch.targets.is_cpu for batch in batches)
        photographs = train_loader(
            make_source(10), SPEC, 4, seed=1, augment=RRC, workers=0, device=torch.device("meta")
        )
        assert next(iter(photographs)).images.is_cpu

    def test_workers_take_the_part_of_the_cores_that_decoding_takes_of_the_time(self) -> None:
        # 3 ms of a core to decode, 9 ms of eight cores to train: 3 of 75 core-milliseconds, a third of a core
        assert workers_beside(0.003, 0.009, cores=8, on_cpu=True) == 1
        # 3 ms to decode, 0.5 ms of eight cores to train: 3 of 7, so 3.4 cores
        assert workers_beside(0.003, 0.0005, cores=8, on_cpu=True) == 4
        # a GPU that wants an image every 0.5 ms is fed by six workers, if there are cores for them
        assert workers_beside(0.003, 0.0005, cores=8, on_cpu=False) == 6
        assert workers_beside(0.003, 0.0005, cores=4, on_cpu=False) == 4

    def test_whoever_knows_the_consumer_is_told_what_decoding_takes(self) -> None:
        source, told = make_source(20), list[float]()

        def workers(seconds: float) -> int:
            told.append(seconds)
            return 2

        loader = train_loader(source, SPEC, 4, seed=1, augment=RRC, workers=workers)
        assert "decoded by 2 workers" in loader.describe()
        assert "in memory" in train_loader(source, SPEC, 4, seed=1, workers=workers).describe()
        assert len(told) == 1
        assert 0 < told[0] < 1

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"batch_size": 0}, "batch_size must be 1 or more, not 0"),
            ({"batch_size": 3, "pair_classes": True}, "batch_size 3 is odd"),
            ({"batch_size": 2, "augment": RRC, "in_memory": True}, "cannot be kept in memory; choose pad_crop_flip"),
            (
                {"batch_size": 2, "augment": TRIVIAL, "in_memory": True},
                "cannot be kept in memory; leave --auto-augment",
            ),
            ({"batch_size": 2, "world_size": 7}, "6 images do not make one batch of 2 for each of 7 processes; lower"),
            ({"batch_size": 8, "drop_last": True}, "6 images do not make one batch of 8"),
            ({"batch_size": 2, "seed": -1}, "seed -1 is negative"),
            ({"batch_size": 2, "spec": ImageSpec(input_size=(1, 16, 16))}, "model wants 1 channels: choose in_chans=3"),
        ],
    )
    def test_settings_that_cannot_be_met_are_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            train_loader(make_source(6), **{"spec": SPEC, "seed": 0, **options})

    def test_a_source_without_images_is_refused(self) -> None:
        with pytest.raises(ValueError, match="split train of random images holds no images"):
            eval_loader(make_source(3).subset([]), SPEC, 2)


class TestWorkers:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_an_unreadable_image_is_reported_in_one_line(self, workers: int) -> None:
        source = make_source(6)
        source.images.encoded[4] = b"not an image"  # type: ignore[attr-defined]
        loader = eval_loader(source, SPEC, 2, workers=workers, in_memory=False)
        with pytest.raises(UnreadableImageError) as caught:
            list(loader)
        assert str(caught.value).startswith("cannot read image 4: not an image; ")
        assert "\n" not in str(caught.value)

    def test_results_come_in_the_order_of_the_requests_map_after_map(self) -> None:
        pool: WorkerPool[int, int] = WorkerPool(abs, 2)
        assert list(pool.map(range(-5, 5))) == [5, 4, 3, 2, 1, 0, 1, 2, 3, 4]
        assert list(pool.map([-7])) == [7]

    def test_a_signal_to_the_process_group_does_not_reach_them(self) -> None:
        groups = list(WorkerPool(os.getpgid, 2).map([0, 0]))
        assert os.getpgid(0) not in groups

    @TELLS_WHO_SENT_A_SIGNAL
    def test_a_signal_to_every_process_leaves_them_at_work(self) -> None:
        pool = WorkerPool(signal_then_abs, 2)
        assert list(pool.map(range(-5, 5))) == [5, 4, 3, 2, 1, 0, 1, 2, 3, 4]

    @TELLS_WHO_SENT_A_SIGNAL
    def test_the_main_process_ends_one_that_is_busy(self) -> None:
        before = set(multiprocessing.active_children())
        results = WorkerPool(answer_late, 1).map([0, 600])
        assert next(results) == 0  # it is at work, on 600 seconds of sleep
        (worker,) = set(multiprocessing.active_children()) - before
        worker.terminate()
        worker.join(10)
        assert worker.exitcode == 0

    def test_many_images_are_decoded_by_workers_in_their_order(self) -> None:
        source = make_source(1500, width=4, height=4)
        spec = ImageSpec(input_size=(3, 4, 4), mean=(0, 0, 0), std=(1, 1, 1), crop_pct=1.0)
        images = by_index(eval_loader(source, spec, 500, workers=2))
        for index in (0, 1023, 1024, 1499):
            assert np.array_equal((images[index] * 255).round().permute(1, 2, 0), source.decode(index))


def test_a_model_trained_on_whole_images_is_evaluated_on_whole_images() -> None:
    spec = ImageSpec(input_size=(3, 32, 32), crop_pct=0.875)
    assert spec.matching(AUGMENTS["pad_crop_flip"]).crop_pct == 1.0
    assert spec.matching(AUGMENTS["none"]).crop_pct == 1.0
    assert spec.matching(AUGMENTS["rrc_flip"]) == spec
