"""Batches for training and evaluation, the same ones whatever the number of workers and processes.

A training epoch is a permutation of the images, drawn from (seed, epoch). A global batch is batch_size * world_size
consecutive entries of it, and each rank takes its share in order: together the ranks see what one process with the
global batch sees. The last, smaller batch is shared out as evenly as it goes; `Batch.weight` makes up for the rest.
"""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode

from .image_source import ImageSource
from .memory import (
    AUGMENTS,
    POLICIES,
    Augment,
    CropsAndFlips,
    Normalize,
    decode_all,
    draw_crops_and_flips,
    pad_crop_flip,
    seeded_generator,
)
from .streaming import StreamedRows, StreamedSource, TrainSource
from .workers import WorkerPool, default_workers

MEMORY_LIMIT = 2**30
"""Decoded images are kept in memory by default up to this size, bytes."""
SMALL_IMAGE = 128 * 128
"""...and up to this size each as stored, pixels: photographs are left to workers, which decode beside the training."""

TIMED = 16
"""Images that are decoded to see how long it takes."""

Workers = int | Callable[[float], int] | None

ORDER, CROPS, PAIRS, PIXELS, FLIPS = range(5)  # what a seed is used for: separate streams of random numbers


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

    def __post_init__(self) -> None:
        for name in ("input_size", "mean", "std"):  # a config.json has lists
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @classmethod
    def from_model(cls, model: nn.Module, **overrides: Any) -> ImageSpec:
        """Read the spec from the model's own config; `overrides` are entries of it, such as ``input_size``."""
        return cls(**resolve_data_config(overrides, model=model))

    def matching(self, augment: Augment) -> ImageSpec:
        """The spec for evaluating what was trained with `augment`: whole images if training saw whole ones.

        The crop of 0.875 in many of timm's configs makes up for training on enlarged parts of the images.
        """
        return self if augment.crop == "resized" else dataclasses.replace(self, crop_pct=1.0)


class Batch(NamedTuple):
    """One process's share of a global batch."""

    images: Tensor
    """(B, C, H, W) float32, normalised."""
    targets: Tensor
    """(B,) int64."""
    positions: Tensor
    """(B,) int64: which images of the source these are."""
    weight: float
    """B * world_size / (images in the global batch). A rank's mean loss times this, averaged over the ranks, is the
    mean loss over the global batch. 1 except in an uneven last batch of training."""


class _Request(NamedTuple):
    """What a worker needs to make a batch."""

    epoch: int
    positions: Tensor
    weight: float
    rows: StreamedRows | None = None
    """The images themselves, where they are streamed."""


def _as_they_are(requests: list[_Request]) -> Generator[_Request, None, None]:
    yield from requests


class Loader:
    """The batches of one process. Made by :func:`train_loader` and :func:`eval_loader`."""

    def __init__(
        self,
        make_batch: _BatchMaker,
        requests: Callable[[int], list[_Request]],
        workers: int,
        description: str,
        fetch: Callable[[list[_Request]], Generator[_Request, None, None]] = _as_they_are,
    ) -> None:
        self._requests = requests
        self._fetch = fetch
        self._pool = WorkerPool(make_batch, workers)
        self._batches = len(requests(0))
        self._description = description
        self.dataset_size = len(make_batch.source)
        """Images of the source, over all processes."""

    def __len__(self) -> int:
        """Return the batches of this process per epoch; in training, the same on every rank."""
        return self._batches

    @property
    def smallest_batch(self) -> int:
        """Images in the smallest batch of this process."""
        return min(len(request.positions) for request in self._requests(0))

    def describe(self) -> str:
        """Say in one line where the images come from and how they are batched."""
        return self._description

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(0)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch, from `start_batch` on, bit-equal to those of an uninterrupted epoch.

        Raises:
            UnreadableImageError: an image does not decode.
            ValueError: streamed images cannot be read.
        """
        pin = torch.cuda.is_available()
        with closing(self._fetch(self._requests(epoch)[start_batch:])) as requests:
            for batch in self._pool.map(requests):
                yield batch._replace(images=batch.images.pin_memory()) if pin and batch.images.is_cpu else batch


class _BatchMaker:
    """Turns a request into a batch, in this process or a worker."""

    def __init__(
        self,
        source: TrainSource,
        spec: ImageSpec,
        transform: Callable[[Image.Image], Tensor],
        augment: Augment,
        seed: int,
        decoded: Tensor | None,
        memory_format: torch.memory_format,
    ) -> None:
        self.source = source
        self.transform = transform
        self.augment = augment
        self.seed = seed
        self.decoded = decoded
        self.padding = augment.padding_at(spec.input_size[-1])
        self.moves_pixels = augment.crop != "resized" and (self.padding > 0 or augment.hflip > 0)
        device = None if decoded is None else decoded.device
        self.normalize = Normalize(spec.mean, spec.std, spec.input_size, memory_format, device)
        self._choices: tuple[int, CropsAndFlips] | None = None

    def __call__(self, request: _Request) -> Batch:
        epoch, positions, weight, rows = request
        stored = self._stored(positions) if rows is None else rows
        if self.decoded is not None:
            images = self.decoded[positions.to(self.decoded.device)]
        else:
            images = torch.stack(
                [self._transform(epoch, position, stored.decode(i)) for i, position in enumerate(positions.tolist())]
            )
        if self.moves_pixels:
            choices = CropsAndFlips(*(choice[positions] for choice in self._crops_and_flips(epoch)))
            images = pad_crop_flip(images, choices, self.padding, self.augment.padding_mode)
        return Batch(self.normalize(images), stored.labels, positions, weight)

    def _stored(self, positions: Tensor) -> ImageSource:
        assert isinstance(self.source, ImageSource)
        return self.source.subset(positions)

    def _crops_and_flips(self, epoch: int) -> CropsAndFlips:
        if self._choices is None or self._choices[0] != epoch:
            generator = seeded_generator(self.seed, CROPS, epoch)
            choices = draw_crops_and_flips(generator, len(self.source), self.padding, self.augment.hflip)
            if self.augment.alternate:
                first = torch.rand(len(self.source), generator=seeded_generator(self.seed, FLIPS)) < self.augment.hflip
                choices = choices._replace(flip=first ^ bool(epoch % 2))
            self._choices = epoch, choices
        return self._choices[1]

    def _transform(self, epoch: int, position: int, image: Image.Image) -> Tensor:
        if not self.augment.changes_each_image:
            return self.transform(image)
        # these transforms draw from the global streams of `random` and torch: seed both, and give them back
        seed = seeded_generator(self.seed, PIXELS, epoch, position).initial_seed()
        state = random.getstate()
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach the CUDA streams too
            transformed = self.transform(image)
        random.setstate(state)
        return transformed


def train_loader(
    source: TrainSource,
    spec: ImageSpec,
    batch_size: int,
    seed: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    augment: Augment = AUGMENTS["pad_crop_flip"],
    workers: Workers = None,
    in_memory: bool | None = None,
    device: torch.device | None = None,
    drop_last: bool = False,
    memory_format: torch.memory_format = torch.contiguous_format,
    pair_classes: bool = False,
) -> Loader:
    """Return the training batches of process `rank` of `world_size`.

    Args:
        source: the images. Of a streamed source this process reads its share alone, in the order that
            :mod:`.streaming` describes.
        spec: what the model wants.
        batch_size: images per process and batch.
        seed: with the epoch, gives the order and, with the position, the augmentation; 0 or more.
        rank: this process.
        world_size: how many processes share the epoch.
        augment: what is done to the images; see :data:`AUGMENTS`.
        workers: processes that decode; None: one per core of this machine, at most 8. 0: this process decodes. A
            function is told the seconds that an image takes to decode, and says how many; it is not asked where images
            are in memory or streamed.
        in_memory: decode everything once, beforehand; None: for small images that take at most 1 GiB decoded, unless
            `augment` changes each image anew.
        device: where images in memory are kept, augmented and handed out, so that at a step their positions travel and
            no pixels; CPU when not given. Other images come from the CPU.
        drop_last: leave out the last global batch when it is smaller than the others.
        memory_format: layout of the images.
        pair_classes: fill the second half of each batch with partners of the first, partner j another image of the
            class of image j where there is one (CS-KD, Yun et al., "Regularizing Class-wise Predictions via
            Self-knowledge Distillation", CVPR 2020). An epoch then has twice the batches: each image comes once in a
            first half.

    Raises:
        ValueError: settings that cannot be met, or an image that does not decode; the message names the mend.
    """
    _check(source, spec, batch_size, rank, world_size)
    if seed < 0:
        raise ValueError(f"seed {seed} is negative; choose 0 or more")
    streamed = isinstance(source, StreamedSource)
    if streamed and in_memory:
        raise ValueError("streamed images are not kept in memory; leave out --streaming or --in-memory")
    if streamed and pair_classes:
        raise ValueError("CS-KD pairs images by their labels, and --streaming reads those while it trains; choose one")
    if pair_classes and batch_size % 2:
        raise ValueError(f"batch_size {batch_size} is odd, but half of a batch are partners of the other half")
    if augment.changes_each_image:
        if in_memory:
            cause, mend = "are resized at random", "choose pad_crop_flip or none"
            if augment.auto_augment is not None:
                cause, mend = f"'{augment.auto_augment}' changes anew", "leave --auto-augment or --in-memory out"
            raise ValueError(f"images that {cause} cannot be kept in memory; {mend}")
        in_memory = False
    if augment.crop == "resized":
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
    if augment.auto_augment is not None:
        policy = POLICIES[augment.auto_augment](interpolation=InterpolationMode.BILINEAR)
        transform.transforms.insert(-1, policy)  # the last one makes a tensor

    images_per_global_batch = batch_size * world_size // (2 if pair_classes else 1)
    remainder = len(source) % images_per_global_batch
    dropped = remainder if drop_last or remainder < world_size else 0
    if dropped == len(source):
        raise ValueError(
            f"{len(source)} images do not make one batch of {batch_size} for each of {world_size} processes; "
            "lower batch_size"
        )
    partners = _Partners(source) if pair_classes and isinstance(source, ImageSource) else None

    def requests(epoch: int) -> list[_Request]:
        generator = seeded_generator(seed, ORDER, epoch)
        if isinstance(source, StreamedSource):
            order = source.order(generator, images_per_global_batch)
        else:
            order = torch.randperm(len(source), generator=generator)
        result = []
        for number, global_batch in enumerate(order[: len(source) - dropped].split(images_per_global_batch)):
            share = global_batch.tensor_split(world_size)[rank]
            weight = len(share) * world_size / len(global_batch)
            if partners is not None:
                drawn = partners.draw(global_batch, seeded_generator(seed, PAIRS, epoch, number))
                share = torch.cat([share, drawn.tensor_split(world_size)[rank]])
            result.append(_Request(epoch, share, weight))
        return result

    def fetch(requests: list[_Request]) -> Generator[_Request, None, None]:
        assert isinstance(source, StreamedSource)
        batches = source.read([request.positions for request in requests], images_per_global_batch)
        for request, rows in zip(requests, batches, strict=True):
            yield request._replace(rows=rows)

    decoded = _decode(source, spec, transform, in_memory, workers, world_size, memory_format, device)
    make_batch = _BatchMaker(source, spec, transform, augment, seed, decoded, memory_format)
    workers = _count_workers(make_batch, workers, world_size)
    description = _describe(source, decoded, workers, batch_size, world_size, dropped)
    if isinstance(source, StreamedSource):
        description += f", {source.describe_order(images_per_global_batch)}"
    description += f", {augment.describe()}"
    return Loader(make_batch, requests, workers, description, fetch if streamed else _as_they_are)


def eval_loader(
    source: ImageSource,
    spec: ImageSpec,
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    workers: Workers = None,
    in_memory: bool | None = None,
    device: torch.device | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Loader:
    """Return the evaluation batches of process `rank` of `world_size`: over all processes, every image once.

    The images, in order, are cut into one run per process. The runs differ by at most one image, so the number of
    batches may differ by one. timm's own evaluation transform prepares the images. Arguments as in `train_loader`.
    """
    _check(source, spec, batch_size, rank, world_size)
    transform = create_transform(
        spec.input_size,
        interpolation=spec.interpolation,
        mean=spec.mean,  # crop_mode "border" fills with it
        crop_pct=spec.crop_pct,
        crop_mode=spec.crop_mode,
        normalize=False,
    )
    share = torch.arange(len(source)).tensor_split(world_size)[rank]
    batches = [_Request(0, positions, 1.0) for positions in share.split(batch_size) if len(positions)]
    decoded = _decode(source, spec, transform, in_memory, workers, world_size, memory_format, device)
    make_batch = _BatchMaker(source, spec, transform, AUGMENTS["none"], 0, decoded, memory_format)
    workers = _count_workers(make_batch, workers, world_size)
    description = _describe(source, decoded, workers, batch_size, world_size, dropped=0)
    return Loader(make_batch, lambda epoch: batches, workers, description)


class _Partners:
    """Draws for images other images of their class."""

    def __init__(self, source: ImageSource) -> None:
        self.labels = source.labels
        self.sizes = torch.bincount(source.labels, minlength=source.num_classes)
        self.starts = self.sizes.cumsum(0) - self.sizes
        self.by_class = source.labels.argsort(stable=True)
        self.place = torch.empty_like(self.by_class)  # of an image within its class
        self.place[self.by_class] = torch.arange(len(source)) - self.starts[source.labels[self.by_class]]

    def draw(self, positions: Tensor, generator: torch.Generator) -> Tensor:
        labels = self.labels[positions]
        sizes = self.sizes[labels]
        # a step of 1 to size - 1 around the circle of the class reaches every other image alike; 0 in a class of one
        steps = (torch.rand(len(positions), generator=generator, dtype=torch.float64) * (sizes - 1)).long() + 1
        return self.by_class[self.starts[labels] + (self.place[positions] + steps) % sizes]


def _check(source: TrainSource, spec: ImageSpec, batch_size: int, rank: int, world_size: int) -> None:
    if len(source) == 0:
        raise ValueError(f"split {source.split} of {source.name} holds no images")
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, not {batch_size}")
    if spec.input_size[0] != 3:
        raise ValueError(f"images are read in RGB; the model wants {spec.input_size[0]} channels: choose in_chans=3")
    assert 0 <= rank < world_size


def _decode(
    source: TrainSource,
    spec: ImageSpec,
    transform: Callable[[Image.Image], Tensor],
    in_memory: bool | None,
    workers: Workers,
    world_size: int,
    memory_format: torch.memory_format,
    device: torch.device | None,
) -> Tensor | None:
    """Decode the images now if they are to be kept in memory."""
    if isinstance(source, StreamedSource) or not (in_memory or (in_memory is None and _is_small(source, spec))):
        return None
    count = workers if isinstance(workers, int) else default_workers(world_size)
    return decode_all(source, transform, spec.input_size, memory_format, count).to(device)


def _count_workers(make_batch: _BatchMaker, workers: Workers, world_size: int) -> int:
    """How many workers batches need."""
    if make_batch.decoded is not None:
        return 0
    if callable(workers) and isinstance(make_batch.source, ImageSource):
        return workers(_decoding_seconds(make_batch))
    return workers if isinstance(workers, int) else default_workers(world_size)


def _decoding_seconds(make_batch: _BatchMaker) -> float:
    """Seconds that this process takes to make an image ready."""
    images = len(make_batch.source)
    positions = torch.arange(0, images, max(1, images // TIMED))[:TIMED]
    make_batch(_Request(0, positions[:1], 1.0))  # the first opens files
    started = time.perf_counter()
    make_batch(_Request(0, positions, 1.0))
    return (time.perf_counter() - started) / len(positions)


def _is_small(source: ImageSource, spec: ImageSpec) -> bool:
    if len(source) * math.prod(spec.input_size) > MEMORY_LIMIT:
        return False
    sample = range(0, len(source), max(1, len(source) // 16))
    return all(image.width * image.height <= SMALL_IMAGE for image in map(source.decode, sample))


def _describe(
    source: TrainSource,
    decoded: Tensor | None,
    workers: int,
    batch_size: int,
    world_size: int,
    dropped: int,
) -> str:
    if decoded is not None:
        storage = f"in memory{'' if decoded.is_cpu else f' of {decoded.device}'} ({decoded.numel() / 2**20:.0f} MiB)"
    else:
        storage = f"decoded by {workers} workers" if workers else "decoded as they are needed"
    text = f"{source.describe()}, {storage}, batches of {batch_size}"
    if world_size > 1:
        text += f" on each of {world_size} processes"
    return text + (f" without the last {dropped} images of each epoch" if dropped else "")
