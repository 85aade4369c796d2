"""Method `bytes` for one shard: a pure function of arrays, texts and the vocabulary map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from align.chain.kernel import ShardText, project_segments
from align.chain.rows import BranchRows, SourceRows, non_label_scale
from align.chain.vocabulary_map import VocabularyMap
from align.methods.shard_arrays import join_segments, span_arrays
from store_schema.layout import Arrays, row_sums
from store_schema.text.tokenizer import EncodedSegment


def project(
    source: Arrays,
    texts: Sequence[bytes],
    target: Sequence[EncodedSegment],
    mapping: VocabularyMap,
    *,
    max_entries: int,
) -> Arrays:
    """Aligned arrays of one shard (method `bytes`).

    Args:
        source: The source store's arrays of the shard.
        texts: UTF-8 text of each segment, in the order of the shard.
        target: The same segments as the target's tokenizer reads them.
        mapping: Between the two vocabularies.
        max_entries: Kept at each position, at most; the rest is tail.

    Returns:
        Arrays of an aligned shard, see store_schema.layout.

    Source: ours; the rules are in docs/alignment.md.
    """
    target_ids, target_ends, target_offsets = join_segments(target)
    source_ends = source["byte_ends"].astype(np.int64)
    rows = (source["token_offsets"], target_offsets)
    text_lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    with np.errstate(invalid="ignore"):
        probabilities = np.exp(source["entry_logprobs"].astype(np.float64))
        labels = np.exp(source["label_logprobs"].astype(np.float64))
    of_rows = (source["entry_offsets"], source["entry_ids"], probabilities, labels)
    source_ids, source_lengths = source["token_ids"], np.diff(mapping.pieces.offsets)
    scales, tails = non_label_scale(source_ids, *of_rows)
    projected = project_segments(
        ShardText(
            *rows,
            target_ids,
            target_ends,
            np.frombuffer(b"".join(texts), np.uint8),
            np.concatenate(([0], np.cumsum(text_lengths))),
            word_marks(rows[0], source_ids, source_ends, source_lengths),
            word_marks(rows[1], target_ids, target_ends, mapping.target_lengths),
        ),
        SourceRows(
            source_ends,
            source_ids,
            *of_rows,
            scales,
            tails,
            mapping.tail.scales(tails, source_ids, of_rows[0], of_rows[1]),
            BranchRows.of(source),
        ),
        mapping,
        max_entries,
    )
    mass, label_mass = projected.masses, projected.labels
    with np.errstate(divide="ignore"):
        # The log of float32 masses: `heaviest` sorted them as float32, and this keeps their order.
        logprobs = np.minimum(np.log(mass.astype("<f4")), 0.0).astype("<f4")
        label_logprobs = np.minimum(np.log(label_mass), 0.0)
    entries: Arrays = {
        "segment_ids": source["segment_ids"],
        "token_offsets": target_offsets,
        "token_ids": target_ids,
        "byte_ends": target_ends.astype("<u4"),
        "entry_offsets": projected.offsets,
        "entry_ids": projected.ids,
        "entry_logprobs": logprobs,
        "tail_mass": _tail(mass, projected.offsets),
        "label_logprobs": np.where(label_mass > 0, label_logprobs, np.nan).astype("<f4"),
        "origin": projected.origin,
    }
    return entries | span_arrays(source, rows, source_ends, target_ends)


@dataclass(frozen=True, slots=True)
class BytesAligner:
    """The chain rule on bytes (docs/alignment.md)."""

    mapping: VocabularyMap
    max_entries: int

    def align(
        self, source: Arrays, texts: Sequence[bytes], target: Sequence[EncodedSegment]
    ) -> Arrays:
        """See `Aligner`."""
        return project(source, texts, target, self.mapping, max_entries=self.max_entries)


def word_marks(
    offsets: npt.NDArray[np.int64],
    ids: npt.NDArray[np.uint32],
    ends: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
) -> npt.NDArray[np.uint8]:
    """[D] uint8, 1 where a segment's first token has one byte more than it covers of the text (the
    space of a word mark).

    Args:
        offsets: [D+1] where each segment's tokens begin.
        ids: [N] tokens.
        ends: [N] byte after each token, within the segment.
        lengths: [V] bytes of each token of the vocabulary.
    """
    starts = offsets[:-1]
    marks = np.zeros(len(starts), np.uint8)
    rows = np.flatnonzero(np.diff(offsets) > 0)
    first = starts[rows]
    marks[rows] = lengths[ids[first].astype(np.int64)] == ends[first] + 1
    return marks


def _tail(mass: npt.NDArray[np.float64], offsets: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    return np.clip(1.0 - row_sums(mass, offsets), 0.0, 1.0).astype("<f4")
