"""Memory is kept and lies in huge pages: counted by the system, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tffd_zoo import allocator

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")

START = """
import resource, sys
from runpy import run_path
import torch
tune_memory = run_path(sys.argv[2])["tune_memory"]
if sys.argv[1] == "tuned":
    tune_memory()
"""
PAGE_FAULTS = """
for _ in range(10):
    torch.ones(2**23)  # 32 MiB: 8192 pages
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = faults()
for _ in range(50):
    torch.ones(2**23)
print(faults() - before)
"""
HUGE_PAGES = """
ones = torch.ones(2**24)
(line,) = [line for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages:")]
print(int(line.split()[1]) // 1024)
"""


def count(what: str, how: str, **environment: str) -> int:
    usual = {name: value for name, value in os.environ.items() if name != allocator.HUGE_PAGES}
    command = [sys.executable, "-c", START + what, how, allocator.__file__]
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=usual | environment)
    return int(run.stdout)


def test_memory_that_is_freed_is_not_asked_of_the_system_again() -> None:
    four_kib = {allocator.HUGE_PAGES: "0"}
    kept, given_back = (count(PAGE_FAULTS, how, **four_kib) for how in ("tuned", "as it comes"))
    assert given_back >= 50 * 8192
    # Small things that come to lie in the way may make the heap grow by one block, once.
    assert kept < 8192 + 1000
    assert given_back > 5 * kept


def test_large_tensors_lie_in_huge_pages_where_the_system_has_them_for_who_asks() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[madvise]" not in setting.read_text():
        pytest.skip("this system gives huge pages to all or to none")
    mebibytes = 2**24 * 4 // 2**20
    assert count(HUGE_PAGES, "tuned") >= mebibytes - 4
    assert count(HUGE_PAGES, "as it comes") < 16
    assert count(HUGE_PAGES, "tuned", **{allocator.HUGE_PAGES: "0"}) < 16
