"""What a training method is to the rest of the house: what it asks for, what it adds, and what it is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..stages import Stages
from .base import Objective


@dataclass(frozen=True)
class Setting:
    """What a method is built for."""

    model: nn.Module
    """The network that is trained."""
    stages: Stages
    """Its stages, whose features every method sees."""
    chosen_stages: tuple[int, ...] | None
    """The choice that gave them (`find_stages`); None for all."""
    pre_activation: bool
    """Whether the features are taken before the activation."""
    input_size: tuple[int, int, int]
    """(channels, height, width) of the images."""
    image_stats: tuple[Sequence[float], Sequence[float]]
    """(mean, std) that they are normalised with."""
    num_classes: int
    epochs: float
    """Length of the run."""
    batches_per_step: int
    """Batches whose gradients make one step of the optimizer."""
    criterion: nn.Module
    """The classification loss."""
    labels: Tensor | None
    """(images,) class of every training image; None where they are streamed."""
    second_network: Callable[[Any], nn.Module]
    """Loads or makes the network that a `TeacherConfig` names."""


class Method:
    """A section of a recipe: what teaches the network beside its labels.

    The sub-class is the frozen dataclass of the method's settings. `describe` and `tag` read the section as a recipe
    records it, whatever version wrote that.
    """

    label: ClassVar[str]
    """Its name in a table."""
    pairs_classes: ClassVar[bool] = False
    """Half of every batch are partners, other images of the same classes."""
    one_class: ClassVar[bool] = False
    """An image is of one class: no mixup, no CutMix."""
    all_labels: ClassVar[bool] = False
    """The labels of all images are read before training: no streaming."""

    @property
    def pre_activation(self) -> bool:
        """Whether it compares features before the activation."""
        return False

    def build(self, setting: Setting) -> Objective:
        """What it adds to the training task.

        Raises:
            ValueError: the setting does not serve; says what would.
        """
        raise AssertionError("a method builds its objective")

    @classmethod
    def describe(cls, settings: Mapping[str, Any]) -> str:
        """What it did, in words that follow "with"."""
        raise AssertionError("a method describes itself")

    @classmethod
    def tag(cls, settings: Mapping[str, Any]) -> str:
        """Its part in the tag of the weights, as `kd` in `kd_c100`; empty for none."""
        return cls.label.lower().replace("-", "_")
