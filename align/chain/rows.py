"""The rows of a source store as the kernel reads them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from store_schema.compiled import bare, compiled

SPACE = 32


class SourceRows(NamedTuple):
    """R rows of a shard with E entries.

    Args:
        ends: [R] int64 byte ends within the segment.
        ids: [R] real tokens.
        entry_offsets: [R+1] int64.
        entry_ids: [E].
        probabilities: [E] float64.
        labels: [R] float64 probability of the real token, NaN where unknown.
        scales: [R] float64 factor of the entries apart from the real token, see `non_label_scale`.
        tails: [R] float64 what neither they nor the real token hold.
    """

    ends: Any
    ids: Any
    entry_offsets: Any
    entry_ids: Any
    probabilities: Any
    labels: Any
    scales: Any
    tails: Any


@compiled
def non_label_scale(
    ids: Any, entry_offsets: Any, entry_ids: Any, probabilities: Any, labels: Any
) -> Any:
    """Factor of each row's entries apart from the real token, and each row's tail.

    The real token's own probability is known exactly; what its entry says, encoded as it is, does
    not count. The others give way where all would exceed 1.
    """
    scales, tails = np.ones(len(ids)), np.zeros(len(ids))
    for row in range(len(ids)):
        if math.isnan(labels[row]):
            continue
        total = 0.0
        for k in range(entry_offsets[row], entry_offsets[row + 1]):
            if entry_ids[k] != ids[row]:
                total += probabilities[k]
        left = max(1.0 - labels[row], 0.0)
        if total > left:
            scales[row] = left / total
        else:
            tails[row] = left - total
    return scales, tails


@bare
def agrees(data: Any, base: int, text: Any, start: int, stop: int) -> bool:
    """Whether data[base:] begins with text[start:stop]; it is long enough."""
    for offset in range(stop - start):
        if data[base + offset] != text[start + offset]:
            return False
    return True


@compiled
def longest_label(target_ends: Any) -> int:
    """Bytes of the longest target token, at most."""
    longest, begin = 1, 0
    for end in target_ends:
        longest = max(longest, end - begin if end >= begin else end)
        begin = end
    return longest
