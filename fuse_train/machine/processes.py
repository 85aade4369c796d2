"""This process among those that a launcher (torchrun, accelerate) started for one training.

Only the main process writes and prints. An error is told once: by one process for each distinct line,
so that what all of them find is not told by all, and what one of them finds is not lost.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from typing import TextIO

_STORE_PREFIX = "logitfuse/told/"


def process_index() -> int:
    """Number of this process; 0 without a launcher."""
    return _number("RANK", 0)


def process_count() -> int:
    """Processes of the training."""
    return _number("WORLD_SIZE", 1)


def is_main() -> bool:
    """Whether this process prints and writes."""
    return process_index() == 0


def progress_stream() -> TextIO | None:
    """Where a progress bar goes: None, its default, for the main process, nowhere for the others."""
    return None if is_main() else io.StringIO()


def quiet_beside_main() -> None:
    """Warnings of libraries are the main process's to tell."""
    if not is_main():
        logging.getLogger().setLevel(logging.ERROR)


def tells(line: str) -> bool:
    """Whether this process is the one that tells an error.

    Before the processes know each other, the first of each machine is; afterwards the first that has
    this very line to tell.
    """
    if process_count() == 1:
        return True
    torch_distributed = sys.modules.get("torch.distributed")
    if torch_distributed is None or not torch_distributed.is_initialized():
        return _number("LOCAL_RANK", 0) == 0
    from torch.distributed.distributed_c10d import _get_default_store

    from store_schema.fingerprint import fingerprint

    try:
        return int(_get_default_store().add(_STORE_PREFIX + fingerprint(line), 1)) == 1
    except (RuntimeError, ValueError):  # whoever kept the store has ended: better twice than never
        return True


def _number(name: str, default: int) -> int:
    try:
        return int(os.environ.get(name, default))
    except ValueError:
        return default
