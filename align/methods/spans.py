"""Common spans: the bytes between two offsets where both a source and a target token end."""

from __future__ import annotations

from typing import Any

import numpy as np

from store_schema.compiled import compiled


@compiled
def common_spans(segment_rows: Any, source_ends: Any, target_ends: Any, label_logprobs: Any) -> Any:
    """The common spans of all segments of a shard.

    Args:
        segment_rows: (source token offsets [D+1], target token offsets [D+1]), int64.
        source_ends: [source positions] int64 byte after each token, within its segment.
        target_ends: [N] int64, the same of the target.
        label_logprobs: [source positions] float64 nats, NaN where unknown.

    Returns:
        Span offsets [D+1], span index of each target token within its segment [N], byte ends [S] and
        log-probabilities [S] of spans (NaN where a token's is unknown).
    """
    source_offsets, target_offsets = segment_rows
    num_segments = len(source_offsets) - 1
    span_offsets = np.zeros(num_segments + 1, np.int64)
    span_index = np.zeros(len(target_ends), np.uint32)
    span_ends = np.empty(len(target_ends), np.uint32)
    span_logprobs = np.empty(len(target_ends), np.float64)
    total = 0
    for d in range(num_segments):
        row = source_offsets[d]
        logprob = 0.0
        first_span = total
        for j in range(target_offsets[d], target_offsets[d + 1]):
            span_index[j] = total - first_span
            while row < source_offsets[d + 1] and source_ends[row] <= target_ends[j]:
                logprob += label_logprobs[row]
                row += 1
            is_common = row > source_offsets[d] and source_ends[row - 1] == target_ends[j]
            if is_common and target_ends[j] > 0:
                last = j + 1 == target_offsets[d + 1]
                if last or target_ends[j + 1] > target_ends[j]:
                    span_ends[total] = target_ends[j]
                    span_logprobs[total] = logprob
                    total += 1
                    logprob = 0.0
        span_offsets[d + 1] = total
    return span_offsets, span_index, span_ends[:total], span_logprobs[:total]
