"""torchrun on one node of a Slurm job: `python -m fuse_train.machine.torchrun`, options of torchrun.

What it does otherwise than torchrun itself:

* SIGUSR1 goes to the training's processes, which save a checkpoint and end by themselves.
* The exit code is that of the process that failed first, on all nodes: it is left in the file that
  LOGITFUSE_EXIT_FILE names. torchrun's own code is 1 whatever went wrong, and that of a node that
  srun ends because another one failed would be 143.
* A failure is one line, and none where the process itself has said what was wrong.
* The job's first node (SLURM_NODEID 0) has the rendezvous, whatever names its addresses have.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from store_schema.errors import ConfigError, LogitfuseError

EXIT_FILE = "LOGITFUSE_EXIT_FILE"
"""Variable with a file on a disk that all nodes see."""
_GRACE_S = 15.0
"""Seconds between a failure and the end of this node's torchrun, which ends those of other nodes
(`srun --kill-on-bad-exit`): a stop is a failure, too, and they may be about to end by themselves."""
_JOIN_S = 600
"""Seconds in which all nodes must have begun, torchrun's own limit for all but the first contact."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun to its end.

    Args:
        arguments: Of torchrun; None takes those of the command line.

    Returns:
        0; the exit code of the process that failed first, 128 + N if signal N ended it; 2 if the nodes
        found no way together.
    """
    import torch.distributed.run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    torchrun: Any = torch.distributed.run
    options = torchrun.parse_args(arguments)
    first = os.environ.get("SLURM_NODEID", "0") == "0"
    settings = f"is_host={int(first)},read_timeout={_JOIN_S}"
    options.rdzv_conf = ",".join(filter(None, (settings, options.rdzv_conf)))
    signal.signal(signal.SIGUSR1, _pass_on)
    try:
        torchrun.run(options)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            _tell(f"process {rank} of the training was ended by {name}")
        if options.nnodes != "1":
            code = _first_code(code) or code
            _wait_for_others(code)
        return code
    except SignalException as error:
        return _first_code() or 128 + error.sigval
    except RendezvousError as error:
        _tell(_no_rendezvous(options.rdzv_endpoint, first=first, error=error).line())
        return LogitfuseError.exit_code
    return 0


def _pass_on(number: int, frame: FrameType | None) -> None:
    """Signal handler. Before there are processes, nothing can be kept: end at once."""
    import psutil

    children = psutil.Process().children()
    if not children:
        raise SystemExit(128 + number)
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.send_signal(number)


def _first_code(own: int | None = None) -> int | None:
    """The exit code that the first node to fail has left; `own` where none has, which is left then."""
    name = os.environ.get(EXIT_FILE)
    if not name:
        return own
    path = Path(name)
    if own is not None:
        # Linked when it is whole: another node never reads a part of it.
        written = path.with_name(f"{path.name}.{os.environ.get('SLURM_NODEID', '0')}")
        with suppress(OSError):  # another node was first, or the disk is full: the own code then
            written.write_text(str(own))
            os.link(written, path)
        with suppress(OSError):
            written.unlink()
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return own


def _wait_for_others(code: int) -> None:
    """Wait for the grace period, or until srun ends this task: the code stays the same."""

    def end(number: int, frame: FrameType | None) -> None:
        _end(code)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    time.sleep(_GRACE_S)


def _end(code: int) -> NoReturn:
    """End at once: while an interpreter ends, it has no signal handlers, and srun's SIGTERM to a node
    that is about to end by itself would make its code 143."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, RuntimeError):  # nobody reads it, or it is being flushed
            stream.flush()
    os._exit(code)


def _no_rendezvous(endpoint: str, *, first: bool, error: Any) -> ConfigError:
    """Why the nodes' torchruns do not meet."""
    cause = str(error.__cause__ or error).partition("\n")[0][:160]
    if first and "EADDRINUSE" in cause:
        return ConfigError(
            "port of the rendezvous is in use",
            where=endpoint,
            hint="submit again: each job has a port of its own number",
        )
    return ConfigError(
        "the nodes of the training do not meet",
        where=endpoint,
        expected="that every node reaches this port of the first one",
        got=cause or type(error).__name__,
    )


def _tell(line: str) -> None:
    print(f"error: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    _end(main())
