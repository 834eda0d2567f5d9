"""Curves of a run, drawn from what it recorded."""

from __future__ import annotations

from pathlib import Path

from ..atomic import replacing_file
from ..run_record import CURVES, RunRecord

PANELS = {
    "training cross-entropy": lambda line: line["train"].get("ce"),
    "top-1 (%)": lambda line: line["top1"],
    "intra-layer loss": lambda line: line["train"].get("intra"),
    "inter-layer loss": lambda line: line["train"].get("inter"),
}
"""What is drawn, by its title: a figure of an epoch's line, or None where it has none."""


def draw_curves(run: Path) -> Path:
    """Draw what `PANELS` lists over the epochs, as PNG in the folder of the run, and return the picture.

    Raises:
        ValueError: the run has finished no epoch.
    """
    from matplotlib.figure import Figure

    record = RunRecord.read(run)
    if not record.evaluations:
        raise ValueError(f"no finished epoch in {run}: there is nothing to draw")
    found = {title: [(line["epoch"], figure(line)) for line in record.evaluations] for title, figure in PANELS.items()}
    lines = {title: [(x, y) for x, y in points if y is not None] for title, points in found.items()}
    lines = {title: points for title, points in lines.items() if points}

    figure = Figure(figsize=(4.2 * len(lines), 3.4), layout="constrained")
    for axes, (title, points) in zip(figure.subplots(1, len(lines), squeeze=False)[0], lines.items(), strict=True):
        axes.plot(*zip(*points, strict=True), marker="o" if len(points) < 30 else None, markersize=3)
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
    figure.suptitle(
        f"{record.recipe['model']}, {record.name}, seed {record.seed}: top-1 last {record.last:.2f}, "
        f"best {record.best:.2f}",
        fontsize="medium",
    )
    picture = run / CURVES
    with replacing_file(picture) as aside:
        figure.savefig(aside, dpi=120, format="png")
    return picture
