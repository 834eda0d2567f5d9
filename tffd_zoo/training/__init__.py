"""The training loop under the recipes, and what a run keeps on disk."""

from .loop import train
from .progress import NonFiniteLoss
from .run_folder import RunFolder

__all__ = ["NonFiniteLoss", "RunFolder", "train"]
