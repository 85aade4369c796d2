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

_SMALL_CACHES = {"LRU_CACHE_CAPACITY": "16", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}
"""Sizes of PyTorch's and oneDNN's caches of compiled CPU operations, each with memory of its own; the
default is 1,024. Texts differ in length, so every step compiles new ones, and a training of 135M
parameters grew by 60 to 90 MB a step, also with only one of the caches limited."""

_SHORT_SPIN = {"GOMP_SPINCOUNT": "1000"}
"""How long a thread of an operation waits for the others at full speed before it sleeps; libgomp's
default is 300,000. Measured once, by hand (torch 2.13, GPT-NeoX of width 192, two cores that two other
processes use, too): a step took 1,365 ms with the default and 713 ms so; quiet, 311 and 318 ms."""


def set_torch_defaults() -> None:
    """Set what torch reads when it is imported, but for what the user has set."""
    spin = {} if "OMP_WAIT_POLICY" in os.environ else _SHORT_SPIN
    for variable, value in (_SMALL_CACHES | spin).items():
        os.environ.setdefault(variable, value)


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
