"""One Markdown page about a study: every figure and every sentence comes from the records of its runs."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tffd_zoo.atomic import replacing_file
from tffd_zoo.markdown import markdown_table
from tffd_zoo.pictures import house_style, save_png
from tffd_zoo.recipe import differences
from tffd_zoo.run_record import RunRecord
from tffd_zoo.training.precision import describe_precision

from .charts import Gain, draw_gains, draw_lengths
from .records import commit_of, read_records
from .statistics import Estimate, Spread, estimate, estimate_gain, paired_differences, spread_of_runs, widened
from .study import Row, Study

PAGE = "README.md"
PICTURE = "gains.png"
CURVE = "lengths.png"
NONE = "-"
COMMAND = "python -m recipes.studies.compare"
Figure = Callable[[RunRecord], float]


def write_report(study: Study, records: Path, results: Path) -> Path:
    """Write the page and its picture to `results`, from the records that `collect` put into `records`.

    The same records give the same bytes, the picture's too with the same matplotlib.

    Raises:
        FileNotFoundError: there is no record of any run of the study.
        ValueError: records are damaged, or two runs that are compared saw other data.

    Returns:
        The page.
    """
    runs = _Runs.read(study, records)
    with house_style():
        if runs.compared:
            save_png(_gains_figure(runs), results / PICTURE)
        if lengths := _lengths(runs):
            save_png(draw_lengths(lengths), results / CURVE)
    return _write(results / PAGE, _render(runs))


def write_index(studies: Iterable[Study], records: Path, results: Path) -> Path:
    """Write the page over all studies that have records, with links to theirs."""
    return _write(results / PAGE, index_text(studies, records, results))


def report_text(study: Study, records: Path) -> str:
    """The page of a study, as Markdown."""
    return _render(_Runs.read(study, records))


def index_text(studies: Iterable[Study], records: Path, results: Path) -> str:
    """The page over all studies that have records, as Markdown."""
    found = read_records(records)
    every = [_Runs.of(study, found) for study in studies]
    return _render_index([runs for runs in every if runs.all], results)


def _write(page: Path, text: str) -> Path:
    page.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(page) as aside:
        aside.write_text(text)
    return page


# --- the runs of a study ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Runs:
    """The records of a study, by recipe and seed."""

    study: Study
    by_name: Mapping[str, Mapping[int, RunRecord]]

    @classmethod
    def read(cls, study: Study, records: Path) -> _Runs:
        runs = cls.of(study, read_records(records))
        if not runs.all:
            raise FileNotFoundError(f"{records} holds no finished run of study '{study.name}': run the study first")
        return runs

    @classmethod
    def of(cls, study: Study, records: Iterable[RunRecord]) -> _Runs:
        """Those of `records` that are runs of the study."""
        by_name: dict[str, dict[int, RunRecord]] = {row.name: {} for row in study.rows}
        for record in records:
            if record.name in by_name:
                by_name[record.name][record.seed] = record
        runs = cls(study, by_name)
        runs._check_pairs()
        return runs

    def _check_pairs(self) -> None:
        for row, seed, ours, theirs in self.pairs():
            for role in ("train", "eval"):
                if ours.data[role] != theirs.data[role]:
                    raise ValueError(
                        f"'{row.name}' and its twin '{row.twin}', seed {seed}, saw other images in {role} "
                        f"({ours.data[role]} and {theirs.data[role]}): run both on the same data"
                    )

    @property
    def rows(self) -> list[Row]:
        """Those that have a run."""
        return [row for row in self.study.rows if self.by_name[row.name]]

    @property
    def compared(self) -> list[Row]:
        """Those that have a run with the seed of a run of their twin."""
        return [row for row in self.rows if row.twin and self.by_name[row.name].keys() & self.by_name[row.twin].keys()]

    @property
    def all(self) -> list[RunRecord]:
        return [run for runs in self.by_name.values() for run in runs.values()]

    @property
    def epochs(self) -> list[int]:
        """The lengths of the runs, shortest first."""
        return sorted({run.recipe["optim"]["epochs"] for run in self.all})

    def pairs(self) -> Iterable[tuple[Row, int, RunRecord, RunRecord]]:
        for row in self.compared:
            ours, theirs = self.by_name[row.name], self.by_name[row.twin or ""]
            for seed in sorted(ours.keys() & theirs.keys()):
                yield row, seed, ours[seed], theirs[seed]

    def values(self, name: str, figure: Figure) -> dict[int, float]:
        return {seed: figure(run) for seed, run in self.by_name[name].items()}

    def difference(self, row: Row, figure: Figure) -> list[float]:
        """Paired differences of a figure to the twin, by seed."""
        assert row.twin is not None
        return [*paired_differences(self.values(row.name, figure), self.values(row.twin, figure)).values()]

    def spread(self, twin: str, figure: Figure) -> Spread | None:
        """How far runs lie apart by chance, of a twin and all rows that are compared with it."""
        names = [twin, *(row.name for row in self.compared if row.twin == twin)]
        return spread_of_runs([self.values(name, figure) for name in names])

    def gain(self, row: Row, figure: Figure) -> Estimate:
        """The mean of those differences and its interval."""
        return estimate_gain(self.difference(row, figure), self.spread(row.twin or "", figure))


def _last(run: RunRecord) -> float:
    return run.last


def _last_average(run: RunRecord) -> float:
    return run.evaluation("last_ema")["ema_top1"]


# --- the page ---------------------------------------------------------------------------------------------------------


def _render(runs: _Runs) -> str:
    study = runs.study
    averaged = all("ema_top1" in run.evaluations[-1] for run in runs.all)
    sections = [
        f"# {study.name}: {study.question}",
        f"Made by `{COMMAND} {study.name} --report` from the collected records: every figure, and every sentence "
        f"outside the notes. {_evaluated_on(runs)}",
        *([f"![Gain of every recipe over its twin]({PICTURE})"] if runs.compared else []),
        *([f"![Top-1 against the number of epochs]({CURVE})"] if _lengths(runs) else []),
        "## After the last epoch\n\n" + _table(runs, _last) + "\n\n" + _reading(runs),
        *(["## The moving average of the weights\n\n" + _table(runs, _last_average)] if averaged else []),
        *(["## Notes\n\n" + study.note] if study.note else []),
        "## Cost\n\n" + _cost(runs),
        *(["## Gradient shares\n\n" + _gradient_shares(runs)] if _shares(runs) else []),
        "## Conditions\n\n" + _conditions(runs),
    ]
    return "\n\n".join(sections) + "\n"


def _evaluated_on(runs: _Runs) -> str:
    def images(run: RunRecord) -> str:
        held_out, evaluated = run.recipe["data"]["holdout"], run.data["eval"]
        if held_out:
            return (
                f"{held_out:,} images held out of split `{run.recipe['data']['train_split']}` of {run.data['source']} "
                "(for choosing settings; the test images were not touched)"
            )
        return f"the {evaluated['images']:,} images of split `{evaluated['split']}` of {run.data['source']}"

    return f"Top-1 is in percent of {_joined(dict.fromkeys(images(run) for run in runs.all))}."


def _table(runs: _Runs, figure: Figure) -> str:
    """Top-1 of every row, and its paired difference to the twin."""
    sources = _sources(runs)
    header = ["recipe", "what", "epochs", "runs", "top-1", "sd"]
    header += ["twin", "difference", "95 % interval"] if runs.compared else []
    rows = []
    for row in runs.rows:
        value = estimate([*runs.values(row.name, figure).values()])
        epochs = dict.fromkeys(f"{run.evaluations[-1]['epoch']:g}" for run in runs.by_name[row.name].values())
        cells = [f"`{row.name}`", row.what, _joined(epochs), str(value.n), f"{value.mean:.2f}", _sd(value)]
        if row in runs.compared:
            gain = runs.gain(row, figure)
            cells += [f"`{row.twin}`", _signed(gain.mean), _interval(gain)]
        elif runs.compared:
            cells += [NONE, NONE, NONE]
        if sources:
            cells.append(_published(row, sources))
        rows.append(cells)
    return markdown_table([*header, *(["published, gain"] if sources else [])], rows)


def _sources(runs: _Runs) -> list[str]:
    return list(dict.fromkeys(row.published.source for row in runs.rows if row.published))


def _published(row: Row, sources: Sequence[str]) -> str:
    if row.published is None:
        return NONE
    gain = "" if row.published.gain is None else f", {_signed(row.published.gain)}"
    return f"{row.published.top1:.2f}{gain} [{sources.index(row.published.source) + 1}]"


def _reading(runs: _Runs) -> str:
    """What the table says, and where its published figures are from."""
    parts = []
    if runs.compared:
        verdicts: dict[str, list[str]] = {}
        for row in runs.compared:
            gain = runs.gain(row, _last)
            verdicts.setdefault(gain.verdict, []).append(f"`{row.name}` ({_signed(gain.mean)})")
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


def _verdict(runs: _Runs, verdicts: Mapping[str, Sequence[str]]) -> str:
    """What the paired differences of the last epoch show, and what they do not."""
    meanings = {
        "above": "Better than the twin, the whole interval above zero: {}.",
        "below": "Worse than the twin, the whole interval below zero: {}.",
        "neither": "Not significant, zero lies in the interval: {}.",
        "unknown": "One pair of runs, so no interval, and nothing can be said of significance: {}.",
    }
    sentences = [text.format(_joined(verdicts[verdict])) for verdict, text in meanings.items() if verdict in verdicts]
    if intervals := _of_the_intervals(runs):
        return " ".join([*sentences, *intervals])
    repeated = {row.name: estimate([*runs.values(row.name, _last).values()]) for row in runs.rows}
    by_seed = [f"{value.sd:.2f} (`{name}`, n = {value.n})" for name, value in repeated.items() if value.sd is not None]
    if by_seed:
        sentences.append(
            f"For scale, runs that differ in nothing but the seed have a standard deviation of {_joined(by_seed)}."
        )
    return " ".join(sentences)


def _of_the_intervals(runs: _Runs) -> list[str]:
    """How the intervals came about, and what is left of them when they are held to be true all at once."""
    gains = {row.name: gain for row in runs.compared if (gain := runs.gain(row, _last)).error}
    if not gains:
        return []
    spreads = []
    for twin in dict.fromkeys(row.twin or "" for row in runs.compared if row.name in gains):
        spread = runs.spread(twin, _last)
        assert spread is not None
        freedom = "degree" if spread.degrees == 1 else "degrees"
        spreads.append(f"{spread.sd:.2f} with {spread.degrees} {freedom} of freedom (`{twin}` and its rows)")
    sentences = [
        "The intervals are Student's t for the mean of paired differences, with one spread for all runs that share a "
        "twin, what is left once the mean of each recipe and the effect of each seed are taken out (all recipes are "
        f"taken to scatter alike): {_joined(spreads)}."
    ]
    if len(gains) > 1:
        left = _left_when_widened(gains)
        sentences.append(
            f"Without any effect each of the {len(gains)} excludes zero in 1 of 20 studies; widened for their number "
            f"(Bonferroni), {_joined(left or ['none'])} still {'do' if len(left) > 1 else 'does'}."
        )
    return sentences


def _left_when_widened(gains: Mapping[str, Estimate]) -> list[str]:
    """Those whose interval excludes zero even where all of them are to hold at once."""
    return [f"`{name}`" for name, gain in gains.items() if gain.excludes_zero(widened(len(gains)))]


def _unequal_settings(runs: _Runs) -> str:
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
    return _joined(found)


def _cost(runs: _Runs) -> str:
    header = ["recipe", "images/s", "time per image, twin = 1"]
    rows, spreads, within = [], [], []
    for row in runs.rows:
        rates = [run.images_per_second for run in runs.by_name[row.name].values()]
        known = [rate for rate in rates if rate]
        if len(known) > 1:
            spreads.append((max(known) - min(known)) / statistics.median(known))
        ratios = [
            theirs.images_per_second / ours.images_per_second
            for each, _, ours, theirs in runs.pairs()
            if each is row and ours.images_per_second and theirs.images_per_second and _same_machine(ours, theirs)
        ]
        ratio = f"{statistics.median(ratios):.2f}" if ratios else NONE
        if len(ratios) > 1:
            ratio += f" ({min(ratios):.2f} to {max(ratios):.2f})"
        if ratios and spreads and abs(statistics.median(ratios) - 1) <= max(spreads):
            within.append(f"`{row.name}`")
        rows.append([f"`{row.name}`", f"{statistics.median(known):.0f}" if known else NONE, ratio])
    noise = (
        f"Runs of one recipe differ in speed by up to {100 * max(spreads):.0f} %, so ratios that near to 1 are noise"
        + (f": those of {_joined(within)}." if within else "; none here is.")
        if spreads
        else "No recipe ran twice, so how much the speed varies by itself is not known, and no ratio is significant."
    )
    return (
        f"{markdown_table(header, rows)}\n\nMedians of each run, then over the runs, of the training steps with their "
        "data, without evaluation; ratios are of runs with one seed on like machines, the range in brackets. Whatever "
        f"else the machine did is in them: this is no benchmark. {noise}"
    )


def _same_machine(ours: RunRecord, theirs: RunRecord) -> bool:
    keys = ("hardware", "processes", "threads")
    return all(ours.environment.get(key) == theirs.environment.get(key) for key in keys)


def _gradient_shares(runs: _Runs) -> str:
    shares = _shares(runs)
    header = ["recipe", "loss", "runs", "mean over the run, %", "last epoch, %"]
    rows = []
    for row in runs.rows:
        for term, recipes in shares.items():
            if row.name in recipes:
                series = recipes[row.name].values()
                mean = statistics.fmean(statistics.fmean(share for _, share in points) for points in series)
                last = statistics.fmean(points[-1][1] for points in series)
                rows.append([f"`{row.name}`", term, str(len(series)), f"{100 * mean:.3g}", f"{100 * last:.3g}"])
    measured = {name for recipes in shares.values() for name in recipes}
    others = [f"`{row.name}`" for row in runs.rows if row.name not in measured]
    note = (
        "Norm of a loss's gradient, with its weight and schedule, over that of the cross-entropy's, on the model's "
        "parameters. They describe the runs; nothing here is tested for significance."
    )
    if others:
        note += f" Not measured: {_joined(others)}."
    return f"{markdown_table(header, rows)}\n\n{note}"


def _conditions(runs: _Runs) -> str:
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
    lines.append(f"seeds: {_joined(map(str, next(iter(seeds.values())))) if same else _seeds(seeds)}")
    wanted = {row.name: runs.study.seeds_of(row) for row in runs.study.rows}
    missing = {name: [seed for seed in of_row if seed not in runs.by_name[name]] for name, of_row in wanted.items()}
    if any(missing.values()):
        lines.append(f"**seeds not run yet**: {_seeds(missing)}")
    return "\n".join(f"- {line}" for line in lines)


def _seeds(by_recipe: Mapping[str, Sequence[int]]) -> str:
    return "; ".join(f"`{name}` {_joined(map(str, seeds))}" for name, seeds in by_recipe.items() if seeds)


def _by_recipe(runs: _Runs, value: Callable[[RunRecord], str]) -> str:
    """One value when all runs agree; else every value with the runs that have it."""
    found: dict[str, list[str]] = {}
    for run in runs.all:
        found.setdefault(value(run), []).append(f"`{run.name}` s{run.seed}")
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{text} ({_joined(names)})" for text, names in found.items())


# --- the picture ------------------------------------------------------------------------------------------------------


def _gains_figure(runs: _Runs) -> Any:
    twins = {row.twin for row in runs.compared}
    gains = []
    for row in runs.compared:
        values = runs.difference(row, _last)
        label = row.name if len(twins) == 1 else f"{row.name} over {row.twin}"
        gains.append(Gain(label, values, runs.gain(row, _last), row.published.gain if row.published else None))
    return draw_gains(gains, over=str(*twins) if len(twins) == 1 else "the twin")


def _lengths(runs: _Runs) -> dict[str, dict[int, list[float]]]:
    """Top-1 by length of every recipe, rows of one wording being one; none of several models or one length each."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in runs.rows:
        for run in runs.by_name[row.name].values():
            found.setdefault(row.what, {}).setdefault(run.recipe["optim"]["epochs"], []).append(run.last)
    one_model = len({run.recipe["model"] for run in runs.all}) == 1
    return found if one_model and any(len(by_length) > 1 for by_length in found.values()) else {}


def _shares(runs: _Runs) -> dict[str, dict[str, dict[int, Sequence[tuple[float, float]]]]]:
    """Gradient shares by loss, recipe and seed."""
    found: dict[str, dict[str, dict[int, Sequence[tuple[float, float]]]]] = {}
    for row in runs.rows:
        for seed, run in runs.by_name[row.name].items():
            for term, points in run.shares.items():
                found.setdefault(term, {}).setdefault(row.name, {})[seed] = points
    return found


# --- the page over all studies ----------------------------------------------------------------------------------------

OTHER_PAGES = {
    "benchmark/README.md": "what Tf-FD costs",
    "benchmark/imagenet.md": "what a run on ImageNet would cost",
    "channels/README.md": "what the losses do to channels",
}


def _render_index(pages: Sequence[_Runs], results: Path) -> str:
    rows = []
    certain: dict[str, str] = {}  # of every row with an interval, its difference where zero is not in it
    for runs in pages:
        gains = {row.name: runs.gain(row, _last) for row in runs.compared}
        verdicts = Counter(gain.verdict for gain in gains.values())
        for name, gain in gains.items():
            if gain.error is not None:
                told = f"`{name}` ({_signed(gain.mean)}, n = {gain.n})"
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
        f"{': ' + _joined(excluding) if excluding else ''}. What else a reader has to know of the runs stands in the "
        "notes of each page.",
        *([f"Other pages: {'; '.join(other)}."] if other else []),
    ]
    return "\n\n".join(text) + "\n"


def _tffd_gains(runs: _Runs) -> list[tuple[Row, Estimate]]:
    """Of every setting of Tf-FD its gain over training without."""
    return [(row, runs.gain(row, _last)) for row in runs.compared if runs.study.recipe(row.name).tffd]


def _answer(deciding: Sequence[_Runs]) -> str:
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
            f"`{name}` ({recipe.model}, {recipe.optim.epochs} epochs: {_signed(gain.mean)} points, {_interval(gain)}, "
            f"n = {gain.n})"
            for name, (recipe, gain) in known.items()
            if gain.verdict == verdict
        ]
        for verdict in ("above", "below")
    )
    left = _left_when_widened({name: gain for name, (_, gain) in known.items()})
    return (
        f"{ran} of the {len(known)} settings of Tf-FD with several seeds the whole 95 % interval is better than plain "
        f"training for {_joined(above or ['none'])}, and worse for {_joined(below or ['none'])}. Once the intervals "
        f"are widened for the number of settings (Bonferroni), they exclude zero for {_joined(left or ['none'])}."
    )


def _answer_of(runs: _Runs) -> str:
    """What one study says of Tf-FD, and its picture."""
    study = runs.study
    gains = _tffd_gains(runs)
    known = [gain for _, gain in gains if gain.error is not None]
    single = [f"`{row.name}` ({_signed(gain.mean)})" for row, gain in gains if gain.error is None]
    parts = [_evaluated_on(runs), f"Runs have {_joined(map(str, runs.epochs))} epochs."]
    if known:
        verdicts = Counter(gain.verdict for gain in known)
        seeds = _joined(map(str, sorted({gain.n for gain in known})))
        settings, interval = (
            ("settings", "intervals (95 %) reach") if len(known) > 1 else ("setting", "interval (95 %) reaches")
        )
        parts.append(
            f"{len(known)} {settings} of Tf-FD ran with {seeds} seeds: {verdicts['above']} shown to be better than the "
            f"twin, {verdicts['below']} shown to be worse, {verdicts['neither']} undecided. The {interval} from "
            f"{_signed(min(gain.low for gain in known))} to {_signed(max(gain.high for gain in known))} points: an "
            "effect may lie anywhere within, and is not to be expected beyond."
        )
    if single:
        each = " each" if len(single) > 1 else ""
        parts.append(f"One pair of runs{each}, which shows nothing by itself: {_joined(single)}.")
    picture = f"![Gain of every recipe over its twin]({study.name}/{PICTURE})"
    return f"### [{study.name}]({study.name}/{PAGE}): {study.question}\n\n{' '.join(parts)}\n\n{picture}"


def _evaluated_briefly(runs: _Runs) -> str:
    images = {"held-out images" if run.recipe["data"]["holdout"] else "test images" for run in runs.all}
    return f"{len(runs.all)} of {_joined(map(str, runs.epochs))} epochs, {_joined(sorted(images))}"


# --- words ------------------------------------------------------------------------------------------------------------


def _signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}"


def _sd(value: Estimate) -> str:
    return NONE if value.sd is None else f"{value.sd:.2f}"


def _interval(value: Estimate) -> str:
    return "none, n = 1" if value.error is None else f"{_signed(value.low)} to {_signed(value.high)}"


def _joined(words: Iterable[str]) -> str:
    *most, last = list(words) or [""]
    return f"{', '.join(most)} and {last}" if most else last
