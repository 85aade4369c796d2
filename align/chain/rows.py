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
        ends: [R] int64 byte after each token, within the segment.
        ids: [R] real tokens.
        entry_offsets: [R+1] int64, where each row's entries begin.
        entry_ids: [E] source tokens.
        probabilities: [E] float64.
        labels: [R] float64 probability of the real token, NaN where unknown.
        scales: [R] float64 factor of all entries but the real token's, see `non_label_scale`.
        tails: [R] float64 1 - the real token's probability - that of the scaled entries.
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
    """Factor for each row's entries other than the real token's, and each row's tail.

    The store has the real token's exact probability, which is used in place of its rounded entry. Where
    the row's sum then exceeds 1, the other entries are scaled down.

    Returns:
        Factors [R] float64, at most 1, and tails [R] float64; 1 and 0 where the label is unknown.
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
    """Whether data[base:], which must be long enough, begins with text[start:stop]."""
    for offset in range(stop - start):
        if data[base + offset] != text[start + offset]:
            return False
    return True


@compiled
def longest_label(target_ends: Any) -> int:
    """An upper bound of the bytes of a target token, at least 1.

    Args:
        target_ends: [N] byte after each target token, within its segment.
    """
    longest, begin = 1, 0
    for end in target_ends:
        longest = max(longest, end - begin if end >= begin else end)
        begin = end
    return longest
