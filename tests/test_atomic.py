"""What replaces a file or a folder is complete, and until it is, the old one stays."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fresh_python
import pytest
import torch
from safetensors import safe_open

from tffd_zoo.atomic import replacing_file, replacing_folder, restore_folder, save_tensors, write_text

ROOT = Path(__file__).parents[1]


@contextmanager
def disk_that_takes(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes: writing on fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_takes_the_place_of_the_old_one_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with replacing_file(path) as aside:
        aside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == {"file"}


def test_a_file_that_fails_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with disk_that_takes(1000), pytest.raises(OSError, match="File too large"), replacing_file(path) as aside:
        aside.write_text("new" * 1000)
    assert path.read_text() == "old"
    assert names(tmp_path) == {"file"}


def test_a_text_is_utf8_in_a_folder_made_for_it(tmp_path: Path) -> None:
    place = tmp_path / "new" / "page.md"
    write_text(place, "λ\n")
    assert place.read_bytes() == b"\xce\xbb\n"
    write_text(str(place), "new")
    assert place.read_text() == "new"
    assert [path.name for path in place.parent.iterdir()] == ["page.md"]


def test_two_writers_of_one_file_do_not_meet_and_the_last_to_finish_stays_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacing_file(path) as slow, slow.open("w") as file:
        file.write("slow, ")
        file.flush()
        with replacing_file(path) as quick:
            quick.write_text("quick")
        file.write("and whole")
        file.flush()
        assert path.read_text() == "quick"
    assert path.read_text() == "slow, and whole"
    assert names(tmp_path) == {"file"}


KILLED_WHILE_WRITING = """
import os, signal, sys
from tffd_zoo.atomic import replacing_file

with replacing_file(sys.argv[1]) as aside:
    aside.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_wrote_goes_with_the_next_writing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    done = fresh_python.run(["-c", KILLED_WHILE_WRITING, str(path)], {**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    assert len(names(tmp_path)) == 2
    with replacing_file(path) as aside:
        aside.write_text("new")
    assert names(tmp_path) == {"file"}
    assert path.read_text() == "new"


def test_tensors_are_written_to_the_same_bytes_whatever_their_layout_and_the_order_of_their_metadata(
    tmp_path: Path,
) -> None:
    tensors = {"b": torch.arange(96.0).view(2, 3, 4, 4), "a": torch.tensor(3)}
    metadata = {"tag": "c100", "architecture": "tffd_vgg8", "name": 'größer " als', **{str(i): "x" for i in range(20)}}
    save_tensors(tensors, tmp_path / "one", **metadata)
    tensors["b"] = tensors["b"].to(memory_format=torch.channels_last)
    save_tensors(tensors, tmp_path / "two", **dict(reversed(metadata.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    with safe_open(tmp_path / "one", framework="pt") as file:
        assert file.metadata() == {"format": "pt", **metadata}
        assert all(torch.equal(file.get_tensor(name), tensors[name]) for name in tensors)


def test_tensors_that_do_not_fit_on_the_disk_are_an_error_of_the_system(tmp_path: Path) -> None:
    with disk_that_takes(1000), pytest.raises(OSError, match="File too large"):
        save_tensors({"weight": torch.zeros(10_000)}, tmp_path / "weights.safetensors")


def test_a_folder_takes_the_place_of_the_old_one_with_nothing_of_it_left(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").touch()
    with replacing_folder(folder) as aside:
        (aside / "inner").mkdir()
        (aside / "inner" / "new").touch()
        assert names(folder) == {"old"}
    assert names(folder) == {"inner"}
    assert names(folder / "inner") == {"new"}
    assert names(tmp_path) == {"folder"}


def test_a_folder_that_fails_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").touch()
    with disk_that_takes(1000), pytest.raises(OSError, match="File too large"), replacing_folder(folder) as aside:
        (aside / "new").write_text("new" * 1000)
    assert names(folder) == {"old"}
    assert names(tmp_path) == {"folder"}


def test_a_folder_comes_back_when_the_new_one_cannot_be_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").touch()
    rename = Path.rename
    refused = OSError("the new one stays where it is")

    def rename_old_only(self: Path, target: Path) -> Path:
        if self.name == ".folder.partial":
            raise refused
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_old_only)
    with pytest.raises(OSError, match="stays where it is"), replacing_folder(folder):
        pass
    assert names(folder) == {"old"}
    assert names(tmp_path) == {"folder"}


KILLED_BETWEEN_THE_RENAMES = """
import os, signal, sys
from pathlib import Path
from tffd_zoo.atomic import replacing_folder

rename = Path.rename
def die_before_the_new_one_arrives(self, target):
    if self.name.endswith(".partial"):
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
Path.rename = die_before_the_new_one_arrives
with replacing_folder(sys.argv[1]) as aside:
    (aside / "new").touch()
"""


def test_a_folder_comes_back_after_a_kill_in_the_instant_between_old_and_new(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").touch()
    done = fresh_python.run(["-c", KILLED_BETWEEN_THE_RENAMES, str(folder)], {**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL
    assert not folder.exists()
    restore_folder(folder)
    assert names(folder) == {"old"}

    with replacing_folder(folder) as aside:  # what was left aside does not get in the way
        assert names(aside) == set()
        (aside / "newer").touch()
    assert names(folder) == {"newer"}
    assert names(tmp_path) == {"folder"}


def test_nothing_comes_back_after_a_kill_when_the_new_one_had_arrived(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "new").touch()
    shutil.copytree(folder, tmp_path / ".folder.previous")
    restore_folder(folder)
    assert names(folder) == {"new"}
    assert names(tmp_path) == {"folder"}
