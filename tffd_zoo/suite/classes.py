"""Test sets whose classes are some of a model's, in any order: matched by name."""

from __future__ import annotations

import numpy as np

from ..data import ImageSource
from .subject import Predictions, Subject

IMAGENET_CLASSES = 1000


def class_indices(subject: Subject, source: ImageSource) -> np.ndarray:
    """The logit of every class of `source`.

    A class is known by the name that the model's config has for it; the 1,000 of ImageNet also by WordNet id, by any of
    their words, and by number where all are numbers, as in the folders of ImageNet-V2.

    Raises:
        ValueError: some are not among the model's, or two are the same.
    """
    known, classes = _known_names(subject), subject.num_classes
    if all(name.isdecimal() and int(name) < classes for name in source.label_names):
        known = {name: int(name) for name in source.label_names} | known
    unknown = [name for name in source.label_names if _plain(name) not in known]
    if unknown:
        raise ValueError(
            f"{subject.name} has no class {', '.join(map(repr, unknown[:3]))} ({len(unknown)} of "
            f"{len(source.label_names)} classes of {source.name}); rename the folders as the model names its classes"
        )
    indices = np.array([known[_plain(name)] for name in source.label_names])
    if len(set(indices.tolist())) < len(indices):
        raise ValueError(f"two classes of {source.name} are the same class of {subject.name}")
    return indices


def predict_by_class(subject: Subject, source: ImageSource) -> Predictions:
    """Predict among the classes of `source` alone, numbered as `source` numbers them, as ImageNet-A and -R are scored.

    Raises:
        ValueError: its classes are not the model's.
    """
    indices = class_indices(subject, source)
    predicted = subject.predict(source)
    return Predictions(predicted.logits[:, indices], predicted.features, predicted.targets)


def _known_names(subject: Subject) -> dict[str, int]:
    known = {}
    if subject.num_classes == IMAGENET_CLASSES:
        from timm.data import ImageNetInfo

        info = ImageNetInfo("imagenet-1k")
        for index, synset in enumerate(info.label_names()):
            words = info.label_name_to_description(synset).split(",")
            # a word that two classes share (crane, maillot) names neither
            for word in words:
                known[_plain(word)] = -1 if _plain(word) in known else index
            known[_plain(synset)] = index
        known = {name: index for name, index in known.items() if index >= 0}
    return known | {_plain(name): index for index, name in enumerate(subject.label_names or ())}


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", " ")
