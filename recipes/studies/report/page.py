"""One Markdown page about a study: every figure and every sentence comes from the records of its runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tffd_zoo.atomic import write_text
from tffd_zoo.markdown import markdown_table
from tffd_zoo.pictures import house_style, save_png
from tffd_zoo.recipe import differences
from tffd_zoo.run_record import RunRecord
from tffd_zoo.training.precision import describe_precision

from .charts import Gain, draw_gains, draw_lengths
from .records import commit_of
from .statistics import estimate
from .study import Row, Study
from .study_runs import Figure, StudyRuns, last, last_average
from .words import NONE, evaluated_on, interval, joined, left_when_widened, sd, signed

PAGE = "README.md"
PICTURE = "gains.png"
CURVE = "lengths.png"
COMMAND = "python -m recipes.studies.compare"


def write_report(study: Study, records: Path, results: Path) -> Path:
    """Write the page and its picture to `results`, from the records that `collect` put into `records`.

    The same records give the same bytes, the picture's too with the same matplotlib.

    Raises:
        FileNotFoundError: there is no record of any run of the study.
        ValueError: records are damaged, or two runs that are compared saw other data.

    Returns:
        The page.
    """
    runs = StudyRuns.read(study, records)
    with house_style():
        if runs.compared:
            save_png(_gains_figure(runs), results / PICTURE)
        if lengths := _lengths(runs):
            save_png(draw_lengths(lengths), results / CURVE)
    page = results / PAGE
    write_text(page, _render(runs))
    return page


def report_text(study: Study, records: Path) -> str:
    """The page of a study, as Markdown."""
    return _render(StudyRuns.read(study, records))


# --- the page ---------------------------------------------------------------------------------------------------------


def _render(runs: StudyRuns) -> str:
    study = runs.study
    averaged = all("ema_top1" in run.evaluations[-1] for run in runs.all)
    sections = [
        f"# {study.name}: {study.question}",
        f"Made by `{COMMAND} {study.name} --report` from the collected records: every figure, and every sentence "
        f"outside the notes. {evaluated_on(runs)}",
        *([f"![Gain of every recipe over its twin]({PICTURE})"] if runs.compared else []),
        *([f"![Top-1 against the number of epochs]({CURVE})"] if _lengths(runs) else []),
        "## After the last epoch\n\n" + _table(runs, last) + "\n\n" + _reading(runs),
        *(["## The moving average of the weights\n\n" + _table(runs, last_average)] if averaged else []),
        *(["## Notes\n\n" + study.note] if study.note else []),
        "## Cost\n\n" + _cost(runs),
        *(["## Gradient shares\n\n" + _gradient_shares(runs)] if _shares(runs) else []),
        "## Conditions\n\n" + _conditions(runs),
    ]
    return "\n\n".join(sections) + "\n"


def _table(runs: StudyRuns, figure: Figure) -> str:
    """Top-1 of every row, and its paired difference to the twin."""
    sources = _sources(runs)
    header = ["recipe", "what", "epochs", "runs", "top-1", "sd"]
    header += ["twin", "difference", "95 % interval"] if runs.compared else []
    rows = []
    for row in runs.rows:
        value = estimate([*runs.values(row.name, figure).values()])
        epochs = dict.fromkeys(f"{run.evaluations[-1]['epoch']:g}" for run in runs.by_name[row.name].values())
        cells = [f"`{row.name}`", row.what, joined(epochs), str(value.n), f"{value.mean:.2f}", sd(value)]
        if row in runs.compared:
            gain = runs.gain(row, figure)
            cells += [f"`{row.twin}`", signed(gain.mean), interval(gain)]
        elif runs.compared:
            cells += [NONE, NONE, NONE]
        if sources:
            cells.append(_published(row, sources))
        rows.append(cells)
    return markdown_table([*header, *(["published, gain"] if sources else [])], rows)


def _sources(runs: StudyRuns) -> list[str]:
    return list(dict.fromkeys(row.published.source for row in runs.rows if row.published))


def _published(row: Row, sources: Sequence[str]) -> str:
    if row.published is None:
        return NONE
    gain = "" if row.published.gain is None else f", {signed(row.published.gain)}"
    return f"{row.published.top1:.2f}{gain} [{sources.index(row.published.source) + 1}]"


def _reading(runs: StudyRuns) -> str:
    """What the table says, and where its published figures are from."""
    parts = []
    if runs.compared:
        verdicts: dict[str, list[str]] = {}
        for row in runs.compared:
            gain = runs.gain(row, last)
            verdicts.setdefault(gain.verdict, []).append(f"`{row.name}` ({signed(gain.mean)})")
        parts.append(_verdict(runs, verdicts))
        if unequal := _unequal_settings(runs):
            parts.append(f"Settings of data and optimisation in which a recipe differs from its twin: {unequal}.")
    parts.append(
        "sd is the sample standard deviation (n - 1) over the seeds"
        + ("; one run has none." if any(len(runs.by_name[row.name]) == 1 for row in runs.rows) else ".")
    )
    if sources := _sources(runs):
        listed = "\n".join(f"- [{mark}] {source}" for mark, source in enumerate(sources, start=1))
        parts.append(f"Published figures, none of them from this very recipe:\n\n{listed}")
    return "\n\n".join(parts)


def _verdict(runs: StudyRuns, verdicts: Mapping[str, Sequence[str]]) -> str:
    """What the paired differences of the last epoch show, and what they do not."""
    meanings = {
        "above": "Better than the twin, the whole interval above zero: {}.",
        "below": "Worse than the twin, the whole interval below zero: {}.",
        "neither": "Not significant, zero lies in the interval: {}.",
        "unknown": "One pair of runs, so no interval, and nothing can be said of significance: {}.",
    }
    sentences = [text.format(joined(verdicts[verdict])) for verdict, text in meanings.items() if verdict in verdicts]
    if intervals := _of_the_intervals(runs):
        return " ".join([*sentences, *intervals])
    repeated = {row.name: estimate([*runs.values(row.name, last).values()]) for row in runs.rows}
    by_seed = [f"{value.sd:.2f} (`{name}`, n = {value.n})" for name, value in repeated.items() if value.sd is not None]
    if by_seed:
        sentences.append(
            f"For scale, runs that differ in nothing but the seed have a standard deviation of {joined(by_seed)}."
        )
    return " ".join(sentences)


def _of_the_intervals(runs: StudyRuns) -> list[str]:
    """How the intervals came about, and what is left of them when they are held to be true all at once."""
    gains = {row.name: gain for row in runs.compared if (gain := runs.gain(row, last)).error}
    if not gains:
        return []
    spreads = []
    for twin in dict.fromkeys(row.twin or "" for row in runs.compared if row.name in gains):
        spread = runs.spread(twin, last)
        assert spread is not None
        freedom = "degree" if spread.degrees == 1 else "degrees"
        spreads.append(f"{spread.sd:.2f} with {spread.degrees} {freedom} of freedom (`{twin}` and its rows)")
    sentences = [
        "The intervals are Student's t for the mean of paired differences, with one spread for all runs that share a "
        "twin, what is left once the mean of each recipe and the effect of each seed are taken out (all recipes are "
        f"taken to scatter alike): {joined(spreads)}."
    ]
    if len(gains) > 1:
        left = left_when_widened(gains)
        sentences.append(
            f"Without any effect each of the {len(gains)} excludes zero in 1 of 20 studies; widened for their number "
            f"(Bonferroni), {joined(left or ['none'])} still {'do' if len(left) > 1 else 'does'}."
        )
    return sentences


def _unequal_settings(runs: StudyRuns) -> str:
    found = []
    for row in runs.compared:
        ours, theirs = (next(iter(runs.by_name[name].values())).recipe for name in (row.name, row.twin or ""))
        changed = [
            field
            for section in ("data", "optim")
            for field in differences(ours[section], theirs[section], f"{section}.")
            if not field.startswith("data.source:")
        ]
        if changed:
            found.append(f"`{row.name}` ({'; '.join(changed)})")
    return joined(found)


def _cost(runs: StudyRuns) -> str:
    header = ["recipe", "images/s", "time per image, twin = 1"]
    rows, spreads, within = [], [], []
    for row in runs.rows:
        rates = [run.images_per_second for run in runs.by_name[row.name].values()]
        known = [rate for rate in rates if rate]
        if len(known) > 1:
            spreads.append((max(known) - min(known)) / statistics.median(known))
        pairs = [
            (ours, theirs) for each, _, ours, theirs in runs.pairs() if each is row and _same_machine(ours, theirs)
        ]
        of_one_commit = [
            (ours, theirs) for ours, theirs in pairs if ours.environment["commit"] == theirs.environment["commit"]
        ]
        ratios = [
            theirs.images_per_second / ours.images_per_second
            for ours, theirs in of_one_commit or pairs
            if ours.images_per_second and theirs.images_per_second
        ]
        ratio = f"{statistics.median(ratios):.2f}" if ratios else NONE
        if len(ratios) > 1:
            ratio += f" ({min(ratios):.2f} to {max(ratios):.2f})"
        if ratios and not of_one_commit:
            ratio += " *"
        if ratios and spreads and abs(statistics.median(ratios) - 1) <= max(spreads):
            within.append(f"`{row.name}`")
        rows.append([f"`{row.name}`", f"{statistics.median(known):.0f}" if known else NONE, ratio])
    noise = (
        f"Runs of one recipe differ in speed by up to {100 * max(spreads):.0f} %, so ratios that near to 1 are noise"
        + (f": those of {joined(within)}." if within else "; none here is.")
        if spreads
        else "No recipe ran twice, so how much the speed varies by itself is not known, and no ratio is significant."
    )
    starred = " * Of runs by different commits, between which the code may have become faster or slower."
    return (
        f"{markdown_table(header, rows)}\n\nMedians of each run, then over the runs, of the training steps with their "
        "data, without evaluation; ratios are of runs with one seed by one commit on like machines, the range in "
        f"brackets.{starred if any(row[2].endswith('*') for row in rows) else ''} Whatever else the machine did is in "
        f"them: this is no benchmark. {noise}"
    )


def _same_machine(ours: RunRecord, theirs: RunRecord) -> bool:
    keys = ("hardware", "processes", "threads")
    return all(ours.environment.get(key) == theirs.environment.get(key) for key in keys)


def _gradient_shares(runs: StudyRuns) -> str:
    shares = _shares(runs)
    header = ["recipe", "loss", "runs", "mean over the run, %", "last epoch, %"]
    rows = []
    for row in runs.rows:
        for term, recipes in shares.items():
            if row.name in recipes:
                series = recipes[row.name].values()
                mean = statistics.fmean(statistics.fmean(share for _, share in points) for points in series)
                at_the_end = statistics.fmean(points[-1][1] for points in series)
                rows.append([f"`{row.name}`", term, str(len(series)), f"{100 * mean:.3g}", f"{100 * at_the_end:.3g}"])
    measured = {name for recipes in shares.values() for name in recipes}
    others = [f"`{row.name}`" for row in runs.rows if row.name not in measured]
    note = (
        "Norm of a loss's gradient, with its weight and schedule, over that of the cross-entropy's, on the model's "
        "parameters. They describe the runs; nothing here is tested for significance."
    )
    if others:
        note += f" Not measured: {joined(others)}."
    return f"{markdown_table(header, rows)}\n\n{note}"


def _conditions(runs: StudyRuns) -> str:
    def hardware(run: RunRecord) -> str:
        about = run.environment
        return f"{about['hardware']}; {about['processes']} process(es), {about['threads']} thread(s)"

    def versions(run: RunRecord) -> str:
        packages = ", ".join(f"{name} {version}" for name, version in run.environment["packages"].items())
        return f"Python {run.environment['python']}, {packages}"

    def optimisation(run: RunRecord) -> str:
        optim = run.recipe["optim"]
        return (
            f"{optim['epochs']} epochs, {optim['opt']}, batch {optim['batch_size']}, learning rate {optim['lr']:g} "
            f"({optim['sched']}), weight decay {optim['weight_decay']:g}"
        )

    about: list[tuple[str, Callable[[RunRecord], str]]] = [
        ("model", lambda run: str(run.recipe["model"])),
        ("optimisation", optimisation),
        ("trained on", lambda run: f"{run.data['train']['images']:,} images of {run.data['source']}"),
        ("steps", lambda run: describe_precision(run.recipe["run"]["precision"], run.recipe["run"]["compile"])),
        ("hardware", hardware),
        ("versions", versions),
        ("commit", lambda run: commit_of(run.environment)),
    ]
    lines = [f"{title}: {_by_recipe(runs, value)}" for title, value in about]
    seeds = {row.name: [*runs.by_name[row.name]] for row in runs.rows}
    same = len(set(map(tuple, seeds.values()))) == 1
    lines.append(f"seeds: {joined(map(str, next(iter(seeds.values())))) if same else _seeds(seeds)}")
    wanted = {row.name: runs.study.seeds_of(row) for row in runs.study.rows}
    missing = {name: [seed for seed in of_row if seed not in runs.by_name[name]] for name, of_row in wanted.items()}
    if any(missing.values()):
        lines.append(f"**seeds not run yet**: {_seeds(missing)}")
    return "\n".join(f"- {line}" for line in lines)


def _seeds(by_recipe: Mapping[str, Sequence[int]]) -> str:
    return "; ".join(f"`{name}` {joined(map(str, seeds))}" for name, seeds in by_recipe.items() if seeds)


def _by_recipe(runs: StudyRuns, value: Callable[[RunRecord], str]) -> str:
    """One value when all runs agree; else every value with the runs that have it."""
    found: dict[str, list[str]] = {}
    for run in runs.all:
        found.setdefault(value(run), []).append(f"`{run.name}` s{run.seed}")
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{text} ({joined(names)})" for text, names in found.items())


# --- the picture ------------------------------------------------------------------------------------------------------


def _gains_figure(runs: StudyRuns) -> Any:
    twins = {row.twin for row in runs.compared}
    gains = []
    for row in runs.compared:
        values = runs.difference(row, last)
        label = row.name if len(twins) == 1 else f"{row.name} over {row.twin}"
        gains.append(Gain(label, values, runs.gain(row, last), row.published.gain if row.published else None))
    return draw_gains(gains, over=str(*twins) if len(twins) == 1 else "the twin")


def _lengths(runs: StudyRuns) -> dict[str, dict[int, list[float]]]:
    """Top-1 by length of every recipe, rows of one wording being one; none of several models or one length each."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in runs.rows:
        for run in runs.by_name[row.name].values():
            found.setdefault(row.what, {}).setdefault(run.recipe["optim"]["epochs"], []).append(run.last)
    one_model = len({run.recipe["model"] for run in runs.all}) == 1
    return found if one_model and any(len(by_length) > 1 for by_length in found.values()) else {}


def _shares(runs: StudyRuns) -> dict[str, dict[str, dict[int, Sequence[tuple[float, float]]]]]:
    """Gradient shares by loss, recipe and seed."""
    found: dict[str, dict[str, dict[int, Sequence[tuple[float, float]]]]] = {}
    for row in runs.rows:
        for seed, run in runs.by_name[row.name].items():
            for term, points in run.shares.items():
                found.setdefault(term, {}).setdefault(row.name, {})[seed] = points
    return found
