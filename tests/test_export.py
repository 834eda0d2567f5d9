"""Exports: loaded by timm to the bit in a process of their own, replaced whole or not at all, refused when changed."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fresh_python
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_export import small_export
from test_atomic import disk_that_takes
from torch import nn

from tffd_zoo.cli import run_cli
from tffd_zoo.evaluation import EvalResult
from tffd_zoo.export import (
    ExportConfig,
    export,
    export_run,
    main,
    rewrite_card,
)
from tffd_zoo.export_record import ExportInfo, verify_export, write_sums
from tffd_zoo.model_card import Twin
from tffd_zoo.recipe import DataConfig, OptimConfig, Recipe, vary
from tffd_zoo.tasks import CANONICAL

ROOT = Path(__file__).parents[1]
NAMES = ["ant", "bee", "cat"]
RECIPE = Recipe(
    name="tffd",
    model="tffd_resnet20",
    data=DataConfig(source="uoft-cs/cifar100"),
    optim=OptimConfig(epochs=2, batch_size=64, lr=0.1, weight_decay=5e-4),
    tffd=CANONICAL,
)
METRICS = {
    **EvalResult(100, 40, 80, {"top1": 40.0, "top5": 80.0, "nll": 1.5, "ece": 3.0}, 1.0).to_json(),
    "params": 1,
    "macs": 1,
    "evaluation": {"split": "test"},
}


def export_small(folder: Path, model: nn.Module | None = None, **changes: Any) -> ExportInfo:
    """Export a model of three classes, with everything that is not of interest filled in."""
    model = model or timm.create_model("tffd_resnet20", num_classes=3)
    settings = {
        "architecture": "tffd_resnet20",
        "tag": "c100",
        "recipe": RECIPE.to_dict(),
        "metrics": METRICS,
        "label_names": NAMES,
        **changes,
    }
    return export(model, folder, **settings)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_export(tmp_path_factory.mktemp("run"))


@pytest.fixture
def exported(run: Path, tmp_path: Path) -> Path:
    """An export of its own for a test that changes it."""
    return Path(shutil.copytree(run / "export", tmp_path / "exported"))


# --- loading ----------------------------------------------------------------------------------------------------------

LOAD = """
import json, sys
import timm, torch
answers = {}
for folder in sys.argv[2:]:
    if folder.endswith("ours"):
        import tffd_zoo
    else:
        assert "tffd_zoo" not in sys.modules
    model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
    images = torch.load(folder + ".images", weights_only=True)
    with torch.inference_mode():
        same = torch.equal(model(images), torch.load(folder + ".logits", weights_only=True))
    answers[folder] = {"same": same, **{k: model.pretrained_cfg[k] for k in ("label_names", "mean", "input_size")}}
json.dump(answers, open(sys.argv[1], "w"))
"""


def test_logits_are_bit_equal_in_a_new_process_with_constructor_arguments_that_are_not_the_defaults(
    tmp_path: Path,
) -> None:
    cases = {
        # timm's own architectures first: they must load while this package has not been imported
        "resnet18": ("tffd_resnet18", (3, 64, 64), {"global_pool": "max", "drop_rate": 0.2}),
        "grey": ("resnet10t", (1, 48, 64), {"in_chans": 1}),
        "vit": ("test_vit", (3, 96, 96), {"img_size": 96, "drop_path_rate": 0.1}),
        "ours": ("tffd_resnet20", (3, 40, 40), {}),
    }
    for name, (architecture, size, arguments) in cases.items():
        torch.manual_seed(0)
        model = timm.create_model(architecture, num_classes=3, **arguments).train()
        with torch.no_grad():
            model(torch.randn(4, *size))  # BatchNorm statistics worth keeping
        mean = (0.1, 0.2, 0.3)[: size[0]]
        config = {"input_size": size, "mean": mean, "std": (0.5,) * size[0], "crop_pct": 1.0}
        export_small(tmp_path / name, model, architecture=architecture, data_config=config)
        images = torch.randn(5, *size)
        with torch.inference_mode():
            torch.save(model.eval()(images), tmp_path / f"{name}.logits")
        torch.save(images, tmp_path / f"{name}.images")

    folders = [str(tmp_path / name) for name in cases]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    loaded = fresh_python.run(["-c", LOAD, str(tmp_path / "answers"), *folders], environment, tmp_path)
    assert loaded.returncode == 0, loaded.stderr
    for folder, answer in json.loads((tmp_path / "answers").read_text()).items():
        _, size, _ = cases[Path(folder).name]
        assert answer == {
            "same": True,
            "label_names": NAMES,
            "mean": [0.1, 0.2, 0.3][: size[0]],
            "input_size": list(size),
        }, folder


def test_config_names_timms_architecture_where_ours_is_timms_and_keeps_ours_beside_it(tmp_path: Path) -> None:
    model = timm.create_model("tffd_resnet18", num_classes=3)
    info = export_small(tmp_path / "export", model, architecture="tffd_resnet18")
    assert info.config["architecture"] == "resnet18"
    assert info.config["tffd_zoo"]["architecture"] == info.architecture == "tffd_resnet18"
    assert info.name == "tffd_resnet18.c100"
    assert info.config["pretrained_cfg"]["tag"] == "c100"
    assert not any(info.config["pretrained_cfg"].get(key) for key in ("url", "hf_hub_id", "origin_url", "paper_ids"))


def test_drop_rates_of_training_do_not_travel(tmp_path: Path) -> None:
    model = timm.create_model("tffd_resnet18", num_classes=3, drop_rate=0.5, drop_path_rate=0.1)
    arguments = export_small(tmp_path / "export", model, architecture="tffd_resnet18").config["model_args"]
    assert not any("drop" in name for name in arguments)


def test_keys_are_plain_whatever_the_model_was_wrapped_in(tmp_path: Path) -> None:
    model = timm.create_model("tffd_resnet20", num_classes=3)
    plain = model.state_dict()
    export_small(tmp_path / "export", nn.DataParallel(torch.compile(model)))
    saved = load_file(tmp_path / "export" / "model.safetensors")
    assert saved.keys() == plain.keys()
    assert all(torch.equal(saved[name], plain[name]) for name in plain)


def test_a_model_in_channels_last_is_saved_as_any_other(tmp_path: Path) -> None:
    model = timm.create_model("tffd_resnet20", num_classes=3)
    plain = export_small(tmp_path / "plain", model)
    last = export_small(tmp_path / "last", model.to(memory_format=torch.channels_last))
    assert last.sha256["model.safetensors"] == plain.sha256["model.safetensors"]


def test_a_model_that_timm_would_not_rebuild_is_refused(tmp_path: Path) -> None:
    model = timm.create_model("tffd_resnet20", num_classes=3)
    model.added_later = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"does not rebuild this model .*added_later.*timm\.create_model"):
        export_small(tmp_path / "export", model)
    assert not (tmp_path / "export").exists()


def test_an_architecture_that_timm_does_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Unknown model"):
        export_small(tmp_path / "export", architecture="my_resnet")


def test_an_export_draws_no_random_numbers_of_the_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("tffd_resnet20", num_classes=3)
    state = torch.get_rng_state()
    export_small(tmp_path / "export", model)
    assert torch.equal(torch.get_rng_state(), state)


# --- what is in the folder --------------------------------------------------------------------------------------------


def test_the_folder_holds_what_was_promised_and_no_pickle(tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"\x89PNG")
    export_small(tmp_path / "export", environment={"hardware": "abacus"}, curves=picture)
    assert contents(tmp_path / "export").keys() == {
        "model.safetensors",
        "config.json",
        "recipe.json",
        "metrics.json",
        "environment.json",
        "README.md",
        "curves.png",
        "SHA256SUMS",
    }
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=tmp_path / "export", check=True)
    with safe_open(tmp_path / "export" / "model.safetensors", framework="pt") as weights:
        metadata = weights.metadata()
    assert (metadata["format"], metadata["architecture"], metadata["tag"]) == ("pt", "tffd_resnet20", "c100")
    assert metadata["recipe_sha256"] == verify_export(tmp_path / "export").sha256["recipe.json"]
    assert "abacus" in (tmp_path / "export" / "README.md").read_text()
    assert "](curves.png)" in (tmp_path / "export" / "README.md").read_text()


def test_paths_of_this_machine_do_not_travel(tmp_path: Path) -> None:
    data = tmp_path / "my cifar"
    data.mkdir()
    recipe = vary(RECIPE, "here", data={"source": str(data)}, run={"output": tmp_path / "runs" / "one"})
    metrics = METRICS | {"evaluation": {"split": "test", "data": str(data)}}
    export_small(tmp_path / "export", recipe=recipe.to_dict(), metrics=metrics)
    for name, content in contents(tmp_path / "export").items():
        assert str(tmp_path).encode() not in content, name
    info = verify_export(tmp_path / "export")
    assert info.recipe["data"]["source"] == info.metrics["evaluation"]["data"] == "my cifar"
    assert "output" not in info.recipe["run"]


def test_a_recipe_has_one_hash_wherever_and_whereto_the_command_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = set()
    for place in ("a folder", "another"):
        (tmp_path / place / "data" / "pets").mkdir(parents=True)
        (tmp_path / place / "tffd").mkdir()  # the recipe's very name; any word of a recipe may be a folder's too
        monkeypatch.chdir(tmp_path / place)
        for source, output in (("data/pets", None), ("./data/pets", "runs/x"), (f"{tmp_path}/{place}/data/pets", "y")):
            recipe = vary(RECIPE, "tffd", data={"source": source}, run={"output": output and Path(output)})
            hashes.add(export_small(tmp_path / "export", recipe=recipe.to_dict()).config["tffd_zoo"]["recipe_sha256"])
    assert len(hashes) == 1


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"label_names": ["ant", "bee"]}, "2 label names for a model of 3 classes"),
        ({"tag": "C100-v2/.."}, "cannot be released: small letters"),
        ({"metrics": {"top1": 50.0}}, "metrics lack correct1, correct5"),
        ({"metrics": METRICS | {"nll": float("nan")}}, "not JSON compliant"),
    ],
)
def test_records_that_do_not_fit_are_refused(changes: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=complaint):
        export_small(tmp_path / "export", **changes)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    model = timm.create_model("tffd_resnet20", num_classes=3)
    with torch.no_grad():
        model.get_classifier().bias[1] = float("inf")
    with pytest.raises(ValueError, match=r"'head\.fc\.bias' is not finite"):
        export_small(tmp_path / "export", model)


# --- replacing --------------------------------------------------------------------------------------------------------


def test_an_earlier_export_is_replaced(exported: Path) -> None:
    before = verify_export(exported).sha256
    after = export_small(exported).sha256
    assert after["model.safetensors"] != before["model.safetensors"]
    assert "environment.json" not in after


@pytest.mark.parametrize("limit", [500, 3_000, 100_000])
def test_a_full_disk_leaves_the_earlier_export_as_it_was(limit: int, exported: Path, tmp_path: Path) -> None:
    before = contents(exported)
    with disk_that_takes(limit), pytest.raises(OSError, match="File too large"):
        export_small(exported)
    assert contents(exported) == before
    assert {path.name for path in tmp_path.iterdir()} == {"exported"}


@pytest.mark.parametrize("step", ["config.json", "recipe.json", "metrics.json", "README.md", "SHA256SUMS"])
def test_a_disk_that_fills_up_at_any_file_leaves_the_earlier_export_as_it_was(
    step: str, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(exported)
    open_file = Path.open

    def full(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if self.name == step and "w" in mode:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return open_file(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match="No space left"):
        export_small(exported)
    assert contents(exported) == before
    assert {path.name for path in tmp_path.iterdir()} == {"exported"}


def test_a_folder_that_is_no_export_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="is no export"):
        export_small(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_an_export_from_which_a_killed_process_was_taking_over_is_found_again(exported: Path) -> None:
    before = contents(exported)
    exported.rename(exported.with_name(".exported.previous"))
    verify_export(exported)
    assert contents(exported) == before


# --- refusing what was changed ----------------------------------------------------------------------------------------


def flip_a_byte(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1000)


def remove_the_recipe(folder: Path) -> None:
    (folder / "recipe.json").unlink()


def add_a_pickle(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")


def forget_the_sums(folder: Path) -> None:
    (folder / "SHA256SUMS").unlink()


def swap_in_another_models_weights(folder: Path) -> None:
    save_file({"weight": torch.zeros(2)}, folder / "model.safetensors", {"architecture": "tffd_vgg8", "tag": "digits"})
    write_sums(folder)


def put_a_pickle_under_its_name(folder: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, folder / "model.safetensors")
    write_sums(folder)


def edit(folder: Path, file: str, **changes: Any) -> None:
    """Change a JSON file by hand, and the sums with it."""
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes, indent=2) + "\n")
    write_sums(folder)


def drop(folder: Path, figure: str) -> None:
    metrics = json.loads((folder / "metrics.json").read_text())
    del metrics[figure]
    (folder / "metrics.json").write_text(json.dumps(metrics))
    write_sums(folder)


def another_normalisation(folder: Path) -> None:
    evaluation = json.loads((folder / "metrics.json").read_text())["evaluation"]
    edit(folder, "metrics.json", evaluation=evaluation | {"mean": [0.1, 0.2, 0.3]})


def a_pipe_for_a_recipe(folder: Path) -> None:
    (folder / "recipe.json").unlink()
    os.mkfifo(folder / "recipe.json")


def leave_the_card_out_of_the_sums(folder: Path) -> None:
    lines = (folder / "SHA256SUMS").read_text().splitlines(keepends=True)
    (folder / "SHA256SUMS").write_text("".join(line for line in lines if "README" not in line))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (flip_a_byte, r"model\.safetensors is not the file that was exported"),
        (truncate, r"model\.safetensors is not the file that was exported"),
        (remove_the_recipe, r"recipe\.json is missing"),
        (add_a_pickle, r"holds pytorch_model\.bin, no part of the export"),
        (forget_the_sums, "is not an export"),
        (swap_in_another_models_weights, "says architecture 'tffd_vgg8' and config.json 'tffd_resnet20'"),
        (put_a_pickle_under_its_name, "is not a safetensors file"),
        (leave_the_card_out_of_the_sums, "does not list README.md"),
        (lambda folder: edit(folder, "config.json", num_classes=7), r"config\.json says 7 classes, and .* is for 10"),
        (lambda folder: edit(folder, "config.json", label_names=["a", "b"]), r"says 10 classes and names 2"),
        (lambda folder: edit(folder, "config.json", pretrained_cfg=None), r"exported: .*; export or download it again"),
        (lambda folder: edit(folder, "recipe.json", name="another"), r"recipe\.json is not the recipe that .* trained"),
        (another_normalisation, r"normalised with mean \[0\.1, 0\.2, 0\.3\], and config\.json says \[0\.\d"),
        (lambda folder: drop(folder, "nll"), "metrics lack nll"),
        (a_pipe_for_a_recipe, r"recipe\.json is no regular file"),
        (lambda folder: (folder / "SHA256SUMS").write_text("nonsense\n"), r"SHA256SUMS, line 1 is damaged"),
        (lambda folder: (folder / "SHA256SUMS").write_text(f"{'0' * 64}  ../x\n"), r"SHA256SUMS, line 1 is damaged"),
        (lambda folder: ((folder / "metrics.json").write_text("[]"), write_sums(folder)), r"metrics\.json is damaged"),
        (lambda folder: ((folder / "config.json").write_text(""), write_sums(folder)), r"config\.json is damaged"),
    ],
)
def test_a_changed_export_is_refused(change: Callable[[Path], None], complaint: str, exported: Path) -> None:
    verify_export(exported)
    change(exported)
    with pytest.raises((ValueError, FileNotFoundError), match=complaint) as caught:
        verify_export(exported)
    assert len(str(caught.value).splitlines()) == 1


def test_a_new_card_changes_nothing_but_the_card(exported: Path) -> None:
    before = contents(exported)
    twin = Twin("tffd_resnet20.ce_digits", verify_export(exported).recipe, METRICS)
    info = rewrite_card(exported, twin=twin, repo="org/name")
    after = contents(exported)
    assert {name for name in before if before[name] != after[name]} == {"README.md", "SHA256SUMS"}
    assert before.keys() == after.keys()
    assert b"hf-hub:org/name" in after["README.md"]
    assert verify_export(exported) == info


# --- from a run -------------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The folder of a run of three epochs, of which the second was the best, with moving averages."""
    run = tmp_path / "run"
    (run / "weights").mkdir(parents=True)
    recipe = vary(RECIPE, "tffd", data={"source": "digits", "label_column": "target"})
    spec = {"input_size": [3, 16, 16], "mean": [0.1] * 3, "std": [0.2] * 3, "interpolation": "bilinear"}
    data = {
        "source": "digits",
        "revision": None,
        "eval": {"split": "test", "images": 100, "fingerprint": "f00d"},
        "spec": spec | {"crop_pct": 1.0, "crop_mode": "center"},
        "label_names": NAMES,
    }
    environment = {"device": "cpu", "hardware": "abacus", "packages": {"torch": "2", "timm": "1"}, "processes": 1}
    lines: list[dict[str, Any]] = [{"kind": "train", "step": 5, "epoch": 0.5, "loss": 1.0}]
    for epoch, correct in enumerate([10, 30, 20], start=1):
        result, average = (
            EvalResult(100, right, 90, {"top1": float(right), "top5": 90.0, "nll": 1.0, "ece": 2.0}, 1.0).to_json()
            for right in (correct, correct + 5)
        )
        ema = {f"ema_{name}": value for name, value in average.items()}
        lines.append({"kind": "eval", "step": 10 * epoch, "epoch": float(epoch), "train": {}, **result, **ema})
    for name, record in {"recipe": recipe.to_dict(), "data": data, "environment": environment}.items():
        (run / f"{name}.json").write_text(json.dumps(record))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for seed, name in enumerate(["last", "best", "last_ema", "best_ema"]):
        torch.manual_seed(seed)
        model = timm.create_model("tffd_resnet20", num_classes=3)
        save_file(model.state_dict(), run / "weights" / f"{name}.safetensors", {"format": "pt"})
    return run


@pytest.mark.parametrize(
    ("weights", "epoch", "correct"), [("last", 3, 20), ("best", 2, 30), ("last_ema", 3, 25), ("best_ema", 2, 35)]
)
def test_a_run_is_exported_with_the_figures_of_the_weights_that_were_chosen(
    weights: Any, epoch: int, correct: int, finished: Path
) -> None:
    info = export_run(finished, weights)
    assert info.folder == finished / "export"
    assert (info.metrics["weights_epoch"], info.metrics["trained_epochs"]) == (epoch, 3)
    assert info.metrics["correct1"] == correct
    assert info.metrics["evaluation"]["label_column"] == "target"
    assert (info.metrics["params"], info.metrics["macs"]) == (272_019, 10_203_328)
    exported, trained = (load_file(path) for path in (info.weights, finished / "weights" / f"{weights}.safetensors"))
    assert all(torch.equal(exported[name], trained[name]) for name in trained)
    assert info.config["pretrained_cfg"]["input_size"] == [3, 16, 16]


def test_the_command_exports_where_it_is_told_and_says_how_to_load_it(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_cli(main, ExportConfig, [str(finished), "--weights", "best", "--out", str(tmp_path / "out")])
    out = capsys.readouterr().out
    line = re.search(r"timm\.create_model\(.*\)", out)
    assert "tffd_resnet20.own3, top-1 30.00 %" in out
    assert line is not None
    model = eval(line[0], {"timm": timm})
    assert model.num_classes == 3


@pytest.mark.parametrize("missing", ["recipe.json", "data.json", "metrics.jsonl", "weights/best.safetensors"])
def test_a_folder_that_is_no_finished_run_is_refused_in_one_line(
    missing: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (finished / missing).unlink()
    with pytest.raises(SystemExit) as left:
        run_cli(main, ExportConfig, [str(finished), "--weights", "best"])
    assert left.value.code == 2
    assert re.fullmatch(rf"error: .* has no {re.escape(missing)}\n", capsys.readouterr().err)


def test_weights_of_another_model_are_refused(finished: Path) -> None:
    save_file({"weight": torch.zeros(2)}, finished / "weights" / "last.safetensors")
    with pytest.raises(ValueError, match="does not hold the weights of tffd_resnet20"):
        export_run(finished)
    assert not (finished / "export").exists()
