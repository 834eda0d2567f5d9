"""Two network namespaces are two machines: a run across them, one of which is lost in mid-epoch, and its resumption."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from ctypes import CDLL
from pathlib import Path
from types import SimpleNamespace

import pytest
from kills import RECIPE, ROOT, outcome
from processes import elsewhere, launched, on_two_processes

from tffd_zoo.training.loop import _told_of_lost_processes

PATIENCE = 300.0
FIRST_ADDRESS = "10.77.0.1"


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two namespaces with a cable between them, and nothing else."""
    names = [f"tffd-{os.getpid()}-{number}" for number in range(2)]
    made = []
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for number, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    except (OSError, subprocess.CalledProcessError) as error:
        if len(made) == len(names):
            raise
        pytest.skip(f"no network namespace can be made here: {error}")
    finally:
        for name in made:
            lose(name)
            ip("netns", "delete", name)


def lose(host: str) -> None:
    for pid in ip("netns", "pids", host).split():
        os.kill(int(pid), signal.SIGKILL)


def run_the_recipe(folder: Path) -> None:
    sys.argv = [*RECIPE, "--output", str(folder)]
    runpy.run_path(RECIPE[0], run_name="__main__")


def run_on_host(host: str, rank: int, folder: Path) -> None:
    """What a launcher of machine `rank` starts, as a fork: in the namespace and with its variables."""
    with Path("/run/netns", host).open() as namespace:
        assert CDLL(None, use_errno=True).setns(namespace.fileno(), 0) == 0
    os.environ |= launched(rank, FIRST_ADDRESS, 29500, "eth0", per_machine=1)
    with log_of(folder, rank).open("wb") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        run_the_recipe(folder)


def launch(hosts: list[str], folder: Path) -> list[subprocess.Popen[bytes]]:
    """Give the same command on both hosts, but for the number of the machine."""
    started = []
    for rank, host in enumerate(hosts):
        env = {**os.environ, "ACCELERATE_USE_CPU": "1", "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
        config = ["--config_file", str(ROOT / "recipes" / "accelerate" / "nodes.yaml")]
        machines = ["--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank)]
        launcher = ["-m", "accelerate.commands.accelerate_cli", "launch", "-q", *config, *machines]
        launcher += ["--main_process_ip", FIRST_ADDRESS]
        command = ["ip", "netns", "exec", host, sys.executable, *launcher, *RECIPE, "--output", str(folder)]
        with log_of(folder, rank).open("wb") as log:
            started.append(subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=ROOT))
    return started


def log_of(folder: Path, rank: int) -> Path:
    return folder.with_name(f"{folder.name}-{rank}.log")


def test_a_machine_lost_in_mid_epoch_ends_the_other_in_one_line_and_both_resume_to_the_same_bits(
    hosts: list[str], tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    on_two_processes(run_the_recipe, whole)

    first, second = (elsewhere(run_on_host, host, rank, cut) for rank, host in enumerate(hosts))
    until = time.monotonic() + PATIENCE
    while not ((cut / "metrics.jsonl").exists() and len((cut / "metrics.jsonl").read_text().splitlines()) > 15):
        assert time.monotonic() < until
        time.sleep(0.05)
    lose(hosts[1])
    second.join(PATIENCE)
    first.join(PATIENCE)
    assert first.exitcode == 2  # an error of one line, not a traceback
    said = [line for line in log_of(cut, 0).read_text().splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert "another process of this run is gone" in said[0]
    assert not (cut / "export").exists()

    assert [process.wait(PATIENCE) for process in launch(hosts, cut)] == [0, 0]
    assert all("resuming at step 1" in log_of(cut, rank).read_text() for rank in range(2))
    assert outcome(cut) == outcome(whole)


def test_what_is_no_lost_process_stays_what_it_is() -> None:
    folder = SimpleNamespace(path=Path("runs/one"))
    lost = RuntimeError(
        "[/build/gloo/transport/tcp/pair.cc:545] Read error [10.0.0.2]:9: Connection reset. Typically ..."
    )
    said = r"gone \(Read error \[10\.0\.0\.2\]:9: Connection reset\); .* from the newest checkpoint in runs/one$"
    with pytest.raises(ConnectionError, match=said), _told_of_lost_processes(folder):  # type: ignore[arg-type]
        raise lost
    with pytest.raises(RuntimeError, match="shapes"), _told_of_lost_processes(folder):  # type: ignore[arg-type]
        raise RuntimeError("shapes do not fit")
