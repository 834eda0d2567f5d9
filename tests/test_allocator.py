"""Freed memory is kept: counted in page faults, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tffd_zoo import allocator

COUNT = """
import resource, sys
from runpy import run_path
import torch
keep_freed_memory = run_path(sys.argv[2])["keep_freed_memory"]
if sys.argv[1] == "kept":
    keep_freed_memory()
for _ in range(10):
    torch.ones(2**23)  # 32 MiB: 8192 pages
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = faults()
for _ in range(50):
    torch.ones(2**23)
print(faults() - before)
"""


def page_faults(how: str) -> int:
    run = subprocess.run(
        [sys.executable, "-c", COUNT, how, allocator.__file__], check=True, capture_output=True, text=True
    )
    return int(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
def test_memory_that_is_freed_is_not_asked_of_the_system_again() -> None:
    kept, given_back = page_faults("kept"), page_faults("given back")
    assert given_back >= 50 * 8192
    # Small things that come to lie in the way may make the heap grow by one block, once.
    assert kept < 8192 + 1000
    assert given_back > 5 * kept
