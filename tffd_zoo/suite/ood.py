"""Can the model tell images of its classes from images of none? By two scores of logits and one of features.

Detectors and curves are pytorch-ood's. AUROC is the chance that an unknown image scores higher than a known one. FPR95
is the part of unknown images that pass when the threshold lets 95 % of the known ones pass.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from .measurement import Figures, Measurement, Part, Sample
from .setting import Setting, open_named
from .subject import Predictions, Subject

SCORES = ("softmax", "energy", "knn")
NEIGHBOURS = 50
NOISE_IMAGES = 2000
KNOWN = "known"


def measure(subject: Subject, setting: Setting) -> Measurement:
    from pytorch_ood.detector import KNN, EnergyBased, MaxSoftmax

    fit = subject.predict(setting.fit_source)
    neighbours = min(NEIGHBOURS, len(fit.features))
    distance = KNN(None, k=neighbours).fit_features(torch.from_numpy(fit.features), torch.from_numpy(fit.targets))

    def scores(predicted: Predictions) -> Sample:
        logits = torch.from_numpy(predicted.logits)
        found = {
            "softmax": MaxSoftmax.score(logits),
            "energy": EnergyBased.score(logits),
            "knn": distance.predict_features(torch.from_numpy(predicted.features)),
        }
        return {name: score.numpy().astype(np.float32) for name, score in found.items()}

    samples = {KNOWN: scores(subject.predict(setting.source))}
    facts = {"neighbours": neighbours, "neighbours_among": setting.fitted_on}
    problems = []
    for text in setting.config.ood:
        try:
            if text == "noise":
                name, unknown = text, _noise(subject, setting)
            else:
                name, (source,) = open_named(text, ("test",))
                unknown = subject.predict(source)
        except (ValueError, OSError) as error:
            problems.append(f"{text}: {error}")
        else:
            samples[name] = scores(unknown)
            facts[f"{name}_images"] = len(unknown.logits)
    if len(samples) == 1:
        raise ValueError("; ".join(problems) or "no unknown images are named with --ood")
    return Measurement(samples, facts, tuple(problems))


def _noise(subject: Subject, setting: Setting) -> Predictions:
    """Images of independent uniform values, at the size of the model's input."""
    height, width = subject.spec.input_size[1:]
    drawn = np.random.default_rng(setting.config.suite_seed).integers(0, 256, (NOISE_IMAGES, height, width, 3))
    return subject.predict_arrays(drawn.astype(np.uint8))


def figures(samples: Mapping[str, Sample]) -> Figures:
    found: Figures = {}
    for name, unknown in samples.items():
        if name != KNOWN:
            for score in SCORES:
                auroc, fpr95 = separation(samples[KNOWN][score], unknown[score])
                found |= {f"{name}_{score}_auroc": auroc, f"{name}_{score}_fpr95": fpr95}
    return found


def separation(known: np.ndarray, unknown: np.ndarray) -> tuple[float, float]:
    """AUROC and FPR95, percent, of scores that are high for unknown images."""
    from pytorch_ood.metrics.functional import auroc, fpr_at_tpr

    scores = torch.from_numpy(np.concatenate([known, unknown]))
    labels = torch.cat([torch.zeros(len(known)), -torch.ones(len(unknown))])
    # pytorch-ood looks for unknown images; FPR95 is told of known ones, so sides and signs change
    passing = fpr_at_tpr(-scores, -1 - labels, 0.95)
    return 100 * auroc(scores, labels).item(), 100 * passing.item()


PART = Part("ood", measure, figures, depends=("ood", "fit_images", "train_split", "suite_seed"))
