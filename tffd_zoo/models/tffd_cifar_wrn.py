"""Wide ResNets for 32x32 images.

Architecture: Zagoruyko and Komodakis, "Wide Residual Networks" (https://arxiv.org/abs/1605.07146), without dropout, as
in Tian et al., "Contrastive Representation Distillation" (CRD, https://arxiv.org/abs/1910.10699), whose parameter
counts these models share.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers import LayerType, create_conv2d, get_norm_act_layer
from timm.models import register_model
from timm.models.resnetv2 import DownsampleConv, PreActBasic
from torch import nn

from . import manifest
from ._builder import build_tffd
from ._cifar import CifarNet, cifar_cfg, residual_stages

__all__ = ["CifarWideResNet"]


class CifarWideResNet(CifarNet):
    """A 3x3 stem without pooling and stages of pre-activation blocks, at 1, 1/2 and 1/4 of the image's size.

    The stages' maps are sums that no activation has seen yet; a BatchNorm and a ReLU follow the last one.

    Args:
        depth: layers with weights as the paper counts them, 6n + 4 for n blocks in each of the three stages.
        widen_factor: multiplies the stages' 16, 32 and 64 channels.
        output_stride: 4, or 2 or 1 to dilate the last stages instead of striding them.
        act_layer: activation layer, timm's name or class.
        norm_layer: normalisation layer, timm's name or class.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 over the blocks.
        kwargs: the head's and placement's arguments of `CifarNet`.
    """

    def __init__(
        self,
        depth: int,
        widen_factor: int,
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
        norm_layer = get_norm_act_layer(norm_layer, act_layer=act_layer)
        channels = [width * widen_factor for width in (16, 32, 64)]
        block = partial(PreActBasic, conv_layer=create_conv2d, norm_layer=norm_layer, proj_layer=DownsampleConv, **dd)
        stages, reductions = residual_stages(block, (depth - 4) // 6, 16, channels, output_stride, drop_path_rate)
        stem = create_conv2d(in_chans, 16, 3, **dd)
        norm = norm_layer(channels[-1], **dd)
        super().__init__(stem, 16, stages, channels, reductions, norm, in_chans=in_chans, **kwargs, **dd)

    @torch.jit.ignore
    def init_weights(self) -> None:
        """He initialisation of the convolutions and, as in CRD's WRN, a classifier without bias at the start."""
        super().init_weights()
        if isinstance(self.head.fc, nn.Linear):
            nn.init.zeros_(self.head.fc.bias)


ARCHITECTURES = {name: cifar_cfg(first_conv="stem") for name in ("tffd_wrn16_2", "tffd_wrn40_1", "tffd_wrn40_2")}

default_cfgs = manifest.default_cfgs(ARCHITECTURES)


def _create(variant: str, pretrained: bool, depth: int, widen_factor: int, **kwargs: Any) -> nn.Module:
    return build_tffd(
        CifarWideResNet,
        variant,
        pretrained,
        ARCHITECTURES[variant],
        depth=depth,
        widen_factor=widen_factor,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **kwargs,
    )


@register_model
def tffd_wrn16_2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN-16-2 for 32x32 images."""
    return _create("tffd_wrn16_2", pretrained, 16, 2, **kwargs)


@register_model
def tffd_wrn40_1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN-40-1 for 32x32 images."""
    return _create("tffd_wrn40_1", pretrained, 40, 1, **kwargs)


@register_model
def tffd_wrn40_2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN-40-2 for 32x32 images."""
    return _create("tffd_wrn40_2", pretrained, 40, 2, **kwargs)
