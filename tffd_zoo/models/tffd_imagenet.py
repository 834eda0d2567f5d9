"""timm's own ResNets under the zoo's names, so that their Tf-FD weights have a place to be listed and loaded from.

State dicts are interchangeable: `tffd_resnet18` is `resnet18`, by timm's own constructor.
"""

from __future__ import annotations

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import register_model
from timm.models.resnet import resnet18, resnet34, resnet50
from torch import nn

from . import manifest
from ._builder import build_tffd

_CFG = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": (7, 7),
    "crop_pct": 0.875,
    "interpolation": "bilinear",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "conv1",
    "classifier": "fc",
    "license": "apache-2.0",
}

ARCHITECTURES = dict.fromkeys(("tffd_resnet18", "tffd_resnet34", "tffd_resnet50"), _CFG)

default_cfgs = manifest.default_cfgs(ARCHITECTURES)


@register_model
def tffd_resnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """timm's ResNet-18."""
    return build_tffd(resnet18, "tffd_resnet18", pretrained, _CFG, **kwargs)


@register_model
def tffd_resnet34(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """timm's ResNet-34."""
    return build_tffd(resnet34, "tffd_resnet34", pretrained, _CFG, **kwargs)


@register_model
def tffd_resnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """timm's ResNet-50."""
    return build_tffd(resnet50, "tffd_resnet50", pretrained, _CFG, **kwargs)
