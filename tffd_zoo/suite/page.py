"""The suite's tables on one page, with what they do not say, and as one JSON file: made from the CSV files alone."""

from __future__ import annotations

import csv
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..atomic import write_text
from ..json_files import write_json
from ..markdown import markdown_table

PAGE = "README.md"
JSON = "suite.json"
PAIRS = "pairs.csv"
Row = Mapping[str, str]


class Section(NamedTuple):
    """How the page shows a part."""

    part: str
    title: str
    columns: tuple[str, ...]
    """Columns of the part's table that are shown, where it has them; the rest is in the CSV file."""
    text: str
    """What the figures are, and what they do not say."""
    sets: tuple[str, str] | None = None
    """Where a part has figures of several sets of images, named after them: what those are, and the end of a name that
    every set has. Each set gets a row."""


SECTIONS = (
    Section(
        "clean",
        "Accuracy",
        ("top1", "top5", "nll", "images"),
        "Percent of the images, and nats. Everything else is held against these.",
    ),
    Section(
        "calibration",
        "Calibration",
        (
            "temperature",
            "ece",
            "ece_scaled",
            "adaptive_ece",
            "classwise_ece",
            "brier",
            "nll",
            "nll_scaled",
            "fitted_on",
        ),
        "ECE in 15 equal-width bins, adaptive ECE in bins of as many images, class-wise ECE over every class's own "
        "probability: percent. `_scaled` is after division of the logits by the temperature, which was never fitted on "
        "the images shown here. Where it was fitted on images *seen in training*, it is biased to sharpen, for "
        "networks are surer of those: such a temperature says nothing about the method and is not released.",
    ),
    Section(
        "corruptions",
        "Corruptions",
        ("mean", "extra_mean", "images", "corrupted_images"),
        "Mean top-1 over the 15 kinds of CIFAR-C at 5 severities, and over the 4 extra ones; the CSV has all 95. "
        "*Generated* images follow the published definitions with other random numbers and are not the published "
        "arrays; with stand-ins for frost, the kind `frost`, one of the 15, is not comparable to any other source's. "
        "Of 100 images a cell of the picture is known to about 10 points, the mean to about 8.",
    ),
    Section(
        "duplicates",
        "Near-duplicates",
        ("top1", "top1_without", "top1_on_duplicates", "duplicates", "method"),
        "Top-1 with and without test images that have a near-duplicate in the training set. What is found by pixels is "
        "a third of the tenth that ciFAIR counts by eye, and holds some pairs that merely look alike; easy pictures "
        "have more of them, so the difference is not all memory.",
    ),
    Section(
        "ood",
        "Unknown images",
        (),
        "AUROC (50: chance) and FPR95, percent, for three scores: highest softmax probability, energy, distance to the "
        "50th nearest training feature. Below 50 the network is surer of the unknown images than of its own, as it can "
        "be of noise. A sample of ImageNet holds classes that CIFAR-100 has too, so no score can reach 100 there.",
        sets=("unknown", "_softmax_auroc"),
    ),
    Section(
        "transfer",
        "Transfer",
        (),
        "Frozen features on other labels: 20 nearest neighbours by cosine, a linear probe, and probes on 1, 5 and 10 "
        "images a class (means of 5 draws). Settings are scikit-learn's defaults; nothing was tuned, so better probes "
        "exist.",
        sets=("labels", "_linear"),
    ),
    Section(
        "shifts",
        "Other test sets",
        (),
        "Top-1 on other images of the same classes, scored among the classes that each set has.",
        sets=("set", "_top1"),
    ),
    Section(
        "cost",
        "Cost",
        (),
        "Tf-FD leaves the network as it is, so twins cost the same: differences of their times are noise. Times are "
        "medians on the machine named; a load above its cores means that it had other work, and that they are too "
        "long.",
    ),
)

PAIRS_TEXT = (
    "Value minus that of the model it is held against, on the same images, with the 95 % interval of a paired "
    "bootstrap over the images, and McNemar's exact p where the figure counts right images. An interval here speaks of "
    "other test images *for these very weights*: another seed of training can move a figure by more. And of so many "
    "intervals one in twenty lies beside zero by chance. `mce` is the error under corruptions in percent of the other "
    "model's. Rounded to two digits of the interval's half-width; the CSV has more."
)


def write_page(folder: Path) -> None:
    """Write the page of the CSV files in `folder`, and their rows as JSON."""
    write_text(folder / PAGE, page(folder))
    write_json(folder / JSON, tables(folder))


def tables(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of every CSV file in `folder` by the name of the part, numbers as numbers."""
    files = [*(f"{section.part}.csv" for section in SECTIONS), PAIRS]
    rows = {file.removesuffix(".csv"): _read(folder / file) for file in files if (folder / file).exists()}
    return {part: [{name: _value(cell) for name, cell in row.items()} for row in found] for part, found in rows.items()}


def _value(cell: str) -> str | float | None:
    """A cell as JSON has it: a number, a text, or null where there is none or it is not finite."""
    try:
        value = float(cell)
    except ValueError:
        return cell or None
    if not math.isfinite(value):
        return None
    return int(cell) if cell.isdecimal() else value


def page(folder: Path) -> str:
    """The page as Markdown."""
    blocks = ["# Evaluation suite", "Made by `python -m tffd_zoo.eval ... --suite`, from the CSV files beside it."]
    for section in SECTIONS:
        if table := _section_table(section, folder):
            blocks += [f"## {section.title}", section.text, table]
        if (folder / f"{section.part}.png").exists():
            blocks.append(f"![{section.title}]({section.part}.png)")
    if pairs := _pair_tables(folder):
        blocks += ["## Differences", PAIRS_TEXT]
        for title, table in pairs.items():
            blocks += [f"### {title}", table]
    return "\n\n".join(blocks) + "\n"


def page_tables(folder: Path, parts: Collection[str]) -> str:
    """The page's tables of some parts and of all pairs, each below its title: what a terminal has room for."""
    titled = {section.title: _section_table(section, folder) for section in SECTIONS if section.part in parts}
    return "\n\n".join(f"{title}\n\n{table}" for title, table in (titled | _pair_tables(folder)).items() if table)


def _section_table(section: Section, folder: Path) -> str:
    """The table of a part; empty where none of its sets could be had."""
    rows = _read(folder / f"{section.part}.csv")
    return _table(_rows_of(section, rows)) if rows else ""


def _pair_tables(folder: Path) -> dict[str, str]:
    """The differences of every pair, by its title."""
    by_pair: dict[str, list[Row]] = {}
    for row in _read(folder / PAIRS):
        if "." not in row["figure"] and not _is_one_kind(row):
            title = f"{row['model']} minus {row['against']}" if row["against"] else row["model"]
            by_pair.setdefault(title, []).append(row)
    return {title: _differences(rows) for title, rows in by_pair.items()}


def _is_one_kind(row: Row) -> bool:
    return row["part"] == "corruptions" and row["figure"] not in ("mean", "extra_mean", "mce")


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _rows_of(section: Section, rows: Sequence[Row]) -> list[Row]:
    """What the page shows of a part: the columns that it names, or all; where it has sets, a row for each."""
    wanted = ("model", *section.columns, "left_out_images") if section.columns else tuple(rows[0])
    shown: list[Row] = [{name: cell for name, cell in row.items() if name in wanted} for row in rows]
    called, mark = section.sets or ("", "")
    sets = [name.removesuffix(mark) for name in shown[0] if mark and name.endswith(mark)]
    if not sets:
        return shown
    # A column belongs to the set with the longest name that it begins with; one that belongs to none is every row's.
    owner = {
        name: max((each for each in sets if name.startswith(f"{each}_")), key=len, default="") for name in shown[0]
    }
    of_sets = dict.fromkeys(name.removeprefix(f"{each}_") for name, each in owner.items() if each)
    return [
        {"model": row["model"], called: each}
        | {name: row.get(f"{each}_{name}", "") for name in of_sets}
        | {name: cell for name, cell in row.items() if not owner[name]}
        for row in shown
        for each in sets
    ]


def _table(rows: Sequence[Row]) -> str:
    columns = [[name, *_column([row[name] for row in rows])] for name in rows[0]]
    header, *body = zip(*columns, strict=True)
    return markdown_table(header, body)


def _column(cells: Sequence[str]) -> list[str]:
    """The cells, figures with one number of digits: four of the largest, if they were kept; counts and words as are."""
    figures = [cell for cell in cells if isinstance(_value(cell), float)]
    if not figures:
        return [f"{value:,}" if isinstance(value := _value(cell), int) else cell for cell in cells]
    largest = max(abs(float(cell)) for cell in figures)
    wanted = max(0, 4 - math.ceil(math.log10(largest))) if largest else 0
    digits = min(wanted, max(len(cell.partition(".")[2]) for cell in figures))
    return [cell if (value := _number(cell)) is None else _fixed(value, digits) for cell in cells]


def _differences(rows: Sequence[Row]) -> str:
    """The figures of a pair, each to two digits of the half-width of its interval."""
    header = ["part", "figure", "value", "value_against", "difference", "low", "high", "mcnemar_p"]
    body = []
    for row in rows:
        low, high, p = (_number(row[name]) for name in ("low", "high", "mcnemar_p"))
        half = 0.0 if low is None or high is None else (high - low) / 2
        digits = max(0, 1 - math.floor(math.log10(half))) if half else 2
        figures = [_fixed(_number(row[name]), digits) for name in header[2:-1]]
        body.append([row["part"], row["figure"], *figures, "" if p is None else f"{p:.2g}"])
    return markdown_table(header, body)


def _number(cell: str) -> float | None:
    value = _value(cell)
    return None if isinstance(value, str) else value


def _fixed(value: float | None, digits: int) -> str:
    return "" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"
