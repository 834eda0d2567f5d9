"""The README's Python pieces run as they stand, one after the other, without network."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
import tyro
from PIL import Image

from tffd_zoo.recipe import recipe_from_cli

ROOT = Path(__file__).parents[1]


def test_every_python_piece_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Image.new("RGB", (40, 32), "orange").save("image.png")
    images, targets = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    names = {"images": images, "targets": targets, "loader": [(images, targets)]}
    pieces = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(pieces) == 5
    for piece in pieces:
        exec(piece, names)

    printed = capsys.readouterr().out.strip().splitlines()[-1]
    assert printed in names["model"].pretrained_cfg["label_names"]
    shapes = [tuple(names[name].shape[1:]) for name in ("shallow", "middle", "deep")]
    assert shapes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert names["model"].num_classes == 10


def test_every_link_of_a_page_leads_to_a_file() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/results/**/*.md")]
    for page in pages:
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page}: {link}"


AS_SHOWN = """
import timm
import torch

import tffd_zoo
from recipes.studies.compare import STUDIES
from tffd_zoo.evaluation import FIGURES
from tffd_zoo.known_data import DATASETS

model = timm.create_model("tffd_resnet68", num_classes=10)
config = tffd_zoo.TfFDConfig(salience="peak", intra_loss="l1", inter_loss="l1", warmup_fraction=0)
task = tffd_zoo.TfFDTask(model, config)
task(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))["loss"].backward()
print(sum(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters()))
brier = FIGURES["brier"]
print(brier.of_all(brier.of_images(torch.zeros(1, 2), torch.tensor([0]))))  # (1 - 1/2)^2 + (1/2)^2
print(DATASETS["pets"].hub_id, *(row.name for row in STUDIES["depths"].rows))
"""


@pytest.mark.skipif(shutil.which("git") is None, reason="git applies the diffs")
def test_the_changes_that_contributing_shows_apply_and_do_what_they_say(tmp_path: Path) -> None:
    for package in ("tffd_zoo", "recipes"):
        shutil.copytree(
            ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("weights", "results", "__pycache__")
        )
    diffs = re.findall(r"```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.DOTALL)
    assert len(diffs) == 6
    for diff in diffs:
        applied = subprocess.run(
            ["git", "apply", "--unidiff-zero", "-"], cwd=tmp_path, input=diff, text=True, capture_output=True
        )
        assert applied.returncode == 0, f"{applied.stderr}\n{diff}"

    used = subprocess.run([sys.executable, "-c", AS_SHOWN], cwd=tmp_path, text=True, capture_output=True)
    assert used.returncode == 0, used.stderr
    parameters = 3 * 67 + 3 * 2 + 2  # convolutions with their norms, two shortcuts likewise, the head
    rows = ["depths-20-plain", "depths-20", "depths-56-plain", "depths-56"]
    assert used.stdout.split() == [str(parameters), "0.5", "timm/oxford-iiit-pet", *rows]


def test_the_commands_that_the_readme_names_exist() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")]
    text = "\n".join(page.read_text() for page in pages)
    for module in re.findall(r"python -m ((?:tffd_zoo|recipes)[\w.]+)", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module
    for script in re.findall(r"(?:recipes|hub)/[\w/]+\.py", text):
        assert (ROOT / script).is_file(), script
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", text, flags=re.MULTILINE):
        assert f"\n{target}:" in makefile, target


def commands() -> list[list[str]]:
    """Our commands in the shell pieces of all pages, as words."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
    shell = [piece for page in pages for piece in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL)]
    lines = "\n".join(shell).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    ours = re.compile(r"(python -m (tffd_zoo\.|recipes\.|hub\.)|python hub/|accelerate launch -q recipes/)")
    return [command for command in words if ours.match(" ".join(command))]


def test_every_flag_of_the_commands_on_the_pages_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "hub"))  # where a script of that folder finds its neighbours
    found = commands()
    assert len(found) > 20
    for command in found:
        script, *flags = command[2 if command[1] == "-m" else command.index("-q") + 1 if "-q" in command else 1 :]
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        monkeypatch.setattr(sys, "argv", [script, *flags])
        try:
            if hasattr(module, "PRESETS"):
                recipe_from_cli(module.PRESETS, "")
            else:
                tyro.cli(get_type_hints(module.main)["config"])
        except SystemExit as stop:
            pytest.fail(f"{shlex.join(command)}: exits with {stop.code}")
