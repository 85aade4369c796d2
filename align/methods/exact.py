"""Method `exact`: source and target have the same vocabulary, so distributions are copied.

One vocabulary may be longer: padded, or with special tokens added (a base model and its chat model).
Entries that the target has no id for become tail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from align.methods.shard_arrays import join_segments, span_arrays
from store_schema.errors import MismatchError
from store_schema.layout import Arrays, Origin, array_names, row_sums
from store_schema.text.tokenizer import EncodedSegment
from store_schema.text.vocabulary import Vocabulary


def require_same_vocabulary(source: Vocabulary, target: Vocabulary, *, where: str) -> None:
    """Refuse two vocabularies in which an id stands for different bytes.

    Raises:
        MismatchError: There is such an id; names the first.
    """
    for i, (own, other) in enumerate(zip(source.tokens, target.tokens, strict=False)):
        if own != other:
            raise _mismatch(where, i, repr(own), repr(other))
    common = min(len(source), len(target))
    longer = source if len(source) > common else target
    for i in range(common, len(longer)):
        if longer.tokens[i]:
            pair = (repr(longer.tokens[i]), "no such id")
            raise _mismatch(where, i, *(pair if longer is source else pair[::-1]))


def _mismatch(where: str, token: int, source: str, target: str) -> MismatchError:
    return MismatchError(
        "method exact needs one vocabulary",
        where=f"{where}, token id {token}",
        expected=f"{source}, the source's",
        got=f"{target}, the target's",
        hint="set align.method to bytes",
    )


@dataclass(frozen=True, slots=True)
class ExactAligner:
    """Copies distributions.

    Args:
        where: URL of the source store, for messages.
        vocab_size: Of the target; entries with ids of this size or more become tail.
        eos: EOS id of source and target, -1 for none.
    """

    where: str
    vocab_size: int
    eos: tuple[int, int] = (-1, -1)

    def align(
        self, source: Arrays, texts: Sequence[bytes], target: Sequence[EncodedSegment]
    ) -> Arrays:
        """See `align.methods.method.Aligner`.

        Raises:
            MismatchError: The two tokenizers have one vocabulary but split a text differently.
        """
        ids, target_ends, offsets = join_segments(target)
        same = np.array_equal(ids, source["token_ids"])
        if not same or not np.array_equal(offsets, source["token_offsets"]):
            raise MismatchError(
                "source and target tokenise differently",
                where=self.where,
                expected=f"{len(source['token_ids'])} tokens, the source's",
                got=f"{len(ids)} tokens of the target, not all the same",
                hint="set align.method to bytes",
            )
        rows = (source["token_offsets"], source["token_offsets"])
        kept = {name: source[name] for name in array_names("source")} | self._entries(source)
        known = np.diff(kept["entry_offsets"]) > 0
        origin = np.where(known, Origin.BOUNDARY, Origin.NONE).astype("|u1")
        ends = source["byte_ends"].astype(np.int64)
        return kept | {"origin": origin} | span_arrays(source, rows, ends, target_ends)

    def _entries(self, source: Arrays) -> Arrays:
        """The entry arrays with the source's EOS renamed to the target's and ids beyond the target's
        vocabulary removed; empty where nothing changes."""
        ids = source["entry_ids"]
        own, other = self.eos
        moves = own >= 0 and other >= 0 and own != other
        if not moves and (not len(ids) or ids.max() < self.vocab_size):
            return {}
        if moves:
            taken = np.flatnonzero(ids == own)
            ids = np.where(ids == other, self.vocab_size, ids)  # not EOS in the source: to the tail
            ids[taken] = other
        keep = ids < self.vocab_size
        counts = np.diff(source["entry_offsets"])
        row = np.repeat(np.arange(len(counts)), counts)[keep]
        offsets = np.concatenate(([0], np.cumsum(np.bincount(row, minlength=len(counts)))))
        logprobs = source["entry_logprobs"][keep]
        mass = row_sums(np.exp(logprobs.astype(np.float64)), offsets)
        covered = np.diff(offsets) > 0
        tail = np.where(covered, np.clip(1.0 - mass, 0.0, 1.0), 1.0)
        untouched = np.diff(offsets) == counts
        return {
            "entry_offsets": offsets,
            "entry_ids": ids[keep].astype("<u4"),
            "entry_logprobs": logprobs,
            "tail_mass": np.where(untouched, source["tail_mass"], tail).astype("<f4"),
        }
