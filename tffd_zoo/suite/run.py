"""The suite's run: every part of every model, measured once, then tables, differences and pictures."""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import json
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from timm.models import parse_model_name

from ..atomic import replacing_file
from ..cli import USER_ERRORS
from ..data import ImageSource
from ..json_files import read_json
from ..loading import check_model_name, left_out
from ..models import known_release, plain_twin_name
from ..pictures import house_style, save_png
from . import calibration, clean, corrupted, cost, duplicates, ood, shifts, transfer
from .measurement import Figures, Measurement, Part
from .page import PAIRS, page_tables, write_page
from .pairs import Difference, differences, mean_over_pairs
from .setting import STANDARD, Setting, SuiteConfig, test_subset
from .subject import Subject, reason_of, together

_logger = logging.getLogger(__name__)

PARTS = {
    part.name: part
    for part in (
        clean.PART,
        calibration.PART,
        corrupted.PART,
        duplicates.PART,
        ood.PART,
        transfer.PART,
        shifts.PART,
        cost.PART,
    )
}
"""Every part; the standard suite leaves out those that need data of one's own."""
OPTIONAL = ("shifts",)
FORMAT = 1
"""Raised when what a part measures changes: everything is then measured again."""


@dataclass
class Results:
    """What came of a run."""

    measured: dict[str, dict[str, Measurement]] = field(default_factory=dict)
    """By model, then by part."""
    sources: dict[str, ImageSource] = field(default_factory=dict)
    """By model, the test images whose classes it knows."""
    left_out: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By model, what it does not know of the test images."""
    problems: list[str] = field(default_factory=list)
    """What is missing, and why."""

    def same_images(self, model: str, twin: str) -> bool:
        """Whether two models were measured on the same test images, as far as they were measured."""
        prints = {self.sources[name].fingerprint for name in (model, twin) if name in self.sources}
        return len(prints) < 2

    def figures(self, part: Part) -> dict[str, Figures]:
        """Figures of a part by model."""
        return {
            name: part.figures(found[part.name].samples) for name, found in self.measured.items() if part.name in found
        }


def parse_suite(text: str) -> list[Part]:
    """The parts that `--suite` names.

    Raises:
        ValueError: one of them does not exist.
    """
    if text == STANDARD:
        return [part for name, part in PARTS.items() if name not in OPTIONAL]
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in PARTS]
    if unknown or not names:
        raise ValueError(
            f"--suite has no part {', '.join(unknown) or text!r}; give {STANDARD}, or some of {','.join(PARTS)}"
        )
    return [PARTS[name] for name in names]


def run_suite(
    config: SuiteConfig,
    models: Sequence[str],
    source: ImageSource,
    open_labels: Callable[[str, str | None], ImageSource],
    make_subject: Callable[[str], Subject],
) -> None:
    """Measure, then write and print what came of it.

    Args:
        config: what to measure.
        models: the models.
        source: the test images.
        open_labels: opens a split of the same data set with the labels of a column.
        make_subject: loads a model and checks that its classes are those of `source`.

    Raises:
        ValueError: something could not be measured; everything else was written.
    """
    assert config.suite is not None
    parts = parse_suite(config.suite)
    pairs = pair_up(models, config.against)
    names = list(dict.fromkeys([*models, *(twin for _, twin in pairs)]))
    for name in names:
        check_model_name(name)
    open_labels, results = functools.cache(open_labels), Results()
    for name in names:
        try:
            with together(PartialState().num_processes):
                subject = make_subject(name)
                known = subject.known(source)
        except USER_ERRORS as error:
            results.problems.append(f"{name}: {error}")
            continue
        results.sources[name], results.left_out[name] = test_subset(known, config.images), left_out(source, known)
        setting = Setting(config, results.sources[name], open_labels, subject.known, held_out(name))
        results.measured[name] = examine(subject, parts, setting, results)
    if PartialState().is_main_process:
        report(config, parts, results, pairs)
    if results.problems:
        raise ValueError(f"{len(results.problems)} of these could not be had; the rest is in {config.out}")


def pair_up(models: Sequence[str], against: Sequence[str]) -> list[tuple[str, str]]:
    """Every model with the one it is held against: as told, or its plain twin where that is among `models`.

    Raises:
        ValueError: there are neither one nor as many to hold the models against.
    """
    if len(against) not in (0, 1, len(models)):
        raise ValueError(f"--against names {len(against)} models for {len(models)}; give one for all, or one for each")
    if against:
        twins = list(against) * (len(models) if len(against) == 1 else 1)
        return [(model, twin) for model, twin in zip(models, twins, strict=True) if model != twin]
    found = []
    for model in models:
        source, model_id = parse_model_name(model)
        twin = plain_twin_name(model_id)
        if source is None and twin and twin in models:
            found.append((model, twin))
    return found


def held_out(name: str) -> int | None:
    """Training images that the recipe of these weights held out; None where no recipe is known."""
    source, model_id = parse_model_name(name)
    if source == "local-dir" and (Path(model_id) / "recipe.json").exists():
        recipe: Mapping[str, Any] = read_json(Path(model_id) / "recipe.json", "export the run again")
    else:
        release = known_release(name)
        recipe = release.recipe if release else {}
    return recipe.get("data", {}).get("holdout")


def examine(subject: Subject, parts: Sequence[Part], setting: Setting, results: Results) -> dict[str, Measurement]:
    """Measure a model, or find what was measured before. A part that fails is one line, and the others go on."""
    measured = {}
    for part in parts:
        path = setting.config.kept / _slug(subject.name) / f"{part.name}-{_key(part, subject, setting)}.npz"
        there = [path.exists()]
        broadcast_object_list(there)  # the first process writes it: all go by what that one sees
        try:
            with together(subject.world_size):
                found = Measurement.load(path) if there[0] else part.measure(subject, setting)
                if subject.rank == 0 and not there[0]:
                    found.save(path)
        except Exception as error:  # whatever a part meets, the others are still worth having
            _logger.debug("%s of %s failed", part.name, subject.name, exc_info=True)
            results.problems.append(f"{part.name} of {subject.name}: {reason_of(error)}")
        else:
            measured[part.name] = found
            results.problems += [f"{part.name} of {subject.name}: {text}" for text in found.problems]
    return measured


def _key(part: Part, subject: Subject, setting: Setting) -> str:
    settings = {name: str(getattr(setting.config, name)) for name in part.depends}
    source = [setting.source.name, setting.source.split, setting.source.fingerprint]
    how = [subject.weights_hash, dataclasses.asdict(subject.spec), str(subject.amp_dtype), subject.device.type]
    text = json.dumps([FORMAT, part.name, settings, source, how, setting.holdout], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def report(config: SuiteConfig, parts: Sequence[Part], results: Results, pairs: Sequence[tuple[str, str]]) -> None:
    """Write the tables and pictures, print the tables, and say what is missing."""
    config.out.mkdir(parents=True, exist_ok=True)
    compared: list[tuple[Part, str, str, Difference]] = []
    for part in parts:
        figures = results.figures(part)
        if not figures:
            continue
        rows = [{"model": name, **figures[name], **results.measured[name][part.name].facts} for name in figures]
        if any(out["left_out_images"] for out in results.left_out.values()):
            rows = [row | results.left_out[row["model"]] for row in rows]
        write_csv(config.out / f"{part.name}.csv", rows)
        if part.draw is not None:
            with house_style():
                save_png(part.draw(figures), config.out / f"{part.name}.png")
        both = [results.measured.get(model, {}) for pair in pairs for model in pair]
        for (model, twin), ours, theirs in zip(pairs, both[::2], both[1::2], strict=True):
            if part.name in ours and part.name in theirs and results.same_images(model, twin):
                found = differences(part, ours[part.name], theirs[part.name], config.resamples, config.suite_seed)
                compared += [(part, model, twin, difference) for difference in found]
    results.problems += [
        f"{model} is not held against {twin}: they know other classes of these images"
        for model, twin in pairs
        if not results.same_images(model, twin)
    ]
    if compared:
        table = [_pair_row(*one) for one in compared] + (_over_pairs(compared) if len(config.against) > 1 else [])
        write_csv(config.out / PAIRS, table)
    else:
        (config.out / PAIRS).unlink(missing_ok=True)  # of an earlier run, of other models
    write_page(config.out)
    print(f"\n{page_tables(config.out, [part.name for part in parts])}\n\nin {config.out}")
    for problem in results.problems:
        print(f"missing: {problem}", file=sys.stderr)


def _pair_row(part: Part, model: str, twin: str, difference: Difference) -> dict[str, Any]:
    return {
        "part": part.name,
        "figure": difference.figure,
        "model": model,
        "against": twin,
        "value": difference.ours,
        "value_against": difference.theirs,
        "difference": difference.difference,
        "low": difference.low,
        "high": difference.high,
        "mcnemar_p": difference.mcnemar_p,
    }


def _over_pairs(compared: Sequence[tuple[Part, str, str, Difference]]) -> list[dict[str, Any]]:
    """Over several pairs of runs, the mean difference with Student's interval: what seeds leave of it."""
    by_figure: dict[tuple[str, str], list[Difference]] = {}
    for part, _, _, difference in compared:
        by_figure.setdefault((part.name, difference.figure), []).append(difference)
    rows = []
    for (part_name, figure), found in by_figure.items():
        if len(found) > 1:
            mean, low, high = mean_over_pairs([difference.difference for difference in found])
            place = {"part": part_name, "figure": figure, "model": f"mean of {len(found)} pairs"}
            rows.append({**place, "difference": mean, "low": low, "high": high})
    return rows


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows whole or not at all; figures to six digits, columns in the order in which they first come."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with replacing_file(path) as aside, aside.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()} for row in rows
        )


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)
