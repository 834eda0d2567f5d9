"""DropBlock and Dropout on the outputs of a model's stages, for training only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ranges import COUNT, PART_BELOW_ONE, check_ranges
from ..stages import Stages
from .base import Objective, View
from .method import Method, Setting


@dataclass(frozen=True)
class DropConfig(Method):
    """Features dropped in training, as regularisation."""

    label = "drop"

    drop_block: Annotated[float, PART_BELOW_ONE] = 0.0
    """DropBlock on the outputs of the first two stages: drop probability at the end of the run, from 0 linearly."""
    block_size: Annotated[int, COUNT] = 7
    """Side of the dropped blocks; at most that of the map."""
    dropout: Annotated[float, PART_BELOW_ONE] = 0.0
    """Dropout on the output of the last stage, before pooling: its probability."""

    def __post_init__(self) -> None:
        check_ranges(self, "drop.")
        if not (self.drop_block or self.dropout):
            raise ValueError("nothing would be dropped: set drop_block or dropout above 0, or leave drop out")

    def build(self, setting: Setting) -> StageDrop:
        return StageDrop(self, setting.model, setting.stages, setting.epochs)

    @classmethod
    def describe(cls, settings: Mapping[str, Any]) -> str:
        used = {"DropBlock": settings["drop_block"], "Dropout": settings["dropout"]}
        return " and ".join(f"{name} ({probability:g})" for name, probability in used.items() if probability)


# --- DropBlock --------------------------------------------------------------------------------------------------------


def drop_block(features: Tensor, probability: float, block_size: int) -> Tensor:
    """Zero square blocks of every channel's map, so that `probability` of it is dropped on average, and scale the rest.

    Blocks start at random places from which they lie wholly inside the map, and no block is larger than the map. They
    may overlap, so the rate of starting one is the gamma for which 1 - (1 - gamma)^k, the chance that a place with k
    blocks over it is dropped, has the mean `probability` over all places. (The paper's closed form leaves overlaps out;
    starting blocks outside that region, as some implementations do, drops several times as much of a small map.)

    Args:
        features: (N, C, H, W).
        probability: of a place being dropped, in [0, 1).
        block_size: side of a block.

    Source: Ghiasi et al., "DropBlock: A regularization method for convolutional networks", NeurIPS 2018.
    """
    height, width = features.shape[2:]
    block = min(block_size, height), min(block_size, width)
    starts = height - block[0] + 1, width - block[1] + 1
    gamma = _start_rate(probability, (height, width), block)
    started = (torch.rand(*features.shape[:2], *starts, device=features.device) < gamma).to(features.dtype)
    padded = F.pad(started, (block[1] - 1, block[1] - 1, block[0] - 1, block[0] - 1))
    kept = 1 - F.max_pool2d(padded, block, stride=1)
    return features * kept * (kept.numel() / kept.sum(dtype=torch.float32).clamp_min(1)).to(features.dtype)


def _start_rate(probability: float, size: tuple[int, int], block: tuple[int, int]) -> float:
    """The gamma of `drop_block`, by bisection: the mean rises with it."""
    counts = _blocks_over(size, block)
    places = sum(counts.values())
    low, high = 0.0, 1.0
    for _ in range(40):
        gamma = (low + high) / 2
        dropped = sum(many * (1 - (1 - gamma) ** over) for over, many in counts.items()) / places
        low, high = (gamma, high) if dropped < probability else (low, gamma)
    return gamma


@lru_cache
def _blocks_over(size: tuple[int, int], block: tuple[int, int]) -> Counter[int]:
    """How many places of the map lie under so many possible blocks."""
    rows, columns = (
        Counter(min(i, side - b) - max(0, i - b + 1) + 1 for i in range(side))
        for side, b in zip(size, block, strict=True)
    )
    over: Counter[int] = Counter()
    for (r, row_places), (c, column_places) in product(rows.items(), columns.items()):
        over[r * c] += row_places * column_places
    return over


# --- where stages end -------------------------------------------------------------------------------------------------


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
        return drop_block(features, self.drop_prob, self.config.block_size) if self.drop_prob else features

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
