"""One Markdown page about a study: every figure and every sentence comes from the records of its runs."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tffd_zoo.atomic import replacing_file
from tffd_zoo.markdown import markdown_table
from tffd_zoo.pictures import house_style, save_png
from tffd_zoo.recipe import differences
from tffd_zoo.run_record import RunRecord

from .charts import Gain, Series, draw_curves, draw_gains, draw_shares
from .statistics import Estimate, estimate, interval_factor, paired_differences
from .study import Row, Study

PAGE = "README.md"
NONE = "-"
RECORD = re.compile(r"-s\d+$")


def write_report(study: Study, records: Path, results: Path) -> Path:
    """Write the page and its pictures to `results`, from the records that `collect` put into `records`.

    The same records give the same bytes, the pictures' too with the same matplotlib.

    Raises:
        FileNotFoundError: there is no record of any run of the study.
        ValueError: records are damaged, or two runs that are compared saw other data.

    Returns:
        The page.
    """
    runs = _Runs.read(study, records)
    figures = {"gains.png": _gains_figure, "curves.png": _curves_figure, "shares.png": _shares_figure}
    pictures = []
    with house_style():
        for name, draw in figures.items():
            figure = draw(runs)
            if figure is None:
                (results / name).unlink(missing_ok=True)  # of records that are gone
            else:
                save_png(figure, results / name)
                pictures.append(name)
    page = results / PAGE
    with replacing_file(page) as aside:
        aside.write_text(_render(runs, pictures))
    return page


# --- the runs of a study ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Runs:
    """The records of a study, by recipe and seed."""

    study: Study
    by_name: Mapping[str, Mapping[int, RunRecord]]

    @classmethod
    def read(cls, study: Study, records: Path) -> _Runs:
        by_name = {row.name: cls._of_recipe(row.name, records) for row in study.rows}
        if not any(by_name.values()):
            raise FileNotFoundError(f"{records} holds no finished run of study '{study.name}': run the study first")
        runs = cls(study, by_name)
        runs._check_pairs()
        return runs

    @staticmethod
    def _of_recipe(name: str, records: Path) -> dict[int, RunRecord]:
        runs = [
            RunRecord.read_finished(folder)
            for folder in records.glob(f"{name}-s*")
            if RECORD.sub("", folder.name) == name
        ]
        return {run.seed: run for run in sorted(runs, key=lambda run: run.seed)}

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

    def pairs(self) -> Iterable[tuple[Row, int, RunRecord, RunRecord]]:
        for row in self.compared:
            ours, theirs = self.by_name[row.name], self.by_name[row.twin or ""]
            for seed in sorted(ours.keys() & theirs.keys()):
                yield row, seed, ours[seed], theirs[seed]

    def values(self, name: str, figure: Callable[[RunRecord], float]) -> dict[int, float]:
        return {seed: figure(run) for seed, run in self.by_name[name].items()}

    def difference(self, row: Row, figure: Callable[[RunRecord], float]) -> list[float]:
        """Paired differences of a figure to the twin, by seed."""
        assert row.twin is not None
        return [*paired_differences(self.values(row.name, figure), self.values(row.twin, figure)).values()]


def _last(run: RunRecord) -> float:
    return run.last


def _best(run: RunRecord) -> float:
    return run.best


# --- the page ---------------------------------------------------------------------------------------------------------


def _render(runs: _Runs, pictures: Sequence[str]) -> str:
    study = runs.study
    sections = [
        f"# {study.name}: {study.question}",
        f"Made by `python -m recipes.studies.compare {study.name} --report` from the collected records: every "
        f"figure and every sentence below comes from them. {_evaluated_on(runs)}",
        "## Accuracy\n\n" + _accuracy(runs),
        *(["## Against the twin\n\n" + _against_twin(runs, pictures)] if runs.compared else []),
        "## Over training\n\n![Top-1 over the epochs, and its difference to the twin](curves.png)\n\n"
        "Lines are means over the seeds; bands, where they can be told apart, reach from the lowest to the highest.",
        "## Cost\n\n" + _cost(runs),
        "## Gradient shares\n\n" + _gradient_shares(runs, pictures),
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


def _accuracy(runs: _Runs) -> str:
    sources = list(dict.fromkeys(row.published.source for row in runs.rows if row.published))
    header = ["recipe", "what", "epochs", "runs", "last, mean", "sd", "best, mean", "sd"]
    rows = []
    for row in runs.rows:
        last, best = (estimate([*runs.values(row.name, figure).values()]) for figure in (_last, _best))
        epochs = dict.fromkeys(f"{run.evaluations[-1]['epoch']:g}" for run in runs.by_name[row.name].values())
        figures = [f"{last.mean:.2f}", _sd(last), f"{best.mean:.2f}", _sd(best)]
        rows.append([f"`{row.name}`", row.what, _joined(epochs), str(last.n), *figures])
        if sources:
            mark = f" [{sources.index(row.published.source) + 1}]" if row.published else ""
            rows[-1].append(f"{row.published.top1:.2f}{mark}" if row.published else NONE)
    notes = (
        "`last` is the top-1 after the last epoch, `best` that of the best epoch, chosen on the very images that it is "
        "judged by, which flatters it. sd is the sample standard deviation (n - 1) over the seeds"
        + ("; one run has none." if any(len(runs.by_name[row.name]) == 1 for row in runs.rows) else ".")
    )
    if len(runs.rows) > 1:
        top = max(runs.rows, key=lambda row: statistics.fmean(runs.values(row.name, _last).values()))
        notes += f" The highest mean after the last epoch is that of `{top.name}`; means alone show no effect."
    parts = [markdown_table([*header, *(["published"] if sources else [])], rows), notes]
    if sources:
        listed = "\n".join(f"- [{mark}] {source}" for mark, source in enumerate(sources, start=1))
        parts.append(f"Published figures, none of them from this very recipe:\n\n{listed}")
    return "\n\n".join(parts)


def _against_twin(runs: _Runs, pictures: Sequence[str]) -> str:
    header = ["recipe", "twin", "pairs", "last, difference", "95 % interval", "best, difference", "95 % interval"]
    published = any(row.published and row.published.gain is not None for row in runs.compared)
    rows = []
    verdicts: dict[str, list[str]] = {}
    for row in runs.compared:
        last, best = (estimate(runs.difference(row, figure)) for figure in (_last, _best))
        verdicts.setdefault(last.verdict, []).append(f"`{row.name}` ({_signed(last.mean)})")
        gains = [figure for each in (last, best) for figure in (_signed(each.mean), _interval(each))]
        if published:
            gain = row.published.gain if row.published else None
            gains.append(NONE if gain is None else _signed(gain))
        rows.append([f"`{row.name}`", f"`{row.twin}`", str(last.n), *gains])
    header += ["published gain"] if published else []
    parts = [markdown_table(header, rows), _verdict(runs, verdicts)]
    unequal = _unequal_settings(runs)
    if unequal:
        parts.append(f"Settings of data and optimisation in which a recipe differs from its twin: {unequal}.")
    if "gains.png" in pictures:
        parts.append("![Gain of every recipe over its twin](gains.png)")
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
    repeated = {row.name: estimate([*runs.values(row.name, _last).values()]) for row in runs.rows}
    by_seed = [f"{value.sd:.2f} (`{name}`, n = {value.n})" for name, value in repeated.items() if value.sd is not None]
    if "unknown" in verdicts and by_seed:
        sentences.append(
            f"For scale, runs that differ in nothing but the seed have a standard deviation of {_joined(by_seed)}."
        )
    sizes = [estimate(runs.difference(row, _last)).n for row in runs.compared]
    intervals = sum(n > 1 for n in sizes)
    if intervals:
        fewest = min(n for n in sizes if n > 1)
        sentences.append(
            f"The intervals are Student's t for the mean of paired differences; with {fewest} pairs the half-width is "
            f"{interval_factor(fewest):.1f} standard deviations of the differences."
        )
    if intervals > 1:
        sentences.append(
            f"There are {intervals} of them, not corrected for their number: without any effect each excludes zero in "
            "1 of 20 studies."
        )
    return "Last epoch. " + " ".join(sentences)


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


def _gradient_shares(runs: _Runs, pictures: Sequence[str]) -> str:
    shares = _shares(runs)
    if not shares:
        return "No run measured them (`measure_every` was 0)."
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
    picture = "\n\n![Gradient shares over training](shares.png)" if "shares.png" in pictures else ""
    return f"{markdown_table(header, rows)}\n\n{note}{picture}"


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

    def commit(run: RunRecord) -> str:
        name, _, dirty = (run.environment["commit"] or "unknown").partition("-")
        return f"{name[:10]}{' with changes' if dirty else ''}"

    about: list[tuple[str, Callable[[RunRecord], str]]] = [
        ("model", lambda run: str(run.recipe["model"])),
        ("optimisation", optimisation),
        ("trained on", lambda run: f"{run.data['train']['images']:,} images of {run.data['source']}"),
        (
            "precision",
            lambda run: {"no": "float32"}.get(run.recipe["run"]["precision"], run.recipe["run"]["precision"]),
        ),
        ("hardware", hardware),
        ("versions", versions),
        ("commit", commit),
    ]
    lines = [f"{title}: {_by_recipe(runs, value)}" for title, value in about]
    seeds = {row.name: [str(seed) for seed in runs.by_name[row.name]] for row in runs.rows}
    same = len({tuple(each) for each in seeds.values()}) == 1
    named = _joined(next(iter(seeds.values()))) if same else "; ".join(f"`{k}` {_joined(v)}" for k, v in seeds.items())
    lines.append(f"seeds: {named}")
    missing = [
        f"`{row.name}` seed {seed}"
        for row in runs.study.rows
        for seed in row.seeds or runs.study.seeds
        if seed not in runs.by_name[row.name]
    ]
    if missing:
        lines.append(f"**not run yet**: {_joined(missing)}")
    return "\n".join(f"- {line}" for line in lines)


def _by_recipe(runs: _Runs, value: Callable[[RunRecord], str]) -> str:
    """One value when all runs agree; else every value with the runs that have it."""
    found: dict[str, list[str]] = {}
    for run in runs.all:
        found.setdefault(value(run), []).append(f"`{run.name}` s{run.seed}")
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{text} ({_joined(names)})" for text, names in found.items())


# --- pictures ---------------------------------------------------------------------------------------------------------


def _gains_figure(runs: _Runs) -> Any:
    twins = {row.twin for row in runs.compared}
    gains = []
    for row in runs.compared:
        values = runs.difference(row, _last)
        label = row.name if len(twins) == 1 else f"{row.name} over {row.twin}"
        gains.append(Gain(label, values, estimate(values), row.published.gain if row.published else None))
    return draw_gains(gains, over=str(*twins) if len(twins) == 1 else "the twin") if gains else None


def _curves_figure(runs: _Runs) -> Any:
    top1: dict[str, Series] = {
        row.name: {
            seed: [(record["epoch"], record["top1"]) for record in run.evaluations]
            for seed, run in runs.by_name[row.name].items()
        }
        for row in runs.rows
    }
    return draw_curves(top1, {row.name: row.twin for row in runs.compared if row.twin})


def _shares_figure(runs: _Runs) -> Any:
    shares = _shares(runs)
    return draw_shares(shares) if shares else None


def _shares(runs: _Runs) -> dict[str, dict[str, Series]]:
    """Gradient shares by loss and recipe."""
    found: dict[str, dict[str, dict[int, Sequence[tuple[float, float]]]]] = {}
    for row in runs.rows:
        for seed, run in runs.by_name[row.name].items():
            for term, points in run.shares.items():
                found.setdefault(term, {}).setdefault(row.name, {})[seed] = points
    return {term: dict(recipes) for term, recipes in found.items()}


# --- words ------------------------------------------------------------------------------------------------------------


def _signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}"


def _sd(value: Estimate) -> str:
    return NONE if value.sd is None else f"{value.sd:.2f}"


def _interval(value: Estimate) -> str:
    return "none, n = 1" if value.half_width is None else f"{_signed(value.low)} to {_signed(value.high)}"


def _joined(words: Iterable[str]) -> str:
    *most, last = list(words) or [""]
    return f"{', '.join(most)} and {last}" if most else last
