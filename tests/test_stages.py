"""Stages of timm models: one small model of each family, the layers behind its features, and an untouched model."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import timm
import torch
from timm.models.resnet import BasicBlock
from torch import nn

import tffd_zoo  # noqa: F401  (registers the 32x32 architectures)
from tffd_zoo.stages import Stages, find_stages, stage_activations, stage_norms

SIZE = 64

# The smallest of each family, fit to 64 px images, and the entries of its feature_info that are stages.
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "resnet": ("resnet10t", {"zero_init_last": False}, (1, 2, 3, 4)),
    "resnetv2": ("resnetv2_18", {}, (1, 2, 3, 4)),
    "convnext": ("convnext_atto", {}, (0, 1, 2, 3)),
    "efficientnet": ("efficientnet_lite0", {}, (0, 1, 2, 3, 4)),
    "mobilenetv3": ("mobilenetv3_small_050", {}, (1, 2, 3, 4)),
    "mobilenetv4": ("mobilenetv4_conv_small_035", {}, (1, 2, 3, 4)),
    "regnet": ("regnety_002", {"zero_init_last": False}, (1, 2, 3, 4)),
    "densenet": ("densenet121", {}, (1, 2, 3, 4)),
    "vgg_bn": ("vgg11_bn", {"mlp_ratio": 1 / 64}, (1, 2, 3, 4)),
    "vit": ("vit_tiny_patch16_224", {"img_size": SIZE}, (2, 5, 8, 11)),
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": SIZE, "window_size": 2, "embed_dim": 24}, (0, 1, 2, 3)),
    "maxvit": ("maxvit_rmlp_pico_rw_256", {"img_size": SIZE}, (1, 2, 3, 4)),
    "fastvit": ("fastvit_t8", {}, (0, 1, 2, 3)),
    "repvgg": ("repvgg_a0", {}, (1, 2, 3, 4)),
    "ghostnet": ("ghostnet_050", {}, (1, 2, 3, 4)),
    "levit": ("levit_128s", {"img_size": SIZE}, (0, 1, 2)),
    "efficientvit": ("efficientvit_b0", {}, (0, 1, 2, 3)),
    "efficientvit_msra": ("efficientvit_m0", {"img_size": SIZE}, (0, 1, 2)),
}


def create(name: str, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=7, **kwargs)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    name, kwargs, _ = FAMILIES[request.param]
    return request.param, create(name, **kwargs)


def names_of(model: nn.Module, modules: list[nn.Module]) -> list[str]:
    names = {module: name for name, module in model.named_modules()}
    return [names[module] for module in modules]


# --- finding stages ---------------------------------------------------------------------------------------------------


def test_every_family_has_its_stages_without_its_stem(family):
    name, model = family
    assert find_stages(model).indices == FAMILIES[name][2]


def test_every_family_s_features_are_as_promised_and_its_head_gives_the_model_s_logits(family):
    _, model = family
    stages = find_stages(model)
    images = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.eval()
        final, features = model.forward_intermediates(images, indices=list(stages.indices), output_fmt="NCHW")
        assert torch.equal(model.forward_head(final), model(images))
    promised = [(2, c, SIZE // r, SIZE // r) for c, r in zip(stages.channels, stages.reductions, strict=True)]
    assert [tuple(feature.shape) for feature in features] == promised
    assert list(stages.reductions) == sorted(stages.reductions)  # shallow to deep
    assert len(stages) == len(features) >= 2


@pytest.mark.parametrize(
    ("name", "channels", "reductions"),
    [
        ("tffd_resnet20", (16, 32, 64), (1, 2, 4)),
        ("tffd_resnet8x4", (64, 128, 256), (1, 2, 4)),
        ("tffd_wrn16_2", (32, 64, 128), (1, 2, 4)),
        ("tffd_vgg8", (64, 128, 256, 512, 512), (1, 2, 4, 8, 8)),
        ("tffd_resnet18", (64, 128, 256, 512), (4, 8, 16, 32)),
    ],
)
def test_the_zoo_s_own_architectures_have_their_stages(name, channels, reductions):
    stages = find_stages(create(name))
    assert (stages.channels, stages.reductions) == (channels, reductions)


@pytest.mark.parametrize(
    ("name", "indices"),
    [
        ("cait_xxs24_224", (5, 11, 17, 23)),  # groups its parameters by a function instead of patterns
        ("coat_mini", (0, 1, 2, 3)),  # three of its features come out of one module
        ("hrnet_w18_small", (1, 2, 3, 4)),  # names places of its forward pass that are no modules
        ("caformer_s18", (0, 1, 2, 3)),  # does not name its stem
    ],
)
def test_unusual_models_have_their_stages_too(name, indices):
    assert find_stages(timm.create_model(name, device="meta")).indices == indices


@pytest.mark.parametrize(
    ("choose", "names"),
    [((0, 2), ("act1", "layer2")), ((-1, 1), ("layer1", "layer4")), ([3], ("layer3",))],
)
def test_the_user_chooses_among_all_features_and_gets_them_shallow_to_deep(choose, names):
    assert find_stages(create("resnet10t"), choose).names == names


# --- the norms behind the features ------------------------------------------------------------------------------------

NORMS = {
    "resnet": [
        "layer1.0.bn2",
        "layer2.0.bn2",
        "layer3.0.bn2",
        "layer4.0.bn2",
    ],  # not layer2.0.downsample.2, which runs last
    "resnetv2": ["stages.1.blocks.0.norm1", "stages.2.blocks.0.norm1", "stages.3.blocks.0.norm1", "norm"],
    "efficientnet": ["blocks.0.0.bn2", "blocks.1.1.bn3", "blocks.2.1.bn3", "blocks.4.2.bn3", "blocks.6.0.bn3"],
    "mobilenetv3": ["blocks.0.0.bn2", "blocks.1.1.bn3", "blocks.3.1.bn3", "blocks.5.0.bn1"],
    "regnet": [
        "s1.b1.conv3.bn",
        "s2.b1.conv3.bn",
        "s3.b4.conv3.bn",
        "s4.b7.conv3.bn",
    ],  # past a squeeze-and-excite gate
    "densenet": [
        "features.transition1.norm",
        "features.transition2.norm",
        "features.transition3.norm",
        "features.norm5",
    ],
    "vgg_bn": ["features.5", "features.12", "features.19", "features.26"],
    "repvgg": [f"stages.{block}.conv_kxk.bn" for block in ("0.1", "1.3", "2.13", "3.0")],  # not the identity branch's
    "levit": ["stages.0.blocks.1.mlp.ln2.bn", "stages.1.blocks.2.mlp.ln2.bn", "stages.2.blocks.3.mlp.ln2.bn"],
}


@pytest.mark.parametrize("name", NORMS)
def test_the_norm_of_a_stage_makes_its_feature_or_is_the_first_to_read_it(name):
    model_name, kwargs, _ = FAMILIES[name]
    model = create(model_name, **kwargs)
    norms = stage_norms(model, find_stages(model), (3, SIZE, SIZE))
    assert names_of(model, norms) == NORMS[name]


def test_a_gate_is_told_from_the_feature_also_where_the_map_is_a_single_place():
    model = create("regnety_002")
    norms = stage_norms(model, find_stages(model), (3, 32, 32))  # the last map is 1 x 1, as its gate is
    assert names_of(model, norms) == NORMS["regnet"]


class AddsContext(BasicBlock):
    """Adds a (N, C, 1, 1) context, made by more operations than the feature itself and ending in a BatchNorm too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        return x + self.bn1(self.conv1(x.mean((2, 3), keepdim=True)))


def test_a_norm_that_makes_only_a_context_added_to_the_feature_does_not_make_the_feature():
    model = create("tffd_resnet20")
    model.stages[1][-1] = AddsContext(32, 32)
    norms = stage_norms(model, find_stages(model), (3, 32, 32))
    assert names_of(model, norms)[1] == "stages.1.2.bn2"


@pytest.mark.parametrize(
    ("name", "norms"),
    [
        ("tffd_resnet20", ["stages.0.2.bn2", "stages.1.2.bn2", "stages.2.2.bn2"]),
        (
            "tffd_resnet8x4",
            ["stages.0.0.bn2", "stages.1.0.bn2", "stages.2.0.bn2"],
        ),  # each stage has a shortcut norm too
        ("tffd_wrn16_2", ["stages.1.0.norm1", "stages.2.0.norm1", "norm"]),
    ],
)
def test_the_norms_of_the_zoo_s_own_architectures(name, norms):
    model = create(name)
    assert names_of(model, stage_norms(model, find_stages(model), (3, 32, 32))) == norms


def test_scaling_the_norm_of_a_stage_scales_its_feature_s_channel():
    model = create("tffd_resnet20").eval()
    stages = find_stages(model)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def features() -> list[torch.Tensor]:
        with torch.no_grad():
            return model.forward_intermediates(images, indices=list(stages.indices), intermediates_only=True)

    before = features()
    for stage, norm in enumerate(stage_norms(model, stages, (3, 32, 32))):
        with torch.no_grad():
            norm.weight[3] += 1
        changed = (features()[stage] != before[stage]).flatten(2).any(2).any(0)
        assert changed.nonzero().flatten().tolist() == [3]
        with torch.no_grad():
            norm.weight[3] -= 1


@pytest.mark.parametrize("name", ["convnext", "vit", "swin", "fastvit", "ghostnet", "maxvit"])
def test_a_stage_without_a_batch_norm_of_its_own_is_refused_by_name_with_its_norm_layers(name):
    model_name, kwargs, _ = FAMILIES[name]
    model = create(model_name, **kwargs)
    with pytest.raises(
        ValueError, match=r"of stage [\w.]+: no affine BatchNorm .* \(norm layers there: [\w.]+ \(\w*Norm"
    ):
        stage_norms(model, find_stages(model), (3, SIZE, SIZE))


def test_a_batch_norm_without_a_scale_does_not_serve():
    model = create("tffd_resnet20")
    model.stages[1][-1].bn2 = nn.BatchNorm2d(32, affine=False)
    with pytest.raises(ValueError, match=r"32 channels of stage stages\.1"):
        stage_norms(model, find_stages(model), (3, 32, 32))


def test_a_batch_norm_over_other_channels_than_the_feature_s_does_not_serve():
    model = create("tffd_resnet20")
    fold = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(32, 8, 1), nn.BatchNorm2d(8), nn.PixelUnshuffle(2))
    model.stages[1].append(fold)  # 8 normalised channels are reshaped into the feature's 32
    with pytest.raises(ValueError, match=r"32 channels of stage stages\.1"):
        stage_norms(model, find_stages(model), (3, 32, 32))


def test_norms_are_found_in_frozen_and_checkpointed_models():
    model = create("tffd_resnet20").requires_grad_(False)
    model.set_grad_checkpointing()
    norms = stage_norms(model, find_stages(model), (3, 32, 32))
    assert names_of(model, norms) == ["stages.0.2.bn2", "stages.1.2.bn2", "stages.2.2.bn2"]


# --- the activations that end the stages ------------------------------------------------------------------------------

ACTIVATIONS = {
    "resnet": ["layer1.0.act2", "layer2.0.act2", "layer3.0.act2", "layer4.0.act2"],
    "regnet": ["s1.b1.act3", "s2.b1.act3", "s3.b4.act3", "s4.b7.act3"],
    "vgg_bn": ["features.6", "features.13", "features.20", "features.27"],
    "repvgg": ["stages.0.1.act", "stages.1.3.act", "stages.2.13.act", "stages.3.0.act"],
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_input_of_a_stage_s_activation_is_the_feature_before_it(name):
    model_name, kwargs, _ = FAMILIES[name]
    model = create(model_name, **kwargs).eval()
    stages = find_stages(model)
    activations = stage_activations(model, stages, (3, SIZE, SIZE))
    assert names_of(model, activations) == ACTIVATIONS[name]

    inputs: list[torch.Tensor] = []  # cloned: all of these activations work in place
    for activation in activations:
        activation.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    images = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = model.forward_intermediates(images, indices=list(stages.indices), intermediates_only=True)
    for before, after in zip(inputs, features, strict=True):
        assert before.min() < 0
        assert torch.equal(before.relu(), after)


@pytest.mark.parametrize("name", ["resnetv2", "convnext", "efficientnet", "densenet", "vit", "ghostnet", "levit"])
def test_a_stage_that_ends_in_no_activation_is_refused_by_name(name):
    model_name, kwargs, _ = FAMILIES[name]
    model = create(model_name, **kwargs)
    with pytest.raises(ValueError, match=r"stage [\w.]+ does not end in an activation layer.*\(l2, at, sp, ickd\)"):
        stage_activations(model, find_stages(model), (3, SIZE, SIZE))


class WritesIntoItsActivation(BasicBlock):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).add_(1)


def test_an_activation_whose_output_is_written_into_is_not_the_stage_s_end():
    model = create("tffd_resnet20")
    model.stages[0][-1] = WritesIntoItsActivation(16, 16)
    with pytest.raises(ValueError, match=r"stage stages\.0 does not end in an activation"):
        stage_activations(model, find_stages(model), (3, 32, 32))


def test_an_activation_that_runs_twice_is_refused():
    model = create("tffd_resnet20")
    block = model.stages[0][-1]
    block.act2 = block.act1
    with pytest.raises(ValueError, match=r"stage stages\.0 runs 2 times"):
        stage_activations(model, find_stages(model), (3, 32, 32))


# --- what the dry run leaves behind -----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_the_dry_run_leaves_no_trace(family, training):
    _, model = family
    model.train(training)
    first_norm = next((m for m in model.modules() if isinstance(m, nn.BatchNorm2d)), None)
    if first_norm is not None:
        first_norm.eval()  # as someone may who freezes it
    next(model.parameters()).requires_grad_(False)
    stages = find_stages(model)

    def trace() -> dict[str, Any]:
        frozen = [not p.requires_grad for p in model.parameters()]
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        gradients = [p.grad for p in model.parameters()]
        modes = [m.training for m in model.modules()]
        return {
            "frozen": frozen,
            "hooks": hooks,
            "gradients": gradients,
            "modes": modes,
            "random": torch.get_rng_state(),
            **tensors,
        }

    before = trace()
    for look in (stage_norms, stage_activations):
        with contextlib.suppress(ValueError):  # not every family has both, and a refusal leaves no trace either
            look(model, stages, (3, SIZE, SIZE))
    for name, value in trace().items():
        assert torch.equal(value, before[name]) if isinstance(value, torch.Tensor) else value == before[name], name


class DrawsNoise(BasicBlock):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + torch.rand(1)


def test_a_model_that_draws_random_numbers_does_not_move_the_random_state():
    model = create("tffd_resnet20")
    model.stages[0][0] = DrawsNoise(16, 16)
    before = torch.get_rng_state()
    stage_norms(model, find_stages(model), (3, 32, 32))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["levit_128s", "efficientvit_m0"])
def test_a_model_that_caches_in_eval_mode_forgets_what_the_dry_run_made_it_cache(name):
    model, other = create(name, img_size=SIZE).eval(), create(name, img_size=SIZE).eval()
    stage_norms(model, find_stages(model), (3, SIZE, SIZE))
    with torch.no_grad():
        for parameter_name, parameter in other.named_parameters():
            if "attention_biases" in parameter_name:
                nn.init.normal_(parameter)
        model.load_state_dict(other.state_dict())
        images = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
        assert torch.equal(model(images), other(images))


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_model_that_does_not_show_its_features_is_refused():
    with pytest.raises(ValueError, match="Sequential has no forward_intermediates"):
        find_stages(nn.Sequential(nn.Conv2d(3, 4, 3)))
    with pytest.raises(ValueError, match=r"FeatureListNet has no forward_intermediates.*\(without features_only\)"):
        find_stages(timm.create_model("resnet10t", features_only=True))
    model = create("tffd_resnet20")
    del model.feature_info
    with pytest.raises(ValueError, match="has no feature_info"):
        find_stages(model)


def test_too_few_stages_are_refused_with_the_features_to_choose_from():
    with pytest.raises(ValueError, match=r"2 stages are needed and ResNet gives 1; .*0: act1, 1: layer1.*4: layer4"):
        find_stages(create("resnet10t"), [1], minimum=2)


@pytest.mark.parametrize("choose", [[5], [-6], [1, 1], [1, -4], []])
def test_stages_that_a_model_does_not_have_are_refused_with_those_it_has(choose):
    with pytest.raises(
        ValueError, match="different positions out of 0: act1, 1: layer1, 2: layer2, 3: layer3, 4: layer4"
    ):
        find_stages(create("resnet10t"), choose)


def test_an_image_size_that_the_model_refuses_is_named():
    model = create("vit_tiny_patch16_224", img_size=SIZE)
    with pytest.raises(ValueError, match=r"VisionTransformer cannot take images of \(3, 32, 32\)"):
        stage_norms(model, find_stages(model), (3, 32, 32))


def test_stages_are_a_value():
    assert find_stages(create("tffd_resnet20")) == Stages(
        (1, 2, 3), ("stages.0", "stages.1", "stages.2"), (16, 32, 64), (1, 2, 4)
    )
