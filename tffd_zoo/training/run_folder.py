"""What a run keeps on disk: its recipe and environment, a metrics file, checkpoints, weights and the curves.

recipe.json  environment.json  data.json  metrics.jsonl  curves.png
checkpoints/step-00000123/     everything that resumes the run
weights/last.safetensors  best.safetensors  last_ema.safetensors  best_ema.safetensors
export/                        what timm loads
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import nn

from ..atomic import replacing_file, replacing_folder, save_tensors, sync, write_text
from ..cli import USER_ERRORS
from ..data import ImageSource, ImageSpec, TrainSource
from ..data.image_source import some_of
from ..export_record import file_sha256
from ..hardware import describe_hardware
from ..json_files import read_json, write_json
from ..processes import of_a_lost_process
from ..recipe import Recipe, differences
from ..run_record import (
    CHECKPOINTS,
    DATA,
    ENVIRONMENT,
    MEND,
    METRICS_LINES,
    RECIPE,
    read_metrics,
    read_recipe,
    weights_file,
)
from .pickles import first_line, refuse_code

CHECKPOINT = "checkpoint.json"
"""What a checkpoint is of: its step, recipe and number of processes, and the hashes of its files..."""
OWN_HASH = "sha256_of_the_rest"
"""...and of these facts."""

LOCK = ".lock"
HOLDER = ".holder.json"
"""Held for as long as a process writes to the folder, and who that is."""
PATIENCE = 10.0
"""Seconds in which a run that was just killed gives up the folder."""


class RunFolder:
    """The folder of one run, of which no other process writes to it.

    Args:
        recipe: what runs there; must be the one that the folder already holds, if any.
        data: what it is trained and evaluated on, a :func:`data_record`; likewise.
        accelerator: tells which process writes.

    Raises:
        ValueError: the folder holds a run of another recipe or on other data, or another process writes to it.
            Nothing was touched then.
    """

    def __init__(self, recipe: Recipe, data: Mapping[str, Any], accelerator: Accelerator) -> None:
        self.path = recipe.folder
        self.recipe = recipe
        self.data = data
        self.accelerator = accelerator
        self.checkpoints = self.path / CHECKPOINTS
        self.metrics_file = self.path / METRICS_LINES
        self._on_main(self._take)

    def _take(self) -> None:
        """Make the folder this process's own, if it may be."""
        self._check()
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path / LOCK, is_singleton=True)  # freed when the process ends, however it does
        try:
            self._lock.acquire(timeout=PATIENCE)
        except Timeout:
            who = read_json(self.path / HOLDER, "wait for that run") if (self.path / HOLDER).exists() else {}
            raise ValueError(
                f"{self.path} is being written by process {who.get('pid', '?')} on {who.get('host', 'some machine')} "
                f"since {who.get('since', 'just now')}; wait for it or stop it, or pass --output with another folder"
            ) from None
        self._check()  # again: what held the folder until now may have written to it
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        write_json(self.path / HOLDER, {"pid": os.getpid(), "host": platform.node(), "since": now})
        write_json(self.path / RECIPE, self.recipe.to_dict())
        write_json(self.path / ENVIRONMENT, environment(self.accelerator))
        write_json(self.path / DATA, self.data)

    def _check(self) -> None:
        changed = differences(self.recipe.to_dict(), read_recipe(self.path) or self.recipe.to_dict())
        if changed:
            raise ValueError(
                f"{self.path} holds a run of another recipe ({'; '.join(changed)}); "
                "pass --output with another folder, or the same settings to resume it"
            )
        if (self.path / DATA).exists() and (changed := data_changes(self.data, read_json(self.path / DATA, MEND))):
            raise ValueError(
                f"{self.path} holds a run on other data ({'; '.join(changed)}); pass --output with another folder, or "
                "give the same data to resume it"
            )

    def _on_main(self, action: Callable[[], None]) -> None:
        """Have the main process do what all depend on; a user's error there is one on every process."""
        failed: list[Exception | None] = [None]
        if self.accelerator.is_main_process:
            try:
                action()
            except USER_ERRORS as error:
                failed = [error]
        failed = broadcast_object_list(failed)
        if failed[0] is not None:
            raise failed[0]

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
            write_text(self.metrics_file, "".join(json.dumps(record) + "\n" for record in kept))

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def resume(self) -> Path | None:
        """Load the newest sound checkpoint, if there is any, and return it.

        A damaged one is said to be, and put aside.

        Raises:
            ValueError: there are checkpoints and all of them are damaged, or one is of another run.
        """
        damage = ""
        for folder in sorted(self.checkpoints.glob("step-*"), reverse=True):
            found = [damage_of(folder) if self.accelerator.is_main_process else ""]
            damage = broadcast_object_list(found)[0]
            if not damage:
                self.load_checkpoint(folder)
                return folder
            self.accelerator.print(f"the checkpoint {folder} is damaged ({damage}): it is put aside for the one before")
            if self.accelerator.is_main_process:
                folder.rename(folder.with_name(f"damaged-{folder.name}"))
            self.accelerator.wait_for_everyone()
        if damage:
            raise ValueError(
                f"no checkpoint of {self.path} is whole (the last one: {damage}); restore one from a copy, or pass "
                "--output with another folder to start again"
            )
        return None

    def save_checkpoint(self, step: int) -> Path:
        """Write a checkpoint aside, rename it, and drop the oldest; on every process.

        Raises:
            OSError: it cannot be written; those before it are as they were.
        """
        folder = self.checkpoints / f"step-{step:08d}"
        with self._aside(folder) as aside:
            try:
                self.accelerator.save_state(str(aside), safe_serialization=True)
                self.accelerator.wait_for_everyone()
                if self.accelerator.is_main_process:
                    if self.metrics_file.exists():  # no checkpoint is newer than the figures
                        sync(self.metrics_file)
                    sync(self.path)
                    about = {
                        "step": step,
                        "processes": self.accelerator.num_processes,
                        "recipe": self.recipe.to_dict(),
                        "data": self.data,
                        "sha256": _hashes(aside),
                    }
                    write_json(aside / CHECKPOINT, {**about, OWN_HASH: _hash_of(about)})
            except (
                OSError,
                RuntimeError,
                SafetensorError,
            ) as error:  # of a full disk each library tells in its own way
                if of_a_lost_process(error):
                    raise
                raise OSError(
                    f"the checkpoint {folder} cannot be written ({first_line(error)}); is the disk full? Free some "
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
        """Load a sound checkpoint into everything that the accelerator prepared or registered.

        Raises:
            ValueError: it is of another recipe, other data or another number of processes, or does not fit.
        """
        delete = "delete that folder to resume from the one before it"
        about = read_json(folder / CHECKPOINT, delete)
        if changed := differences(self.recipe.to_dict(), about["recipe"]):
            raise ValueError(f"the checkpoint {folder} is of another recipe ({'; '.join(changed)}); {delete}")
        if changed := data_changes(self.data, about["data"]):
            raise ValueError(f"the checkpoint {folder} is of other data ({'; '.join(changed)}); {delete}")
        mine, theirs = self.accelerator.num_processes, about["processes"]
        if theirs != mine:
            raise ValueError(
                f"the checkpoint {folder} is of a run on {theirs} process(es), and this one has {mine}; start "
                f"{theirs}, or pass --output with another folder"
            )
        try:
            self.accelerator.load_state(str(folder))
        except Exception as error:
            raise ValueError(f"the checkpoint {folder} cannot be read ({first_line(error)}); {delete}") from error

    # --- weights ------------------------------------------------------------------------------------------------------

    def weights(self, which: str, ema: bool = False) -> Path:
        """File of the `last` or `best` weights."""
        return weights_file(self.path, f"{which}_ema" if ema else which)

    def save_weights(self, model: nn.Module, which: str, step: int, ema: bool = False) -> None:
        """Write plain weights, the step that they are of and the names of their classes; on the main process."""
        if self.accelerator.is_main_process:
            path = self.weights(which, ema)
            path.parent.mkdir(exist_ok=True)
            with replacing_file(path) as aside:
                about = {"step": str(step), "label_names": json.dumps(self.data["label_names"])}
                save_tensors(model.state_dict(), aside, **about)


def damage_of(folder: Path) -> str:
    """What is wrong with the files of a checkpoint, "" if nothing is; none of them can run code."""
    try:
        about = read_json(folder / CHECKPOINT, MEND)
        if about.get(OWN_HASH, _hash_of(about)) != _hash_of(about):
            return f"{CHECKPOINT} is not the file that was saved"
        listed = about["sha256"]
        found = _hashes(folder)
    except (OSError, ValueError, KeyError) as error:
        return first_line(error)
    for name in sorted({*listed, *found}):
        if listed.get(name) != found.get(name):
            return f"{name} is {'missing' if name not in found else 'not the file that was saved'}"
    try:
        refuse_code(folder)
    except ValueError as error:
        return str(error)
    return ""


def data_record(train: TrainSource, evaluation: ImageSource, spec: ImageSpec) -> dict[str, Any]:
    """What a run is trained and evaluated on, in plain values: an export and every figure need it."""
    splits: dict[str, dict[str, Any]] = {
        role: {
            "split": source.split,
            "images": len(source),
            "fingerprint": source.fingerprint,
            "outline": source.outline,
        }
        for role, source in (("train", train), ("eval", evaluation))
    }
    splits["eval"]["classes"] = evaluation.num_classes - len(evaluation.classes_without_images)
    about = {"source": train.name, "revision": train.revision, **splits, "spec": dataclasses.asdict(spec)}
    return json.loads(json.dumps({**about, "label_names": list(train.label_names)}))


def data_changes(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What makes two data records those of different images or classes. What one of them does not tell is left out."""
    found = []
    ours, others = mine["label_names"], theirs.get("label_names", mine["label_names"])
    if ours != others:
        gone, come = ([name for name in a if name not in b] for a, b in ((others, ours), (ours, others)))
        found.append(f"classes: {some_of(gone) or 'another order'} there, {some_of(come) or 'the same'} here")
    if mine["revision"] != theirs.get("revision", mine["revision"]):
        found.append(f"revision: {theirs['revision']} there, {mine['revision']} here")
    for role in ("train", "eval"):
        a, b = mine[role], theirs.get(role, {})
        changed = [key for key in a if key in b and a[key] != b[key]]
        if changed:  # the first says most
            found.append(f"{role} {changed[0]}: {b[changed[0]]} there, {a[changed[0]]} here")
    return found


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a checkpoint but the one that lists them, by its path there."""
    return {
        str(path.relative_to(folder)): file_sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != CHECKPOINT
    }


def _hash_of(about: Mapping[str, Any]) -> str:
    facts = {key: value for key, value in about.items() if key != OWN_HASH}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Versions, commit and hardware: what a figure needs beside it."""
    packages = ("torch", "timm", "accelerate", "datasets", "huggingface_hub", "safetensors", "numpy")
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "device": str(accelerator.device),
        "hardware": describe_hardware(accelerator.device),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
    }


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
