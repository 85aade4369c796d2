"""Common spans of a batch's rows, as tensors.

Shape suffixes: B segments, T rows, M sources.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fuse_train.data.samples import Sample
from fuse_train.losses.span_likelihood import NO_SPAN, SpanBatch


def has_spans(sample: Sample) -> bool:
    """Whether the shard was loaded with its spans."""
    return any("span_logprobs" in arrays for arrays in sample.shard.sources)


def collate_spans(samples: Sequence[Sample], width: int) -> SpanBatch:
    """Span of every row, padded.

    Args:
        samples: Of one batch; shards loaded with spans.
        width: T.
    """
    size = (len(samples), width, len(samples[0].shard.sources))
    index_BTM = np.full(size, NO_SPAN, np.int32)
    logprobs_BTM = np.full(size, np.nan, np.float32)
    for b, sample in enumerate(samples):
        for m, arrays in enumerate(sample.shard.sources):
            if "span_logprobs" not in arrays:
                continue
            index = arrays["span_index"][sample.rows].astype(np.int64)
            first = int(arrays["span_offsets"][sample.index])
            index_BTM[b, : len(index), m] = index
            logprobs_BTM[b, : len(index), m] = arrays["span_logprobs"][first + index]
    return SpanBatch(torch.from_numpy(index_BTM), torch.from_numpy(logprobs_BTM))
