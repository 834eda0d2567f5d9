"""Feature losses D(student, target): how far one feature map is from another.

Each takes two tensors of shape (N, C, H, W) and gives a 0-dim float32 tensor, computed in float32 also under autocast.
Gradients flow into both arguments where they carry one: the caller detaches the one that teaches. `align` brings two
features of different shapes to those that a loss can compare.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["FEATURE_LOSSES", "FeatureLoss", "Reduction", "ab", "align", "at", "ickd", "l2", "sp"]

FeatureLoss = Literal["l2", "ab", "at", "sp", "ickd"]
Reduction = Literal["mean", "sum"]


def l2(student: Tensor, target: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Squared error (s - t)^2.

    Args:
        student: the feature that learns.
        target: the feature that teaches.
        reduction: "mean" over N, C, H and W, or "sum" over C, H and W and mean over N.

    Raises:
        ValueError: if the shapes differ or the reduction is unknown.
    """
    _require_same_shape("l2", student, target)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"unknown reduction '{reduction}'; choose 'mean' or 'sum'")
    error = F.mse_loss(student.float(), target.float(), reduction=reduction)
    return error if reduction == "mean" else error / student.shape[0]


def ab(student: Tensor, target: Tensor, margin: float = 2.0) -> Tensor:
    """Activation boundary: every student neuron on the target's side of zero, clear of it by a margin m.

    The mean over N, C, H and W of (s + m)^2 where t <= 0 and s > -m, (s - m)^2 where t > 0 and s < m, 0 elsewhere.

    Both features come from *before* the activation: behind a ReLU no neuron is on the far side of zero.
    `tffd_zoo.stages.stage_activations` finds where to take them.

    Source: Heo et al., "Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons", AAAI
    2019.

    Raises:
        ValueError: if the shapes differ.
    """
    _require_same_shape("ab", student, target)
    student = student.float()
    # Seen from the target's side of zero both cases are one squared hinge.
    return F.relu(margin + torch.where(target > 0, -student, student)).square().mean()


def at(student: Tensor, target: Tensor) -> Tensor:
    """Attention transfer: the mean over N, H and W of (q_s - q_t)^2.

    q = a / ||a||_2 for each sample, with a = mean_c F^2 its attention map; C may differ.

    Source: Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017.

    Raises:
        ValueError: if N, H or W differ.
    """
    if student.shape[0] != target.shape[0] or student.shape[2:] != target.shape[2:]:
        raise ValueError(_shapes_differ("at", "maps of one size", student, target))
    return F.mse_loss(_attention(student), _attention(target))


def sp(student: Tensor, target: Tensor) -> Tensor:
    """Similarity preservation: ||G_s - G_t||_F^2 / N^2, so that samples alike in the target are alike in the student.

    G = X X^T for X of shape (N, C H W), with every row of G scaled to unit l2 norm; C, H and W may differ.

    Source: Tung and Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019.

    Raises:
        ValueError: if N differs.
    """
    if student.shape[0] != target.shape[0]:
        raise ValueError(
            f"sp compares one batch with itself and got features of {student.shape[0]} and {target.shape[0]} samples; "
            "pass two features of the same images"
        )
    return F.mse_loss(_similarity(student.flatten(1)), _similarity(target.flatten(1)))


def ickd(student: Tensor, target: Tensor) -> Tensor:
    """Inter-channel correlation: sum (G_s - G_t)^2 / (N C), so that channels correlate as they do in the target.

    G = X X^T for X of shape (C, H W) of each sample, with every row of G scaled to unit l2 norm; H and W may differ.
    The paper's learned projector is left out.

    Source: Liu et al., "Exploring Inter-Channel Correlation for Diversity-Preserved Knowledge Distillation", ICCV 2021.

    Raises:
        ValueError: if N or C differ.
    """
    if student.shape[:2] != target.shape[:2]:
        raise ValueError(_shapes_differ("ickd", "features with as many channels", student, target))
    error = F.mse_loss(_similarity(student.flatten(2)), _similarity(target.flatten(2)), reduction="sum")
    return error / (student.shape[0] * student.shape[1])


FEATURE_LOSSES: dict[FeatureLoss, Callable[..., Tensor]] = {
    "l2": l2,
    "ab": ab,
    "at": at,
    "sp": sp,
    "ickd": ickd,
}

# What each loss needs of two features that differ in shape.
_SAME_SIZE = frozenset({"l2", "ab", "at"})
_SAME_CHANNELS = frozenset({"l2", "ab", "ickd"})


def align(student: Tensor, target: Tensor, loss: FeatureLoss) -> tuple[Tensor, Tensor]:
    """Bring two features to shapes that a loss can compare, changing no more than it needs.

    Channels are cropped to the first min(C_student, C_target) for l2, ab and ickd. The larger map is pooled to the size
    of the smaller one, by adaptive average pooling, for l2, ab and at. sp takes any two features as they are.

    Raises:
        ValueError: if the loss is unknown.
    """
    if loss not in FEATURE_LOSSES:
        raise ValueError(f"unknown feature loss '{loss}'; choose one of {', '.join(FEATURE_LOSSES)}")
    if loss in _SAME_CHANNELS:  # first, so that no channel is pooled in vain
        channels = min(student.shape[1], target.shape[1])
        # A slice of all channels changes nothing, but its gradient would be written into zeros of the full size.
        student, target = (each if each.shape[1] == channels else each[:, :channels] for each in (student, target))
    if loss in _SAME_SIZE:
        size = (min(student.shape[2], target.shape[2]), min(student.shape[3], target.shape[3]))
        student, target = (
            each if each.shape[2:] == size else F.adaptive_avg_pool2d(each, size) for each in (student, target)
        )
    return student, target


def _attention(features: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H W)."""
    return F.normalize(features.float().square().mean(1).flatten(1), dim=1)


def _similarity(rows: Tensor) -> Tensor:
    """(..., R, D) -> (..., R, R): inner products of all rows, scaled to unit l2 norm along the last dimension."""
    with torch.autocast(rows.device.type, enabled=False):  # it would take the product in half precision
        rows = rows.float()
        return F.normalize(rows @ rows.mT, dim=-1)


def _require_same_shape(loss: str, student: Tensor, target: Tensor) -> None:
    if student.shape != target.shape:
        raise ValueError(_shapes_differ(loss, "features of one shape", student, target))


def _shapes_differ(loss: str, needed: str, student: Tensor, target: Tensor) -> str:
    return (
        f"{loss} compares {needed} and got {tuple(student.shape)} and {tuple(target.shape)}; "
        f"pass them through align(student, target, '{loss}') first"
    )
