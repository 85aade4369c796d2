"""Processes that run a stage's command for one source, and threads beside its main one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SMALLER_STEPS = 76
"""Exit code of a process whose memory ran out and whose batches can be halved."""

SWITCH_S = 0.0005
"""Seconds for `sys.setswitchinterval` while threads run. With Python's default of 5 ms the main thread
waits that long after an operation whenever another thread runs Python code; with 4,096 ids and 16
entries all of extraction was 5 % faster this way."""

_QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "TORCH_CPP_LOG_LEVEL": "ERROR"}
"""Libraries read these when they are loaded, so they must be in the process's environment."""


def child_environment() -> dict[str, str]:
    """This process's environment, for a child that imports the same packages."""
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return _QUIET | os.environ | {"PYTHONPATH": path}


@contextmanager
def quick_switches() -> Iterator[None]:
    """Let threads take turns every `SWITCH_S`."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
