"""Method h_kl."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from align.methods.kind import MethodKind

if TYPE_CHECKING:
    from align.methods.method import Aligner
    from launch.signals import StopFlag


class HybridKl(MethodKind):
    """X-Token's hybrid, our plain reading: as gold, and a target token that the source writes as
    several counts as the first of them where that has most of its weight.
    """

    def make(self, sides: Any, stop: StopFlag) -> Aligner:
        """See `MethodKind.make`."""
        from align.prepare.prepare import mapped

        return mapped(sides, lambda both: both.hybrid)
