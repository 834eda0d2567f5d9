"""The processes of one command: which of them goes first, and what is said when one is gone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch.distributed as dist
from accelerate import Accelerator, PartialState

Processes: TypeAlias = Accelerator | PartialState
"""The processes of a run and the device of this one, before and after it is known how they compute."""


@contextmanager
def main_process_first(processes: Processes) -> Iterator[None]:
    """Let the main process go through the body before the others do, so that one downloads and the others find it.

    Accelerate's own leaves the others waiting when the main process fails there. Here they go on, and meet the same
    error: each of them says what is wrong, and none that a connection was lost.
    """
    if not processes.is_main_process:
        processes.wait_for_everyone()
    try:
        yield
    finally:
        if processes.is_main_process:
            processes.wait_for_everyone()


def of_a_lost_process(error: Exception) -> bool:
    """Whether this is what gloo or NCCL say when another process is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))
