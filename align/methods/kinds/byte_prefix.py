"""Method byte_prefix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from align.methods.kind import MethodKind

if TYPE_CHECKING:
    from align.methods.method import Aligner
    from launch.signals import StopFlag


class BytePrefix(MethodKind):
    """A byte-prefix map (BPM), our plain reading: a source token's mass goes to the longest target
    token that its bytes begin with.
    """

    def make(self, sides: Any, stop: StopFlag) -> Aligner:
        """See `MethodKind.make`."""
        from align.prepare.prepare import mapped

        return mapped(sides, lambda both: both.prefixes, inside=True)
