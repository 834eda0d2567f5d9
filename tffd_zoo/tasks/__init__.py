"""Training tasks: a module whose forward returns the loss, the logits and every named term."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


def method_tag(recipe: Mapping[str, Any]) -> str:
    """What the methods of a recipe (as a dict) put before the data's part of a tag.

    `ce` stands for training without Tf-FD: `c100` is Tf-FD's, `ce_c100` that of its plain twin, `kd_c100` Tf-FD+'s.
    `ft` stands for a network that was trained before.
    """
    parts = [*([] if recipe.get("tffd") else ["ce"]), *(["ft"] if recipe.get("pretrained") else [])]
    parts += [method.tag(recipe[section]) for section, method in METHODS.items() if recipe.get(section)]
    return "_".join(filter(None, parts))


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
    "method_tag",
]
