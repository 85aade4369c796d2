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
from numba import njit

from align.found import FOUND, add_mass, grown, heaviest
from align.rows import agrees, longest_label, others
from align.trie import token_of, walk

SPACE = 32
NONE, BOUNDARY, INSIDE = 0, 1, 2
LEAST_SPREAD = 1e-5
"""Less than this of an entry's mass goes to the tail, not to a further target token."""

# Places of `state`, integers: how many open, row of the real open token, row that begins here, whether
# only part of that row still counts; the same for the next position; tokens found.
OPEN, REAL, CLOSED, PARTIAL = range(4)
NEXT_OPEN, NEXT_REAL, NEXT_CLOSED, NEXT_PARTIAL = range(4, 8)
# Places of `weight`: of the real open token, of the row that begins here, that row's mass that
# counts; the same for the next position.
W_REAL, W_CLOSED, W_COUNTS = range(3)
W_NEXT_REAL, W_NEXT_CLOSED, W_NEXT_COUNTS = range(3, 6)


@njit(cache=True, nogil=True)
def _open_next(at: int, length: int, mass: float, state: Any, following: Any) -> None:
    """Note a source token that reaches `length` bytes beyond the label."""
    next_at, next_length, next_mass = following
    place = state[NEXT_OPEN]
    if length > 0 and mass > 0.0 and place < len(next_at):
        next_at[place] = at
        next_length[place] = length
        next_mass[place] = mass
        state[NEXT_OPEN] += 1


@njit(cache=True, nogil=True)
def _path(
    row: int, mass: float, ambiguous: bool, place: Any, source: Any, tables: Any, state: Any,
    weight: Any, following: Any, next_counts: Any, found: Any,
) -> None:  # fmt: skip
    """Carry the real token of `row` and the real tokens after it as far as the label needs.

    Args:
        row: Whose real token stands over or before the label's end.
        mass: Of that token here.
        ambiguous: Whether the target may still write a longer token when a real token ends with it.
        place: (first byte, end byte, label, last row + 1, start in `text`, the target's word mark is
            not in the text, text).
    """
    begin, end, label, last_row, text_start, marked, text = place
    ends, ids, entry_offsets, entry_ids, probabilities, labels, factors, _ = source
    data, offsets, _, _, _, source_eos, _, trie, _ = tables
    while True:
        if ends[row] > end:
            add_mass(label, mass, state, found)
            state[NEXT_REAL] = row
            weight[W_NEXT_REAL] = mass
            return
        after = row + 1
        known = after < last_row and not math.isnan(labels[after])
        node = 0
        if known and (ends[row] < end or ambiguous):
            if marked:
                node, _ = walk(trie, 0, np.array([SPACE], np.uint8), 0, 1)
            if node >= 0:
                node, _ = walk(trie, node, text, text_start + begin, text_start + ends[row])
        if ends[row] == end:
            if known and ambiguous and node >= 0 and trie[3][node] and trie[4][node]:
                _look_ahead(
                    after, mass, node, label, source, tables, state, weight, next_counts, found,
                )  # fmt: skip
                return
            add_mass(label, mass, state, found)
            if known:
                state[NEXT_CLOSED] = after
                state[NEXT_PARTIAL] = 0
                weight[W_NEXT_CLOSED] = mass
            return
        if not known:
            return
        factor = factors[after]
        need = end - ends[row]
        text_at = text_start + ends[row]
        reached = -1
        if node >= 0:
            reached, _ = walk(trie, node, text, text_at, text_at + need)
        spelt = reached >= 0 and trie[4][reached]
        own = trie[2][reached] if spelt else -1
        for k in range(entry_offsets[after], entry_offsets[after + 1]):
            token = entry_ids[k]
            if token == ids[after]:
                continue
            part = mass * factor * probabilities[k]
            base = offsets[token]
            length = offsets[token + 1] - base
            if length == 0:
                if token == source_eos and node >= 0 and trie[2][node] >= 0:
                    add_mass(trie[2][node], part, state, found)  # the target writes what it has
                continue
            if not spelt:  # the label is none of the trie's tokens: a role, spelt in the text
                goal, own = -1, -1
                if length >= need and agrees(data, base, text, text_at, text_at + need):
                    goal, own = label, label
            else:
                goal = token_of(trie, node, data, base, base + length)
            if goal < 0:
                continue
            if goal != own:
                add_mass(goal, part, state, found)
                continue
            add_mass(label, part, state, found)
            _open_next(base + need, length - need, part, state, following)
        mass *= labels[after]
        row = after


@njit(cache=True, nogil=True)
def _look_ahead(
    row: int, mass: float, node: int, label: int, source: Any, tables: Any, state: Any, weight: Any,
    next_counts: Any, found: Any,
) -> None:  # fmt: skip
    """The real tokens end with the label, but the target could have gone on: ask the row after.

    What that row holds for tokens that would have made a longer target token goes there, or to the
    tail where more than one could come of it; the rest is the label's, and alone counts next.
    """
    _, ids, entry_offsets, entry_ids, probabilities, labels, factors, tails = source
    data, offsets, _, _, _, _, _, trie, _ = tables
    factor, tail = factors[row], tails[row]
    same = trie[2][node]
    kept = 0.0
    total = 0.0
    for k in range(entry_offsets[row], entry_offsets[row + 1]):
        place = k - entry_offsets[row]
        next_counts[place] = True
        token = entry_ids[k]
        if token == ids[row]:
            continue
        part = factor * probabilities[k]
        total += part
        base = offsets[token]
        goal = token_of(trie, node, data, base, offsets[token + 1])
        if offsets[token + 1] == base or goal == same:
            kept += part
            continue
        next_counts[place] = False
        if goal >= 0:
            add_mass(goal, mass * part, state, found)
    kept_tail = tail * kept / total if total > 0.0 else tail
    counts = labels[row] + kept + kept_tail
    add_mass(label, mass * counts, state, found)
    state[NEXT_CLOSED] = row
    state[NEXT_PARTIAL] = 1
    weight[W_NEXT_CLOSED] = mass * counts
    weight[W_NEXT_COUNTS] = counts


@njit(cache=True, nogil=True)
def _closed(
    lead: int, at_start: bool, place: Any, source: Any, tables: Any, state: Any, weight: Any,
    following: Any, counts: Any, next_counts: Any, found: Any,
) -> None:  # fmt: skip
    """What the row that begins here says.

    Args:
        lead: 1 where the source's tokens carry a word mark here that is not in the text.
        at_start: Whether the target token is the first of its segment.
        counts: Which entries of the row count, where only part of it does.
    """
    begin, end, label, _, text_start, _, text = place
    _, ids, entry_offsets, entry_ids, probabilities, labels, factors, _ = source
    data, offsets, _, start, continuation, source_eos, target_eos, _, look_ahead = tables
    spread_offsets, spread_targets, spread_weights = continuation
    row = state[CLOSED]
    factor = factors[row]
    scale = weight[W_CLOSED]
    if state[PARTIAL]:
        scale /= weight[W_COUNTS]
    for k in range(entry_offsets[row], entry_offsets[row + 1]):
        token = entry_ids[k]
        if token == ids[row] or (state[PARTIAL] and not counts[k - entry_offsets[row]]):
            continue
        mass = scale * factor * probabilities[k]
        base = offsets[token]
        length = offsets[token + 1] - base
        if length == 0:
            if token == source_eos and target_eos >= 0:
                add_mass(target_eos, mass, state, found)
            continue
        if lead == 1 and data[base] == SPACE:
            base += 1
            length -= 1
            if length == 0:
                continue
        if at_start:
            goal = start[base]
            if goal >= 0:
                add_mass(goal, mass, state, found)
                read = end - begin
                if goal != label or length <= read:
                    continue
                # Two spellings may begin with one token: " The" and "The" after a word mark.
                if agrees(data, base, text, text_start + begin, text_start + end):
                    _open_next(base + end - begin, length - (end - begin), mass, state, following)
            continue
        for c in range(spread_offsets[token], spread_offsets[token + 1]):
            goal = spread_targets[c]
            part = mass * spread_weights[c]
            if part < LEAST_SPREAD and c > spread_offsets[token]:
                break  # targets stand by falling weight: the rest is tail
            add_mass(goal, part, state, found)
            if goal == label:
                _open_next(base + end - begin, length - (end - begin), part, state, following)
    real = ids[row]
    several = spread_offsets[real + 1] - spread_offsets[real] != 1
    ambiguous = look_ahead and several and not at_start
    _path(
        row, scale * labels[row], ambiguous, place, source, tables, state, weight, following,
        next_counts, found,
    )  # fmt: skip


@njit(cache=True, nogil=True)
def _enter(
    row: int, row_start: int, cut_at: int, text: Any, text_start: int, source: Any, tables: Any,
    state: Any, weight: Any, following: Any,
) -> float:  # fmt: skip
    """Start anew inside the source token of `row`, with what agrees with the bytes already read.

    Returns:
        Mass of tokens that end exactly here and are not the real one: lost.
    """
    _, ids, entry_offsets, entry_ids, probabilities, labels, factors, _ = source
    data, offsets, _, _, _, _, _, _, _ = tables
    cut = cut_at - row_start
    lost = 0.0
    for k in range(entry_offsets[row], entry_offsets[row + 1]):
        token = entry_ids[k]
        base = offsets[token]
        length = offsets[token + 1] - base
        read = text_start + row_start
        if token != ids[row] and length >= cut and agrees(data, base, text, read, read + cut):
            part = factors[row] * probabilities[k]
            _open_next(base + cut, length - cut, part, state, following)
            if length == cut:
                lost += part
    state[NEXT_REAL] = row
    weight[W_NEXT_REAL] = labels[row]
    return lost


@njit(cache=True, nogil=True)
def _advance(total: float, state: Any, weight: Any, following: Any) -> None:
    """Make the next position's mixture the present one, its weights shares of `total`."""
    state[:NEXT_OPEN] = state[NEXT_OPEN:FOUND]
    weight[:W_NEXT_REAL] = weight[W_NEXT_REAL:]
    weight[W_REAL] /= total
    weight[W_CLOSED] /= total
    _, _, mass = following
    for i in range(state[OPEN]):
        mass[i] /= total


@njit(cache=True, nogil=True)
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
    num_positions = len(target_ids)
    out_offsets = np.zeros(num_positions + 1, np.int64)
    out_ids = np.empty(max(len(entry_ids), 1) + max_entries, np.uint32)
    out_mass = np.empty(len(out_ids), np.float64)
    origin = np.zeros(num_positions, np.uint8)
    label_mass = np.full(num_positions, np.nan)
    source = (*source, *others(ids, entry_offsets, entry_ids, probabilities, labels))
    places = np.full(target_vocab_size, -1, np.int32)
    tokens, masses = np.empty(target_vocab_size, np.int32), np.empty(target_vocab_size)
    found = (places, tokens, masses)
    keys = np.empty(target_vocab_size, np.int64)
    widest = max(np.diff(entry_offsets).max(), 1) if len(ends) else 1
    # Open tokens began at different bytes, none before the longest token's length.
    longest = max(np.diff(tables[1]).max(), 1) if len(tables[1]) > 1 else 1
    room = widest * (longest + longest_label(target_ends) + 2)
    at, following_at = np.empty(room, np.int64), np.empty(room, np.int64)
    length, following_length = np.empty(room, np.int64), np.empty(room, np.int64)
    mass, following_mass = np.empty(room), np.empty(room)
    counts, next_counts = np.ones(widest, np.bool_), np.ones(widest, np.bool_)
    state, weight = np.zeros(FOUND + 1, np.int64), np.zeros(6)
    middle = tables[2]
    written = 0
    for d in range(len(source_offsets) - 1):
        first_row, last_row = source_offsets[d], source_offsets[d + 1]
        row = first_row
        begin = 0
        state[OPEN], state[PARTIAL], state[REAL], state[CLOSED] = 0, 0, -1, -1
        if row < last_row and not math.isnan(labels[row]):
            state[CLOSED] = row
            weight[W_CLOSED] = 1.0
        for j in range(target_offsets[d], target_offsets[d + 1]):
            end, label = target_ends[j], target_ids[j]
            at_start = j == target_offsets[d]
            place = (
                begin, end, label, last_row, text_offsets[d], at_start and target_marks[d] == 1, text
            )  # fmt: skip
            following = (following_at, following_length, following_mass)
            state[NEXT_OPEN], state[NEXT_PARTIAL], state[FOUND] = 0, 0, 0
            state[NEXT_REAL], state[NEXT_CLOSED] = -1, -1
            begins_here = state[CLOSED] >= 0
            for i in range(state[OPEN]):
                goal = middle[at[i]]
                if goal >= 0:
                    add_mass(goal, mass[i], state, found)
                if goal == label:
                    step = end - begin
                    _open_next(at[i] + step, length[i] - step, mass[i], state, following)
            if state[REAL] >= 0:
                _path(
                    state[REAL], weight[W_REAL], False, place, source, tables, state, weight,
                    following, next_counts, found,
                )  # fmt: skip
            if begins_here:
                lead = source_marks[d] if state[CLOSED] == first_row else 0
                _closed(
                    lead, at_start, place, source, tables, state, weight, following, counts,
                    next_counts, found,
                )  # fmt: skip
            total = masses[places[label]] if places[label] >= 0 else 0.0
            if total > 0.0:
                if written + max_entries > len(out_ids):
                    out_ids = grown(out_ids, written)
                    out_mass = grown(out_mass, written)
                label_mass[j] = total
                written += heaviest(
                    state[FOUND], label, max_entries, found, keys, out_ids[written:],
                    out_mass[written:],
                )  # fmt: skip
                origin[j] = BOUNDARY if begins_here else INSIDE
            else:
                state[NEXT_OPEN], state[NEXT_REAL], state[NEXT_CLOSED] = 0, -1, -1
            for k in range(state[FOUND]):
                places[tokens[k]] = -1
            if state[NEXT_OPEN] == 0 and state[NEXT_REAL] < 0 and state[NEXT_CLOSED] < 0:
                total = 1.0
                while row < last_row and ends[row] <= end:
                    row += 1
                if row < last_row and not math.isnan(labels[row]):
                    row_start = ends[row - 1] if row > first_row else 0
                    if row_start == end:
                        state[NEXT_CLOSED] = row
                        weight[W_NEXT_CLOSED] = 1.0
                    else:
                        lost = _enter(
                            row, row_start, end, text, text_offsets[d], source, tables, state,
                            weight, following,
                        )  # fmt: skip
                        total = weight[W_NEXT_REAL] + lost
                        for i in range(state[NEXT_OPEN]):
                            total += following_mass[i]
            out_offsets[j + 1] = written
            _advance(total, state, weight, following)
            at, following_at = following_at, at
            length, following_length = following_length, length
            mass, following_mass = following_mass, mass
            counts, next_counts = next_counts, counts
            begin = end
    return out_offsets, out_ids[:written], out_mass[:written], origin, label_mass
