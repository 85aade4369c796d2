"""Base class of alignment methods. Loaded with every run file, so it imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from store_schema.registry import Kind

if TYPE_CHECKING:
    from align.methods.method import Aligner
    from launch.signals import StopFlag
    from store_schema.store.reader import StoreReader
    from store_schema.text.tokenizer import SegmentTokenizer
    from store_schema.text.vocabulary import Vocabulary


class Sides(Protocol):
    """What a method is made from (`prepare.checked.CheckedAlignment` has it)."""

    @property
    def reader(self) -> StoreReader:
        """Reader of the source store."""

    @property
    def target(self) -> SegmentTokenizer:
        """The target's tokenizer."""

    @property
    def section(self) -> Any:
        """Section `align` of the run file; options of the method are a field of it."""


class MethodKind(Kind):
    """Base class of all methods."""

    def make(self, sides: Any, stop: StopFlag) -> Aligner:
        """The aligner for one source and one target.

        Args:
            sides: See `Sides`.
            stop: Checked between shards where text is counted.
        """
        raise NotImplementedError

    def check(self, source: Vocabulary, target: Vocabulary, where: str) -> None:
        """Refuse vocabularies that the method cannot work with, before any shard is read.

        Args:
            source: The source's vocabulary.
            target: The target's vocabulary.
            where: URL of the source store, for messages.

        Raises:
            MismatchError: They do not fit.
        """

    def counts_text(self, section: Any) -> bool:
        """Whether it counts training text first, so that its output depends on that text."""
        return False

    def top_k(self, section: Any, source_top_k: int) -> int:
        """Entries at a position of the aligned store, at most."""
        max_entries: int = section.max_entries
        return max_entries
