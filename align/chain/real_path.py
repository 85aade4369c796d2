"""Where the source's real tokens lead: to the label, row after row, and past its end.

Names and shapes are those of `align.chain.kernel`.
"""

from __future__ import annotations

import math
from typing import Any

from align.chain.found import add_mass
from align.chain.places import (
    NEXT_CLOSED,
    NEXT_PARTIAL,
    NEXT_REAL,
    W_NEXT_CLOSED,
    W_NEXT_COUNTS,
    W_NEXT_REAL,
    open_next,
)
from align.chain.rows import SPACE, agrees
from align.chain.trie import child_of, goes_on, token_of, walk
from store_schema.compiled import bare


@bare
def follow(
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
                node = child_of(trie, 0, SPACE)
            if node >= 0:
                node, _ = walk(trie, node, text, text_start + begin, text_start + ends[row])
        if ends[row] == end:
            if known and ambiguous and node >= 0 and goes_on(trie, node) and trie[3][node]:
                look_ahead(
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
        spelt = reached >= 0 and trie[3][reached]
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
            open_next(base + need, length - need, part, state, following)
        mass *= labels[after]
        row = after


@bare
def look_ahead(
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
