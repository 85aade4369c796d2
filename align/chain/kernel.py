"""The loop that moves a shard's probability mass, compiled. One pass, linear in tokens and entries.

What the target knows before a token is the text so far, in its own tokens. So the loop keeps the
places where the source may stand, with weights: *closed*, the real source tokens end here and a row
begins; *open*, a source token that agrees with the text so far reaches on (the real one apart);
and what is left of 1, *lost*: a token that ended inside the text read and is not the real one, after
which no store says how the source goes on. A position's distribution is the mixture of what each of
them says next; its label's mass, split by where it came from, is the mixture of the next position.
Hence the product of the labels' probabilities over a segment is the source's own, by the chain rule,
and entries + tail = 1 everywhere by construction. docs/alignment.md has the rules and a drawing.

Shapes: D segments, N target positions, R source rows, E entries.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from align.chain.found import (
    Scratch,
    add_mass,
    allocate_found,
    allocate_scratch,
    clear,
    grown,
    heaviest,
)
from align.chain.places import (
    CLOSED,
    NEXT_CLOSED,
    NEXT_OPEN,
    NEXT_PARTIAL,
    NEXT_REAL,
    NUM_NUMBERS,
    NUM_WEIGHTS,
    OPEN,
    PARTIAL,
    REAL,
    W_CLOSED,
    W_REAL,
    Carried,
    Label,
    advance,
    allocate_open,
    open_next,
)
from align.chain.real_path import follow
from align.chain.row_entries import resync, row_begins
from align.chain.rows import SourceRows, longest_label
from align.chain.vocabulary_map import VocabularyMap
from store_schema.compiled import bare, compiled

NONE, BOUNDARY, INSIDE = 0, 1, 2


class ShardText(NamedTuple):
    """D segments as both tokenizers read them; the source's tokens stand in `SourceRows`.

    Args:
        source_offsets: [D+1] int64 source rows of each segment.
        target_offsets: [D+1] int64 target tokens of each segment.
        target_ids: [N].
        target_ends: [N] int64 byte ends within the segment.
        text: [bytes] uint8, all texts end to end.
        text_offsets: [D+1] int64.
        source_marks: [D] uint8, 1 where the source's first token carries a space that is not in the
            text.
        target_marks: [D] uint8, the same of the target's.
    """

    source_offsets: Any
    target_offsets: Any
    target_ids: Any
    target_ends: Any
    text: Any
    text_offsets: Any
    source_marks: Any
    target_marks: Any


class Projected(NamedTuple):
    """Written position by position.

    Args:
        offsets: [N+1] int64 entries of each position.
        ids: uint32.
        masses: float64.
        origin: [N] uint8.
        labels: [N] float64 probability of the label, NaN where unknown.
    """

    offsets: Any
    ids: Any
    masses: Any
    origin: Any
    labels: Any


@compiled
def project_segments(
    shard: ShardText, source: SourceRows, mapping: VocabularyMap, max_entries: int
) -> Projected:
    """Project all segments of a shard, at most `max_entries` kept at each position."""
    num_positions = len(shard.target_ids)
    at_first = (min(num_positions, 2 * len(source.entry_ids) // max_entries + 1)) * max_entries
    out = Projected(
        np.zeros(num_positions + 1, np.int64),
        np.empty(at_first, np.uint32),
        np.empty(at_first, np.float64),
        np.zeros(num_positions, np.uint8),
        np.full(num_positions, np.nan),
    )
    widest = max(np.diff(source.entry_offsets).max(), 1) if len(source.ends) else 1
    # Open tokens began at different bytes, none before the longest token's length.
    lengths = np.diff(mapping.pieces.offsets)
    longest = max(lengths.max(), 1) if len(lengths) else 1
    room = widest * (longest + longest_label(shard.target_ends) + 2)
    vocab_size = len(mapping.target_lengths)
    carried = Carried(
        np.zeros(NUM_NUMBERS, np.int64),
        np.zeros(NUM_WEIGHTS),
        allocate_open(room),
        allocate_open(room),
        np.ones(widest, np.bool_),
        np.ones(widest, np.bool_),
        allocate_found(vocab_size),
    )
    scratch = allocate_scratch(vocab_size)
    written = 0
    for d in range(len(shard.source_offsets) - 1):
        most = (shard.target_offsets[d + 1] - shard.target_offsets[d]) * max_entries
        while written + most > len(out.ids):
            ids, masses = grown(out.ids, written), grown(out.masses, written)
            out = Projected(out.offsets, ids, masses, out.origin, out.labels)
        written = _segment(d, written, max_entries, shard, source, mapping, (carried, scratch), out)
    return Projected(out.offsets, out.ids[:written], out.masses[:written], out.origin, out.labels)


@bare
def _segment(
    d: int,
    written: int,
    max_entries: int,
    shard: ShardText,
    source: SourceRows,
    mapping: VocabularyMap,
    working: tuple[Carried, Scratch],
    out: Projected,
) -> int:
    """Project one segment; returns how many entries are written in all."""
    carried, scratch = working
    number, weight, found = carried.number, carried.weight, carried.found
    first_row, last_row = shard.source_offsets[d], shard.source_offsets[d + 1]
    first, last = shard.target_offsets[d], shard.target_offsets[d + 1]
    row, begin = first_row, 0
    number[OPEN], number[PARTIAL], number[REAL], number[CLOSED] = 0, 0, -1, -1
    if row < last_row and not math.isnan(source.labels[row]):
        number[CLOSED] = row
        weight[W_CLOSED] = 1.0
    for j in range(first, last):
        end, token, at_start = shard.target_ends[j], shard.target_ids[j], j == first
        marked = at_start and shard.target_marks[d] == 1
        label = Label(
            token, begin, end, at_start, marked, last_row, shard.text, shard.text_offsets[d]
        )
        number[NEXT_OPEN], number[NEXT_PARTIAL] = 0, 0
        number[NEXT_REAL], number[NEXT_CLOSED] = -1, -1
        begins_here = number[CLOSED] >= 0
        _open_tokens(label, mapping, carried)
        if number[REAL] >= 0:
            follow(number[REAL], weight[W_REAL], False, label, source, mapping, carried)
        if begins_here:
            lead = shard.source_marks[d] if number[CLOSED] == first_row else 0
            row_begins(lead, label, source, mapping, carried)
        total = found.masses[token]
        if total > 0.0:
            out.labels[j] = total
            out.origin[j] = BOUNDARY if begins_here else INSIDE
            written = heaviest(found, token, max_entries, scratch, out.ids, out.masses, written)
        else:
            number[NEXT_OPEN], number[NEXT_REAL], number[NEXT_CLOSED] = 0, -1, -1
        clear(found)
        if number[NEXT_OPEN] == 0 and number[NEXT_REAL] < 0 and number[NEXT_CLOSED] < 0:
            total = 1.0
            while row < last_row and source.ends[row] <= end:
                row += 1
            if row < last_row and not math.isnan(source.labels[row]):
                row_start = source.ends[row - 1] if row > first_row else 0
                total = resync(row, row_start, label, source, mapping, carried)
        out.offsets[j + 1] = written
        carried = advance(total, carried)
        begin = end
    return int(written)


@bare
def _open_tokens(label: Label, mapping: VocabularyMap, carried: Carried) -> None:
    """What the open source tokens say here: the target begins with the rest of each."""
    at, length, mass = carried.opened
    step = label.end - label.begin
    for i in range(carried.number[OPEN]):
        goal = mapping.pieces.middle[at[i]]
        if goal >= 0:
            add_mass(goal, mass[i], carried.found)
        if goal == label.token:
            open_next(at[i] + step, length[i] - step, mass[i], carried)
