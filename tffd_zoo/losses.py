"""The two Tf-FD losses as plain functions on stage features (Li, ECCV 2022, doi 10.1007/978-3-031-19809-0_20).

Intra-layer: within a stage, salient channels teach redundant ones. Inter-layer: deep stages teach shallow ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .feature_losses import FEATURE_LOSSES, FeatureLoss, align

StagePairs = Literal["all", "neighbours"]
DeepChannels = Literal["first", "salient", "group_mean"]


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
        ratio: share of the channels that is salient.

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


# --- the losses -------------------------------------------------------------------------------------------------------


def _take_channels(features: Tensor, channels: Tensor) -> Tensor:
    """features[:, channels] in the layout of `features`, by what is fastest in it."""
    if features.is_contiguous() or not features.is_contiguous(memory_format=torch.channels_last):
        return features.index_select(1, channels)
    # index_select would copy to NCHW first, and takes twice as long where the channels lie side by side.
    pixels = features.permute(0, 2, 3, 1)
    return pixels.gather(3, channels.expand(*pixels.shape[:3], -1)).permute(0, 3, 1, 2)


class _PairedSquaredError(torch.autograd.Function):
    """sum (f - f[:, teacher])^2, with the difference recomputed in the backward pass instead of saved.

    A salient channel is its own teacher, so its difference is zero and the plain gradient 2 (f - f[:, teacher]) already
    leaves it alone; without the stop-gradient it also receives minus the sum of its students' gradients.

    Either way makes one tensor of the feature's size and no other: every activation of the network is there meanwhile.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, teacher: Tensor, detach_salient: bool) -> Tensor:
        ctx.save_for_backward(features, teacher)
        ctx.detach_salient = detach_salient
        return torch.linalg.vector_norm(_take_channels(features, teacher).sub_(features)).square()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        features, teacher = ctx.saved_tensors
        grad = _take_channels(features, teacher).sub_(features).mul_(-2 * grads[0])
        if not ctx.detach_salient:
            grad = grad.index_add(1, teacher, -grad)
        return grad, None, None


def intra_layer_loss(
    features: Sequence[Tensor],
    teachers: Sequence[Tensor],
    *,
    ratio: float = 0.5,
    loss: FeatureLoss = "l2",
    detach_salient: bool = True,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """L_intra = mean over stages of D(F_redundant, sg F_salient).

    Args:
        features: stage features, each (N, C_l, H_l, W_l).
        teachers: for each stage the (C_l,) teacher index from `pair_channels` with the same `ratio`.
        ratio: share of the channels that is salient.
        loss: the feature loss D.
        detach_salient: stop the gradient on the salient half; without it both halves move towards each other.
        reduction: `mean` over all elements, or `sum` over C, H, W and mean over N (`l2` only).

    Returns:
        0-dim float32 loss; zero for a stage without redundant channels.
    """
    if loss != "l2" and reduction != "mean":
        raise ValueError(f"reduction='{reduction}' is defined for the l2 feature loss only, not for '{loss}'")
    total = features[0].new_zeros((), dtype=torch.float32)
    for feature, teacher in zip(features, teachers, strict=True):
        batch, channels, height, width = feature.shape
        redundant = channels - salient_count(channels, ratio)
        if redundant == 0:
            continue
        stage, feature = feature, feature.float()
        if loss == "l2":
            count = batch * (redundant * height * width if reduction == "mean" else 1)
            squares = _PairedSquaredError.apply(feature, teacher, detach_salient)
            _differentiate_with(squares, stage)
            total = total + squares / count
        else:
            own = torch.arange(channels, device=teacher.device)
            # Redundant channels first, without asking the device how many there are.
            students = (teacher == own).to(torch.uint8).argsort(stable=True)[:redundant]
            salient = feature.index_select(1, teacher[students])
            total = total + FEATURE_LOSSES[loss](
                feature.index_select(1, students), salient.detach() if detach_salient else salient
            )
    return total / len(features)


def inter_layer_loss(
    features: Sequence[Tensor],
    pairs: Sequence[tuple[int, int]],
    *,
    loss: FeatureLoss = "l2",
    reduction: Literal["mean", "sum"] = "mean",
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
    if loss != "l2" and reduction != "mean":
        raise ValueError(f"reduction='{reduction}' is defined for the l2 feature loss only, not for '{loss}'")
    if deep_channels == "salient" and saliences is None:
        raise ValueError("deep_channels='salient' needs the saliences of the stages")
    if not pairs:
        raise ValueError("inter-layer distillation needs at least one pair of stages; choose two stages or more")
    features = [feature.float() for feature in features]
    total = features[0].new_zeros(())
    for shallow, group in _by_shallow(pairs).items():
        pooled = features[shallow]
        for deep in group:
            taught, teacher = pooled, features[deep].detach()
            if deep_channels != "first" and teacher.shape[1] > taught.shape[1]:
                salience = saliences[deep] if saliences is not None else None
                teacher = _deep_channels(teacher, taught.shape[1], deep_channels, salience)
            taught, teacher = align(taught, teacher, loss)
            _differentiate_with(taught, features[shallow])
            term = FEATURE_LOSSES[loss](taught, teacher)
            if reduction == "sum":
                term = term * taught[0].numel()
            total = total + term
            if _pools_in_steps(pooled, taught):
                pooled = taught
    return total / len(pairs)


def _differentiate_with(result: Tensor, feature: Tensor) -> None:
    """Let the backward pass come to `result` when it comes to `feature`, and not before all of the network.

    Autograd takes the newest operation that is ready. Made after the forward pass, a loss would have the gradients of
    all stages waiting in memory, just when that is fullest; made when the feature was, it adds one stage's at a time.
    """
    if torch.compiler.is_compiling():  # a compiler orders the backward pass by itself, and knows no grad_fn
        return
    made_by: Any = result.grad_fn  # the method is in no type stub
    if made_by is not None and feature.grad_fn is not None:
        made_by._set_sequence_nr(feature.grad_fn._sequence_nr())


def _by_shallow(pairs: Sequence[tuple[int, int]]) -> dict[int, list[int]]:
    groups: dict[int, list[int]] = {}
    for shallow, deep in sorted(pairs):
        groups.setdefault(shallow, []).append(deep)
    return groups


def _pools_in_steps(before: Tensor, after: Tensor) -> bool:
    """Whether pooling `after` further equals pooling `before` (4 = 2 after 2): whole windows, no channel lost."""
    return before.shape[1] == after.shape[1] and all(
        size % pooled == 0 for size, pooled in zip(before.shape[2:], after.shape[2:], strict=True)
    )


def _deep_channels(teacher: Tensor, count: int, how: DeepChannels, salience: Tensor | None) -> Tensor:
    if how == "salient":
        assert salience is not None
        return teacher.index_select(1, salience.argsort(descending=True, stable=True)[:count])
    # Adaptive pooling over the channel axis is the mean of `count` consecutive groups, uneven ones included.
    batch, channels, height, width = teacher.shape
    groups = F.adaptive_avg_pool2d(teacher.reshape(batch, 1, channels, height * width), (count, height * width))
    return groups.reshape(batch, count, height, width)
