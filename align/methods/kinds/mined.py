"""Method mined."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from align.methods.kind import MethodKind

if TYPE_CHECKING:
    from align.methods.method import Aligner
    from launch.signals import StopFlag


class Mined(MethodKind):
    """FuseLLM: tokens matched by dynamic time warping, vocabularies by least edit distance."""

    def make(self, sides: Any, stop: StopFlag) -> Aligner:
        """See `MethodKind.make`."""
        from align.papers.convert import ConvertOptions
        from align.papers.mined import MinedAligner
        from align.prepare.prepare import nearest

        options = ConvertOptions(max_entries=sides.section.max_entries)
        return MinedAligner(nearest(sides), sides.target.vocab_size, options)
