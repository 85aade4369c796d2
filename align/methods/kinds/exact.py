"""Method exact."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from align.methods.kind import MethodKind

if TYPE_CHECKING:
    from align.methods.method import Aligner
    from launch.signals import StopFlag
    from store_schema.text.vocabulary import Vocabulary


class Exact(MethodKind):
    """Source and target have one vocabulary, perhaps padded or with special tokens added: distributions
    are copied, and every segment's tokens are checked to be the same.
    """

    def make(self, sides: Any, stop: StopFlag) -> Aligner:
        """See `MethodKind.make`."""
        from align.methods.exact import ExactAligner
        from align.prepare.prepare import eos_ids

        return ExactAligner(sides.reader.location.url, sides.target.vocab_size, eos_ids(sides))

    def check(self, source: Vocabulary, target: Vocabulary, where: str) -> None:
        """See `MethodKind.check`."""
        from align.methods.exact import require_same_vocabulary

        require_same_vocabulary(source, target, where=where)

    def top_k(self, section: Any, source_top_k: int) -> int:
        """As many as the source store has."""
        return source_top_k
