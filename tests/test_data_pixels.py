"""What decoding shows: pixels as a person sees them, and one kind of error for whatever a file does instead."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tffd_zoo.data import UnreadableImageError, decode_rgb
from tffd_zoo.data.pixels import TURNS

FUZZ_STEP = int(os.environ.get("TFFD_FUZZ_STEP", 0))
"""Flip every byte whose position is a multiple of this; 0: some 12 bytes of each file."""

GREY = np.array([[0, 64, 128, 255]], dtype=np.uint8)


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def shown(encoded: bytes) -> np.ndarray:
    """The red channel; the others must be alike."""
    pixels = np.asarray(decode_rgb(encoded))
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def tiff(bits: int, photometric: int, pixels: bytes, floating: bool = False) -> bytes:
    """An uncompressed TIFF of four grey pixels in a row."""
    start, entries = 8 + 2 + 12 * 10 + 4, b""
    tags = [(256, 4), (257, 1), (258, bits), (259, 1), (262, photometric), (273, start)]
    for tag, value in [*tags, (277, 1), (278, 1), (279, len(pixels)), (339, 3 if floating else 1)]:
        entries += struct.pack("<HHII", tag, 4, 1, value)
    return b"II*\0" + struct.pack("<IH", 8, 10) + entries + struct.pack("<I", 0) + pixels


class TestGrey:
    @pytest.mark.parametrize("format", ["png", "tiff", "ppm"])
    def test_sixteen_bits_keep_their_range(self, format: str) -> None:
        wide = GREY.astype(np.uint16) * 257
        assert np.array_equal(shown(encode(Image.fromarray(wide), format)), GREY)

    def test_floats_keep_their_range_where_white_is_one_and_are_refused_elsewhere(self) -> None:
        floats = GREY.astype(np.float32) / 255
        assert np.array_equal(shown(encode(Image.fromarray(floats), "tiff")), GREY)
        for strange in (floats * 255, floats - 0.5, floats * np.nan):
            with pytest.raises(UnreadableImageError, match="white is unknown; store them in"):
                decode_rgb(encode(Image.fromarray(strange), "tiff"))

    def test_thirty_two_bits_are_refused(self) -> None:
        with pytest.raises(UnreadableImageError, match="white is unknown; store it as 8 or 16 bits"):
            decode_rgb(encode(Image.fromarray(GREY.astype(np.int32) * 1000), "tiff"))

    @pytest.mark.parametrize("white", [0, 1])
    def test_a_tiff_says_whether_zero_is_white_and_how_many_bits_there_are(self, white: int) -> None:
        expected = GREY if white else 255 - GREY
        assert np.array_equal(shown(tiff(8, white, GREY.tobytes())), expected)
        assert np.array_equal(shown(tiff(16, white, (GREY.astype("<u2") * 257).tobytes())), expected)
        floats = tiff(32, white, (GREY / 255).astype("<f4").tobytes(), floating=True)
        assert np.array_equal(shown(floats), expected)

    def test_of_twelve_bits_the_highest_count(self) -> None:
        assert shown(tiff(12, 1, bytes.fromhex("000 400 800 FFF".replace(" ", "")))).tolist() == [[0, 64, 128, 255]]

    def test_a_transparent_grey_lies_on_white(self) -> None:
        for bits, image in ((8, GREY), (16, GREY.astype(np.uint16) * 257)):
            encoded = encode(Image.fromarray(image), "png", transparency=0)
            assert shown(encoded).tolist() == [[255, 64, 128, 255]], bits

    def test_one_bit_is_black_and_white(self) -> None:
        assert shown(encode(Image.fromarray(GREY).point(lambda v: v > 100, "1"), "png")).tolist() == [[0, 0, 255, 255]]


class TestColour:
    def test_transparent_parts_lie_on_white_in_every_way_to_store_them(self) -> None:
        pixels = np.array([[[200, 0, 0, 0], [200, 0, 0, 128], [200, 0, 0, 255]]], dtype=np.uint8)
        for format in ("png", "webp", "tiff"):
            options = {"lossless": True} if format == "webp" else {}
            clear, half, opaque = np.asarray(decode_rgb(encode(Image.fromarray(pixels), format, **options)))[0].tolist()
            assert (clear, opaque) == ([255] * 3, [200, 0, 0])
            assert half == pytest.approx([227, 127, 127], abs=1)
        palette = Image.new("P", (2, 1))
        palette.putpalette([200, 0, 0, 0, 200, 0])
        palette.putpixel((1, 0), 1)
        for format in ("png", "gif"):
            decoded = decode_rgb(encode(palette, format, transparency=0))
            assert np.asarray(decoded).tolist() == [[[255] * 3, [0, 200, 0]]]

    def test_a_palette_has_as_many_alphas_as_it_likes(self) -> None:
        palette = Image.new("P", (3, 1))
        palette.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
        palette.putdata([0, 1, 2])
        clear, half, opaque = np.asarray(decode_rgb(encode(palette, "png", transparency=bytes([0, 128]))))[0].tolist()
        assert (clear, opaque) == ([255] * 3, [0, 0, 200])
        assert half == pytest.approx([127, 227, 127], abs=1)

    def test_a_transparent_colour_of_sixteen_bits_is_refused(self) -> None:
        def chunk(name: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

        header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
        colour = struct.pack(">HHH", 65535, 32768, 0)
        rest = chunk(b"IDAT", zlib.compress(b"\0" + colour)) + chunk(b"IEND", b"")
        signature = b"\x89PNG\r\n\x1a\n"
        assert np.asarray(decode_rgb(signature + header + rest)).tolist() == [[[255, 128, 0]]]
        with pytest.raises(UnreadableImageError, match=r"16-bit colours one is transparent, .*; store it with alpha"):
            decode_rgb(signature + header + chunk(b"tRNS", colour) + rest)

    @pytest.mark.parametrize("format", ["jpeg", "tiff"])
    def test_printers_colours_become_a_screens(self, format: str) -> None:
        red = encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), format)
        assert np.asarray(decode_rgb(red))[0, 0].tolist() == pytest.approx([255, 0, 0], abs=3)

    def test_of_several_sizes_the_largest_is_shown_and_of_several_pages_the_first(self) -> None:
        for format, options, size in (
            ("ico", {"sizes": [(16, 16), (64, 64)]}, (64, 64)),
            ("icns", {}, (1024, 1024)),
            ("tiff", {"save_all": True, "append_images": [Image.new("RGB", (256, 256), "blue")]}, (64, 64)),
        ):
            decoded = decode_rgb(encode(Image.new("RGB", (64, 64), "red"), format, **options))
            assert decoded.size == size
            assert np.asarray(decoded)[0, 0].tolist() == [255, 0, 0], format

    def test_of_an_animation_the_first_frame_is_shown(self) -> None:
        frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
        for format in ("gif", "webp", "png", "tiff", "avif"):
            encoded = encode(frames[0], format, save_all=True, append_images=frames[1:])
            assert np.asarray(decode_rgb(encoded))[0, 0].tolist() == pytest.approx([255, 0, 0], abs=3)


class TestOrientation:
    @pytest.mark.parametrize("format", ["jpeg", "png", "webp", "tiff"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_the_image_is_turned_as_its_exif_says(self, orientation: int, format: str) -> None:
        upright = Image.new("RGB", (24, 16))
        upright.paste((255, 255, 255), (0, 0, 8, 8))  # the top left corner is white
        candidates = [upright, *map(upright.transpose, Image.Transpose)]
        turn = TURNS.get(orientation)
        stored = next(c for c in candidates if (c if turn is None else c.transpose(turn)) == upright)
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"lossless": True} if format == "webp" else {}
        decoded = decode_rgb(encode(stored, format, exif=exif, **options))
        assert decoded.size == (24, 16)
        assert (np.asarray(decoded)[2:6, 2:6] > 200).all()
        assert (np.asarray(decoded)[10:, 10:] < 50).all()

    def test_what_is_no_exif_turns_nothing(self) -> None:
        encoded = encode(Image.new("RGB", (8, 4)), "jpeg", exif=b"Exif\0\0nonsense")
        assert decode_rgb(encoded).size == (8, 4)


# --- fuzzing ----------------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
RGB = Image.fromarray(RNG.integers(0, 256, (6, 7, 3), dtype=np.uint8))
WIDE = Image.fromarray(RNG.integers(0, 2**16, (6, 7), dtype=np.uint16))
EXIF = Image.Exif()
EXIF[0x0112] = 6
FILES: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: encode(RGB, "jpeg"),
    "jpeg progressive": lambda: encode(RGB, "jpeg", progressive=True),
    "jpeg grey": lambda: encode(RGB.convert("L"), "jpeg"),
    "jpeg cmyk": lambda: encode(RGB.convert("CMYK"), "jpeg"),
    "jpeg exif": lambda: encode(RGB, "jpeg", exif=EXIF),
    "mpo": lambda: encode(RGB, "mpo", save_all=True, append_images=[RGB]),
    "jpeg 2000": lambda: encode(RGB, "jpeg2000"),
    "jpeg 2000 codestream": lambda: encode(RGB, "jpeg2000", no_jp2=True),
    "png": lambda: encode(RGB, "png"),
    "png palette": lambda: encode(RGB.quantize(16), "png", transparency=0),
    "png 16 bits": lambda: encode(WIDE, "png"),
    "png alpha": lambda: encode(RGB.convert("RGBA"), "png"),
    "png one bit": lambda: encode(RGB.convert("1"), "png"),
    "png animated": lambda: encode(RGB, "png", save_all=True, append_images=[RGB.rotate(90)]),
    "png exif": lambda: encode(RGB, "png", exif=EXIF),
    "webp": lambda: encode(RGB, "webp"),
    "webp lossless": lambda: encode(RGB.convert("RGBA"), "webp", lossless=True),
    "webp animated": lambda: encode(RGB, "webp", save_all=True, append_images=[RGB.rotate(90)]),
    "gif": lambda: encode(RGB, "gif"),
    "gif animated": lambda: encode(RGB, "gif", save_all=True, append_images=[RGB.rotate(90)]),
    "bmp": lambda: encode(RGB, "bmp"),
    "bmp palette": lambda: encode(RGB.quantize(16), "bmp"),
    "dib": lambda: encode(RGB, "dib"),
    "tiff": lambda: encode(RGB, "tiff"),
    "tiff deflate": lambda: encode(RGB, "tiff", compression="tiff_adobe_deflate"),
    "tiff lzw": lambda: encode(RGB, "tiff", compression="tiff_lzw"),
    "tiff jpeg": lambda: encode(RGB, "tiff", compression="jpeg"),
    "tiff group 4": lambda: encode(RGB.convert("1"), "tiff", compression="group4"),
    "tiff float": lambda: encode(RGB.convert("L").convert("F"), "tiff"),
    "tiff 16 bits": lambda: encode(WIDE, "tiff"),
    "avif": lambda: encode(RGB, "avif"),
    "ppm": lambda: encode(RGB, "ppm"),
    "pgm 16 bits": lambda: encode(WIDE, "ppm"),
    "qoi": lambda: encode(RGB, "qoi"),
    "ico": lambda: encode(RGB.resize((16, 16)), "ico"),
    "icns": lambda: encode(RGB.resize((16, 16)), "icns"),
    "dds": lambda: encode(RGB, "dds"),
    "pcx": lambda: encode(RGB, "pcx"),
    "sgi": lambda: encode(RGB, "sgi"),
    "tga": lambda: encode(RGB, "tga"),
    "tga packed": lambda: encode(RGB, "tga", compression="tga_rle"),
    "xbm": lambda: encode(RGB.convert("1"), "xbm"),
    "sun": lambda: struct.pack(">8I", 0x59A66A95, 2, 1, 24, 6, 1, 0, 0) + bytes(range(6)),
}


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_an_image_or_unreadable_and_nothing_else(name: str) -> None:
    """Every chosen byte is flipped, and the file is cut there."""
    sound = FILES[name]()
    if name != "tiff float":
        assert min(decode_rgb(sound).size) >= 1
    step = FUZZ_STEP or max(1, len(sound) // 12)
    read, reasons = 0, []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for position in range(0, len(sound), step):
            damaged = [bytearray(sound), bytearray(sound), bytearray(sound[:position])]
            damaged[0][position] ^= 0xFF
            damaged[1][position] ^= 0x01
            for encoded in damaged:
                try:
                    assert decode_rgb(bytes(encoded)).mode == "RGB"
                    read += 1
                except UnreadableImageError as error:
                    reasons.append(str(error))
    print(f"{name}: {len(sound)} bytes, {read + len(reasons)} damaged files, {read} read")
    assert reasons
    assert all(reason and "\n" not in reason for reason in reasons)


@pytest.mark.parametrize(
    "error", [struct.error("x"), SyntaxError(), OverflowError("x"), MemoryError(), RecursionError("x"), KeyError(3)]
)
def test_whatever_a_decoder_raises_is_one_kind(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Image, "open", fails)
    with pytest.raises(UnreadableImageError, match=type(error).__name__):
        decode_rgb(b"any")


def test_a_picture_too_large_to_be_one_is_refused_before_it_is_decoded() -> None:
    header = encode(RGB, "bmp")
    bomb = header[:18] + struct.pack("<ii", 30_000, 30_000) + header[26:]
    with pytest.raises(UnreadableImageError, match="decompression bomb"):
        decode_rgb(bomb)
