"""The tables of the zoo's own pages, MODEL_CARD.md and README, from the manifest and the evaluation suite.

    python -m tffd_zoo.cards

writes them anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .atomic import write_text
from .cli import run_cli
from .evaluation import FIGURES
from .json_files import read_json
from .markdown import bullets, escaped, markdown_table
from .model_card import (
    CHOSEN_ON_ITS_TEST,
    Twin,
    chosen_on_its_test,
    comparison,
    figures_shown,
    known_twin,
    short_method,
)
from .models import HubFile, Metrics, Release, plain_twin_name, releases

Suite = Mapping[str, Sequence[Mapping[str, Any]]]
"""The rows of every part of the evaluation suite, as in its `suite.json`."""


class SuiteFigure(NamedTuple):
    """A figure of the suite that the cards show."""

    part: str
    name: str
    heading: str


SHORT = ("top1", "ece")
"""What the README has of every student's figures."""
CORRUPTED = SuiteFigure("corruptions", "mean", "corrupted %")
SHOWN = (
    SuiteFigure("calibration", "ece", "ECE %"),
    CORRUPTED,
    SuiteFigure("duplicates", "top1_without", "no duplicates %"),
    SuiteFigure("ood", "digits_energy_auroc", "digits, AUROC %"),
    SuiteFigure("transfer", "coarse_linear", "coarse classes %"),
)


def render_results(released: Sequence[Release]) -> str:
    """Return the figures of all releases, and how each stands to its plain twin."""
    if not released:
        return "No weights have been released yet."
    header = [
        "weights",
        "trained with",
        "data",
        "pixels",
        *(figure.heading for figure in FIGURES.values()),
        "epochs",
        "hours",
        "in",
    ]
    rows = [
        [
            f"`{release.name}`",
            short_method(release.recipe),
            _images_of(release.metrics),
            str(release.input.input_size[-1]),
            *figures_shown(release.metrics.result.figures),
            f"{release.training.epochs:g}",
            f"{release.training.hours:.2g}",
            "the Hub" if isinstance(release.file, HubFile) else "the package",
        ]
        for release in released
    ]
    lines = [
        f"trained on: {escaped(hardware)}" for hardware in sorted({release.training.hardware for release in released})
    ]
    for release in released:
        if release.metrics.averaged:
            lines.append(
                f"`{release.name}`: the moving average of the weights, decay {release.recipe['optim']['ema_decay']:g}"
            )
        if chosen_on_its_test(release.recipe, release.metrics.split, release.metrics.evaluation):
            lines.append(f"`{release.name}`: {CHOSEN_ON_ITS_TEST}")
        if twin := known_twin(release.name, release.recipe, released):
            run = Twin(release.name, release.recipe, release.metrics.to_json())
            lines.append(f"`{release.name}`: {comparison(run, twin)}")
        elif plain_twin_name(release.name):
            lines.append(f"`{release.name}`: no plain twin was trained, so no gain by Tf-FD is claimed.")
    return f"{markdown_table(header, rows)}\n\n{bullets(lines)}"


def render_students(released: Sequence[Release], suite: Suite) -> str:
    """Return the students at a glance: what each reaches beside its plain twin, and its size."""
    by_name = {release.name: release for release in released}
    rows = []
    for release in released:
        twin_name = plain_twin_name(release.name)
        if twin_name is None:
            continue
        twin = known_twin(release.name, release.recipe, released)
        measured = release.metrics.result.figures, twin.metrics if twin else {}
        pairs = [
            *([_figure_of(name, metrics) for metrics in measured] for name in SHORT),
            [_suite_figure(suite, by_name.get(name), CORRUPTED) for name in (release.name, twin_name)],
        ]
        rows.append(
            [
                f"`{release.name}`",
                f"{release.metrics.dataset}, {release.input.input_size[-1]} px",
                *(f"{its_own} ({of_the_twin})" for its_own, of_the_twin in pairs),
                f"{release.size / 1e6:.1f}",
            ]
        )
    averaged = [f"`{each.name}`" for each in released if each.metrics.averaged and plain_twin_name(each.name)]
    told = f"Moving average of the weights: {', '.join(averaged)}. " if averaged else ""
    headings = [*(FIGURES[name].heading for name in SHORT), CORRUPTED.heading]
    table = markdown_table(["student", "trained on", *headings, "MB"], rows)
    return (
        f"{table}\n\nIn brackets: its plain twin, the same recipe and seed without Tf-FD. {told}"
        f"{_conditions(suite)}One run each; [what the runs show](recipes/results/README.md) has the pairs of other "
        "seeds that were run."
    )


def render_suite(released: Sequence[Release], suite: Suite) -> str:
    """Return what the suite measured of all releases, the differences between twins, and what neither says."""
    measured = [release for release in released if _is_current(suite, release)]
    if not measured:
        return "No weights that are released now were evaluated by the suite."
    rows = [[f"`{release.name}`", *(_suite_figure(suite, release, figure) for figure in SHOWN)] for release in measured]
    table = markdown_table(["weights", *(figure.heading for figure in SHOWN)], rows)
    names = {release.name for release in measured}
    differences: dict[tuple[str, str], list[str]] = {}
    for figure in SHOWN:
        for pair in suite.get("pairs", ()):
            twins = pair["model"], pair["against"]
            if (pair["part"], pair["figure"]) == figure[:2] and {*twins} <= names:
                interval = f"{pair['difference']:.2f} [{pair['low']:.2f}, {pair['high']:.2f}]"
                differences.setdefault(twins, []).append(f"{figure.heading} {interval}")
    lines = [
        *filter(None, [_conditions(suite).strip()]),
        *(f"`{model}` minus `{twin}`: {', '.join(found)}" for (model, twin), found in differences.items()),
        "Intervals (95 %, bootstrap) are of other test images for these very weights. There is one run each, and "
        "another seed can move a figure by more: no difference here is shown to be an effect of Tf-FD.",
    ]
    return f"{table}\n\n{bullets(lines)}"


def _images_of(metrics: Metrics) -> str:
    held_out = " (images held out)" if metrics.evaluation.get("held_out") else ""
    return f"{escaped(metrics.dataset)}, {escaped(metrics.split)}{held_out}"


def _figure_of(name: str, metrics: Mapping[str, Any]) -> str:
    return FIGURES[name].shown(metrics.get(name))


def _row(suite: Suite, part: str, name: str) -> Mapping[str, Any]:
    return next((row for row in suite.get(part, ()) if row["model"] == name), {})


def _is_current(suite: Suite, release: Release) -> bool:
    """Whether the suite measured these very weights, as far as their accuracy tells: not others of that name."""
    top1 = _row(suite, "clean", release.name).get("top1")
    return top1 is not None and FIGURES["top1"].shown(top1) == _figure_of("top1", release.metrics.result.figures)


def _suite_figure(suite: Suite, release: Release | None, figure: SuiteFigure) -> str:
    if release is None or not _is_current(suite, release):
        return "-"
    value = _row(suite, figure.part, release.name).get(figure.name)
    return "-" if value is None else f"{value:.2f}"


def _conditions(suite: Suite) -> str:
    """What the corrupted images were, as a sentence."""
    found = {f"{row['images']:,} images each, {row['corrupted_images']}" for row in suite.get("corruptions", ())}
    if not found:
        return ""
    return f"Corrupted: mean top-1 over CIFAR-C's 15 kinds at 5 severities ({'; '.join(sorted(found))}). "


TABLES: dict[str, Callable[[Sequence[Release], Suite], str]] = {
    "results": lambda released, suite: render_results(released),
    "students": render_students,
    "suite": render_suite,
}
"""Tables by the name in the marks around them."""


@dataclass(frozen=True)
class CardsConfig:
    """Write the figures of all releases into the zoo's own card and the README, from the manifest and the suite."""

    cards: tuple[Path, ...] = (Path("MODEL_CARD.md"), Path("README.md"))
    """The files; what stands between their marks is replaced."""
    suite: Path = Path("recipes/results/zoo/suite.json")
    """What `python -m tffd_zoo.eval ... --suite` measured of the releases; figures of other weights are left out."""
    check: bool = False
    """Change nothing, and fail if the figures are not those of the manifest and the suite."""


def main(config: CardsConfig) -> None:
    """Bring the tables up to date with the manifest and the suite.

    Raises:
        ValueError: a file lacks its marks, or `check` finds it out of date.
    """
    suite = read_json(config.suite, "measure the releases again, with python -m tffd_zoo.eval ... --suite")
    for path in config.cards:
        card = path.read_text(encoding="utf-8")
        fresh = with_tables(card, str(path), suite)
        if config.check and fresh != card:
            raise ValueError(f"{path} is not up to date with manifest and suite; run python -m tffd_zoo.cards")
        if fresh != card:
            write_text(path, fresh)


def with_tables(text: str, name: str, suite: Suite) -> str:
    """Replace what stands between the marks of every table that `text` has a place for.

    Raises:
        ValueError: it has none.
    """
    places = [table for table in TABLES if all(mark in text for mark in marks(table))]
    if not places:
        raise ValueError(f"{name} has no place for the figures; put {' and '.join(marks('results'))} around it")
    for table in places:
        begin, end = marks(table)
        head, _, rest = text.partition(begin)
        text = f"{head}{begin}\n\n{TABLES[table](releases(), suite)}\n\n{end}{rest.partition(end)[2]}"
    return text


def marks(table: str) -> tuple[str, str]:
    """What stands before and after a table."""
    return f"<!-- {table}: written by python -m tffd_zoo.cards -->", f"<!-- end of {table} -->"


if __name__ == "__main__":
    run_cli(main, CardsConfig)
