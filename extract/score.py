"""One shard: segments through an engine, rows into the arrays of the layout."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from extract.engine import Engine, ScoredSegment, scored_segment
from store_schema.layout import Arrays
from store_schema.plan import Segment
from store_schema.tokenizer import EncodedSegment, SegmentTokenizer

TOKENS, NATS, BYTES = "tokens", "nats", "bytes"


def score_shard(
    engine: Engine,
    tokenizer: SegmentTokenizer,
    segments: Sequence[Segment],
    *,
    on_scored: Callable[[int], None],
) -> tuple[Arrays, dict[str, float]]:
    """Score the segments of a shard.

    Args:
        engine: The loaded model.
        tokenizer: Of the same model.
        segments: Of the shard, in order.
        on_scored: Called with the positions of each segment as it is done; may raise to stop.

    Returns:
        All arrays of a source store's shard, and its figures.

    Raises:
        ModelError: The model gives NaN; names segment and position.
        TokenizerError: A segment's tokens do not join to its text.
    """
    start = time.monotonic()
    encoded = tokenizer.encode(segments)
    scored: list[ScoredSegment | None] = [None] * len(segments)
    for i, dense in engine.score(encoded):
        num_positions = len(encoded[i].token_ids)
        scored[i] = scored_segment(
            dense,
            num_positions,
            vocab_size=tokenizer.vocab_size,
            where=f"segment {segments[i].segment_id}, source {tokenizer.name}",
        )
        on_scored(num_positions)
    rows = [row for row in scored if row is not None]
    arrays = shard_arrays(segments, encoded, rows)
    stats = shard_stats(segments, encoded, rows)
    seconds = time.monotonic() - start
    stats["seconds"] = seconds
    stats["tokens_per_s"] = stats[TOKENS] / seconds
    return arrays, stats


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
) -> dict[str, float]:
    """Figures of a shard: in all, and nats and the bytes they cover as "nats/<domain>".

    A first token with nothing before it has no probability: its bytes are not in `bytes`.
    """
    stats: Counter[str] = Counter()
    for segment, part, row in zip(segments, encoded, scored, strict=True):
        known = ~np.isnan(row.label_logprobs)
        lengths = np.diff(part.byte_ends.astype(np.int64), prepend=0)
        figures = {
            TOKENS: len(known),
            NATS: -float(row.label_logprobs[known].sum(dtype=np.float64)),
            BYTES: int(lengths[known].sum()),
        }
        for name, value in figures.items():
            stats[name] += value  # type: ignore[assignment]
            stats[f"{name}/{segment.domain}"] += value  # type: ignore[assignment]
    return dict(stats)
