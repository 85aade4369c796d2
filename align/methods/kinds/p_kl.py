"""Method p_kl."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from align.methods.kind import MethodKind

if TYPE_CHECKING:
    from align.methods.method import Aligner
    from launch.signals import StopFlag


class ProjectionKl(MethodKind):
    """X-Token's projection, our plain reading: a source token's mass is shared among the target tokens
    that it helps to write.
    """

    def make(self, sides: Any, stop: StopFlag) -> Aligner:
        """See `MethodKind.make`."""
        from align.prepare.prepare import mapped

        return mapped(sides, lambda both: both.projection)
