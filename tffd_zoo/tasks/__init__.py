"""Training tasks: a module whose forward returns the loss, the logits and every named term."""

from .base import DistillationTask, Objective, View, Weight
from .tffd import CANONICAL, REFERENCE, TfFD, TfFDConfig, TfFDTask

__all__ = [
    "CANONICAL",
    "REFERENCE",
    "DistillationTask",
    "Objective",
    "TfFD",
    "TfFDConfig",
    "TfFDTask",
    "View",
    "Weight",
]
