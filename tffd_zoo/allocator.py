"""What a step frees stays with the process, for the next step to use."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Tell glibc to keep the memory that is freed instead of giving it back to the system.

    By default it returns every block of some MiB, and gets the next one page by page, zeroed: tens of thousands of page
    faults in a training step on CPU. Kept, the peak of the memory stays the same, and lasts. Elsewhere than under glibc
    this does nothing.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    # Older versions take no more than 32 MiB.
    libc.mallopt(M_MMAP_THRESHOLD, 2**30) or libc.mallopt(M_MMAP_THRESHOLD, 2**25)
