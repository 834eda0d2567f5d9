"""docs/downstream.md runs from top to bottom, without network, and what it trains learns."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_export import small_export

PAGE = Path(__file__).parents[1] / "docs" / "downstream.md"


def test_every_piece_of_the_page_runs_and_what_it_trains_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 32), "orange").save("image.png")
    export = small_export(tmp_path / "run") / "export"
    torch.manual_seed(0)
    names = {"images": torch.randn(16, 3, 16, 16), "targets": torch.arange(16) % 10}
    pieces = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(pieces) == 5
    for piece in pieces:
        exec(piece.replace('"EXPORT"', repr(str(export))), names)

    for losses in (names["detection_losses"], names["segmentation_losses"]):
        assert sum(losses[-3:]) < 0.8 * sum(losses[:3]), losses
    assert sorted(path.name for path in Path("trained").iterdir()) == ["checkpoint-4", "checkpoint-8"]
    assert "eval_top1" in capsys.readouterr().out
    assert names["network"].__class__.__name__ == "Unet"
