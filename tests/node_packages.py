"""The packages of `hub/site/package.json`, installed from the npm registry when a test asks for them."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from filelock import FileLock

SITE = Path(__file__).resolve().parents[1] / "hub" / "site"


def node_modules() -> Path:
    """Where the packages lie; skips the test only where there is no npm to install them."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")
    installed = SITE / "node_modules" / ".package-lock.json"
    with FileLock(Path(tempfile.gettempdir()) / "tffd_zoo-npm.lock"):  # two files of tests may run at once
        if not (installed.exists() and (SITE / "node_modules" / "@huggingface" / "transformers").is_dir()):
            # their install scripts download GPU libraries, which nothing here needs
            subprocess.run([npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=SITE, check=True)
    return SITE / "node_modules"
