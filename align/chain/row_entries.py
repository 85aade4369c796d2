"""What a row of the source says where it begins, and where it is taken up anew.

Names and shapes are those of `align.chain.kernel`.
"""

from __future__ import annotations

from typing import Any

from align.chain.found import add_mass
from align.chain.places import (
    CLOSED,
    FOUND,
    NEXT_CLOSED,
    NEXT_REAL,
    PARTIAL,
    W_CLOSED,
    W_COUNTS,
    W_NEXT_CLOSED,
    W_NEXT_REAL,
    open_next,
)
from align.chain.real_path import follow
from align.chain.rows import SPACE, agrees
from store_schema.compiled import bare

LEAST_SPREAD = 1e-5
"""Less than this of an entry's mass goes to the tail, not to a further target token."""


@bare
def row_begins(
    lead: int, at_start: bool, place: Any, source: Any, tables: Any, state: Any, weight: Any,
    following: Any, counts: Any, next_counts: Any, found: Any,
) -> None:  # fmt: skip
    """What the row that begins here says.

    Args:
        lead: 1 where the source's tokens carry a word mark here that is not in the text.
        at_start: Whether the target token is the first of its segment.
        counts: Which entries of the row count, where only part of it does.
    """
    begin, end, label, _, _, _, _ = place
    _, ids, entry_offsets, entry_ids, probabilities, labels, factors, _ = source
    row = state[CLOSED]
    scale = weight[W_CLOSED]
    if state[PARTIAL]:
        scale /= weight[W_COUNTS]
    if at_start or lead == 1:
        _spread_at_start(
            row, scale, lead, at_start, place, source, tables, state, following, counts, found
        )
    else:
        entries = slice(entry_offsets[row], entry_offsets[row + 1])
        barred = state[PARTIAL] == 1
        _spread(
            entry_ids[entries], probabilities[entries], ids[row], scale * factors[row], barred, counts,
            label, end - begin, tables[1], tables[4], tables[5:7], state, following, found,
        )  # fmt: skip
    targets_of = tables[4][0]
    several = targets_of[ids[row] + 1] - targets_of[ids[row]] != 1
    ambiguous = tables[8] and several and not at_start
    follow(
        row, scale * labels[row], ambiguous, place, source, tables, state, weight, following,
        next_counts, found,
    )  # fmt: skip


@bare
def _spread(
    entry_ids: Any, probabilities: Any, real: int, scale: float, barred: bool, counts: Any,
    label: int, step: int, offsets: Any, continuation: Any, eos: Any, state: Any, following: Any,
    found: Any,
) -> None:  # fmt: skip
    """Where the target went on from each entry; nearly all the time of alignment is spent here.

    Args:
        scale: On each entry's probability.
        barred: Whether only the entries of `counts` count.
        step: Bytes of the label.
    """
    first, targets, weights = continuation
    masses, tokens = found
    number = state[FOUND]
    for k in range(len(entry_ids)):
        token = entry_ids[k]
        if token == real or (barred and not counts[k]):
            continue
        mass = scale * probabilities[k]
        if offsets[token] == offsets[token + 1]:
            if token == eos[0] and eos[1] >= 0:
                state[FOUND] = number
                add_mass(eos[1], mass, state, found)
                number = state[FOUND]
            continue
        begin, end = first[token], first[token + 1]
        for c in range(begin, end):
            part = mass * weights[c]
            if part < LEAST_SPREAD and c > begin:
                break  # targets stand by falling weight: the rest is tail
            goal = targets[c]
            before = masses[goal]
            if before == 0.0:
                if part == 0.0:
                    break
                tokens[number] = goal
                number += 1
            masses[goal] = before + part
            if goal == label:
                base, stop = offsets[token], offsets[token + 1]
                open_next(base + step, stop - base - step, part, state, following)
    state[FOUND] = number


@bare
def _spread_at_start(
    row: int, scale: float, lead: int, at_start: bool, place: Any, source: Any, tables: Any,
    state: Any, following: Any, counts: Any, found: Any,
) -> None:  # fmt: skip
    """The same where a segment or the source's first token begins: no text stands before it."""
    begin, end, label, _, text_start, _, text = place
    _, ids, entry_offsets, entry_ids, probabilities, _, factors, _ = source
    data, offsets, _, start, continuation, source_eos, target_eos, _, _ = tables
    spread_offsets, spread_targets, spread_weights = continuation
    for k in range(entry_offsets[row], entry_offsets[row + 1]):
        token = entry_ids[k]
        if token == ids[row] or (state[PARTIAL] and not counts[k - entry_offsets[row]]):
            continue
        mass = scale * factors[row] * probabilities[k]
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
                    open_next(base + end - begin, length - (end - begin), mass, state, following)
            continue
        for c in range(spread_offsets[token], spread_offsets[token + 1]):
            goal = spread_targets[c]
            part = mass * spread_weights[c]
            if part < LEAST_SPREAD and c > spread_offsets[token]:
                break
            add_mass(goal, part, state, found)
            if goal == label:
                open_next(base + end - begin, length - (end - begin), part, state, following)


@bare
def take_up(
    row: int, row_start: int, at: int, text: Any, text_start: int, source: Any, tables: Any,
    state: Any, weight: Any, following: Any,
) -> float:  # fmt: skip
    """Start anew at a byte where the source token of `row` begins, or inside it, with what agrees
    with the bytes already read.

    Returns:
        Sum of the weights: what is not open ended exactly here without being the real token, lost.
    """
    _, ids, entry_offsets, entry_ids, probabilities, labels, factors, _ = source
    data, offsets, _, _, _, _, _, _, _ = tables
    if row_start == at:
        state[NEXT_CLOSED] = row
        weight[W_NEXT_CLOSED] = 1.0
        return 1.0
    cut = at - row_start
    total = labels[row]
    for k in range(entry_offsets[row], entry_offsets[row + 1]):
        token = entry_ids[k]
        base = offsets[token]
        length = offsets[token + 1] - base
        read = text_start + row_start
        if token != ids[row] and length >= cut and agrees(data, base, text, read, read + cut):
            part = factors[row] * probabilities[k]
            open_next(base + cut, length - cut, part, state, following)
            total += part
    state[NEXT_REAL] = row
    weight[W_NEXT_REAL] = labels[row]
    return float(total)
