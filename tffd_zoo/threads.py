"""How many threads a process computes with: its share of the cores that it may use, unless someone says otherwise."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def cores_per_process(processes: int = 1) -> int:
    """Return the share of the cores that each of `processes` processes of a run has, at least 1.

    Counted are the cores that this process may run on, and no more than its container's CPU quota; they are divided by
    the processes that share this machine.
    """
    import joblib  # knows affinity masks and the quotas of both kinds of cgroups

    on_this_machine = min(processes, int(os.environ.get("LOCAL_WORLD_SIZE", processes)))
    return max(1, joblib.cpu_count() // on_this_machine)


def use_threads(threads: int | None, processes: int = 1) -> int:
    """Let torch compute with `threads` threads from here on, and return the number.

    None takes OMP_NUM_THREADS where the user set it, and this process's share of the cores otherwise.

    Raises:
        ValueError: `threads` is less than 1.
    """
    if threads is None:
        threads = _openmp_threads() or cores_per_process(processes)
    elif threads < 1:
        raise ValueError(f"threads is {threads}; give 1 or more, or leave --threads out for this process's cores")
    torch.set_num_threads(threads)
    return threads


def idle_cores(seconds: float = 0.3) -> float:
    """Return how many of the cores that this process may run on nobody uses, looked at for so many seconds."""
    import psutil

    busy = psutil.cpu_percent(seconds, percpu=True)
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(busy))
    return sum(1 - busy[core] / 100 for core in allowed if core < len(busy))


@contextmanager
def threads_kept() -> Iterator[None]:
    """Leave torch with as many threads as it had, whatever sets another number inside."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _openmp_threads() -> int | None:
    """OMP_NUM_THREADS as the user set it.

    `accelerate launch` and torchrun hand their processes OMP_NUM_THREADS=1 where they found none, which nobody asked
    for: a 1 counts only if the launcher was started with the variable too.
    """
    import psutil

    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if not first.isdigit() or first == "0":
        return None
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if launched and first == "1":
        try:
            launcher = psutil.Process().parent()
            if launcher is None or "OMP_NUM_THREADS" not in launcher.environ():
                return None
        except psutil.Error:  # a system that does not tell
            return None
    return int(first)
