"""The list of figures: what is entered there once is measured, recorded, shown and released."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from small_export import small_export
from torch.nn.functional import one_hot

from hub.release import release_of
from tffd_zoo import eval as eval_command
from tffd_zoo.cards import render_results
from tffd_zoo.evaluation import FIGURES, EvalResult, Figure, mean
from tffd_zoo.export_record import verify_export
from tffd_zoo.models import WheelFile, manifest

BRIER = Figure(
    "Brier",
    "",
    3,
    "lower",
    "mean squared distance of the probabilities from the truth",
    lambda logits, targets: (logits.softmax(1) - one_hot(targets, logits.shape[1])).square().sum(1),
    mean,
    high=2,
)


def test_one_entry_makes_a_new_figure_everywhere_and_older_releases_load_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = manifest.releases()
    monkeypatch.setitem(FIGURES, "brier", BRIER)

    info = verify_export(small_export(tmp_path) / "export")
    value = info.metrics["brier"]
    assert 0 < value < 2
    assert f"| {value:.3f} |" in (info.folder / "README.md").read_text()
    assert (
        "Brier: mean squared distance of the probabilities from the truth (lower is better)"
        in (info.folder / "README.md").read_text()
    )

    eval_command.main(
        eval_command.EvalConfig(
            models=(f"local-dir:{info.folder}",), data="digits", device="cpu", csv=tmp_path / "x.csv"
        )
    )
    assert float((tmp_path / "x.csv").read_text().splitlines()[1].split(",")[8]) == pytest.approx(value)

    new = release_of(info, WheelFile(info.weights))
    assert new.metrics.result.brier == value
    assert manifest.Release.from_json(new.to_json() | {"file": {"wheel": "model.safetensors"}}, info.folder) == new
    manifest._read.cache_clear()
    assert manifest.releases() == before
    old, newer = (line for line in render_results([before[0], new]).splitlines() if line.startswith("| `"))
    assert re.search(r"\| -\s+\|", old)
    assert f"| {value:.3f} |" in newer


def test_the_shipped_manifest_is_written_as_it_was_read(tmp_path: Path) -> None:
    copy = tmp_path / "manifest.json"
    manifest._write(manifest.releases(), copy)
    assert json.loads(copy.read_text()) == json.loads(manifest.MANIFEST.read_text())


def test_a_record_gives_the_result_that_was_written_and_lacks_nothing_unsaid() -> None:
    result = EvalResult(4, 2, 3, {"top1": 50.0, "top5": 75.0, "nll": 1.0, "ece": 10.0}, seconds=2.0)
    record = result.to_json()
    assert (record["images_per_second"], result.top1) == (2.0, 50.0)
    assert EvalResult.from_json({**record, "kind": "eval"}) == result
    assert EvalResult.from_json({f"ema_{name}": value for name, value in record.items()}, "ema_") == result
    with pytest.raises(ValueError, match="metrics lack correct5, nll"):
        EvalResult.from_json({name: value for name, value in record.items() if name not in ("correct5", "nll")})
    with pytest.raises(AttributeError, match=r"no 'top6'; its figures are top1, top5, nll, ece"):
        _ = result.top6


def test_what_is_no_classifier_is_refused_in_one_line() -> None:
    from tffd_zoo.evaluation import evaluate

    batch = (torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"the model gives \(2, 3, 4, 4\) for a batch of images"):
        evaluate(torch.nn.Identity(), [batch], device="cpu", progress=False)
