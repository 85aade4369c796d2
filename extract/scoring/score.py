"""The arrays of a source store's shard from its scored segments, and the shard's figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from extract.scoring.rows import ScoredSegment
from store_schema.layout import Arrays
from store_schema.plan.plan import Segment
from store_schema.text.encoded import token_lengths
from store_schema.text.tokenizer import EncodedSegment

TOKENS, NATS, BYTES = "tokens", "nats", "bytes"
UNSCORED = "unscored"
"""Figure of a shard that has segments without distributions (`extract.on_bad: record`): how many."""


def shard_arrays(
    segments: Sequence[Segment],
    encoded: Sequence[EncodedSegment],
    scored: Sequence[ScoredSegment],
) -> Arrays:
    """The arrays of a source store's shard (`store_schema.layout`)."""
    lengths = [len(part.token_ids) for part in encoded]
    counts = np.concatenate([part.counts for part in scored])
    return {
        "segment_ids": np.array([segment.index for segment in segments], np.int64),
        "token_offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "token_ids": np.concatenate([part.token_ids for part in encoded]),
        "byte_ends": np.concatenate([part.byte_ends for part in encoded]),
        "entry_offsets": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        "entry_ids": np.concatenate([part.entry_ids for part in scored]),
        "entry_logprobs": np.concatenate([part.entry_logprobs for part in scored]),
        "tail_mass": np.concatenate([part.tail_mass for part in scored]),
        "label_logprobs": np.concatenate([part.label_logprobs for part in scored]),
    }


def shard_stats(
    segments: Sequence[Segment],
    encoded: Sequence[EncodedSegment],
    scored: Sequence[ScoredSegment],
    seconds: float,
) -> dict[str, float]:
    """Figures of a shard: tokens, nats and the bytes they cover, in all and as "nats/<domain>".

    A first token without context has no probability, so its bytes are not in `bytes`. The end-of-turn
    token counts in `tokens`, but has no bytes, so its nats are not in `nats`.

    Args:
        segments: Of the shard.
        encoded: The same segments as the model read them.
        scored: Their rows.
        seconds: Time that scoring took.
    """
    stats: Counter[str] = Counter()
    for segment, part, row in zip(segments, encoded, scored, strict=True):
        known = ~np.isnan(row.label_logprobs)
        lengths = token_lengths(part.byte_ends)
        tokens = len(known)
        if part.ends_turn:
            known[-1] = False
        figures = {
            TOKENS: tokens,
            NATS: -float(row.label_logprobs[known].sum(dtype=np.float64)),
            BYTES: int(lengths[known].sum()),
        }
        for name, value in figures.items():
            stats[name] += value  # type: ignore[assignment]
            stats[f"{name}/{segment.domain}"] += value  # type: ignore[assignment]
    return {**stats, "seconds": seconds, "tokens_per_s": stats[TOKENS] / max(seconds, 1e-9)}
