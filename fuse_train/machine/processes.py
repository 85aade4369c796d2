"""This process among those that a launcher (torchrun, accelerate) started for one training.

Only the main process writes files and prints. Errors are printed by one process for each distinct
message: an error in all processes is printed once, and an error in one of them is not lost.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TextIO

PATIENCE = timedelta(hours=1)
"""How long processes wait for one that reads, checks or writes files alone. NCCL's own ten minutes are
too few for a large model on a slow disk. Of one that has died the launcher ends the others at once."""
_STORE_PREFIX = "logitfuse/errors/"
_STORE_S = 10


def process_index() -> int:
    """Number of this process; 0 without a launcher."""
    return _number("RANK", 0)


def process_count() -> int:
    """Processes of the training."""
    return _number("WORLD_SIZE", 1)


def connected_state() -> Any:
    """accelerate's PartialState of this process, connected with the others of its training.

    The first one in a process serves all its accelerators, but ignores ACCELERATE_USE_CPU by itself.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PATIENCE)


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

    Before the processes are connected, the first of each machine prints it, or of all machines whose
    torchruns are connected; afterwards the first process that calls this with the same message.
    """
    if process_count() == 1:
        return True
    torch_distributed = sys.modules.get("torch.distributed")
    if torch_distributed is None or not torch_distributed.is_initialized():
        if _number("LOCAL_RANK", 0) != 0 or _number("GROUP_WORLD_SIZE", 1) == 1:
            return _number("LOCAL_RANK", 0) == 0
        return _first_in(_store_of_torchruns, line)
    from torch.distributed.distributed_c10d import _get_default_store

    return _first_in(_get_default_store, line)


def _store_of_torchruns() -> Any:
    """The store that torchrun has for its processes to find one another.

    Raises:
        ValueError: They were started by something else.
        RuntimeError: It does not answer.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise ValueError("torchrun has no store")
    import torch.distributed

    library: Any = torch.distributed
    return library.TCPStore(
        os.environ.get("MASTER_ADDR", ""),
        _number("MASTER_PORT", 0),
        is_master=False,
        timeout=timedelta(seconds=_STORE_S),
    )


def _first_in(store: Callable[[], Any], line: str) -> bool:
    from store_schema.fingerprint import fingerprint

    try:
        return int(store().add(_STORE_PREFIX + fingerprint(line), 1)) == 1
    except (RuntimeError, ValueError):  # the store's process is gone: rather print twice than never
        return True


def _number(name: str, default: int) -> int:
    try:
        return int(os.environ.get(name, default))
    except ValueError:
        return default
