"""How often the target's tokenizer goes on past the end of a source token, counted on text.

Shapes: V the source's ids.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from store_schema.plan.plan import Plan
from store_schema.text.encoded import EncodedSegment
from store_schema.text.tokenizer import SegmentTokenizer

COUNTED_TOKENS = 2_000_000
"""Target tokens of text that is counted, at most."""
PRIOR = 4.0
"""Occurrences that the share of all tokens counts for in that of one."""


def past_ends(
    pairs: Iterable[tuple[EncodedSegment, EncodedSegment]], lengths_V: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """[V] chance that a target token reaches across the end of each source token; 0 for those without
    bytes.

    Args:
        pairs: Segments as the source and as the target reads them.
        lengths_V: Bytes of each source token.
    """
    seen_V, past_V = np.zeros(len(lengths_V)), np.zeros(len(lengths_V))
    for source, target in pairs:
        # The end of the last token is the segment's.
        ids, ends = source.token_ids[:-1].astype(np.int64), source.byte_ends[:-1]
        past = ~np.isin(ends, target.byte_ends)
        seen_V += np.bincount(ids, minlength=len(lengths_V))
        past_V += np.bincount(ids[past], minlength=len(lengths_V))
    share = past_V.sum() / max(seen_V.sum(), 1.0)
    return np.where(lengths_V > 0, (past_V + PRIOR * share) / (seen_V + PRIOR), 0.0)


def counted_past_ends(
    plan: Plan, source: SegmentTokenizer, target: SegmentTokenizer
) -> npt.NDArray[np.float64]:
    """`past_ends` on the first `COUNTED_TOKENS` of the split "train" (the first split without one):
    the same in every worker."""
    splits = plan.splits()

    def pairs() -> Iterable[tuple[EncodedSegment, EncodedSegment]]:
        left = COUNTED_TOKENS
        for shard in splits.get("train", next(iter(splits.values()), ())):
            if left <= 0:
                return
            segments = plan.segments(shard)
            read = target.encode(segments)
            left -= sum(len(part.token_ids) for part in read)
            yield from zip(source.encode(segments), read, strict=True)

    return past_ends(pairs(), source.vocabulary.lengths)
