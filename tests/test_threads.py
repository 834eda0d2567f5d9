"""Threads: a process's share of the cores, an OMP_NUM_THREADS that the user set, and not the one of a launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tffd_zoo import threads
from tffd_zoo.threads import cores_per_process, idle_cores, use_threads


@pytest.fixture
def twelve_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("joblib.cpu_count", lambda: 12)
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_a_core_that_the_process_may_not_use_does_not_count() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert cores_per_process() == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.usefixtures("twelve_cores")
def test_the_processes_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (use_threads(None), torch.get_num_threads()) == (12, 12)
    assert (use_threads(None, 2), use_threads(None, 24)) == (6, 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert use_threads(None, 24) == 3


@pytest.mark.usefixtures("twelve_cores")
def test_what_the_user_says_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5,2")  # OpenMP takes a number for each level of nesting
    assert use_threads(None) == 5
    assert (use_threads(3), torch.get_num_threads()) == (3, 3)
    with pytest.raises(ValueError, match="threads is 0; give 1 or more"):
        use_threads(0)


def test_idle_cores_are_those_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.cpu_percent", lambda seconds, percpu: [0.0, 100.0, 25.0, 0.0])
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 2, 3})
    assert idle_cores() == 1.75


def test_a_core_on_which_another_process_computes_is_not_idle() -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})  # what it starts runs there too
    busy = subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"])
    try:
        assert idle_cores() < 0.5
    finally:
        busy.kill()
        busy.wait()
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize(("set_by_user", "expected"), [(None, "7"), ("1", "1")])
def test_one_thread_is_the_launchers_wish_only_if_it_was_the_users(
    tmp_path: Path, set_by_user: str | None, expected: str
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, runpy, joblib\n"
        "joblib.cpu_count = lambda: 7\n"
        f"use_threads = runpy.run_path({threads.__file__!r})['use_threads']\n"
        "print(os.environ['OMP_NUM_THREADS'], use_threads(None))\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    env |= {"OMP_NUM_THREADS": set_by_user} if set_by_user else {}
    options = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *options, str(script)]
    out = subprocess.run(launch, env=env, capture_output=True, text=True, check=True, timeout=120).stdout
    assert out.split() == [set_by_user or "1", expected]
