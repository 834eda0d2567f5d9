"""What a classifier is worth on a set of images: its figures, each listed once in `FIGURES`, and what it costs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import timm
import torch
import torch.distributed as dist
from timm.utils.distributed import distribute_bn
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

if TYPE_CHECKING:
    from .data import ImageSource, ImageSpec

CALIBRATION_BINS = 15


# --- the figures ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """One figure of an evaluation: how it is computed, and how it is written wherever figures are shown.

    What `of_images` makes of a batch's float32 logits (N, classes) and targets (N,), a row an image, is kept of every
    image of every process; `of_all` makes the figure of the rows of all.
    """

    title: str
    unit: str
    digits: int
    """Digits after the point."""
    better: Literal["higher", "lower"]
    meaning: str
    """In a few words, for cards."""
    of_images: Callable[[Tensor, Tensor], Tensor]
    of_all: Callable[[Tensor], float]
    low: float = 0.0
    high: float = math.inf
    """No value lies outside [low, high]."""
    hub_metric: str | None = None
    """Name of the metric in the results that the Hub reads from a card; None keeps it out of them."""
    required: bool = False
    """Every record has it; records from before a later figure was known lack that one."""

    @property
    def heading(self) -> str:
        """Title and unit, for a column of a table."""
        return f"{self.title} {self.unit}".strip()

    def shown(self, value: float | None) -> str:
        """The value as text; a dash for one that was not measured."""
        return "-" if value is None else f"{value:.{self.digits}f}"


def is_first(logits: Tensor, targets: Tensor) -> Tensor:
    """Whether the true class has the highest logit."""
    return _among_five(logits, targets)[:, 0]


def is_among_five(logits: Tensor, targets: Tensor) -> Tensor:
    """Whether the true class is among the five highest logits (among all of them when there are fewer classes)."""
    return _among_five(logits, targets).any(dim=1)


def _among_five(logits: Tensor, targets: Tensor) -> Tensor:
    """Which of the five highest logits is the true class's; one order for both, so that equal logits cannot tell."""
    return logits.topk(min(5, logits.shape[1])).indices == targets[:, None]


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy without label smoothing, nats."""
    return cross_entropy(logits, targets, reduction="none")


def confidence_and_success(logits: Tensor, targets: Tensor) -> Tensor:
    """The highest softmax probability, and 1 where its class is the true one: (N, 2)."""
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    return torch.stack([confidence, (predicted == targets).to(confidence.dtype)], dim=1)


def percent(rows: Tensor) -> float:
    """How many of the images it is true for, percent."""
    return 100 * int(rows.sum()) / len(rows)


def mean(rows: Tensor) -> float:
    """Mean over the images."""
    return rows.double().mean().item()


def calibration_error(rows: Tensor) -> float:
    r"""Expected calibration error of the rows of `confidence_and_success`, percent.

    With the :math:`n` images spread over :math:`B` equal bins of confidence,

    .. math:: \mathrm{ECE} = \sum_b \frac{n_b}{n} \left| \mathrm{accuracy}_b - \mathrm{confidence}_b \right|

    A bin holds its upper edge, not its lower one (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017).
    """
    inner_edges = torch.linspace(0, 1, CALIBRATION_BINS + 1)[1:-1]
    confidence, success = rows.T.contiguous()
    overconfidence = torch.bincount(
        torch.bucketize(confidence, inner_edges), confidence.double() - success.double(), minlength=CALIBRATION_BINS
    )
    return 100 * (overconfidence.abs().sum() / len(rows)).item()


FIGURES: dict[str, Figure] = {
    "top1": Figure(
        "top-1", "%", 2, "higher", "part of the images whose class has the highest logit",
        is_first, percent, high=100, hub_metric="accuracy", required=True,
    ),
    "top5": Figure(
        "top-5", "%", 2, "higher", "part of the images whose class is among the five highest logits",
        is_among_five, percent, high=100, hub_metric="accuracy", required=True,
    ),
    "nll": Figure(
        "NLL", "", 4, "lower", "mean negative log-likelihood of the true class, nats",
        negative_log_likelihood, mean, required=True,
    ),
    "ece": Figure(
        "ECE", "%", 2, "lower", f"expected calibration error in {CALIBRATION_BINS} equal-width bins of confidence",
        confidence_and_success, calibration_error, high=100, required=True,
    ),
}  # fmt: skip
"""Every figure, by its name in records. Evaluation, metrics files, tables, cards and the manifest go through this list:
a new figure is an entry here and what computes it."""


@dataclass(frozen=True)
class EvalResult:
    """What came of one evaluation, over the images of all processes."""

    images: int
    """Images evaluated."""
    correct1: int
    """Images whose class has the highest logit."""
    correct5: int
    """Images whose class is among the five highest logits (among all of them when there are fewer classes)."""
    figures: Mapping[str, float]
    """Values by the names of `FIGURES`; a record from before a figure was known lacks it."""
    seconds: float | None = None
    """Wall-clock time until the last process was done, loading included (not the decoding of images kept in memory);
    None where it was not kept."""

    def __getattr__(self, name: str) -> float:
        """A figure by its name: `result.top1`."""
        try:
            return self.__dict__["figures"][name]
        except KeyError:
            raise AttributeError(f"an evaluation has no {name!r}; its figures are {', '.join(FIGURES)}") from None

    def to_json(self) -> dict[str, Any]:
        """One flat record, with images per second where the time is known."""
        timing = {"seconds": self.seconds, "images_per_second": self.images / self.seconds} if self.seconds else {}
        counts = {"images": self.images, "correct1": self.correct1, "correct5": self.correct5}
        return {**counts, **self.figures, **timing}

    @classmethod
    def from_json(cls, record: Mapping[str, Any], prefix: str = "") -> EvalResult:
        """The result in a record that holds `to_json`, under names that begin with `prefix`, and more.

        Raises:
            ValueError: something that every record has is missing.
        """
        found = {name: record[prefix + name] for name in (*COUNTS, *FIGURES, "seconds") if prefix + name in record}
        required = [*COUNTS, *(name for name, figure in FIGURES.items() if figure.required)]
        if missing := [name for name in required if name not in found]:
            raise ValueError(f"metrics lack {', '.join(sorted(missing))}; evaluate the model and give all of them")
        counts = {name: found.pop(name) for name in COUNTS}
        return cls(**counts, seconds=found.pop("seconds", None), figures=found)


COUNTS = ("images", "correct1", "correct5")


class NonFiniteLogits(ValueError):
    """A model's logits are NaN or infinite."""


# --- evaluation -------------------------------------------------------------------------------------------------------


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
    kept = {figure.of_images: list[Tensor]() for figure in FIGURES.values()}
    hide_bar = None if progress and not (distributed and dist.get_rank() > 0) else True  # None: where no one watches
    start = time.perf_counter()
    autocast = torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None)
    with eval_mode(model), torch.inference_mode():
        for images, targets, *_ in tqdm(loader, desc="evaluate", unit="batch", leave=False, disable=hide_bar):
            images = images.to(device, non_blocking=True, memory_format=memory_format)
            with autocast:
                logits = model(images)
            if logits.ndim != 2:
                raise ValueError(f"the model gives {tuple(logits.shape)} for a batch of images; give a classifier")
            logits, targets = logits.float(), targets.to(device, non_blocking=True)
            for of_images, rows in kept.items():
                rows.append(of_images(logits, targets))

    # Joined only now, so that nothing waited for a value of the device before.
    joined = [torch.cat(rows).cpu() for rows in kept.values() if rows]
    if distributed:
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, joined)
        joined = [torch.cat(shares) for shares in zip(*filter(None, every), strict=True)]
    seconds = time.perf_counter() - start
    if not joined:
        raise ValueError("there is nothing to evaluate: the loader gave no image")
    rows_of = dict(zip(kept, joined, strict=True))
    if not rows_of[negative_log_likelihood].isfinite().all():
        raise NonFiniteLogits(
            "the model's logits are not finite, so it has no accuracy: its weights are broken or diverged"
        )
    return EvalResult(
        images=len(joined[0]),
        correct1=int(rows_of[is_first].sum()),
        correct5=int(rows_of[is_among_five].sum()),
        figures={name: figure.of_all(rows_of[figure.of_images]) for name, figure in FIGURES.items()},
        seconds=seconds,
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
        **result.to_json(),
        "params": params,
        "macs": macs,
        "evaluation": {
            "data": source.name,
            "split": source.split,
            "revision": source.revision,
            "fingerprint": source.fingerprint,
            "classes": source.num_classes - len(source.classes_without_images),
            "model_classes": model.num_classes,
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
