"""Method spans."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from align.methods.kind import MethodKind

if TYPE_CHECKING:
    from align.methods.method import Aligner
    from launch.signals import StopFlag


class Spans(MethodKind):
    """No entries, only the source's log-probability of each common span (ALM)."""

    def make(self, sides: Any, stop: StopFlag) -> Aligner:
        """See `MethodKind.make`."""
        from align.methods.method import SpansAligner

        return SpansAligner()
