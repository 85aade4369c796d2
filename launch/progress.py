"""Progress: a bar on a terminal, a line every few seconds in a log. Rates are units per second."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self, TextIO

from tqdm import tqdm

from launch.quantities import duration_text

LOG_INTERVAL_S = 10.0


class Progress:
    """Counts units of work done and shows rate and remaining time.

    Args:
        label: Name of the work, shown first.
        total: Units in all.
        unit: Name of a unit, such as "tok".
        done: Units that were finished by an earlier run; not part of the rate.
        stream: Stream to write to; None is stderr.
    """

    def __init__(
        self, label: str, total: int, *, unit: str, done: int = 0, stream: TextIO | None = None
    ) -> None:
        self._stream = stream or sys.stderr
        self._label, self._total, self._unit = label, total, unit
        self._done = done
        self._started_with = done
        self._start = self._last = time.monotonic()
        self._note = ""
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm(
                total=total, initial=done, unit=unit, unit_scale=True, desc=label, file=self._stream
            )

    def add(self, units: int, note: str = "") -> None:
        """Count `units` more; show `note`, such as bytes written, after the figures from now on.

        A count of 0 only changes the note.
        """
        self._done += units
        self._total = max(self._total, self._done)  # work of other workers may have been added
        self._note = note or self._note
        if self._bar is not None:
            self._bar.total = self._total
            self._bar.set_postfix_str(self._note, refresh=False)
            self._bar.update(units)
        elif time.monotonic() - self._last >= LOG_INTERVAL_S:
            self._write_line()

    def _write_line(self) -> None:
        self._last = time.monotonic()
        rate = self.rate
        left = (self._total - self._done) / rate if rate > 0 else 0.0
        text = f"{self._label}: {self._done:,}/{self._total:,} {self._unit}"
        text += f", {rate:,.0f} {self._unit}/s, {duration_text(left)} left" if rate > 0 else ""
        text += f", {self._note}" if self._note else ""
        print(text, file=self._stream, flush=True)

    @property
    def rate(self) -> float:
        """Units per second since the start of this run."""
        seconds = time.monotonic() - self._start
        return (self._done - self._started_with) / seconds if seconds > 0 else 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._done > self._started_with:
            self._write_line()
