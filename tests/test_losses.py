"""The two Tf-FD losses: numbers worked out by hand, and the fast forms against the plain ones."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from tffd_zoo import CANONICAL, TfFDTask, _lean
from tffd_zoo.feature_losses import FEATURE_LOSSES
from tffd_zoo.losses import inter_layer_loss, intra_layer_loss, pair_channels, salient_count, stage_pairs
from tffd_zoo.stages import find_stages


def test_redundant_channels_learn_from_salient_ones_modulo_k() -> None:
    salience = torch.tensor([1.0, 5.0, 3.0, 4.0, 2.0])  # order 1, 3 | 2, 4, 0
    assert pair_channels(salience, 0.5).tolist() == [1, 1, 1, 3, 3]
    # K = floor(0.2 * 5) = 1: everybody learns from channel 1.
    assert pair_channels(salience, 0.2).tolist() == [1, 1, 1, 1, 1]
    assert pair_channels(salience, 1.0).tolist() == [0, 1, 2, 3, 4]


def test_ties_keep_channel_order() -> None:
    assert pair_channels(torch.zeros(6)).tolist() == [0, 1, 2, 0, 1, 2]


def test_a_single_channel_is_its_own_teacher_and_costs_nothing() -> None:
    assert salient_count(1) == 1
    assert intra_layer_loss([torch.randn(2, 1, 3, 3)], [pair_channels(torch.ones(1))]).item() == 0


def test_intra_layer_loss_by_hand() -> None:
    # First stage, 1x1: channel 1 holds 1 and learns 3, (1 - 3)^2 = 4. Second stage: (0 - 2)^2 = 4 and (1 - 5)^2 = 16.
    first = torch.tensor([[[[3.0]], [[1.0]]]], requires_grad=True)
    second = torch.tensor([[[[2.0, 5.0]], [[0.0, 1.0]]]], requires_grad=True)
    teachers = [torch.tensor([0, 0]), torch.tensor([0, 0])]
    mean = intra_layer_loss([first, second], teachers)
    assert mean.item() == (4 + (4 + 16) / 2) / 2
    assert intra_layer_loss([first, second], teachers, reduction="sum").item() == (4 + 20) / 2
    mean.backward()
    # d/dx of (x - 3)^2 / 2 at 1 is -2; the salient channel is a fixed target.
    assert first.grad is not None
    assert first.grad.flatten().tolist() == [0.0, -2.0]
    assert second.grad is not None
    assert second.grad.flatten().tolist() == [0.0, 0.0, -1.0, -2.0]


def test_detaching_keeps_the_value_and_the_redundant_gradient_and_zeroes_the_salient_one() -> None:
    torch.manual_seed(0)
    feature = torch.randn(3, 6, 4, 4)
    teacher = pair_channels(torch.randn(6))
    grads, values = [], []
    for detach in (True, False):
        x = feature.clone().requires_grad_()
        loss = intra_layer_loss([x], [teacher], detach_salient=detach)
        loss.backward()
        assert x.grad is not None
        grads.append(x.grad)
        values.append(loss.item())
    redundant = teacher != torch.arange(6)
    assert values[0] == values[1]
    assert torch.equal(grads[0][:, redundant], grads[1][:, redundant])
    assert grads[0][:, ~redundant].abs().max() == 0
    assert grads[1][:, ~redundant].abs().min() > 0


# --- the fast forms against the plain ones ----------------------------------------------------------------------------


def stages(shapes: list[tuple[int, ...]], layout: torch.memory_format = torch.contiguous_format) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(s, dtype=torch.float64, generator=generator).to(memory_format=layout).requires_grad_()
        for s in shapes
    ]


def assert_equal_with_gradients(lean: Tensor, plain: Tensor, features: list[Tensor]) -> None:
    torch.testing.assert_close(lean, plain, rtol=1e-12, atol=0, check_dtype=False)
    gradients = (torch.autograd.grad(loss, features, allow_unused=True) for loss in (lean, plain))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(
            torch.zeros(1) if mine is None else mine,
            torch.zeros(1) if theirs is None else theirs,
            rtol=1e-12,
            atol=1e-15,
        )


@pytest.fixture
def double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses run in float32; here the derivation is on trial."""
    monkeypatch.setattr(Tensor, "float", lambda self: self)


LAYOUTS = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"]
)
TILES = pytest.mark.parametrize("tiles", [True, False], ids=["tiles", "no tiles"])
LOSSES = pytest.mark.parametrize(
    ("loss", "reduction"),
    [("l2", "mean"), ("l2", "sum"), ("ab", "mean"), ("at", "mean"), ("sp", "mean"), ("ickd", "mean")],
)


@LAYOUTS
@LOSSES
@pytest.mark.parametrize("detach", [True, False], ids=["detached", "two-way"])
@pytest.mark.parametrize("ratio", [0.5, 0.3, 1.0])
@pytest.mark.usefixtures("double_precision")
def test_the_lean_intra_loss_equals_the_plain_one_with_its_gradients(
    ratio: float, detach: bool, loss: Any, reduction: Any, layout: torch.memory_format
) -> None:
    features = stages([(2, 7, 5, 4), (2, 8, 3, 3)], layout)
    teachers = [pair_channels(torch.randn(feature.shape[1]), ratio) for feature in features]
    settings: dict[str, Any] = {"loss": loss, "detach_salient": detach, "reduction": reduction}
    lean = _lean.intra_layer_loss(features, teachers, ratio=ratio, **settings)
    plain = intra_layer_loss(features, teachers, **settings)
    if ratio == 1.0:
        assert lean.item() == plain.item() == 0
    else:
        assert_equal_with_gradients(lean, plain, features)


def sides(size: int, reductions: tuple[int, ...]) -> list[int]:
    """Sides of the stages' maps: convolutions with padding round odd sizes up."""
    return [-(-size // reduction) for reduction in reductions]


@LAYOUTS
@LOSSES
@pytest.mark.parametrize("size", [17, 28, 30, 32, 33, 47, 63])
@pytest.mark.usefixtures("double_precision")
def test_the_lean_inter_loss_equals_the_plain_one_with_its_gradients(
    size: int, loss: Any, reduction: Any, layout: torch.memory_format
) -> None:
    features = stages([(2, c, s, s) for c, s in zip((4, 6, 8), sides(size, (1, 2, 4)), strict=True)], layout)
    settings: dict[str, Any] = {"loss": loss, "reduction": reduction}
    lean = _lean.inter_layer_loss(features, stage_pairs(3), **settings)
    assert_equal_with_gradients(lean, inter_layer_loss(features, stage_pairs(3), **settings), features)


@LAYOUTS
@pytest.mark.usefixtures("double_precision")
def test_ickd_of_many_channels_on_small_maps_equals_the_plain_one(layout: torch.memory_format) -> None:
    features = stages([(3, 40, 2, 3), (3, 70, 2, 2), (3, 140, 1, 1)], layout)
    features[0].data[:, 7] = 0  # a dead channel has no direction
    lean = _lean.inter_layer_loss(features, stage_pairs(3), loss="ickd")
    torch.testing.assert_close(lean, inter_layer_loss(features, stage_pairs(3), loss="ickd"), rtol=1e-12, atol=0)
    features = stages([(3, 40, 2, 3), (3, 140, 1, 1)], layout)
    plain = inter_layer_loss(features, [(0, 1)], loss="ickd")
    assert_equal_with_gradients(_lean.inter_layer_loss(features, [(0, 1)], loss="ickd"), plain, features)
    teachers = [pair_channels(torch.randn(feature.shape[1])) for feature in features]
    lean = _lean.intra_layer_loss(features, teachers, ratio=0.5, loss="ickd")
    assert_equal_with_gradients(lean, intra_layer_loss(features, teachers, loss="ickd"), features)


@pytest.mark.parametrize(
    ("reductions", "sizes"),
    [((1, 2, 4), range(17, 64)), ((4, 8, 16, 32), range(160, 257, 8)), ((4, 8, 16, 32), range(161, 257, 16))],
    ids=["CIFAR networks", "ImageNet networks", "ImageNet networks at odd sizes"],
)
@pytest.mark.usefixtures("double_precision")
def test_at_every_size_all_pairs_are_pooled_at_once_or_as_if(reductions: tuple[int, ...], sizes: range) -> None:
    for size in sizes:
        features = stages([(1, 2, s, s) for s in sides(size, reductions)])
        pairs = stage_pairs(len(features))
        oracle = torch.stack([
            F.mse_loss(F.adaptive_avg_pool2d(features[i], features[j].shape[2:]), features[j].detach())
            for i, j in pairs
        ]).mean()  # fmt: skip
        assert_equal_with_gradients(_lean.inter_layer_loss(features, pairs), oracle, features)


@pytest.mark.parametrize("which", ["first", "salient", "group_mean"])
@pytest.mark.parametrize("shapes", [[(2, 8, 8, 8), (2, 3, 4, 4), (2, 5, 2, 2)], [(2, 3, 3, 3), (2, 8, 6, 6)]])
@pytest.mark.usefixtures("double_precision")
def test_the_lean_inter_loss_takes_any_deep_channels_and_any_shapes(which: Any, shapes: list[tuple[int, ...]]) -> None:
    features = stages(shapes)
    saliences = [torch.randn(feature.shape[1]) for feature in features]
    settings: dict[str, Any] = {"deep_channels": which, "saliences": saliences}
    pairs = stage_pairs(len(features))
    lean = _lean.inter_layer_loss(features, pairs, **settings)
    assert_equal_with_gradients(lean, inter_layer_loss(features, pairs, **settings), features)


@LAYOUTS
@TILES
@pytest.mark.parametrize("detach", [True, False], ids=["detached", "two-way"])
@pytest.mark.parametrize(("loss", "which"), [("l2", "first"), ("l2", "group_mean"), ("at", "first")])
def test_losses_of_half_precision_take_differences_before_they_round(
    loss: Any, which: Any, detach: bool, tiles: bool, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_lean, "HAS_TILES", tiles)
    shapes: list[tuple[int, ...]] = [(5, 8, 8, 8), (5, 70, 4, 4), (5, 80, 4, 4), (5, 6, 3, 3)]
    monkeypatch.setattr(_lean, "CHUNK", 2 * 8 * 8 * 8)  # batches of five are taken in several chunks
    # Far from zero and close to each other: rounded first, differences of 0.05 would be off by 0.008.
    half = [(3 + 0.05 * feature.detach()).bfloat16().requires_grad_() for feature in stages(shapes, layout)]
    exact = [feature.detach().double().requires_grad_() for feature in half]
    teachers = [pair_channels(torch.randn(feature.shape[1])) for feature in half]
    results = []
    for features, intra, inter in (
        (half, partial(_lean.intra_layer_loss, ratio=0.5), _lean.inter_layer_loss),
        (exact, intra_layer_loss, inter_layer_loss),
    ):
        within = intra(features, teachers, loss=loss, detach_salient=detach)
        between = inter(features, stage_pairs(4), loss=loss, deep_channels=which)
        for value in (within, between):
            assert value.dtype == torch.float32
            gradients = torch.autograd.grad(value, features, materialize_grads=True)
            results.append((value, torch.cat([gradient.double().flatten() for gradient in gradients])))
    for (mine, gradient), (theirs, exact_gradient) in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=0)
        assert (gradient - exact_gradient).norm() < 0.004 * exact_gradient.norm()  # half of the last of eight bits


def test_one_salient_channel_of_the_most_that_products_mix_keeps_its_small_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_lean, "HAS_TILES", True)
    channels = _lean.FEW_FOR_TILES
    half = (3 + 0.05 * torch.randn(2, channels, 4, 4)).bfloat16().contiguous(memory_format=torch.channels_last)
    exact = half.double()
    teachers = [pair_channels(torch.randn(channels), ratio=1 / channels)]
    gradients = []
    for feature, loss in ((half, partial(_lean.intra_layer_loss, ratio=1 / channels)), (exact, intra_layer_loss)):
        value = loss([feature.requires_grad_()], teachers, detach_salient=False)
        gradients.append(torch.autograd.grad(value, feature)[0].double())
    # It is the sum of 255 differences, for which the matrix has a 255: a whole number that bf16 must hold.
    assert (gradients[0] - gradients[1]).norm() < 0.004 * gradients[1].norm()


@pytest.mark.parametrize(("name", "size"), [("tffd_resnet20", 30), ("tffd_vgg8", 28), ("tffd_resnet18", 176)])
def test_a_task_has_the_parameter_gradients_of_the_plain_loss_where_sizes_do_not_nest(name: str, size: int) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    images, targets = torch.randn(2, 3, size, size), torch.tensor([1, 2])
    parameters = list(model.parameters())
    config = replace(CANONICAL, lambda_intra=0.0, warmup_fraction=0.0)
    lean = torch.autograd.grad(TfFDTask(model, config)(images, targets)["loss"], parameters)

    final, features = model.forward_intermediates(images, indices=list(find_stages(model).indices))
    loss = F.cross_entropy(model.forward_head(final), targets)
    plain = torch.autograd.grad(
        loss + config.lambda_inter * inter_layer_loss(features, stage_pairs(len(features))), parameters
    )
    error = torch.cat([(a - b).flatten() for a, b in zip(lean, plain, strict=True)]).norm()
    assert error < 1e-4 * torch.cat([b.flatten() for b in plain]).norm()


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_features_gradient_comes_back_in_its_own_layout_and_type(
    dtype: torch.dtype, layout: torch.memory_format
) -> None:
    feature = torch.randn(2, 3, 4, 5, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    weights = torch.randn(2, 3, 4, 5)
    (copy,) = _lean.in_float32([feature])
    assert copy.dtype == torch.float32
    other = torch.channels_last if layout == torch.contiguous_format else torch.contiguous_format
    (gradient,) = torch.autograd.grad((copy.contiguous(memory_format=other) * weights).sum(), feature)
    assert (gradient.dtype, gradient.stride()) == (dtype, feature.stride())
    assert torch.equal(gradient, weights.to(dtype))


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@TILES
@pytest.mark.parametrize("loss", ["l2", "at"])
def test_the_losses_compile_to_one_graph_and_equal_the_eager_ones(
    loss: Any, tiles: bool, dtype: torch.dtype, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_lean, "HAS_TILES", tiles)
    torch.compiler.reset()  # every case compiles the same function
    torch.manual_seed(2)
    features = [torch.randn(2, *shape).to(dtype, memory_format=layout) for shape in ((6, 8, 8), (9, 4, 4))]
    saliences = [torch.randn(6), torch.randn(9)]

    def both(shallow: Tensor, deep: Tensor) -> Tensor:
        pair, teachers = [shallow, deep], [pair_channels(s) for s in saliences]
        within = _lean.intra_layer_loss(pair, teachers, ratio=0.5, loss=loss)
        return within + _lean.inter_layer_loss(pair, [(0, 1)], loss=loss)

    results = []
    for function in (both, torch.compile(both, backend="aot_eager", fullgraph=True)):
        inputs = [feature.clone().requires_grad_() for feature in features]
        value = function(*inputs)
        results.append((value, *torch.autograd.grad(value, inputs)))
    for eager, compiled in zip(*results, strict=True):
        rounding = 2 * torch.finfo(dtype).eps * eager.abs().max().item()
        torch.testing.assert_close(compiled, eager, rtol=0, atol=rounding)


@pytest.mark.parametrize("loss", ["at", "sp", "ickd", "ab"])
def test_other_feature_losses_compare_the_same_channel_pairs(loss: str) -> None:
    torch.manual_seed(3)
    feature = torch.randn(4, 6, 5, 5, requires_grad=True)
    salience = torch.tensor([3.0, 9.0, 1.0, 8.0, 7.0, 2.0])  # salient 1, 3, 4; redundant 0, 5, 2
    mine = intra_layer_loss([feature], [pair_channels(salience)], loss=loss)  # type: ignore[arg-type]
    # The order among the redundant channels is free, the pairs are not: 0-1, 5-3, 2-4.
    expected = FEATURE_LOSSES[loss](feature[:, [0, 2, 5]], feature[:, [1, 4, 3]].detach())  # type: ignore[index]
    torch.testing.assert_close(mine, expected)


def test_stage_pairs_are_all_or_neighbours() -> None:
    assert stage_pairs(3) == ((0, 1), (0, 2), (1, 2))
    assert stage_pairs(4, "neighbours") == ((0, 1), (1, 2), (2, 3))
    with pytest.raises(ValueError, match="choose 'all' or 'neighbours'"):
        stage_pairs(3, "every")  # type: ignore[arg-type]


def test_inter_layer_loss_by_hand() -> None:
    # Shallow: one 2x2 map of mean 2.5, pooled to the deep 1x1 map that holds 4 (its second channel is left out).
    shallow = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]], requires_grad=True)
    deep = torch.tensor([[[[4.0]], [[9.0]]]], requires_grad=True)
    loss = inter_layer_loss([shallow, deep], [(0, 1)])
    assert loss.item() == (2.5 - 4) ** 2
    loss.backward()
    assert shallow.grad is not None
    assert shallow.grad.flatten().tolist() == [2 * -1.5 / 4] * 4
    assert deep.grad is None, "the deep stage is a fixed target"


def test_a_larger_deep_map_is_pooled_instead_and_odd_sizes_work() -> None:
    torch.manual_seed(5)
    shallow, deep = torch.randn(2, 5, 3, 3), torch.randn(2, 4, 7, 7)
    expected = F.mse_loss(shallow[:, :4], F.adaptive_avg_pool2d(deep, (3, 3)))
    torch.testing.assert_close(inter_layer_loss([shallow, deep], [(0, 1)]), expected)


def test_deep_channels_may_be_the_salient_ones_or_group_means() -> None:
    shallow = torch.zeros(1, 2, 1, 1)
    deep = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 4, 1, 1)
    saliences = [torch.zeros(2), torch.tensor([0.1, 0.4, 0.2, 0.3])]
    features = [shallow, deep]
    assert inter_layer_loss(features, [(0, 1)]).item() == pytest.approx((1 + 4) / 2)
    salient = inter_layer_loss(features, [(0, 1)], deep_channels="salient", saliences=saliences)
    assert salient.item() == pytest.approx((4 + 16) / 2)  # channels 1 and 3
    means = inter_layer_loss(features, [(0, 1)], deep_channels="group_mean")
    assert means.item() == pytest.approx((1.5**2 + 3.5**2) / 2)


def test_impossible_settings_are_refused() -> None:
    features = [torch.randn(2, 4, 2, 2)] * 2
    with pytest.raises(ValueError, match="at least one pair"):
        inter_layer_loss(features, [])
    with pytest.raises(ValueError, match="l2 feature loss only"):
        inter_layer_loss(features, [(0, 1)], loss="at", reduction="sum")
    with pytest.raises(ValueError, match="needs the saliences"):
        inter_layer_loss(features, [(0, 1)], deep_channels="salient")
    with pytest.raises(ValueError, match="salient ratio is 0"):
        pair_channels(torch.ones(4), 0.0)
