"""Method ot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from align.methods.kind import MethodKind

if TYPE_CHECKING:
    from align.methods.method import Aligner
    from launch.signals import StopFlag


class OptimalTransport(MethodKind):
    """Optimal transport between the two sets of entries (after PTA-LLM)."""

    def make(self, sides: Any, stop: StopFlag) -> Aligner:
        """As `MethodKind.make` says."""
        from align.papers.carry import CarryOptions
        from align.papers.transport import NUM_CANDIDATES, TransportAligner
        from align.prepare.prepare import nearest

        return TransportAligner.of(
            nearest(sides, NUM_CANDIDATES),
            sides.reader.vocabulary,
            sides.target.vocabulary,
            options=CarryOptions(max_entries=sides.section.max_entries),
        )
