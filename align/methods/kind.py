"""What a method is to the rest of the stage; read with the run file, so it loads nothing heavy."""

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
    """The source store and the target's tokenizer, checked (`prepare.checked.CheckedAlignment`)."""

    @property
    def reader(self) -> StoreReader:
        """Of the source store."""

    @property
    def target(self) -> SegmentTokenizer:
        """The target's tokenizer."""

    @property
    def section(self) -> Any:
        """The run file's `align`; options of the method are a field of it."""


class MethodKind(Kind):
    """Base of all methods."""

    def make(self, sides: Any, stop: StopFlag) -> Aligner:
        """The method, ready for a source and a target.

        Args:
            sides: `Sides`.
            stop: Asked between shards where text is counted.
        """
        raise NotImplementedError

    def check(self, source: Vocabulary, target: Vocabulary, where: str) -> None:
        """Refuse vocabularies that it cannot work with, before any shard is read.

        Raises:
            MismatchError: Says what does not fit; `where` is the source store.
        """

    def counts_text(self, section: Any) -> bool:
        """Whether what it makes of a shard depends on training text that it has counted."""
        return False

    def top_k(self, section: Any, source_top_k: int) -> int:
        """Entries of a position of the aligned store, at most."""
        most: int = section.max_entries
        return most
