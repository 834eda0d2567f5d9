"""Whose a run's folder is: of one process, one recipe and one set of images; and what a damaged one does."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from processes import CONTEXT, elsewhere
from safetensors.torch import load_file
from test_data_sources import write_images
from test_training import assert_same_weights, recipe

from tffd_zoo.atomic import save_tensors
from tffd_zoo.export import export_run
from tffd_zoo.export_record import file_sha256
from tffd_zoo.recipe import Recipe
from tffd_zoo.training import run_folder, train
from tffd_zoo.training.pickles import refuse_code
from tffd_zoo.training.progress import StopSignal


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- the data ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_images(tmp_path: Path) -> Recipe:
    """A recipe that trains on a folder of two classes, which is written now."""
    for split in ("train", "val"):
        for number, name in enumerate(("ant", "bee")):
            write_images(tmp_path / "images" / split / name, range(10 * number, 10 * number + 8))
    return recipe(
        tmp_path / "run", data={"source": str(tmp_path / "images")}, optim={"batch_size": 8, "epochs": 1}, tffd=None
    )


def rename_a_class(images: Path) -> None:
    for split in ("train", "val"):
        (images / split / "ant").rename(images / split / "zoo")


def lengthen_an_image(images: Path) -> None:
    with (images / "train" / "ant" / "0.png").open("ab") as file:
        file.write(b"\0")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda images: write_images(images / "train" / "ant", range(50, 66)), "train images: 16 there, 32 here"),
        (lambda images: write_images(images / "val" / "ant", [50]), "eval images: 16 there, 17 here"),
        (rename_a_class, "classes: ant there, zoo here"),
        (lambda images: (images / "train/ant/0.png").rename(images / "train/ant/00.png"), "train outline"),
        (lengthen_an_image, "train outline"),
    ],
    ids=["more to train on", "more to evaluate on", "a class renamed", "an image renamed", "an image replaced"],
)
def test_a_run_is_not_resumed_on_other_images_and_nothing_is_touched(
    change: Callable[[Path], None], said: str, on_images: Recipe, tmp_path: Path
) -> None:
    train(on_images)
    before = contents(tmp_path / "run")
    change(tmp_path / "images")
    with pytest.raises(ValueError, match=rf"run holds a run on other data \(.*{said}.*\); pass --output"):
        train(on_images)
    assert contents(tmp_path / "run") == before


# --- two hands --------------------------------------------------------------------------------------------------------


def hold(folder: Path, held: Event) -> None:
    data = {"label_names": ["a"], "revision": None, "train": {}, "eval": {}}
    _folder = run_folder.RunFolder(recipe(folder), data, Accelerator(cpu=True))
    held.set()
    signal.pause()


@contextmanager
def another_process_in(folder: Path) -> Iterator[int]:
    held = CONTEXT.Event()
    process = elsewhere(hold, folder, held)
    assert held.wait(120)
    assert process.pid is not None
    yield process.pid
    process.kill()
    process.join()


def test_the_second_run_in_a_folder_is_told_who_is_there_and_touches_nothing_until_that_one_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "PATIENCE", 0.2)
    changes: dict[str, Any] = {"run": {"max_steps": 1}, "tffd": None}
    with another_process_in(tmp_path / "run") as pid:
        (tmp_path / "run" / "data.json").unlink()
        (tmp_path / "run" / "recipe.json").unlink()
        before = contents(tmp_path / "run")
        with pytest.raises(ValueError, match=rf"run is being written by process {pid} on .* since .*; wait for it or"):
            train(recipe(tmp_path / "run", **changes))
        assert contents(tmp_path / "run") == before
    train(recipe(tmp_path / "run", **changes))
    train(recipe(tmp_path / "run", **changes))  # the same process again


def test_a_run_stops_when_its_launcher_is_gone_and_one_without_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    for name in StopSignal.LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    alone = StopSignal(accelerator)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    launched = StopSignal(accelerator)
    assert not launched.requested(1)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert launched.requested(2)
    assert launched.agreed == signal.SIGTERM
    assert not alone.requested(2)


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps with checkpoints after 3 and 6 and no weights yet, stopped at 6."""
    folder = tmp_path_factory.mktemp("runs") / "stopped"
    train(recipe(folder, **changes(6)))
    return folder


def changes(steps: int) -> dict[str, Any]:
    return {"tffd": None, "run": {"max_steps": steps, "checkpoint_every": 3}}


def flip_a_bit(file: Path) -> None:
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)


@pytest.mark.parametrize(
    "damage", [flip_a_bit, lambda file: file.write_bytes(b""), Path.unlink], ids=["bit", "cut", "gone"]
)
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "checkpoint.json"])
def test_a_damaged_checkpoint_is_seen_before_any_of_it_is_used(
    name: str, damage: Callable[[Path], None], stopped: Path, tmp_path: Path
) -> None:
    newest = shutil.copytree(stopped / "checkpoints" / "step-00000006", tmp_path / "step-00000006")
    assert run_folder.damage_of(newest) == ""
    damage(newest / name)
    assert run_folder.damage_of(newest)


def test_another_digit_in_what_a_checkpoint_says_of_itself_is_damage(stopped: Path, tmp_path: Path) -> None:
    newest = shutil.copytree(stopped / "checkpoints" / "step-00000006", tmp_path / "step-00000006")
    about = newest / "checkpoint.json"
    about.write_text(about.read_text().replace('"step": 6', '"step": 7'))
    assert run_folder.damage_of(newest) == "checkpoint.json is not the file that was saved"


def test_a_damaged_checkpoint_is_put_aside_for_the_one_before_it_and_the_run_ends_the_same(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run in ("whole", "damaged"):
        shutil.copytree(stopped, tmp_path / run)
    flip_a_bit(tmp_path / "damaged" / "checkpoints" / "step-00000006" / "model.safetensors")
    for run in ("whole", "damaged"):
        train(recipe(tmp_path / run, **changes(8)))
    said = [line for line in capsys.readouterr().out.splitlines() if "damaged (" in line]
    assert len(said) == 1
    assert "step-00000006 is damaged (model.safetensors is not the file that was saved): it is put aside" in said[0]
    assert_same_weights(tmp_path / "whole", tmp_path / "damaged")
    assert (tmp_path / "damaged" / "checkpoints" / "damaged-step-00000006").is_dir()


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_again_in_silence(stopped: Path, tmp_path: Path) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    for checkpoint in (run / "checkpoints").iterdir():
        flip_a_bit(checkpoint / "optimizer.bin")
    with pytest.raises(ValueError, match=r"no checkpoint of .*run is whole \(the last one: optimizer\.bin is not the"):
        train(recipe(run, **changes(8)))


class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize(
    "name", ["custom_checkpoint_0.pkl", "optimizer.bin", "random_states_0.pkl", "optimizer_0/.metadata"]
)
def test_no_file_of_a_checkpoint_runs_code_even_if_its_hash_is_right(name: str, stopped: Path, tmp_path: Path) -> None:
    newest = shutil.copytree(stopped / "checkpoints" / "step-00000006", tmp_path / "step-00000006")
    (newest / name).parent.mkdir(exist_ok=True)
    (newest / name).write_bytes(pickle.dumps(Payload(tmp_path / "run code")))
    about = json.loads((newest / "checkpoint.json").read_text())
    about["sha256"][name] = file_sha256(newest / name)
    del about["sha256_of_the_rest"]
    (newest / "checkpoint.json").write_text(json.dumps(about))
    assert name in run_folder.damage_of(newest)
    assert not (tmp_path / "run code").exists()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """What `torch.distributed.checkpoint` writes of weights and optimizer, in a folder of a checkpoint."""
    state = {"weights": torch.ones(3), "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "name": None}]}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "checkpoint" / "optimizer_0"), no_dist=True)
    return tmp_path / "checkpoint" / "optimizer_0"


def test_shards_are_read_and_none_of_their_files_runs_code(shards: Path, tmp_path: Path) -> None:
    refuse_code(shards.parent)  # they are sound
    payload = Payload(tmp_path / "run code")

    index = (shards / ".metadata").read_bytes()
    (shards / ".metadata").write_bytes(pickle.dumps(payload))
    with pytest.raises(ValueError, match=r"^optimizer_0/\.metadata: UnpicklingError: posix\.mkdir is no part of"):
        refuse_code(shards.parent)
    nested = pickle.loads(index)
    nested.planner_data = payload
    (shards / ".metadata").write_bytes(pickle.dumps(nested))
    with pytest.raises(ValueError, match=r"posix\.mkdir is no part of an index of shards"):
        refuse_code(shards.parent)
    (shards / ".metadata").write_bytes(index)

    # a number of the optimizer is a pickle of its own, which torch would run
    (place,) = (place for place in pickle.loads(index).storage_data if place.fqn.endswith("lr"))
    stored = pickle.loads(index).storage_data[place]
    file = shards / stored.relative_path
    data = bytearray(file.read_bytes())
    code = pickle.dumps(payload)
    data[stored.offset : stored.offset + len(code)] = code
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"optimizer_0/\.metadata: UnpicklingError: Weights only load failed"):
        refuse_code(shards.parent)

    elsewhere = pickle.loads(index)
    elsewhere.storage_data[place].relative_path = "../../elsewhere"
    (shards / ".metadata").write_bytes(pickle.dumps(elsewhere))
    with pytest.raises(ValueError, match="does not lie beside it"):
        refuse_code(shards.parent)
    assert not (tmp_path / "run code").exists()

    (shards / ".metadata").write_bytes(pickle.dumps(payload))
    with pytest.raises(AttributeError):  # what torch would do
        dcp.FileSystemReader(shards).read_metadata()
    assert (tmp_path / "run code").exists()


def test_a_checkpoint_may_come_before_the_first_line_of_figures(tmp_path: Path) -> None:
    train(recipe(tmp_path, tffd=None, run={"max_steps": 3, "checkpoint_every": 2, "log_every": 100}))
    assert (tmp_path / "checkpoints" / "step-00000002").is_dir()


def test_weights_and_figures_of_different_steps_are_not_exported(stopped: Path, tmp_path: Path) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    export_run(run)
    save_tensors(load_file(run / "weights" / "last.safetensors"), run / "weights" / "last.safetensors", step="9")
    with pytest.raises(
        ValueError, match=r"holds the weights of step 9, and the figures recorded .* of step 6; the comm"
    ):
        export_run(run)
