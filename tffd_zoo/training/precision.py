"""Precision and compilation of a run, where the recipe leaves them open: what computes its steps fastest, as measured.

No flag of a processor tells. Of two CPUs with AVX512_BF16 the one took two thirds of float32's time in bf16, the other
a quarter more than it (ResNet-20, batch 128): so a few steps are timed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from timm import create_model
from torch.nn.functional import cross_entropy

from ..hardware import native_bf16
from ..json_files import read_json
from ..loading import size_arguments
from ..processes import Processes
from ..recipe import Compilation, Precision, Recipe, RunConfig
from ..run_record import MEND, RECIPE
from ..small_maps import speed_up_small_maps
from .build import image_spec, memory_format

WORTH_MEASURING = 100
"""Steps of the shortest run whose precision is measured: measuring takes about a dozen of them."""
WORTH_COMPILING = 30.0
"""Minutes of the shortest run for which compiled steps are measured: compiling takes a minute of a small network and
several of a large one, twice over."""
WORTH = 0.95
"""Part of the time, at most, that bf16 or a compiled step has to take."""
PIXELS = 128 * 32 * 32
"""Pixels of a timed batch on CPU, where time grows with them alone; other devices get the whole batch."""
ROUNDS, SECONDS = 5, 10.0
"""Each candidate is timed so many times, in turns, unless that takes longer."""


class Settled(NamedTuple):
    """A recipe that leaves nothing of its precision open."""

    recipe: Recipe
    why: str
    """For the log: what is used and for what reason."""


def settle_precision(recipe: Recipe, images: int, state: PartialState) -> Settled:
    """Choose what `recipe` leaves open of its precision and compilation, the same on every process.

    A run that is resumed keeps what it began with.

    Args:
        recipe: what is to run.
        images: of the training source.
        state: the processes of the run and their device.
    """
    run = recipe.run
    if run.precision != "auto" and run.compile is not None:
        return Settled(recipe, _told(run.precision, run.compile, "as the recipe says"))
    choice = None
    if state.is_main_process:
        begun = recipe.folder / RECIPE
        choice = _as_begun(run, begun) if begun.exists() else _choose(recipe, images, state)
    precision, compiled, reason = broadcast_object_list([choice])[0]
    settled = replace(recipe, run=replace(run, precision=precision, compile=compiled))
    return Settled(settled, _told(precision, compiled, reason))


def describe_precision(precision: Precision, compiled: Compilation) -> str:
    """Return how a run's steps are computed, in words."""
    how = "eager but for its losses" if compiled == "losses" else "compiled" if compiled else "eager"
    return f"{'float32' if precision == 'no' else precision}, {how}"


def _told(precision: Precision, compiled: Compilation, reason: str) -> str:
    return f"{describe_precision(precision, compiled)} ({reason})"


def _as_begun(run: RunConfig, begun: Path) -> tuple[Precision, Compilation, str]:
    recorded = read_json(begun, MEND)["run"]
    precision = recorded["precision"] if run.precision == "auto" else run.precision
    return precision, recorded["compile"] if run.compile is None else run.compile, "as the run began"


def _choose(recipe: Recipe, images: int, state: PartialState) -> tuple[Precision, Compilation, str]:
    """(precision, what to compile, why)."""
    run, optim = recipe.run, recipe.optim
    step_images = optim.batch_size * optim.accumulate
    steps = optim.epochs * images // (step_images * state.num_processes)
    steps = min(steps, run.max_steps or steps)
    candidates: list[Precision] = [run.precision]
    if run.precision == "auto":
        candidates = ["no", "bf16"] if native_bf16(state.device) else ["no"]
    if steps < WORTH_MEASURING:
        return candidates[0], run.compile or False, f"{steps} steps are too few to measure what is faster"
    if len(candidates) == 1 and run.compile is not None:
        return candidates[0], run.compile, "this device has no bf16 instructions"

    precision, reasons = candidates[0], []
    eager: dict[str, Trial] = {name: Trial(recipe, name, state) for name in candidates}
    seconds = seconds_per_image(eager, state.device)
    if len(candidates) > 1:
        ratio = seconds["bf16"] / seconds["no"]
        precision = "bf16" if ratio <= WORTH else "no"
        reasons.append(f"bf16 takes {ratio:.2f} of float32's time here")
    if run.compile is not None:
        return precision, run.compile, reasons[0]

    minutes = seconds[precision] * steps * step_images / 60
    if minutes < WORTH_COMPILING:
        return precision, False, ", ".join([*reasons, f"a run of {minutes:.0f} minutes is too short to compile"])
    try:
        trials = {"eager": eager[precision], "compiled": Trial(recipe, precision, state, compiled=True)}
        seconds = seconds_per_image(trials, state.device)
    except RuntimeError:  # what torch.compile raises without a C++ compiler or Triton
        return precision, False, ", ".join([*reasons, "nothing compiles here"])
    ratio = seconds["compiled"] / seconds["eager"]
    reasons.append(f"compiled it takes {ratio:.2f} of eager's time")
    # These are faster compiled beside an eager network too: `precision` of the benchmark, on a CPU.
    rest: Compilation = "losses" if recipe.tffd and recipe.tffd.fuses and state.device.type == "cpu" else False
    return precision, True if ratio <= WORTH else rest, ", ".join(reasons)


class Trial:
    """Forward and backward pass of a recipe's model with cross-entropy, on random images."""

    def __init__(self, recipe: Recipe, precision: Precision, state: Processes, compiled: bool = False) -> None:
        recipe = replace(recipe, run=replace(recipe.run, precision=precision))
        layout = memory_format(recipe, state)
        model = create_model(recipe.model, **size_arguments(recipe.model, recipe.data.image_size)).train()
        speed_up_small_maps(model)
        size = image_spec(recipe, model).input_size
        self.images = recipe.optim.batch_size
        if state.device.type == "cpu":
            self.images = min(self.images, max(8, PIXELS // (size[1] * size[2])))
        self._model = model.to(state.device).to(memory_format=layout)
        self._forward = torch.compile(self._model, dynamic=False) if compiled else self._model
        self._batch = torch.randn(self.images, *size, device=state.device).to(memory_format=layout)
        self._targets = torch.zeros(self.images, dtype=torch.int64, device=state.device)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        self._autocast = torch.autocast(state.device.type, dtype, enabled=dtype is not None)

    def __call__(self) -> None:
        with self._autocast:
            loss = cross_entropy(self._forward(self._batch).float(), self._targets)
        loss.backward()
        self._model.zero_grad()


def training_seconds(recipe: Recipe, state: Processes) -> float:
    """Seconds that an image takes in a training step of `recipe`."""
    with torch.random.fork_rng(devices=[]):  # neither its weights nor its images are to be drawn at the run's expense
        return seconds_per_image({"": Trial(recipe, recipe.run.precision, state)}, state.device)[""]


def seconds_per_image(trials: Mapping[str, Trial], device: torch.device) -> dict[str, float]:
    """Time trials in turns, so that a busy machine is busy for all of them; the fastest pass of each counts."""
    for trial in trials.values():
        trial()
    best = dict.fromkeys(trials, inf)
    started = time.perf_counter()
    for _ in range(ROUNDS):
        for name, trial in trials.items():
            _wait(device)
            begun = time.perf_counter()
            trial()
            _wait(device)
            best[name] = min(best[name], (time.perf_counter() - begun) / trial.images)
        if time.perf_counter() - started > SECONDS:
            break
    return best


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()
