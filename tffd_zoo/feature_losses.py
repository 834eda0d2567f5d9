"""Feature losses D(student, target): how far one feature map is from another.

Each takes two tensors of shape (N, C, H, W) and gives a 0-dim float32 tensor, computed in float32 also under autocast.
Gradients flow into both arguments where they carry one: the caller detaches the one that teaches. `align` brings two
features of different shapes to those that a loss can compare.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["FEATURE_LOSSES", "FeatureLoss", "ab", "align", "at", "check_pre_activation", "ickd", "l2", "sp"]

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
    squares: Tensor = _SquaredError.apply(student.float(), target.float())
    return squares / (student.numel() if reduction == "mean" else student.shape[0])


class _SquaredError(torch.autograd.Function):
    """sum (s - t)^2: F.mse_loss, whose own backward pass gives channels_last features a gradient in NCHW."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(student, target)
        return F.mse_loss(student, target, reduction="sum")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        student, target = ctx.saved_tensors
        grad = (student - target).mul_(2 * grads[0])
        return grad, -grad if ctx.needs_input_grad[1] else None


def ab(student: Tensor, target: Tensor, margin: float = 2.0) -> Tensor:
    """Activation boundary: every student neuron on the target's side of zero, clear of it by a margin m.

    The mean over N, C, H and W of (s + m)^2 where t <= 0 and s > -m, (s - m)^2 where t > 0 and s < m, 0 elsewhere.

    Both features come from *before* the activation; behind a ReLU no neuron is on the far side. Looking for that here
    would make the device wait at every step: call `check_pre_activation` once instead.

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


FEATURE_LOSSES: dict[FeatureLoss, Callable[..., Tensor]] = {"l2": l2, "ab": ab, "at": at, "sp": sp, "ickd": ickd}

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
        student, target = _pool(student, size), _pool(target, size)
    return student, target


@torch.no_grad()
def check_pre_activation(features: Tensor) -> None:
    """Refuse, for the loss `ab`, a feature that has been through a ReLU. Waits for the device: not for every step.

    Not for the first step either where a residual block ends in a scale that starts at zero, as timm's do: until the
    first update such a block adds nothing to its non-negative input, and nothing is negative before its last ReLU.

    Raises:
        ValueError: if no value is negative.
    """
    if not bool((features < 0).any()):
        raise ValueError(
            f"ab compares features before the activation, and this one of shape {tuple(features.shape)} has no "
            "negative value; tap the input of the stage's last activation (tffd_zoo.stages.stage_activations finds "
            "it), or choose l2, at, sp or ickd"
        )


def _pool(features: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = features.shape[2:]
    if (height, width) == size:
        return features
    if height % size[0] == 0 and width % size[1] == 0:
        window = (height // size[0], width // size[1])
        if torch.compiler.is_compiling():  # a compiler writes the backward pass of its own, in less memory than ours
            return F.avg_pool2d(features, window)
        pooled: Tensor = _MeanPool.apply(features, window)
        return pooled
    return F.adaptive_avg_pool2d(features, size)


class _MeanPool(torch.autograd.Function):
    """Mean over windows that tile the map: F.avg_pool2d, whose own backward pass copies channels_last maps twice."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, window: tuple[int, int]) -> Tensor:
        ctx.window = window
        return F.avg_pool2d(features, window)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        height, width = ctx.window
        return F.interpolate(grads[0] / (height * width), scale_factor=(height, width), mode="nearest"), None


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
