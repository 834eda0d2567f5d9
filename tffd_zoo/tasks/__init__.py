"""Training tasks: a module whose forward returns the loss, the logits and every named term."""

from .base import DistillationTask, Objective, StagedModel, View, Weight
from .neighbours import BYOT, CSKD, PSKD, BYOTConfig, CSKDConfig, PSKDConfig, TfKD, TfKDConfig
from .regularisers import DropConfig, StageDrop
from .teachers import AuxiliaryBranches, FrozenTeacher, KDConfig, OnlineTeacher, TeacherConfig, TeacherDistillation
from .tffd import CANONICAL, REFERENCE, TfFD, TfFDConfig, TfFDTask, loss_weight_schedule

__all__ = [
    "BYOT",
    "CANONICAL",
    "CSKD",
    "PSKD",
    "REFERENCE",
    "AuxiliaryBranches",
    "BYOTConfig",
    "CSKDConfig",
    "DistillationTask",
    "DropConfig",
    "FrozenTeacher",
    "KDConfig",
    "Objective",
    "OnlineTeacher",
    "PSKDConfig",
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
