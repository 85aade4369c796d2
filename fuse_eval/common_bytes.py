"""Which bytes every model can be compared on.

A model whose tokenizer puts BOS (or a prompt) before the text predicts every byte. One without has
no distribution for its first token, so the cost of those bytes is unknown, not zero. Comparing each
model on what it happens to cover would reward it for skipping the hardest bytes of a segment.

So one offset is chosen for each segment, from the tokenizers alone and before any model is loaded:
the first byte at which ALL models of the run begin a token whose distribution is known. Bytes
before it are context that every model has read; bytes from it on are counted for every model.
Whatever model is scored, alone or with others, is scored on the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

import numpy as np
import numpy.typing as npt

from store_schema.text.tokenizer import EncodedSegment


def known_boundaries(encoded: EncodedSegment) -> npt.NDArray[np.int64]:
    """Byte offsets at which a token with a known distribution begins, and the segment's end.

    Args:
        encoded: One segment as one model reads it.

    Returns:
        Rising offsets in bytes, without repeats.
    """
    ends = encoded.byte_ends.astype(np.int64)
    known_from = ends if not encoded.context_ids else np.concatenate([[0], ends])
    return np.unique(known_from)


def common_starts(
    encodings: Mapping[str, Sequence[EncodedSegment]],
) -> npt.NDArray[np.int64]:
    """First byte of each segment from which every model is counted.

    Args:
        encodings: For each model its encodings of the same segments, in the same order.

    Returns:
        [D] offsets in bytes. One equal to the segment's length means that nothing of the segment
        is shared, and it is left out for all models.
    """
    per_model = [list(segments) for segments in encodings.values()]
    starts = [
        int(reduce(np.intersect1d, map(known_boundaries, segment))[0])
        for segment in zip(*per_model, strict=True)
    ]
    return np.asarray(starts, np.int64)


def counted_from(encoded: EncodedSegment, start: int) -> EncodedSegment:
    """The same segment with the bytes before `start` turned from rows into context.

    Args:
        encoded: One segment as one model reads it.
        start: Byte offset from `known_boundaries`.

    Returns:
        Rows for the tokens from `start` on; byte ends count from `start`. A zero-width token at
        `start` (SentencePiece's own space) stays a row: its cost belongs to what follows.
    """
    if start == 0:
        skipped = 0 if encoded.context_ids else 1
    else:
        skipped = int(np.searchsorted(encoded.byte_ends, start, side="left")) + 1
    return EncodedSegment(
        context_ids=(*encoded.context_ids, *encoded.token_ids[:skipped].tolist()),
        token_ids=encoded.token_ids[skipped:],
        byte_ends=(encoded.byte_ends[skipped:] - np.uint32(start)).astype(np.uint32),
    )
