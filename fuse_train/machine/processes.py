"""This process among those that a launcher (torchrun, accelerate) started for one training.

Only the main process writes files and prints. Errors are printed by one process for each distinct
message: an error in all processes is printed once, and an error in one of them is not lost.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from typing import TextIO

_STORE_PREFIX = "logitfuse/errors/"


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
    """Stream for a progress bar: None (its default) in the main process, a buffer in the others."""
    return None if is_main() else io.StringIO()


def quiet_unless_main() -> None:
    """Log only errors, except in the main process."""
    if not is_main():
        logging.getLogger().setLevel(logging.ERROR)


def first_to_report(line: str) -> bool:
    """Whether this process should print an error message.

    Before the processes are connected, the first of each machine prints it; afterwards the first
    process that calls this with the same message.
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
    except (RuntimeError, ValueError):  # the store's process is gone: rather print twice than never
        return True


def _number(name: str, default: int) -> int:
    try:
        return int(os.environ.get(name, default))
    except ValueError:
        return default
