"""Precision and compilation left open: measured where the device can, recorded, kept when a run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState

from tffd_zoo.recipe import DataConfig, OptimConfig, Recipe, differences, recipe_from_cli, vary
from tffd_zoo.tasks import CANONICAL, TfFDConfig
from tffd_zoo.training import precision
from tffd_zoo.training.precision import Settled, settle_precision

BASE = Recipe(
    name="test",
    model="tffd_resnet20",
    data=DataConfig(source="digits", image_size=8),
    optim=OptimConfig(epochs=10, batch_size=16, lr=0.05, weight_decay=5e-4),
)
LONG, SHORT = 16 * 200, 16 * 2  # images: 2,000 steps and 20


def settle(images: int = LONG, **run: Any) -> Settled:
    return settle_precision(vary(BASE, "test", run={"output": Path("nowhere"), **run}), images, PartialState())


def decided(settled: Settled) -> tuple[str, bool | None]:
    return settled.recipe.run.precision, settled.recipe.run.compile


class Timings:
    """Stands in for the clock: seconds per image by what is timed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, native: bool = True, **seconds: float) -> None:
        self.seconds, self.timed = seconds, list[str]()
        monkeypatch.setattr(precision, "seconds_per_image", self._time)
        monkeypatch.setattr(precision, "native_bf16", lambda device: native)

    def _time(self, trials: dict[str, Any], device: torch.device) -> dict[str, float]:
        self.timed += trials
        return {name: self.seconds[name] for name in trials}


def test_bf16_is_taken_where_it_was_measured_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    Timings(monkeypatch, no=1e-3, bf16=0.6e-3)
    settled = settle()
    assert decided(settled) == ("bf16", False)
    assert settled.why == (
        "bf16, eager (bf16 takes 0.60 of float32's time here, a run of 0 minutes is too short to compile)"
    )


def test_bf16_that_is_no_faster_stays_away(monkeypatch: pytest.MonkeyPatch) -> None:
    Timings(monkeypatch, no=1e-3, bf16=1.22e-3)
    assert decided(settle()) == ("no", False)
    assert "1.22 of float32's time" in settle().why


def test_without_bf16_instructions_nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Timings(monkeypatch, native=False)
    settled = settle(compile=False)
    assert (decided(settled), clock.timed) == (("no", False), [])
    assert "no bf16 instructions" in settled.why


def test_a_run_too_short_to_measure_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Timings(monkeypatch)
    assert (decided(settle(SHORT)), clock.timed) == (("no", False), [])
    assert decided(settle(max_steps=3)) == ("no", False)


@pytest.mark.parametrize(("compiled", "expected"), [(0.08, True), (0.099, False)])
def test_a_long_run_is_compiled_if_that_was_measured_to_pay(
    monkeypatch: pytest.MonkeyPatch, compiled: float, expected: bool
) -> None:
    # 2,000 steps of 16 images at 0.1 s each: 53 minutes
    clock = Timings(monkeypatch, no=0.1, bf16=0.2, eager=0.1, compiled=compiled)
    assert decided(settle()) == ("no", expected)
    assert clock.timed == ["no", "bf16", "eager", "compiled"]


@pytest.mark.parametrize(("compiled", "expected"), [(0.08, True), (0.11, "losses")])
def test_of_an_eager_run_with_tffd_its_losses_are_compiled(
    monkeypatch: pytest.MonkeyPatch, compiled: float, expected: bool | str
) -> None:
    Timings(monkeypatch, no=0.1, eager=0.1, compiled=compiled)
    recipe = vary(BASE, "test", tffd=CANONICAL, run={"precision": "no", "output": Path("nowhere")})
    settled = settle_precision(recipe, LONG, PartialState())
    assert decided(settled) == ("no", expected)
    assert ("float32, eager but for its losses (compiled it takes 1.10" in settled.why) == (expected == "losses")


def test_losses_that_are_not_there_are_not_compiled() -> None:
    with pytest.raises(ValueError, match="--compile losses saves passes over the features in Tf-FD by l2, ab or at"):
        vary(BASE, "test", run={"compile": "losses"})
    with pytest.raises(ValueError, match="say True to compile all of a step"):
        vary(BASE, "test", tffd=TfFDConfig(inter_loss="ickd"), run={"compile": "losses"})
    given = recipe_from_cli({"tffd": vary(BASE, "tffd", tffd=CANONICAL)}, "", ["--compile", "losses"])
    assert given.run.compile == "losses"


def test_a_machine_without_a_compiler_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    Timings(monkeypatch, no=0.1)
    eager = precision.seconds_per_image

    def refuse(trials: dict[str, Any], device: torch.device) -> dict[str, float]:
        if "compiled" in trials:
            raise RuntimeError("no C++ compiler")
        return eager(trials, device)

    monkeypatch.setattr(precision, "seconds_per_image", refuse)
    settled = settle(precision="no")
    assert decided(settled) == ("no", False)
    assert "nothing compiles here" in settled.why


def test_what_the_recipe_says_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Timings(monkeypatch)
    assert decided(settle(precision="bf16", compile=True)) == ("bf16", True)
    assert clock.timed == []


def test_a_resumed_run_keeps_what_it_began_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Timings(monkeypatch, no=1e-3, bf16=0.5e-3)
    begun = settle(output=tmp_path).recipe
    (tmp_path / "recipe.json").write_text(json.dumps(begun.to_dict()))
    Timings(monkeypatch, no=1e-3, bf16=2e-3)
    resumed = settle(output=tmp_path)
    assert decided(resumed) == ("bf16", False)
    assert resumed.why == "bf16, eager (as the run began)"
    assert differences(resumed.recipe.to_dict(), begun.to_dict()) == []


def test_what_is_left_open_is_no_difference_and_what_is_not_is_one() -> None:
    opened, older = BASE.to_dict(), vary(BASE, "test", run={"precision": "bf16", "compile": True}).to_dict()
    assert differences(opened, older) == []
    chosen = vary(BASE, "test", run={"precision": "no", "compile": True}).to_dict()
    assert differences(chosen, older) == ["run.precision: bf16 there, no here"]


def test_a_trial_is_a_step_of_the_recipes_model_in_its_precision() -> None:
    trial = precision.Trial(vary(BASE, "test", optim={"batch_size": 5}), "bf16", PartialState())
    seen: list[torch.Tensor] = []
    trial._model.register_forward_hook(lambda module, args, output: seen.extend([*args, output]))
    seconds = precision.seconds_per_image({"it": trial}, torch.device("cpu"))
    assert 0 < seconds["it"] < 10
    assert (tuple(seen[0].shape), seen[1].dtype) == ((5, 3, 8, 8), torch.bfloat16)
