"""Images and labels for training and evaluation: sources, batches in memory or from workers, exact sharding."""

from .image_source import ImageSource, UnreadableImageError, holdout
from .loaders import Batch, ImageSpec, Loader, eval_loader, train_loader
from .memory import Augment
from .sources import open_source
from .streaming import StreamedSource, TrainSource, open_streamed

__all__ = [
    "Augment",
    "Batch",
    "ImageSource",
    "ImageSpec",
    "Loader",
    "StreamedSource",
    "TrainSource",
    "UnreadableImageError",
    "eval_loader",
    "holdout",
    "open_source",
    "open_streamed",
    "train_loader",
]
