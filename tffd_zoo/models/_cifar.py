"""What the 32x32 architectures share: a stem, stages and a head behind timm's whole model contract.

A family (ResNet, WRN, VGG) builds its stem, its stages and, for pre-activation networks, the norm that closes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, calculate_drop_path_rates, get_device_dtype
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

CIFAR100_MEAN = (0.5071, 0.4867, 0.4408)
CIFAR100_STD = (0.2675, 0.2565, 0.2761)


def cifar_cfg(**changes: Any) -> dict[str, Any]:
    """timm's pretrained cfg of an architecture for CIFAR-100 at 32x32, before any weights."""
    return {
        "num_classes": 100,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": CIFAR100_MEAN,
        "std": CIFAR100_STD,
        "classifier": "head.fc",
        "license": "apache-2.0",
        **changes,
    }


def residual_stages(
    make_block: Callable[..., nn.Module],
    blocks_per_stage: int,
    in_channels: int,
    channels: Sequence[int],
    output_stride: int,
    drop_path_rate: float,
) -> tuple[list[nn.Sequential], list[int]]:
    """Stages of residual blocks, each but the first halving the map, and how much smaller than the image each map is.

    Once the maps are `output_stride` times smaller than the image, a stage dilates its convolutions instead.

    Args:
        make_block: called with (in_channels, out_channels), stride, dilation, first_dilation and drop_path_rate.
        blocks_per_stage: blocks in each stage.
        in_channels: channels of the map that the first stage reads.
        channels: channels of each stage's map.
        output_stride: how many times smaller than the image the last map is.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 over the blocks.

    Raises:
        ValueError: if `output_stride` is no power of two that the stages can reach.
    """
    reachable = [2**i for i in range(len(channels))]
    if output_stride not in reachable:
        raise ValueError(f"output_stride={output_stride} cannot be reached: choose one of {reachable}")
    drop_path_rates = calculate_drop_path_rates(drop_path_rate, [blocks_per_stage] * len(channels), stagewise=True)
    stages, reductions = [], []
    reduction, dilation = 1, 1
    for index, (out_channels, rates) in enumerate(zip(channels, drop_path_rates, strict=True)):
        stride = 1 if index == 0 else 2
        first_dilation = dilation
        if reduction == output_stride:
            dilation, stride = dilation * stride, 1
        reduction *= stride
        blocks = []
        for rate in rates:
            geometry = {"stride": stride, "dilation": dilation, "first_dilation": first_dilation}
            blocks.append(make_block(in_channels, out_channels, **geometry, drop_path_rate=rate))
            in_channels, stride, first_dilation = out_channels, 1, dilation
        stages.append(nn.Sequential(*blocks))
        reductions.append(reduction)
    return stages, reductions


class CifarNet(nn.Module):
    """A convolutional network of `stages` under timm's model contract.

    `forward_intermediates` returns the stem's map (where there is a stem) and then one map per stage, as it enters the
    next stage.

    Args:
        stem: from image to the first stage's input; None if the first stage reads the image.
        stem_channels: channels of the stem's map (ignored without a stem).
        stages: one `nn.Sequential` of blocks per stage.
        channels: channels of each stage's map.
        reductions: how many times smaller than the image each stage's map is.
        norm: follows the last stage: the closing BatchNorm and ReLU of a pre-activation network, else None.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.
        global_pool: timm's pooling type before the classifier.
        drop_rate: dropout before the classifier.
    """

    def __init__(
        self,
        stem: nn.Module | None,
        stem_channels: int,
        stages: Sequence[nn.Sequential],
        channels: Sequence[int],
        reductions: Sequence[int],
        norm: nn.Module | None = None,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

        self.stem = nn.Identity() if stem is None else stem
        self.stages = nn.Sequential(*stages)
        self.norm = nn.Identity() if norm is None else norm

        self.feature_info = [] if stem is None else [{"num_chs": stem_channels, "reduction": 1, "module": "stem"}]
        self.first_stage = len(self.feature_info)  # index of the first stage among the intermediates
        for index, (num_chs, reduction) in enumerate(zip(channels, reductions, strict=True)):
            self.feature_info.append({"num_chs": num_chs, "reduction": reduction, "module": f"stages.{index}"})

        self.num_features = channels[-1]
        self.head = ClassifierHead(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, device=device, dtype=dtype
        )
        self.head_hidden_size = self.head.num_features
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """He initialisation (fan out) of the convolutions, as CRD's models have it; linear layers keep torch's own."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group the parameters by depth, by stage (`coarse`) or by block."""
        blocks = r"^stages\.(\d+)" if coarse else [(r"^stages\.(\d+)\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^stem", "blocks": blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a fresh classifier of `num_classes` outputs (0: none); `global_pool` None keeps the pooling."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, in_features=self.num_features, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The stem's and stages' maps on the way, and what `forward_features` gives.

        Args:
            x: images (N, in_chans, H, W).
            indices: the last n maps if an int, all if None, else these (0 is the stem where there is one).
            norm: apply the closing norm to the last stage's map.
            stop_early: do not compute stages after the last map asked for.
            output_fmt: only "NCHW".
            intermediates_only: return the maps alone.
        """
        assert output_fmt == "NCHW", "Output shape must be NCHW."
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        stages = self.stages[: max_index + 1 - self.first_stage] if stop_early else self.stages
        last_index = len(self.feature_info) - 1

        intermediates = []
        index = self.first_stage - 1
        x = self.stem(x)
        if index in take_indices:
            intermediates.append(x)
        for index, stage in enumerate(stages, start=self.first_stage):
            x = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
            if index in take_indices:
                intermediates.append(self.norm(x) if norm and index == last_index else x)
        if intermediates_only:
            return intermediates
        return self.norm(x) if index == last_index else x, intermediates

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the deepest of `indices`, and the norm and head where asked or no longer fitting."""
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        prune_end = max_index < len(self.feature_info) - 1
        self.stages = self.stages[: max_index + 1 - self.first_stage]
        if prune_norm or prune_end:
            self.norm = nn.Identity()
        if prune_end:
            self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_head or prune_end:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """The last stage's map (N, num_features, h, w), after the closing norm."""
        x = self.stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.stages, x, flatten=True)
        else:
            x = self.stages(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (N, num_classes) of `forward_features`' map, or what enters the classifier if `pre_logits`."""
        return self.head(x, pre_logits=pre_logits) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, in_chans, H, W)."""
        return self.forward_head(self.forward_features(x))
