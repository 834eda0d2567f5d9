"""Curves of one run or several, drawn from their metrics files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..atomic import replacing_file
from .run_folder import read_json, read_metrics


def draw_curves(runs: Sequence[Path], picture: Path) -> None:
    """Draw training cross-entropy, top-1 and the Tf-FD terms over the epochs as PNG.

    Args:
        runs: run folders; each is one line in every panel.
        picture: where to.

    Raises:
        ValueError: no run has finished an epoch.
    """
    from matplotlib.figure import Figure

    panels = {
        "training cross-entropy": ("train", "ce"),
        "top-1 (%)": (None, "top1"),
        "intra-layer loss": ("train", "intra"),
        "inter-layer loss": ("train", "inter"),
    }
    epochs = {
        run: [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "eval"] for run in runs
    }
    if not any(epochs.values()):
        raise ValueError(f"no finished epoch in {', '.join(map(str, runs))}: there is nothing to draw")
    lines = {
        title: {run: _series(records, *place) for run, records in epochs.items() if _series(records, *place)[1]}
        for title, place in panels.items()
    }
    lines = {title: series for title, series in lines.items() if series}

    figure = Figure(figsize=(4.2 * len(lines), 3.4), layout="constrained")
    for axes, (title, series) in zip(figure.subplots(1, len(lines), squeeze=False)[0], lines.items(), strict=True):
        for run, (x, y) in series.items():
            axes.plot(x, y, marker="o" if len(x) < 30 else None, markersize=3, label=run.name)
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        if len(runs) > 1:
            axes.legend(fontsize="small")
    if len(runs) == 1:
        figure.suptitle(_caption(runs[0], epochs[runs[0]]), fontsize="medium")
    picture.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(picture) as aside:
        figure.savefig(aside, dpi=120, format="png")


def _series(records: Sequence[dict], section: str | None, name: str) -> tuple[list[float], list[float]]:
    values = [(record["epoch"], (record[section] if section else record).get(name)) for record in records]
    kept = [(x, y) for x, y in values if y is not None]
    return [x for x, _ in kept], [y for _, y in kept]


def _caption(run: Path, records: Sequence[dict]) -> str:
    recipe = read_json(run / "recipe.json")
    last, best = records[-1]["top1"], max(record["top1"] for record in records)
    return f"{recipe['model']}, {recipe['name']}, seed {recipe['run']['seed']}: top-1 last {last:.2f}, best {best:.2f}"
