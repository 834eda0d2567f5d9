"""Teacher-free feature distillation for any timm model, and a zoo of the students it trains.

Importing the package registers its architectures with timm: `timm.create_model("tffd_resnet20", pretrained=True)`.
"""

from . import models
from ._version import __version__
from .classifier import Classifier, load
from .losses import inter_layer_loss, intra_layer_loss, pair_channels, stage_pairs
from .tasks import CANONICAL, REFERENCE, DistillationTask, TfFDConfig, TfFDTask

__all__ = [
    "CANONICAL",
    "REFERENCE",
    "Classifier",
    "DistillationTask",
    "TfFDConfig",
    "TfFDTask",
    "__version__",
    "inter_layer_loss",
    "intra_layer_loss",
    "load",
    "models",
    "pair_channels",
    "stage_pairs",
]
