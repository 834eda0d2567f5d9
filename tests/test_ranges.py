"""Settings out of their range: one line, before anything is made."""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import timm
import torch
from loopback_hub import REPOSITORY_ROOT
from test_training import BASE, recipe
from timm.layers import resample_abs_pos_embed

from hub.build_site import SiteConfig
from hub.release import ReleaseConfig
from recipes.studies.benchmark import BenchmarkConfig
from recipes.studies.compare import CompareConfig
from tffd_zoo.deploy import DeployConfig
from tffd_zoo.eval import EvalConfig
from tffd_zoo.export import ExportConfig
from tffd_zoo.inspect import InspectConfig
from tffd_zoo.loading import load_model
from tffd_zoo.predict import PredictConfig
from tffd_zoo.ranges import Range, check_ranges, ranges_of
from tffd_zoo.recipe import Recipe, RunConfig, recipe_from_cli, vary
from tffd_zoo.suite import SuiteConfig
from tffd_zoo.tasks import (
    BYOTConfig,
    CSKDConfig,
    DropConfig,
    KDConfig,
    PSKDConfig,
    TeacherConfig,
    TfFDConfig,
    TfKDConfig,
)
from tffd_zoo.training import train

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(REPOSITORY_ROOT / "hub"))  # it is a script
    PublishConfig = importlib.import_module("publish").PublishConfig

CONFIGS: dict[str, Any] = {
    "DataConfig": BASE.data,
    "OptimConfig": BASE.optim,
    "RunConfig": RunConfig(),
    "TfFDConfig": TfFDConfig(),
    "TeacherConfig": TeacherConfig("average"),
    "KDConfig": KDConfig(),
    "BYOTConfig": BYOTConfig(),
    "CSKDConfig": CSKDConfig(),
    "TfKDConfig": TfKDConfig(),
    "PSKDConfig": PSKDConfig(),
    "DropConfig": DropConfig(dropout=0.1),
    "EvalConfig": EvalConfig(("tffd_resnet20",), "digits"),
    "SuiteConfig": SuiteConfig(),
    "PredictConfig": PredictConfig("tffd_resnet20", ()),
    "DeployConfig": DeployConfig("tffd_resnet20", "digits", Path()),
    "InspectConfig": InspectConfig("tffd_resnet20"),
    "ExportConfig": ExportConfig(Path()),
    "ReleaseConfig": ReleaseConfig(Path()),
    "PublishConfig": PublishConfig(Path(), "org/name"),
    "SiteConfig": SiteConfig(Path()),
    "CompareConfig": CompareConfig("digits"),
    "BenchmarkConfig": BenchmarkConfig(),
}
"""One of every dataclass that commands are made of."""


def parts_of(config: type) -> Iterator[type]:
    """The dataclass and those that its fields hold, however deep."""
    yield config
    for hint in get_type_hints(config).values():
        for kind in (hint, *get_args(hint)):
            if is_dataclass(kind):
                yield from parts_of(kind)  # type: ignore[arg-type]


def numeric_fields(config: type) -> list[str]:
    def is_number(hint: Any) -> bool:
        return hint in (int, float) or any(map(is_number, get_args(hint)))

    return [name for name, hint in get_type_hints(config).items() if is_number(hint)]


def values_at(allowed: Range, whole: bool) -> tuple[list[float], list[float]]:
    """Values just outside a range and just within it."""
    step = 1 if whole else 1e-6
    edges = [(allowed.low, -step, allowed.without_low), (allowed.high, step, allowed.without_high)]
    outside, inside = [] if whole else [math.nan, math.inf, -math.inf], []
    for edge, beyond, is_out in edges:
        if math.isfinite(edge):
            outside += [edge + beyond] + [edge] * is_out
            inside += [edge - beyond] + [edge] * (not is_out)
    return outside, inside


def test_every_number_that_a_recipe_or_command_takes_has_a_range() -> None:
    reached = {part for root in (Recipe, *map(type, CONFIGS.values())) for part in parts_of(root)}
    assert {part.__name__ for part in reached} - {"Recipe"} == CONFIGS.keys()
    for config in map(type, CONFIGS.values()):
        assert [*ranges_of(config)] == numeric_fields(config), config


@pytest.mark.parametrize(
    ("config", "name"), [(config, name) for config in CONFIGS for name in ranges_of(type(CONFIGS[config]))]
)
def test_a_value_beside_its_range_is_refused_by_its_flag_and_the_edge_is_not(config: str, name: str) -> None:
    base, allowed = CONFIGS[config], ranges_of(type(CONFIGS[config]))[name]
    hint = get_type_hints(type(base))[name]
    whole, many = "float" not in str(hint), "tuple" in str(hint)

    def said_of(value: float) -> str:
        number = int(value) if whole else value
        try:
            check_ranges(replace(base, **{name: (number,) if many else number}))
        except ValueError as error:
            return str(error)
        return ""

    outside, inside = values_at(allowed, whole)
    assert outside
    for value in outside:
        flag = name.replace("_", "-")
        assert re.fullmatch(
            rf"--([a-z.-]+\.)?{flag} \S+ is out of range; choose {re.escape(str(allowed))}", said_of(value)
        )
    assert not any("is out of range" in said_of(value) for value in inside)


def test_a_methods_flag_is_named_in_full() -> None:
    for args, said in (
        (["--tffd.ratio", "1"], "--tffd.ratio 1 is out of range; choose above 0 to below 1"),
        (["--tffd.share-intra", "5"], "--tffd.share-intra 5 is out of range; choose above 0 to 1"),
        (["--teacher.kd.temperature", "0"], "--teacher.kd.temperature 0 is out of range; choose above 0"),
    ):
        presets = {"test": vary(BASE, "test", tffd=TfFDConfig(), teacher=TeacherConfig("average", kd=KDConfig()))}
        with pytest.raises(ValueError, match=f"^{said}$"):
            recipe_from_cli(presets, "", args)


def test_a_number_that_another_setting_makes_idle_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--tffd\.p 1 does nothing with salience 'entropy'; it belongs to 'lp'"):
        TfFDConfig(salience="entropy", p=1)
    assert TfFDConfig(p=1).p == 1
    with pytest.raises(ValueError, match=r"--lr-warmup-epochs 2\.5 is longer than the run of 2 epochs; shorten it"):
        replace(BASE.optim, epochs=2, lr_warmup_epochs=2.5)
    assert replace(BASE.optim, epochs=2, lr_warmup_epochs=2.0).lr_warmup_epochs == 2


def test_what_cannot_be_parsed_is_told_by_the_parser(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        recipe_from_cli({"test": BASE}, "", ["--lr", "fast"])
    assert "could not convert string to float: 'fast'" in capsys.readouterr().err


def test_the_range_is_said() -> None:
    for changes, said in (
        ({"accumulate": 0}, "--accumulate 0 is out of range; choose 1 or more"),
        ({"label_smoothing": 2.0}, "--label-smoothing 2 is out of range; choose 0 to below 1"),
        ({"lr": -0.1}, "--lr -0.1 is out of range; choose above 0"),
        ({"milestones": (0.5, 0.2)}, "--milestones 0.5 0.2 go back in time; put them in order"),
    ):
        with pytest.raises(ValueError, match=said):
            replace(BASE.optim, **changes)


def test_the_command_line_and_the_evaluation_refuse_them_too() -> None:
    with pytest.raises(ValueError, match=r"--ema-decay 1\.5 is out of range"):
        recipe_from_cli({"test": BASE}, "", ["--ema-decay", "1.5"])
    with pytest.raises(ValueError, match="--batch-size 0 is out of range; choose 1 or more"):
        EvalConfig(models=("tffd_resnet20",), data="digits", batch_size=0)


def test_a_size_that_the_network_cannot_take_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    said = r"^test_vit cannot take images of 8 px \(.*\); give a multiple of 16, such as 16, or leave --image-size out"
    with pytest.raises(ValueError, match=said):
        train(recipe(tmp_path / "run", model="test_vit", data={"image_size": 8}, tffd=None))
    assert not (tmp_path / "run").exists()


def test_a_vision_transformer_is_made_for_the_size_that_is_asked_for_and_so_is_its_export(tmp_path: Path) -> None:
    export = train(recipe(tmp_path / "small", model="test_vit", data={"image_size": 32}, run={"max_steps": 2}))
    config = json.loads((export / "config.json").read_text())
    assert config["model_args"]["img_size"] == [32, 32]
    small = timm.create_model(f"local-dir:{export}", pretrained=True)
    assert small.pos_embed.shape[1] == 2 * 2 + 1  # patches of 16 pixels, and the class
    assert load_model(f"local-dir:{export}")(torch.zeros(1, 3, 32, 32)).shape == (1, 10)

    # ...and larger images fine-tune it, its position embeddings resampled
    changes = {"model": f"local-dir:{export}", "pretrained": True, "data": {"image_size": 64}, "run": {"max_steps": 1}}
    large = train(recipe(tmp_path / "large", optim={"lr": 1e-9}, **changes))
    larger = timm.create_model(f"local-dir:{large}", pretrained=True).pos_embed
    torch.testing.assert_close(larger, resample_abs_pos_embed(small.pos_embed, [4, 4]), atol=1e-6, rtol=0)
