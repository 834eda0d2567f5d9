"""Convolutions on small maps, without what is wasted there: padding that is multiplied, weights that are fetched anew.

A kernel larger than the map has taps that only ever meet padding: they are left out. And where a map has few positions
and the kernel many weights, oneDNN fetches all of these for each image of the batch; as one product of matrices, with
the positions of all images as its rows, the convolution fetches them once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.library import custom_op
from torch.nn.functional import conv2d, linear, pad

POSITIONS, WEIGHTS = 16, 2**18
"""One product is used for outputs of so many positions at most, and for so many weights at least, that are met."""


def speed_up_small_maps(model: nn.Module) -> None:
    """Let the convolutions of `model` waste nothing on small maps, here and in copies.

    Outputs and gradients are the same but for the order of their sums; a tap that meets no map has a gradient of zero.
    Weights keep their names and shapes. `small_maps` of recipes/results/benchmark has what it saves.

    Only `nn.Conv2d` itself is changed, with padding by a number of zeros; subclasses may pad in their own way.
    """
    for module in model.modules():
        if type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            module.__class__ = SmallMapConv2d


class Geometry(NamedTuple):
    """How a kernel moves over a map: (rows, columns) each."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]


class SmallMapConv2d(nn.Conv2d):
    """A Conv2d, padded by zeros, that leaves out taps that meet nothing, and is one product where that is faster."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = map(int, self.padding)
        sides = zip(input.shape[-2:], self.kernel_size, self.stride, padding, self.dilation, strict=True)
        (rows, top), (columns, left) = (met_taps(*side) for side in sides)
        if (len(rows), len(columns)) != self.kernel_size:
            below, right = self.kernel_size[0] - rows.stop, self.kernel_size[1] - columns.stop
            # A slice by another name: its gradient is made once, and in the layout of the weight.
            weight = pad(weight, (-columns.start, -right, -rows.start, -below))
        geometry = Geometry(self.stride, (top, left), self.dilation)
        if self.groups == 1 and input.ndim == 4 and worth_a_product(input, weight, geometry):
            return convolve_as_product(input, weight, bias, geometry)
        return conv2d(input, weight, bias, *geometry, self.groups)


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


def worth_a_product(input: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether `convolve_as_product` is the faster way for these shapes, on a CPU: measured, not known."""
    if input.device.type != "cpu" or weight.numel() < WEIGHTS:
        return False
    rows, columns = map(_outputs, input.shape[2:], weight.shape[2:], *geometry)
    return rows * columns <= POSITIONS


def convolve_as_product(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """A convolution of one group as Y = X W^T, a row of X and Y for each position of the output in each image.

    A row of X holds what the kernel sees from there, taps * inputs numbers: nine times the map, for a kernel of 3x3.
    It is not kept, but gathered again for the gradient. In bf16 the rounding error of the input's gradient is a sixth
    above that of conv2d: each tap's share is rounded before they are added, in float32.

    Args:
        input: [batch, inputs, rows, columns].
        weight: [outputs, inputs, taps, taps], fastest where it is laid out as channels_last.
        bias: [outputs].
        geometry: of the kernel.
    """
    if torch.is_autocast_enabled(input.device.type):  # it knows conv2d, but no operator of ours
        dtype = torch.get_autocast_dtype(input.device.type)
        input, weight, bias = input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _product(input, weight, bias, *geometry)


# Operators of torch, so that torch.compile calls them and does not look into them: what it makes of the windows takes
# minutes to compile and twice the time to run.


@custom_op("tffd_zoo::product", mutates_args=())
def _product(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    seen = _windows(input, weight, Geometry(stride, padding, dilation))
    return _channels_first(linear(seen.flatten(3), _channels_last(weight).flatten(1), bias))


@_product.register_fake
def _(input: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Sequence[int]) -> Tensor:
    rows, columns = map(_outputs, input.shape[2:], weight.shape[2:], *geometry)
    return _channels_first(input.new_empty(len(input), rows, columns, len(weight)))


@custom_op("tffd_zoo::product_gradients", mutates_args=())
def _product_gradients(
    gradient: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Those of input and weight that are wanted."""
    geometry, gradient = Geometry(stride, padding, dilation), _channels_last(gradient)
    gradients = []
    if wanted[0]:
        kernels = _channels_last(weight)
        of_seen = (gradient @ kernels.flatten(1)).unflatten(3, kernels.shape[1:])
        gradients.append(_add_windows(of_seen, input.shape, geometry))
    if wanted[1]:
        seen = _windows(input, weight, geometry)
        of_weight = gradient.flatten(0, 2).t() @ seen.flatten(3).flatten(0, 2)
        gradients.append(_channels_first(of_weight.unflatten(1, seen.shape[3:])))
    return gradients


@_product_gradients.register_fake
def _(gradient: Tensor, input: Tensor, weight: Tensor, *rest: Any) -> list[Tensor]:
    like = [values for values, wanted in zip((input, weight), rest[-1], strict=True) if wanted]
    return [_channels_first(values.new_empty(_channels_last(values).shape)) for values in like]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, _, *ctx.geometry = inputs
    ctx.save_for_backward(input, weight)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:2])
    gradients = iter(_product_gradients(gradient, *ctx.saved_tensors, *ctx.geometry, wanted))
    of_input, of_weight = (next(gradients) if want else None for want in wanted)
    of_bias = gradient.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
    return of_input, of_weight, of_bias, None, None, None


_product.register_autograd(_differentiate, setup_context=_keep)


def _windows(input: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """[batch, rows, columns, taps, taps, inputs]: what the kernel sees from each position, as a view of padded maps."""
    windows = _channels_last(input)
    if any(geometry.padding):
        top, left = geometry.padding
        windows = pad(windows, (0, 0, left, left, top, top))
    for side, (taps, stride, dilation) in enumerate(
        zip(weight.shape[2:], geometry.stride, geometry.dilation, strict=True), start=1
    ):
        windows = windows.unfold(side, (taps - 1) * dilation + 1, stride)[..., ::dilation]
    return windows.permute(0, 1, 2, 4, 5, 3)


def _add_windows(windows: Tensor, shape: torch.Size, geometry: Geometry) -> Tensor:
    """The transpose of `_windows`: each pixel's sum over the windows that see it, in float32 or better."""
    batch, channels, height, width = shape
    (down, right), (top, left), dilation = geometry
    _, rows, columns, *taps, _ = windows.shape
    dtype = torch.promote_types(windows.dtype, torch.float32)
    padded = windows.new_zeros(batch, height + 2 * top, width + 2 * left, channels, dtype=dtype)
    for i, j in product(*map(range, taps)):
        y, x = i * dilation[0], j * dilation[1]
        padded[:, y : y + rows * down : down, x : x + columns * right : right] += windows[:, :, :, i, j]
    return _channels_first(padded[:, top : top + height, left : left + width].to(windows.dtype).contiguous())


def _channels_last(maps: Tensor) -> Tensor:
    return maps.permute(0, 2, 3, 1)


def _channels_first(maps: Tensor) -> Tensor:
    return maps.permute(0, 3, 1, 2)


def _outputs(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
