"""The rows of a source store as the kernel reads them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from store_schema.compiled import bare, compiled
from store_schema.layout import Arrays, branch_entries, row_sums

SPACE = 32


class BranchRows(NamedTuple):
    """B branches of a shard with F entries.

    Args:
        of_entry: [E] int64 branch of each entry, -1 for none; empty where the shard has none at all.
        offsets: [B+1] int64, where each branch's entries begin.
        ids: [F] source tokens.
        probabilities: [F] float64; with the tail 1 in sum.
        tails: [B] float64.
    """

    of_entry: Any
    offsets: Any
    ids: Any
    probabilities: Any
    tails: Any

    @classmethod
    def of(cls, source: Arrays) -> BranchRows:
        """Those of a source store's shard; none if it has no branches."""
        if not len(source.get("branch_tokens", ())):
            none = np.empty(0, np.int64)
            return cls(none, np.zeros(1, np.int64), np.empty(0, "<u4"), np.empty(0), np.empty(0))
        of_entry = np.full(len(source["entry_ids"]), -1, np.int64)
        of_entry[branch_entries(source)] = np.arange(len(source["branch_tokens"]))
        offsets = source["branch_entry_offsets"]
        probabilities = np.exp(source["branch_entry_logprobs"].astype(np.float64))
        sums = row_sums(probabilities, offsets)
        scales = 1.0 / np.maximum(sums, 1.0)
        return cls(
            of_entry,
            offsets,
            source["branch_entry_ids"],
            probabilities * np.repeat(scales, np.diff(offsets)),
            np.maximum(1.0 - sums, 0.0),
        )


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
        tail_scales: [R] float64 factor of the shares of tokens that only the tail can hold, see
            `TailTokens.scales`.
        branches: What follows some of the entries.
    """

    ends: Any
    ids: Any
    entry_offsets: Any
    entry_ids: Any
    probabilities: Any
    labels: Any
    scales: Any
    tails: Any
    tail_scales: Any
    branches: BranchRows


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
def longest_row(offsets: Any) -> int:
    """The largest step from one offset to the next; 0 where there are fewer than two."""
    longest = 0
    for i in range(len(offsets) - 1):
        longest = max(longest, offsets[i + 1] - offsets[i])
    return longest


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
