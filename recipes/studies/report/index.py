"""The Markdown page over all studies: what Tf-FD gives, as far as the runs show it, and every comparison."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from tffd_zoo.atomic import write_text
from tffd_zoo.markdown import markdown_table

from .page import COMMAND, PAGE, PICTURE
from .records import read_records
from .statistics import Estimate
from .study import Row, Study
from .study_runs import StudyRuns, last
from .words import evaluated_on, interval, joined, left_when_widened, signed

OTHER_PAGES = {
    "benchmark/README.md": "what Tf-FD costs",
    "benchmark/imagenet.md": "what a run on ImageNet would cost",
    "channels/README.md": "what the losses do to channels",
}


def write_index(studies: Iterable[Study], records: Path, results: Path) -> Path:
    """Write the page over all studies that have records, with links to theirs."""
    page = results / PAGE
    write_text(page, index_text(studies, records, results))
    return page


def index_text(studies: Iterable[Study], records: Path, results: Path) -> str:
    """The page over all studies that have records, as Markdown."""
    found = read_records(records)
    every = [StudyRuns.of(study, found) for study in studies]
    return _render_index([runs for runs in every if runs.all], results)


def _render_index(pages: Sequence[StudyRuns], results: Path) -> str:
    rows = []
    certain: dict[str, str] = {}  # of every row with an interval, its difference where zero is not in it
    for runs in pages:
        gains = {row.name: runs.gain(row, last) for row in runs.compared}
        verdicts = Counter(gain.verdict for gain in gains.values())
        for name, gain in gains.items():
            if gain.error is not None:
                told = f"`{name}` ({signed(gain.mean)}, n = {gain.n})"
                certain[name] = told if gain.excludes_zero() else ""
        link = f"[{runs.study.name}]({runs.study.name}/{PAGE})"
        counts = [str(verdicts[verdict]) for verdict in ("above", "below", "neither", "unknown")]
        rows.append([link, runs.study.question, _evaluated_briefly(runs), *counts])
    excluding = [*filter(None, certain.values())]
    other = [f"[{what}]({page})" for page, what in OTHER_PAGES.items() if (results / page).exists()]
    deciding = [runs for runs in pages if runs.study.decides and runs.compared]
    header = ["study", "question", "runs", "better", "worse", "undecided", "one pair"]
    text = [
        "# What the runs show",
        f"Made by `{COMMAND} STUDY --report` from the records in `records/`, one file a run, like every page that it "
        "links to.",
        *([f"## Does Tf-FD help?\n\n{_answer(deciding)}"] if deciding else []),
        *map(_answer_of, deciding),
        "## All comparisons",
        markdown_table(header, rows),
        "Recipes by what their difference to the twin in top-1 of the last epoch shows: its whole interval above zero, "
        "below zero, zero within, or no interval, for one pair of runs shows nothing by itself. "
        f"{len(certain)} have an interval (95 %, Student's t, paired by seed, with one spread for all runs that "
        f"share a twin, not corrected for their number); {len(excluding)} of those exclude zero"
        f"{': ' + joined(excluding) if excluding else ''}. What else a reader has to know of the runs stands in the "
        "notes of each page.",
        *([f"Other pages: {'; '.join(other)}."] if other else []),
    ]
    return "\n\n".join(text) + "\n"


def _tffd_gains(runs: StudyRuns) -> list[tuple[Row, Estimate]]:
    """Of every setting of Tf-FD its gain over training without."""
    return [(row, runs.gain(row, last)) for row in runs.compared if runs.study.recipe(row.name).tffd]


def _answer(deciding: Sequence[StudyRuns]) -> str:
    """What the studies that ask it say of Tf-FD, in a line: each setting by itself, and all that were tried at once."""
    shortest = min(runs.epochs[0] for runs in deciding)
    ran = f"In our paired runs (one recipe, the same seeds) of {shortest} epochs and more,"
    # A row that two studies share is one setting.
    known = {
        row.name: (runs.study.recipe(row.name), gain)
        for runs in deciding
        for row, gain in _tffd_gains(runs)
        if gain.error is not None
    }
    if not known:
        return f"{ran} no setting of Tf-FD has several seeds, so nothing is shown."
    above, below = (
        [
            f"`{name}` ({recipe.model}, {recipe.optim.epochs} epochs: {signed(gain.mean)} points, {interval(gain)}, "
            f"n = {gain.n})"
            for name, (recipe, gain) in known.items()
            if gain.verdict == verdict
        ]
        for verdict in ("above", "below")
    )
    left = left_when_widened({name: gain for name, (_, gain) in known.items()})
    return (
        f"{ran} of the {len(known)} settings of Tf-FD with several seeds the whole 95 % interval is better than plain "
        f"training for {joined(above or ['none'])}, and worse for {joined(below or ['none'])}. Once the intervals "
        f"are widened for the number of settings (Bonferroni), they exclude zero for {joined(left or ['none'])}."
    )


def _answer_of(runs: StudyRuns) -> str:
    """What one study says of Tf-FD, and its picture."""
    study = runs.study
    gains = _tffd_gains(runs)
    known = [gain for _, gain in gains if gain.error is not None]
    single = [f"`{row.name}` ({signed(gain.mean)})" for row, gain in gains if gain.error is None]
    parts = [evaluated_on(runs), f"Runs have {joined(map(str, runs.epochs))} epochs."]
    if known:
        verdicts = Counter(gain.verdict for gain in known)
        seeds = joined(map(str, sorted({gain.n for gain in known})))
        settings, interval = (
            ("settings", "intervals (95 %) reach") if len(known) > 1 else ("setting", "interval (95 %) reaches")
        )
        parts.append(
            f"{len(known)} {settings} of Tf-FD ran with {seeds} seeds: {verdicts['above']} shown to be better than the "
            f"twin, {verdicts['below']} shown to be worse, {verdicts['neither']} undecided. The {interval} from "
            f"{signed(min(gain.low for gain in known))} to {signed(max(gain.high for gain in known))} points: an "
            "effect may lie anywhere within, and is not to be expected beyond."
        )
    if single:
        each = " each" if len(single) > 1 else ""
        parts.append(f"One pair of runs{each}, which shows nothing by itself: {joined(single)}.")
    picture = f"![Gain of every recipe over its twin]({study.name}/{PICTURE})"
    return f"### [{study.name}]({study.name}/{PAGE}): {study.question}\n\n{' '.join(parts)}\n\n{picture}"


def _evaluated_briefly(runs: StudyRuns) -> str:
    images = {"held-out images" if run.recipe["data"]["holdout"] else "test images" for run in runs.all}
    return f"{len(runs.all)} of {joined(map(str, runs.epochs))} epochs, {joined(sorted(images))}"
