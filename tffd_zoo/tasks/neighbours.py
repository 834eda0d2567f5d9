"""Teacher-free neighbours of Tf-FD, from their papers' equations: BYOT, CS-KD, Tf-KD by regularisation, and PS-KD.

They are baselines, so their settings default to the published ones; where a paper leaves a choice open, the class says
which was made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..logit_losses import kl
from ..ranges import NOT_NEGATIVE, PART_ABOVE_ZERO, PART_INSIDE, POSITIVE, check_ranges
from ..schedules import LossWeight
from ..stages import Stages
from .base import Objective, View, Weight
from .method import Method, Setting

# --- BYOT -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BYOTConfig(Method):
    """Be Your Own Teacher: classifiers on the shallow stages learn from the labels and from the deepest one."""

    label = "BYOT"

    alpha: Annotated[float, PART_ABOVE_ZERO] = 0.1
    """Part of each shallow classifier's loss that comes from the deepest classifier's logits."""
    temperature: Annotated[float, POSITIVE] = 3.0
    """Temperature of those logits."""
    beta: Annotated[float, NOT_NEGATIVE] = 1e-6
    """Weight of the squared distance between each shallow branch's pooled features and the deepest ones."""

    def __post_init__(self) -> None:
        check_ranges(self, "byot.")

    def build(self, setting: Setting) -> BYOT:
        return BYOT(self, setting.stages, setting.num_classes, setting.criterion)

    @classmethod
    def describe(cls, settings: Mapping[str, Any]) -> str:
        return "the self-distillation of BYOT"


BETA_BATCH = 128
"""Images over which the squared distances are summed that beta weighs."""


class BYOT(Objective):
    """sum_i (1 - alpha) CE(q_i, y) + alpha T^2 KL(sg q_L || q_i) + beta ||f_i - sg f_L||^2 over shallow stages i < L.

    q_i and f_i are the logits and the pooled features (N, C_L) of a branch on stage i: a bottleneck (1x1, 3x3 with the
    stride, 1x1 convolutions) for every step from there to the deepest stage, average pooling, and a linear classifier
    on f_i. f_L are the deepest stage's features, pooled. As in the authors' code, whose beta this is, vectors are
    compared and not maps, and the norm is summed over a batch of 128; here it is 128 times the mean, so that neither
    batch size nor processes change it. The branches are dropped at export.

    Source: Zhang et al., "Be Your Own Teacher: Improve the Performance of Convolutional Neural Networks via Self
    Distillation", ICCV 2019.

    Args:
        config: the settings.
        stages: the student's stages.
        num_classes: of the classifiers.
        criterion: the classification loss; cross-entropy when None.

    Raises:
        ValueError: there is no shallow stage.
    """

    def __init__(
        self, config: BYOTConfig, stages: Stages, num_classes: int, criterion: nn.Module | None = None
    ) -> None:
        super().__init__()
        if len(stages) < 2:
            raise ValueError(f"BYOT needs two stages and got {len(stages)}; choose an architecture with more")
        self.config = config
        self.criterion = criterion if criterion is not None else nn.CrossEntropyLoss()
        self.weights = {
            "byot_ce": Weight(1 - config.alpha),
            "byot_kd": Weight(config.alpha),
            "byot_hint": Weight(config.beta),
        }
        shapes = list(zip(stages.channels, stages.reductions, strict=True))
        self.adapters = nn.ModuleList(_adapter(shapes[shallow:]) for shallow in range(len(shapes) - 1))
        self.classifiers = nn.ModuleList(nn.Linear(stages.channels[-1], num_classes) for _ in self.adapters)

    def forward(self, view: View) -> dict[str, Tensor]:
        deepest, logits = view.features[-1].detach().float().mean(dim=(2, 3)), view.logits.detach()
        ce, kd, hint = (view.logits.new_zeros(()) for _ in range(3))
        for feature, adapter, classifier in zip(view.features, self.adapters, self.classifiers, strict=False):
            branch = adapter(feature).mean(dim=(2, 3))
            branch_logits = classifier(branch).float()
            hint = hint + BETA_BATCH * (branch.float() - deepest).square().sum(dim=1).mean()
            kd = kd + kl(branch_logits, logits, self.config.temperature)
            ce = ce + self.criterion(branch_logits, view.targets)
        return {"byot_ce": ce, "byot_kd": kd, "byot_hint": hint}


def _adapter(shapes: Iterable[tuple[int, int]]) -> nn.Sequential:
    """A bottleneck per step from one (channels, reduction) to the next."""
    return nn.Sequential(
        *(
            _bottleneck(channels, deeper_channels, deeper // reduction)
            for (channels, reduction), (deeper_channels, deeper) in pairwise(shapes)
        )
    )


def _bottleneck(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    width = max(1, out_channels // 4)
    layers: list[nn.Module] = []
    for ins, outs, kernel, step in ((in_channels, width, 1, 1), (width, width, 3, stride), (width, out_channels, 1, 1)):
        layers += [
            nn.Conv2d(ins, outs, kernel, stride=step, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(outs),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


# --- CS-KD ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CSKDConfig(Method):
    """Class-wise self-distillation: an image's prediction learns from that of another image of its class."""

    label = "CS-KD"
    pairs_classes = True
    one_class = True

    weight: Annotated[float, POSITIVE] = 1.0
    """Weight of the loss beside cross-entropy."""
    temperature: Annotated[float, POSITIVE] = 4.0
    """Temperature of both predictions."""

    def __post_init__(self) -> None:
        check_ranges(self, "cs-kd.")

    def build(self, setting: Setting) -> CSKD:
        return CSKD(self)

    @classmethod
    def describe(cls, settings: Mapping[str, Any]) -> str:
        return "the class-wise self-distillation of CS-KD"


class CSKD(Objective):
    """weight T^2 KL(sg p(x') || p(x)) for images x and x' of one class.

    The second half of every batch are the x' of the first (`train_loader(pair_classes=True)`). They go through the same
    forward pass, as in the authors' code they do not: there it is a pass of their own without gradient. So BatchNorm
    normalises both halves together, and although p(x') is detached, a part of the gradient (about a fifth of that on
    the images, measured on ResNet-20) reaches them through the statistics that x shares with them.

    Source: Yun et al., "Regularizing Class-wise Predictions via Self-knowledge Distillation", CVPR 2020.
    """

    paired = True

    def __init__(self, config: CSKDConfig) -> None:
        super().__init__()
        self.config = config
        self.weights = {"cs_kd": Weight(config.weight)}

    def forward(self, view: View) -> dict[str, Tensor]:
        if len(view.logits) % 2:
            raise ValueError(f"a batch of {len(view.logits)} images is not made of pairs; load with pair_classes=True")
        images, partners = view.logits.chunk(2)
        return {"cs_kd": kl(images, partners.detach(), self.config.temperature)}


# --- Tf-KD by regularisation ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TfKDConfig(Method):
    """Teacher-free distillation by regularisation: a designed distribution in the teacher's place."""

    label = "Tf-KD"
    one_class = True

    alpha: Annotated[float, PART_ABOVE_ZERO] = 0.1
    """Weight of the loss, taken from cross-entropy."""
    true_class: Annotated[float, PART_INSIDE] = 0.99
    """Probability that the designed teacher gives to the true class; the others share the rest."""
    temperature: Annotated[float, POSITIVE] = 20.0
    """Temperature of both distributions."""

    def __post_init__(self) -> None:
        check_ranges(self, "tf-kd.")

    def build(self, setting: Setting) -> TfKD:
        return TfKD(self)

    @classmethod
    def describe(cls, settings: Mapping[str, Any]) -> str:
        return "the designed teacher of Tf-KD"


class TfKD(Objective):
    """(1 - alpha) CE + alpha T^2 KL(p^d_T || p_T) with p^d = a on the true class and (1 - a) / (K - 1) on each other.

    Two choices are ours: p^d is softened like any teacher's output, p^d_T ~ (p^d)^(1/T); and the factor T^2 is
    Hinton's, without which a temperature of 20 leaves next to no gradient. (The authors' code has no T^2, softens p^d
    to softmax(p^d / T) and leaves the student's p as it is.)

    Source: Yuan et al., "Revisiting Knowledge Distillation via Label Smoothing Regularization", CVPR 2020, Tf-KD_reg.
    """

    def __init__(self, config: TfKDConfig) -> None:
        super().__init__()
        self.config = config
        self.weights = {"tf_kd": Weight(config.alpha, takes_ce=config.alpha)}

    def forward(self, view: View) -> dict[str, Tensor]:
        _require_classes("Tf-KD designs its teacher from an image's class", view.targets)
        a, logits = self.config.true_class, view.logits
        teacher = torch.full_like(logits, math.log((1 - a) / (logits.shape[1] - 1)), dtype=torch.float32)
        teacher.scatter_(1, view.targets[:, None], math.log(a))
        return {"tf_kd": kl(logits, teacher, self.config.temperature)}


# --- PS-KD ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PSKDConfig(Method):
    """Progressive self-distillation: an image's target mixes its label with its prediction of the epoch before."""

    label = "PS-KD"
    one_class = True
    all_labels = True

    alpha: Annotated[float, PART_ABOVE_ZERO] = 0.8
    """Weight of the earlier prediction in the last epoch; it rises linearly, in whole epochs counted from 1."""

    def __post_init__(self) -> None:
        check_ranges(self, "ps-kd.")

    def build(self, setting: Setting) -> PSKD:
        assert setting.labels is not None
        return PSKD(self, setting.labels, setting.num_classes, setting.epochs)

    @classmethod
    def describe(cls, settings: Mapping[str, Any]) -> str:
        return "the progressive self-distillation of PS-KD"


class PSKD(Objective):
    """(1 - a_t) CE(y, p_t) + a_t CE(p_{t-1}, p_t) in epoch t of E, with a_t = alpha t / E.

    p_{t-1} is what the network, in training mode, said of the same image an epoch ago; the label at first. The memory
    of it is a buffer of images x classes in float32 (20 MB for CIFAR-100) that is part of the state dict and equal on
    all processes.

    Source: Kim et al., "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV 2021.

    Args:
        config: the settings.
        labels: (images,) class of every image of the training set.
        num_classes: of the logits.
        epochs: length of the run.
    """

    predictions: Tensor

    def __init__(self, config: PSKDConfig, labels: Tensor, num_classes: int, epochs: float) -> None:
        super().__init__()
        rising = LossWeight(epochs, warmup_epochs=epochs, whole_epochs=True)
        self.weights = {"ps_kd": Weight(config.alpha, schedule=rising, takes_ce=config.alpha)}
        self.register_buffer("predictions", F.one_hot(labels, num_classes).float())

    def forward(self, view: View) -> dict[str, Tensor]:
        _require_classes("PS-KD remembers what was said of an image", view.targets)
        if view.positions is None:
            raise ValueError(
                "PS-KD remembers images by their position in the data set: pass the task positions=batch.positions"
            )
        positions = view.positions.to(self.predictions.device, non_blocking=True)
        loss = F.cross_entropy(view.logits, self.predictions[positions])
        if self.training:
            self._remember(positions, view.logits.detach().softmax(dim=1))
        return {"ps_kd": loss}

    def _remember(self, positions: Tensor, predictions: Tensor) -> None:
        for images, said in zip(_from_all_processes(positions), _from_all_processes(predictions), strict=True):
            self.predictions[images] = said


def _from_all_processes(rows: Tensor) -> list[Tensor]:
    """`rows` of every process; their number may differ by process."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return [rows]
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    sizes = torch.cat(counts).tolist()
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    return [part[:size] for part, size in zip(gathered, sizes, strict=True)]


# --- checks -----------------------------------------------------------------------------------------------------------


def _require_classes(why: str, targets: Tensor) -> None:
    if targets.ndim != 1:
        raise ValueError(f"{why}, and mixup or CutMix blend two images of two classes: train without them")
