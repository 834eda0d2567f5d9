"""Images and labels for training and evaluation: sources, batches in memory or from workers, exact sharding."""

from .image_source import ImageSource, holdout
from .loaders import Batch, ImageSpec, Loader, eval_loader, train_loader
from .memory import Augment
from .pixels import UnreadableImageError, decode_rgb
from .sources import open_source
from .splits import EVAL_SPLITS, NoSuchSplit
from .streaming import StreamedSource, TrainSource, open_streamed

__all__ = [
    "EVAL_SPLITS",
    "Augment",
    "Batch",
    "ImageSource",
    "ImageSpec",
    "Loader",
    "NoSuchSplit",
    "StreamedSource",
    "TrainSource",
    "UnreadableImageError",
    "decode_rgb",
    "eval_loader",
    "holdout",
    "open_source",
    "open_streamed",
    "train_loader",
]
