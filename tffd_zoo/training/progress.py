"""Where a run stands: step and best result, sums of the losses, and the wish to stop."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor


class NonFiniteLoss(ValueError):
    """A loss became NaN or infinite."""


class Progress:
    """Steps done, the epoch they make, and the best top-1 by kind of weights; part of every checkpoint."""

    def __init__(self, steps_per_epoch: int) -> None:
        self.steps_per_epoch = steps_per_epoch
        self.step = 0
        self.best: dict[str, float] = {}
        self._seconds = 0.0
        self._resumed = time.monotonic()

    @property
    def epoch(self) -> int:
        """Whole epochs done."""
        return self.step // self.steps_per_epoch

    @property
    def step_in_epoch(self) -> int:
        return self.step % self.steps_per_epoch

    @property
    def fraction(self) -> float:
        """Epochs done, fractional."""
        return self.step / self.steps_per_epoch

    @property
    def hours(self) -> float:
        """Wall-clock hours that went into these steps, over all resumptions."""
        return round((self._seconds + time.monotonic() - self._resumed) / 3600, 4)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "best": self.best, "hours": self.hours}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.best = state["step"], state["best"]
        self._seconds, self._resumed = 3600 * state.get("hours", 0.0), time.monotonic()


class TermSums:
    """Means of the losses over the images since the last reset, summed on the device: no step waits for them.

    The step at which a loss first was not finite is remembered on the device too, and told at the next report.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.reset()

    def reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.images: dict[str, int] = {}
        self.first_bad: dict[str, Tensor] = {}
        self._by_process = torch.empty(self.accelerator.num_processes, 0, 3, dtype=torch.float64)

    def add(self, terms: Mapping[str, Tensor], images: int, step: int) -> None:
        """Add the terms of a batch: every 0-dim one."""
        for name, term in terms.items():
            if term.ndim:
                continue
            value = term.detach().double() if term.device.type != "mps" else term.detach()
            if name not in self.sums:
                self.sums[name] = torch.zeros_like(value)
                self.first_bad[name] = torch.full((), -1, dtype=torch.int64, device=term.device)
                self.images[name] = 0
            self.sums[name] += value * images
            self.images[name] += images
            bad = torch.isfinite(value).logical_not_().logical_and_(self.first_bad[name] < 0)
            self.first_bad[name].masked_fill_(bad, step)

    def report(self) -> dict[str, float]:
        """Mean of every term over the images of all processes.

        Raises:
            NonFiniteLoss: a term was NaN or infinite; names it and the first such step.
        """
        names = list(self.sums)
        if not names:
            return {}
        totals = torch.stack([*self.sums.values()])
        images = torch.tensor([self.images[name] for name in names], dtype=totals.dtype, device=totals.device)
        first_bad = torch.stack([*self.first_bad.values()]).to(totals.dtype)
        mine = torch.stack([totals, images, first_bad], dim=1)[None]
        self._by_process = self.accelerator.gather(mine).cpu()  # the one wait for the device
        totals, images = self._by_process[..., :2].sum(0).unbind(1)
        broken = [(step, name) for name, step in zip(names, self._by_process[..., 2].amax(0).tolist(), strict=True)]
        broken = [(int(step), name) for step, name in broken if step >= 0]
        if broken:
            step = min(step for step, _ in broken)
            terms = ", ".join(f"'{name}'" for at, name in broken if at == step)
            raise NonFiniteLoss(
                f"loss {terms} was not finite at step {step}; the checkpoints are from before that: lower --lr or the "
                "weight of that loss, and pass --output with a new folder"
            )
        return dict(zip(names, (totals / images).tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """The sums of every process as of the last report, for one process writes the checkpoint of all."""
        assert self._by_process.shape[1] == len(self.sums), "a checkpoint follows a report"
        return {"names": list(self.sums), "by_process": self._by_process}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reset()
        device = self.accelerator.device
        mine = state["by_process"][self.accelerator.process_index]
        for name, (total, images, first_bad) in zip(state["names"], mine, strict=True):
            self.sums[name] = total.to(device)
            self.images[name] = int(images)
            self.first_bad[name] = first_bad.long().to(device)
        self._by_process = state["by_process"]


class StopSignal:
    """Turns SIGTERM, Ctrl-C and the end of the launcher into a wish to stop that all processes agree on.

    A second Ctrl-C interrupts at once.
    """

    # Set by accelerate's launcher and by torchrun. A run that one of them started ends with it: nobody waits for it any
    # more, and another may be started in its folder.
    LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
    AGREE_EVERY = 10  # steps between the processes' votes: a collective per step would cost more than it is worth

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.signal = 0  # what this process received
        self.agreed = 0  # what all processes act on
        self._previous: dict[int, Any] = {}
        self._launcher = os.getppid() if any(name in os.environ for name in self.LAUNCHED) else None

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def requested(self, step: int) -> bool:
        """Whether any process was told to stop; the same answer on every process."""
        if self._launcher is not None and os.getppid() != self._launcher:
            self.signal = self.signal or signal.SIGTERM
        if self.accelerator.num_processes == 1:
            self.agreed = self.signal
        elif step % self.AGREE_EVERY == 0:
            vote = torch.tensor([self.signal], device=self.accelerator.device)
            self.agreed = int(self.accelerator.gather(vote).amax())
        return self.agreed > 0
