"""Small images in memory: decoded once to uint8, augmented and normalised a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import AugMix, RandAugment, TrivialAugmentWide
from tqdm import tqdm

from .image_source import ImageSource
from .workers import WorkerPool

CHUNK = 1024
"""Images that a worker decodes at a time; sources no larger are decoded in this process."""


@dataclass(frozen=True)
class Augment:
    """What training does to an image before it is normalised."""

    crop: Literal["pad", "resized", "none"] = "pad"
    """`pad`: resize to the input size, pad every side, crop the input size at random (CIFAR). `resized`: crop a random
    area and aspect ratio and resize it to the input size, as Inception and timm do (ImageNet). `none`: resize alone."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    alternate: bool = False
    """Flip in turns: an image's flip is drawn for the first epoch and inverted in every one that follows, so two epochs
    show both sides of every image. After Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024."""
    padding: int | None = None
    """Pixels on every side for `pad`; None: an eighth of the input size, 4 at 32 pixels."""
    padding_mode: Literal["zeros", "reflect"] = "zeros"
    """What is padded, in `pad`."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Range of the cropped area for `resized`, as a share of the image."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the cropped aspect ratio for `resized`."""
    auto_augment: Literal["trivial", "rand", "augmix"] | None = None
    """Changes of colours and shapes, of the whole image before `pad` and of the crop after `resized`; see
    :data:`POLICIES`."""

    @property
    def changes_each_image(self) -> bool:
        """Whether an epoch shows more than crops and flips of images that were decoded once."""
        return self.crop == "resized" or self.auto_augment is not None

    def padding_at(self, size: int) -> int:
        """Return the padding for an input of `size` pixels."""
        if self.crop != "pad":
            return 0
        return size // 8 if self.padding is None else self.padding

    def describe(self) -> str:
        """Name the augmentation in a few words."""
        crop = {
            "pad": f"cropped after padding with {self.padding_mode}",
            "resized": "cropped and resized at random",
            "none": "not cropped",
        }[self.crop]
        flip = "" if not self.hflip else ", flipped in turns" if self.alternate else ", flipped"
        return crop + flip + (f", {POLICIES[self.auto_augment].__name__}" if self.auto_augment else "")


POLICIES = {"trivial": TrivialAugmentWide, "rand": RandAugment, "augmix": AugMix}
"""torchvision's policies by name, with its settings: TrivialAugment (Müller and Hutter, ICCV 2021), RandAugment (Cubuk
et al., NeurIPS 2020) and AugMix (Hendrycks et al., ICLR 2020)."""

AUGMENTS = {
    "pad_crop_flip": Augment("pad"),
    "pad_crop_turns": Augment("pad", alternate=True),
    "rrc_flip": Augment("resized"),
    "none": Augment("none", hflip=0.0),
}
"""Augmentations by name."""


class CropsAndFlips(NamedTuple):
    """The random choices of one epoch for every image of a source."""

    top: Tensor
    """(N,) int64 first row of the crop in the padded image, 0 to 2 * padding."""
    left: Tensor
    """(N,) int64 first column of the crop."""
    flip: Tensor
    """(N,) bool."""


def seeded_generator(*key: int) -> torch.Generator:
    """Return a generator whose stream depends on all of `key`, non-negative numbers: a seed and what it is used for."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


def draw_crops_and_flips(generator: torch.Generator, images: int, padding: int, hflip: float) -> CropsAndFlips:
    """Draw the crop and the flip of `images` images for one epoch."""
    top, left = torch.randint(0, 2 * padding + 1, (2, images), generator=generator)
    return CropsAndFlips(top, left, torch.rand(images, generator=generator) < hflip)


def pad_crop_flip(images: Tensor, choices: CropsAndFlips, padding: int, padding_mode: str) -> Tensor:
    """Pad each image by `padding` on every side, crop its own size from it again, and flip it, each as chosen.

    Args:
        images: (B, C, H, W) uint8.
        choices: one crop and flip per image, (B,) each, on CPU.
        padding: pixels on every side.
        padding_mode: `zeros` or `reflect`.
    """
    height, width = images.shape[-2:]
    device = images.device
    padded = F.pad(images, [padding] * 4, mode="constant" if padding_mode == "zeros" else padding_mode)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, C, 2p+1, 2p+1, H, W), a view
    cropped = windows[torch.arange(len(images), device=device), :, choices.top.to(device), choices.left.to(device)]
    # Counted where the choices are: a device would be waited for.
    flipped = choices.flip.nonzero().squeeze(1).to(device)
    return cropped.index_copy_(0, flipped, cropped.index_select(0, flipped).flip(3))


class Normalize:
    """uint8 images to float32: scaled to [0, 1], minus the mean, divided by the standard deviation, per channel.

    The operations and their order are those of torchvision's ToTensor and Normalize, so the results are bit-equal.

    Args:
        mean: per channel, of images in [0, 1].
        std: likewise.
        size: channels, height, width.
        memory_format: layout of the result; least work where the images have it already.
        device: where the images are.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        size: Sequence[int],
        memory_format: torch.memory_format,
        device: torch.device | None = None,
    ) -> None:
        self.memory_format = memory_format
        # whole images, in that layout: broadcasting three numbers over channels_last memory takes four times as long
        self.mean, self.std = (
            torch.tensor(values).view(1, -1, 1, 1).expand(1, *size).contiguous(memory_format=memory_format).to(device)
            for values in (mean, std)
        )

    def __call__(self, images: Tensor) -> Tensor:
        images = images.to(torch.float32, memory_format=self.memory_format)
        return images.div_(255).sub_(self.mean).div_(self.std)


def decode_all(
    source: ImageSource,
    transform: Callable[[Image.Image], Tensor],
    size: Sequence[int],
    memory_format: torch.memory_format,
    workers: int,
) -> Tensor:
    """Decode every image of `source` once, in `workers` processes: (N, *size) uint8."""
    images = torch.empty((len(source), *size), dtype=torch.uint8, memory_format=memory_format)
    chunks = torch.arange(len(source)).split(CHUNK)
    pool = WorkerPool(partial(decode_chunk, source, transform), workers if len(chunks) > 1 else 0)
    with tqdm(total=len(source), desc="decode images", unit="image", leave=False, disable=None) as bar:
        for chunk, decoded in zip(chunks, pool.map(chunks), strict=True):
            images[chunk] = decoded
            bar.update(len(chunk))
    return images


def decode_chunk(source: ImageSource, transform: Callable[[Image.Image], Tensor], positions: Tensor) -> Tensor:
    """Decode the images at `positions` and stack them: (B, C, H, W) uint8."""
    return torch.stack([transform(source.decode(position)) for position in positions.tolist()])
