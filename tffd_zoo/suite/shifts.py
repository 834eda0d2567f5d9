"""Accuracy on other test sets of the same classes: ImageNet-V2, -A, -R, ReaL's labels, a folder of one's own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..data import open_source
from ..json_files import read_text
from .classes import predict_by_class
from .measurement import Figures, Measurement, Part, Sample, percent
from .setting import Setting, parse_named
from .subject import Subject


def measure(subject: Subject, setting: Setting) -> Measurement:
    samples: dict[str, Sample] = {}
    facts: dict[str, int] = {}
    problems = []
    for text in setting.config.shifts:
        try:
            name, data, (split,) = parse_named(text, ("train",))
            if data.endswith(".json"):
                correct = real_correct(
                    subject.predict(setting.source).logits, read_real(Path(data), setting.source.rows.numpy())
                )
            else:
                source = open_source(data, split)
                correct = predict_by_class(subject, source).correct
                facts[f"{name}_classes"] = source.num_classes
        except (ValueError, OSError) as error:
            problems.append(f"{text}: {error}")
        else:
            samples[name] = {f"{name}_top1": correct}
            facts[f"{name}_images"] = len(correct)
    if not samples:
        raise ValueError("; ".join(problems) or "no test set is named with --shifts NAME=DATA")
    return Measurement(samples, facts, tuple(problems))


def read_real(path: Path, rows: np.ndarray) -> list[Sequence[int]]:
    """ReaL's labels of the images at `rows`: for each a list of classes, empty where no label was agreed on.

    Beyer et al., "Are we done with ImageNet?", 2020; the file is `real.json`, one list an image of the validation set.

    Raises:
        ValueError: it is no such file, or too short.
    """
    try:
        labels = json.loads(read_text(path, "give ReaL's real.json"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}); give ReaL's real.json") from error
    if not (isinstance(labels, list) and all(isinstance(entry, list) for entry in labels)):
        raise ValueError(f"{path} is not a list of lists of classes; give ReaL's real.json")
    if len(labels) <= rows.max():
        raise ValueError(f"{path} has labels of {len(labels)} images, and the split has more: {int(rows.max()) + 1}")
    return [labels[row] for row in rows]


def real_correct(logits: np.ndarray, labels: Sequence[Sequence[int]]) -> np.ndarray:
    """Whether the first class is one of the image's labels, over the images that have any: (M,) bool."""
    predicted = logits.argmax(axis=1)
    return np.array([best in allowed for best, allowed in zip(predicted, labels, strict=True) if allowed])


def figures(samples: Mapping[str, Sample]) -> Figures:
    return {figure: percent(correct) for sample in samples.values() for figure, correct in sample.items()}


PART = Part("shifts", measure, figures, depends=("shifts",))
