"""The task every method shares: one forward pass, cross-entropy, and named, weighted losses on what that pass saw."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from timm.loss import create_classification_loss
from timm.models import group_parameters
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from ..schedules import LossWeight
from ..stages import Stages
from .gradients import GradientNorms, lambdas_for_shares, untouched

_logger = logging.getLogger(__name__)


class View(NamedTuple):
    """What one forward pass saw, for an `Objective` to read."""

    images: Tensor  # (N, 3, H, W)
    targets: Tensor  # (N,) class indices, or (N, classes) after mixup
    logits: Tensor  # (N, classes), float32 even where autocast gave less
    features: list[Tensor]  # per stage (N, C_l, H_l, W_l), shallow to deep
    positions: Tensor | None  # (N,) which images of the data set these are


@dataclass(frozen=True)
class Weight:
    """How strongly a named loss enters the objective: w(t) lambda.

    Attributes:
        value: the factor lambda.
        share: choose lambda by this gradient share instead, lambda ||grad L|| / ||grad CE|| at the start of the run
            (`DistillationTask.choose_lambdas`).
        schedule: w as a function of the epoch; constant 1 when None.
        takes_ce: how much of cross-entropy's weight of 1 it takes at w = 1: the two are mixed rather than added.
    """

    value: float = 1.0
    share: float | None = None
    schedule: LossWeight | None = None
    takes_ce: float = 0.0


class Objective(nn.Module):
    """One or more named losses beside cross-entropy; sub-classes set `weights` and return the raw losses by name."""

    weights: dict[str, Weight]
    paired: bool = False
    """Whether the second half of every batch only teaches the first: cross-entropy leaves it out."""
    fuses: bool = False
    """Whether a compiler saves passes over the features (`DistillationTask.compile_losses`)."""

    def begin_batch(self, epoch: float, batch: int) -> None:
        """Told before every training batch how many epochs (fractional) and batches were done: state that steers Python
        branches changes here, outside the compiled computation."""

    def forward(self, view: View) -> dict[str, Tensor]:
        raise AssertionError("an objective defines its losses")


class StagedModel(nn.Module):
    """A timm model whose forward returns logits and the features of the chosen stages, in one pass.

    Kept as one module so that timm's own loop can wrap it in DDP and see every trainable parameter.

    Args:
        model: any timm model with `forward_intermediates`.
        stages: where the features are.
        taps: the stages' last activations, to return their inputs in place of the stage features.
    """

    def __init__(self, model: nn.Module, stages: Stages, taps: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.model: Any = model
        self.stage_indices = list(stages.indices)
        self.tapped = bool(taps)
        self._tapped: list[Tensor] | None = None
        for module in taps:
            module.register_forward_pre_hook(self._tap)

    def _tap(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self._tapped is None:  # the model on its own, as in evaluation
            return args
        self._tapped.append(args[0])
        # An in-place activation would overwrite the very tensor that we keep.
        return (args[0].clone(), *args[1:]) if getattr(module, "inplace", False) else args

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        self._tapped = []
        final, features = self.model.forward_intermediates(images, indices=self.stage_indices, output_fmt="NCHW")
        if self.tapped:
            features = self._tapped
        self._tapped = None
        return self.model.forward_head(final), features

    # timm's optimizer factory asks the module that it is given for these.
    def no_weight_decay(self) -> set[str]:
        names = self.model.no_weight_decay() if hasattr(self.model, "no_weight_decay") else set()
        return {f"model.{name}" for name in names}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        layers = group_parameters(self.model, self.model.group_matcher(coarse=coarse), reverse=True)
        return lambda name: layers[name.removeprefix("model.")]


FAINT, DROWNING = 1e-6, 10.0
"""Weighted losses outside these multiples of cross-entropy, on the first batch, are a mistake in their lambda."""

RUNAWAY = 1e5
"""A lambda chosen above this is for features that start near zero (LayerScale) and will grow under it."""

SHARE_STEPS = 10
"""Steps over which gradient norms are averaged to choose a lambda."""


class DistillationTask(TrainingTask):
    """Cross-entropy plus sum_k w_k(t) lambda_k L_k over the losses of its objectives, on one forward pass.

    A loss that takes its weight from cross-entropy leaves it (1 - sum_taking w_k takes_ce_k).

    `forward(images, targets)` returns a dict: `loss` (to call backward on), `output` (logits), `ce`, every L_k by name,
    `loss_weight/<name>` (w_k) for every loss with a schedule, and on measured batches `grad_ratio/<name>`, the gradient
    share w_k lambda_k ||grad L_k|| / ||grad CE|| on the model's parameters.

    A lambda that is to have a gradient share is NaN until `choose_lambdas` has set it, once, before training.

    Only training batches count: the schedules and all measurements stand still in eval mode. The batch count, the
    lambdas and the state of the objectives are buffers, so a state dict resumes them.

    Args:
        model: any timm model.
        objectives: where the named losses come from; none gives plain training.
        stages: stages whose features the objectives see; needed with objectives.
        criterion: the classification loss; cross-entropy when None.
        batches_per_epoch: forward passes in an epoch on one process; needed with a schedule.
        measure_every: measure gradient shares every so many batches; 0 never.
        taps: the stages' last activations (`stage_activations`), for features before the activation.
    """

    batches_seen: Tensor
    lambdas: Tensor
    loss_weights: Tensor

    def __init__(
        self,
        model: nn.Module,
        objectives: Sequence[Objective] = (),
        *,
        stages: Stages | None = None,
        criterion: nn.Module | None = None,
        batches_per_epoch: int | None = None,
        measure_every: int = 0,
        taps: Sequence[nn.Module] = (),
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(device=device, dtype=dtype, verbose=False)
        if objectives and stages is None:
            raise ValueError("objectives compare stage features: pass stages=find_stages(model)")
        weights = {name: weight for objective in objectives for name, weight in objective.weights.items()}
        assert len(weights) == sum(len(objective.weights) for objective in objectives), "two losses share a name"
        if any(weight.schedule for weight in weights.values()) and not batches_per_epoch:
            raise ValueError(
                "the loss-weight schedule runs in epochs: pass batches_per_epoch=len(train_loader), or switch it off "
                "with warmup_fraction=0, decay='none'"
            )
        if (taken := sum(weight.takes_ce for weight in weights.values())) > 1:
            raise ValueError(f"the losses would take {taken:g} of cross-entropy's weight, which is 1; leave one out")

        # Plain training asks nothing of a model but logits.
        self.trainable_module: nn.Module = model if stages is None else StagedModel(model, stages, taps)
        self.objectives: Any = nn.ModuleList(objectives)
        self.criterion = criterion if criterion is not None else create_classification_loss()
        self.stages = stages
        self.weights = weights
        self.batches_per_epoch = batches_per_epoch or 0
        self.measure_every = measure_every
        self.paired = any(objective.paired for objective in objectives)
        self._compute_compiled: Callable[..., Any] | None = None
        # The count steers Python branches: a host mirror spares the hot path the device read. So with the lambdas.
        self._batches = 0
        self.undecided = {name for name, weight in weights.items() if weight.share}
        self.register_buffer("batches_seen", torch.zeros((), dtype=torch.int64))
        # not of no losses: accelerate takes two empty tensors for one, and a plain run would find one missing
        values = [math.nan if weight.share else weight.value for weight in weights.values()]
        self.register_buffer("lambdas", torch.tensor(values, dtype=torch.float32), persistent=bool(weights))
        self.register_buffer("loss_weights", torch.ones(len(weights)), persistent=bool(weights))
        self.register_load_state_dict_post_hook(_mirror_state)

    # --- forward ------------------------------------------------------------------------------------------------------

    def forward(self, input: Tensor, target: Tensor, positions: Tensor | None = None) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            input: (N, 3, H, W) images.
            target: (N,) class indices, or (N, classes) soft targets.
            positions: (N,) which images of the data set these are, for the objectives that remember images.

        Raises:
            ValueError: in training mode, when a lambda is still to be chosen.
        """
        if self.training:
            self._begin_batch()
        measure = self.training and self.measure_every > 0 and self._batches % self.measure_every == 0
        result: dict[str, Tensor]
        if measure and self.weights:
            # Several backward passes share this graph, which a compiled one does not allow.
            terms, logits = self.terms(input, target, positions)
            result = {"loss": self._combine(terms), "output": logits.detach(), **_detached(terms)}
            result.update(self._gradient_shares(terms))
        else:
            compute = self._compute_compiled if self._compute_compiled and self.training else self._compute
            loss, logits, terms = compute(input, target, positions)
            result = {"loss": loss, "output": logits, **terms}
        for k, (name, weight) in enumerate(self.weights.items()):
            if weight.schedule is not None:
                result[f"loss_weight/{name}"] = self.loss_weights[k]
        if self.training:
            if self._batches == 0:
                self._warn_of_imbalance(result)
            self._batches += 1
            self.batches_seen.fill_(self._batches)
        return result

    def terms(
        self, images: Tensor, targets: Tensor, positions: Tensor | None = None, *, as_compiled: bool = False
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The raw losses by name, `ce` first, and the logits of one forward pass.

        `as_compiled` lets the objectives run as `compile_losses` left them, for one backward pass and no more.
        """
        if self.stages is None:
            logits, features = self.trainable_module(images), []
        else:
            logits, features = self.trainable_module(images)
        # On CPU, autocast leaves the logarithms of label smoothing and of blended labels in half precision.
        logits = logits.float()
        classified = len(logits) // 2 if self.paired else len(logits)
        terms = {"ce": self.criterion(logits[:classified], targets[:classified])}
        view = View(images, targets, logits, features, positions)
        for objective in self.objectives:
            terms.update(objective(view) if as_compiled else objective.forward(view))
        return terms, logits

    def _begin_batch(self) -> None:
        if self.undecided:
            raise ValueError(
                f"the weight of {', '.join(sorted(self.undecided))} is to be chosen by its gradient share, and was "
                "not: call task.choose_lambdas(train_loader) once, before training"
            )
        epoch = self._batches / self.batches_per_epoch if self.batches_per_epoch else 0.0
        for k, weight in enumerate(self.weights.values()):
            if weight.schedule is not None:
                self.loss_weights[k] = weight.schedule(epoch)
        for objective in self.objectives:
            objective.begin_batch(epoch, self._batches)

    def _warn_of_imbalance(self, terms: Mapping[str, Tensor]) -> None:
        """Say it when a lambda that was given, not chosen by a share, does not suit the features of this model."""
        ce = float(terms["ce"])
        for name, value in zip(self.weights, self.lambdas.tolist(), strict=True):
            weighted = value * float(terms[name])
            if self.weights[name].share or not value or FAINT * ce <= weighted <= DROWNING * ce:
                continue
            effect = "drowns it" if weighted > ce else "does nothing"
            _logger.warning(
                "lambda %g times loss '%s' is %.3g where cross-entropy is %.3g: on this model it %s; choose the weight "
                "by a gradient share instead, such as share_%s=0.05 and task.choose_lambdas(train_loader)",
                value, name, weighted, ce, effect, name,
            )  # fmt: skip

    def _compute(self, *batch: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        terms, logits = self.terms(*batch, as_compiled=self.training)
        return self._combine(terms), logits.detach(), _detached(terms)

    def _combine(self, terms: Mapping[str, Tensor]) -> Tensor:
        loss = terms["ce"]
        taking = [(k, weight.takes_ce) for k, weight in enumerate(self.weights.values()) if weight.takes_ce]
        if taking:
            loss = (1 - sum(takes * self.loss_weights[k] for k, takes in taking)) * loss
        if self.weights:
            loss = loss + (self.lambdas * self.loss_weights * torch.stack([terms[name] for name in self.weights])).sum()
        return loss

    # --- gradient shares ----------------------------------------------------------------------------------------------

    def choose_lambdas(
        self, batches: Iterable[Sequence[Any]], *, steps: int = SHARE_STEPS, accumulate: int = 1
    ) -> dict[str, float]:
        """Set every lambda that is to have a gradient share, by the norms over the first steps of a run; then it stays.

        The weights, statistics and random numbers are left as they were. Call it where training runs: on the device,
        under its autocast, on every process, with BatchNorms that are frozen in training in evaluation mode already. A
        model that is wholly in evaluation mode is measured in training mode.

        Args:
            batches: (images, targets) or (images, targets, positions), as training sees them.
            steps: how many steps to average over.
            accumulate: batches that make a step; their gradients are added up, each by its share of the images.

        Returns:
            The chosen lambdas by name; empty when none was to be chosen.

        Raises:
            ValueError: there is no batch, or a loss without gradient.
        """
        if not self.undecided:
            return {}
        shares = {name: weight.share for name, weight in self.weights.items() if weight.share}
        parameters = list(self.get_eval_model().parameters())
        norms: list[dict[str, Tensor]] = []
        with untouched(self):
            if not self.get_eval_model().training:
                self.train()
            for objective in self.objectives:
                objective.begin_batch(0.0, 0)
            source = iter(batches)
            while len(norms) < steps and (group := list(islice(source, accumulate))):
                images = sum(len(batch[0]) for batch in group)
                step = GradientNorms(parameters)
                for batch in group:
                    terms, _ = self.terms(*batch)
                    step.add({name: terms[name] for name in ("ce", *shares)}, len(batch[0]) / images)
                norms.append(step.norms())
        if not norms:
            raise ValueError("there is no batch to choose a lambda by; pass the training loader")
        chosen = lambdas_for_shares(norms, shares)
        for k, name in enumerate(self.weights):
            if name in chosen:
                self.lambdas[k] = chosen[name]
        for name, value in chosen.items():
            if value > RUNAWAY:
                _logger.warning(
                    "lambda %.3g was chosen for loss '%s', which starts at next to nothing on this model: when its "
                    "features grow, the loss will drown cross-entropy; watch grad_ratio/%s (measure_every), give a "
                    "lambda, or start from trained weights",
                    value, name, name,
                )  # fmt: skip
        self.undecided = set()
        return chosen

    def _gradient_shares(self, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """w_k lambda_k ||grad L_k|| / ||grad CE|| of this batch."""
        measured = GradientNorms(list(self.get_eval_model().parameters()))
        measured.add(terms)
        norms = measured.norms()
        ratios = self.lambdas * self.loss_weights * torch.stack([norms[name] for name in self.weights]) / norms["ce"]
        return {f"grad_ratio/{name}": ratio for name, ratio in zip(self.weights, ratios, strict=True)}

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled or copied: all but the compiled step, which belongs to one process and one task."""
        return {**self.__dict__, "_compute_compiled": None}

    # --- timm's contract ----------------------------------------------------------------------------------------------

    def compile(self, backend: str = "inductor", mode: str | None = None, **kwargs: Any) -> nn.Module:
        """Compile the training computation, losses included; evaluation and measured batches stay eager.

        Shapes are static by default: an epoch's smaller last batch gets a graph of its own, once.
        """
        kwargs.setdefault("dynamic", False)
        self._compute_compiled = torch.compile(self._compute, backend=backend, mode=mode, **kwargs)
        return self.get_eval_model()

    def compile_losses(self, backend: str = "inductor", mode: str | None = None, **kwargs: Any) -> None:
        """Compile what the objectives compute and leave the network as it is, for one that runs faster so.

        In bf16 on a CPU that has it, say, where Tf-FD by l2 added 3 to 6 % to a step and 8 to 14 % with eager losses
        (`precision` in recipes/results/benchmark). Evaluation, measured batches and objectives that would gain nothing
        stay eager.
        """
        kwargs.setdefault("dynamic", False)
        for objective in self.objectives:
            if objective.fuses:
                objective.compile(backend=backend, mode=mode, **kwargs)

    def prepare_distributed(self, device_ids: list[int] | None = None, **ddp_kwargs: Any) -> DistillationTask:
        """Wrap the model in DDP (timm's own loop; under Accelerate prepare the whole task instead)."""
        if any(p.requires_grad for p in self.objectives.parameters()):
            raise ValueError(
                "these objectives have trainable parameters of their own; wrap the whole task in "
                "DistributedDataParallel, or let Accelerate prepare it"
            )
        self.trainable_module = nn.parallel.DistributedDataParallel(
            self.trainable_module, device_ids=device_ids, **ddp_kwargs
        )
        return self

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> Any:
        """The plain timm model: no wrapper, no stage features, keys as timm knows them."""
        module = super().get_eval_model(module=module, ema=ema)
        module = unwrap_model(module) if module is not None else None
        return module.model if isinstance(module, StagedModel) else module

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """The model's layer groups; what the objectives train counts as the head."""
        model = self.get_eval_model()
        layers = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        head = max(layers.values())
        return lambda name: layers.get(name.removeprefix("trainable_module.").removeprefix("model."), head)

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Batch count, lambdas and the objectives' state; the weights are timm's own entry."""
        return {} if ema else {k: v for k, v in self.state_dict().items() if not k.startswith("trainable_module")}

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        if not state or ema:
            return
        missing, unexpected = self.load_state_dict(state, strict=False)
        missing = [key for key in missing if not key.startswith("trainable_module")]
        if strict and (missing or unexpected):
            raise RuntimeError(f"task state does not fit: missing {missing}, unexpected {unexpected}")


def _mirror_state(task: DistillationTask, _: Any) -> None:
    """After a state dict was loaded."""
    task._batches = int(task.batches_seen)
    known = task.lambdas.isfinite().tolist()
    task.undecided = {name for name, decided in zip(task.weights, known, strict=True) if not decided}


def _detached(terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: term.detach() for name, term in terms.items()}
