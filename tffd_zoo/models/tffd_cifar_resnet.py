"""ResNets for 32x32 images, as the knowledge-distillation literature uses them.

Architecture: He et al., "Deep Residual Learning for Image Recognition", section 4.2 (https://arxiv.org/abs/1512.03385),
with projection shortcuts (option B) and the wider `x4` variants of Tian et al., "Contrastive Representation
Distillation" (CRD, https://arxiv.org/abs/1910.10699), whose parameter counts these models share.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.layers import ConvNormAct, DropPath, LayerType, get_act_layer, get_norm_layer
from timm.models import register_model
from timm.models.resnet import BasicBlock, downsample_conv
from torch import nn

from . import manifest
from ._builder import build_tffd
from ._cifar import CifarNet, cifar_cfg, residual_stages

__all__ = ["CifarResNet"]


class CifarResNet(CifarNet):
    """A 3x3 stem without pooling and stages of basic blocks, at 1, 1/2 and 1/4 of the image's size.

    Args:
        depth: layers with weights, 6n + 2 for n blocks in each of the three stages.
        stem_channels: channels of the stem's map.
        channels: channels of each stage's map.
        output_stride: 4, or 2 or 1 to dilate the last stages instead of striding them.
        act_layer: activation layer, timm's name or class.
        norm_layer: normalisation layer, timm's name or class.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 over the blocks.
        kwargs: the head's and placement's arguments of `CifarNet`.
    """

    def __init__(
        self,
        depth: int,
        stem_channels: int = 16,
        channels: Sequence[int] = (16, 32, 64),
        in_chans: int = 3,
        output_stride: int = 4,
        act_layer: LayerType = nn.ReLU,
        norm_layer: LayerType = nn.BatchNorm2d,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        layers = {"act_layer": get_act_layer(act_layer), "norm_layer": get_norm_layer(norm_layer)}
        block = partial(_basic_block, **layers, **dd)
        stages, reductions = residual_stages(
            block, (depth - 2) // 6, stem_channels, channels, output_stride, drop_path_rate
        )
        stem = ConvNormAct(in_chans, stem_channels, 3, **layers, **dd)
        super().__init__(stem, stem_channels, stages, channels, reductions, in_chans=in_chans, **kwargs, **dd)


def _basic_block(
    in_channels: int,
    out_channels: int,
    stride: int,
    drop_path_rate: float,
    norm_layer: type[nn.Module],
    device: Any,
    dtype: Any,
    **kwargs: Any,
) -> BasicBlock:
    dd = {"device": device, "dtype": dtype}
    shortcut = None
    if stride != 1 or in_channels != out_channels:
        shortcut = downsample_conv(in_channels, out_channels, 1, stride, norm_layer=norm_layer, **dd)
    drop_path = DropPath(drop_path_rate) if drop_path_rate else None
    return BasicBlock(
        in_channels, out_channels, stride, shortcut, drop_path=drop_path, norm_layer=norm_layer, **kwargs, **dd
    )


ARCHITECTURES = {
    name: cifar_cfg(first_conv="stem.conv")
    for name in (
        "tffd_resnet20",
        "tffd_resnet32",
        "tffd_resnet44",
        "tffd_resnet56",
        "tffd_resnet110",
        "tffd_resnet8x4",
        "tffd_resnet32x4",
    )
}
_X4 = {"stem_channels": 32, "channels": (64, 128, 256)}

default_cfgs = manifest.default_cfgs(ARCHITECTURES)


def _create(variant: str, pretrained: bool, depth: int, **kwargs: Any) -> nn.Module:
    return build_tffd(
        CifarResNet,
        variant,
        pretrained,
        ARCHITECTURES[variant],
        depth=depth,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **kwargs,
    )


@register_model
def tffd_resnet20(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-20 for 32x32 images."""
    return _create("tffd_resnet20", pretrained, 20, **kwargs)


@register_model
def tffd_resnet32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-32 for 32x32 images."""
    return _create("tffd_resnet32", pretrained, 32, **kwargs)


@register_model
def tffd_resnet44(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-44 for 32x32 images."""
    return _create("tffd_resnet44", pretrained, 44, **kwargs)


@register_model
def tffd_resnet56(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-56 for 32x32 images."""
    return _create("tffd_resnet56", pretrained, 56, **kwargs)


@register_model
def tffd_resnet110(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-110 for 32x32 images."""
    return _create("tffd_resnet110", pretrained, 110, **kwargs)


@register_model
def tffd_resnet8x4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-8 for 32x32 images with four times as many channels in each stage."""
    return _create("tffd_resnet8x4", pretrained, 8, **_X4, **kwargs)


@register_model
def tffd_resnet32x4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-32 for 32x32 images with four times as many channels in each stage."""
    return _create("tffd_resnet32x4", pretrained, 32, **_X4, **kwargs)
