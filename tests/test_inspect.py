"""Looking inside: effective rank, likeness and pairing by hand, and the picture of a real model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from small_export import small_export
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from tffd_zoo import inspect
from tffd_zoo.data import open_source
from tffd_zoo.inspect import (
    InspectConfig,
    channel_gram,
    cosines,
    effective_rank,
    look_inside,
    mosaic,
    singular_values,
    view_stages,
)
from tffd_zoo.salience import stage_salience
from tffd_zoo.stages import Stages, find_stages


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Names of two untrained models of ten classes."""
    folder = tmp_path_factory.mktemp("models")
    one, two = (small_export(folder / f"run{seed}", seed) / "export" for seed in (0, 1))
    return f"local-dir:{one}", f"local-dir:{two}"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "digit.png"
    open_source("digits", "test").decode(3).save(path)
    return path


class Given(nn.Module):
    """A model whose one stage gives its images back as features."""

    def forward_intermediates(self, images: Tensor, **_: object) -> list[Tensor]:
        return [images]


GIVEN = Stages((0,), ("stage",), (4,), (1,))


# --- the figures ------------------------------------------------------------------------------------------------------


def test_effective_rank_counts_orthogonal_channels_and_sees_through_copies() -> None:
    assert effective_rank(torch.ones(5)) == pytest.approx(5)
    assert effective_rank(torch.tensor([3.0, 0, 0, 0])) == pytest.approx(1)
    # shares 3/4 and 1/4: exp(0.75 ln(4/3) + 0.25 ln 4)
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(math.exp(0.5623351), rel=1e-6)
    assert effective_rank(torch.zeros(3)) == 0


def test_singular_values_are_those_of_the_channels_over_all_images_and_places() -> None:
    features = torch.randn(150, 6, 3, 5, generator=torch.Generator().manual_seed(0))
    matrix = features.transpose(0, 1).reshape(6, -1)
    expected = torch.linalg.svdvals(matrix.double())
    torch.testing.assert_close(singular_values(channel_gram(features)), expected)


def test_cosines_by_hand() -> None:
    # channels (1, 0), (2, 2), (0, 0) over two places
    features = torch.tensor([[1.0, 0.0], [2.0, 2.0], [0.0, 0.0]]).view(1, 3, 1, 2)
    half = math.sqrt(0.5)
    expected = torch.tensor([[1, half, 0], [half, 1, 0], [0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(cosines(channel_gram(features)), expected)


def test_copies_of_their_teachers_have_cosine_one_and_halve_the_rank() -> None:
    torch.manual_seed(0)
    salient = torch.eye(2).view(1, 2, 1, 2) * 3  # two orthogonal channels of one norm
    images = torch.cat([salient[:, :1], salient / 3, salient[:, 1:]], dim=1)  # teachers 0 and 3, copies 1 and 2
    (view,) = view_stages(Given(), GIVEN, images, [images], InspectConfig("given"))
    assert view.salient.tolist() == [0, 3]
    assert view.redundant.tolist() == [1, 2]
    assert view.teachers.tolist() == [0, 0, 3, 3]
    assert view.likeness == pytest.approx(1)
    assert view.any_likeness == pytest.approx(2 / 6)  # two of six pairs are alike, the others orthogonal
    assert view.effective_rank == pytest.approx(2)


def test_redundant_channels_stand_in_the_order_of_their_teachers() -> None:
    images = torch.rand(3, 8, 4, 4, generator=torch.Generator().manual_seed(1))
    (view,) = view_stages(Given(), GIVEN, images[:1], [images], InspectConfig("given"))
    assert torch.equal(view.teachers[view.redundant], view.salient)
    assert (view.salience[view.salient].diff() <= 0).all()
    assert view.salience[view.salient].min() >= view.salience[view.redundant].max()


@pytest.mark.parametrize("metric", ["lp", "spread", "entropy", "hrank"])
def test_salience_over_several_batches_is_that_of_all_images_in_training(metric: str) -> None:
    images = torch.rand(5, 4, 6, 6, generator=torch.Generator().manual_seed(2))
    config = InspectConfig("given", salience=metric)  # type: ignore[arg-type]
    (view,) = view_stages(Given(), GIVEN, images[:1], images.split(2), config)
    torch.testing.assert_close(view.salience, stage_salience([images], metric)[0])  # type: ignore[arg-type]


def test_a_mosaic_has_its_tiles_in_reading_order_and_gaps_between() -> None:
    tiles = torch.arange(6.0).view(6, 1, 1).expand(6, 2, 3)
    canvas = mosaic(tiles)
    assert canvas.shape == (2 * 2 + 1, 3 * 3 + 2)
    assert canvas[:2, :3].eq(0).all()
    assert canvas[3:, 8:].eq(5).all()
    assert canvas[2].isnan().all()
    assert mosaic(torch.zeros(7, 2, 3)).shape == (3 * 2 + 2, 3 * 3 + 2)  # a prime number: places stay empty


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_model_sees_the_image_as_its_own_config_prepares_it(exports: tuple[str, str], picture: Path) -> None:
    look = look_inside(InspectConfig(exports[0], picture))
    model = timm.create_model(exports[0], pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model))
    image = transform(Image.open(picture).convert("RGB"))[None]
    indices = list(find_stages(model).indices)
    with torch.no_grad():
        features = model.forward_intermediates(image, indices=indices, intermediates_only=True)
    views = look.models[exports[0]]
    assert [view.name for view in views] == list(find_stages(model).names)
    for view, feature, salience in zip(views, features, stage_salience(features), strict=True):
        torch.testing.assert_close(view.maps, feature[0])
        torch.testing.assert_close(view.salience, salience)
    assert look.image.shape == (3, 16, 16)
    assert 0 <= look.image.min() < look.image.max() <= 1


def test_the_picture_of_two_models_comes_out_the_same_twice(
    exports: tuple[str, str], picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = []
    for name in ("one.png", "two.png"):
        config = InspectConfig(exports[0], picture, exports[1], data="digits", images=20, out=tmp_path / name)
        inspect.main(config)
        pictures.append((tmp_path / name).read_bytes())
    assert pictures[0] == pictures[1]
    assert pictures[0].startswith(b"\x89PNG")
    with Image.open(tmp_path / "one.png") as drawn:
        assert drawn.width > drawn.height > 500
    out = capsys.readouterr().out
    assert out.count("| stages.2 |") == 4
    assert "over 20 images of split test of digits" in out


def test_the_images_of_a_data_set_are_spread_over_the_split(exports: tuple[str, str]) -> None:
    look = look_inside(InspectConfig(exports[0], data="digits", images=3, stages=(1,), salience="bn_scale"))
    (view,) = look.models[exports[0]]
    source = open_source("digits", "test")
    model = timm.create_model(exports[0], pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model))
    images = torch.stack([transform(source.decode(index)) for index in (0, 120, 240)])
    with torch.no_grad():
        (feature,) = model.forward_intermediates(images, indices=[1], intermediates_only=True)
    torch.testing.assert_close(view.singular_values, singular_values(channel_gram(feature)))


def test_what_cannot_be_seen_is_refused_by_name(exports: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name an IMAGE, or a data set with --data"):
        look_inside(InspectConfig(exports[0]))
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        look_inside(InspectConfig(exports[0], tmp_path / "missing.png"))
    with pytest.raises(ValueError, match="--against names the same model"):
        look_inside(InspectConfig(exports[0], data="digits", against=exports[0]))
    with pytest.raises(ValueError, match="did you mean"):
        look_inside(InspectConfig("tffd_resnet21", data="digits"))
    with pytest.raises(ValueError, match="--images 0 is out of range; choose 1 or more"):
        look_inside(InspectConfig(exports[0], data="digits", images=0))
