"""What a run keeps on disk: its recipe and environment, a metrics file, checkpoints, weights and the curves.

recipe.json  environment.json  data.json  metrics.jsonl  curves.png
checkpoints/step-00000123/     everything that resumes the run
weights/last.safetensors  best.safetensors  last_ema.safetensors  best_ema.safetensors
export/                        what timm loads
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, load
from accelerate.utils.constants import RNG_STATE_NAME
from safetensors import SafetensorError
from torch import nn

from ..atomic import replacing_file, replacing_folder, save_tensors
from ..data import ImageSource, ImageSpec, TrainSource
from ..json_files import read_json, write_json
from ..recipe import Recipe, differences
from ..run_record import CHECKPOINTS, DATA, ENVIRONMENT, METRICS_LINES, RECIPE, read_metrics, read_recipe, weights_file
from ..threads import cores_per_process

CHECKPOINT = "checkpoint.json"
"""What a checkpoint is of: its step, recipe and number of processes."""


class RunFolder:
    """The folder of one run.

    Args:
        recipe: what runs there; must be the one that the folder already holds, if any.
        accelerator: tells which process writes.

    Raises:
        ValueError: the folder holds a run of another recipe.
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator) -> None:
        self.path = recipe.folder
        self.recipe = recipe
        self.accelerator = accelerator
        self.checkpoints = self.path / CHECKPOINTS
        self.metrics_file = self.path / METRICS_LINES
        found = read_recipe(self.path)
        if found is not None:
            changed = differences(recipe.to_dict(), found)
            if changed:
                raise ValueError(
                    f"{self.path} holds a run of another recipe ({'; '.join(changed)}); "
                    "pass --output with another folder, or the same settings to resume it"
                )
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / RECIPE, recipe.to_dict())
            write_json(self.path / ENVIRONMENT, environment(accelerator))
        accelerator.wait_for_everyone()

    def describe_data(self, train: TrainSource, evaluation: ImageSource, spec: ImageSpec) -> None:
        """Record what is trained and evaluated on: an export and every figure need it."""
        if self.accelerator.is_main_process:
            splits = {
                role: {"split": source.split, "images": len(source), "fingerprint": source.fingerprint}
                for role, source in (("train", train), ("eval", evaluation))
            }
            about = {"source": train.name, "revision": train.revision, **splits, "spec": dataclasses.asdict(spec)}
            write_json(self.path / DATA, {**about, "label_names": list(train.label_names)})

    # --- metrics ------------------------------------------------------------------------------------------------------

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line to the metrics file."""
        if self.accelerator.is_main_process:
            with self.metrics_file.open("a") as file:
                file.write(json.dumps(record) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """All records, oldest first."""
        return read_metrics(self.metrics_file)

    def forget_after(self, step: int) -> None:
        """Drop what was recorded after `step`: a resumed run records it again."""
        if self.accelerator.is_main_process and self.metrics_file.exists():
            kept = [record for record in self.read_metrics() if record["step"] <= step]
            with replacing_file(self.metrics_file) as aside:
                aside.write_text("".join(json.dumps(record) + "\n" for record in kept))

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def latest_checkpoint(self) -> Path | None:
        """The newest finished checkpoint."""
        return max(self.checkpoints.glob("step-*"), default=None)

    def save_checkpoint(self, step: int) -> Path:
        """Write a checkpoint aside, rename it, and drop the oldest; on every process.

        Raises:
            OSError: it cannot be written; those before it are as they were.
        """
        folder = self.checkpoints / f"step-{step:08d}"
        with self._aside(folder) as aside:
            try:
                self.accelerator.save_state(str(aside), safe_serialization=True)
                if self.accelerator.is_main_process:
                    about = {"step": step, "processes": self.accelerator.num_processes, "recipe": self.recipe.to_dict()}
                    write_json(aside / CHECKPOINT, about)
            except (
                OSError,
                RuntimeError,
                SafetensorError,
            ) as error:  # of a full disk each library tells in its own way
                raise OSError(
                    f"the checkpoint {folder} cannot be written ({_first_line(error)}); is the disk full? Free some "
                    "space: the same command resumes from the checkpoint before it"
                ) from error
            self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            for old in sorted(self.checkpoints.glob("step-*"))[: -self.recipe.run.keep_checkpoints]:
                shutil.rmtree(old)
        return folder

    @contextmanager
    def _aside(self, folder: Path) -> Iterator[Path]:
        """One temporary folder for all processes, which the main one makes and renames."""
        if not self.accelerator.is_main_process:
            yield Path(broadcast_object_list([None])[0])
            return
        with replacing_folder(folder) as aside:
            yield Path(broadcast_object_list([str(aside)])[0])

    def load_checkpoint(self, folder: Path) -> None:
        """Load a checkpoint into everything that the accelerator prepared or registered.

        Raises:
            ValueError: it is damaged, of another recipe or of another number of processes.
        """
        delete = "delete that folder to resume from the one before it"
        about = read_json(folder / CHECKPOINT, delete) if (folder / CHECKPOINT).exists() else {}
        if changed := differences(self.recipe.to_dict(), about.get("recipe", self.recipe.to_dict())):
            raise ValueError(f"the checkpoint {folder} is of another recipe ({'; '.join(changed)}); {delete}")
        mine = self.accelerator.num_processes
        theirs = about.get("processes", mine)
        if theirs != mine:
            raise ValueError(
                f"the checkpoint {folder} is of a run on {theirs} process(es), and this one has {mine}; start "
                f"{theirs}, or pass --output with another folder"
            )
        try:
            # accelerate goes on without the random states when they cannot be read, and the run would be another
            states = folder / f"{RNG_STATE_NAME}_{self.accelerator.process_index}.pkl"
            load(states)
            self.accelerator.load_state(str(folder))
        except Exception as error:
            raise ValueError(f"the checkpoint {folder} cannot be read ({_first_line(error)}); {delete}") from error

    # --- weights ------------------------------------------------------------------------------------------------------

    def weights(self, which: str, ema: bool = False) -> Path:
        """File of the `last` or `best` weights."""
        return weights_file(self.path, f"{which}_ema" if ema else which)

    def save_weights(self, model: nn.Module, which: str, ema: bool = False) -> None:
        """Write plain weights; on the main process."""
        if self.accelerator.is_main_process:
            path = self.weights(which, ema)
            path.parent.mkdir(exist_ok=True)
            with replacing_file(path) as aside:
                save_tensors(model.state_dict(), aside)


def _first_line(error: Exception) -> str:
    """An error in one line, cut after its first sentence: torch explains at length."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0].partition('. ')[0].strip()}"


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Versions, commit and hardware: what a figure needs beside it."""
    packages = ("torch", "timm", "accelerate", "datasets", "huggingface_hub", "safetensors", "numpy")
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "device": str(accelerator.device),
        "hardware": _hardware(accelerator.device),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
    }


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} CPU, {cores_per_process()} cores, {capability}"


def _commit() -> str | None:
    """Commit of the source tree that this package runs from, marked when it has changes."""
    root = Path(__file__).parent

    def git(*args: str) -> str:
        command = ["git", "-C", str(root), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None  # an installed package has no tree
