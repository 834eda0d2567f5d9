"""DropBlock and Dropout on the outputs of a model's stages, for training only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import drop_block_2d
from torch import Tensor, nn

from ..stages import Stages
from .base import Objective, View


@dataclass(frozen=True)
class DropConfig:
    """Features dropped in training, as regularisation."""

    drop_block: float = 0.0
    """DropBlock on the outputs of the first two stages: drop probability at the end of the run, from 0 linearly."""
    block_size: int = 7
    """Side of the dropped blocks; at most that of the map."""
    dropout: float = 0.0
    """Dropout on the output of the last stage, before pooling: its probability."""

    def __post_init__(self) -> None:
        for name in ("drop_block", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; give a probability of dropping, 0 or more and below 1"
                )
        if not (self.drop_block or self.dropout):
            raise ValueError("nothing would be dropped: set drop_block or dropout above 0, or leave drop out")
        if self.block_size < 1:
            raise ValueError(f"block_size is {self.block_size}; give 1 or more")


class StageDrop(Objective):
    """Drops features where stages end. No loss: an objective because it follows the run.

    Hooks on the stages' last modules do it, while those are in training mode; so a loss on stage features sees the
    features that the next stage sees, and the plain model has neither new keys nor another inference. The draws come
    from torch's global generator.

    Sources: Ghiasi et al., "DropBlock", NeurIPS 2018 (here on the first two groups, as in Li, ECCV 2022, supplement);
    Srivastava et al., "Dropout", JMLR 2014.

    Args:
        config: the settings.
        model: the model whose stages are meant.
        stages: its stages.
        epochs: length of the run.
    """

    def __init__(self, config: DropConfig, model: nn.Module, stages: Stages, epochs: float) -> None:
        super().__init__()
        self.config = config
        self.epochs = epochs
        self.weights = {}
        self.drop_prob = 0.0
        for name, channels in zip(stages.names[:2], stages.channels, strict=False):
            if config.drop_block:
                model.get_submodule(name).register_forward_hook(self._checked(name, channels, self._drop_blocks))
        if config.dropout:
            last = model.get_submodule(stages.names[-1])
            last.register_forward_hook(self._checked(stages.names[-1], stages.channels[-1], self._drop))

    def begin_batch(self, epoch: float, batch: int) -> None:
        if self.config.drop_block and batch and not epoch:
            raise ValueError("DropBlock's probability rises over the epochs: pass batches_per_epoch=len(train_loader)")
        self.drop_prob = self.config.drop_block * min(1.0, epoch / self.epochs)

    def forward(self, view: View) -> dict[str, Tensor]:
        return {}

    @torch.compiler.disable  # the probability changes at every batch and would be compiled in
    def _drop_blocks(self, features: Tensor) -> Tensor:
        return drop_block_2d(features, self.drop_prob, self.config.block_size) if self.drop_prob else features

    def _drop(self, features: Tensor) -> Tensor:
        return F.dropout(features, self.config.dropout)

    @staticmethod
    def _checked(stage: str, channels: int, drop: Any) -> Any:
        """`drop` as a forward hook."""

        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            if not module.training:
                return None
            if not isinstance(output, Tensor) or output.ndim != 4 or output.shape[1] != channels:
                raise ValueError(
                    f"features are dropped in maps (N, {channels}, H, W), and stage {stage} of this architecture does "
                    "not end in one; choose a convolutional network, such as a ResNet"
                )
            return drop(output)

        return hook
