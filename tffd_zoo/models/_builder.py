"""The one door through which every architecture of the zoo is built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.models import build_model_with_cfg
from torch import nn


def build_tffd(make_model: Callable[..., nn.Module], variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """Build `variant` as timm builds its own models."""
    return build_model_with_cfg(make_model, variant, pretrained, **kwargs)
