"""The architectures: their sizes, what they compute, and timm's model contract, held against timm's own ResNet-18."""

from __future__ import annotations

import inspect
import math

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models.resnet import ResNet
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import tffd_zoo  # noqa: F401 (registers the models)

FAMILIES = ["tffd_resnet8x4", "tffd_wrn16_2", "tffd_vgg8", "tffd_resnet18"]
CIFAR_FAMILIES = FAMILIES[:3]


class Count:
    """Parameters and multiply-adds of one network, layer by layer."""

    def __init__(self) -> None:
        self.parameters = 0
        self.multiply_adds = 0

    def conv(self, inputs: int, outputs: int, kernel: int, side: int, bias: bool = False) -> None:
        """A convolution whose output is `side` x `side`."""
        weights = inputs * outputs * kernel * kernel
        self.parameters += weights + (outputs if bias else 0)
        self.multiply_adds += weights * side * side

    def norm(self, channels: int) -> None:
        """A BatchNorm's scale and shift."""
        self.parameters += 2 * channels

    def linear(self, inputs: int, outputs: int) -> None:
        """A linear layer with bias."""
        self.parameters += inputs * outputs + outputs
        self.multiply_adds += inputs * outputs


def resnet(depth: int, stem: int, widths: tuple[int, ...]) -> Count:
    count = Count()
    count.conv(3, stem, 3, 32)
    count.norm(stem)
    inputs = stem
    for stage, width in enumerate(widths):
        side = 32 // 2**stage
        for _ in range((depth - 2) // 6):
            count.conv(inputs, width, 3, side)
            count.norm(width)
            count.conv(width, width, 3, side)
            count.norm(width)
            if inputs != width:
                count.conv(inputs, width, 1, side)
                count.norm(width)
            inputs = width
    count.linear(inputs, 100)
    return count


def wide_resnet(depth: int, factor: int) -> Count:
    count = Count()
    count.conv(3, 16, 3, 32)
    inputs = 16
    for stage in range(3):
        width, side = 16 * factor * 2**stage, 32 // 2**stage
        for _ in range((depth - 4) // 6):
            count.norm(inputs)
            count.conv(inputs, width, 3, side)
            count.norm(width)
            count.conv(width, width, 3, side)
            if inputs != width:
                count.conv(inputs, width, 1, side)
            inputs = width
    count.norm(inputs)
    count.linear(inputs, 100)
    return count


def vgg(convolutions_per_stage: tuple[int, ...]) -> Count:
    count = Count()
    inputs = 3
    for number, width, side in zip(convolutions_per_stage, (64, 128, 256, 512, 512), (32, 16, 8, 4, 4), strict=True):
        for _ in range(number):
            count.conv(inputs, width, 3, side, bias=True)
            count.norm(width)
            inputs = width
    count.linear(inputs, 100)
    return count


@pytest.mark.parametrize(
    ("name", "by_hand", "published_millions"),
    [
        ("tffd_resnet20", resnet(20, 16, (16, 32, 64)), 0.28),
        ("tffd_resnet32", resnet(32, 16, (16, 32, 64)), 0.47),
        ("tffd_resnet44", resnet(44, 16, (16, 32, 64)), 0.67),
        ("tffd_resnet56", resnet(56, 16, (16, 32, 64)), 0.86),
        ("tffd_resnet110", resnet(110, 16, (16, 32, 64)), 1.74),
        ("tffd_resnet8x4", resnet(8, 32, (64, 128, 256)), 1.23),
        ("tffd_resnet32x4", resnet(32, 32, (64, 128, 256)), 7.43),
        ("tffd_wrn16_2", wide_resnet(16, 2), 0.70),
        ("tffd_wrn40_1", wide_resnet(40, 1), 0.57),
        ("tffd_wrn40_2", wide_resnet(40, 2), 2.26),
        ("tffd_vgg8", vgg((1, 1, 1, 1, 1)), 3.97),
        ("tffd_vgg13", vgg((2, 2, 2, 2, 2)), 9.46),
    ],
)
def test_parameters_and_multiply_adds_are_those_worked_out_by_hand_and_published(
    name: str, by_hand: Count, published_millions: float
) -> None:
    model = timm.create_model(name, device="meta").eval()
    with FlopCounterMode(display=False) as counter:
        logits = model(torch.empty(1, 3, 32, 32, device="meta"))
    assert logits.shape == (1, 100)
    assert sum(parameter.numel() for parameter in model.parameters()) == by_hand.parameters
    assert counter.get_total_flops() == 2 * by_hand.multiply_adds
    assert round(by_hand.parameters / 1e6, 2) == published_millions


def test_the_arithmetic_gives_resnet20s_numbers_step_by_step() -> None:
    stem = 3 * 16 * 9 + 2 * 16
    stage1 = 6 * (16 * 16 * 9 + 2 * 16)
    stage2 = (16 * 32 * 9 + 2 * 32) + 5 * (32 * 32 * 9 + 2 * 32) + (16 * 32 + 2 * 32)
    stage3 = (32 * 64 * 9 + 2 * 64) + 5 * (64 * 64 * 9 + 2 * 64) + (32 * 64 + 2 * 64)
    assert stem + stage1 + stage2 + stage3 + 64 * 100 + 100 == 278_324
    assert resnet(20, 16, (16, 32, 64)).parameters == 278_324
    assert vgg((1, 1, 1, 1, 1)).parameters == 3_965_028


def batch_norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    scale, shift = state[f"{name}.weight"], state[f"{name}.bias"]
    x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
    return x * scale[:, None, None] + shift[:, None, None]


def with_random_norms(name: str) -> nn.Module:
    """A model in evaluation mode whose norms all do something."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
    return model


def test_a_resnet_computes_what_the_paper_says() -> None:
    model = with_random_norms("tffd_resnet20")
    state = model.state_dict()
    images = torch.randn(2, 3, 32, 32)
    x = F.relu(batch_norm(F.conv2d(images, state["stem.conv.weight"], padding=1), state, "stem.bn"))
    for stage in range(3):
        for block in range(3):
            name = f"stages.{stage}.{block}"
            stride = 2 if stage > 0 and block == 0 else 1
            residual = F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            residual = F.relu(batch_norm(residual, state, f"{name}.bn1"))
            residual = batch_norm(F.conv2d(residual, state[f"{name}.conv2.weight"], padding=1), state, f"{name}.bn2")
            if stride == 2:
                x = F.conv2d(x, state[f"{name}.downsample.0.weight"], stride=2)
                x = batch_norm(x, state, f"{name}.downsample.1")
            x = F.relu(x + residual)
    logits = F.linear(x.mean((2, 3)), state["head.fc.weight"], state["head.fc.bias"])
    torch.testing.assert_close(model(images), logits)


def test_a_wide_resnet_activates_before_its_convolutions_and_before_its_projections() -> None:
    model = with_random_norms("tffd_wrn16_2")
    state = model.state_dict()
    images = torch.randn(2, 3, 32, 32)
    x = F.conv2d(images, state["stem.weight"], padding=1)
    for stage in range(3):
        for block in range(2):
            name = f"stages.{stage}.{block}"
            stride = 2 if stage > 0 and block == 0 else 1
            active = F.relu(batch_norm(x, state, f"{name}.norm1"))
            residual = F.conv2d(active, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            residual = F.conv2d(
                F.relu(batch_norm(residual, state, f"{name}.norm2")), state[f"{name}.conv2.weight"], padding=1
            )
            if block == 0:
                x = F.conv2d(active, state[f"{name}.downsample.conv.weight"], stride=stride)
            x = x + residual
    x = F.relu(batch_norm(x, state, "norm"))
    logits = F.linear(x.mean((2, 3)), state["head.fc.weight"], state["head.fc.bias"])
    torch.testing.assert_close(model(images), logits)


def test_a_vgg_pools_between_its_first_four_stages() -> None:
    model = with_random_norms("tffd_vgg8")
    state = model.state_dict()
    images = torch.randn(2, 3, 32, 32)
    x = images
    for stage, block in enumerate((0, 1, 1, 1, 0)):
        name = f"stages.{stage}.{block}"
        if block == 1:
            x = F.max_pool2d(x, 2)
        x = F.conv2d(x, state[f"{name}.conv.weight"], state[f"{name}.conv.bias"], padding=1)
        x = F.relu(batch_norm(x, state, f"{name}.bn"))
    logits = F.linear(x.mean((2, 3)), state["head.fc.weight"], state["head.fc.bias"])
    torch.testing.assert_close(model(images), logits)


@pytest.mark.parametrize("name", CIFAR_FAMILIES)
def test_convolutions_start_with_he_initialisation_and_residual_branches_are_not_silenced(name: str) -> None:
    model = timm.create_model(name)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.weight.numel() > 30_000]
    assert convolutions
    for conv in convolutions:
        fan_out = conv.out_channels * math.prod(conv.kernel_size)
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.03)
    assert all((m.weight == 1).all() for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_classifiers_start_as_crds_do() -> None:
    vgg_head = timm.create_model("tffd_vgg8").get_classifier()
    assert vgg_head.weight.std().item() == pytest.approx(0.01, rel=0.03)
    assert not vgg_head.bias.any()
    assert not timm.create_model("tffd_wrn16_2").get_classifier().bias.any()


@pytest.mark.parametrize("name", ["tffd_resnet18", "tffd_resnet34", "tffd_resnet50"])
def test_imagenet_resnets_are_timms_own_with_interchangeable_state_dicts(name: str) -> None:
    ours, theirs = timm.create_model(name).eval(), timm.create_model(name.removeprefix("tffd_")).eval()
    assert type(ours) is ResNet
    assert ours.num_classes == 1000
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(ours(images), theirs(images))
    theirs.load_state_dict(ours.state_dict())


def test_every_architecture_is_listed_in_a_module_of_its_own() -> None:
    assert timm.list_models(module="tffd_cifar_resnet", include_tags=False) == [
        *("tffd_resnet8x4", "tffd_resnet20", "tffd_resnet32", "tffd_resnet32x4"),
        *("tffd_resnet44", "tffd_resnet56", "tffd_resnet110"),
    ]
    assert timm.list_models(module="tffd_cifar_wrn", include_tags=False) == [
        "tffd_wrn16_2",
        "tffd_wrn40_1",
        "tffd_wrn40_2",
    ]
    assert timm.list_models(module="tffd_cifar_vgg", include_tags=False) == ["tffd_vgg8", "tffd_vgg13"]
    assert timm.list_models(module="tffd_imagenet", include_tags=False) == [
        "tffd_resnet18",
        "tffd_resnet34",
        "tffd_resnet50",
    ]
    assert not [name for name in timm.list_models(module="resnet") if name.startswith("tffd_")]


def test_a_model_of_ours_knows_how_cifar_images_are_prepared() -> None:
    config = resolve_model_data_config(timm.create_model("tffd_resnet20"))
    assert config["input_size"] == (3, 32, 32)
    assert config["mean"] == (0.5071, 0.4867, 0.4408)
    assert config["std"] == (0.2675, 0.2565, 0.2761)
    assert config["crop_pct"] == 1.0


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_a_model_has_every_method_and_attribute_of_timms_resnet(model: nn.Module) -> None:
    reference = timm.create_model("resnet18", num_classes=10)
    methods = [
        *("forward", "forward_features", "forward_head", "forward_intermediates", "prune_intermediate_layers"),
        *("get_classifier", "reset_classifier", "group_matcher", "set_grad_checkpointing", "init_weights"),
    ]
    for method in methods:
        expected = set(inspect.signature(getattr(reference, method)).parameters) - {"name_only", "zero_init_last"}
        assert expected <= set(inspect.signature(getattr(model, method)).parameters), method
    attributes = ["num_classes", "in_chans", "num_features", "head_hidden_size", "feature_info", "grad_checkpointing"]
    for attribute in [*attributes, "drop_rate", "pretrained_cfg", "default_cfg"]:
        assert type(getattr(model, attribute)) is type(getattr(reference, attribute)), attribute


def test_forward_is_features_then_head(model: nn.Module, images: Tensor) -> None:
    features = model.forward_features(images)
    assert features.shape[1] == model.num_features
    assert torch.equal(model.forward_head(features), model(images))
    hidden = model.forward_head(features, pre_logits=True)
    assert hidden.shape == (2, model.head_hidden_size)
    assert torch.equal(model.get_classifier()(hidden), model(images))


def test_intermediates_are_the_feature_info_and_end_in_forward_features(model: nn.Module, images: Tensor) -> None:
    final, maps = model.forward_intermediates(images)
    assert torch.equal(final, model.forward_features(images))
    assert [m.shape[1] for m in maps] == [info["num_chs"] for info in model.feature_info]
    assert [32 // m.shape[2] for m in maps] == [info["reduction"] for info in model.feature_info]

    last = len(maps) - 1
    normed = model.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
    assert torch.equal(normed[0], final)
    assert all(map(torch.equal, maps[1:3], model.forward_intermediates(images, [1, 2], intermediates_only=True)))
    some = model.forward_intermediates(images, [-1, 0], stop_early=True)
    assert torch.equal(some[0], final)
    assert torch.equal(some[1][1], maps[last])

    reached, early = model.forward_intermediates(images, [0, 1], stop_early=True)
    assert torch.equal(reached, maps[1])
    assert all(map(torch.equal, maps, early))


def test_intermediates_of_residual_networks_start_with_the_stem(images: Tensor) -> None:
    model = timm.create_model("tffd_resnet8x4").eval()
    _, maps = model.forward_intermediates(images)
    assert torch.equal(maps[0], model.stem(images))
    assert torch.equal(maps[1], model.stages[0](maps[0]))
    assert len(maps) == 4


@pytest.mark.parametrize("feature_cls", [None, "getter", "hook"])
def test_features_only_gives_the_intermediates(name: str, images: Tensor, feature_cls: str | None) -> None:
    torch.manual_seed(0)
    expected = timm.create_model(name).eval().forward_intermediates(images, [1, 3], intermediates_only=True)
    torch.manual_seed(0)
    extractor = timm.create_model(name, features_only=True, out_indices=(1, 3), feature_cls=feature_cls).eval()
    maps = extractor(images)
    assert len(maps) == 2
    for got, want in zip(maps, expected, strict=True):
        torch.testing.assert_close(got, want)
    assert extractor.feature_info.channels() == [m.shape[1] for m in expected]


def test_features_only_gives_every_map_by_default(model: nn.Module, name: str, images: Tensor) -> None:
    extractor = timm.create_model(name, features_only=True).eval()
    assert extractor.feature_info.channels() == [info["num_chs"] for info in model.feature_info]
    assert len(extractor(images)) == len(model.feature_info)


def test_the_classifier_can_be_replaced_removed_and_pooled_otherwise(model: nn.Module, images: Tensor) -> None:
    model.reset_classifier(7)
    assert model.num_classes == 7
    assert model.get_classifier().out_features == 7
    assert model(images).shape == (2, 7)
    model.reset_classifier(7, "catavgmax")
    assert model.head_hidden_size == 2 * model.num_features
    assert model(images).shape == (2, 7)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(images).shape == (2, model.head_hidden_size)
    model.reset_classifier(0, "")
    assert torch.equal(model(images), model.forward_features(images))


def gradients(model: nn.Module, images: Tensor, intermediates: bool) -> dict[str, Tensor]:
    model.zero_grad()
    logits = model.forward_head(model.forward_intermediates(images)[0]) if intermediates else model(images)
    F.cross_entropy(logits, torch.tensor([1, 2])).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("intermediates", [False, True])
def test_gradient_checkpointing_changes_no_gradient(model: nn.Module, images: Tensor, intermediates: bool) -> None:
    model.train()
    plain = gradients(model, images, intermediates)
    model.set_grad_checkpointing()
    checkpointed = gradients(model, images, intermediates)
    assert plain.keys() == checkpointed.keys()
    for key, gradient in plain.items():
        torch.testing.assert_close(checkpointed[key], gradient)


@pytest.mark.parametrize("intermediates", [False, True])
def test_gradient_checkpointing_recomputes_the_blocks(model: nn.Module, images: Tensor, intermediates: bool) -> None:
    model.train()
    model.set_grad_checkpointing()
    calls = []
    convolution = [m for m in model.modules() if isinstance(m, nn.Conv2d)][-1]
    convolution.register_forward_pre_hook(lambda *_: calls.append(1))
    gradients(model, images, intermediates)
    assert len(calls) == 2


@pytest.mark.parametrize("prune_head", [False, True])
def test_pruning_keeps_the_maps_asked_for_and_drops_what_follows(name: str, images: Tensor, prune_head: bool) -> None:
    model = timm.create_model(name).eval()
    _, maps = model.forward_intermediates(images)
    before = sum(p.numel() for p in model.parameters())
    assert model.prune_intermediate_layers([1, 2], prune_head=prune_head) == [1, 2]
    pruned = model.forward_intermediates(images, [1, 2], intermediates_only=True)
    assert all(map(torch.equal, maps[1:3], pruned))
    assert sum(p.numel() for p in model.parameters()) < before / 2
    assert model.num_features == model.head_hidden_size == maps[2].shape[1]
    assert model.num_classes == 0
    assert torch.equal(model(images), maps[2])


def test_pruning_to_the_last_map_can_keep_the_head(name: str, images: Tensor) -> None:
    model = timm.create_model(name).eval()
    logits = model(images)
    model.prune_intermediate_layers(1, prune_head=False)
    assert torch.equal(model(images), logits)


def test_layer_decay_grows_from_stem_to_head(model: nn.Module) -> None:
    groups = param_groups_layer_decay(model, layer_decay=0.5, no_weight_decay_list=[])
    scale = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    scales = {name: scale[id(parameter)] for name, parameter in model.named_parameters()}
    in_order = [scales[name] for name in scales]
    assert in_order == sorted(in_order)
    assert in_order[-1] == 1.0
    assert len(set(in_order)) >= 5
    closing_norm = [scales[key] for key in scales if key.startswith("norm.")]
    assert set(closing_norm) <= {in_order[-len(closing_norm) - 3]}, "the closing norm belongs to the last block"
    grouped = model.group_matcher(coarse=True)
    assert set(grouped) == {"stem", "blocks"}


def test_an_unknown_argument_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match="depht"):
        timm.create_model(name, depht=3)


def test_device_and_dtype_reach_every_tensor(name: str) -> None:
    model = timm.create_model(name, device="meta", dtype=torch.bfloat16)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.reset_classifier(0)
    model.reset_classifier(5)
    assert model.get_classifier().weight.device.type == "meta"
    assert model.get_classifier().weight.dtype == torch.bfloat16


def test_head_and_regularisation_arguments_take_effect(name: str) -> None:
    model = timm.create_model(name, num_classes=5, in_chans=1, global_pool="max", drop_rate=0.25, act_layer="gelu")
    assert model.num_classes == 5
    assert model.in_chans == 1
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 5)
    pool = model.head.global_pool if hasattr(model, "head") else model.global_pool
    assert pool.pool_type == "max"
    assert model.drop_rate == 0.25
    assert {type(m).__name__ for m in model.modules()} & {"GELU", "ReLU"} == {"GELU"}


@pytest.mark.parametrize("name", ["tffd_resnet20", "tffd_wrn16_2"])
def test_an_output_stride_of_two_dilates_the_last_stage(name: str, images: Tensor) -> None:
    model = timm.create_model(name, output_stride=2).eval()
    assert [info["reduction"] for info in model.feature_info] == [1, 1, 2, 2]
    assert model.forward_features(images).shape[2:] == (16, 16)
    dilations = [conv.dilation[0] for block in model.stages[2] for conv in (block.conv1, block.conv2)]
    assert dilations == [1] + [2] * (len(dilations) - 1)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in timm.create_model(name).parameters())
    with pytest.raises(ValueError, match="output_stride=3"):
        timm.create_model(name, output_stride=3)


@pytest.mark.parametrize("name", ["tffd_resnet20", "tffd_wrn16_2"])
def test_stochastic_depth_grows_linearly_from_block_to_block(name: str) -> None:
    model = timm.create_model(name, drop_path_rate=0.2)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage]
    assert rates == pytest.approx([0.2 * index / (len(rates) - 1) for index in range(len(rates))])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", CIFAR_FAMILIES)
def test_a_scripted_model_gives_the_same_logits(model: nn.Module, images: Tensor) -> None:
    torch.testing.assert_close(torch.jit.script(model)(images), model(images))
