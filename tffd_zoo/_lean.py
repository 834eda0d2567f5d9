"""Fast forms of the losses: the same values and gradients as the plain ones, in fewer passes over the features.

Each names the row of `recipes/results/benchmark` that pays for it. The plain form, in `losses`, `feature_losses` or
`salience`, is the definition; the tests hold these against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .feature_losses import FeatureLoss, Reduction, align
from .hardware import multiplies_tiles
from .losses import DeepChannels, check_pairs, deep_channels_of, distance, salient_count

# --- the features -----------------------------------------------------------------------------------------------------

FEW_CHANNELS = 64
"""Up to so many, a matrix product selects channels faster than indexing does."""
FEW_FOR_TILES = 256
"""The same in bf16 where a CPU multiplies whole tiles of it; bf16 holds the whole numbers of the matrices up to 256."""
HAS_TILES = multiplies_tiles(torch.device("cpu"))


def in_float32(features: Sequence[Tensor]) -> list[Tensor]:
    """The features in float32, copied once for all that reads them, with gradients in the features' own layout.

    A gradient in another one makes all that follows slow: adding it, and the backward pass of the stage's ReLU. Paid
    for by `precision`.
    """
    if torch.compiler.is_compiling():
        return [feature.float() for feature in features]
    copies: list[Tensor] = []
    for feature in features:
        copies.append(_InFloat32.apply(feature))
        differentiate_with(copies[-1], feature)
    return copies


class _InFloat32(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, feature: Tensor) -> Tensor:
        ctx.dtype = feature.dtype
        ctx.layout = torch.channels_last if _lies_in_pixels(feature) else torch.contiguous_format
        return feature.view_as(feature) if feature.dtype == torch.float32 else feature.float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].to(ctx.dtype, memory_format=ctx.layout)


CHUNK = 2**18
"""So many values in float32 stay in the cache of a core from one pass over them to the next."""


def _in_chunks(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The images of `tensors`; of half precision, as many at a time as a CPU keeps in its cache from step to step.

    A copy in float32 is then no larger than a chunk, and neither written to memory nor read from there. Paid for by
    `precision` and `memory`.
    """
    first = tensors[0]
    halves = any(tensor.dtype != torch.float32 for tensor in tensors)
    if torch.compiler.is_compiling() or first.device.type != "cpu" or not halves:
        return [tensors]
    images = max(1, CHUNK // first.shape[1:].numel())
    return list(zip(*(tensor.split(images) for tensor in tensors), strict=True))


def map_images(change: Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
    """`change(features)`, which makes of every image something smaller, in float32."""
    parts = [change(chunk.float()) for (chunk,) in _in_chunks(features)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


READ_HALVES: frozenset[FeatureLoss] = frozenset({"l2", "at"})
"""Losses whose forms here take half precision as it is."""


def _as_read(feature: Tensor) -> Tensor:
    """The feature as l2 reads it: compiled code is faster from a copy in float32, which it does not keep."""
    return feature.float() if torch.compiler.is_compiling() else feature


def _total(squares: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(squares)).sum()


def _squared_norm(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values.float()).square()


def _lies_in_pixels(features: Tensor) -> bool:
    """Whether the channels of a pixel lie side by side."""
    return features.is_contiguous(memory_format=torch.channels_last) and not features.is_contiguous()


def _mixes_fast(features: Tensor) -> bool:
    """Whether `_mix_channels` beats indexing: on a CPU, few channels side by side, products that round no value."""
    if features.device.type != "cpu" or not _lies_in_pixels(features):
        return False
    if HAS_TILES and features.dtype == torch.bfloat16:
        return features.shape[1] <= FEW_FOR_TILES
    return (
        not torch.compiler.is_compiling()  # first: the precision would break the graph
        and features.shape[1] <= FEW_CHANNELS
        and torch.get_float32_matmul_precision() == "highest"
    )


def _mix_channels(features: Tensor, matrix: Tensor) -> Tensor:
    """The channels of every pixel times `matrix`, (C, K); exact where a column of it has a 1, or a 1 and a -1."""
    with torch.autocast(features.device.type, enabled=False):  # it would take the product in half precision
        return (features.permute(0, 2, 3, 1) @ matrix.to(features.dtype)).permute(0, 3, 1, 2)


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
    compare = _distance(loss, reduction)
    total = features[0].new_zeros((), dtype=torch.float32)
    for feature, teacher in zip(features, teachers, strict=True):
        batch, channels, height, width = feature.shape
        redundant = channels - salient_count(channels, ratio)
        if redundant == 0:
            continue
        if loss == "l2":
            count = batch * (redundant * height * width if reduction == "mean" else 1)
            read = feature if _mixes_fast(feature) else _as_read(feature)
            squares: Tensor = _PairedSquaredError.apply(read, teacher, detach_salient)
            differentiate_with(squares, feature)
            total = total + squares / count
        else:
            feature = feature if loss in READ_HALVES else feature.float()
            own = torch.arange(channels, device=teacher.device)
            students = (teacher == own).to(torch.uint8).argsort(stable=True)[:redundant]  # redundant channels first
            salient = _take_channels(feature.detach() if detach_salient else feature, teacher[students])
            total = total + compare(_take_channels(feature, students), salient)
    return total / len(features)


class _PairedSquaredError(torch.autograd.Function):
    """sum (f - f[:, teacher])^2, with the difference recomputed in the backward pass instead of saved.

    A salient channel is its own teacher, so its difference is zero and the plain gradient 2 (f - f[:, teacher]) already
    leaves it alone; without the stop-gradient it also receives minus the sum of its students' gradients.

    Either way makes one tensor of the feature's size and no other: every activation of the network is there meanwhile.
    Of few channels that tensor is a product of the feature with a small matrix D, which takes the teacher's channel and
    subtracts the own: |F D|^2 has the gradient 2 F D D^T, and -2 F D with the stop-gradient. In half precision the
    difference is rounded once, after it was taken, as its gradient would be. Paid for by `steps` (eager), `precision`
    and `memory`.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, teacher: Tensor, detach_salient: bool) -> Tensor:
        ctx.save_for_backward(features, teacher)
        ctx.detach_salient = detach_salient
        chunks = (chunk for (chunk,) in _in_chunks(features))
        if _mixes_fast(features):
            matrix = _differences(teacher)
            return _total(_squared_norm(_mix_channels(chunk, matrix)) for chunk in chunks)
        return _total(_squared_norm(_take_channels(chunk, teacher).sub_(chunk)) for chunk in chunks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        features, teacher = ctx.saved_tensors
        if _mixes_fast(features):
            matrix = _differences(teacher)  # as in the forward pass: a compiler takes that product once
            if not ctx.detach_salient:
                matrix = -(matrix @ matrix.mT)
            return _mix_channels(features, matrix).mul_(-2 * grads[0]), None, None
        grad = _take_channels(features, teacher).sub_(features).mul_(-2 * grads[0])
        if not ctx.detach_salient:
            grad = grad.index_add(1, teacher, -grad)
        return grad, None, None


def _differences(teacher: Tensor) -> Tensor:
    """The matrix D with F D = F[:, teacher] - F."""
    channels = len(teacher)
    return _selection(teacher, channels) - torch.eye(channels, dtype=torch.int32, device=teacher.device)


def _selection(chosen: Tensor, channels: int) -> Tensor:
    """The matrix S with F S = F[:, chosen]: F.one_hot without its look at the values."""
    return (torch.arange(channels, device=chosen.device).unsqueeze(1) == chosen).int()


def _take_channels(features: Tensor, channels: Tensor) -> Tensor:
    """features[:, channels] in the layout of `features`, by what is fastest in it: `aten::gather` of `remains`."""
    if _mixes_fast(features):
        return _mix_channels(features, _selection(channels, features.shape[1]))
    if not _lies_in_pixels(features) or torch.is_grad_enabled():  # the gradient of gather takes longer than it saves
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
    compare = _distance(loss, reduction)
    if loss not in READ_HALVES:
        features = [feature.float() for feature in features]
    if loss in ("sp", "ickd") and deep_channels == "first" and not torch.compiler.is_compiling():
        return _inter_layer_relations(features, pairs, loss)
    total = features[0].new_zeros((), dtype=torch.float32)
    for shallow, feature in enumerate(features):
        ladder = _PoolingLadder(feature)  # one at a time: its rungs need memory
        for deep in sorted(j for i, j in pairs if i == shallow):
            teacher = deep_channels_of(features, shallow, deep, deep_channels, saliences).detach()
            student, teacher = ladder.align(teacher, loss)
            differentiate_with(student, feature)
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
        whole, size = self.rungs[0], (teacher.shape[2], teacher.shape[3])
        if loss not in ("l2", "ab", "at") or (loss != "at" and teacher.shape[1] < whole.shape[1]):
            return align(whole.float(), teacher.float(), loss)  # nothing is pooled, or less than the whole
        rung = next((rung for rung in reversed(self.rungs) if _tiles(rung, size)), None)
        if rung is None:
            return align(whole.float(), teacher.float(), loss)
        if rung.shape[2:] != size:
            # A compiler's own form is as good, but for l2 of half precision, of which it would keep float32.
            own = torch.compiler.is_compiling() and (loss != "l2" or whole.dtype == torch.float32)
            rung = F.adaptive_avg_pool2d(rung.float(), size) if own else mean_pool(rung, size)
            self.rungs.append(rung)
        return rung, teacher if loss == "at" else teacher[:, : rung.shape[1]]


def _tiles(feature: Tensor, size: Sequence[int]) -> bool:
    """Whether windows of one size tile `feature`, one for each place of a map of `size`."""
    return all(whole % part == 0 for whole, part in zip(feature.shape[2:], size, strict=True))


def mean_pool(features: Tensor, size: Sequence[int]) -> Tensor:
    """F.adaptive_avg_pool2d to a `size` that divides the map's, in float32."""
    window = [whole // part for whole, part in zip(features.shape[2:], size, strict=True)]
    pooled: Tensor = _MeanPool.apply(features, window)
    return pooled


class _MeanPool(torch.autograd.Function):
    """F.avg_pool2d, whose own backward pass copies channels_last maps twice and keeps the map for it. Paid for by
    `steps` (eager) and `memory`."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, window: list[int]) -> Tensor:
        ctx.window, ctx.dtype = window, features.dtype
        return map_images(lambda chunk: F.avg_pool2d(chunk, window), features)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        height, width = ctx.window
        grad = (grads[0] / (height * width)).to(ctx.dtype)  # first: there is less of it before it spreads
        return F.interpolate(grad, scale_factor=(height, width), mode="nearest"), None


# --- the distances ----------------------------------------------------------------------------------------------------


def _distance(loss: FeatureLoss, reduction: Reduction) -> Callable[[Tensor, Tensor], Tensor]:
    """`losses.distance` in fast forms, where there is one; of l2 always the mean."""
    plain = distance(loss, reduction)
    if loss == "l2":
        return l2
    if torch.compiler.is_compiling() or loss == "ab":
        return plain
    if loss == "at":
        return lambda student, target: F.mse_loss(_attention(student), _attention(target))
    if loss == "ickd":
        return _ickd
    return lambda student, target: _compare(_relations(student, loss), _relations(target, loss), loss)


def _inter_layer_relations(features: Sequence[Tensor], pairs: Sequence[tuple[int, int]], loss: FeatureLoss) -> Tensor:
    """The inter-layer loss of sp and ickd, which takes the products of a stage once for all pairs that it is in."""
    channels = [feature.shape[1] for feature in features]
    total = features[0].new_zeros(())
    shared = []  # pairs, and the channels that ickd compares
    for shallow, deep in sorted(pairs):
        count = min(channels[shallow], channels[deep])
        student, target = features[shallow], features[deep].detach()
        if loss == "ickd" and _has_few_places(student, target, count):
            total = total + _ickd_by_places(student[:, :count], target[:, :count])
        else:
            shared.append((shallow, deep, count))
    relations = {}
    for stage, feature in enumerate(features):
        most = channels[stage] if loss == "sp" else max((c for i, j, c in shared if stage in (i, j)), default=0)
        if most:
            relations[stage] = _relations(feature if most == channels[stage] else feature[:, :most], loss)
            differentiate_with(relations[stage], feature)
    for shallow, deep, count in shared:
        student, target = relations[shallow], relations[deep].detach()
        if loss == "ickd":
            student, target = student[:, :count, :count], target[:, :count, :count]
        total = total + _compare(student, target, loss)
    return total / len(pairs)


def _relations(feature: Tensor, loss: FeatureLoss) -> Tensor:
    """Inner products of the samples, (N, N), for sp, and of the channels of each sample, (N, C, C), for ickd."""
    if loss == "ickd":
        rows = feature.flatten(2)
    else:  # in whichever order the values lie
        rows = (feature.permute(0, 2, 3, 1) if _lies_in_pixels(feature) else feature).flatten(1)
    with torch.autocast(feature.device.type, enabled=False):
        products: Tensor = _Products.apply(rows)
    return products


def _compare(student: Tensor, target: Tensor, loss: FeatureLoss) -> Tensor:
    """`feature_losses.sp` and `feature_losses.ickd` of such products."""
    student, target = F.normalize(student, dim=-1), F.normalize(target, dim=-1)
    if loss == "sp":
        return F.mse_loss(student, target)
    return F.mse_loss(student, target, reduction="sum") / (student.shape[0] * student.shape[1])


def _ickd(student: Tensor, target: Tensor) -> Tensor:
    """`feature_losses.ickd`."""
    if _has_few_places(student, target, student.shape[1]):
        return _ickd_by_places(student, target)
    return _compare(_relations(student, "ickd"), _relations(target, "ickd"), "ickd")


def _has_few_places(student: Tensor, target: Tensor, channels: int) -> bool:
    return 2 * max(student.shape[2:].numel(), target.shape[2:].numel()) <= channels


def _ickd_by_places(student: Tensor, target: Tensor) -> Tensor:
    """`feature_losses.ickd` of maps with fewer places than channels, without products of all channels.

    Only inner products of rows of G_s = S S^T and G_t = T T^T are needed, for |a - b|^2 = |a|^2 + |b|^2 - 2 a b. Those
    of row c are s_c (S^T T) t_c, with a matrix of places by places. Paid for by `precision`.
    """

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return (a @ (a.mT @ b) * b).sum(-1)

    with torch.autocast(student.device.type, enabled=False):
        s, t = student.flatten(2), target.flatten(2)
        own_s, own_t, both = inner(s, s), inner(t, t), inner(s, t)
    unit_s, unit_t = (own.clamp_min(1e-24).rsqrt() for own in (own_s, own_t))  # the bound of F.normalize, squared
    return (own_s * unit_s**2 + own_t * unit_t**2 - 2 * both * unit_s * unit_t).mean()


class _Products(torch.autograd.Function):
    """X X^T, with the gradient (G + G^T) X in one product and in the layout of X. Paid for by `precision`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return rows @ rows.mT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        both = grads[0] + grads[0].mT
        return (rows.mT @ both).mT if rows.stride(-2) < rows.stride(-1) else both @ rows


def _attention(features: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H W)."""
    mean: Tensor = _MeanSquare.apply(features)
    return F.normalize(mean.flatten(1), dim=1)


class _MeanSquare(torch.autograd.Function):
    """Mean over the channels of f^2, with a gradient in one pass. Paid for by `precision`."""

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        ctx.save_for_backward(features)
        return map_images(lambda chunk: chunk.square().mean(1), features)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (features,) = ctx.saved_tensors
        return features * (grads[0] * (2 / features.shape[1])).unsqueeze(1).to(features.dtype)


def l2(student: Tensor, target: Tensor) -> Tensor:
    """`feature_losses.l2`, its gradient in the features' own layout."""
    squares: Tensor = _SquaredError.apply(_as_read(student), _as_read(target))
    return squares / student.numel()


class _SquaredError(torch.autograd.Function):
    """sum (s - t)^2: F.mse_loss, whose own backward pass gives channels_last features a gradient in NCHW. Paid for by
    `steps` (eager).

    Two features of one type wait for the backward pass as they are: the network keeps them anyway. A student in float32
    beside a target in half precision was pooled for this loss alone, so the difference waits in its place, in the half
    precision that its gradient will have too. Paid for by `memory`.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, target: Tensor) -> Tensor:
        assert not ctx.needs_input_grad[1], "the target teaches and is detached"
        ctx.dtype = student.dtype
        if student.dtype == target.dtype:
            ctx.save_for_backward(student, target)
            return _total(_squared_norm(s - t) for s, t in _in_chunks(student, target))
        kept = torch.empty_like(target)
        ctx.save_for_backward(kept)
        squares = []
        for s, t, place in _in_chunks(student, target, kept):
            difference = s - t
            place.copy_(difference)
            squares.append(_squared_norm(difference))
        return _total(squares)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        saved = ctx.saved_tensors
        difference = saved[0] - saved[1] if len(saved) == 2 else saved[0].to(ctx.dtype)
        return difference.mul_(2 * grads[0]), None


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
    # Over a strided map (channels_last) that reduction is not vectorised. Two passes are, where the second adds up rows
    # of channels, one for every place.
    return features.permute(0, 2, 3, 1).flatten(1, 2).square().sum(1).sqrt()


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
