"""A trained network ready to be asked: its preprocessing, evaluation mode and class names cannot be forgotten."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset
from timm.data.model_config import resolve_input_data_config
from torch import Tensor, nn

from .models import Release, known_release

AnImage = Image.Image | str | os.PathLike[str] | np.ndarray | Tensor
BATCH = 64


class Guess(NamedTuple):
    """One class that an image may show."""

    label: str
    probability: float
    class_id: int
    """Place of the class among the logits."""


@dataclass(frozen=True)
class Classifier:
    """A network with all that its predictions depend on; made by :func:`load`.

    Example:
        >>> classifier = tffd_zoo.load("tffd_resnet20")
        >>> classifier.predict("cat.png")[0].label
        'leopard'
    """

    name: str
    """What it was loaded by."""
    model: nn.Module
    """The plain timm model, in evaluation mode; what it wants is a batch of `transform`ed images."""
    transform: Callable[[Image.Image], Tensor]
    """From an RGB image to the (C, H, W) that the network was evaluated with."""
    label_names: tuple[str, ...]
    """Of the classes, in the order of the logits."""
    temperature: float = 1.0
    """What the logits are divided by before the softmax; 1 where the weights were not calibrated."""
    release: Release | None = None
    """Recipe, figures, size and licence, where the weights are a release of this zoo."""

    @overload
    def predict(self, images: AnImage, top_k: int = 5) -> list[Guess]: ...  # type: ignore[overload-overlap] # a str

    @overload
    def predict(self, images: Sequence[AnImage], top_k: int = 5) -> list[list[Guess]]: ...

    def predict(self, images: Any, top_k: int = 5) -> Any:
        """Return the likeliest classes of one image, or a list of them for each of several.

        Args:
            images: one image or a list of them: a PIL image, the path of a file, an array (H, W, 3) or (H, W) of uint8,
                a tensor (3, H, W) of uint8 or of floats in [0, 1]. All are turned upright, resized and normalised
                as in the evaluation of the network; what is transparent lies on white.
            top_k: how many classes, the likeliest first.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: something is no image; says what came and what to give.
        """
        several = isinstance(images, (list, tuple))
        best = self.probabilities(images if several else [images]).topk(min(top_k, len(self.label_names)))
        guesses = [
            [Guess(self.label_names[index], p, index) for p, index in zip(ps, indices, strict=True)]
            for ps, indices in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        return guesses if several else guesses[0]

    def probabilities(self, images: Sequence[AnImage]) -> Tensor:
        """Return the probability of every class, (images, classes): the softmax of the logits over `temperature`."""
        from .evaluation import eval_mode

        parameter = next(self.model.parameters())
        found = [torch.empty(0, len(self.label_names))]
        with eval_mode(self.model), torch.inference_mode():
            for start in range(0, len(images), BATCH):
                batch = torch.stack([self.transform(as_rgb(image)) for image in images[start : start + BATCH]])
                logits = self.model(batch.to(parameter.device, parameter.dtype)).float()
                found.append((logits / self.temperature).softmax(dim=1).cpu())
        return torch.cat(found)


def load(name: str, device: torch.device | str = "cpu") -> Classifier:
    """Load a trained network with all that its predictions depend on.

    Args:
        name: registered name with or without tag (tffd_resnet20.c100, any of timm's too), hf-hub:org/name[@revision] or
            local-dir:FOLDER.
        device: where it is to compute.

    Raises:
        ValueError, OSError: it cannot be had, its hashes differ or it tells no classes apart; says why.
    """
    # the Hub, exports and their checks: not on every import
    from .loading import check_model_name, load_model, temperature_of

    check_model_name(name)
    model = load_model(name).eval().to(device)
    if not model.num_classes:
        raise ValueError(f"{name} has no classes to tell apart; timm.create_model loads it for its features")
    return Classifier(
        name,
        model,
        create_transform(**resolve_input_data_config(model, use_test_size=True)),
        _label_names(model),
        temperature_of(name),
        release=known_release(name),
    )


def as_rgb(image: AnImage) -> Image.Image:
    """Return any kind of image as Pillow's, upright and in RGB.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no image; says what came and what to give.
    """
    from .data.pixels import UnreadableImageError, as_seen, decode_rgb

    if isinstance(image, (str, os.PathLike)):
        try:
            return decode_rgb(Path(image).read_bytes())
        except UnreadableImageError as error:
            raise ValueError(f"cannot read {os.fspath(image)}: {error}") from error
    if isinstance(image, Image.Image):
        return as_seen(image)
    if isinstance(image, Tensor):
        return Image.fromarray(_pixels_of(image))
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))):
            raise ValueError(
                f"an array of shape {image.shape} and type {image.dtype} is no image; give (H, W, 3) of uint8, or a "
                "tensor (3, H, W)"
            )
        return as_seen(Image.fromarray(image))
    raise ValueError(f"{type(image).__name__} is no image; give a PIL image, a path, an array or a tensor")


def _pixels_of(image: Tensor) -> np.ndarray:
    """(H, W, 3) uint8 of a tensor (3, H, W)."""
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"a tensor of shape {tuple(image.shape)} is no image; give (3, H, W), or a list of such")
    if image.is_floating_point():
        low, high = image.min().item(), image.max().item()
        if not (low >= 0 and high <= 1):  # a NaN fails both
            raise ValueError(
                f"a tensor of floats from {low:.3g} to {high:.3g} is no image in [0, 1]; give pixels as they are, not "
                "normalised (what is prepared already goes to .model)"
            )
        image = (image * 255).round().to(torch.uint8)
    elif image.dtype != torch.uint8:
        raise ValueError(f"a tensor of {image.dtype} is no image; give uint8, or floats in [0, 1]")
    return image.expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()


def _label_names(model: Any) -> tuple[str, ...]:
    """The names that came with the weights; for timm's ImageNet weights, timm's own; else numbers."""
    names = model.pretrained_cfg.get("label_names")
    subset = infer_imagenet_subset(model)
    if not names and subset:
        names = ImageNetInfo(subset).label_descriptions()
    if isinstance(names, Sequence) and len(names) == model.num_classes:
        return tuple(names)
    return tuple(f"class {index}" for index in range(model.num_classes))
