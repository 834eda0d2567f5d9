"""A model under examination: its logits and its features on any images, the work shared by all processes."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn
from tqdm import tqdm

from ..cli import USER_ERRORS
from ..data import ImageSource, ImageSpec, eval_loader
from ..data.memory import Normalize
from ..evaluation import NonFiniteLogits, eval_mode
from ..loading import known_images, match_classes

_logger = logging.getLogger(__name__)

COMPILED_FROM = 100_000
"""Images that are worth the ten seconds of compiling a network for a CPU."""
NEEDS = {"scipy": "scipy", "cv2": "opencv-python-headless", "sklearn": "scikit-learn", "pytorch_ood": "pytorch-ood"}


@dataclass(frozen=True)
class Predictions:
    """What a model says of N images."""

    logits: np.ndarray
    """(N, classes) float32."""
    features: np.ndarray
    """(N, channels) float32: what enters the classifier."""
    targets: np.ndarray
    """(N,) int64 class of each image in its own data set."""

    @property
    def correct(self) -> np.ndarray:
        """(N,) bool: the highest logit is the target's."""
        return self.logits.argmax(axis=1) == self.targets


@dataclass
class Subject:
    """A timm classifier and how it is run."""

    name: str
    model: nn.Module
    spec: ImageSpec
    label_names: tuple[str, ...] | None = None
    """The classes in the order of the logits; None where they have no names."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch_size: int = 256
    amp_dtype: torch.dtype | None = None
    workers: int | None = None
    rank: int = 0
    world_size: int = 1
    _predicted: dict[tuple[str, ...], tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    _compiled: Callable[[Tensor], Tensor] | None = None

    @property
    def num_classes(self) -> int:
        classes = self.model.num_classes
        assert isinstance(classes, int)
        return classes

    @property
    def weights_hash(self) -> str:
        """Short hash of the names and bytes of all weights."""
        digest = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def known(self, source: ImageSource) -> ImageSource:
        """The images of `source` whose classes the model knows, these numbered as its logits are.

        Raises:
            ValueError: there are none.
        """
        part = known_images(self.name, self.label_names, source)
        numbers = match_classes(self.name, self.label_names, self.num_classes, part)
        return part if numbers == [*range(len(numbers))] else part.with_classes(self.label_names or ())

    def predict(self, source: ImageSource) -> Predictions:
        """Run the model on every image of `source`, as its config wants them; once, whichever labels they have."""
        key = (source.name, source.split, hashlib.sha256(source.rows.numpy().tobytes()).hexdigest())
        if key not in self._predicted:
            loader = eval_loader(
                source,
                self.spec,
                self.batch_size,
                rank=self.rank,
                world_size=self.world_size,
                workers=self.workers,
                memory_format=torch.channels_last,
            )
            self._predicted[key] = self._run((batch.images for batch in loader), len(loader), with_features=True)
        return Predictions(*self._predicted[key], source.labels.numpy())

    def expect(self, images: int) -> None:
        """Told how many images :meth:`logits_of` will be asked about: for many, a CPU gets the network compiled.

        Batch normalisation is folded into the convolutions then, and logits differ in their last bits.
        """
        if self._compiled is not None or self.device.type != "cpu" or images < COMPILED_FROM * self.world_size:
            return
        torch.compiler.reset()  # what was compiled for an earlier model counts against the limit of this one's code
        compiled = torch.compile(self.model, dynamic=False, options={"freezing": True})
        try:
            with self._inference():
                compiled(self._on_device(torch.zeros(self.batch_size, *self.spec.input_size)))
        except Exception as error:  # what a missing or a failing compiler raises has no common base
            reason = str(error).strip().splitlines() or [type(error).__name__]
            _logger.warning("%s cannot be compiled, so it takes longer: %s", self.name, reason[0])
        else:
            self._compiled = compiled

    def logits_of(self, images: np.ndarray) -> np.ndarray:
        """Run the model on uint8 images (N, H, W, 3): logits (N, classes).

        Images of another size than its input are brought to it as its config says.
        """
        return self._run_arrays(images, with_features=False)[0]

    def predict_arrays(self, images: np.ndarray) -> Predictions:
        """As :meth:`logits_of`, with the features; no target is right."""
        return Predictions(*self._run_arrays(images, with_features=True), np.full(len(images), -1))

    def _run_arrays(self, images: np.ndarray, with_features: bool) -> tuple[np.ndarray, np.ndarray]:
        part = np.array_split(np.arange(len(images)), self.world_size)[self.rank]
        starts = range(0, len(part), self.batch_size)
        normalize = Normalize(self.spec.mean, self.spec.std, self.spec.input_size, torch.channels_last)
        transform = create_transform(**asdict(self.spec))

        def batches() -> Iterator[Tensor]:
            for start in starts:
                chosen = images[part[start : start + self.batch_size]]
                if images.shape[1:3] == self.spec.input_size[1:]:
                    yield normalize(torch.from_numpy(np.ascontiguousarray(chosen)).permute(0, 3, 1, 2))
                else:
                    yield torch.stack([transform(Image.fromarray(image)) for image in chosen])

        return self._run(batches(), len(starts), with_features)

    def _run(self, batches: Iterable[Tensor], count: int, with_features: bool) -> tuple[np.ndarray, np.ndarray]:
        logits, features = [], []
        hide_bar = None if self.rank == 0 and count > 8 else True
        model: Any = self.model
        with self._inference():
            for images in tqdm(batches, self.name, count, unit="batch", leave=False, disable=hide_bar):
                images = self._on_device(images)
                if with_features:
                    maps = model.forward_features(images)
                    features.append(model.forward_head(maps, pre_logits=True).float().cpu().numpy())
                    logits.append(model.forward_head(maps).float().cpu().numpy())
                else:  # what was compiled is for whole batches
                    whole = len(images) == self.batch_size
                    network = self._compiled if self._compiled is not None and whole else model
                    logits.append(network(images).float().cpu().numpy())
        gathered_logits = self._gather(logits, self.num_classes)
        if not np.isfinite(gathered_logits).all():
            raise NonFiniteLogits(f"the logits of {self.name} are not finite: its weights are broken or diverged")
        return gathered_logits, self._gather(features, 0)

    @contextmanager
    def _inference(self) -> Iterator[None]:
        autocast = torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None)
        with eval_mode(self.model), torch.inference_mode(), autocast:
            yield

    def _on_device(self, images: Tensor) -> Tensor:
        return images.to(self.device, non_blocking=True, memory_format=torch.channels_last)

    def _gather(self, arrays: list[np.ndarray], width: int) -> np.ndarray:
        """The rows of all processes, in the order of the ranks, which is that of the images."""
        mine = np.concatenate(arrays) if arrays else np.zeros((0, width), np.float32)
        parts = exchange(mine, self.world_size)
        return np.concatenate([part for part in parts if len(part)] or [mine])


@dataclass(frozen=True)
class Failure:
    """What a process gives to the others when it cannot give what they wait for."""

    reason: str


class OtherProcessFailed(ValueError):
    """Another process cannot go on with what this one does too."""


def exchange(mine: Any, processes: int) -> list[Any]:
    """What every process gives here, in the order of the ranks.

    Wherever a process gives a `Failure`, the others fail at the exchange that they come to next: none waits for ever.

    Raises:
        OtherProcessFailed: another one gave a `Failure`.
    """
    given: list[Any] = [mine]
    if processes > 1:
        given = [None] * processes
        dist.all_gather_object(given, mine)
    failed = [f"process {rank}: {one.reason}" for rank, one in enumerate(given) if isinstance(one, Failure)]
    if failed:
        raise OtherProcessFailed("; ".join(failed))
    return given


@contextmanager
def together(processes: int) -> Iterator[None]:
    """What is done inside is done on every process or counts on none: where it fails on one, the others fail after it.

    Raises:
        OtherProcessFailed: it failed on another one.
    """
    try:
        yield
    except OtherProcessFailed:
        raise
    except Exception as error:
        with suppress(OtherProcessFailed):
            exchange(Failure(reason_of(error)), processes)
        raise
    exchange(None, processes)


def reason_of(error: Exception) -> str:
    """An error in a line, with what to install where that is it."""
    if isinstance(error, ImportError) and error.name in NEEDS:
        return f"needs {NEEDS[error.name]}, which is not installed; pip install 'tffd_zoo[suite]'"
    text = " ".join(str(error).split())
    return text if isinstance(error, USER_ERRORS) else f"{type(error).__name__}: {text}"
