"""Feature losses D(student, target): how far one feature map is from another.

Each takes two float tensors of shape (N, C, H, W) and returns a 0-dim float32 tensor. The gradient flows into whichever
argument carries one; the caller detaches the side that teaches. N is the batch size, and every loss is a mean over N, so
its size does not depend on the batch.

Where student and target differ in shape, `align` brings them to the shapes that a loss needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["FEATURE_LOSSES", "FeatureLoss", "ab", "align", "at", "check_pre_activation", "ickd", "l2", "sp"]

FeatureLoss = Literal["l2", "ab", "at", "sp", "ickd"]
Reduction = Literal["mean", "sum"]


def l2(student: Tensor, target: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Squared error: the mean of (s - t)^2, over N, C, H and W.

    ``reduction="sum"`` sums over C, H, W and takes the mean over N only.

    Raises:
        ValueError: if the shapes differ, or ``reduction`` is neither.
    """
    _require_same_shape("l2", student, target)
    if reduction == "mean":
        return F.mse_loss(student.float(), target.float())
    if reduction == "sum":
        return F.mse_loss(student.float(), target.float(), reduction="sum") / student.shape[0]
    raise ValueError(f"reduction={reduction!r} is not known: choose 'mean' or 'sum'.")


def ab(student: Tensor, target: Tensor, margin: float = 2.0) -> Tensor:
    """Activation boundary: the student's pre-activation should lie on the target's side of zero, by a margin m.

    The mean over N, C, H and W of

        (s + m)^2 where t <= 0 and s > -m,   (s - m)^2 where t > 0 and s <= m,   0 elsewhere.

    Both arguments are *pre*-activation features: after a ReLU nothing is negative, and the loss would only push numbers
    up. That is not looked at here, since it would stop the device at every step; call `check_pre_activation` once.

    Source: Heo et al., Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons, AAAI 2019.

    Raises:
        ValueError: if the shapes differ.
    """
    _require_same_shape("ab", student, target)
    student, target = student.float(), target.float()
    # The squared hinge on the target's side: relu(m + s) for an inactive target neuron, relu(m - s) for an active one.
    return F.relu(margin + torch.where(target > 0, -student, student)).square().mean()


def at(student: Tensor, target: Tensor) -> Tensor:
    """Attention transfer: the same places of the image should be active.

    q = vec(mean_c F^2) / ||vec(mean_c F^2)||_2 for each sample, and the loss is the mean over N, H and W of
    (q_s - q_t)^2. The channel counts may differ.

    Source: Zagoruyko and Komodakis, Paying More Attention to Attention, ICLR 2017.

    Raises:
        ValueError: if batch size, height or width differ.
    """
    if student.shape[0] != target.shape[0] or student.shape[2:] != target.shape[2:]:
        raise ValueError(
            f"at compares maps of one size, got {tuple(student.shape)} and {tuple(target.shape)}: "
            "pool the larger one first, as `align(student, target, 'at')` does."
        )
    return F.mse_loss(_attention(student), _attention(target))


def sp(student: Tensor, target: Tensor) -> Tensor:
    """Similarity preservation: samples alike in one feature should be alike in the other.

    With X of shape (N, C H W) and G = X X^T, rows of G normalised to unit l2 length, the loss is
    ||G_s - G_t||_F^2 / N^2. Only the batch sizes have to agree.

    Source: Tung and Mori, Similarity-Preserving Knowledge Distillation, ICCV 2019.

    Raises:
        ValueError: if the batch sizes differ.
    """
    if student.shape[0] != target.shape[0]:
        raise ValueError(
            f"sp compares the same samples in both features, got batches of {student.shape[0]} and {target.shape[0]}."
        )
    difference = _normalised_gram(student.flatten(1)) - _normalised_gram(target.flatten(1))
    return difference.square().mean()


def ickd(student: Tensor, target: Tensor) -> Tensor:
    """Inter-channel correlation: channels alike in one feature should be alike in the other.

    For each sample, with X of shape (C, H W) and G = X X^T, rows of G normalised to unit l2 length, the loss is
    the sum of (G_s - G_t)^2 over N, C and C, divided by N C. The spatial sizes may differ. No projector is learned.

    Source: Liu et al., Exploring Inter-Channel Correlation for Diversity-Preserved Knowledge Distillation, ICCV 2021.

    Raises:
        ValueError: if batch size or channel count differ.
    """
    if student.shape[:2] != target.shape[:2]:
        raise ValueError(
            f"ickd compares the same channels in both features, got {tuple(student.shape)} and {tuple(target.shape)}: "
            "keep the first min(C) channels of each, as `align(student, target, 'ickd')` does."
        )
    difference = _normalised_gram(student.flatten(2)) - _normalised_gram(target.flatten(2))
    return difference.square().sum(2).mean()


FEATURE_LOSSES: dict[FeatureLoss, Callable[..., Tensor]] = {"l2": l2, "ab": ab, "at": at, "sp": sp, "ickd": ickd}

# What each loss asks of two features of different shapes: equal spatial size, equal channel count.
_POOLS: frozenset[str] = frozenset({"l2", "ab", "at"})
_CROPS: frozenset[str] = frozenset({"l2", "ab", "ickd"})


def align(student: Tensor, target: Tensor, loss: FeatureLoss) -> tuple[Tensor, Tensor]:
    """Bring two features to shapes that ``loss`` can compare, touching only what it needs.

    ========  ====================  =====================
    loss      pooled to one size    cropped to min(C)
    ========  ====================  =====================
    l2, ab    yes                   yes
    at        yes                   no
    ickd      no                    yes
    sp        no                    no
    ========  ====================  =====================

    Pooling is adaptive average pooling of the larger map to the size of the smaller one; cropping keeps the first
    min(C_student, C_target) channels.

    Raises:
        ValueError: if ``loss`` is not one of `FEATURE_LOSSES`.
    """
    if loss not in FEATURE_LOSSES:
        raise ValueError(f"{loss!r} is not a feature loss: choose one of {', '.join(FEATURE_LOSSES)}.")
    if loss in _CROPS:  # before pooling: fewer channels to pool
        channels = min(student.shape[1], target.shape[1])
        student, target = student[:, :channels], target[:, :channels]
    if loss in _POOLS:
        size = (min(student.shape[2], target.shape[2]), min(student.shape[3], target.shape[3]))
        student, target = _pool_to(student, size), _pool_to(target, size)
    return student, target


@torch.no_grad()
def check_pre_activation(features: Tensor) -> None:
    """Refuse features that have been through a ReLU, for the loss `ab`. Reads the device: call it once, not every step.

    Raises:
        ValueError: if no value is negative.
    """
    if not bool((features < 0).any()):
        raise ValueError(
            f"ab needs pre-activation features, but no value of this {tuple(features.shape)} feature is negative: it has "
            "been through a ReLU. Tap the input of the stage's last activation (tffd_zoo.stages.stage_activations), or "
            "choose another feature loss: l2, at, sp, ickd."
        )


def _pool_to(features: Tensor, size: tuple[int, int]) -> Tensor:
    return features if tuple(features.shape[2:]) == size else F.adaptive_avg_pool2d(features, size)


def _attention(features: Tensor) -> Tensor:
    return F.normalize(features.float().square().mean(1).flatten(1), dim=1)


def _normalised_gram(rows: Tensor) -> Tensor:
    """(..., R, D) -> (..., R, R): the inner products of all rows, each row of them of unit length; in float32."""
    with torch.autocast(rows.device.type, enabled=False):  # a matmul would run in half precision
        rows = rows.float()
        return F.normalize(rows @ rows.mT, dim=-1)


def _require_same_shape(loss: str, student: Tensor, target: Tensor) -> None:
    if student.shape != target.shape:
        raise ValueError(
            f"{loss} compares features of one shape, got {tuple(student.shape)} and {tuple(target.shape)}: "
            f"use `align(student, target, '{loss}')` first."
        )
