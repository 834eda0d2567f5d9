"""How a process holds its memory on a CPU: kept from step to step, and in huge pages."""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # torch's; it is read once, when the first tensor of 2 MiB or more is made


def tune_memory() -> None:
    """Let freed memory stay with the process, and tensors lie in huge pages, before there are large ones.

    By default glibc returns every block of some MiB to the system, and gets the next one page by page, zeroed: tens of
    thousands of page faults in a training step on CPU. Kept, the peak of the memory stays the same, and lasts.

    Pages are 4 KiB, and a large feature map has thousands, whose addresses every pass over it waits for. Linux gives
    pages of 2 MiB where it is asked for them, as torch does once it is told to. VGG8, with 34 MB of features a batch,
    pays for it in `pages` of recipes/results/benchmark; ResNet-20 gains nothing. `THP_MEM_ALLOC_ENABLE=0` does without.

    Elsewhere than on Linux under glibc this does nothing.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    # Older versions take no more than 32 MiB.
    libc.mallopt(M_MMAP_THRESHOLD, 2**30) or libc.mallopt(M_MMAP_THRESHOLD, 2**25)
    os.environ.setdefault(HUGE_PAGES, "1")
