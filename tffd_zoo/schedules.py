"""Loss-weight schedules: how much the Tf-FD terms weigh as training goes on.

An untrained network has no feature worth learning from, so the weight rises from zero; on ImageNet it also decays early
and leaves the end of training to the classification loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

from torch import Tensor

__all__ = ["Decay", "LossWeight"]

Decay = Literal["none", "edt", "off"]
Number = TypeVar("Number", float, Tensor)


@dataclass(frozen=True)
class LossWeight:
    """Weight w(e) of the Tf-FD terms at the fractional epoch e, counted from 0, of a run of E epochs.

    ========  =================================================================================================
    decay     w(e)
    ========  =================================================================================================
    `"none"`  min(1, e / warmup): for CIFAR, with a warm-up of 20 of 240 epochs
    `"edt"`   min(1, e / warmup) 0.9^floor(e / 0.3 E): for ImageNet, with a warm-up of 5 of 100 epochs; after
              the early decay of Zhou et al., "Channel Distillation: Channel-Wise Attention for Knowledge
              Distillation", 2020
    `"off"`   min(1, e / warmup) until 0.3 E, from there times a factor that falls linearly to 0 at 0.6 E
    ========  =================================================================================================

    The decay scales with the run's length, the warm-up is in epochs. A schedule keeps no state: a resumed run needs to
    know its epoch and nothing else.

    Example:
        >>> weight = LossWeight(epochs=240)
        >>> weight(5.0), weight(100.0)
        (0.25, 1.0)

    Raises:
        ValueError: if `epochs` is not above 0, `warmup_epochs` is below 0, one of them is not finite, or the decay is
            unknown.
    """

    epochs: float
    """Length of the run in epochs."""
    warmup_epochs: float = 20
    """Length of the linear warm-up in epochs; 0 starts at full weight."""
    decay: Decay = "none"
    """What follows the warm-up."""
    whole_epochs: bool = False
    """Take floor(e) + 1 for e: epochs count from 1 and w keeps still within one, as in Tf-FD's published code."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epochs) and self.epochs > 0):
            raise ValueError(f"epochs={self.epochs} is not the length of a run; give a number above 0, such as 240")
        if not (math.isfinite(self.warmup_epochs) and self.warmup_epochs >= 0):
            raise ValueError(f"warmup_epochs={self.warmup_epochs} is not a length; give 0 (no warm-up) or more epochs")
        if self.decay not in get_args(Decay):
            raise ValueError(f"unknown decay '{self.decay}'; choose one of {', '.join(get_args(Decay))}")

    def __call__(self, epoch: Number) -> Number:
        """The weight at `epoch`: a float for a float, a 0-dim tensor for a 0-dim tensor.

        A tensor is never read by Python, so the call fits into a compiled step and does not wait for the device.

        Raises:
            ValueError: if a float `epoch` is negative or not a number; a tensor's value is not looked at.
        """
        if not isinstance(epoch, Tensor) and not epoch >= 0:
            raise ValueError(f"epoch={epoch} is not in a run; epochs count from 0")
        if self.whole_epochs:
            epoch = _floor(epoch) + 1
        weight = _clamp(epoch / self.warmup_epochs) if self.warmup_epochs else 1.0 + 0 * epoch
        progress = 10 * epoch / (3 * self.epochs)  # in units of 0.3 E, which itself would be rounded
        if self.decay == "edt":
            return weight * 0.9 ** _floor(progress)
        if self.decay == "off":
            return weight * _clamp(2 - progress)
        return weight


def _floor(number: Number) -> Number:
    return number.floor() if isinstance(number, Tensor) else math.floor(number)


def _clamp(number: Number) -> Number:
    return number.clamp(0, 1) if isinstance(number, Tensor) else min(max(number, 0.0), 1.0)
