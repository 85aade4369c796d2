"""The bytes that all models are compared on.

A model whose tokenizer puts BOS (or a prompt) before the text predicts every byte. One without has no
distribution for its first token, so the NLL of those bytes is unknown, not zero. Scoring each model on
the bytes it predicts would reward it for skipping the hardest bytes of a segment.

So one offset is chosen for each segment, from the tokenizers alone and before any model is loaded: the
first byte at which ALL models of the run begin a token whose distribution is known. Bytes before it are
context that every model has read; bytes from it on are scored for every model.

From there on the segment is cut into blocks, again where all models begin a token: the variation of two
models' difference from block to block gives the noise of a single document.
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
        Ascending offsets in bytes, without repeats.
    """
    ends = encoded.byte_ends.astype(np.int64)
    known_from = ends if not encoded.context_ids else np.concatenate([[0], ends])
    return np.unique(known_from)


def common_boundaries(
    encodings: Mapping[str, Sequence[EncodedSegment]],
) -> list[npt.NDArray[np.int64]]:
    """Byte offsets of each segment that are known boundaries of every model.

    Args:
        encodings: For each model its encodings of the same segments, in the same order.

    Returns:
        For each segment its ascending offsets; the last one is the segment's length.
    """
    per_model = [list(segments) for segments in encodings.values()]
    return [
        reduce(np.intersect1d, map(known_boundaries, segment))
        for segment in zip(*per_model, strict=True)
    ]


def block_ends(boundaries: npt.NDArray[np.int64], block_bytes: int) -> npt.NDArray[np.int64]:
    """Cut the scored bytes of a segment into blocks of nearly one size, at boundaries of every model.

    Args:
        boundaries: Boundaries of the segment, from `common_boundaries`.
        block_bytes: Target size. Where models share few boundaries, blocks are larger.

    Returns:
        Ascending end offsets of the blocks, relative to the first boundary. At least one block, which
        has 0 bytes if the models share no boundary.
    """
    offsets = boundaries - boundaries[0]
    size = int(offsets[-1])
    count = max(1, round(size / block_bytes))
    wanted = size * np.arange(1, count + 1) / count
    after = np.searchsorted(offsets, wanted)
    nearer_before = wanted - offsets[np.maximum(after - 1, 0)] < offsets[after] - wanted
    ends = np.unique(offsets[after - nearer_before])
    return ends[ends > 0] if size else ends


def nats_by_block(
    nats: npt.NDArray[np.float64],
    byte_ends: npt.NDArray[np.uint32],
    ends: npt.NDArray[np.int64],
) -> npt.NDArray[np.float64]:
    """Sum the rows of a segment by block.

    Args:
        nats: [N] NLL of each row.
        byte_ends: [N] as `counted_from` gives them.
        ends: From `block_ends`.

    Returns:
        [blocks] nats. A zero-width token between two blocks belongs to the later one, at the end of
        the text to the last one.
    """
    begins = np.concatenate([[0], byte_ends[:-1]]).astype(np.int64)[: len(byte_ends)]
    block = np.minimum(np.searchsorted(ends, begins, side="right"), len(ends) - 1)
    return np.bincount(block, nats, minlength=len(ends)).astype(np.float64)


def counted_from(encoded: EncodedSegment, start: int) -> EncodedSegment:
    """The same segment with the bytes before `start` turned from rows into context.

    Args:
        encoded: One segment as one model reads it.
        start: Byte offset from `known_boundaries`.

    Returns:
        Rows for the tokens from `start` on; byte ends are relative to `start`. A zero-width token at
        `start` (SentencePiece's own space) stays a row: its NLL belongs to what follows.
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
