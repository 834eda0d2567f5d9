"""A function applied to a stream of requests by worker processes, in order, ahead of the consumer."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from ..threads import cores_per_process

MAX_WORKERS = 8

Request = TypeVar("Request")
Result = TypeVar("Result")


def default_workers(processes: int = 1) -> int:
    """Return how many workers each of `processes` training processes may have: its share of the cores, at most 8."""
    return min(MAX_WORKERS, cores_per_process(processes))


def workers_beside(decoding: float, consuming: float, cores: int, on_cpu: bool) -> int:
    """Return how many workers keep up with what consumes the images: at least 1, and no more than there are cores.

    On a CPU both live on the same cores: with all of them busy, decoding takes its part of the time of an image, and so
    many cores; rounded up, for a worker that waits costs nothing.

    Args:
        decoding: seconds that a worker takes for an image.
        consuming: seconds that all cores together take for it, or the other device.
        cores: what this process has.
        on_cpu: whether the cores consume too.
    """
    busy = cores * decoding / (decoding + cores * consuming) if on_cpu else decoding / consuming
    return max(1, min(cores, math.ceil(busy)))


class WorkerPool(Generic[Request, Result]):
    """Applies `function` in `workers` processes, or in this one when `workers` is 0.

    A thin layer over torch's DataLoader, which is a worker pool that knows tensors. The processes start with the first
    request and live as long as the pool.
    """

    def __init__(self, function: Callable[[Request], Result], workers: int) -> None:
        self._function = function
        self._running: _Running[Request] = _Running()
        self._loader: DataLoader[Any] | None = None
        if workers:
            self._loader = DataLoader(
                _ErrorsAsValues(function),
                batch_size=None,
                sampler=self._running,
                num_workers=workers,
                persistent_workers=True,
                worker_init_fn=_outlive_signals,
                pin_memory=torch.cuda.is_available(),
                generator=torch.Generator(),  # else every `map` would draw from the caller's global stream
            )

    def map(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Yield the result of each request in turn. Requests are taken a few ahead.

        A ValueError of the function is raised here as it was there.
        """
        if self._loader is None:
            yield from map(self._function, requests)
            return
        self._running.requests = requests
        for result in self._loader:
            if isinstance(result, ValueError):
                raise result
            yield result


class _Running(Generic[Request]):
    """The requests of the running `map`: the DataLoader iterates over the same sampler every time."""

    requests: Iterable[Request] = ()

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)


class _ErrorsAsValues(Dataset[Any]):
    """Hands a user's error over as a value: raised in a worker, it would arrive wrapped in the worker's traceback."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __getitem__(self, request: Any) -> Any:
        try:
            return self.function(request)
        except ValueError as error:
            return error


def _outlive_signals(worker: int) -> None:
    """Keep signals that are meant for the whole run from a worker: the main process needs it until it leaves.

    Ctrl-C and `timeout` signal the process group, and a worker leaves it. A scheduler or `pkill` sends SIGTERM to every
    process: only that of the main process, which ends a pool so, is obeyed. Where the system does not tell who sent a
    signal (macOS), each one is.
    """
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_leave_when_the_main_process_says, daemon=True).start()


def _leave_when_the_main_process_says() -> None:
    main = multiprocessing.parent_process()
    assert main is not None, "a worker has a parent"
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main.pid:
        pass
    os._exit(0)
