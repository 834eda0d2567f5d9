"""Models by name: what is checked before they are loaded, and what is said when it cannot be."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest
import timm
from small_export import small_export

from tffd_zoo.loading import load_model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_export(tmp_path_factory.mktemp("run"))


@pytest.fixture
def folder(run: Path, tmp_path: Path) -> Path:
    """An export without the hashes that belong to it."""
    shutil.copytree(run / "export", tmp_path / "export")
    (tmp_path / "export" / "SHA256SUMS").unlink()
    return tmp_path / "export"


def test_an_export_that_is_whole_loads_without_a_word(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert load_model(f"local-dir:{run / 'export'}").num_classes == 10
    assert caplog.text == ""


def test_an_export_whose_hashes_are_gone_is_called_unchecked(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load_model(f"local-dir:{folder}").num_classes == 10
    assert "is UNCHECKED" in caplog.text
    assert "SHA256SUMS" in caplog.text


def test_a_model_from_elsewhere_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from timm.models._hub import save_for_hf

    save_for_hf(timm.create_model("tffd_resnet20", num_classes=3), str(tmp_path / "x"), safe_serialization=True)
    assert load_model(f"local-dir:{tmp_path / 'x'}").num_classes == 3
    assert "UNCHECKED" not in caplog.text


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match=rf"{name} is no regular file"):
        load_model(f"local-dir:{folder}")


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_damaged_config_is_named(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"export/config\.json is damaged .*; export or download it again"):
        load_model(f"local-dir:{folder}")
