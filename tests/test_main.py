"""`python -m tffd_zoo PROGRAM`: programs that never import the package, timm's own among them, know its models."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import fresh_python
import pytest

from tffd_zoo.__main__ import main

ROOT = Path(__file__).parents[1]
PROGRAM = """
import json, sys
import neighbour
import timm
if __name__ == "__main__":
    model = timm.create_model(sys.argv[1], pretrained=True)
    print(json.dumps([model.pretrained_cfg["tag"], neighbour.NAME, *sys.argv]))
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "neighbour.py").write_text("NAME = 'a module beside the script'\n")
    (folder / "program.py").write_text(PROGRAM)
    return folder / "program.py"


def run(*arguments: str, cwd: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1"}
    result = fresh_python.run(arguments, environment, cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().splitlines()[-1]


def test_a_script_that_never_imports_the_package_loads_its_models(program: Path, tmp_path: Path) -> None:
    answer = json.loads(run("-m", "tffd_zoo", str(program), "tffd_resnet20.ce_c100", "--amp", cwd=tmp_path))
    assert answer == ["ce_c100", "a module beside the script", str(program), "tffd_resnet20.ce_c100", "--amp"]


def test_accelerate_launches_it_too(program: Path, tmp_path: Path) -> None:
    launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "-m", "tffd_zoo"]
    answer = json.loads(run(*launch, str(program), "tffd_resnet20", cwd=tmp_path))
    assert answer[0] == "c100"


def test_a_module_runs_by_its_name(
    program: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["python"])
    monkeypatch.syspath_prepend(str(program.parent))
    main(["-m", "program", "tffd_resnet20", "-m"])
    assert json.loads(capsys.readouterr().out)[2:] == [str(program), "tffd_resnet20", "-m"]


@pytest.mark.parametrize(
    ("args", "message"),
    [(["train.py"], "no script train.py; give its path"), (["-m"], "none is named"), ([], "2"), (["--help"], "0")],
)
def test_what_cannot_run_says_what_would(
    args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        main(args)
