"""Processes that run a stage's command for one source."""

from __future__ import annotations

import os
from pathlib import Path

SMALLER_STEPS = 76
"""Exit code of a process whose memory ran out and whose batches can be halved."""

_QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "TORCH_CPP_LOG_LEVEL": "ERROR"}
"""Libraries read these when they are loaded, so they must be in the process's environment."""


def child_environment() -> dict[str, str]:
    """This process's environment, for a child that imports the same packages."""
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return _QUIET | os.environ | {"PYTHONPATH": path}
