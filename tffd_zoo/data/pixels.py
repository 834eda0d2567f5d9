"""From the bytes of an image file to the pixels that a person sees, or a reason why there are none."""

from __future__ import annotations

import io
from functools import cache
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

FORMATS = (
    "JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "MPO", "PPM", "QOI", "ICO", "ICNS", "DDS", "DIB",
    "PCX", "PSD", "SGI", "SUN", "XBM", "XPM", "TGA",
)  # fmt: skip
"""Pillow's names of what is read, in folders and in tables alike: still pictures that it decodes by itself. (For EPS it
would start Ghostscript, on a file from anywhere.) Likely ones first; TGA has no signature and comes last."""

WIDE_GREY = ("I;16", "I;16B", "I;16L", "I;16N")
"""Pillow's modes of 16-bit grey."""

BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262
WHITE_IS_ZERO = 0
"""Tags of TIFF that Pillow leaves to others where grey has more than 8 bits, and what the second may say."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each EXIF orientation. (`ImageOps.exif_transpose` also writes the EXIF anew, and fails on what some
cameras put there.)"""


class UnreadableImageError(ValueError):
    """An image that cannot be read: missing, damaged, or of pixels that no one can say how to show.

    Its message names the image and what to do.
    """


@cache
def readable_formats() -> tuple[str, ...]:
    """:data:`FORMATS` as far as this Pillow was built with them."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@cache
def image_suffixes() -> frozenset[str]:
    """Suffixes of the files that count as images, in lower case, with the dot."""
    formats = readable_formats()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def decode_rgb(encoded: bytes) -> Image.Image:
    """Return the image that `encoded` (PNG, JPEG, ...) holds as a person sees it, in RGB.

    Of an animation it is the first frame; for the rest see :func:`as_seen`.

    Raises:
        UnreadableImageError: it is missing, truncated, no image or none that can be shown; the message is the bare
            reason.
    """
    if not encoded:
        raise UnreadableImageError("it is empty")
    try:
        with Image.open(io.BytesIO(encoded), formats=readable_formats()) as image:
            return as_seen(image)
    except UnreadableImageError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImageError("not an image") from error
    except Exception as error:  # of a damaged file each decoder complains in its own way
        reason = " ".join(str(error).split()) or "no reason given"
        raise UnreadableImageError(f"{type(error).__name__}: {reason}") from error


def as_seen(image: Image.Image) -> Image.Image:
    """Return `image` in RGB as a person sees it.

    It is turned as its EXIF orientation says, transparent parts lie on white, and grey of 16 bits and of floats in
    [0, 1] keeps its range.

    Raises:
        UnreadableImageError: of such pixels, no one can say what is white.
        Exception: whatever Pillow raises for a damaged file.
    """
    image.load()
    return _turned(_as_rgb(image), image)


def _as_rgb(image: Image.Image) -> Image.Image:
    key = image.info.get("transparency")
    if image.mode in WIDE_GREY or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # the high byte, as Pillow reads 16-bit colour; its own conversion cuts everything above 255 to white
        values = np.asarray(image).astype(np.int64)
        grey = values >> (_tiff_tag(image, BITS_PER_SAMPLE, (16,))[0] - 8)
        if _tiff_tag(image, PHOTOMETRIC, 1) == WHITE_IS_ZERO:
            grey = 255 - grey
        if key is not None:
            grey[values == key] = 255
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if isinstance(key, tuple) and max(key) > 255:
        raise UnreadableImageError("of its 16-bit colours one is transparent, which is not read; store it with alpha")
    if image.mode == "F":
        grey = np.asarray(image)
        if not (grey.min() >= 0 and grey.max() <= 1):  # a NaN fails both
            raise UnreadableImageError(
                f"its floats go from {grey.min():g} to {grey.max():g}, so white is unknown; store them in [0, 1] or as "
                "16 bits"
            )
        if _tiff_tag(image, PHOTOMETRIC, 1) == WHITE_IS_ZERO:
            grey = 1 - grey
        return Image.fromarray((grey * 255).round().astype(np.uint8)).convert("RGB")
    if image.mode == "I":
        raise UnreadableImageError("of 32-bit grey, white is unknown; store it as 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _tiff_tag(image: Image.Image, tag: int, default: Any) -> Any:
    return getattr(image, "tag_v2", {}).get(tag, default)


def _turned(rgb: Image.Image, image: Image.Image) -> Image.Image:
    """Turn `rgb`, the pixels of `image`, by the EXIF orientation of `image`."""
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # what is no EXIF turns nothing, as in a viewer: the pixels are sound
        return rgb
    return rgb if turn is None else rgb.transpose(turn)
