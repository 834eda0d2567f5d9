"""Batches for training and evaluation, the same ones whatever the number of workers and processes.

A training epoch is a permutation of the images, drawn from (seed, epoch). A global batch is batch_size * world_size
consecutive entries of it, and each rank takes its share in order: together the ranks see what one process with the
global batch sees. The last, smaller batch is shared out as evenly as it goes; `Batch.weight` makes up for the rest.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .memory import (
    AUGMENTS,
    Augment,
    CropsAndFlips,
    decode_all,
    draw_crops_and_flips,
    normalize,
    pad_crop_flip,
    seeded_generator,
)
from .sources import ImageSource

MEMORY_LIMIT = 2**30
"""Decoded images are kept in memory by default up to this size, bytes."""
SMALL_IMAGE = 128 * 128
"""...and up to this size each as stored, pixels: photographs are left to workers, which decode beside the training."""
MAX_WORKERS = 8

ORDER, CROPS, PAIRS, PIXELS = range(4)  # what a seed is used for: separate streams of random numbers


@dataclass(frozen=True)
class ImageSpec:
    """How a model wants its images: the keys of timm's data config."""

    input_size: tuple[int, int, int] = (3, 224, 224)
    """Channels, height, width."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Per channel, of images in [0, 1]."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    """Evaluation resizes to input_size / crop_pct, then crops."""
    crop_mode: str = "center"

    @classmethod
    def from_model(cls, model: nn.Module, **overrides: Any) -> ImageSpec:
        """Read the spec from the model's own config; `overrides` are entries of it, such as ``input_size``."""
        return cls(**resolve_data_config(overrides, model=model))


class Batch(NamedTuple):
    """One process's share of a global batch."""

    images: Tensor
    """(B, C, H, W) float32, normalised."""
    targets: Tensor
    """(B,) int64."""
    indices: Tensor
    """(B,) int64: which images of the source these are."""
    weight: float
    """B * world_size / (images in the global batch). A rank's mean loss times this, averaged over the ranks, is the
    mean loss over the global batch. 1 except in an uneven last batch."""


class _Request(NamedTuple):
    """What a worker needs to make a batch."""

    epoch: int
    indices: Tensor
    weight: float


class Loader:
    """Batches of one process. Made by :func:`train_loader` and :func:`eval_loader`."""

    def __init__(
        self, make_batch: _BatchMaker, plan: Callable[[int], list[_Request]], workers: int, description: str
    ) -> None:
        self._make_batch = make_batch
        self._plan = plan
        self._description = description
        self._batches = len(plan(0))
        self._requests: list[_Request] = []  # the running epoch's, read by the worker pool's sampler
        self._pool: DataLoader[Batch | Exception] | None = None
        if workers:
            self._pool = DataLoader(
                make_batch,
                batch_size=None,
                sampler=_CurrentRequests(self),
                num_workers=workers,
                persistent_workers=True,
                pin_memory=torch.cuda.is_available(),
                generator=torch.Generator(),  # else every epoch would draw from the caller's global stream
            )

    def __len__(self) -> int:
        """Return the batches of this process per epoch; in training, the same on every rank."""
        return self._batches

    @property
    def dataset_size(self) -> int:
        """Images of the source, over all processes."""
        return len(self._make_batch.source)

    def describe(self) -> str:
        """Say in one line where the images come from and how they are batched."""
        return self._description

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(0)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch, from `start_batch` on, bit-equal to those of an uninterrupted epoch.

        Raises:
            UnreadableImageError: an image does not decode.
        """
        self._requests = self._plan(epoch)[start_batch:]
        if self._pool is None:
            pin = torch.cuda.is_available()
            for request in self._requests:
                batch = self._make_batch(request)
                yield batch._replace(images=batch.images.pin_memory()) if pin else batch
        else:
            for batch_or_error in self._pool:
                if isinstance(batch_or_error, Exception):
                    raise batch_or_error
                yield batch_or_error


class _CurrentRequests:
    """The requests of the running epoch, as the worker pool's sampler."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[_Request]:
        return iter(self.loader._requests)

    def __len__(self) -> int:
        return len(self.loader._requests)


class _BatchMaker(Dataset[Any]):
    """Turns a request into a batch, in this process or a worker."""

    def __init__(
        self,
        source: ImageSource,
        spec: ImageSpec,
        transform: Callable[[Image.Image], Tensor],
        augment: Augment,
        seed: int,
        in_memory: bool,
        memory_format: torch.memory_format,
    ) -> None:
        self.source = source
        self.transform = transform
        self.augment = augment
        self.seed = seed
        self.memory_format = memory_format
        self.mean = torch.tensor(spec.mean).view(-1, 1, 1)
        self.std = torch.tensor(spec.std).view(-1, 1, 1)
        self.padding = spec.input_size[-1] // 8 if augment.padding is None else augment.padding
        self.decoded = decode_all(source, transform, spec.input_size) if in_memory else None
        self._choices: tuple[int, CropsAndFlips] | None = None

    def __getitem__(self, request: _Request) -> Batch | Exception:
        # A worker's exception would reach the user as a traceback of the worker: hand it over as a value instead.
        try:
            return self(request)
        except ValueError as error:
            return error

    def __call__(self, request: _Request) -> Batch:
        epoch, indices, weight = request
        if self.decoded is not None:
            images = self.decoded[indices]
        else:
            images = torch.stack([self._transform(epoch, index) for index in indices.tolist()])
        if self.augment.crop == "pad":
            choices = CropsAndFlips(*(choice[indices] for choice in self._crops_and_flips(epoch)))
            images = pad_crop_flip(images, choices, self.padding, self.augment.padding_mode)
        images = normalize(images, self.mean, self.std, self.memory_format)
        return Batch(images, self.source.labels[indices], indices, weight)

    def _crops_and_flips(self, epoch: int) -> CropsAndFlips:
        if self._choices is None or self._choices[0] != epoch:
            generator = seeded_generator(self.seed, CROPS, epoch)
            self._choices = epoch, draw_crops_and_flips(generator, len(self.source), self.padding, self.augment.hflip)
        return self._choices[1]

    def _transform(self, epoch: int, index: int) -> Tensor:
        image = self.source.decode(index)
        if self.augment.crop != "resized":
            return self.transform(image)
        # timm's transforms draw from the global streams of `random` and torch: seed both, and give them back
        state = random.getstate()
        with torch.random.fork_rng(devices=[]):
            seed = seeded_generator(self.seed, PIXELS, epoch, index).initial_seed()
            random.seed(seed)
            torch.manual_seed(seed)
            transformed = self.transform(image)
        random.setstate(state)
        return transformed


def train_loader(
    source: ImageSource,
    spec: ImageSpec,
    batch_size: int,
    seed: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    augment: Augment = AUGMENTS["pad_crop_flip"],
    workers: int | None = None,
    in_memory: bool | None = None,
    drop_last: bool = False,
    memory_format: torch.memory_format = torch.contiguous_format,
    pair_classes: bool = False,
) -> Loader:
    """Return the training batches of process `rank` of `world_size`.

    Args:
        source: the images.
        spec: what the model wants.
        batch_size: images per process and batch.
        seed: with the epoch, gives the order and, with the index, the augmentation.
        rank: this process.
        world_size: how many processes share the epoch.
        augment: what is done to the images. With `pad` and `none`, images of another size are first resized to the
            input size.
        workers: processes that decode; None: one per core, at most 8. Images in memory need none.
        in_memory: decode everything once; None: for small images that take at most 1 GiB decoded.
        drop_last: drop the last global batch when it is smaller than the others.
        memory_format: layout of the images.
        pair_classes: fill the second half of each batch with partners of the first, partner j another image of the
            class of image j where there is one (CS-KD, Yun et al., "Regularizing Class-wise Predictions via
            Self-knowledge Distillation", CVPR 2020). An epoch then has twice the batches: each image comes once in a
            first half.

    Raises:
        ValueError: settings that cannot be met; the message names what to change.
    """
    _check(source, spec, batch_size, rank, world_size)
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, not {seed}")
    if pair_classes and batch_size % 2:
        raise ValueError(f"batch_size {batch_size} must be even: half of a batch are partners of the other half")
    if augment.crop == "resized":
        if in_memory:
            raise ValueError("in_memory needs an augmentation that keeps the image size; use pad_crop_flip or none")
        in_memory = False
        transform = create_transform(
            spec.input_size,
            is_training=True,
            scale=augment.scale,
            ratio=augment.ratio,
            hflip=augment.hflip,
            color_jitter=None,
            interpolation=spec.interpolation,
            normalize=False,
        )
    else:
        transform = create_transform(
            spec.input_size, is_training=True, no_aug=True, interpolation=spec.interpolation, normalize=False
        )
    if in_memory is None:
        in_memory = _fits_in_memory(source, spec)

    per_global_batch = batch_size * world_size // (2 if pair_classes else 1)
    batches, remainder = divmod(len(source), per_global_batch)
    keep_remainder = remainder >= world_size and not drop_last
    dropped = 0 if keep_remainder else remainder
    if batches + keep_remainder == 0:
        raise ValueError(
            f"{len(source)} images do not fill one batch of {batch_size} x {world_size} processes; lower batch_size"
        )
    partners = _Partners(source) if pair_classes else None

    def plan(epoch: int) -> list[_Request]:
        order = torch.randperm(len(source), generator=seeded_generator(seed, ORDER, epoch))
        requests = []
        for number, global_batch in enumerate(order[: len(source) - dropped].split(per_global_batch)):
            share = global_batch.tensor_split(world_size)[rank]
            weight = len(share) * world_size / len(global_batch)
            if partners is not None:
                drawn = partners.draw(global_batch, seeded_generator(seed, PAIRS, epoch, number))
                share = torch.cat([share, drawn.tensor_split(world_size)[rank]])
            requests.append(_Request(epoch, share, weight))
        return requests

    make_batch = _BatchMaker(source, spec, transform, augment, seed, in_memory, memory_format)
    workers = _choose_workers(workers, in_memory)
    return Loader(make_batch, plan, workers, _describe("train", make_batch, batch_size, world_size, workers, dropped))


def eval_loader(
    source: ImageSource,
    spec: ImageSpec,
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    workers: int | None = None,
    in_memory: bool | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Loader:
    """Return the evaluation batches of process `rank` of `world_size`: every image once, over all processes.

    The images, in order, are cut into one run per process; the runs differ by at most one image, so the number of
    batches may differ by one. Images are prepared by timm's own evaluation transform. Arguments as in `train_loader`.
    """
    _check(source, spec, batch_size, rank, world_size)
    transform = create_transform(
        spec.input_size,
        interpolation=spec.interpolation,
        crop_pct=spec.crop_pct,
        crop_mode=spec.crop_mode,
        mean=spec.mean,
        normalize=False,
    )
    if in_memory is None:
        in_memory = _fits_in_memory(source, spec)
    share = torch.arange(len(source)).tensor_split(world_size)[rank]
    requests = [_Request(0, indices, 1.0) for indices in share.split(batch_size)] if len(share) else []
    make_batch = _BatchMaker(source, spec, transform, AUGMENTS["none"], 0, in_memory, memory_format)
    workers = _choose_workers(workers, in_memory)
    description = _describe("evaluate", make_batch, batch_size, world_size, workers, dropped=0)
    return Loader(make_batch, lambda epoch: requests, workers, description)


class _Partners:
    """Draws for images other images of their class."""

    def __init__(self, source: ImageSource) -> None:
        self.labels = source.labels
        self.sizes = torch.bincount(source.labels, minlength=source.num_classes)
        self.starts = self.sizes.cumsum(0) - self.sizes
        self.by_class = source.labels.argsort(stable=True)
        self.place = torch.empty_like(self.by_class)  # of an image within its class
        self.place[self.by_class] = torch.arange(len(source)) - self.starts[source.labels[self.by_class]]

    def draw(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        labels = self.labels[indices]
        sizes = self.sizes[labels]
        # a step of 1 to size - 1 around the circle of the class reaches every other image alike; 0 in a class of one
        steps = (torch.rand(len(indices), generator=generator, dtype=torch.float64) * (sizes - 1)).long() + 1
        return self.by_class[self.starts[labels] + (self.place[indices] + steps) % sizes]


def _check(source: ImageSource, spec: ImageSpec, batch_size: int, rank: int, world_size: int) -> None:
    if len(source) == 0:
        raise ValueError(f"split {source.split} of {source.name} holds no images")
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, not {batch_size}")
    if spec.input_size[0] != 3:
        raise ValueError(f"images are read in RGB; the model wants {spec.input_size[0]} channels: choose in_chans=3")
    assert 0 <= rank < world_size


def _fits_in_memory(source: ImageSource, spec: ImageSpec) -> bool:
    channels, height, width = spec.input_size
    if len(source) * channels * height * width > MEMORY_LIMIT:
        return False
    sample = range(0, len(source), max(1, len(source) // 16))
    return all(image.width * image.height <= SMALL_IMAGE for image in map(source.decode, sample))


def _choose_workers(workers: int | None, in_memory: bool) -> int:
    if in_memory:
        return 0
    return min(MAX_WORKERS, len(os.sched_getaffinity(0))) if workers is None else workers


def _describe(
    purpose: str, make_batch: _BatchMaker, batch_size: int, world_size: int, workers: int, dropped: int
) -> str:
    source, decoded = make_batch.source, make_batch.decoded
    if decoded is not None:
        storage = f"in memory ({decoded.numel() / 2**20:.0f} MiB)"
    else:
        storage = f"decoded by {workers} workers" if workers else "decoded as they are needed"
    text = f"{purpose}: {len(source):,} images of {source.num_classes} classes, {storage}, batches of {batch_size}"
    if world_size > 1:
        text += f" x {world_size} processes"
    if dropped:
        text += f", {dropped} images left out of each epoch"
    return text
