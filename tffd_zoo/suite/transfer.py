"""What the frozen features are worth on other labels: neighbours, a linear probe, and a probe on a few images.

Features are what enters the classifier. All three are scikit-learn's, with settings chosen beforehand and the same for
every model: nothing is tuned on the images that are reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..data import ImageSource
from ..known_data import DATASETS, find_dataset
from .measurement import Figures, Measurement, Part, Sample, percent
from .setting import Setting, open_named, test_subset
from .subject import Predictions, Subject

NEIGHBOURS = 20
SHOTS = (1, 5, 10)
"""Training images of each class."""
DRAWS = 5
"""How often those images are drawn; the figure is the mean."""
COARSE = "coarse_label"


def measure(subject: Subject, setting: Setting) -> Measurement:
    samples: dict[str, Sample] = {}
    facts: dict[str, Any] = {}
    problems = []
    for text in _wanted(setting):
        try:
            name, (train, test) = _open(text, setting)
        except (ValueError, OSError) as error:
            problems.append(f"{text}: {error}")
            continue
        probed = probe(subject.predict(train), subject.predict(test), setting.config.suite_seed)
        samples[name] = {f"{name}_{method}": correct for method, correct in probed.items()}
        facts |= {f"{name}_classes": test.num_classes, f"{name}_train_images": len(train)}
    if not samples:
        raise ValueError("; ".join(problems) or "no label set is named with --transfer")
    return Measurement(samples, facts, tuple(problems))


def _wanted(setting: Setting) -> tuple[str, ...]:
    if setting.config.transfer is not None:
        return setting.config.transfer
    cifar100 = find_dataset(setting.source.name, setting.source.num_classes) == DATASETS["c100"]
    return ("digits", "coarse") if cifar100 else ("digits",)


def _open(text: str, setting: Setting) -> tuple[str, list[ImageSource]]:
    if text != "coarse":
        name, (train, test) = open_named(text, ("train", "test"))
        return name, [test_subset(train, setting.config.fit_images), test]
    # the images of the other parts, with other labels: the model has seen them by then
    train, test = setting.fit_source, setting.source
    return text, [setting.open_labels(source.split, COARSE).subset(source.rows) for source in (train, test)]


def probe(train: Predictions, test: Predictions, seed: int) -> Sample:
    """Which test images each probe gets right: (N,) bool, few-shot ones (N, draws)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def correct(model: Any, rows: np.ndarray) -> np.ndarray:
        return model.fit(train.features[rows], train.targets[rows]).predict(test.features) == test.targets

    def linear() -> Any:
        return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))

    everything = np.arange(len(train.targets))
    neighbours = KNeighborsClassifier(min(NEIGHBOURS, len(everything)), metric="cosine")
    found = {"knn": correct(neighbours, everything), "linear": correct(linear(), everything)}
    smallest = np.bincount(train.targets)[np.unique(train.targets)].min()
    for shots in SHOTS:
        if shots <= smallest:
            draws = [few(train.targets, shots, np.random.default_rng((seed, shots, draw))) for draw in range(DRAWS)]
            found[f"shot{shots}"] = np.stack([correct(linear(), rows) for rows in draws], axis=1)
    return found


def few(targets: np.ndarray, shots: int, generator: np.random.Generator) -> np.ndarray:
    """Rows of `shots` images of each class, drawn at random."""
    return np.concatenate(
        [generator.choice(np.flatnonzero(targets == label), shots, replace=False) for label in np.unique(targets)]
    )


def figures(samples: Mapping[str, Sample]) -> Figures:
    return {figure: percent(correct) for sample in samples.values() for figure, correct in sample.items()}


PART = Part("transfer", measure, figures, depends=("transfer", "fit_images", "train_split", "suite_seed"))
