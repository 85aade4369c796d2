"""Method bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from align.methods.kind import MethodKind

if TYPE_CHECKING:
    from align.methods.method import Aligner
    from launch.signals import StopFlag


class Bytes(MethodKind):
    """Any two tokenizers: the chain rule on bytes (below); the default."""

    def make(self, sides: Any, stop: StopFlag) -> Aligner:
        """See `MethodKind.make`."""
        from align.chain.project import BytesAligner
        from align.prepare.prepare import vocabulary_map

        return BytesAligner(vocabulary_map(sides, stop), sides.section.max_entries)

    def counts_text(self, section: Any) -> bool:
        """True unless all mass goes to the first token."""
        counted: bool = section.continuation != "first_token"
        return counted
