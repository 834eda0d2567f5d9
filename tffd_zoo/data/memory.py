"""Small images in memory: decoded once to uint8, augmented and normalised a batch at a time.

Everything random is a pure function of (seed, epoch, index of the image), so a batch is the same whoever makes it: this
process or a worker, before or after a resume, on one rank or on another.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .sources import ImageSource


@dataclass(frozen=True)
class Augment:
    """What training does to an image before it is normalised."""

    crop: Literal["pad", "resized", "none"] = "pad"
    """`pad`: pad every side, then crop the input size at random (CIFAR). `resized`: crop a random area and aspect ratio
    and resize it, as Inception and timm do (ImageNet). `none`: resize to the input size."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    padding: int | None = None
    """Pixels on every side for `pad`; None: an eighth of the input size, 4 at 32 pixels."""
    padding_mode: Literal["zeros", "reflect"] = "zeros"
    """What is padded, in `pad`."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Range of the cropped area for `resized`, as a share of the image."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the cropped aspect ratio for `resized`."""


AUGMENTS = {
    "pad_crop_flip": Augment("pad"),
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
        choices: one crop and flip per image, (B,) each.
        padding: pixels on every side.
        padding_mode: `zeros` or `reflect`.
    """
    height, width = images.shape[-2:]
    if padding:
        mode = "constant" if padding_mode == "zeros" else padding_mode
        padded = F.pad(images, [padding] * 4, mode=mode)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, C, 2p+1, 2p+1, H, W), a view
        images = windows[torch.arange(len(images)), :, choices.top, choices.left]
    return torch.where(choices.flip[:, None, None, None], images.flip(3), images)


def normalize(images: Tensor, mean: Tensor, std: Tensor, memory_format: torch.memory_format) -> Tensor:
    """Scale uint8 images to [0, 1], subtract `mean` and divide by `std`, in torchvision's order of float32 operations.

    The order matters: results are bit-equal to ToTensor followed by Normalize.
    """
    images = images.to(torch.float32, memory_format=memory_format)
    return images.div_(255).sub_(mean).div_(std)


def decode_all(source: ImageSource, transform: Callable[[Image.Image], Tensor], size: tuple[int, int, int]) -> Tensor:
    """Decode every image of `source` once: (N, *size) uint8."""
    images = torch.empty(len(source), *size, dtype=torch.uint8)

    def decode(index: int) -> None:
        images[index] = transform(source.decode(index))

    with ThreadPoolExecutor() as pool:
        done = pool.map(decode, range(len(source)))
        for _ in tqdm(done, total=len(source), desc="decode images", unit="image", leave=False, disable=None):
            pass
    return images
