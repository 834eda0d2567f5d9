"""Convolutions on maps smaller than their kernel: the taps that only ever meet padding are left out."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import conv2d


def skip_padded_taps(model: nn.Module) -> None:
    """Let the convolutions of `model` multiply no more taps of their kernels than meet the map, here and in copies.

    At 32 px the last stage of a ResNet-18 is a map of 1x1, on which a 3x3 kernel has one tap; the eight others multiply
    zeros, in each pass. Outputs are the same, and so are gradients: zero for a tap that meets nothing. Weights keep
    their names and shapes. `taps` of recipes/results/benchmark has what it saves.

    Only `nn.Conv2d` itself is changed, with padding by a number of zeros; subclasses may pad in their own way.
    """
    for module in model.modules():
        if type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            module.__class__ = SmallMapConv2d


class SmallMapConv2d(nn.Conv2d):
    """A Conv2d, padded by zeros, that slices its kernel where the map is small."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        (rows, top), (columns, left) = map(
            met_taps, input.shape[-2:], self.kernel_size, self.stride, map(int, self.padding), self.dilation
        )
        if (len(rows), len(columns)) == self.kernel_size:
            return super()._conv_forward(input, weight, bias)
        weight = weight[..., rows.start : rows.stop, columns.start : columns.stop]
        return conv2d(input, weight, bias, self.stride, (top, left), self.dilation, self.groups)


def met_taps(size: int, kernel: int, stride: int, padding: int, dilation: int) -> tuple[range, int]:
    """The taps of a kernel that may meet a map, along one side, and the padding that a kernel of these alone needs.

    Output o reads position o * stride - padding + t * dilation by tap t: the last output reaches furthest down in t,
    the first one furthest up.

    Args:
        size: of the map, in pixels.
        kernel, stride, padding, dilation: of the convolution.
    """
    outputs = _outputs(size, kernel, stride, padding, dilation)
    first = max(0, -(((outputs - 1) * stride - padding) // dilation))
    last = min(kernel - 1, (size - 1 + padding) // dilation)
    rest = padding - first * dilation
    # There may be none, and padding is one number for both sides, which not every slice can do with.
    if first > last or rest < 0 or _outputs(size, last - first + 1, stride, rest, dilation) != outputs:
        return range(kernel), padding
    return range(first, last + 1), rest


def _outputs(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
