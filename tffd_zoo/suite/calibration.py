"""Calibration: does a confidence of 70 % mean right in 70 % of cases? Before and after one temperature."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .measurement import Figures, Measurement, Part, Sample
from .setting import Setting
from .subject import Subject

BINS = 15


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Probabilities of each row of `logits` / `temperature`."""
    from scipy.special import softmax as row_softmax

    return row_softmax(logits / np.float32(temperature), axis=1)


def fit_temperature(logits: np.ndarray, targets: np.ndarray) -> float:
    """The T > 0 whose softmax(logits / T) has the least NLL (Guo et al., ICML 2017). No prediction changes by it."""
    from scipy.optimize import minimize_scalar
    from scipy.special import logsumexp

    logits = logits.astype(np.float64)
    true = logits[np.arange(len(targets)), targets].mean()

    def nll(log_temperature: float) -> float:
        scale = np.exp(-log_temperature)
        return logsumexp(scale * logits, axis=1).mean() - scale * true

    return float(np.exp(minimize_scalar(nll, bounds=(-4, 4), method="bounded", options={"xatol": 1e-6}).x))


def calibration_error(confidence: np.ndarray, hit: np.ndarray, bins: int = BINS) -> float:
    """ECE, percent, in equal-width bins that hold their upper edges: as `tffd_zoo.evaluation` has it.

    Args:
        confidence: (N,) in [0, 1].
        hit: (N,) bool: what was predicted is true.
        bins: how many.
    """
    edges = np.linspace(0, 1, bins + 1, dtype=confidence.dtype)[1:-1]
    gaps = np.bincount(np.searchsorted(edges, confidence), hit - confidence.astype(np.float64), bins)
    return 100 * float(np.abs(gaps).sum()) / len(confidence)


def adaptive_error(confidence: np.ndarray, hit: np.ndarray, bins: int = BINS) -> float:
    """ECE, percent, in bins of as many images each, by rising confidence (Nguyen and O'Connor, EMNLP 2015)."""
    order = np.argsort(confidence, kind="stable")
    gaps = (hit - confidence.astype(np.float64))[order]
    return 100 * sum(abs(part.sum()) for part in np.array_split(gaps, bins)) / len(gaps)


def classwise_error(probabilities: np.ndarray, targets: np.ndarray, bins: int = BINS) -> float:
    """The calibration error of each class's probability, as of a yes-or-no question, averaged over the classes.

    Percent (Kull et al., "Beyond temperature scaling", NeurIPS 2019).
    """
    images, classes = probabilities.shape
    edges = np.linspace(0, 1, bins + 1, dtype=probabilities.dtype)[1:-1]
    cell = np.searchsorted(edges, probabilities) + bins * np.arange(classes)
    gaps = -np.bincount(cell.ravel(), probabilities.ravel(), bins * classes)
    gaps += np.bincount(cell[np.arange(images), targets], minlength=bins * classes)
    return 100 * float(np.abs(gaps).sum()) / images / classes


def brier(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """Mean squared distance of the probabilities to the truth, summed over the classes: 0 to 2."""
    true = probabilities[np.arange(len(targets)), targets]
    return float(np.mean((probabilities**2).sum(axis=1) - 2 * true + 1))


def measure(subject: Subject, setting: Setting) -> Measurement:
    fit = subject.predict(setting.fit_source)
    temperature = fit_temperature(fit.logits, fit.targets)
    tested = subject.predict(setting.source)
    sample = {
        "targets": tested.targets,
        "probabilities": softmax(tested.logits),
        "scaled": softmax(tested.logits, temperature),
    }
    return Measurement({"test": sample}, {"temperature": round(temperature, 4), "fitted_on": setting.fitted_on})


def figures(samples: Mapping[str, Sample]) -> Figures:
    targets = samples["test"]["targets"]
    found: Figures = {}
    for name, suffix in (("probabilities", ""), ("scaled", "_scaled")):
        probabilities = samples["test"][name]
        confidence, hit = probabilities.max(axis=1), probabilities.argmax(axis=1) == targets
        true = probabilities[np.arange(len(targets)), targets].astype(np.float64)
        found |= {
            f"ece{suffix}": calibration_error(confidence, hit),
            f"adaptive_ece{suffix}": adaptive_error(confidence, hit),
            f"classwise_ece{suffix}": classwise_error(probabilities, targets),
            f"brier{suffix}": brier(probabilities, targets),
            f"nll{suffix}": float(-np.log(np.maximum(true, np.finfo(np.float32).tiny)).mean()),
        }
    return found


PART = Part("calibration", measure, figures, depends=("fit_images", "train_split"))
