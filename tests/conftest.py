"""Real images for the tests that ask for them by the fixture `data_root`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tffd_zoo.threads import threads_kept

DATA_ROOT = Path(os.environ.get("TFFD_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


# `make test` gives whole files to its two processes, in this order: a long one that came last would leave one idle.
LONGEST = "training publish nodes loopback_hub data_streaming compare suite tasks site threads"
LONGEST_FIRST = [f"test_{name}.py" for name in LONGEST.split()]


def pytest_report_header() -> str:
    found = "found" if DATA_ROOT.is_dir() else "missing, so the tests on real images are deselected; set TFFD_DATA"
    return f"real images: {DATA_ROOT} ({found})"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    others = len(LONGEST_FIRST)
    items.sort(key=lambda item: LONGEST_FIRST.index(item.path.name) if item.path.name in LONGEST_FIRST else others)
    if DATA_ROOT.is_dir():
        return
    impossible = [item for item in items if "data_root" in getattr(item, "fixturenames", ())]
    config.hook.pytest_deselected(items=impossible)
    items[:] = [item for item in items if item not in impossible]


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    """A test that computes with more threads than there are cores to it would slow all that follow it."""
    with threads_kept():
        yield


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder that holds `cifar100` and `imagenet1k_sample`, each as parquet."""
    return DATA_ROOT
