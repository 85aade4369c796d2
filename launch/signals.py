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

from store_schema.errors import Stopped

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopFlag:
    """Remembers that a stop was asked for."""

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None

    def ask(self, number: int, frame: FrameType | None = None) -> None:
        """Signal handler. A second signal ends the process the usual way."""
        if self._signal is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._signal = signal.Signals(number)

    @property
    def asked(self) -> bool:
        """Whether a stop was asked for."""
        return self._signal is not None

    def check(self) -> None:
        """Raise Stopped if a stop was asked for."""
        if self._signal is not None:
            raise Stopped(
                f"stopped by {self._signal.name}, what is finished is kept",
                hint="rerun the same command to go on",
            )


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
