"""Checks that the positions of a shard are the tokens of the plan's segments: rows, bytes and text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from store_schema.errors import CorruptionError, TokenizerError
from store_schema.layout import Arrays
from store_schema.plan.plan import Segment, ShardRecord
from store_schema.store.guards import REPAIR
from store_schema.text.vocabulary import Vocabulary

COMPARED = ("segment_ids", "token_offsets", "token_ids", "byte_ends")
"""Arrays that say which text the positions are of."""


class FlatVocabulary:
    """A vocabulary as flat arrays, which gives the bytes of a shard's tokens without a Python loop.

    The loop would hold Python's lock for a quarter of a shard's time.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._bytes = np.frombuffer(b"".join(vocabulary.tokens), np.uint8)
        self._lengths = vocabulary.lengths
        self._starts = np.cumsum(self._lengths) - self._lengths

    def writes(
        self,
        ids: npt.NDArray[np.uint32],
        ends: npt.NDArray[np.uint32],
        offsets: npt.NDArray[np.int64],
        texts: Sequence[bytes],
    ) -> bool:
        """Whether the tokens' bytes are the texts, and end where `ends` says.

        False is no proof of damage: a tokenizer may put a space of its own before a text, or read a
        special token that is written out as text. `Vocabulary.byte_ends` decides.

        Args:
            ids: [N] token ids.
            ends: [N] end of each token in its segment.
            offsets: [D+1] positions of each segment.
            texts: [D] UTF-8 of each segment.
        """
        if len(ids) and ids.max() >= len(self._lengths):
            return False
        lengths = self._lengths[ids]
        totals = np.concatenate([[0], np.cumsum(lengths)])
        before = totals[offsets]
        if np.diff(before).tolist() != [len(text) for text in texts]:
            return False
        rows = np.diff(offsets)
        if not np.array_equal(totals[1:] - np.repeat(before[:-1], rows), ends):
            return False
        place = np.repeat(self._starts[ids] - totals[:-1], lengths)
        written: bytes = self._bytes[place + np.arange(totals[-1])].tobytes()
        return written == b"".join(texts)


def compare_with_plan(
    arrays: Arrays,
    record: ShardRecord,
    segments: list[Segment],
    flat: FlatVocabulary | None,
    where: str,
) -> None:
    """Check that the positions of a shard are the tokens of the plan's segments.

    Args:
        arrays: `COMPARED` arrays of the shard.
        record: The shard in the plan.
        segments: Its segments.
        flat: The store's vocabulary; None skips the check of the tokens' bytes.
        where: Store and shard, for messages.

    Raises:
        CorruptionError: Names the array, and the segment where one is known.
    """
    if not np.array_equal(arrays["segment_ids"], np.arange(record.start, record.stop)):
        raise CorruptionError(
            "segments are not the plan's",
            where=f"{where}, array segment_ids",
            expected=f"rows {record.start} to {record.stop - 1}",
            hint=REPAIR,
        )
    offsets, ids, ends = (arrays[name] for name in COMPARED[1:])
    texts = [segment.text.encode() for segment in segments]
    if flat is not None and flat.writes(ids, ends, offsets, texts):
        return
    for segment, text, start, stop in zip(segments, texts, offsets, offsets[1:], strict=False):
        here = f"{where}, segment {segment.segment_id!r}"
        last = int(ends[stop - 1]) if stop > start else 0
        if last != len(text):
            raise CorruptionError(
                "tokens do not cover the segment's text",
                where=f"{here}, array byte_ends",
                expected=f"{len(text)} bytes",
                got=last,
                hint=REPAIR,
            )
        if flat is not None:
            _compare_bytes(ids[start:stop], ends[start:stop], text, flat.vocabulary, here)


def _compare_bytes(
    ids: npt.NDArray[np.uint32],
    ends: npt.NDArray[np.uint32],
    text: bytes,
    vocabulary: Vocabulary,
    where: str,
) -> None:
    """Check that the tokens' bytes are the text, and end where `ends` says."""
    if len(ids) and ids.max() >= len(vocabulary):
        raise CorruptionError(
            "token is not in the vocabulary",
            where=f"{where}, array token_ids",
            expected=f"below {len(vocabulary)}",
            got=int(ids.max()),
            hint=REPAIR,
        )
    try:
        written = vocabulary.byte_ends(ids.tolist(), text, where=where)
    except TokenizerError as error:
        raise CorruptionError(
            error.what,
            where=f"{where}, array token_ids",
            expected=error.expected,
            got=error.got,
            hint=REPAIR,
        ) from error
    if not np.array_equal(written, ends):
        raise CorruptionError(
            "byte ends are not those of the tokens",
            where=f"{where}, array byte_ends",
            hint=REPAIR,
        )
