"""Method stats."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from align.methods.kind import MethodKind

if TYPE_CHECKING:
    from align.methods.method import Aligner
    from launch.signals import StopFlag


class Stats(MethodKind):
    """FuseChat: as mined, but vocabularies matched by how often tokens stand at the same text."""

    def make(self, sides: Any, stop: StopFlag) -> Aligner:
        """See `MethodKind.make`."""
        from align.papers.convert import ConvertOptions
        from align.papers.stats import StatsAligner
        from align.prepare.prepare import most_matched

        options = ConvertOptions(max_entries=sides.section.max_entries)
        return StatsAligner(most_matched(sides, stop), sides.target.vocab_size, options)

    def counts_text(self, section: Any) -> bool:
        """Always true."""
        return True
