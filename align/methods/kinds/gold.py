"""Method gold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from align.methods.kind import MethodKind

if TYPE_CHECKING:
    from align.methods.method import Aligner
    from launch.signals import StopFlag


class Gold(MethodKind):
    """TRL's GOLD, our plain reading: where both sides begin a token, tokens of the same bytes have the
    source's probability.
    """

    def make(self, sides: Any, stop: StopFlag) -> Aligner:
        """See `MethodKind.make`."""
        from align.prepare.prepare import mapped

        return mapped(sides, lambda both: both.shared)
