"""The loop that moves a shard's probability mass, compiled. One pass, linear in tokens and entries.

What the target knows before a token is the text so far, in its own tokens. So the loop keeps the
places where the source may stand, with weights: *closed*, the real source tokens end here and a row
begins; *open*, a source token that agrees with the text so far reaches on (the real one apart);
and what is left of 1, *lost*: a token that ended inside the text read and is not the real one, after
which no store says how the source goes on. A position's distribution is the mixture of what each of
them says next; its label's mass, split by where it came from, is the mixture of the next position.
Hence the product of the labels' probabilities over a segment is the source's own, by the chain rule,
and entries + tail = 1 everywhere by construction. docs/alignment.md has the rules.

Shapes: D segments, N target positions, R source rows, E entries.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from align.chain.found import add_mass, clear, grown, heaviest, room_for
from align.chain.places import (
    CLOSED,
    FOUND,
    NEXT_CLOSED,
    NEXT_OPEN,
    NEXT_PARTIAL,
    NEXT_REAL,
    NUM_WEIGHTS,
    OPEN,
    PARTIAL,
    REAL,
    W_CLOSED,
    W_NEXT_REAL,
    W_REAL,
    open_next,
)
from align.chain.real_path import follow
from align.chain.row_entries import row_begins, take_up
from align.chain.rows import longest_label, others
from store_schema.compiled import bare, compiled

NONE, BOUNDARY, INSIDE = 0, 1, 2


@compiled
def project_segments(
    segment_rows: Any,
    target_ids: Any,
    target_ends: Any,
    text: Any,
    text_offsets: Any,
    marks: Any,
    source: Any,
    tables: Any,
    target_vocab_size: int,
    max_entries: int,
) -> Any:
    """Project all segments of a shard.

    Args:
        segment_rows: (source token offsets [D+1], target token offsets [D+1]), int64.
        target_ids: [N] target tokens.
        target_ends: [N] int64 byte ends within the segment.
        text: [bytes] uint8, all texts end to end.
        text_offsets: [D+1] int64.
        marks: ([D], [D]) uint8, 1 where the source's, the target's first token carries a space that is
            not in the text.
        source: (ends [R] int64, ids [R], entry_offsets [R+1], entry_ids [E], probabilities [E]
            float64, label probabilities [R] float64 with NaN where unknown).
        tables: (data, offsets, middle, start) of the PieceTable, CSR (offsets, target ids, weights) of
            whole source tokens, EOS of source and target (-1 for none), arrays of the TargetTrie,
            whether to look ahead.
        target_vocab_size: Ids of the target are below it.
        max_entries: Kept at each position, at most.

    Returns:
        entry offsets [N+1], entry ids, entry masses (float64), origin [N], label probability [N]
        (NaN unknown).
    """
    source_offsets, target_offsets = segment_rows
    source_marks, target_marks = marks
    ends, ids, entry_offsets, entry_ids, probabilities, labels = source
    source = (*source, *others(ids, entry_offsets, entry_ids, probabilities, labels))
    num_positions = len(target_ids)
    out_offsets = np.zeros(num_positions + 1, np.int64)
    at_first = min(num_positions, 2 * len(entry_ids) // max_entries + 1)
    out_ids = np.empty(at_first * max_entries, np.uint32)
    out_mass = np.empty(len(out_ids), np.float64)
    origin = np.zeros(num_positions, np.uint8)
    label_mass = np.full(num_positions, np.nan)
    widest = max(np.diff(entry_offsets).max(), 1) if len(ends) else 1
    # Open tokens began at different bytes, none before the longest token's length.
    longest = max(np.diff(tables[1]).max(), 1) if len(tables[1]) > 1 else 1
    room = widest * (longest + longest_label(target_ends) + 2)
    carried = (
        (np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room)),
        (np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room)),
        (np.ones(widest, np.bool_), np.ones(widest, np.bool_)),
        np.zeros(FOUND + 1, np.int64),
        np.zeros(NUM_WEIGHTS),
    )
    working = room_for(target_vocab_size)
    written = 0
    for d in range(len(source_offsets) - 1):
        first, last = target_offsets[d], target_offsets[d + 1]
        while written + (last - first) * max_entries > len(out_ids):
            out_ids, out_mass = grown(out_ids, written), grown(out_mass, written)
        rows = (source_offsets[d], source_offsets[d + 1])
        both_marks = (source_marks[d], target_marks[d])
        out = (out_offsets, out_ids, out_mass, origin, label_mass)
        written = _segment(
            rows, (first, last), both_marks, text_offsets[d], written, max_entries, target_ids,
            target_ends, text, source, tables, carried, working, out,
        )  # fmt: skip
    return out_offsets, out_ids[:written], out_mass[:written], origin, label_mass


@bare
def _segment(
    rows: Any, positions: Any, marks: Any, text_start: int, written: int, max_entries: int,
    target_ids: Any, target_ends: Any, text: Any, source: Any, tables: Any, carried: Any, working: Any,
    out: Any,
) -> int:  # fmt: skip
    """Project one segment; returns how many entries are written in all."""
    first_row, last_row = rows
    ends, labels, middle = source[0], source[5], tables[2]
    out_offsets, out_ids, out_mass, origin, label_mass = out
    opened, following, (counts, next_counts), state, weight = carried
    masses, tokens = working[0], working[1]
    found = (masses, tokens)
    row = first_row
    begin = 0
    state[OPEN], state[PARTIAL], state[REAL], state[CLOSED] = 0, 0, -1, -1
    if row < last_row and not math.isnan(labels[row]):
        state[CLOSED] = row
        weight[W_CLOSED] = 1.0
    for j in range(positions[0], positions[1]):
        end, label = target_ends[j], target_ids[j]
        at_start = j == positions[0]
        place = (begin, end, label, last_row, text_start, at_start and marks[1] == 1, text)
        state[NEXT_OPEN], state[NEXT_PARTIAL], state[FOUND] = 0, 0, 0
        state[NEXT_REAL], state[NEXT_CLOSED] = -1, -1
        begins_here = state[CLOSED] >= 0
        at, length, mass = opened
        step = end - begin
        for i in range(state[OPEN]):
            goal = middle[at[i]]
            if goal >= 0:
                add_mass(goal, mass[i], state, found)
            if goal == label:
                open_next(at[i] + step, length[i] - step, mass[i], state, following)
        if state[REAL] >= 0:
            follow(
                state[REAL], weight[W_REAL], False, place, source, tables, state, weight, following,
                next_counts, found,
            )  # fmt: skip
        if begins_here:
            lead = marks[0] if state[CLOSED] == first_row else 0
            row_begins(
                lead, at_start, place, source, tables, state, weight, following, counts, next_counts,
                found,
            )  # fmt: skip
        total = masses[label]
        if total > 0.0:
            label_mass[j] = total
            origin[j] = BOUNDARY if begins_here else INSIDE
            written = heaviest(
                state[FOUND], label, max_entries, working, out_ids, out_mass, written
            )
        else:
            state[NEXT_OPEN], state[NEXT_REAL], state[NEXT_CLOSED] = 0, -1, -1
        clear(state[FOUND], masses, tokens)
        if state[NEXT_OPEN] == 0 and state[NEXT_REAL] < 0 and state[NEXT_CLOSED] < 0:
            total = 1.0
            while row < last_row and ends[row] <= end:
                row += 1
            if row < last_row and not math.isnan(labels[row]):
                row_start = ends[row - 1] if row > first_row else 0
                total = take_up(
                    row, row_start, end, text, text_start, source, tables, state, weight, following
                )
        out_offsets[j + 1] = written
        _advance(total, state, weight, following[2])
        opened, following = following, opened
        counts, next_counts = next_counts, counts
        begin = end
    return int(written)


@bare
def _advance(total: float, state: Any, weight: Any, mass: Any) -> None:
    """Make the next position's mixture the present one, its weights shares of `total`."""
    for i in range(NEXT_OPEN):
        state[i] = state[NEXT_OPEN + i]
    for i in range(W_NEXT_REAL):
        weight[i] = weight[W_NEXT_REAL + i]
    weight[W_REAL] /= total
    weight[W_CLOSED] /= total
    for i in range(state[OPEN]):
        mass[i] /= total
