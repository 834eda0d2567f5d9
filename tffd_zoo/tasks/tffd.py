"""Tf-FD: a network's own salient channels and deep stages as the teachers of its redundant channels and shallow stages.

Li, "Self-Regulated Feature Learning via Teacher-free Feature Distillation", ECCV 2022,
doi 10.1007/978-3-031-19809-0_20.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _lean
from ..feature_losses import FEATURE_LOSSES, FeatureLoss
from ..losses import DeepChannels, StagePairs, pair_channels, stage_pairs
from ..ranges import COUNT, NOT_NEGATIVE, PART, PART_ABOVE_ZERO, PART_BELOW_ONE, PART_INSIDE, Range, check_ranges
from ..salience import SalienceMetric, stage_salience
from ..schedules import LossWeight
from ..stages import Stages, find_stages, stage_activations, stage_norms
from .base import DistillationTask, Objective, View, Weight
from .method import Method, Setting


@dataclass(frozen=True)
class TfFDConfig(Method):
    """Settings of Tf-FD: L = CE + w(t) (lambda_intra L_intra + lambda_inter L_inter)."""

    label = "Tf-FD"

    lambda_intra: Annotated[float, NOT_NEGATIVE] = 0.04
    """Weight of the intra-layer loss; 0 leaves it out."""
    lambda_inter: Annotated[float, NOT_NEGATIVE] = 0.05
    """Weight of the inter-layer loss; 0 leaves it out."""
    share_intra: Annotated[float | None, PART_ABOVE_ZERO] = None
    """Choose lambda_intra by this gradient share instead, such as 0.05: lambda ||grad L|| / ||grad CE|| over the first
    ten steps, measured before training; then it stays."""
    share_inter: Annotated[float | None, PART_ABOVE_ZERO] = None
    """The same for lambda_inter."""

    salience: SalienceMetric = "lp"
    """What makes a channel salient."""
    p: Annotated[int, Range(1, 2)] = 2
    """The p of salience 'lp': 1 or 2."""
    ratio: Annotated[float, PART_INSIDE] = 0.5
    """Part of the channels that is salient."""
    detach_salient: bool = True
    """Stop the gradient on the salient half; without it both halves move towards each other."""
    salience_momentum: Annotated[float, PART_BELOW_ONE] = 0.0
    """Exponential moving average of the salience over the batches, such as 0.99; 0 ranks by the batch alone."""
    rank_every: Annotated[int, COUNT] = 1
    """Rank and pair the channels anew every so many batches."""
    salience_images: Annotated[int | None, COUNT] = None
    """Rank by the first so many images of a batch only (8 makes 'hrank' affordable)."""

    intra_loss: FeatureLoss = "l2"
    """Feature loss between redundant and salient channels."""
    inter_loss: FeatureLoss = "l2"
    """Feature loss between shallow and deep stages."""
    reduction: Literal["mean", "sum"] = "mean"
    """Mean over all elements, or sum over C, H, W and mean over N ('l2' only)."""
    normalise: bool = False
    """Divide every feature map by its l2 norm over space before the losses."""
    pairs: StagePairs = "all"
    """Stage pairs of the inter-layer loss."""
    deep_channels: DeepChannels = "first"
    """Which channels of the deep stage teach."""
    stages: Annotated[tuple[int, ...] | None, NOT_NEGATIVE] = None
    """Stages by position in the model's `feature_info`, where 0 may be the stem (ResNets: 1 to 4); all stages when not
    given."""

    warmup_fraction: Annotated[float, PART] = 20 / 240
    """Part of the run over which w rises linearly from 0 to 1."""
    decay: Literal["none", "edt", "off"] = "none"
    """Early decay: 'edt' w x 0.9 after every 30 % of the run; 'off' full to 30 %, linear to zero at 60 %."""
    whole_epochs: bool = False
    """Let w rise in whole epochs counted from 1."""

    def __post_init__(self) -> None:
        check_ranges(self, "tffd.")
        if self.salience not in get_args(SalienceMetric):
            raise ValueError(f"unknown salience '{self.salience}'; choose one of {', '.join(get_args(SalienceMetric))}")
        for loss in (self.intra_loss, self.inter_loss):
            if loss not in FEATURE_LOSSES:
                raise ValueError(f"unknown feature loss '{loss}'; choose one of {', '.join(FEATURE_LOSSES)}")
        if self.p != 2 and self.salience != "lp":
            raise ValueError(f"--tffd.p {self.p} does nothing with salience '{self.salience}'; it belongs to 'lp'")

    @property
    def pre_activation(self) -> bool:
        return "ab" in (self.intra_loss, self.inter_loss)

    @property
    def fuses(self) -> bool:
        """Whether a compiler saves passes over the features: it does not of sp and ickd, which are matrix products."""
        return not {self.intra_loss, self.inter_loss} & {"sp", "ickd"}

    def build(self, setting: Setting) -> TfFD:
        return tffd_objective(self, setting.model, setting.stages, setting.input_size, setting.epochs)

    @classmethod
    def describe(cls, settings: Mapping[str, Any]) -> str:
        strengths = ", ".join(_strength(settings, term) for term in ("intra", "inter"))
        return (
            "teacher-free feature distillation (Tf-FD: salient channels teach redundant ones and deep stages shallow "
            f"ones; {strengths})"
        )

    @classmethod
    def tag(cls, settings: Mapping[str, Any]) -> str:
        return ""


def _strength(settings: Mapping[str, Any], term: str) -> str:
    """How strongly a term was weighted: by a gradient share if it was chosen by one."""
    share = settings.get(f"share_{term}")
    if not share:
        return f"lambda_{term} {settings[f'lambda_{term}']:g}"
    # Recipes that say how often shares were measured are from when lambda followed them through the run.
    how = "held at" if "measure_every" in settings else "chosen by"
    return f"lambda_{term} {how} a gradient share of {100 * share:.3g} %"


CANONICAL = TfFDConfig()
"""Stop-gradient on every teacher, salience by l2 norm; gradient shares near 5 % each when ResNet-20 starts."""

REFERENCE = TfFDConfig(lambda_intra=8e-4, lambda_inter=5e-4, salience="spread", detach_salient=False, whole_epochs=True)
"""What the author's published code does and its README's weights: shares of one batch's gradient near 0.1 % and 0.05 %
at the start, of its mean, which is what training follows, some percent at the end."""


class TfFD(Objective):
    """The intra-layer and inter-layer losses of one network on its own stage features.

    Args:
        config: the settings.
        stages: the stages whose features the losses will see.
        schedule: w as a function of the epoch; constant 1 when None.
        norms: for `salience="bn_scale"` the BatchNorm of every stage (`stage_norms`).
    """

    averaged: Tensor

    def __init__(
        self,
        config: TfFDConfig,
        stages: Stages,
        schedule: LossWeight | None = None,
        norms: Sequence[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.fuses = config.fuses
        self.stages = len(stages)
        self.norms = norms if norms is None else tuple(norms)  # a tuple: these belong to the model, not to us
        self.weights = {}
        if config.lambda_intra or config.share_intra:
            self.weights["intra"] = Weight(config.lambda_intra, config.share_intra, schedule)
        if config.lambda_inter or config.share_inter:
            self.weights["inter"] = Weight(config.lambda_inter, config.share_inter, schedule)
        if not self.weights:
            raise ValueError("both lambda_intra and lambda_inter are 0: nothing would be distilled; train plainly")
        self.pairs = stage_pairs(len(stages.indices), config.pairs)
        if "inter" in self.weights and not self.pairs:
            raise ValueError(
                f"inter-layer distillation needs two stages and got {len(stages.indices)}; choose more stages, or set "
                "lambda_inter to 0"
            )
        self._ranks = "intra" in self.weights or config.deep_channels == "salient"
        # Saliences outlive their batch only when they are averaged or kept.
        self._averages = self._ranks and config.salience_momentum > 0
        self._keeps = self._ranks and config.rank_every > 1
        self._rank_now = True
        self._copies = config.normalise or not {config.intra_loss, config.inter_loss} <= _lean.READ_HALVES
        if self._averages:
            self.register_buffer("averaged", torch.zeros((), dtype=torch.bool))
        for stage, channels in enumerate(stages.channels):
            if self._averages:
                self.register_buffer(f"average_{stage}", torch.zeros(channels))
            if self._keeps:
                self.register_buffer(f"kept_{stage}", torch.zeros(channels))

    def begin_batch(self, epoch: float, batch: int) -> None:
        self._rank_now = batch % self.config.rank_every == 0

    def forward(self, view: View) -> dict[str, Tensor]:
        config, features = self.config, view.features
        if self._copies:
            features = _lean.in_float32(features)
        saliences = self._saliences(features) if self._ranks else None
        if config.normalise:
            features = [F.normalize(feature.float().flatten(2), dim=2).view_as(feature) for feature in features]
        terms = {}
        if "intra" in self.weights:
            assert saliences is not None
            terms["intra"] = _lean.intra_layer_loss(
                features,
                [pair_channels(salience, config.ratio) for salience in saliences],
                ratio=config.ratio,
                loss=config.intra_loss,
                detach_salient=config.detach_salient,
                reduction=config.reduction if config.intra_loss == "l2" else "mean",
            )
        if "inter" in self.weights:
            terms["inter"] = _lean.inter_layer_loss(
                features,
                self.pairs,
                loss=config.inter_loss,
                reduction=config.reduction if config.inter_loss == "l2" else "mean",
                deep_channels=config.deep_channels,
                saliences=saliences,
            )
        return terms

    @torch.no_grad()
    def _saliences(self, features: Sequence[Tensor]) -> list[Tensor]:
        """What the channels of every stage are ranked by in this batch."""
        config = self.config
        if self._keeps and not self._rank_now and not self._averages:
            return self._memory("kept")
        saliences = stage_salience(
            features, config.salience, p=config.p, norms=self.norms, images=config.salience_images
        )
        if self._averages:
            momentum = torch.where(self.averaged, config.salience_momentum, 0.0)  # the first batch counts in full
            for average, salience in zip(self._memory("average"), saliences, strict=True):
                average.lerp_(salience, 1 - momentum)
            self.averaged.fill_(True)
            saliences = self._memory("average")
        if not self._keeps:
            return saliences
        if self._rank_now:
            for kept, salience in zip(self._memory("kept"), saliences, strict=True):
                kept.copy_(salience)
        return self._memory("kept")

    def _memory(self, name: str) -> list[Tensor]:
        return [getattr(self, f"{name}_{stage}") for stage in range(self.stages)]


def tffd_objective(
    config: TfFDConfig, model: nn.Module, stages: Stages, input_size: tuple[int, int, int], epochs: float | None
) -> TfFD:
    """The losses of `config` for `model`, with their schedule over a run of `epochs`."""
    norms = stage_norms(model, stages, input_size) if config.salience == "bn_scale" else None
    return TfFD(config, stages, loss_weight_schedule(config, epochs), norms)


class TfFDTask(DistillationTask):
    """Train any timm model with Tf-FD: L = CE + w(t) (lambda_intra L_intra + lambda_inter L_inter).

    Args:
        model: any timm model with `forward_intermediates`.
        config: the settings, `CANONICAL` by default.
        epochs: length of the run, which scales the schedule of w.
        batches_per_epoch: `len(train_loader)`.
        objectives: further losses beside Tf-FD, such as logit distillation.
        input_size: (channels, height, width) of the dry run that some settings need; the model's own when None.

    Example::

        task = TfFDTask(timm.create_model("resnet18"), epochs=100, batches_per_epoch=len(loader))
        task(images, targets)["loss"].backward()

    Raises:
        ValueError: when the model's stages cannot serve, with the reason and what would.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TfFDConfig = CANONICAL,
        *,
        epochs: float | None = None,
        batches_per_epoch: int | None = None,
        objectives: Sequence[Objective] = (),
        input_size: tuple[int, int, int] | None = None,
        **kwargs: Any,
    ) -> None:
        stages = find_stages(model, config.stages)
        pretrained_cfg: Any = model.pretrained_cfg
        size = input_size or pretrained_cfg["input_size"]
        super().__init__(
            model,
            [tffd_objective(config, model, stages, size, epochs), *objectives],
            stages=stages,
            batches_per_epoch=batches_per_epoch,
            taps=stage_activations(model, stages, size) if config.pre_activation else (),
            **kwargs,
        )
        self.settings = config


def loss_weight_schedule(config: TfFDConfig, epochs: float | None) -> LossWeight | None:
    """The schedule of w for a run of `epochs`; None when w is 1 throughout."""
    if not config.warmup_fraction and config.decay == "none":
        return None
    if epochs is None:
        raise ValueError(
            "the loss-weight schedule scales with the run: pass epochs=..., or set warmup_fraction=0, decay='none'"
        )
    return LossWeight(
        epochs, warmup_epochs=config.warmup_fraction * epochs, decay=config.decay, whole_epochs=config.whole_epochs
    )
