"""Stopping cleanly: SIGTERM, SIGINT and the scheduler's early warning ask, the loop answers.

A stage calls `check()` where it is safe to drop what is in hand: between batches and before a
commit. Nothing half-written is ever visible, because a commit is the last and only visible step.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from store_schema.errors import Stopped, StoppedMidway

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopFlag:
    """Remembers that a stop was asked for, and whether anything was finished before.

    A stage sets `progressed` once it has committed a shard or saved a checkpoint: the stop then ends
    in exit code 75 (run again), so that a job script may requeue itself and yet not go on for ever
    where nothing gets done.
    """

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None
        self.progressed = False

    def ask(self, number: int, frame: FrameType | None = None) -> None:
        """Signal handler. A second SIGINT ends the process the usual way: a person insists.

        Schedulers repeat SIGTERM (to the process, and by way of its shell) and send SIGKILL when
        they mean it.
        """
        if self._signal is not None and number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._signal = self._signal or signal.Signals(number)

    @property
    def asked(self) -> bool:
        """Whether a stop was asked for."""
        return self._signal is not None

    @property
    def number(self) -> int:
        """Of the first signal that asked; SIGTERM's where none did."""
        return int(self._signal or signal.SIGTERM)

    def check(self) -> None:
        """Raise Stopped if a stop was asked for, StoppedMidway if something was finished before."""
        if self._signal is not None:
            kind = StoppedMidway if self.progressed else Stopped
            raise kind(
                f"stopped by {self._signal.name}, what is finished is kept",
                hint="rerun the same command to go on",
            )


@contextmanager
def stopped_in_one_line() -> Iterator[None]:
    """Raise Stopped wherever the program is when a stop is asked for: while it starts, or in a command
    that has nothing to finish (main thread only)."""

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
