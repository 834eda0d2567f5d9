"""Fast forms of the losses: the same values and gradients as the plain ones, in fewer passes over the features.

Each names the row of `recipes/results/benchmark` that pays for it. The plain form, in `losses`, `feature_losses` or
`salience`, is the definition; the tests hold these against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .feature_losses import FeatureLoss, Reduction, align
from .losses import DeepChannels, check_pairs, deep_channels_of, distance, salient_count

# --- within a stage ---------------------------------------------------------------------------------------------------


def intra_layer_loss(
    features: Sequence[Tensor],
    teachers: Sequence[Tensor],
    *,
    ratio: float,
    loss: FeatureLoss = "l2",
    detach_salient: bool = True,
    reduction: Reduction = "mean",
) -> Tensor:
    """`losses.intra_layer_loss` without asking the device how many channels are redundant: `ratio` tells.

    For l2 every channel is compared with its teacher; the salient ones are their own and add nothing.
    """
    compare = distance(loss, reduction)
    total = features[0].new_zeros((), dtype=torch.float32)
    for feature, teacher in zip(features, teachers, strict=True):
        batch, channels, height, width = feature.shape
        redundant = channels - salient_count(channels, ratio)
        if redundant == 0:
            continue
        stage, feature = feature, feature.float()
        if loss == "l2":
            count = batch * (redundant * height * width if reduction == "mean" else 1)
            squares: Tensor = _PairedSquaredError.apply(feature, teacher, detach_salient)
            differentiate_with(squares, stage)
            total = total + squares / count
        else:
            own = torch.arange(channels, device=teacher.device)
            students = (teacher == own).to(torch.uint8).argsort(stable=True)[:redundant]  # redundant channels first
            salient = feature.index_select(1, teacher[students])
            total = total + compare(feature.index_select(1, students), salient.detach() if detach_salient else salient)
    return total / len(features)


class _PairedSquaredError(torch.autograd.Function):
    """sum (f - f[:, teacher])^2, with the difference recomputed in the backward pass instead of saved.

    A salient channel is its own teacher, so its difference is zero and the plain gradient 2 (f - f[:, teacher]) already
    leaves it alone; without the stop-gradient it also receives minus the sum of its students' gradients.

    Either way makes one tensor of the feature's size and no other: every activation of the network is there meanwhile.
    Paid for by `steps` (eager) and `memory`.
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


def _take_channels(features: Tensor, channels: Tensor) -> Tensor:
    """features[:, channels] in the layout of `features`, by what is fastest in it: `aten::gather` of `remains`."""
    if features.is_contiguous() or not features.is_contiguous(memory_format=torch.channels_last):
        return features.index_select(1, channels)
    # index_select would copy to NCHW first, and takes twice as long where the channels lie side by side.
    pixels = features.permute(0, 2, 3, 1)
    return pixels.gather(3, channels.expand(*pixels.shape[:3], -1)).permute(0, 3, 1, 2)


# --- between stages ---------------------------------------------------------------------------------------------------


def inter_layer_loss(
    features: Sequence[Tensor],
    pairs: Sequence[tuple[int, int]],
    *,
    loss: FeatureLoss = "l2",
    reduction: Reduction = "mean",
    deep_channels: DeepChannels = "first",
    saliences: Sequence[Tensor] | None = None,
) -> Tensor:
    """`losses.inter_layer_loss`, where a shallow map that was pooled for one deep stage is pooled on for the next."""
    check_pairs(pairs)
    compare = l2 if loss == "l2" else distance(loss, reduction)
    features = [feature.float() for feature in features]
    total = features[0].new_zeros(())
    ladders = {shallow: _PoolingLadder(features[shallow]) for shallow, _ in pairs}
    for shallow, deep in sorted(pairs):
        teacher = deep_channels_of(features, shallow, deep, deep_channels, saliences).detach()
        student, teacher = ladders[shallow].align(teacher, loss)
        differentiate_with(student, features[shallow])
        term = compare(student, teacher)
        total = total + (term * student[0].numel() if reduction == "sum" else term)
    return total / len(pairs)


class _PoolingLadder:
    """A shallow map, and the smaller ones that it was pooled to: 32 -> 8 is taken as 16 -> 8 once 16 is there.

    That gives the same means only where windows tile windows. 14 -> 7 -> 4 would not be 14 -> 4, since 7 is no multiple
    of 4, so a rung serves for a size that divides its own. Paid for by `aten::avg_pool2d` of `remains`.
    """

    def __init__(self, feature: Tensor) -> None:
        self.rungs = [feature]

    def align(self, teacher: Tensor, loss: FeatureLoss) -> tuple[Tensor, Tensor]:
        """`feature_losses.align` of the shallow map and `teacher`."""
        whole, size = self.rungs[0], teacher.shape[2:]
        if loss not in ("l2", "ab", "at") or (loss != "at" and teacher.shape[1] < whole.shape[1]):
            return align(whole, teacher, loss)  # nothing is pooled, or less than the whole
        rung = next((rung for rung in reversed(self.rungs) if _tiles(rung, size)), None)
        if rung is None:
            return align(whole, teacher, loss)
        if rung.shape[2:] != size:
            rung = mean_pool(rung, size)
            self.rungs.append(rung)
        return rung, teacher if loss == "at" else teacher[:, : rung.shape[1]]


def _tiles(feature: Tensor, size: Sequence[int]) -> bool:
    """Whether windows of one size tile `feature`, one for each place of a map of `size`."""
    return all(whole % part == 0 for whole, part in zip(feature.shape[2:], size, strict=True))


def mean_pool(features: Tensor, size: Sequence[int]) -> Tensor:
    """F.adaptive_avg_pool2d to a `size` that divides the map's."""
    window = tuple(whole // part for whole, part in zip(features.shape[2:], size, strict=True))
    if torch.compiler.is_compiling():  # a compiler writes the backward pass of its own, in less memory than ours
        return F.avg_pool2d(features, window)
    pooled: Tensor = _MeanPool.apply(features, window)
    return pooled


class _MeanPool(torch.autograd.Function):
    """F.avg_pool2d, whose own backward pass copies channels_last maps twice. Paid for by `steps` (eager)."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, window: tuple[int, int]) -> Tensor:
        ctx.window = window
        return F.avg_pool2d(features, window)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        height, width = ctx.window
        return F.interpolate(grads[0] / (height * width), scale_factor=(height, width), mode="nearest"), None


def l2(student: Tensor, target: Tensor) -> Tensor:
    """`feature_losses.l2`, its gradient in the features' own layout."""
    squares: Tensor = _SquaredError.apply(student.float(), target.float())
    return squares / student.numel()


class _SquaredError(torch.autograd.Function):
    """sum (s - t)^2: F.mse_loss, whose own backward pass gives channels_last features a gradient in NCHW. Paid for by
    `steps` (eager)."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(student, target)
        return F.mse_loss(student, target, reduction="sum")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        student, target = ctx.saved_tensors
        grad = (student - target).mul_(2 * grads[0])
        return grad, -grad if ctx.needs_input_grad[1] else None


# --- the order of the backward pass -----------------------------------------------------------------------------------


def differentiate_with(result: Tensor, feature: Tensor) -> None:
    """Let the backward pass come to `result` when it comes to `feature`, and not before all of the network.

    Autograd takes the newest operation that is ready. Made after the forward pass, a loss would have the gradients of
    all stages waiting in memory, just when that is fullest; made when the feature was, it adds one stage's at a time.
    Paid for by `memory`.
    """
    if torch.compiler.is_compiling():  # a compiler orders the backward pass by itself, and knows no grad_fn
        return
    made_by: Any = result.grad_fn  # the method is in no type stub
    if made_by is not None and feature.grad_fn is not None:
        made_by._set_sequence_nr(feature.grad_fn._sequence_nr())


# --- salience ---------------------------------------------------------------------------------------------------------


def map_norms(features: Tensor) -> Tensor:
    """l2 norm of every map in float32, (N, C, H, W) -> (N, C). Paid for by `steps` (eager)."""
    features = features.float()
    if features.is_contiguous():
        return torch.linalg.vector_norm(features, dim=(2, 3))
    # Over a strided map (channels_last) that reduction is not vectorised; two passes take half its time.
    return features.square().sum((2, 3)).sqrt()


_COUNTER_BITS = 6
_COUNTER_MAX = 2**_COUNTER_BITS - 1


def histogram(features: Tensor, low: Tensor, high: Tensor, bins: int) -> Tensor:
    """`salience.histogram`, vectorised: no sorting, no scattering, no wait for the device.

    The bins of one place in the map share an int64, six bits for each. Adding up 63 samples then counts in all bins at
    once and cannot overflow. Paid for by `salience`, entropy.
    """
    assert 1 <= bins <= 64 // _COUNTER_BITS, "an int64 holds ten counters of six bits"
    low, high = low.view(1, -1, 1, 1), high.view(1, -1, 1, 1)
    width = ((high - low) / bins).clamp_min(torch.finfo(torch.float32).tiny)  # a constant channel: all in bin 0
    one = torch.ones((), dtype=torch.int64, device=features.device)
    packed = []
    for samples in features.split(_COUNTER_MAX):
        index = torch.sub(samples, low).div_(width).clamp_(max=bins - 1).long()
        packed.append(torch.bitwise_left_shift(one, index.mul_(_COUNTER_BITS), out=index).sum(0))
    shifts = torch.arange(bins, device=features.device) * _COUNTER_BITS
    counts = (torch.stack(packed).unsqueeze(-1) >> shifts) & _COUNTER_MAX
    return counts.sum((0, 2, 3))
