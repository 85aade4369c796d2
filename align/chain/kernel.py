"""The loop that moves a shard's probability mass, compiled. One pass, linear in tokens and entries.

Before each target token, the loop holds the probability of each state that the source may be in, given
the text so far: *closed*, its real tokens end here and a row begins; *open*, one of its tokens agrees
with the text so far and reaches beyond it (the real token is kept apart from the others); *lost*, the
rest of 1: a token other than the real one ended inside the text, and no stored row has what follows
it. The distribution of a position is the mixture of the next bytes in each state, and the mass of its
label, divided by state, gives the probabilities of the states at the next position. So by the chain
rule the product of the labels' probabilities over a segment is the source's own, and entries + tail =
1 at every position. docs/alignment.md has the rules and a drawing.

Shapes: D segments, N target positions, R source rows, E entries.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from align.chain.branch_rows import Ahead, go_on
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
from align.chain.row_entries import branch_begins, resync, row_begins
from align.chain.rows import SourceRows, longest_label, longest_row
from align.chain.target_mass import (
    Scratch,
    add_mass,
    allocate_scratch,
    allocate_target_mass,
    clear,
    grown,
    heaviest,
)
from align.chain.vocabulary_map import VocabularyMap
from store_schema.compiled import bare, compiled

NONE, BOUNDARY, INSIDE = 0, 1, 2


class ShardText(NamedTuple):
    """D segments: their text and target tokens. The source's tokens are in `SourceRows`.

    Args:
        source_offsets: [D+1] int64, where each segment's source rows begin.
        target_offsets: [D+1] int64, where each segment's target tokens begin.
        target_ids: [N] target tokens.
        target_ends: [N] int64 byte after each target token, within the segment.
        text: [bytes] uint8, all texts end to end.
        text_offsets: [D+1] int64, where each segment's text begins.
        source_marks: [D] uint8, 1 where the source's first token begins with a space that is not in the
            text (a word mark).
        target_marks: [D] uint8, the same of the target's first token.
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
    """Entries of all target positions.

    Args:
        offsets: [N+1] int64, where each position's entries begin.
        ids: [E] uint32 target tokens.
        masses: [E] float64 probabilities.
        origin: [N] uint8, see `store_schema.layout.Origin`.
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
    """Carry all segments of a shard into the target's tokens.

    Args:
        shard: Texts and target tokens.
        source: The source's rows.
        mapping: Between the two vocabularies.
        max_entries: Entries kept at each position, at most.
    """
    num_positions = len(shard.target_ids)
    at_first = (min(num_positions, 2 * len(source.entry_ids) // max_entries + 1)) * max_entries
    out = Projected(
        np.zeros(num_positions + 1, np.int64),
        np.empty(at_first, np.uint32),
        np.empty(at_first, np.float64),
        np.zeros(num_positions, np.uint8),
        np.full(num_positions, np.nan),
    )
    widest = max(longest_row(source.entry_offsets), 1)
    # Open tokens begin within the last `longest` bytes, with one row's entries at each byte.
    longest = max(longest_row(mapping.pieces.offsets), 1)
    most = widest + longest_row(mapping.tail.offsets)
    room = most * (longest + longest_label(shard.target_ends) + 2)
    # Each of a row's entries may open those of its branch.
    room *= 1 + longest_row(source.branches.offsets)
    vocab_size = len(mapping.target_lengths)
    carried = Carried(
        np.zeros(NUM_NUMBERS, np.int64),
        np.zeros(NUM_WEIGHTS),
        allocate_open(room),
        allocate_open(room),
        np.ones(widest, np.bool_),
        np.ones(widest, np.bool_),
        allocate_target_mass(vocab_size),
    )
    scratch = allocate_scratch(vocab_size)
    written = np.int64(0)  # a literal is another type, for which all would be compiled twice
    for d in range(len(shard.source_offsets) - 1):
        needed = (shard.target_offsets[d + 1] - shard.target_offsets[d]) * max_entries
        while written + needed > len(out.ids):
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
    """Project one segment; returns the number of entries written so far, over all segments."""
    carried, scratch = working
    number, weight, target_mass = carried.number, carried.weight, carried.target_mass
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
        _open_tokens(label, source, mapping, carried)
        if number[REAL] >= 0:
            follow(number[REAL], weight[W_REAL], np.bool_(False), label, source, mapping, carried)
        if begins_here:
            lead = shard.source_marks[d] if number[CLOSED] == first_row else 0
            row_begins(lead, label, source, mapping, carried)
        total = target_mass.masses[token]
        if total > 0.0:
            out.labels[j] = total
            out.origin[j] = BOUNDARY if begins_here else INSIDE
            written = heaviest(
                target_mass, token, max_entries, scratch, out.ids, out.masses, written
            )
        else:
            number[NEXT_OPEN], number[NEXT_REAL], number[NEXT_CLOSED] = 0, -1, -1
        clear(target_mass)
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
def _open_tokens(
    label: Label, source: SourceRows, mapping: VocabularyMap, carried: Carried
) -> None:
    """Add the mass of each open source token to the first target token of its remaining bytes, or where
    its branch leads."""
    at, length, mass, branches = carried.opened
    step = label.end - label.begin
    for i in range(carried.number[OPEN]):
        part, branch = mass[i], branches[i]
        if branch >= 0 and length[i] == 0:
            branch_begins(branch, part, label, source, mapping, carried)
            continue
        if branch >= 0:
            ahead = Ahead(branch, -1, 0, at[i], length[i], step)
            part, branch = go_on(ahead, part, label, source, mapping, carried)
        goal = mapping.pieces.middle[at[i]]
        if goal >= 0:
            add_mass(goal, part, carried.target_mass)
        if goal == label.token:
            open_next(at[i] + step, length[i] - step, part, branch, carried)
