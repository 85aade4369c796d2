"""Method `stats` (FuseChat): as method `mined`, with a vocabulary map from counts of matched tokens.

Each source token is mapped to the target token that it is matched to most often on the warping paths
(`dtw`) of the training split.

All pairs on a path are counted, as in the paper, so a source token that is two target tokens is matched
to both equally often. Such ties go to the token of less edit distance, in the order of
`mined_vocabulary`. Tokens that were never matched, and special tokens, have the map of method `mined`.

Source: FuseChat, arXiv 2408.07990 (mapping statistics). Its public code weighs the counts with edit
distances in a way that the paper does not describe; here counts come first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from align.counts.pair_counts import DistinctPairs
from align.papers.dtw import BAND_BYTES, edit_distance, match_segments
from align.papers.mined import MinedAligner, require_text
from align.papers.mined_vocabulary import spelling_key
from store_schema.compiled import compiled
from store_schema.text.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class StatsAligner(MinedAligner):
    """`MinedAligner` with the vocabulary map of `MatchCounts.token_map`."""


class MatchCounts:
    """Counts of (source token, target token) pairs that are matched on warping paths.

    Args:
        source_vocab_size: All source ids are below it.
        target_vocab_size: All target ids are below it.
        band_bytes: Bytes between matched tokens, at most.
    """

    def __init__(
        self, source_vocab_size: int, target_vocab_size: int, band_bytes: int = BAND_BYTES
    ) -> None:
        self._height = source_vocab_size
        self._band_bytes = band_bytes
        self.distinct = DistinctPairs(target_vocab_size)

    def add(
        self,
        text: bytes,
        source_ids: npt.NDArray[np.uint32],
        source_ends: npt.NDArray[np.int64],
        target_ids: npt.NDArray[np.uint32],
        target_ends: npt.NDArray[np.int64],
    ) -> None:
        """Count the pairs of one segment.

        Args:
            text: UTF-8.
            source_ids: [R] source tokens.
            source_ends: [R] byte after each of them.
            target_ids: [N] target tokens.
            target_ends: [N] byte after each of them.

        Raises:
            MismatchError: The tokens do not end with the text.
        """
        source_offsets = np.array([0, len(source_ids)])
        target_offsets = np.array([0, len(target_ids)])
        text_offsets = np.array([0, len(text)])
        require_text(source_offsets, source_ends, text_offsets, "source store")
        require_text(target_offsets, target_ends, text_offsets, "target's tokens")
        first, last = match_segments(
            (source_offsets, target_offsets),
            source_ends.astype(np.int64),
            target_ends.astype(np.int64),
            np.frombuffer(text, np.uint8),
            text_offsets,
            self._band_bytes,
        )
        if not len(source_ids) or not len(target_ids):
            return
        beside = last - first + 1
        steps = np.arange(beside.sum()) - np.repeat(np.cumsum(beside) - beside, beside)
        rows = np.repeat(first, beside) + steps
        source = source_ids[rows].astype(np.int64)
        self.distinct.note(source, np.repeat(target_ids, beside).astype(np.int64))

    def pairs(
        self,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Source tokens [P], target tokens [P] and counts [P] of the distinct pairs."""
        return self.distinct.counts()

    def token_map(
        self, nearest: npt.NDArray[np.int32], source: Vocabulary, target: Vocabulary
    ) -> npt.NDArray[np.int32]:
        """[V] the target token that each source token is matched to most often.

        Args:
            nearest: [V] the map by edit distance, for special tokens and those never matched.
            source: The source's vocabulary.
            target: The target's vocabulary.
        """
        source_tokens, target_tokens, counts = self.pairs()
        ordinary = ~source.special[source_tokens] & (target.lengths[target_tokens] > 0)
        source_tokens, target_tokens = source_tokens[ordinary], target_tokens[ordinary]
        counts = counts[ordinary]
        most = np.zeros(self._height, np.int64)
        np.maximum.at(most, source_tokens, counts)
        best = counts == most[source_tokens]
        source_tokens, target_tokens = source_tokens[best], target_tokens[best]
        keys = _keys(source_tokens, target_tokens, _packed(source), _packed(target))
        order = np.lexsort((keys, source_tokens))
        tokens, places = np.unique(source_tokens[order], return_index=True)
        chosen = nearest.copy()
        chosen[tokens] = target_tokens[order][places]
        return chosen


def _packed(vocabulary: Vocabulary) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    offsets = np.concatenate(([0], np.cumsum(vocabulary.lengths)))
    return np.frombuffer(b"".join(vocabulary.tokens), np.uint8), offsets


@compiled
def _keys(source_tokens: Any, target_tokens: Any, source: Any, target: Any) -> Any:
    """`spelling_key` of each pair."""
    a, a_offsets = source
    b, b_offsets = target
    keys = np.empty(len(source_tokens), np.int64)
    table = np.zeros(256, np.uint64)
    for k in range(len(keys)):
        s, t = source_tokens[k], target_tokens[k]
        span = (a, a_offsets[s], a_offsets[s + 1], b, b_offsets[t], b_offsets[t + 1])
        keys[k] = spelling_key(edit_distance(table, *span), *span, t)
    return keys
