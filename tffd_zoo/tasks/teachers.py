"""A second network that teaches its features or its logits: frozen, trained alongside, branches of the student, or the
student's own moving average.

The teacher exploration of Li, ECCV 2022 (supplement, Table 1), and Tf-FD+ (Tf-FD with logit distillation). None of it
is left in the exported student.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from .._lean import l2
from ..logit_losses import kl, standardise
from ..ranges import NOT_NEGATIVE, PART, PART_ABOVE_ZERO, PART_BELOW_ONE, POSITIVE, SEED, check_ranges
from ..schedules import LossWeight
from ..stages import Stages, find_stages, stage_activations
from .base import Objective, StagedModel, View, Weight
from .method import Method, Setting

Paradigm = Literal["offline", "online", "branches", "average"]


@dataclass(frozen=True)
class KDConfig:
    """Logit distillation: weight T^2 KL(teacher || student) at temperature T."""

    weight: Annotated[float, POSITIVE] = 1.0
    """Weight of the loss."""
    temperature: Annotated[float, POSITIVE] = 4.0
    """Temperature T of both softmaxes."""
    standardise: bool = False
    """Standardise the logits of every image first (Sun et al., CVPR 2024)."""
    takes_ce: Annotated[float, PART] = 0.0
    """How much of cross-entropy's weight of 1 it takes: 0.9 leaves (1 - 0.9) CE, as CRD's baselines have it."""
    warmup_fraction: Annotated[float, PART] = 0.0
    """Part of the run over which the weight rises linearly from 0."""
    whole_epochs: bool = False
    """Let it rise in whole epochs counted from 1."""

    def __post_init__(self) -> None:
        check_ranges(self, "teacher.kd.")


@dataclass(frozen=True)
class TeacherConfig(Method):
    """A second network, and what the student learns from it: from its features
    w(t) lambda_features mean over the stages of MSE(F_student, sg F_teacher), from its logits `kd`."""

    label = "KD"

    paradigm: Paradigm = "offline"
    """'offline': trained before, frozen; 'online': trained alongside by its own cross-entropy; 'branches': trained so
    too, but only the student's later stages and classifier once more, on its first stage; 'average': the moving average
    of the student's own weights."""
    model: str | None = None
    """The teacher: timm's name with tag, hf-hub:ORG/NAME or local-dir:FOLDER; for 'branches' and 'average' always the
    student's."""
    weights: Path | None = None
    """Weights file of an 'offline' teacher, in place of the released weights of its tag."""
    seed: Annotated[int | None, SEED] = None
    """Seed of the weights of an 'online' teacher or of branches; 1000 more than the run's when not given."""
    decay: Annotated[float | None, PART_BELOW_ONE] = None
    """Of 'average': how much of it stays at a step once training is under way; 0.999 when not given."""
    lambda_features: Annotated[float, NOT_NEGATIVE] = 1.0
    """Weight of the feature loss; 0 leaves it out. 1 is a gradient share near 100 % at first and 15 % once trained
    (ResNet-20 taught by another, CIFAR-100)."""
    share_features: Annotated[float | None, PART_ABOVE_ZERO] = None
    """Choose lambda_features by this gradient share instead, such as 0.05, over the first ten steps."""
    warmup_fraction: Annotated[float, PART] = 20 / 240
    """Part of the run over which the feature loss rises linearly to its full weight."""
    kd: KDConfig | None = None
    """Distillation of its logits."""

    def __post_init__(self) -> None:
        check_ranges(self, "teacher.")
        offline, own = self.paradigm == "offline", self.paradigm in ("branches", "average")
        if own and self.model is not None:
            raise ValueError(
                f"the teacher '{self.paradigm}' is made of the student itself: leave its model '{self.model}' out"
            )
        if not own and self.model is None:
            raise ValueError(f"which network teaches? give the model of the '{self.paradigm}' teacher")
        if self.weights is not None and not offline:
            raise ValueError(
                f"a teacher that is trained alongside starts from scratch: leave its weights {self.weights} out"
            )
        if self.seed is not None and self.paradigm in ("offline", "average"):
            raise ValueError(f"the teacher '{self.paradigm}' draws no weights: leave its seed out")
        if self.decay is not None and self.paradigm != "average":
            raise ValueError(f"decay {self.decay} belongs to the teacher 'average' alone: leave it out")

    @property
    def teaches_features(self) -> bool:
        """Whether the stages of the two networks have to match."""
        return bool(self.lambda_features or self.share_features)

    def build(self, setting: Setting) -> TeacherDistillation:
        student = setting.stages
        teacher: nn.Module
        if self.paradigm == "average":
            decay = 0.999 if self.decay is None else self.decay
            teacher = AverageTeacher(setting, decay)
            return TeacherDistillation(teacher, student, self, epochs=setting.epochs, criterion=setting.criterion)
        network = setting.second_network(self)
        if self.paradigm == "branches":
            if setting.pre_activation:
                raise ValueError(
                    "branches read features after the activation and 'ab' compares those before it: choose one"
                )
            teacher = AuxiliaryBranches(network, student, setting.input_size)
        else:
            needed = self.teaches_features or self.paradigm == "online"
            stages = find_stages(network, setting.chosen_stages) if needed else None
            taps = stage_activations(network, stages, setting.input_size) if stages and setting.pre_activation else ()
            if self.paradigm == "offline":
                teacher = FrozenTeacher(network, stages, taps, image_stats=setting.image_stats)
            else:
                assert stages is not None
                teacher = OnlineTeacher(network, stages, taps)
        return TeacherDistillation(teacher, student, self, epochs=setting.epochs, criterion=setting.criterion)

    @classmethod
    def describe(cls, settings: Mapping[str, Any]) -> str:
        features = settings["lambda_features"] or settings["share_features"]
        taught = " and ".join([*(["features"] if features else []), *(["logits"] if settings.get("kd") else [])])
        if settings["paradigm"] == "average":
            return f"{taught} of its own moving average"
        network = f"`{settings['model']}`" if settings["model"] else "branches of its own"
        return f"{taught} of a second network ({network}, {settings['paradigm']})"

    @classmethod
    def tag(cls, settings: Mapping[str, Any]) -> str:
        return "kd" if settings.get("kd") else str(settings["paradigm"])


# --- the kinds of teacher ---------------------------------------------------------------------------------------------
# Called with what the student's forward pass saw; answer with logits and the features of their stages.


class FrozenTeacher(nn.Module):
    """A trained network in eval mode, run once per batch without gradient.

    It is kept out of the module tree: so no checkpoint holds it, no optimizer gets it and `train()` does not reach it.

    Args:
        model: the network, with its weights.
        stages: its stages, where features are wanted.
        taps: the stages' last activations, for features before the activation.
        image_stats: (mean, std) that the images are normalised with; the teacher's own when None.
    """

    learns = False
    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        model: nn.Module,
        stages: Stages | None = None,
        taps: Sequence[nn.Module] = (),
        image_stats: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> None:
        super().__init__()
        network = model if stages is None else StagedModel(model, stages, taps)
        self._hidden = (network.eval().requires_grad_(False),)
        self.stages: Any = stages
        cfg: Any = model.pretrained_cfg
        own_stats = (tuple(cfg["mean"]), tuple(cfg["std"]))
        self.renormalises = image_stats is not None and tuple(map(tuple, image_stats)) != own_stats
        if image_stats is not None and self.renormalises:
            mean, std, own_mean, own_std = (torch.tensor(v).view(-1, 1, 1) for v in (*image_stats, *own_stats))
            self.register_buffer("scale", std / own_std, persistent=False)
            self.register_buffer("shift", (mean - own_mean) / own_std, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenTeacher:
        self._hidden[0]._apply(fn, recurse)  # it does follow the task to another device or layout
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def forward(self, view: View) -> tuple[Tensor, list[Tensor]]:
        images = view.images * self.scale + self.shift if self.renormalises else view.images
        answer = self._hidden[0](images)
        return answer if self.stages is not None else (answer, [])


class OnlineTeacher(nn.Module):
    """A network that is trained alongside, on the same batches, and learns nothing from the student.

    Args:
        model: the network, with fresh weights.
        stages: its stages.
        taps: the stages' last activations, for features before the activation.
    """

    learns = True

    def __init__(self, model: nn.Module, stages: Stages, taps: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.network = StagedModel(model, stages, taps)
        self.stages = stages

    def forward(self, view: View) -> tuple[Tensor, list[Tensor]]:
        return self.network(view.images)


class AverageTeacher(nn.Module):
    """The exponential moving average of the student's weights, which learns nothing by itself.

    It sees the student's batches in training mode, so BatchNorm normalises for both by the batch. Until some hundred
    steps are done the average is a short one (timm's warm-up of `ModelEmaV3`).

    Source: Tarvainen and Valpola, "Mean teachers are better role models", NeurIPS 2017.

    Args:
        setting: whose model is averaged.
        decay: how much of the average stays at a step.
    """

    learns = False

    def __init__(self, setting: Setting, decay: float) -> None:
        super().__init__()
        # Tuples: the student belongs to the task, and the average's weights are kept once, as `network`.
        self._student = (setting.model,)
        self._average = (ModelEmaV3(setting.model, decay=decay, use_warmup=True),)
        copy = self._average[0].module.requires_grad_(False).train(setting.model.training)
        self.stages = setting.stages
        self.batches_per_step = setting.batches_per_step
        taps = stage_activations(copy, setting.stages, setting.input_size) if setting.pre_activation else ()
        self.network = StagedModel(copy, setting.stages, taps)

    def begin_batch(self, batch: int) -> None:
        """Take the student's last step in."""
        if batch % self.batches_per_step == 0:
            self._average[0].update(self._student[0], step=batch // self.batches_per_step)

    @torch.no_grad()
    def forward(self, view: View) -> tuple[Tensor, list[Tensor]]:
        return self.network(view.images)


class AuxiliaryBranches(nn.Module):
    """The later stages and the classifier a second time, reading the student's first stage.

    The gradient of their own cross-entropy goes on into the student's first stage, as in deep supervision.

    Args:
        copy: another instance of the student's architecture, with weights of its own: equal weights would learn the
            same and teach nothing. Its stem and first stage are cut off.
        stages: the student's stages.
        input_size: (channels, height, width) of the images, for the dry run that checks the cut.

    Raises:
        ValueError: the later stages cannot be run on the first stage's features alone.
    """

    learns = True

    def __init__(self, copy: nn.Module, stages: Stages, input_size: tuple[int, int, int]) -> None:
        super().__init__()
        if len(stages) < 2:
            raise ValueError(
                f"auxiliary branches need two stages and got {len(stages)}; choose an architecture with more"
            )
        parameter = next(copy.parameters())
        images = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0)).to(parameter)
        mode = copy.training
        copy.eval()
        whole = StagedModel(copy, stages)
        with torch.no_grad(), _Calls(copy) as calls:
            logits, features = whole(images)
        for name in calls.finished_with(stages.names[0]):
            copy.set_submodule(name, nn.Identity())
        self.stages = Stages(*(field[1:] for field in dataclasses.astuple(stages)))
        self.network = StagedModel(copy, self.stages)
        try:
            with torch.no_grad():
                branch_logits, branch_features = self.network(features[0])
            reproduced = all(map(torch.equal, [branch_logits, *branch_features], [logits, *features[1:]]))
        except Exception:  # whatever a network says that is fed features in place of images
            reproduced = False
        if not reproduced:
            raise ValueError(
                f"the later stages of {type(copy).__name__} cannot be run on the features of its stage "
                f"{stages.names[0]}: they read more than those; choose an architecture whose stages are a chain of "
                "modules, such as a ResNet, WRN, VGG, RegNet or ConvNeXt"
            )
        copy.train(mode)

    def forward(self, view: View) -> tuple[Tensor, list[Tensor]]:
        return self.network(view.features[0])


class _Calls:
    """The modules of a model in the order in which they finish while this is open."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.finished: list[str] = []

    def __enter__(self) -> _Calls:
        def recorder(name: str) -> Callable[..., None]:
            return lambda *_: self.finished.append(name)

        self._handles = [m.register_forward_hook(recorder(name)) for name, m in self.model.named_modules() if name]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def finished_with(self, name: str) -> list[str]:
        """Modules that had run, for the last time, when `name` was through; of nested ones the outermost."""
        end = self.finished.index(name) + 1 if name in self.finished else 0
        done = set(self.finished[:end]) - set(self.finished[end:])
        return [module for module in done if not any(module.startswith(f"{outer}.") for outer in done)]


# --- what it teaches --------------------------------------------------------------------------------------------------


class TeacherDistillation(Objective):
    """The losses `features` and `kd` of a teacher, and `teacher_ce`, by which it is itself trained.

    Both come from one forward pass of the teacher. Where it has fewer stages than the student, as branches do, they
    match the student's last ones.

    Args:
        teacher: `FrozenTeacher`, `OnlineTeacher`, `AuxiliaryBranches` or `AverageTeacher`.
        stages: the student's stages.
        config: how features and logits are weighted.
        epochs: length of the run, which scales the warm-ups.
        criterion: the classification loss of a teacher that learns.

    Raises:
        ValueError: nothing would be taught, or features of different shapes.
    """

    teacher: Any

    def __init__(
        self,
        teacher: nn.Module,
        stages: Stages,
        config: TeacherConfig,
        *,
        epochs: float,
        criterion: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.teacher = teacher
        self.kd = kd = config.kd
        self.criterion = criterion if criterion is not None else nn.CrossEntropyLoss()
        self.weights = {}
        if config.teaches_features:
            check_stages_match(stages, self.teacher.stages)
            warmup = LossWeight(epochs, warmup_epochs=config.warmup_fraction * epochs)
            self.weights["features"] = Weight(config.lambda_features, config.share_features, warmup)
        if kd is not None:
            warmup = LossWeight(epochs, warmup_epochs=kd.warmup_fraction * epochs, whole_epochs=kd.whole_epochs)
            self.weights["kd"] = Weight(
                kd.weight, schedule=warmup if kd.warmup_fraction else None, takes_ce=kd.takes_ce
            )
        if not self.weights:
            raise ValueError(
                "the teacher would teach nothing: give lambda_features above 0, or add logit distillation (kd)"
            )
        if self.teacher.learns:
            self.weights["teacher_ce"] = Weight()

    def begin_batch(self, epoch: float, batch: int) -> None:
        if isinstance(self.teacher, AverageTeacher):
            self.teacher.begin_batch(batch)

    def forward(self, view: View) -> dict[str, Tensor]:
        logits, features = self.teacher(view)
        terms = {}
        if "features" in self.weights:
            learners = view.features[-len(features) :]
            losses = [l2(student, teacher.detach()) for student, teacher in zip(learners, features, strict=True)]
            terms["features"] = torch.stack(losses).mean()
        if self.kd is not None:
            student, teacher = view.logits, logits.detach()
            if self.kd.standardise:
                student, teacher = standardise(student), standardise(teacher)
            terms["kd"] = kl(student, teacher, self.kd.temperature)
        if "teacher_ce" in self.weights:
            terms["teacher_ce"] = self.criterion(logits.float(), view.targets)
        return terms


def check_stages_match(student: Stages, teacher: Stages) -> None:
    """Make sure that the teacher's features have the shapes of the student's (last) ones.

    Raises:
        ValueError: with the shapes of both and what would serve.
    """
    theirs = list(zip(teacher.channels, teacher.reductions, strict=True))
    ours = list(zip(student.channels, student.reductions, strict=True))
    if ours[-len(theirs) :] != theirs:
        shapes = [", ".join(f"{channels} at 1/{reduction}" for channels, reduction in side) for side in (ours, theirs)]
        raise ValueError(
            f"the student's stages have channels {shapes[0]} of the image's size, the teacher's {shapes[1]}: their "
            "features cannot be compared; choose a teacher of the student's family and width, only deeper (as "
            "tffd_resnet110 is to tffd_resnet20), or distil its logits alone with lambda_features=0 and kd"
        )
