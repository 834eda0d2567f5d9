"""Salience: how much each channel of a feature says, the score by which Tf-FD chooses the channels that teach.

A metric maps features of shape (N, C, H, W) to one score per channel, shape (C,), in float32 and without gradient; a
higher score is a more salient channel. `stage_salience` scores all stages of a model at once and makes the processes
of a distributed run agree. Scores can tie (dead channels do), and telling ties apart is left to whoever orders them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import _lean

__all__ = ["SalienceMetric", "bn_scale", "entropy", "histogram", "hrank", "lp", "spread", "stage_salience"]

SalienceMetric = Literal["lp", "spread", "entropy", "bn_scale", "hrank"]


# --- the metrics ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def lp(features: Tensor, p: int = 2) -> Tensor:
    """Mean l_p norm of a channel's maps: s_c = mean_n (sum_hw |F_nchw|^p)^(1/p).

    Raises:
        ValueError: if `p` is neither 1 nor 2.
    """
    return _lp_of_maps(features, p).mean(0)


@torch.no_grad()
def spread(features: Tensor) -> Tensor:
    """Mean value of a channel's maps once each has unit l2 norm: s_c = mean_nhw (F_nchw / ||F_nc||_2).

    On the non-negative maps that follow a ReLU it is high where activation is spread over the map and low where it is
    concentrated, whatever its size. A map of zeros counts 0. Tf-FD's published code ranks by it.
    """
    return _spread_of_maps(features).mean(0)


@torch.no_grad()
def entropy(features: Tensor, bins: int = 10) -> Tensor:
    """Entropy, in nats, of a channel's activations in equal bins from their minimum to their maximum.

    H_c = -sum_b p_b ln p_b, where p_b is the part of the channel's N H W activations in bin b. A constant channel
    has entropy 0.

    Adapted from Meng et al., "Filter Grafting for Deep Neural Networks", CVPR 2020, which bins weights.

    Raises:
        ValueError: if `bins` is not 1 or more.
    """
    high, minus_low = _extremes(features.float())
    return _entropy_of_counts(histogram(features, -minus_low, high, bins))


@torch.no_grad()
def hrank(features: Tensor) -> Tensor:
    """Mean matrix rank of a channel's maps: s_c = mean_n rank(F_nc).

    The rank is `torch.linalg.matrix_rank`'s, exact up to its tolerance, at one singular value decomposition per map.
    That is dear: score few images (`stage_salience` takes `images`) and not at every step.

    Source: Lin et al., "HRank: Filter Pruning using High-Rank Feature Map", CVPR 2020.
    """
    return _rank_of_maps(features).mean(0)


@torch.no_grad()
def bn_scale(norm: nn.Module) -> Tensor:
    """Size of the scale in the BatchNorm behind a feature: s_c = |gamma_c|.

    timm starts the last gamma of a residual block at zero, so before the first update all channels of such a stage tie
    at 0; a stable order then takes them by number, channel 0 first.

    Source: Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017.

    Raises:
        ValueError: if `norm` has no scale.
    """
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"bn_scale reads the scale of a BatchNorm, and {norm} has none: pass one with affine=True.")
    return weight.float().abs()


# --- all stages, all processes ----------------------------------------------------------------------------------------


@torch.no_grad()
def stage_salience(
    features: Sequence[Tensor],
    metric: SalienceMetric = "lp",
    *,
    p: int = 2,
    norms: Sequence[nn.Module] | None = None,
    images: int | None = None,
) -> list[Tensor]:
    """Salience of every stage's channels, the same on every process.

    Under `torch.distributed` each process passes the features of its share of the batch and gets the salience of the
    whole batch, however unevenly it is split. That costs one all-reduce for all stages together; entropy needs a
    second one for the range of its bins, and bn_scale none, since the processes hold the same weights.

    Args:
        features: one (N, C_l, H_l, W_l) tensor for every stage.
        metric: how to score the channels.
        p: 1 or 2, for lp.
        norms: one BatchNorm for every stage, for bn_scale (`tffd_zoo.stages.stage_norms` finds them).
        images: score only the first so many images of the whole batch, where each process holds an equal share of it.

    Returns:
        One (C_l,) float32 tensor for every stage.

    Raises:
        ValueError: if the metric is unknown, `p` or `images` cannot be, or bn_scale has not one norm for every stage.
    """
    if metric not in get_args(SalienceMetric):
        raise ValueError(f"unknown salience '{metric}'; choose one of {', '.join(get_args(SalienceMetric))}")
    if metric == "bn_scale":
        if norms is None or len(norms) != len(features):
            raise ValueError(
                f"bn_scale needs one BatchNorm for each of the {len(features)} stages and got "
                f"{'none' if norms is None else len(norms)}: pass norms=stage_norms(model, stages, input_size)"
            )
        return [bn_scale(norm) for norm in norms]
    if images is not None:
        if images < 1:
            raise ValueError(f"images={images} leaves nothing to score; give 1 or more, or None for the whole batch")
        features = _first_of_whole_batch(features, images)

    if metric == "entropy":
        return _stage_entropy(features)
    score = partial(_lp_of_maps, p=p) if metric == "lp" else OF_MAPS[metric]
    return _mean_over_processes([_lean.map_images(score, f).sum(0) for f in features], features[0].shape[0])


def _first_of_whole_batch(features: Sequence[Tensor], images: int) -> list[Tensor]:
    held_before = dist.get_rank() * features[0].shape[0] if _is_distributed() else 0
    return [feature[: max(0, images - held_before)] for feature in features]


def _mean_over_processes(sums: Sequence[Tensor], samples: int) -> list[Tensor]:
    if not _is_distributed():
        return [each / samples for each in sums]
    flat = torch.cat([*sums, sums[0].new_full((1,), samples)])
    dist.all_reduce(flat)
    return list((flat[:-1] / flat[-1]).split([each.numel() for each in sums]))


def _stage_entropy(features: Sequence[Tensor], bins: int = 10) -> list[Tensor]:
    channels = [feature.shape[1] for feature in features]
    features = [_contiguous_float(feature) for feature in features]
    extremes = torch.cat([_extremes(feature) for feature in features], dim=1)
    if _is_distributed():
        dist.all_reduce(extremes, dist.ReduceOp.MAX)
    ranges = extremes.split(channels, dim=1)
    counts = torch.cat(
        [
            _lean.histogram(feature, -minus_low, high, bins)
            for feature, (high, minus_low) in zip(features, ranges, strict=True)
        ]
    )
    if _is_distributed():
        dist.all_reduce(counts)
    return list(_entropy_of_counts(counts).split(channels))


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


# --- scores of single maps: (N, C, H, W) -> (N, C), float32 -----------------------------------------------------------


def _lp_of_maps(features: Tensor, p: int = 2) -> Tensor:
    if p == 1:
        return features.float().abs().sum((2, 3))
    if p == 2:
        return _lean.map_norms(features)
    raise ValueError(f"salience 'lp' knows p=1 and p=2, not p={p}")


def _spread_of_maps(features: Tensor) -> Tensor:
    # mean(F / ||F||) = mean(F) / ||F||: no normalised copy. The bound keeps a map of zeros at 0, as F.normalize does.
    return features.mean((2, 3), dtype=torch.float32) / _lean.map_norms(features).clamp_min(1e-12)


def _rank_of_maps(features: Tensor) -> Tensor:
    return torch.linalg.matrix_rank(features.float()).float()


OF_MAPS: dict[SalienceMetric, Callable[[Tensor], Tensor]] = {
    "lp": _lp_of_maps,
    "spread": _spread_of_maps,
    "hrank": _rank_of_maps,
}
"""The metrics that are the mean of a score that every map of a channel has."""


# --- histograms -------------------------------------------------------------------------------------------------------


def _contiguous_float(features: Tensor) -> Tensor:
    # The passes over a strided map (channels_last) would cost far more than a copy.
    return features.float().contiguous()


def _extremes(features: Tensor) -> Tensor:
    """(N, C, H, W) -> (2, C): every channel's maximum and negated minimum, so that one MAX reduction serves both."""
    if features.shape[0] == 0:  # this process has no part in the images scored
        return features.new_full((2, features.shape[1]), -torch.inf)
    return torch.stack([features.amax((0, 2, 3)), -features.amin((0, 2, 3))])


def histogram(features: Tensor, low: Tensor, high: Tensor, bins: int) -> Tensor:
    """(N, C, H, W) -> (C, bins): how many of a channel's values lie in each of the equal bins from low to high.

    A bin holds its lower edge; the last one its upper edge too. A constant channel lies in the first.

    Raises:
        ValueError: if `bins` is not 1 or more.
    """
    if bins < 1:
        raise ValueError(f"entropy counts in 1 or more bins, not in {bins}")
    values = features.float().transpose(0, 1).flatten(1)
    width = ((high - low) / bins).clamp_min(torch.finfo(torch.float32).tiny)
    index = ((values - low[:, None]) / width[:, None]).clamp(max=bins - 1).long()
    counts = torch.zeros(len(values), bins, dtype=torch.int64, device=values.device)
    return counts.scatter_add_(1, index, torch.ones_like(index))


def _entropy_of_counts(counts: Tensor) -> Tensor:
    """(C, bins) -> (C,)."""
    return torch.special.entr(counts / counts.sum(1, keepdim=True)).sum(1)
