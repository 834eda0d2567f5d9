"""Processes beside the test's own: forks of one that has imported the package once, which takes seconds each time."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from typing import Any

import torch
from torch.multiprocessing import start_processes

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tffd_zoo.training", "tffd_zoo.eval", "sklearn.datasets", "matplotlib.pyplot"])


def elsewhere(function: Callable[..., Any], *args: Any) -> ForkServerProcess:
    """Start `function` in a process of its own, with the environment of this one."""
    process = CONTEXT.Process(target=_run, args=(dict(os.environ), multiprocessing.get_start_method(), function, args))
    process.start()
    return process


def on_two_processes(function: Callable[..., Any], *args: Any) -> None:
    """Run `function` on two processes that find each other as a launcher's do; an error in one is raised here."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    arguments = (port, dict(os.environ), multiprocessing.get_start_method(), function, args)
    start_processes(_run_ranked, arguments, nprocs=2, start_method="forkserver")


def launched(rank: int, address: str, port: int, interface: str, per_machine: int) -> dict[str, str]:
    """What a launcher tells process `rank` of two: where they meet, and over which interface."""
    meeting = {"MASTER_ADDR": address, "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": interface}
    here = {"LOCAL_RANK": str(rank % per_machine), "LOCAL_WORLD_SIZE": str(per_machine)}
    return {**meeting, **here, "RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "1"}


def _run_ranked(rank: int, port: int, environment: dict[str, str], *arguments: Any) -> None:
    torch.set_num_threads(1)
    _run({**environment, **launched(rank, "127.0.0.1", port, "lo", per_machine=2)}, *arguments)


def _run(environment: dict[str, str], start_method: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    gc.freeze()  # a collection would touch, and so copy, every page of what the fork has imported
    # What this process starts, a loader's workers, comes about as it does in one that nobody forked.
    multiprocessing.set_start_method(start_method, force=True)
    os.environ.clear()
    os.environ.update(environment)
    function(*args)
