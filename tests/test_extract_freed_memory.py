"""Freed memory stays with the process while an engine is open, and goes back after that."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or sys.platform != "linux", reason="is about glibc"
)

CHILD = """
import ctypes, resource, sys
import torch
from extract.engines.freed_memory import give_back_freed_memory, keep_freed_memory

torch.set_num_threads(1)
ctypes.CDLL(None).mallopt(-3, 128 << 10)  # as glibc begins; it adapts, and what then stays is chance
if sys.argv[1] == "keep":
    keep_freed_memory()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    parts = [torch.ones(1 << 20) for _ in range(40)]
    del parts
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

faults(), faults()
print(faults())
kept = resident()
give_back_freed_memory()
print(kept - resident())
"""


def child(way: str) -> tuple[int, int]:
    """Pages cleared for memory that was freed before, and bytes that go back at the end."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, way], capture_output=True, text=True, check=True
    )
    faults, returned = map(int, done.stdout.split())
    return faults, returned


def test_freed_memory_is_kept_and_goes_back() -> None:
    num_bytes, page_bytes = 40 << 22, 4096
    faults, returned = child("keep")
    assert faults < 0.1 * num_bytes / page_bytes
    assert returned > 0.9 * num_bytes


@pytest.mark.skipif(
    "[always]" in HUGE_PAGES.read_text() if HUGE_PAGES.exists() else True,
    reason="pages are large, and few",
)
def test_without_it_pages_are_cleared_again() -> None:
    assert child("leave")[0] > 0.5 * (40 << 22) / 4096
