"""Gradient shares: how strong a loss is beside cross-entropy, by the norms of their gradients.

A diagnostic, and a way to choose a loss's weight once, at the start of a run; nothing here steers a run afterwards. The
batch gradient of cross-entropy is mostly noise, and keeps its norm while its mean falls to a twentieth: a weight that
followed the ratio would grow over a run until it held the classifier off its optimum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

FIRST_SCALE = 2.0**16
"""Where the scaling of half-precision losses starts, as in `torch.amp.GradScaler`."""


class GradientNorms:
    """Norms of the gradients of named losses on `parameters`, each of the mean over all processes.

    What is added is summed, so the micro-batches of a step, each with its share of the step's images, give the norm
    that the undivided batch gives (but for BatchNorm, which sees each of them alone).
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.sums: dict[str, Tensor] = {}

    def add(self, losses: Mapping[str, Tensor], weight: float = 1.0) -> None:
        """Add `weight` times the gradient of every loss; their graph stays."""
        for name, loss in losses.items():
            gradient = weight * self._gradient(loss)
            self.sums[name] = self.sums[name] + gradient if name in self.sums else gradient

    def norms(self) -> dict[str, Tensor]:
        """The norm of each sum, 0-dim; on every process."""
        for gradient in self.sums.values():
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                dist.all_reduce(gradient)
                gradient /= dist.get_world_size()
        return {name: gradient.norm() for name, gradient in self.sums.items()}

    def _gradient(self, loss: Tensor) -> Tensor:
        """The flat float32 gradient, with zeros where the loss does not reach."""
        if not loss.requires_grad:
            return self._flat([None] * len(self.parameters))
        # In float16 small gradients vanish: they are scaled as training scales them, and the scale comes off again.
        scale = FIRST_SCALE if self._in_float16(loss.device.type) else 1.0
        while True:
            flat = self._flat(torch.autograd.grad(scale * loss, self.parameters, retain_graph=True, allow_unused=True))
            if scale == 1.0 or bool(flat.isfinite().all()):
                return flat / scale
            scale /= 2

    def _flat(self, grads: Sequence[Tensor | None]) -> Tensor:
        return torch.cat(
            [
                torch.zeros_like(p, dtype=torch.float32).flatten() if grad is None else grad.flatten().float()
                for p, grad in zip(self.parameters, grads, strict=True)
            ]
        )

    def _in_float16(self, device_type: str) -> bool:
        autocast = torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) == torch.float16
        return autocast or any(parameter.dtype == torch.float16 for parameter in self.parameters)


def lambdas_for_shares(norms: Sequence[Mapping[str, Tensor]], shares: Mapping[str, float]) -> dict[str, float]:
    """The weight of every loss that gives it its share: lambda = share mean ||grad CE|| / mean ||grad L||.

    Args:
        norms: of each measured step, those of `ce` and of every loss in `shares`.
        shares: the wanted lambda ||grad L|| / ||grad CE||.

    Raises:
        ValueError: cross-entropy or one of the losses has no gradient, or none that is finite.
    """
    means = {name: float(torch.stack([step[name] for step in norms]).mean()) for name in ("ce", *shares)}
    for name, mean in means.items():
        if not 0 < mean < float("inf"):
            what, mend = f"loss '{name}'", "leave it out (lambda 0, no share), or give its lambda in place of the share"
            if name == "ce":
                what, mend = "cross-entropy", "check the labels, or give lambdas in place of the shares"
            raise ValueError(
                f"the gradient of {what} on the model's parameters has norm {mean:g} over the first {len(norms)} "
                f"steps, so no weight can be chosen by it; {mend}"
            )
    return {name: share * means["ce"] / means[name] for name, share in shares.items()}


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Put buffers and modes of `module` and the random numbers back afterwards: what ran inside leaves no trace."""
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    modes = [(each, each.training) for each in module.modules()]
    with torch.random.fork_rng():
        try:
            yield
        finally:
            with torch.no_grad():
                for name, buffer in module.named_buffers():
                    buffer.copy_(buffers[name])
            for each, training in modes:
                each.training = training
