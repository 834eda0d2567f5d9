"""Say what images show.

python -m tffd_zoo.predict tffd_resnet20 cat.png dog.png
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from .classifier import Guess, load
from .cli import run_cli
from .ranges import COUNT

BAR = 30


@dataclass(frozen=True)
class PredictConfig:
    """Say what images show, as the network was evaluated: its own preprocessing, class names and probabilities."""

    model: tyro.conf.Positional[str]
    """Registered name with or without tag (tffd_resnet20.c100), hf-hub:org/name[@revision] or local-dir:FOLDER."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files."""
    top_k: Annotated[int, COUNT] = 5
    """Classes to name for each image, the likeliest first."""
    json: bool = False
    """Print JSON: of each image its file and its classes."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, mps."""


def main(config: PredictConfig) -> None:
    """Print the likeliest classes of every image.

    Raises:
        ValueError, OSError: the model or an image cannot be used.
    """
    if not config.images:
        raise ValueError("name at least one image file")
    answers = load(config.model, config.device).predict(list(config.images), config.top_k)
    if config.json:
        records = [
            {"image": str(image), "guesses": [guess._asdict() for guess in guesses]}
            for image, guesses in zip(config.images, answers, strict=True)
        ]
        print(json.dumps(records, indent=2))
        return
    print("\n\n".join(f"{image}\n{chart(guesses)}" for image, guesses in zip(config.images, answers, strict=True)))


def chart(guesses: Sequence[Guess]) -> str:
    """Return one line per class: its name, its probability and a bar as long."""
    width = max(len(guess.label) for guess in guesses)
    room = max(5, min(BAR, shutil.get_terminal_size().columns - width - 12))
    return "\n".join(
        f"  {guess.label:<{width}}  {guess.probability:6.1%}  {'█' * round(room * guess.probability)}".rstrip()
        for guess in guesses
    )


if __name__ == "__main__":
    run_cli(main, PredictConfig)
