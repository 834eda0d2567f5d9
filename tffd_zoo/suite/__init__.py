"""Evaluation that people choose by: calibration, corruptions, duplicates, unknown images, transfer and cost.

One module a part, each from a model and images to values of single images; `run` measures every part once, works the
figures out, and compares models on the same images. `python -m tffd_zoo.eval ... --suite standard` is the door.
"""

from .run import PARTS, parse_suite, run_suite
from .setting import STANDARD, SuiteConfig
from .subject import Subject

__all__ = ["PARTS", "STANDARD", "Subject", "SuiteConfig", "parse_suite", "run_suite"]
