"""Accuracy on the split as it is: what everything else is held against."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .measurement import Figures, Measurement, Part, Sample, percent
from .setting import Setting
from .subject import Subject


def measure(subject: Subject, setting: Setting) -> Measurement:
    tested = subject.predict(setting.source)
    true = tested.logits[np.arange(len(tested.targets)), tested.targets]
    above = (tested.logits > true[:, None]).sum(axis=1)
    sample = {"top1": tested.correct, "top5": above < 5, "nll": _nll(tested.logits, true)}
    return Measurement({"test": sample}, {"images": len(true)})


def figures(samples: Mapping[str, Sample]) -> Figures:
    test = samples["test"]
    return {"top1": percent(test["top1"]), "top5": percent(test["top5"]), "nll": float(test["nll"].mean())}


def _nll(logits: np.ndarray, true: np.ndarray) -> np.ndarray:
    from scipy.special import logsumexp

    return logsumexp(logits.astype(np.float64), axis=1) - true


PART = Part("clean", measure, figures)
