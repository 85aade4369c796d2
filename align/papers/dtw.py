"""Match the tokens of two tokenizers on one text by dynamic time warping, banded on bytes, compiled.

The cost of a cell is the edit distance between the two tokens' bytes in the text, so a word mark counts
as the space it stands for, and not at all where the text has no space. A cell (i, j) is reached from
(i-1, j-1), (i-1, j) or (i, j-1), the first of them that is cheapest.

Only cells whose tokens are within a band of bytes of each other are computed. Where the best path of
the whole table lies inside the band, the banded path is the same, ties included. On the samples of the
tests (prose, code, CJK, emoji; small tokenizers) it does. It leaves the band where one side has a
token for a long run of spaces or letters and the other has none; there the two paths differ. Time and
memory are linear in the length of a segment.

Source: FuseLLM, arXiv 2401.10491, section 3.2 (the recursion and the cost). The public code takes
word marks away before it compares and counts characters of the tokenizer's alphabet; here they are
spaces and bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from store_schema.compiled import compiled

BAND_BYTES = 32
"""Bytes between two matched tokens, at most."""
WORD_BITS = 64
_ONE = np.uint64(1)
_ZERO = np.uint64(0)
_FAR = np.int64(1) << 60
_BOTH, _SOURCE, _TARGET = 0, 1, 2


@compiled
def set_pattern(table: Any, data: Any, start: int, stop: int) -> None:
    """Set in `table` [256] uint64, for each byte value, a bit at each of its places in data[start:stop]
    (at most 64 bytes)."""
    for k in range(start, stop):
        table[data[k]] |= _ONE << np.uint64(k - start)


@compiled
def clear_pattern(table: Any, data: Any, start: int, stop: int) -> None:
    """Undo `set_pattern`."""
    for k in range(start, stop):
        table[data[k]] = _ZERO


@compiled
def pattern_distance(table: Any, length: int, data: Any, start: int, stop: int) -> int:
    """Edit distance of the `length` bytes in `table` to data[start:stop], one word at a time.

    Source: Myers 1999 (A fast bit-vector algorithm for approximate string matching), in Hyyro's form
        for the distance between whole strings.
    """
    if length == 0:
        return stop - start
    last = _ONE << np.uint64(length - 1)
    up = ~_ZERO
    down = _ZERO
    distance = length
    for k in range(start, stop):
        same = table[data[k]]
        vertical = same | down
        horizontal = (((same & up) + up) ^ up) | same
        rises = down | ~(horizontal | up)
        falls = up & horizontal
        if rises & last != _ZERO:
            distance += 1
        elif falls & last != _ZERO:
            distance -= 1
        rises = (rises << _ONE) | _ONE
        falls = falls << _ONE
        up = falls | ~(vertical | rises)
        down = rises & vertical
    return distance


@compiled
def long_distance(a: Any, a_start: int, a_stop: int, b: Any, b_start: int, b_stop: int) -> int:
    """Edit distance of a[a_start:a_stop] and b[b_start:b_stop] of any length, by the plain table."""
    width = b_stop - b_start
    row = np.arange(width + 1)
    for i in range(a_stop - a_start):
        corner = row[0]
        row[0] = i + 1
        for j in range(width):
            above = row[j + 1]
            change = 0 if a[a_start + i] == b[b_start + j] else 1
            row[j + 1] = min(corner + change, above + 1, row[j] + 1)
            corner = above
    return row[width]


@compiled
def edit_distance(
    table: Any, a: Any, a_start: int, a_stop: int, b: Any, b_start: int, b_stop: int
) -> int:
    """Edit distance of a[a_start:a_stop] and b[b_start:b_stop].

    Args:
        table: [256] uint64 buffer of zeros; zeros again on return.
        a: uint8, with the first string at [a_start, a_stop).
        b: uint8, with the second string at [b_start, b_stop).
    """
    if a_stop - a_start <= WORD_BITS:
        set_pattern(table, a, a_start, a_stop)
        distance = pattern_distance(table, a_stop - a_start, b, b_start, b_stop)
        clear_pattern(table, a, a_start, a_stop)
        return distance
    if b_stop - b_start <= WORD_BITS:
        set_pattern(table, b, b_start, b_stop)
        distance = pattern_distance(table, b_stop - b_start, a, a_start, a_stop)
        clear_pattern(table, b, b_start, b_stop)
        return distance
    return long_distance(a, a_start, a_stop, b, b_start, b_stop)


@compiled
def _band(source_ends: Any, target_ends: Any, width: int) -> tuple[Any, Any]:
    """First and last target token in the band of each source token [R]; both rise, and consecutive
    rows overlap."""
    num_target = len(target_ends)
    lows = np.empty(len(source_ends), np.int64)
    highs = np.empty(len(source_ends), np.int64)
    low, high, begin = 0, 0, 0
    for i in range(len(source_ends)):
        while low + 1 < num_target and target_ends[low] < begin - width:
            low += 1
        while high + 1 < num_target and target_ends[high] <= source_ends[i] + width:
            high += 1
        lows[i] = low
        highs[i] = high
        begin = source_ends[i]
    highs[-1] = num_target - 1
    return lows, highs


@compiled
def _moves(
    source_ends: Any, target_ends: Any, text: Any, lows: Any, highs: Any, starts: Any, table: Any
) -> Any:
    """The move by which each cell of the band is reached: uint8, rows end to end, beginning at
    `starts`."""
    moves = np.empty(starts[-1], np.uint8)
    costs = np.full(len(target_ends), _FAR)  # of the row above, overwritten from the left
    previous_low = 0
    begin = 0
    for i in range(len(source_ends)):
        end = source_ends[i]
        length = end - begin
        if length <= WORD_BITS:
            set_pattern(table, text, begin, end)
        low = lows[i]
        corner = costs[low - 1] if low > previous_low else _FAR
        left = _FAR
        for j in range(low, highs[i] + 1):
            start = target_ends[j - 1] if j > 0 else 0
            above = costs[j]
            move = _BOTH
            least = corner
            if above < least:
                move = _SOURCE
                least = above
            if left < least:
                move = _TARGET
                least = left
            if i == 0 and j == 0:
                least = 0
            if length <= WORD_BITS:
                cost = pattern_distance(table, length, text, start, target_ends[j])
            else:
                cost = edit_distance(table, text, begin, end, text, start, target_ends[j])
            left = least + cost
            costs[j] = left
            corner = above
            moves[starts[i] + j - low] = move
        if length <= WORD_BITS:
            clear_pattern(table, text, begin, end)
        previous_low = low
        begin = end
    return moves


@compiled
def _match_segment(
    source_ends: Any, target_ends: Any, text: Any, width: int, table: Any, first: Any, last: Any
) -> None:
    """First and last source token on the path at each target token of one segment."""
    lows, highs = _band(source_ends, target_ends, width)
    starts = np.zeros(len(source_ends) + 1, np.int64)
    starts[1:] = np.cumsum(highs - lows + 1)
    moves = _moves(source_ends, target_ends, text, lows, highs, starts, table)
    i, j = len(source_ends) - 1, len(target_ends) - 1
    last[j] = i
    while i > 0 or j > 0:
        move = moves[starts[i] + j - lows[i]]
        if move != _TARGET:
            i -= 1
        if move != _SOURCE:
            first[j] = i + 1 if move == _BOTH else i
            j -= 1
            last[j] = i
    first[0] = 0


@compiled
def match_segments(
    segment_rows: Any,
    source_ends: Any,
    target_ends: Any,
    text: Any,
    text_offsets: Any,
    width: int = BAND_BYTES,
) -> tuple[Any, Any]:
    """Match the tokens of all segments of a shard.

    Args:
        segment_rows: (source token offsets [D+1], target token offsets [D+1]), int64.
        source_ends: [source positions] int64 byte ends within the segment.
        target_ends: [N] int64, the same of the target.
        text: [bytes] uint8, all texts end to end.
        text_offsets: [D+1] int64.
        width: Bytes between matched tokens, at most.

    Returns:
        first [N], last [N] int64: first and last source row matched to each target token; -1 where a
        segment has no tokens on one side.
    """
    source_offsets, target_offsets = segment_rows
    first = np.full(len(target_ends), -1, np.int64)
    last = np.full(len(target_ends), -1, np.int64)
    table = np.zeros(256, np.uint64)
    for d in range(len(source_offsets) - 1):
        s0, s1 = source_offsets[d], source_offsets[d + 1]
        t0, t1 = target_offsets[d], target_offsets[d + 1]
        if s0 == s1 or t0 == t1:
            continue
        _match_segment(
            source_ends[s0:s1], target_ends[t0:t1], text[text_offsets[d] : text_offsets[d + 1]],
            width, table, first[t0:t1], last[t0:t1],
        )  # fmt: skip
        first[t0:t1] += s0
        last[t0:t1] += s0
    return first, last
