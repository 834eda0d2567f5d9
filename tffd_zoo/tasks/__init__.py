"""Training tasks: a module whose forward returns the loss, the logits and every named term."""

from .base import DistillationTask, Objective, StagedModel, View, Weight
from .method import Method, Setting
from .neighbours import BYOT, CSKD, PSKD, BYOTConfig, CSKDConfig, PSKDConfig, TfKD, TfKDConfig
from .regularisers import DropConfig, StageDrop
from .teachers import AuxiliaryBranches, FrozenTeacher, KDConfig, OnlineTeacher, TeacherConfig, TeacherDistillation
from .tffd import CANONICAL, REFERENCE, TfFD, TfFDConfig, TfFDTask, loss_weight_schedule

METHODS: dict[str, type[Method]] = {
    "tffd": TfFDConfig,
    "teacher": TeacherConfig,
    "byot": BYOTConfig,
    "cs_kd": CSKDConfig,
    "tf_kd": TfKDConfig,
    "ps_kd": PSKDConfig,
    "drop": DropConfig,
}
"""What may teach beside the labels, by the section of the recipe that asks for it."""

__all__ = [
    "BYOT",
    "CANONICAL",
    "CSKD",
    "METHODS",
    "PSKD",
    "REFERENCE",
    "AuxiliaryBranches",
    "BYOTConfig",
    "CSKDConfig",
    "DistillationTask",
    "DropConfig",
    "FrozenTeacher",
    "KDConfig",
    "Method",
    "Objective",
    "OnlineTeacher",
    "PSKDConfig",
    "Setting",
    "StageDrop",
    "StagedModel",
    "TeacherConfig",
    "TeacherDistillation",
    "TfFD",
    "TfFDConfig",
    "TfFDTask",
    "TfKD",
    "TfKDConfig",
    "View",
    "Weight",
    "loss_weight_schedule",
]
