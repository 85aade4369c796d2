"""The protocol of alignment methods: a pure function of a shard's arrays, texts and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from align.methods.shard_arrays import without_entries
from store_schema.layout import Arrays
from store_schema.text.tokenizer import EncodedSegment


class Aligner(Protocol):
    """One method, prepared for one source store and one target."""

    def align(
        self, source: Arrays, texts: Sequence[bytes], target: Sequence[EncodedSegment]
    ) -> Arrays:
        """Convert one shard to the target's tokens.

        Args:
            source: The source store's arrays of the shard.
            texts: UTF-8 text of each segment, in the order of the shard.
            target: The same segments as the target's tokenizer reads them.

        Returns:
            Arrays of an aligned shard (`store_schema.layout`); entries + tail = 1 at every position.
        """


class SpansAligner:
    """Keeps only log-probabilities of common spans (ALM), for the span-likelihood loss."""

    def align(
        self, source: Arrays, texts: Sequence[bytes], target: Sequence[EncodedSegment]
    ) -> Arrays:
        """See `Aligner`; no position has entries."""
        return without_entries(source, target)
