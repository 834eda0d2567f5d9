"""Convolutions of small maps, sped up, are the same convolutions: for fewer multiplications, or as one product."""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.library import opcheck
from torch.nn.functional import conv2d
from torch.utils.flop_counter import FlopCounterMode

from recipes.train_cifar100 import QUICKSTART
from tffd_zoo import small_maps
from tffd_zoo.data import open_source
from tffd_zoo.recipe import DataConfig, OptimConfig, Recipe, RunConfig, vary
from tffd_zoo.small_maps import Geometry, SmallMapConv2d, convolve_as_product, met_taps, speed_up_small_maps
from tffd_zoo.tasks import TeacherConfig
from tffd_zoo.training import train
from tffd_zoo.training.build import image_spec, make_network, make_task


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


def kernels_given_to(function: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the kernels that a function of the module is called with, as they come."""
    kernels: list[tuple[int, ...]] = []
    usual = getattr(small_maps, function)

    def watched(input: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        kernels.append(tuple(weight.shape))
        return usual(input, weight, *rest)

    monkeypatch.setattr(small_maps, function, watched)
    return kernels


def every_convolution_is_a_product(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the kernels that are multiplied so, as they come."""
    monkeypatch.setattr(small_maps, "WEIGHTS", 0)
    monkeypatch.setattr(small_maps, "POSITIONS", 10_000)
    return kernels_given_to("convolve_as_product", monkeypatch)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("as_product", [False, True])
def test_outputs_and_gradients_are_those_of_the_whole_kernel(
    groups: int, as_product: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    products = every_convolution_is_a_product(monkeypatch) if as_product else []
    sliced = 0
    for size, kernel, stride, padding, dilation in SHAPES:
        # Unlike sides: what goes wrong on one of them is not made up for by the other.
        whole = nn.Conv2d(4, 6, (kernel, 2), (stride, 1), (padding, 0), (dilation, 1), groups).double()
        part = copy.deepcopy(whole)
        speed_up_small_maps(part)
        images = torch.randn(2, 4, size, 4, dtype=torch.float64, requires_grad=True)
        outputs, expected = part(images), whole(images)
        torch.testing.assert_close(outputs, expected)
        weights = torch.randn_like(expected)
        wanted = torch.autograd.grad((expected * weights).sum(), [images, *whole.parameters()])
        torch.testing.assert_close(torch.autograd.grad((outputs * weights).sum(), [images, *part.parameters()]), wanted)
        sliced += len(met_taps(size, kernel, stride, padding, dilation)[0]) < kernel
    assert sliced > 50, "else the cases prove nothing"
    assert len(products) == (len(SHAPES) if as_product and groups == 1 else 0)


def test_a_convolution_as_product_in_bf16_rounds_as_the_usual_one_but_for_its_inputs_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    usual = nn.Conv2d(64, 32, 3, padding=1).to(memory_format=torch.channels_last)
    images, weights = torch.randn(8, 64, 3, 3, requires_grad=True), torch.randn(8, 32, 3, 3)

    def gradients(convolution: nn.Conv2d, reduced: bool) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=reduced):
            outputs = convolution(images)
        assert outputs.dtype == (torch.bfloat16 if reduced else torch.float32)
        found = torch.autograd.grad((outputs * weights).sum(), [images, *convolution.parameters()])
        assert all(gradient.dtype == torch.float32 for gradient in found)
        return [outputs.detach(), *found]

    def errors(reduced: list[Tensor]) -> list[float]:
        return [float((value - exact).norm() / exact.norm()) for value, exact in zip(reduced, exactly, strict=True)]

    exactly, usually = gradients(usual, False), gradients(usual, True)
    sped_up = copy.deepcopy(usual)
    speed_up_small_maps(sped_up)
    kernels = every_convolution_is_a_product(monkeypatch)
    output, of_images, *of_parameters = errors(gradients(sped_up, True))
    usual_output, usual_of_images, *usual_of_parameters = errors(usually)
    assert output < 1.05 * usual_output
    assert of_images < 1.25 * usual_of_images
    assert all(error < 1.05 * usual for error, usual in zip(of_parameters, usual_of_parameters, strict=True))
    assert kernels == [(32, 64, 3, 3)]


def test_a_convolution_as_product_keeps_its_input_and_its_weights_and_no_ninefold_copy() -> None:
    inputs, weight = torch.randn(4, 8, 4, 4, requires_grad=True), torch.randn(16, 8, 3, 3, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda it: it):
        convolve_as_product(inputs, weight, None, Geometry((1, 1), (1, 1), (1, 1)))
    assert sorted(kept) == sorted([inputs.numel(), weight.numel()])


def test_a_frozen_kernel_and_an_image_take_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = every_convolution_is_a_product(monkeypatch)
    convolution = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    speed_up_small_maps(convolution)
    images = torch.randn(2, 3, 2, 2)
    convolution(images).sum().backward()
    assert images.grad is None
    assert convolution.weight.grad is not None
    convolution.weight.grad = None
    convolution.requires_grad_(False)
    convolution(images.requires_grad_()).sum().backward()
    assert images.grad is not None
    assert convolution.weight.grad is None
    assert len(kernels) == 2


def test_a_compiled_convolution_as_product_is_one_graph_of_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    every_convolution_is_a_product(monkeypatch)
    eager = nn.Conv2d(3, 4, 3, stride=2, padding=1)
    speed_up_small_maps(eager)
    compiled = torch.compile(copy.deepcopy(eager), backend="aot_eager", fullgraph=True)
    images = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(compiled(images), eager(images))
    compiled(images).sum().backward()
    eager(images).sum().backward()
    torch.testing.assert_close(compiled.weight.grad, eager.weight.grad)


def test_the_two_last_stages_of_a_resnet18_at_64_px_are_products_and_no_large_map_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernels = kernels_given_to("convolve_as_product", monkeypatch)
    model = timm.create_model("tffd_resnet18", num_classes=10).eval()
    images = torch.randn(1, 3, 64, 64)
    expected = model(images)
    speed_up_small_maps(model)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    channels = [(256, 128), *[(256, 256)] * 3, (512, 256), *[(512, 512)] * 3]
    assert kernels == [(*pair, 3, 3) for pair in channels]
    kernels.clear()
    model(torch.zeros(1, 3, 224, 224))
    assert kernels == []


@pytest.mark.parametrize("stride", [1, 2])
def test_the_operators_meet_what_torch_asks_of_operators(stride: int) -> None:
    inputs, weight = torch.randn(2, 3, 5, 4, requires_grad=True), torch.randn(6, 3, 3, 2, requires_grad=True)
    bias, geometry = torch.randn(6, requires_grad=True), ([stride, 1], [1, 0], [1, 2])
    opcheck(torch.ops.tffd_zoo.product.default, (inputs, weight, bias, *geometry))
    opcheck(torch.ops.tffd_zoo.product.default, (inputs, weight.detach(), None, *geometry))
    values = inputs.detach(), weight.detach()
    gradient = torch.randn_like(conv2d(*values, None, *geometry))
    for wanted in ([True, True], [True, False], [False, True]):
        opcheck(torch.ops.tffd_zoo.product_gradients.default, (gradient, *values, *geometry, wanted))


def test_the_last_stage_of_a_resnet18_at_32_px_costs_what_one_of_1x1_kernels_costs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(small_maps, "WEIGHTS", 10**9)  # what is counted is conv2d's
    model = timm.create_model("resnet18", num_classes=10).eval()
    images = torch.zeros(1, 3, 32, 32)
    before = multiplications(model, images)
    speed_up_small_maps(model)
    # Three convolutions of 512 to 512 channels lose 8 of 9 taps; the one of stride 2 from 256, on 2x2, loses 5.
    assert before - multiplications(model, images) == 3 * 8 * 512 * 512 + 5 * 256 * 512


def test_the_names_and_the_copies_of_a_network_stay_what_they_were() -> None:
    model = timm.create_model("resnet18", num_classes=10)
    names = list(model.state_dict())
    speed_up_small_maps(model)
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
    speed_up_small_maps(convolution)
    assert type(convolution) is kind


def test_a_training_run_leaves_them_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = kernels_given_to("conv2d", monkeypatch)
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


@pytest.mark.parametrize("paradigm", ["online", "average"])
def test_a_network_that_teaches_leaves_them_out_as_its_student_does(paradigm: Any) -> None:
    source = open_source("digits", "train")
    teacher = TeacherConfig(paradigm, "tffd_resnet20" if paradigm == "online" else None)
    recipe = vary(QUICKSTART, "test", tffd=None, teacher=teacher)
    model = make_network(recipe, source.label_names)
    speed_up_small_maps(model)
    task: Any = make_task(recipe, model, image_spec(recipe, model), source, batches_per_epoch=1)
    networks = [task.trainable_module.model, task.objectives[0].teacher.network.model]
    kinds = [{type(module) for module in net.modules() if isinstance(module, nn.Conv2d)} for net in networks]
    assert kinds == [{SmallMapConv2d}, {SmallMapConv2d}]
