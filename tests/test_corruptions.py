"""The corruptions: values worked out by hand from the published definition, and independent code as oracle."""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np
import pytest

from tffd_zoo.suite.corruptions import (
    KINDS,
    SEVERITIES,
    SIZE,
    Dice,
    _zoom_matrix,
    corrupt,
    disk,
    plasma,
    read_frost,
    streak,
)

pytest.importorskip("cv2")  # the extra `suite`


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Smooth coloured images, with a grey and a black one among them."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (6, 8, 8, 3)).repeat(4, axis=1).repeat(4, axis=2)
    coarse[4] = coarse[4, :, :, :1]
    coarse[5] = 0
    return coarse.astype(np.uint8)


def even(value: int) -> np.ndarray:
    return np.full((1, SIZE, SIZE, 3), value, np.uint8)


def after(image: np.ndarray, kind: str, severity: int) -> np.ndarray:
    return corrupt(image, kind, severity, 0, range(len(image)))


# -- the whole ---------------------------------------------------------------------------------------------------------


def test_fifteen_kinds_are_the_benchmark_and_four_are_extra() -> None:
    assert sum(not kind.extra for kind in KINDS.values()) == 15
    assert [name for name, kind in KINDS.items() if kind.extra] == [
        "speckle_noise",
        "gaussian_blur",
        "spatter",
        "saturate",
    ]
    assert all(len(kind.severities) == len(SEVERITIES) == 5 for kind in KINDS.values())


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_corrupted_alike_in_any_batch(kind: str, images: np.ndarray) -> None:
    together = corrupt(images, kind, 3, 7, range(len(images)))
    alone = [corrupt(images[i : i + 1], kind, 3, 7, [i]) for i in range(len(images))]
    assert together.dtype == np.uint8
    assert np.array_equal(together, np.concatenate(alone))


@pytest.mark.parametrize("kind", ["gaussian_noise", "snow", "fog", "elastic_transform", "spatter"])
def test_another_seed_index_or_severity_draws_other_numbers(kind: str, images: np.ndarray) -> None:
    image = images[:1]
    first = corrupt(image, kind, 2, 0, [0])
    assert not np.array_equal(first, corrupt(image, kind, 2, 1, [0]))
    assert not np.array_equal(first, corrupt(image, kind, 2, 0, [1]))
    assert not np.array_equal(first, corrupt(image, kind, 3, 0, [0]))


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="chosen for 32 x 32"):
        corrupt(np.zeros((1, 64, 64, 3), np.uint8), "fog", 1, 0, [0])


# -- noise -------------------------------------------------------------------------------------------------------------


def test_gaussian_noise_has_the_published_spread() -> None:
    for severity, scale in zip(SEVERITIES, (0.04, 0.06, 0.08, 0.09, 0.10), strict=True):
        noisy = after(even(128).repeat(8, axis=0), "gaussian_noise", severity)
        assert noisy.std() / 255 == pytest.approx(scale, rel=0.02)


def test_shot_noise_has_the_spread_of_counted_photons() -> None:
    noisy = after(even(128).repeat(8, axis=0), "shot_noise", 5) / 255
    assert noisy.mean() == pytest.approx(128 / 255, abs=0.005)
    assert noisy.var() == pytest.approx(128 / 255 / 50, rel=0.05)


def test_impulse_noise_turns_the_published_share_of_values_black_or_white() -> None:
    noisy = after(even(128).repeat(8, axis=0), "impulse_noise", 5)
    assert (noisy == 255).mean() == pytest.approx(0.035, abs=0.004)
    assert (noisy == 0).mean() == pytest.approx(0.035, abs=0.004)
    assert ((noisy == 128) | (noisy == 0) | (noisy == 255)).all()


def test_speckle_noise_spares_black() -> None:
    assert not after(even(0), "speckle_noise", 5).any()


# -- blur --------------------------------------------------------------------------------------------------------------


def test_the_disk_of_the_first_severities_is_a_smoothed_point() -> None:
    tap = np.exp(-1 / (2 * 0.4**2))
    kernel = disk(0.3, 0.4)
    assert kernel[2, 2] == pytest.approx(1 / (1 + 2 * tap) ** 2)
    assert kernel[1, 2] == kernel[2, 3] == pytest.approx(tap / (1 + 2 * tap) ** 2)
    assert kernel.sum() == pytest.approx(1)


def test_the_disk_of_the_last_severities_is_a_cross_and_a_square() -> None:
    assert disk(1, 0.2)[1:4, 1:4] == pytest.approx(np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]]) / 5, abs=1e-5)
    assert disk(1.5, 0.1)[1:4, 1:4] == pytest.approx(np.full((3, 3), 1 / 9))


def test_defocus_of_a_point_is_the_disk() -> None:
    point = even(0)
    point[0, 10, 20] = 255
    assert np.array_equal(after(point, "defocus_blur", 5)[0, 9:12, 19:22, 0], np.full((3, 3), 28))  # 255 / 9, cut


def test_motion_blur_trails_to_the_left_of_a_point_at_no_angle() -> None:
    point = np.zeros((1, SIZE, SIZE, 1))
    point[0, 16, 16] = 1
    weights = np.exp(-(np.arange(13) ** 2) / 2)
    row = streak(point, 6, 1, np.zeros(1))[0, 16, :, 0]
    assert row[16:11:-1] == pytest.approx(weights[:5] / weights.sum(), abs=1 / 255)
    assert not row[17:].any()


def test_motion_blur_goes_down_at_a_right_angle() -> None:
    point = np.zeros((1, SIZE, SIZE, 1))
    point[0, 16, 16] = 1
    trail = streak(point, 6, 2, np.array([90.0]))[0, :, :, 0]
    assert trail[:, 16].argmax() == 16
    assert trail[13, 16] > 0 == trail[17, 16]


def test_glass_blur_takes_every_pixel_from_itself_or_up_and_left_of_it() -> None:
    numbered = np.arange(SIZE * SIZE).reshape(1, SIZE, SIZE)
    image = np.stack([numbered // 256, numbered % 256, numbered * 0], axis=3).astype(np.uint8)
    glass = after(image, "glass_blur", 1).astype(int)  # sigma 0.05 does not blur
    source = glass[0, :, :, 0] * 256 + glass[0, :, :, 1]
    moved = numbered[0] - source
    assert set(np.unique(moved[2:, 2:])) == {0, 1, SIZE, SIZE + 1}
    assert not moved[:2].any()
    assert not moved[:, :2].any()


def test_zoom_keeps_the_middle_and_agrees_with_scipy_on_a_picture(images: np.ndarray) -> None:
    from scipy.ndimage import zoom as enlarge

    picture = images[0] / 255.0
    assert np.array_equal(_zoom_matrix(1.0), np.eye(SIZE))
    whole = enlarge(picture[3:28, 3:28], (1.3, 1.3, 1), order=1)  # the middle 25 of 32 pixels: ceil(32 / 1.3)
    matrix = _zoom_matrix(1.3)
    assert np.einsum("ij,jkc,lk->ilc", matrix, picture, matrix) == pytest.approx(whole[:SIZE, :SIZE])


def test_zoom_blur_of_an_even_image_is_the_image() -> None:
    assert abs(after(even(100), "zoom_blur", 5).astype(int) - 100).max() <= 1


# -- weather -----------------------------------------------------------------------------------------------------------


def test_clouds_agree_with_the_diamond_square_algorithm_point_by_point() -> None:
    size, decay = 8, 2.0
    numbers = iter(Dice((1, 2), [3]).uniform(-1, 1, size * size - 1)[0])
    grid = np.zeros((size, size))
    step, wobble = size, 100.0

    def at(row: int, column: int) -> float:
        return grid[row % size, column % size]

    while step >= 2:
        half = step // 2
        diagonal = [(-half, -half), (-half, half), (half, -half), (half, half)]
        straight = [(-half, 0), (half, 0), (0, -half), (0, half)]
        for top, left, around in ((half, half, diagonal), (0, half, straight), (half, 0, straight)):
            for row in range(top, size, step):
                for column in range(left, size, step):
                    mean = sum(at(row + down, column + across) for down, across in around) / 4
                    grid[row, column] = mean + wobble**2 * next(numbers)
        step, wobble = half, wobble / decay
    expected = (grid - grid.min()) / (grid - grid.min()).max()
    assert plasma(Dice((1, 2), [3]), size, decay)[0] == pytest.approx(expected)


def test_fog_over_white_runs_from_its_thinnest_to_white() -> None:
    foggy = after(even(255), "fog", 4)
    assert foggy.max() == 255
    assert foggy.min() == int(255 / (1 + 1))


def test_snow_whitens_and_its_flakes_fall_twice() -> None:
    snowy = after(even(0), "snow", 1)
    whitened = int(255 * 0.05 * 0.5)  # (1 - 0.95) * (0 * 1.5 + 0.5)
    assert snowy.min() == whitened
    assert np.array_equal(snowy, snowy[:, ::-1, ::-1])
    assert snowy.max() > 40  # a streak spreads a flake over its line


def test_frost_is_laid_over_with_the_published_weights(tmp_path: Path) -> None:
    from PIL import Image

    for number in range(1, 6):
        Image.new("RGB", (400, 300), (200, 210, 220)).save(tmp_path / f"frost{number}.png")
    pictures = read_frost(tmp_path)
    assert [picture.shape for picture in pictures] == [(60, 80, 3)] * 5
    frosted = corrupt(even(100), "frost", 3, 0, [0], pictures)[0, 0, 0]
    assert frosted.tolist() == [int(0.9 * 100 + 0.4 * colour) for colour in (200, 210, 220)]


def test_missing_frost_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no frost1"):
        read_frost(tmp_path)


# -- digital -----------------------------------------------------------------------------------------------------------


def test_contrast_by_hand() -> None:
    image = even(0)
    image[:, :16] = 255
    assert set(np.unique(after(image, "contrast", 1))) == {31, 223}  # (0 or 1 - 0.5) * 0.75 + 0.5, times 255, cut


@pytest.mark.parametrize(
    ("kind", "severity", "scale", "added", "channel"),
    [
        ("brightness", 1, 1, 0.05, 2),
        ("brightness", 5, 1, 0.3, 2),
        ("saturate", 2, 0.1, 0, 1),
        ("saturate", 5, 2.5, 0.2, 1),
    ],
)
def test_brightness_and_saturation_agree_with_colorsys(
    kind: str, severity: int, scale: float, added: float, channel: int, images: np.ndarray
) -> None:
    corrupted = after(images, kind, severity)
    for image, ours in zip(images[:, ::4, ::4], corrupted[:, ::4, ::4], strict=True):
        for pixel, got in zip(image.reshape(-1, 3), ours.reshape(-1, 3), strict=True):
            hsv = list(colorsys.rgb_to_hsv(*(pixel / 255.0)))
            hsv[channel] = min(1, hsv[channel] * scale + added)
            assert got == pytest.approx(255 * np.array(colorsys.hsv_to_rgb(*hsv)), abs=1.001)


@pytest.mark.parametrize("kind", ["pixelate", "jpeg_compression", "gaussian_blur", "defocus_blur"])
def test_an_even_image_stays_as_it_is(kind: str) -> None:
    assert abs(after(even(77), kind, 3).astype(int) - 77).max() <= 1


def test_pixelate_at_the_fifth_severity_leaves_twenty_columns() -> None:
    ramp = np.broadcast_to(np.arange(SIZE, dtype=np.uint8)[:, None] * 8, (1, SIZE, SIZE, 3))
    assert len(np.unique(after(ramp, "pixelate", 5)[0, 0, :, 0])) <= 20


def test_elastic_transform_of_the_first_severity_is_an_affine_map() -> None:
    # three points of the affine map: an even gradient stays one, up to the mirrored border
    ramp = np.broadcast_to(np.arange(SIZE, dtype=np.uint8)[:, None] * 4, (1, SIZE, SIZE, 3))
    bent = after(np.ascontiguousarray(ramp), "elastic_transform", 1)[0, 10:22, 10:22, 0].astype(float)
    second_difference = np.diff(bent, n=2, axis=1)
    assert abs(second_difference).max() <= 2
    assert not np.array_equal(bent, ramp[0, 10:22, 10:22, 0])


def test_mud_covers_in_the_published_colour() -> None:
    muddy = after(even(255).repeat(8, axis=0), "spatter", 5)
    darkest = muddy[muddy[..., 0] == muddy[..., 0].min()]
    assert darkest[0] == pytest.approx(np.array([63, 42, 20]), abs=60)
    assert (muddy == 255).all(axis=3).any()
