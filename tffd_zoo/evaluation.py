"""What a classifier is worth on a set of images: top-1, top-5, NLL, calibration error, and what it costs."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import timm
import torch
import torch.distributed as dist
from timm.task.evaluator import ClassificationEvaluator
from timm.utils.distributed import distribute_bn
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import one_hot
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

if TYPE_CHECKING:
    from .data import ImageSource, ImageSpec

CALIBRATION_BINS = 15


@dataclass(frozen=True)
class EvalResult:
    """The figures of one evaluation, over the images of all processes."""

    images: int
    """Images evaluated."""
    correct1: int
    """Images whose class has the highest logit."""
    correct5: int
    """Images whose class is among the five highest logits (among all of them when there are fewer classes)."""
    top1: float
    """100 * correct1 / images, percent."""
    top5: float
    """100 * correct5 / images, percent."""
    nll: float
    """Mean negative log-likelihood of the true class (cross-entropy without label smoothing), nats."""
    ece: float
    """Expected calibration error in 15 equal-width bins of confidence, percent."""
    seconds: float
    """Wall-clock time until the last process was done, loading included (not the decoding of images kept in memory)."""
    images_per_second: float
    """images / seconds."""


class NonFiniteLogits(ValueError):
    """A model's logits are NaN or infinite."""


class CalibrationEvaluator(ClassificationEvaluator):
    r"""timm's evaluator with the calibration error beside top-1, top-5 and loss.

    With the images spread over :math:`B` equal bins of confidence (the highest softmax probability),

    .. math:: \mathrm{ECE} = \sum_b \frac{n_b}{n} \left| \mathrm{accuracy}_b - \mathrm{confidence}_b \right|

    A bin holds its upper edge, not its lower one (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017).
    The sums of every bin stay on the device; nothing waits for them before :meth:`calibration_error`.
    """

    def reset(self) -> None:
        super().reset()
        self.bin_edges = torch.linspace(0, 1, CALIBRATION_BINS + 1, device=self.device)[1:-1]
        # per bin: images, correct ones, summed confidence
        self.bins = torch.zeros(CALIBRATION_BINS, 3, dtype=self.loss_sum.dtype, device=self.device)

    @torch.no_grad()
    def update(self, output: Tensor, target: Tensor) -> None:
        super().update(output, target)
        confidence, predicted = output.float().softmax(dim=-1).max(dim=-1)
        bin_of_image = one_hot(torch.bucketize(confidence, self.bin_edges), CALIBRATION_BINS).to(self.bins.dtype)
        columns = [torch.ones_like(confidence), predicted.eq(target), confidence]
        self.bins += bin_of_image.T @ torch.stack([column.to(self.bins.dtype) for column in columns], dim=1)

    def calibration_error(self) -> float:
        """Return the ECE of the bins, percent."""
        images, correct, confidence = self.bins.unbind(dim=1)
        return 100 * ((correct - confidence).abs().sum() / images.sum()).item()


def evaluate(
    model: nn.Module,
    loader: Iterable[Sequence[Any]],
    *,
    device: torch.device | str,
    distributed: bool = False,
    progress: bool = True,
    amp_dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> EvalResult:
    """Evaluate `model` on every batch of `loader` and leave it in the mode it came in.

    Args:
        model: a classifier: images (N, C, H, W) to logits (N, classes).
        loader: batches that begin with the images as the model wants them and the targets (N,), int64; a loader of
            `tffd_zoo.data` or of timm.
        device: where the model lies; the batches are sent there.
        distributed: `loader` holds only this process's share: add up the counts of all processes. Shares may differ
            in size. BatchNorm statistics are taken from rank 0, whose weights are the ones that get saved.
        progress: show a bar on the terminal (rank 0 only).
        amp_dtype: run the model under autocast in this type; the metrics are float32 all the same.
        memory_format: layout of the images; give the one that the model has.

    Raises:
        ValueError: `loader` is empty.
        NonFiniteLogits: the logits are not finite.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module  # its forward synchronises buffers, which would hang when the shares differ in size
    device = torch.device(device)
    if distributed:
        distribute_bn(model, dist.get_world_size())
    evaluator = CalibrationEvaluator(device)
    hide_bar = None if progress and not (distributed and dist.get_rank() > 0) else True  # None: where no one watches
    start = time.perf_counter()
    autocast = torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None)
    with eval_mode(model), torch.inference_mode(), autocast:
        for images, targets, *_ in tqdm(loader, desc="evaluate", unit="batch", leave=False, disable=hide_bar):
            images = images.to(device, non_blocking=True, memory_format=memory_format)
            evaluator.update(model(images), targets.to(device, non_blocking=True))

    if distributed:
        for total in (evaluator.counts, evaluator.loss_sum, evaluator.bins):
            dist.all_reduce(total)
    images_seen, correct1, correct5 = evaluator.counts.tolist()
    seconds = time.perf_counter() - start
    if images_seen == 0:
        raise ValueError("there is nothing to evaluate: the loader gave no image")
    metrics = evaluator.summary()
    if not math.isfinite(metrics["loss"]):
        raise NonFiniteLogits(
            "the model's logits are not finite, so it has no accuracy: its weights are broken or diverged"
        )
    return EvalResult(
        images=images_seen,
        correct1=correct1,
        correct5=correct5,
        top1=metrics["top1"],
        top5=metrics["top5"],
        nll=metrics["loss"],
        ece=evaluator.calibration_error(),
        seconds=seconds,
        images_per_second=images_seen / seconds,
    )


def evaluation_record(model: nn.Module, result: EvalResult, source: ImageSource, spec: ImageSpec) -> dict[str, Any]:
    """Return the figures of `model` with all that they depend on, ready for JSON: what `metrics.json` holds.

    Args:
        model: what was evaluated.
        result: what came of it.
        source: the images.
        spec: how they were prepared.
    """
    params, macs = model_cost(model, spec.input_size)
    return {
        **asdict(result),
        "params": params,
        "macs": macs,
        "evaluation": {
            "data": source.name,
            "split": source.split,
            "revision": source.revision,
            "fingerprint": source.fingerprint,
            "image_column": source.image_column,
            "label_column": source.label_column,
            **asdict(spec),
            "device": next(model.parameters()).device.type,
            "torch": torch.__version__,
            "timm": timm.__version__,
        },
    }


def model_cost(model: nn.Module, input_size: Sequence[int]) -> tuple[int, int]:
    """Return the parameters of `model` and its multiply-adds for one image of `input_size` (C, H, W).

    Multiply-adds are those of convolutions, matrix products and attention, as papers count them: no bias, no
    normalisation, no activation.
    """
    parameter = next(model.parameters())
    image = torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype)
    # attention as matrix products: the counter does not know every fused kernel (not the CPU's)
    plain_attention = sdpa_kernel(SDPBackend.MATH)
    with eval_mode(model), torch.no_grad(), plain_attention, FlopCounterMode(display=False) as counter:
        model(image)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` in evaluation mode, and on leaving every module back in its own (some may be frozen in another)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        # train() and not the flags alone: with it some models drop what they cached of their weights for inference
        model.train(any(training for _, training in modes))
        for module, training in modes:
            module.training = training
