"""VGG networks for 32x32 images.

Architecture: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition"
(https://arxiv.org/abs/1409.1556), with BatchNorm and one linear layer as the classifier, as in Tian et al.,
"Contrastive Representation Distillation" (CRD, https://arxiv.org/abs/1910.10699), whose parameter counts these models
share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import ConvNormAct, LayerType
from timm.models import register_model
from torch import nn

from . import manifest
from ._builder import build_tffd
from ._cifar import CifarNet, cifar_cfg

__all__ = ["CifarVGG"]


class CifarVGG(CifarNet):
    """Five stages of 3x3 convolutions; the second, third and fourth start with a 2x2 max pooling. There is no stem.

    Args:
        stages: the channels of each convolution, stage by stage.
        act_layer: activation layer, timm's name or class.
        norm_layer: normalisation layer, timm's name or class.
        kwargs: the head's and placement's arguments of `CifarNet`.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[int]],
        in_chans: int = 3,
        act_layer: LayerType = nn.ReLU,
        norm_layer: LayerType = nn.BatchNorm2d,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        layers = {"act_layer": act_layer, "norm_layer": norm_layer}
        reductions = (1, 2, 4, 8, 8)
        modules = []
        in_channels = in_chans
        previous = 1
        for widths, reduction in zip(stages, reductions, strict=True):
            blocks: list[nn.Module] = [nn.MaxPool2d(2)] if reduction != previous else []
            for out_channels in widths:
                blocks.append(ConvNormAct(in_channels, out_channels, 3, bias=True, **layers, **dd))
                in_channels = out_channels
            modules.append(nn.Sequential(*blocks))
            previous = reduction
        channels = [widths[-1] for widths in stages]
        super().__init__(
            None, 0, modules, channels, reductions, in_chans=in_chans, device=device, dtype=dtype, **kwargs
        )

    @torch.jit.ignore
    def init_weights(self) -> None:
        """He initialisation of the convolutions and, as in CRD's VGG, a normal one (0.01) of the classifier."""
        super().init_weights()
        if isinstance(self.head.fc, nn.Linear):
            nn.init.normal_(self.head.fc.weight, std=0.01)
            nn.init.zeros_(self.head.fc.bias)


ARCHITECTURES = {
    name: cifar_cfg(first_conv="stages.0.0.conv", pool_size=(4, 4)) for name in ("tffd_vgg8", "tffd_vgg13")
}

default_cfgs = manifest.default_cfgs(ARCHITECTURES)


def _create(variant: str, pretrained: bool, stages: Sequence[Sequence[int]], **kwargs: Any) -> nn.Module:
    return build_tffd(
        CifarVGG,
        variant,
        pretrained,
        ARCHITECTURES[variant],
        stages=stages,
        feature_cfg={"out_indices": (0, 1, 2, 3, 4), "flatten_sequential": True},
        **kwargs,
    )


@register_model
def tffd_vgg8(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VGG-8 with BatchNorm for 32x32 images."""
    return _create("tffd_vgg8", pretrained, ((64,), (128,), (256,), (512,), (512,)), **kwargs)


@register_model
def tffd_vgg13(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VGG-13 with BatchNorm for 32x32 images."""
    return _create("tffd_vgg13", pretrained, ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)), **kwargs)
