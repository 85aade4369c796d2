"""Method `mined` (FuseLLM): tokens matched by dynamic time warping, entries by least edit distance.

A target token has a distribution where the warping path matches it to exactly one source token and the
two are the same: the same bytes, or the vocabulary map sends the source token to that target token. The
row of that source token is then mapped; entries that map to one target token are summed. All other
positions have no entries, tail 1 and origin none.

Row i is the distribution of token i on both sides. In the public code, row i of the stored logits
predicts token i + 1 but is used under the match of token i, and where tokens do not match, that row is
a one-hot of token i: off by one. Here both are of token i.

Departures, each undone by an option (`MinedAligner.as_published` undoes all): the tail stays, where the
public code has a softmax over the stored entries; no one-hot; entries that map to one token are
summed, where the public code keeps the first; and the label has the real source token's exact
probability, which a store has even where the token is no entry.

Source: FuseLLM, arXiv 2401.10491, section 3.2 and its public code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from align.methods.shard_arrays import MappedRows, join_segments, mapped_arrays
from align.papers.convert import LOSSLESS, ConvertOptions, convert_all
from align.papers.dtw import BAND_BYTES, match_segments
from store_schema.compiled import compiled
from store_schema.errors import MismatchError
from store_schema.layout import Arrays
from store_schema.text.tokenizer import EncodedSegment

_BOUNDARY, _INSIDE = 1, 2


@dataclass(frozen=True, slots=True)
class MinedAligner:
    """The method, prepared for one source and one target.

    Args:
        token_map: [V] int32 target token of each source token, -1 for none
            (`mined_vocabulary.nearest_tokens`).
        target_vocab_size: All target ids are below it.
        options: How a matched row is mapped.
        band_bytes: Bytes between matched tokens, at most.
    """

    token_map: npt.NDArray[np.int32]
    target_vocab_size: int
    options: ConvertOptions = LOSSLESS
    band_bytes: int = BAND_BYTES

    @classmethod
    def as_published(
        cls, token_map: npt.NDArray[np.int32], target_vocab_size: int, max_entries: int = 64
    ) -> MinedAligner:
        """With all choices of the public code, except that rows are not off by one."""
        options = ConvertOptions(
            max_entries, one_hot=True, renormalise=True, sum_merged=False, exact_label=False
        )
        return cls(token_map, target_vocab_size, options)

    def align(
        self, source: Arrays, texts: Sequence[bytes], target: Sequence[EncodedSegment]
    ) -> Arrays:
        """Aligned arrays of one shard.

        Args:
            source: The source store's arrays of the shard.
            texts: UTF-8 text of each segment, in the order of the shard.
            target: The same segments as the target's tokenizer reads them.

        Raises:
            MismatchError: Tokens end past their text, or ids are outside the map.
        """
        target_ids, target_ends, target_offsets = join_segments(target)
        source_ends = source["byte_ends"].astype(np.int64)
        segment_rows = (source["token_offsets"], target_offsets)
        data, text_offsets = join_texts(texts)
        require_text(source["token_offsets"], source_ends, text_offsets, "source store")
        require_text(target_offsets, target_ends, text_offsets, "target's tokens")
        require_ids(source, len(self.token_map))
        matched = match_segments(
            segment_rows, source_ends, target_ends, data, text_offsets, self.band_bytes
        )
        ends = (source_ends, target_ends)
        ids = (source["token_ids"], target_ids)
        rows, origin = _same_tokens(
            segment_rows, ends, ids, data, text_offsets, matched, self.token_map
        )
        offsets, entry_ids, mass, label_mass = convert_all(
            rows, target_ids, source, self.token_map, self.target_vocab_size, self.options
        )
        made = MappedRows(offsets, entry_ids, mass, label_mass, origin)
        return mapped_arrays(source, (target_ids, target_ends, target_offsets), made)


def join_texts(texts: Sequence[bytes]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Texts end to end [bytes] uint8, and where each begins [D+1]."""
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    return np.frombuffer(b"".join(texts), np.uint8), np.concatenate(([0], np.cumsum(lengths)))


def require_text(
    token_offsets: npt.NDArray[np.int64],
    ends: npt.NDArray[np.int64],
    text_offsets: npt.NDArray[np.int64],
    where: str,
) -> None:
    """Refuse tokens that do not end with their texts: compiled code reads there without a bounds check.

    Args:
        token_offsets: [D+1] where each segment's tokens begin.
        ends: [N] byte after each token, within its segment.
        text_offsets: [D+1] where each segment's text begins.
        where: For messages.

    Raises:
        MismatchError: They do not.
    """
    lengths = np.diff(text_offsets)
    if len(token_offsets) != len(text_offsets):
        raise MismatchError(
            "segments are not those of the texts",
            where=where,
            expected=f"{len(lengths)} segments",
            got=len(token_offsets) - 1,
        )
    some = np.flatnonzero(np.diff(token_offsets) > 0)
    last = ends[token_offsets[1:][some] - 1]
    wrong = np.flatnonzero(last != lengths[some])
    if len(wrong):
        raise MismatchError(
            f"tokens of segment {some[wrong[0]]} of the shard do not end with its text",
            where=where,
            expected=f"{lengths[some][wrong[0]]} bytes",
            got=f"{last[wrong[0]]} bytes",
            hint="plan, store and tokenizer must belong together",
        )


def require_ids(source: Arrays, size: int) -> None:
    """Refuse a source store with ids that a map of `size` source tokens does not have.

    Raises:
        MismatchError: Names the array.
    """
    for name in ("token_ids", "entry_ids"):
        worst = int(source[name].max(initial=0))
        if worst >= size and len(source[name]):
            raise MismatchError(
                "token outside the vocabulary map",
                where=f"source store, array {name}",
                expected=f"ids below {size}",
                got=worst,
                hint="build the map from the store's own vocabulary",
            )


@compiled
def _same_tokens(
    segment_rows: Any,
    ends: Any,
    ids: Any,
    text: Any,
    text_offsets: Any,
    matched: Any,
    token_map: Any,
) -> tuple[Any, Any]:
    """The source row matched to each target token [N], -1 for none, and the origin [N]."""
    source_offsets, target_offsets = segment_rows
    source_ends, target_ends = ends
    source_ids, target_ids = ids
    first, last = matched
    rows = np.full(len(target_ends), -1, np.int64)
    origin = np.full(len(target_ends), _INSIDE, np.uint8)
    for d in range(len(source_offsets) - 1):
        begin = 0
        for j in range(target_offsets[d], target_offsets[d + 1]):
            row = first[j]
            if row >= 0 and row == last[j]:
                start = source_ends[row - 1] if row > source_offsets[d] else 0
                same = token_map[source_ids[row]] == target_ids[j]
                if not same and source_ends[row] - start == target_ends[j] - begin:
                    same = True
                    for k in range(target_ends[j] - begin):
                        if text[text_offsets[d] + start + k] != text[text_offsets[d] + begin + k]:
                            same = False
                            break
                if same:
                    rows[j] = row
                    if start == begin:
                        origin[j] = _BOUNDARY
            begin = target_ends[j]
    return rows, origin
