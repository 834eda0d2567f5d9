"""Loss-weight schedules: how strongly the Tf-FD terms count as training goes on.

Both terms start from noise (an untrained network has no feature worth imitating), so their weight rises from zero; on
ImageNet it also falls again early, so that the end of training belongs to the classification loss alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

__all__ = ["Decay", "LossWeight"]

Decay = Literal["none", "edt", "off"]
Epoch = TypeVar("Epoch", float, Tensor)


@dataclass(frozen=True)
class LossWeight:
    r"""The weight w(e) of the Tf-FD terms at the fractional epoch e of a run of E epochs.

    ==========  =========================================================================================
    decay       w(e)
    ==========  =========================================================================================
    ``"none"``  min(1, e / warmup): CIFAR, with a warm-up of 20 epochs
    ``"edt"``   min(1, e / warmup) 0.9^floor(e / 0.3 E): ImageNet's early decay, a step down every 30 of 100
                epochs with a warm-up of 5; after Channel Distillation (Zhou et al., 2020)
    ``"off"``   min(1, e / warmup), from 0.3 E on falling linearly to 0 at 0.6 E and staying there
    ==========  =========================================================================================

    The decay scales with the run's length; the warm-up is in epochs and does not. An instance holds no state, so a
    resumed run needs nothing but its epoch.

    Example:
        >>> weight = LossWeight(epochs=240)
        >>> weight(5.0), weight(100.0)
        (0.25, 1.0)
    """

    epochs: float
    """Length of the run in epochs."""
    warmup_epochs: float = 20
    """Epochs of linear warm-up from zero; 0 starts at full weight."""
    decay: Decay = "none"
    """Shape of the decay that follows."""
    whole_epochs: bool = False
    """Read e as floor(e) + 1, so that w changes once an epoch and epochs count from 1, as in the reference code."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epochs) and self.epochs > 0):
            raise ValueError(f"epochs={self.epochs} is not the length of a run: give a finite number above 0.")
        if not (math.isfinite(self.warmup_epochs) and self.warmup_epochs >= 0):
            raise ValueError(
                f"warmup_epochs={self.warmup_epochs} is not a length in epochs: give a finite number from 0 (no warm-up) up."
            )
        if self.decay not in get_args(Decay):
            raise ValueError(f"decay={self.decay!r} is not a known decay: choose one of {', '.join(get_args(Decay))}.")

    def __call__(self, epoch: Epoch) -> Epoch:
        """Weight at ``epoch``, which counts from 0 and may be fractional.

        A float gives a float; a tensor (0-dim, on any device) gives a tensor without a device sync, so it can sit inside
        a compiled step.

        Raises:
            ValueError: if a float ``epoch`` is negative or not finite (a tensor's value is not looked at).
        """
        if isinstance(epoch, Tensor):
            return self._weight_of_tensor(epoch)
        if not (math.isfinite(epoch) and epoch >= 0):
            raise ValueError(f"epoch={epoch} is not a moment of a run: epochs count from 0 up.")
        return float(self._weight_of_tensor(torch.tensor(epoch, dtype=torch.float64)))

    def _weight_of_tensor(self, epoch: Tensor) -> Tensor:
        if self.whole_epochs:
            epoch = epoch.floor() + 1
        weight = (epoch / self.warmup_epochs).clamp(max=1) if self.warmup_epochs else torch.ones_like(epoch)
        progress = epoch / self.epochs
        if self.decay == "edt":
            weight = weight * 0.9 ** (progress / 0.3).floor()
        elif self.decay == "off":
            weight = weight * (2 - progress / 0.3).clamp(0, 1)
        return weight
