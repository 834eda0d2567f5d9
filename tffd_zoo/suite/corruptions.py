"""The common corruptions of CIFAR-10-C and CIFAR-100-C: 15 kinds and 4 extra ones, each at five severities.

The definitions and every number are those that the published arrays were made with, `make_cifar_c.py` of Hendrycks and
Dietterich ("Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR 2019); they are for
images of 32 x 32 pixels and differ from ImageNet-C's. The random numbers are our own: those of an image depend on the
seed, the kind, the severity and the image's index alone, so that batches and processes change nothing.

Images are (B, 32, 32, 3) arrays. A kind takes them as float64 in [0, 1] and returns float values in [0, 1], which are
cut, not rounded, to uint8, as published.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = 32
"""Pixels on a side: what the severities are chosen for."""
SEVERITIES = (1, 2, 3, 4, 5)

Apply = Callable[[np.ndarray, Any, "Dice"], np.ndarray]
Pictures = Sequence[np.ndarray]
"""Pictures of frost, each (H, W, 3) in [0, 255]."""


class Dice:
    """Independent random numbers for each image of a batch, and pictures of frost to pick from.

    Args:
        key: two numbers that all images share.
        indices: the images; each has the stream of its index.
        frost: the pictures.
    """

    def __init__(self, key: tuple[int, int], indices: Sequence[int], frost: Pictures = ()) -> None:
        self.frost = frost
        # the counter's high words tell images apart; a stream never comes near another one's 2^128 numbers
        self._streams = [np.random.Generator(np.random.Philox(key=key, counter=[0, 0, index, 0])) for index in indices]

    def normal(self, *shape: int) -> np.ndarray:
        """(B, *shape) standard normal numbers."""
        return np.stack([stream.standard_normal(shape) for stream in self._streams])

    def uniform(self, low: float, high: float, *shape: int) -> np.ndarray:
        """(B, *shape) numbers in [low, high)."""
        return np.stack([stream.uniform(low, high, shape) for stream in self._streams])

    def integers(self, low: int, high: int, *shape: int) -> np.ndarray:
        """(B, *shape) whole numbers from `low` to `high` - 1."""
        return np.stack([stream.integers(low, high, shape) for stream in self._streams])

    def poisson(self, means: np.ndarray) -> np.ndarray:
        """Poisson numbers with these means, (B, ...)."""
        return np.stack([stream.poisson(mean) for stream, mean in zip(self._streams, means, strict=True)])


@dataclass(frozen=True)
class Corruption:
    """One kind of corruption."""

    apply: Apply
    """From images, the parameters of a severity and dice to corrupted images."""
    severities: tuple[Any, ...]
    """The parameters of severities 1 to 5."""
    extra: bool = False
    """One of the four that are not part of the benchmark's mean."""


KINDS: dict[str, Corruption] = {}
"""The kinds by name, in the published order; the file of a kind is `<name>.npy`."""


def corrupt(
    images: np.ndarray, kind: str, severity: int, seed: int, indices: Sequence[int], frost: Pictures = ()
) -> np.ndarray:
    """Corrupt uint8 images (B, 32, 32, 3).

    Args:
        images: the clean images.
        kind: one of :data:`KINDS`.
        severity: 1 to 5.
        seed: 0 or more.
        indices: the index of each image in its split.
        frost: five pictures of frost, as :func:`read_frost` gives them; stand-ins when there are none.
    """
    if images.shape[1:] != (SIZE, SIZE, 3):
        raise ValueError(
            f"the severities are chosen for {SIZE} x {SIZE} pixels in RGB, not {images.shape[1:]}; give a folder of "
            "corrupted images with --corruptions"
        )
    corruption = KINDS[kind]
    dice = Dice((seed, 8 * list(KINDS).index(kind) + severity), indices, frost or frost_stand_ins())
    corrupted = corruption.apply(images / 255.0, corruption.severities[severity - 1], dice)
    return (np.clip(corrupted, 0, 1) * 255).astype(np.uint8)


def _kind(*severities: Any, extra: bool = False) -> Callable[[Apply], Apply]:
    """Register a function as the kind of its name."""

    def register(apply: Apply) -> Apply:
        KINDS[apply.__name__] = Corruption(apply, severities, extra)
        return apply

    return register


# -- noise -------------------------------------------------------------------------------------------------------------


@_kind(0.04, 0.06, 0.08, 0.09, 0.10)
def gaussian_noise(x: np.ndarray, scale: float, dice: Dice) -> np.ndarray:
    return x + scale * dice.normal(*x.shape[1:])


@_kind(500, 250, 100, 75, 50)
def shot_noise(x: np.ndarray, photons: float, dice: Dice) -> np.ndarray:
    return dice.poisson(x * photons) / photons


@_kind(0.01, 0.02, 0.03, 0.05, 0.07)
def impulse_noise(x: np.ndarray, amount: float, dice: Dice) -> np.ndarray:
    """Salt and pepper, value by value and not pixel by pixel, as much of either."""
    hit = dice.uniform(0, 1, *x.shape[1:]) <= amount
    salt = dice.uniform(0, 1, *x.shape[1:]) <= 0.5
    return np.where(hit, salt, x)


# -- blur --------------------------------------------------------------------------------------------------------------


@_kind((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))
def defocus_blur(x: np.ndarray, parameters: tuple[float, float], dice: Dice) -> np.ndarray:
    from scipy.ndimage import correlate

    return correlate(x, disk(*parameters)[None, :, :, None], mode="mirror")


def disk(radius: float, smoothing: float) -> np.ndarray:
    """A disk (5, 5) of summed weight 1, smoothed by a Gaussian of three taps."""
    squares = np.arange(-2, 3) ** 2
    inside = (squares[:, None] + squares <= radius**2).astype(float)
    taps = np.exp(-np.array([1, 0, 1]) / (2 * smoothing**2))
    smooth = functools.partial(np.convolve, taps / taps.sum(), mode="same")
    return np.apply_along_axis(smooth, 1, np.apply_along_axis(smooth, 0, inside / inside.sum()))


@_kind((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))
def glass_blur(x: np.ndarray, parameters: tuple[float, int], dice: Dice) -> np.ndarray:
    """Blur, move pixels about, blur.

    The published code means to swap a pixel with one up to a row above and a column to the left, but assigns views of
    one array to each other: the pixel is overwritten, and the other one stays. The published images have it so.
    """
    sigma, rounds = parameters
    x = (blur(x, sigma) * 255).astype(np.uint8) / 255.0
    moved = np.arange(2, SIZE)
    batch = np.arange(len(x))[:, None, None]
    for _ in range(rounds):
        rows, columns = np.moveaxis(dice.integers(-1, 1, 2, len(moved), len(moved)), 1, 0)
        x = x.copy()
        x[:, 2:, 2:] = x[batch, moved[:, None] + rows, moved + columns]  # the right-hand side is a copy
    return blur(x, sigma)


@_kind((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))
def motion_blur(x: np.ndarray, parameters: tuple[int, float], dice: Dice) -> np.ndarray:
    return streak(x, *parameters, degrees=dice.uniform(-45, 45))


@_kind(1.06, 1.11, 1.16, 1.21, 1.26)
def zoom_blur(x: np.ndarray, end: float, dice: Dice) -> np.ndarray:
    """The mean of the image and of its enlargements up to `end`, in steps of 0.01."""
    factors = np.arange(1, end, 0.01)
    return (x + sum(zoom(x, factor) for factor in factors)) / (len(factors) + 1)


# -- weather -----------------------------------------------------------------------------------------------------------


@_kind(
    (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
    (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
    (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
    (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
    (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
)
def snow(x: np.ndarray, parameters: tuple[float, ...], dice: Dice) -> np.ndarray:
    """Streaks of flakes over a whitened image."""
    mean, scale, size, threshold, radius, sigma, brightness = parameters
    flakes = zoom(mean + scale * dice.normal(SIZE, SIZE, 1), size)
    flakes = np.where(flakes < threshold, 0, flakes)
    flakes = (np.clip(flakes, 0, 1) * 255).astype(np.uint8) / 255.0
    flakes = streak(flakes, int(radius), sigma, degrees=dice.uniform(-135, -45))
    grey = (x @ np.array([0.299, 0.587, 0.114]))[..., None]
    whitened = brightness * x + (1 - brightness) * np.maximum(x, grey * 1.5 + 0.5)
    return whitened + flakes + flakes[:, ::-1, ::-1]


@_kind((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))
def frost(x: np.ndarray, parameters: tuple[float, float], dice: Dice) -> np.ndarray:
    """A place in a picture of frost, laid over the image."""
    image_weight, frost_weight = parameters
    choices, places = dice.integers(0, 5), dice.uniform(0, 1, 2)
    overlay = np.empty_like(x)
    for i, (choice, place) in enumerate(zip(choices, places, strict=True)):
        picture = dice.frost[int(choice)]
        top, left = (int(p * (side - SIZE)) for p, side in zip(place, picture.shape[:2], strict=True))
        overlay[i] = picture[top : top + SIZE, left : left + SIZE]
    return image_weight * x + frost_weight * overlay / 255.0


@_kind((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))
def fog(x: np.ndarray, parameters: tuple[float, float], dice: Dice) -> np.ndarray:
    thickness, decay = parameters
    brightest = x.max(axis=(1, 2, 3), keepdims=True)
    return (x + thickness * plasma(dice, SIZE, decay)[..., None]) * brightest / (brightest + thickness)


# -- digital -----------------------------------------------------------------------------------------------------------


@_kind(0.05, 0.1, 0.15, 0.2, 0.3)
def brightness(x: np.ndarray, added: float, dice: Dice) -> np.ndarray:
    """Add to the value of HSV. Hue and saturation stay, so the three channels grow in proportion."""
    value = x.max(axis=3, keepdims=True)
    grown = np.clip(value + added, 0, 1)
    return np.where(value > 0, x * grown / np.where(value > 0, value, 1), grown)


@_kind(0.75, 0.5, 0.4, 0.3, 0.15)
def contrast(x: np.ndarray, factor: float, dice: Dice) -> np.ndarray:
    means = x.mean(axis=(1, 2), keepdims=True)
    return (x - means) * factor + means


@_kind((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))
def elastic_transform(x: np.ndarray, parameters: tuple[float, float, float], dice: Dice) -> np.ndarray:
    """A random affine map, then a smooth random displacement of every pixel; lengths are parts of the side."""
    import cv2
    from scipy.ndimage import gaussian_filter

    strength, sigma, corners = (SIZE * value for value in parameters)
    start = np.array([[26, 26], [26, 6], [6, 6]], dtype=np.float32)  # the centre plus or minus a third of the side
    moved = (start + dice.uniform(-corners, corners, 3, 2)).astype(np.float32)
    warped = np.stack(
        [
            cv2.warpAffine(
                image, cv2.getAffineTransform(start, corners), (SIZE, SIZE), borderMode=cv2.BORDER_REFLECT_101
            )
            for image, corners in zip(x.astype(np.float32), moved, strict=True)
        ]
    )
    noise = dice.uniform(-1, 1, 2, SIZE, SIZE)
    across, down = np.moveaxis(strength * gaussian_filter(noise, (0, 0, sigma, sigma), truncate=3), 1, 0)
    return _bilinear(warped, np.arange(SIZE)[:, None] + down, np.arange(SIZE) + across)


@_kind(0.95, 0.9, 0.85, 0.75, 0.65)
def pixelate(x: np.ndarray, scale: float, dice: Dice) -> np.ndarray:
    small = int(SIZE * scale)

    def enlarge_again(image: Image.Image) -> Image.Image:
        shrunk = image.resize((small, small), Image.Resampling.BOX)
        return shrunk.resize((SIZE, SIZE), Image.Resampling.BOX)

    return _by_pillow(x, enlarge_again)


@_kind(80, 65, 58, 50, 40)
def jpeg_compression(x: np.ndarray, quality: int, dice: Dice) -> np.ndarray:
    def through_jpeg(image: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        return Image.open(buffer)

    return _by_pillow(x, through_jpeg)


# -- the four extra kinds ----------------------------------------------------------------------------------------------


@_kind(0.06, 0.1, 0.12, 0.16, 0.2, extra=True)
def speckle_noise(x: np.ndarray, scale: float, dice: Dice) -> np.ndarray:
    return x + x * scale * dice.normal(*x.shape[1:])


@_kind(0.4, 0.6, 0.7, 0.8, 1, extra=True)
def gaussian_blur(x: np.ndarray, sigma: float, dice: Dice) -> np.ndarray:
    return blur(x, sigma)


@_kind(
    (0.62, 0.1, 0.7, 0.7, 0.5, False),
    (0.65, 0.1, 0.8, 0.7, 0.5, False),
    (0.65, 0.3, 1, 0.69, 0.5, False),
    (0.65, 0.1, 0.7, 0.69, 0.6, True),
    (0.65, 0.1, 0.5, 0.68, 0.6, True),
    extra=True,
)
def spatter(x: np.ndarray, parameters: tuple[Any, ...], dice: Dice) -> np.ndarray:
    """Drops of water at severities 1 to 3, of mud at 4 and 5."""
    mean, scale, sigma, threshold, strength, mud = parameters
    liquid = blur(mean + scale * dice.normal(SIZE, SIZE, 1), sigma)
    liquid = np.where(liquid < threshold, 0, liquid)
    if mud:
        cover = blur((liquid > threshold).astype(float), strength)
        cover = np.where(cover < 0.8, 0, cover)
        return x * (1 - cover) + cover * np.array([63, 42, 20]) / 255
    drops = np.stack([_drops((layer[..., 0] * 255).astype(np.uint8)) for layer in liquid])
    return x + strength * drops[..., None] * np.array([175, 238, 238]) / 255


@_kind((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2), extra=True)
def saturate(x: np.ndarray, parameters: tuple[float, float], dice: Dice) -> np.ndarray:
    """Scale and shift the saturation of HSV. Hue and value stay, so the distances to the value grow in proportion.

    Grey has hue 0, red.
    """
    factor, added = parameters
    value = x.max(axis=3, keepdims=True)
    distance = value - x.min(axis=3, keepdims=True)
    saturation = np.divide(distance, value, out=np.zeros_like(value), where=value > 0)
    wanted = np.clip(factor * saturation + added, 0, 1)
    grey = distance == 0
    directions = np.where(grey, np.array([0.0, 1.0, 1.0]), (value - x) / np.where(grey, 1, distance))
    return value * (1 - wanted * directions)


# -- what they are made of ---------------------------------------------------------------------------------------------


def blur(x: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of every channel, cut at 4 sigma, the border repeated."""
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(x, (0, sigma, sigma, 0), mode="nearest")


def zoom(x: np.ndarray, factor: float) -> np.ndarray:
    """Enlarge the middle of every image, linearly, and cut the result to the size of the image."""
    side = _zoom_matrix(factor)
    return np.einsum("ij,bjkc,lk->bilc", side, x, side, optimize=True)


@functools.cache
def _zoom_matrix(factor: float) -> np.ndarray:
    """The pixels of an enlarged line, (32, 32), each as weights of those of the line."""
    from scipy.ndimage import zoom as enlarge

    kept = math.ceil(SIZE / factor)
    first = (SIZE - kept) // 2
    enlarged = enlarge(np.eye(SIZE)[first : first + kept], (factor, 1), order=1)
    trim = (len(enlarged) - SIZE) // 2
    return enlarged[trim : trim + SIZE]


def streak(x: np.ndarray, radius: int, sigma: float, degrees: np.ndarray) -> np.ndarray:
    """ImageMagick's motion blur: half a Gaussian along a line of whole pixels, the border repeated, to 8 bits.

    Args:
        x: images (B, 32, 32, C).
        radius: the line has 2 radius + 1 pixels.
        sigma: of the Gaussian, pixels.
        degrees: (B,), clockwise from the right.
    """
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    weights /= weights.sum()
    angles = np.deg2rad(degrees)[:, None]
    across, down = (np.ceil(steps * part - 0.5).astype(int) for part in (np.cos(angles), np.sin(angles)))
    batch, pixels = np.arange(len(x))[:, None, None], np.arange(SIZE)
    blurred = np.zeros_like(x)
    for step in steps[weights > 1e-6]:
        rows = np.clip(pixels + down[:, step, None], 0, SIZE - 1)[:, :, None]
        columns = np.clip(pixels + across[:, step, None], 0, SIZE - 1)[:, None, :]
        blurred += weights[step] * x[batch, rows, columns]
    return np.rint(blurred * 255) / 255


def plasma(dice: Dice, size: int, decay: float) -> np.ndarray:
    """Clouds in [0, 1], (B, size, size), by the diamond-square algorithm on a torus; `decay` makes them smooth."""
    numbers = dice.uniform(-1, 1, size * size - 1)
    clouds = np.zeros((len(numbers), size, size))
    drawn, wobble, step = 0, 100.0, size
    while step >= 2:
        half = step // 2
        corners = clouds[:, ::step, ::step]
        below = corners + np.roll(corners, -1, axis=1)
        sums = below + np.roll(below, -1, axis=2)  # of the four corners of each square
        for place in ("centre", "top", "left"):
            if place == "top":  # between two corners, and between two centres
                centres = clouds[:, half::step, half::step]
                sums = centres + np.roll(centres, 1, axis=1) + corners + np.roll(corners, -1, axis=2)
            elif place == "left":
                sums = centres + np.roll(centres, 1, axis=2) + corners + np.roll(corners, -1, axis=1)
            count = sums[0].size
            noise = numbers[:, drawn : drawn + count].reshape(sums.shape)
            drawn += count
            rows, columns = {"centre": (half, half), "top": (0, half), "left": (half, 0)}[place]
            clouds[:, rows::step, columns::step] = sums / 4 + wobble**2 * noise
        step, wobble = half, wobble / decay
    assert drawn == numbers.shape[1]
    clouds -= clouds.min(axis=(1, 2), keepdims=True)
    return clouds / clouds.max(axis=(1, 2), keepdims=True)


def read_frost(folder: Path) -> list[np.ndarray]:
    """The first five of the six published pictures of frost, at a fifth of their size: what CIFAR-C uses.

    Raises:
        ValueError: one of them is missing.
    """
    import cv2

    pictures = []
    for number in range(1, 6):
        found = sorted(folder.glob(f"frost{number}.*"))
        if not found:
            raise ValueError(f"{folder} has no frost{number}.png or .jpg; give the folder of the published pictures")
        picture = np.asarray(Image.open(found[0]).convert("RGB"))
        pictures.append(cv2.resize(picture, (0, 0), fx=0.2, fy=0.2))
    return pictures


@functools.cache
def frost_stand_ins() -> list[np.ndarray]:
    """Five pale-blue pictures of ridged clouds, which stand in for photographs of frost that we may not ship."""
    clouds = plasma(Dice((0, 0), range(15)), 128, 1.6).reshape(5, 3, 128, 128)
    ridges = (1 - np.abs(2 * clouds - 1)).mean(axis=1) ** 2
    ridges /= ridges.max(axis=(1, 2), keepdims=True)
    return list(255 * ridges[..., None] ** np.array([0.7, 0.6, 0.5]))


def _bilinear(x: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Images (B, 32, 32, C) at places (B, 32, 32) between their pixels, mirrored beyond their edges."""
    from scipy.ndimage import map_coordinates

    sampled = np.empty_like(x)
    for image, row, column, out in zip(x, rows, columns, sampled, strict=True):
        for channel in range(x.shape[3]):
            map_coordinates(image[..., channel], (row, column), order=1, mode="reflect", output=out[..., channel])
    return sampled


def _by_pillow(x: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    changed = [np.asarray(change(Image.fromarray(image))) for image in np.rint(x * 255).astype(np.uint8)]
    return np.stack(changed) / 255.0


def _drops(liquid: np.ndarray) -> np.ndarray:
    """Drops with a light and a dark edge, (32, 32) in [0, 1], from a uint8 layer of liquid."""
    import cv2

    distance = cv2.distanceTransform(255 - cv2.Canny(liquid, 50, 150), cv2.DIST_L2, 5)
    distance = cv2.blur(np.minimum(distance, 20), (3, 3)).astype(np.uint8)
    relief = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]], dtype=np.float32)
    edges = cv2.filter2D(cv2.equalizeHist(distance), cv2.CV_8U, relief)
    drops = liquid * cv2.blur(edges, (3, 3)).astype(np.float32)
    return drops / (drops.max() or 1)
