"""Convolutions that leave out taps which meet padding alone are the same convolutions, for fewer multiplications."""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d
from torch.utils.flop_counter import FlopCounterMode

from tffd_zoo import small_maps
from tffd_zoo.recipe import DataConfig, OptimConfig, Recipe, RunConfig
from tffd_zoo.small_maps import SmallMapConv2d, met_taps, skip_padded_taps
from tffd_zoo.training import train


def multiplications(model: nn.Module, images: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops() // 2


def test_a_3x3_kernel_meets_a_map_of_1x1_with_its_middle_and_one_of_2x2_with_every_tap() -> None:
    assert met_taps(size=1, kernel=3, stride=1, padding=1, dilation=1) == (range(1, 2), 0)
    assert met_taps(size=2, kernel=3, stride=1, padding=1, dilation=1) == (range(3), 1)
    # The one output of a stride of 2 begins in the padding: its first tap meets nothing.
    assert met_taps(size=2, kernel=3, stride=2, padding=1, dilation=1) == (range(1, 3), 0)
    assert met_taps(size=2, kernel=7, stride=1, padding=3, dilation=1) == (range(2, 5), 1)


SHAPES = [
    (size, kernel, stride, padding, dilation)
    for size, kernel, stride, padding, dilation in product(
        (1, 2, 3, 5), (1, 2, 3, 5, 7), (1, 2, 3), (0, 1, 2, 3), (1, 2)
    )
    if size + 2 * padding > dilation * (kernel - 1)
]


@pytest.mark.parametrize("groups", [1, 2])
def test_outputs_and_gradients_are_those_of_the_whole_kernel(groups: int) -> None:
    torch.manual_seed(0)
    sliced = 0
    for size, kernel, stride, padding, dilation in SHAPES:
        # Unlike sides: what goes wrong on one of them is not made up for by the other.
        whole = nn.Conv2d(4, 6, (kernel, 2), (stride, 1), (padding, 0), (dilation, 1), groups).double()
        part = copy.deepcopy(whole)
        skip_padded_taps(part)
        images = torch.randn(2, 4, size, 4, dtype=torch.float64, requires_grad=True)
        outputs, expected = part(images), whole(images)
        torch.testing.assert_close(outputs, expected)
        weights = torch.randn_like(expected)
        wanted = torch.autograd.grad((expected * weights).sum(), [images, *whole.parameters()])
        torch.testing.assert_close(torch.autograd.grad((outputs * weights).sum(), [images, *part.parameters()]), wanted)
        sliced += len(met_taps(size, kernel, stride, padding, dilation)[0]) < kernel
    assert sliced > 50, "else the cases prove nothing"


def test_the_last_stage_of_a_resnet18_at_32_px_costs_what_one_of_1x1_kernels_costs() -> None:
    model = timm.create_model("resnet18", num_classes=10).eval()
    images = torch.zeros(1, 3, 32, 32)
    before = multiplications(model, images)
    skip_padded_taps(model)
    # Three convolutions of 512 to 512 channels lose 8 of 9 taps; the one of stride 2 from 256, on 2x2, loses 5.
    assert before - multiplications(model, images) == 3 * 8 * 512 * 512 + 5 * 256 * 512


def test_the_names_and_the_copies_of_a_network_stay_what_they_were() -> None:
    model = timm.create_model("resnet18", num_classes=10)
    names = list(model.state_dict())
    skip_padded_taps(model)
    assert list(model.state_dict()) == names
    copied = copy.deepcopy(model)
    assert isinstance(copied.conv1, SmallMapConv2d)
    assert repr(copied.conv1).endswith("kernel_size=(7, 7), stride=(2, 2), padding=(3, 3), bias=False)")


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(2, 2, 3, padding="same"),
        timm.layers.Conv2dSame(2, 2, 3),
    ],
)
def test_convolutions_that_pad_in_another_way_are_left_alone(convolution: nn.Conv2d) -> None:
    kind = type(convolution)
    skip_padded_taps(convolution)
    assert type(convolution) is kind


def test_a_training_run_leaves_them_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels: list[tuple[int, ...]] = []

    def watched(input: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        kernels.append(tuple(weight.shape))
        return conv2d(input, weight, *rest)

    monkeypatch.setattr(small_maps, "conv2d", watched)
    data = DataConfig(source="digits", image_size=4)  # 1x1 pixels in the last stage
    train(
        Recipe(
            name="test",
            model="tffd_resnet20",
            data=data,
            optim=OptimConfig(epochs=1, batch_size=128, lr=0.1, weight_decay=0.0),
            run=RunConfig(max_steps=1, output=tmp_path / "run"),
        )
    )
    assert (64, 64, 1, 1) in kernels
