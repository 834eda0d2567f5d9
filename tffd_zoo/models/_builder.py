"""The one door through which every architecture of the zoo is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg, build_model_with_cfg, load_pretrained, resolve_pretrained_cfg
from torch import nn

from .manifest import find_release


def build_tffd(
    make_model: Callable[..., nn.Module],
    variant: str,
    pretrained: bool,
    bare_cfg: Mapping[str, Any],
    pretrained_cfg: str | Mapping[str, Any] | PretrainedCfg | None = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    cache_dir: Path | str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build `variant` with timm's builder, all of whose arguments work; a release's weights are verified first.

    Without weights and without a tag, the model is the architecture's own, whatever has been released for it.

    Args:
        make_model: makes the network from the arguments that timm's builder leaves.
        variant: registered name of the architecture.
        pretrained: whether to load weights.
        bare_cfg: the architecture's pretrained cfg without weights.
        pretrained_cfg: tag or cfg, as `timm.create_model` takes them.
        pretrained_cfg_overlay: changes to it; a `file` here is the user's own and not compared with a release.
        cache_dir: where Hub files are cached.
        kwargs: for timm's builder and `make_model`.

    Raises:
        ValueError: if a release's file is not the one that was released.
        OSError: if it is missing or cannot be downloaded.
    """
    if not pretrained and not pretrained_cfg:
        pretrained_cfg = bare_cfg
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
    cfg_dict = cfg.to_dict()
    release = find_release(cfg) if pretrained else None
    if release is None:
        return build_model_with_cfg(
            make_model, variant, pretrained, pretrained_cfg=cfg_dict, cache_dir=cache_dir, **kwargs
        )

    state_dict = release.load(cache_dir)
    features_only = kwargs.get("features_only", False)

    def make_and_load(**model_kwargs: Any) -> nn.Module:
        # Here timm can adapt the weights before it wraps the model, and its cfg never holds tensors.
        model = make_model(**model_kwargs)
        load_pretrained(
            model,
            {**cfg_dict, "state_dict": state_dict},
            num_classes=0 if features_only else model.num_classes,
            in_chans=model_kwargs["in_chans"],
        )
        return model

    return build_model_with_cfg(make_and_load, variant, pretrained=False, pretrained_cfg=cfg_dict, **kwargs)
