"""The two Tf-FD losses on stage features, as plainly as they are defined (Li, ECCV 2022).

Intra-layer: within a stage, salient channels teach redundant ones. Inter-layer: deep stages teach shallow ones. The
fast forms that the training task uses, equal to these in value and gradient, are in `_lean`.

Source: Li, "Self-Regulated Feature Learning via Teacher-free Feature Distillation", doi 10.1007/978-3-031-19809-0_20.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .feature_losses import FEATURE_LOSSES, FeatureLoss, Reduction, align

__all__ = [
    "DeepChannels",
    "StagePairs",
    "deep_channels_of",
    "distance",
    "inter_layer_loss",
    "intra_layer_loss",
    "pair_channels",
    "salient_count",
    "stage_pairs",
]

StagePairs = Literal["all", "neighbours"]
DeepChannels = Literal["first", "salient", "group_mean"]


# --- the losses -------------------------------------------------------------------------------------------------------


def intra_layer_loss(
    features: Sequence[Tensor],
    teachers: Sequence[Tensor],
    *,
    loss: FeatureLoss = "l2",
    detach_salient: bool = True,
    reduction: Reduction = "mean",
) -> Tensor:
    """L_intra = mean over stages of D(F_redundant, sg F_salient).

    Args:
        features: stage features, each (N, C_l, H_l, W_l).
        teachers: for each stage the (C_l,) teacher of every channel, from `pair_channels`.
        loss: the feature loss D.
        detach_salient: stop the gradient on the salient half; without it both halves move towards each other.
        reduction: `mean` over all elements, or `sum` over C, H, W and mean over N (`l2` only).

    Returns:
        0-dim float32 loss; zero for a stage without redundant channels.
    """
    compare = distance(loss, reduction)
    per_stage = []
    for feature, teacher in zip(features, teachers, strict=True):
        redundant = (teacher != torch.arange(len(teacher), device=teacher.device)).nonzero()[:, 0]
        student, target = feature[:, redundant], feature[:, teacher[redundant]]
        if detach_salient:
            target = target.detach()
        per_stage.append(compare(student, target) if len(redundant) else 0.0 * feature.float().sum())
    return torch.stack(per_stage).mean()


def inter_layer_loss(
    features: Sequence[Tensor],
    pairs: Sequence[tuple[int, int]],
    *,
    loss: FeatureLoss = "l2",
    reduction: Reduction = "mean",
    deep_channels: DeepChannels = "first",
    saliences: Sequence[Tensor] | None = None,
) -> Tensor:
    """L_inter = mean over stage pairs (i < j) of D(align F_i, sg align F_j).

    The larger map is average-pooled to the smaller one's size and both keep min(C_i, C_j) channels (`align`).

    Args:
        features: stage features, each (N, C_l, H_l, W_l), shallow to deep.
        pairs: positions (shallow, deep) from `stage_pairs`.
        loss: the feature loss D.
        reduction: `mean` over all elements, or `sum` over C, H, W and mean over N (`l2` only).
        deep_channels: which C_i of more deep channels teach: the `first`, the most `salient`, or the means of C_i
            consecutive groups.
        saliences: (C_l,) per stage, needed for `deep_channels="salient"`.

    Returns:
        0-dim float32 loss.
    """
    check_pairs(pairs)
    compare = distance(loss, reduction)
    per_pair = []
    for shallow, deep in pairs:
        teacher = deep_channels_of(features, shallow, deep, deep_channels, saliences)
        per_pair.append(compare(*align(features[shallow], teacher.detach(), loss)))
    return torch.stack(per_pair).mean()


# --- who teaches whom -------------------------------------------------------------------------------------------------


def salient_count(channels: int, ratio: float = 0.5) -> int:
    """Number of salient channels, K = max(1, floor(ratio * C))."""
    if not 0 < ratio <= 1:
        raise ValueError(f"the salient ratio is {ratio}; give a number in (0, 1], such as 0.5")
    return max(1, int(ratio * channels))


def pair_channels(salience: Tensor, ratio: float = 0.5) -> Tensor:
    """The teacher of every channel.

    Channels are ordered by salience, descending; ties keep channel order. The first K = `salient_count(C, ratio)` are
    salient, and the j-th redundant channel learns from the (j mod K)-th salient one.

    Args:
        salience: (C,) scores.
        ratio: part of the channels that is salient.

    Returns:
        (C,) int64: the channel that channel c learns from; a salient channel points at itself.
    """
    channels = salience.numel()
    salient = salient_count(channels, ratio)
    order = salience.argsort(descending=True, stable=True)
    rank = torch.arange(channels, device=salience.device)
    teacher_rank = torch.where(rank < salient, rank, (rank - salient) % salient)
    return torch.empty_like(order).scatter_(0, order, order[teacher_rank])


def stage_pairs(stages: int, which: StagePairs = "all") -> tuple[tuple[int, int], ...]:
    """Pairs (shallow, deep) of stage positions: `all` i < j, or `neighbours` (i, i + 1) only."""
    if which not in ("all", "neighbours"):
        raise ValueError(f"unknown stage pairs '{which}'; choose 'all' or 'neighbours'")
    reach = stages if which == "all" else 2
    return tuple((i, j) for i in range(stages) for j in range(i + 1, min(stages, i + reach)))


def deep_channels_of(
    features: Sequence[Tensor], shallow: int, deep: int, which: DeepChannels, saliences: Sequence[Tensor] | None
) -> Tensor:
    """The deep stage's feature, narrowed to the shallow one's C_i channels by `which` where it has more.

    `first` leaves it as it is: `align` takes the first channels.
    """
    teacher, count = features[deep], features[shallow].shape[1]
    if which == "salient" and saliences is None:
        raise ValueError("deep_channels='salient' needs the saliences of the stages")
    if which == "first" or teacher.shape[1] <= count:
        return teacher
    if saliences is not None and which == "salient":
        return teacher.index_select(1, saliences[deep].argsort(descending=True, stable=True)[:count])
    # Adaptive pooling over the channel axis is the mean of `count` consecutive groups, uneven ones included.
    batch, channels, height, width = teacher.shape
    groups = F.adaptive_avg_pool2d(teacher.float().reshape(batch, 1, channels, height * width), (count, height * width))
    return groups.reshape(batch, count, height, width)


def distance(loss: FeatureLoss, reduction: Reduction = "mean") -> Callable[[Tensor, Tensor], Tensor]:
    """The feature loss D under `reduction`.

    Raises:
        ValueError: `sum`, which only l2 has, is asked of another loss.
    """
    if loss == "l2":
        return partial(FEATURE_LOSSES["l2"], reduction=reduction)
    if reduction != "mean":
        raise ValueError(f"reduction='{reduction}' is defined for the l2 feature loss only, not for '{loss}'")
    return FEATURE_LOSSES[loss]


def check_pairs(pairs: Sequence[tuple[int, int]]) -> None:
    """Refuse to distil between no stages.

    Raises:
        ValueError: there is no pair.
    """
    if not pairs:
        raise ValueError("inter-layer distillation needs at least one pair of stages; choose two stages or more")
