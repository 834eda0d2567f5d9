"""The task every method shares: one forward pass, cross-entropy, and named, weighted losses on what that pass saw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from timm.loss import create_classification_loss
from timm.models import group_parameters
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from ..schedules import LossWeight
from ..stages import Stages


class View(NamedTuple):
    """What one forward pass saw, for an `Objective` to read."""

    images: Tensor  # (N, 3, H, W)
    targets: Tensor  # (N,) class indices, or (N, classes) after mixup
    logits: Tensor  # (N, classes), float32 even where autocast gave less
    features: list[Tensor]  # per stage (N, C_l, H_l, W_l), shallow to deep
    indices: Tensor | None  # (N,) positions in the data set


@dataclass(frozen=True)
class Weight:
    """How strongly a named loss enters the objective.

    Attributes:
        value: the factor lambda (with `share`: its start, until the first measurement).
        share: target share: lambda follows the measured gradient norms so that
            lambda ||grad L|| / ||grad CE|| stays near this number.
        scheduled: whether the task's loss-weight schedule w(t) multiplies it.
        schedule: a schedule of its own, in place of the task's.
        replaces_ce: whether it takes its weight from cross-entropy, which then counts 1 - lambda: the two are mixed
            rather than added.
    """

    value: float = 1.0
    share: float | None = None
    scheduled: bool = True
    schedule: LossWeight | None = None
    replaces_ce: bool = False


class Objective(nn.Module):
    """One or more named losses beside cross-entropy; sub-classes set `weights` and return the raw losses by name."""

    weights: dict[str, Weight]
    paired: bool = False
    """Whether the second half of every batch only teaches the first: cross-entropy leaves it out."""

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
        self.indices = list(stages.indices)
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
        final, features = self.model.forward_intermediates(images, indices=self.indices, output_fmt="NCHW")
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


class DistillationTask(TrainingTask):
    """Cross-entropy plus w(t) sum_k lambda_k L_k over the losses of its objectives, on one forward pass.

    A loss that replaces cross-entropy takes its weight from it: (1 - sum_replacing w lambda_k) CE + ...

    `forward(images, targets)` returns a dict: `loss` (to call backward on), `output` (logits), `ce`, every L_k by name,
    `loss_weight` (w) and `loss_weight/<name>` for a loss with a schedule of its own, and on measured batches
    `grad_ratio/<name>`, the gradient share w lambda_k ||grad L_k|| / ||grad CE|| on the model's parameters.

    Only training batches count: the schedule and all measurements stand still in eval mode. The batch count and the
    state of the objectives are buffers, so a state dict resumes them.

    Args:
        model: any timm model.
        objectives: where the named losses come from; none gives plain training.
        stages: stages whose features the objectives see; needed with objectives.
        criterion: the classification loss; cross-entropy when None.
        schedule: w as a function of the epoch; constant 1 when None.
        batches_per_epoch: forward passes in an epoch on one process; needed with a schedule.
        measure_every: measure gradient shares every so many batches; 0 never.
        taps: the stages' last activations (`stage_activations`), for features before the activation.
    """

    batches_seen: Tensor
    loss_weight: Tensor
    lambdas: Tensor
    own_weights: Tensor
    scheduled: Tensor

    def __init__(
        self,
        model: nn.Module,
        objectives: Sequence[Objective] = (),
        *,
        stages: Stages | None = None,
        criterion: nn.Module | None = None,
        schedule: LossWeight | None = None,
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
        schedules = {name: weight.schedule for name, weight in weights.items() if weight.schedule is not None}
        if (schedule is not None or schedules) and not batches_per_epoch:
            raise ValueError(
                "the loss-weight schedule runs in epochs: pass batches_per_epoch=len(train_loader), or switch it off "
                "with warmup=0, decay='none'"
            )
        assert len(weights) == sum(len(objective.weights) for objective in objectives), "two losses share a name"
        if any(weight.share for weight in weights.values()) and measure_every < 1:
            raise ValueError("a target gradient share has to be measured: set measure_every to 1 or more batches")

        # Plain training asks nothing of a model but logits.
        self.trainable_module: nn.Module = model if stages is None else StagedModel(model, stages, taps)
        self.objectives: Any = nn.ModuleList(objectives)
        self.criterion = criterion if criterion is not None else create_classification_loss()
        self.stages = stages
        self.schedule = schedule
        self.batches_per_epoch = batches_per_epoch or 0
        self.measure_every = measure_every
        self.names = tuple(weights)
        self.shares = tuple(weight.share for weight in weights.values())
        self.schedules = schedules
        self.replacing = tuple(weight.replaces_ce for weight in weights.values())
        self.paired = any(objective.paired for objective in objectives)
        self._compute_compiled: Callable[..., Any] | None = None
        # The count steers Python branches: a host mirror spares the hot path the device read.
        self._batches = 0
        self.register_buffer("batches_seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("loss_weight", torch.ones(()))
        self.register_buffer("lambdas", torch.tensor([weight.value for weight in weights.values()]))
        # Of the losses that w(t) does not multiply: 1, or what their own schedules say.
        self.register_buffer("own_weights", torch.ones(len(weights)), persistent=bool(schedules))
        scheduled = [weight.scheduled and weight.schedule is None for weight in weights.values()]
        self.register_buffer("scheduled", torch.tensor(scheduled, dtype=torch.bool), persistent=False)
        self.register_load_state_dict_post_hook(lambda task, _: task._read_batch_count())

    def _read_batch_count(self) -> None:
        self._batches = int(self.batches_seen)

    # --- forward ------------------------------------------------------------------------------------------------------

    def forward(self, input: Tensor, target: Tensor, indices: Tensor | None = None) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            input: (N, 3, H, W) images.
            target: (N,) class indices, or (N, classes) soft targets.
            indices: (N,) positions in the data set, for the objectives that remember images.
        """
        if self.training:
            self._begin_batch()
        measure = self.training and self.measure_every > 0 and self._batches % self.measure_every == 0
        result: dict[str, Tensor]
        if measure and self.names:
            # Several backward passes share this graph, which a compiled one does not allow.
            terms, logits = self._terms(input, target, indices)
            ratios = self._gradient_ratios(terms)
            result = {"loss": self._combine(terms), "output": logits.detach(), **_detached(terms)}
            shares = ratios * self._coefficients()
            result.update({f"grad_ratio/{name}": share for name, share in zip(self.names, shares, strict=True)})
        else:
            compute = self._compute_compiled if self._compute_compiled and self.training else self._compute
            loss, logits, terms = compute(input, target, indices)
            result = {"loss": loss, "output": logits, **terms}
        if self.names:
            result["loss_weight"] = self.loss_weight
        for name in self.schedules:
            result[f"loss_weight/{name}"] = self.own_weights[self.names.index(name)]
        if self.training:
            self._batches += 1
            self.batches_seen.fill_(self._batches)
        return result

    def _begin_batch(self) -> None:
        epoch = self._batches / self.batches_per_epoch if self.batches_per_epoch else 0.0
        if self.schedule is not None:
            self.loss_weight.fill_(self.schedule(epoch))
        for name, schedule in self.schedules.items():
            self.own_weights[self.names.index(name)] = schedule(epoch)
        for objective in self.objectives:
            objective.begin_batch(epoch, self._batches)

    def _compute(self, *batch: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        terms, logits = self._terms(*batch)
        return self._combine(terms), logits.detach(), _detached(terms)

    def _terms(self, images: Tensor, targets: Tensor, indices: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        if self.stages is None:
            logits, features = self.trainable_module(images), []
        else:
            logits, features = self.trainable_module(images)
        # On CPU, autocast leaves the logarithms of label smoothing and of blended labels in half precision.
        logits = logits.float()
        classified = len(logits) // 2 if self.paired else len(logits)
        terms = {"ce": self.criterion(logits[:classified], targets[:classified])}
        view = View(images, targets, logits, features, indices)
        for objective in self.objectives:
            terms.update(objective(view))
        return terms, logits

    def _coefficients(self) -> Tensor:
        return self.lambdas * torch.where(self.scheduled, self.loss_weight, self.own_weights)

    def _combine(self, terms: Mapping[str, Tensor]) -> Tensor:
        loss = terms["ce"]
        if self.names:
            coefficients = self._coefficients()
            if any(self.replacing):
                loss = (1 - sum(coefficients[k] for k, replaces in enumerate(self.replacing) if replaces)) * loss
            loss = loss + (coefficients * torch.stack([terms[name] for name in self.names])).sum()
        return loss

    # --- gradient shares ----------------------------------------------------------------------------------------------

    def _gradient_ratios(self, terms: Mapping[str, Tensor]) -> Tensor:
        """||grad L_k|| / ||grad CE|| of the raw losses; moves the lambdas that follow a target share."""
        ce_norm = self._gradient_norm(terms["ce"])
        ratios = torch.stack([self._gradient_norm(terms[name]) for name in self.names]) / ce_norm
        for k, share in enumerate(self.shares):
            if share:
                wanted = share / ratios[k].clamp_min(1e-12)
                # One batch's norms are noisy: after the first measurement go half the way.
                self.lambdas[k] = wanted if self._batches == 0 else 0.5 * (self.lambdas[k] + wanted)
        return ratios

    def _gradient_norm(self, loss: Tensor) -> Tensor:
        """Norm of the gradient on the model's parameters, of the mean over all processes."""
        parameters = [p for p in self.get_eval_model().parameters() if p.requires_grad]
        if not loss.requires_grad:
            return loss.new_zeros(())
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        found = [grad.detach().flatten().float() for grad in grads if grad is not None]
        if not found:  # a loss of another network, such as a teacher's own
            return loss.new_zeros(())
        flat = torch.cat(found)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
        return flat.norm()

    # --- timm's contract ----------------------------------------------------------------------------------------------

    def compile(self, backend: str = "inductor", mode: str | None = None, **kwargs: Any) -> nn.Module:
        """Compile the training computation, losses included; evaluation and measured batches stay eager.

        Shapes are static by default: an epoch's smaller last batch gets a graph of its own, once.
        """
        kwargs.setdefault("dynamic", False)
        self._compute_compiled = torch.compile(self._compute, backend=backend, mode=mode, **kwargs)
        return self.get_eval_model()

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


def _detached(terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: term.detach() for name, term in terms.items()}
