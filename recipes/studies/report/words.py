"""Figures and lists as the pages say them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tffd_zoo.run_record import RunRecord

from .statistics import Estimate, widened
from .study_runs import StudyRuns

NONE = "-"


def signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}"


def sd(value: Estimate) -> str:
    return NONE if value.sd is None else f"{value.sd:.2f}"


def interval(value: Estimate) -> str:
    return "none, n = 1" if value.error is None else f"{signed(value.low)} to {signed(value.high)}"


def joined(words: Iterable[str]) -> str:
    *most, last = list(words) or [""]
    return f"{', '.join(most)} and {last}" if most else last


def evaluated_on(runs: StudyRuns) -> str:
    """The images that the figures of a study are from."""

    def images(run: RunRecord) -> str:
        held_out, evaluated = run.recipe["data"]["holdout"], run.data["eval"]
        if held_out:
            return (
                f"{held_out:,} images held out of split `{run.recipe['data']['train_split']}` of {run.data['source']} "
                "(for choosing settings; the test images were not touched)"
            )
        return f"the {evaluated['images']:,} images of split `{evaluated['split']}` of {run.data['source']}"

    return f"Top-1 is in percent of {joined(dict.fromkeys(images(run) for run in runs.all))}."


def left_when_widened(gains: Mapping[str, Estimate]) -> list[str]:
    """Those whose interval excludes zero even where all of them are to hold at once."""
    return [f"`{name}`" for name, gain in gains.items() if gain.excludes_zero(widened(len(gains)))]
