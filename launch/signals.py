"""Clean stops: SIGTERM, SIGINT and the scheduler's early warning set a flag, which stages check.

A stage calls `check()` where unfinished work can be dropped: between batches and before a commit.
Nothing incomplete is ever visible, because a commit is the last and only visible step.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from store_schema.errors import Stopped, StoppedMidway

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopFlag:
    """Records that a stop was requested, and whether any work was finished before.

    A stage sets `progressed` once it has committed a shard or saved a checkpoint: the stop then gives
    exit code 75 (run again), so that a job script requeues itself only if it makes progress.
    """

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None
        self.progressed = False

    def ask(self, number: int, frame: FrameType | None = None) -> None:
        """Signal handler. A second SIGINT ends the process at once.

        A second SIGTERM does not: schedulers send it twice, to the process and through its shell, and
        end a process with SIGKILL.
        """
        if self._signal is not None and number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._signal = self._signal or signal.Signals(number)

    @property
    def asked(self) -> bool:
        """Whether a stop was requested."""
        return self._signal is not None

    @property
    def number(self) -> int:
        """Number of the first signal; SIGTERM's if there was none."""
        return int(self._signal or signal.SIGTERM)

    def check(self) -> None:
        """Raise Stopped if a stop was requested, StoppedMidway if work was finished before."""
        if self._signal is not None:
            kind = StoppedMidway if self.progressed else Stopped
            raise kind(
                f"stopped by {self._signal.name}, what is finished is kept",
                hint="rerun the same command to go on",
            )


def stop_when_closed(flag: StopFlag, fd: int) -> None:
    """Ask to stop as soon as the other end of a pipe is closed, as by the death of a parent.

    Args:
        flag: Of this process.
        fd: File descriptor of the end that is read.
    """

    def wait() -> None:
        while os.read(fd, 1):
            pass
        flag.ask(signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def stopped_in_one_line() -> Iterator[None]:
    """Raise Stopped as soon as a signal comes: while the program starts, or in a command that has
    nothing to finish (main thread only)."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(
            f"stopped by {signal.Signals(number).name}", hint="rerun the same command to go on"
        )

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Install the flag as handler of STOP_SIGNALS for the block (main thread only)."""
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = {number: signal.signal(number, flag.ask) for number in STOP_SIGNALS}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
