"""Salience: how much each channel of a feature says, the score by which Tf-FD tells teachers from pupils.

Every metric maps features of shape (N, C, H, W) to one score per channel, shape (C,), in float32 and without gradient; a
higher score is a more salient channel. `stage_salience` scores all stages of a model at once and makes the processes of a
distributed run agree. Scores may tie (dead channels do): ordering them is the pairing's job, which is stable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["SalienceMetric", "bn_scale", "entropy", "hrank", "lp", "spread", "stage_salience"]

SalienceMetric = Literal["lp", "spread", "entropy", "bn_scale", "hrank"]


@torch.no_grad()
def lp(features: Tensor, p: int = 2) -> Tensor:
    """Mean length of a channel's maps: s_c = mean_n (sum_hw |F_nchw|^p)^(1/p).

    Raises:
        ValueError: if ``p`` is not 1 or 2.
    """
    return _sum_lp(features, p) / features.shape[0]


@torch.no_grad()
def spread(features: Tensor) -> Tensor:
    """Mean value of a channel's maps, each scaled to unit l2 length: s_c = mean_nhw (F_nchw / ||F_nc||_2).

    For the non-negative maps that follow a ReLU this is high where activation is spread over the map and low where it is
    concentrated, whatever its size. A map of zeros counts 0. It is what the reference code of Tf-FD ranks by.
    """
    return _sum_spread(features) / features.shape[0]


@torch.no_grad()
def entropy(features: Tensor, bins: int = 10) -> Tensor:
    """Entropy in nats of a channel's activations, in ``bins`` equal bins from their minimum to their maximum.

    H_c = -sum_b p_b ln p_b, with p_b the share of the channel's N H W activations in bin b; a constant channel has 0.
    Adapted from Meng et al., Filter Grafting for Deep Neural Networks, CVPR 2020, which bins weights.
    """
    low, high = features.amin((0, 2, 3)).float(), features.amax((0, 2, 3)).float()
    return _entropy_of(_histogram(features, low, high, bins))


@torch.no_grad()
def hrank(features: Tensor) -> Tensor:
    """Mean matrix rank of a channel's maps: s_c = mean_n rank(F_nc).

    The rank is exact, as `torch.linalg.matrix_rank` counts it, by one singular value decomposition per map: dear, so
    score a few images (``images`` of `stage_salience`) every so many steps.

    Source: Lin et al., HRank: Filter Pruning using High-Rank Feature Map, CVPR 2020.
    """
    return _sum_hrank(features) / features.shape[0]


@torch.no_grad()
def bn_scale(norm: nn.Module) -> Tensor:
    """Size of the scale in the BatchNorm that produces the feature: s_c = |gamma_c|.

    timm starts the last gamma of a residual block at zero, so all channels tie until the first update; a stable order
    then takes them as they come, channel 0 first.

    Source: Liu et al., Learning Efficient Convolutional Networks through Network Slimming, ICCV 2017.

    Raises:
        ValueError: if ``norm`` has no scale.
    """
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"bn_scale needs a normalisation layer with a scale (affine=True), got {norm}.")
    return weight.detach().float().abs()


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

    Under `torch.distributed` each process passes the features of its own share of the batch and gets the salience of the
    whole, however unevenly it is split, at the cost of one all-reduce for all stages together (entropy needs a second,
    for the range of its bins; bn_scale needs none, since processes hold equal weights).

    Args:
        features: one (N, C_l, H_l, W_l) tensor per stage.
        metric: which metric scores the channels.
        p: the norm of ``lp``, 1 or 2.
        norms: one BatchNorm per stage, for ``bn_scale``: see `tffd_zoo.stages.stage_norms`.
        images: score only the first ``images`` samples of each process; all by default.

    Returns:
        One (C_l,) float32 tensor per stage.

    Raises:
        ValueError: for an unknown metric, an ``images`` below 1, or ``bn_scale`` without one norm per stage.
    """
    if metric not in get_args(SalienceMetric):
        raise ValueError(f"{metric!r} is not a salience metric: choose one of {', '.join(get_args(SalienceMetric))}.")
    if metric == "bn_scale":
        if norms is None or len(norms) != len(features):
            raise ValueError(
                f"bn_scale needs one BatchNorm per stage, got {0 if norms is None else len(norms)} for {len(features)} "
                "stages: pass norms=tffd_zoo.stages.stage_norms(model, stages, input_size)."
            )
        return [bn_scale(norm) for norm in norms]
    if images is not None:
        if images < 1:
            raise ValueError(f"images={images} leaves nothing to score: give 1 or more, or None for the whole batch.")
        features = [feature[:images] for feature in features]

    if metric == "entropy":
        return _stage_entropy(features)
    if metric == "lp":
        sums = [_sum_lp(feature, p) for feature in features]
    elif metric == "spread":
        sums = [_sum_spread(feature) for feature in features]
    else:
        sums = [_sum_hrank(feature) for feature in features]
    return _mean_over_processes(sums, features[0].shape[0])


def _sum_lp(features: Tensor, p: int) -> Tensor:
    if p not in (1, 2):
        raise ValueError(f"lp salience is defined for p = 1 and p = 2, got p={p}.")
    return torch.linalg.vector_norm(features, p, dim=(2, 3), dtype=torch.float32).sum(0)


def _sum_spread(features: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(features, 2, dim=(2, 3), dtype=torch.float32)
    # The scaled map is never formed: its mean is the map's mean over the map's length (1e-12 guards a map of zeros).
    return (features.mean((2, 3), dtype=torch.float32) / length.clamp(min=1e-12)).sum(0)


def _sum_hrank(features: Tensor) -> Tensor:
    return torch.linalg.matrix_rank(features.float()).sum(0, dtype=torch.float32)


def _histogram(features: Tensor, low: Tensor, high: Tensor, bins: int) -> Tensor:
    """(N, C, H, W) -> (C, bins): how many of a channel's values fall into each equal bin from low to high."""
    width = ((high - low) / bins).clamp(min=torch.finfo(torch.float32).tiny)
    shape = (1, -1, 1, 1)
    bin_index = ((features.float() - low.view(shape)) / width.view(shape)).clamp(0, bins - 1).long()
    channel_offset = torch.arange(low.numel(), device=features.device).mul(bins).view(shape)
    counts = torch.bincount((bin_index + channel_offset).flatten(), minlength=low.numel() * bins)
    return counts.view(-1, bins)


def _entropy_of(counts: Tensor) -> Tensor:
    share = counts.float() / counts.sum(1, keepdim=True)
    return torch.special.entr(share).sum(1)


def _stage_entropy(features: Sequence[Tensor], bins: int = 10) -> list[Tensor]:
    channels = [feature.shape[1] for feature in features]
    extremes = torch.cat([e for f in features for e in (f.amax((0, 2, 3)).float(), -f.amin((0, 2, 3)).float())])
    if _distributed():
        dist.all_reduce(extremes, dist.ReduceOp.MAX)
    ranges = iter(extremes.split([c for c in channels for _ in range(2)]))
    counts = torch.cat([_histogram(f, high=next(ranges), low=-next(ranges), bins=bins) for f in features])
    if _distributed():
        dist.all_reduce(counts)
    return [_entropy_of(c) for c in counts.split(channels)]


def _mean_over_processes(sums: Sequence[Tensor], samples: int) -> list[Tensor]:
    if not _distributed():
        return [s / samples for s in sums]
    flat = torch.cat([*sums, sums[0].new_tensor([samples])])
    dist.all_reduce(flat)
    return list((flat[:-1] / flat[-1]).split([s.numel() for s in sums]))


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
