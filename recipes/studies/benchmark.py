"""What Tf-FD costs: every price beside that of plain training, as ratios of interleaved steps.

    python -m recipes.studies.benchmark --data FOLDER --jpeg FOLDER     all parts, in about 15 minutes on two cores
    python -m recipes.studies.benchmark --parts steps memory            these alone
    python -m recipes.studies.benchmark --report                        the pages and the picture again, from the JSON

Times on a shared machine are noisy and ratios of steps that took turns are not, or less: a row is the median of paired
ratios with its quartiles. The poster's chart of training times (Tf-FD 1.03, CS-KD 2.3-2.4, BYOT 2.1-2.4, KD with a
teacher 3.2-5.2 times plain) is the part `methods`.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from tffd_zoo.atomic import write_text
from tffd_zoo.cli import run_cli
from tffd_zoo.markdown import markdown_table
from tffd_zoo.pictures import COLOURS, NEUTRAL, house_style, save_png
from tffd_zoo.ranges import POSITIVE
from tffd_zoo.training.run_folder import environment

from .imagenet_cost import imagenet_page
from .prices import PARTS, open_bench
from .report.records import commit_of
from .timing import Row

RESULTS = Path(__file__).parents[1] / "results" / "benchmark"


@dataclass(frozen=True)
class BenchmarkConfig:
    """Measure what Tf-FD costs beside plain training; write JSON, two pages and a picture."""

    data: str = "uoft-cs/cifar100"
    """CIFAR-100: a Hub id or a folder of parquet."""
    jpeg: str | None = None
    """Photographs for the evaluation of JPEGs: a folder or a Hub id; that row is left out when not given."""
    jpeg_split: str = "validation"
    """Split of the photographs."""
    parts: tuple[str, ...] = ()
    """Parts to measure; all when not given. The others keep the rows that the output has."""
    effort: Annotated[float, POSITIVE] = 1.0
    """Factor on the number of rounds."""
    output: Path = RESULTS
    """Folder of the JSON, the pages and the picture."""
    report: bool = False
    """Measure nothing; make the pages and the picture from the JSON."""


# --- the page ---------------------------------------------------------------------------------------------------------


def page(record: dict[str, Any]) -> str:
    """The Markdown page of the measured rows."""
    parts: dict[str, dict[str, list[str]]] = {}  # by machine and commit
    for part, about in record["measured"].items():
        machine = (
            f"{about['hardware']}, {about['threads']} thread(s), torch {about['packages']['torch']}, timm "
            f"{about['packages']['timm']}"
        )
        parts.setdefault(machine, {}).setdefault(commit_of(about), []).append(part)
    measured = {
        machine: [f"{commit} ({', '.join(names)})" for commit, names in commits.items()]
        for machine, commits in parts.items()
    }
    text = [
        "# What Tf-FD costs",
        "Made by `python -m recipes.studies.benchmark` from `benchmark.json`. Each figure is the median of paired "
        "ratios, with the quartiles in brackets; both of a pair ran in turn in one process.",
        *(f"Measured on {machine}, at commit {'; '.join(commits)}." for machine, commits in measured.items()),
        "![Training time of the methods relative to plain training](methods.png)",
    ]
    for part, function in PARTS.items():
        rows = [Row(**row) for row in record["rows"] if row["part"] == part]
        if rows:
            header = ["what", "median", "quartiles", "n", "target", "met"]
            text += [f"## {part}", inspect.getdoc(function) or "", markdown_table(header, list(map(_cells, rows)))]
    return "\n\n".join(text) + "\n"


def _cells(row: Row) -> list[str]:
    digits = {"x": 3, "ms": 1}.get(row.unit, 0)
    target = f"{row.bound} {row.target:g}" if row.target is not None else "-"
    met = {True: "yes", False: "no", None: "-"}[row.met]
    spread = f"{row.low:.{digits}f} to {row.high:.{digits}f}" if row.n > 1 else "-"
    return [row.what, f"{row.median:.{digits}f} {row.unit}", spread, str(row.n), target, met]


def draw(rows: Sequence[Row], picture: Path) -> None:
    """The poster's chart: time of every method over that of plain training."""
    from matplotlib.figure import Figure

    bars = [row for row in rows if row.part == "methods" and row.what.endswith(" / plain")]
    if not bars:
        return
    with house_style():
        figure = Figure(figsize=(6.4, 0.9 + 0.36 * (len(bars) + 1)), layout="constrained")
        axes = figure.subplots()
        names = ["plain", *(row.what.removesuffix(" / plain") for row in bars)]
        values = [1.0, *(row.median for row in bars)]
        axes.barh(names, values, color=[NEUTRAL, *(COLOURS[0] for _ in bars)], height=0.62)
        for place, value in enumerate(values):
            axes.text(value + 0.03, place, f"{value:.2f}", va="center", fontsize=8)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(title="training time, ResNet-20, batch 128, compiled", xlabel="times plain training")
        save_png(figure, picture)


# --- the command ------------------------------------------------------------------------------------------------------


def main(config: BenchmarkConfig) -> None:
    """Measure the parts, and write JSON, pages and picture.

    Raises:
        ValueError: a part that does not exist, or nothing to report on.
    """
    unknown = set(config.parts) - set(PARTS)
    if unknown:
        raise ValueError(f"there is no part {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    place = config.output / "benchmark.json"
    record: dict[str, Any] = json.loads(place.read_text()) if place.exists() else {"measured": {}, "rows": []}
    if config.report:
        if not record["rows"]:
            raise ValueError(f"{place} holds no figures: run the benchmark without --report first")
    else:
        with open_bench(config.data, config.jpeg, config.jpeg_split, config.effort) as bench:
            measured = environment(bench.accelerator)  # once: what this writes makes the clone another than its commit
            for part in config.parts or PARTS:
                kept = [row for row in record["rows"] if row["part"] != part]
                record["rows"] = kept + [dataclasses.asdict(row) for row in _shown(PARTS[part](bench))]
                record["measured"][part] = measured
                write_text(place, json.dumps(record, indent=1) + "\n")  # a part is kept once it is measured
                torch.compiler.reset()
    draw([Row(**row) for row in record["rows"]], config.output / "methods.png")
    pages = {"README.md": page(record)}
    if "steps" in record["measured"]:
        pages["imagenet.md"] = imagenet_page(record)
    for name, text in pages.items():
        write_text(config.output / name, text)
        print(config.output / name)


def _shown(rows: Iterator[Row]) -> Iterator[Row]:
    for row in rows:
        print(f"{row.part}: " + "  ".join(_cells(row)), flush=True)
        yield row


if __name__ == "__main__":
    run_cli(main, BenchmarkConfig)
