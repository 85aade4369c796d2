"""The source's real tokens, followed row by row from the beginning of a label to its end or beyond.

All functions read `label` (the target token of this position), `source` and `mapping`, and change
`carried` in place. Shapes are those of `align.chain.kernel`.
"""

from __future__ import annotations

import math

from align.chain.branch_rows import Ahead, go_on
from align.chain.places import (
    NEXT_CLOSED,
    NEXT_PARTIAL,
    NEXT_REAL,
    W_NEXT_CLOSED,
    W_NEXT_COUNTS,
    W_NEXT_REAL,
    Carried,
    Label,
    open_next,
)
from align.chain.rows import SPACE, SourceRows, agrees
from align.chain.target_mass import add_mass
from align.chain.trie import NO_NODE, child_of, has_children, token_of, walk
from align.chain.vocabulary_map import VocabularyMap
from store_schema.compiled import bare


@bare
def follow(
    row: int,
    mass: float,
    ambiguous: bool,
    label: Label,
    source: SourceRows,
    mapping: VocabularyMap,
    carried: Carried,
) -> None:
    """Carry the mass of the real token of `row`, and of those after it, up to the label's end.

    Args:
        row: Row of the real token that is open at the label's beginning, or begins there.
        mass: Probability of that token given the text so far.
        ambiguous: Whether the target might write a longer token where a real token ends with the label.
    """
    number, weight, trie = carried.number, carried.weight, mapping.trie
    while True:
        row_end, after = source.ends[row], row + 1
        if row_end > label.end:
            add_mass(label.token, mass, carried.target_mass)
            number[NEXT_REAL] = row
            weight[W_NEXT_REAL] = mass
            return
        known = after < label.last_row and not math.isnan(source.labels[after])
        node = 0
        if known and (row_end < label.end or ambiguous):
            node = _node_at(row_end, label, mapping)
        if row_end == label.end:
            if (
                known
                and ambiguous
                and node >= 0
                and has_children(trie, node)
                and trie.is_token[node]
            ):
                _look_ahead(after, mass, node, label, source, mapping, carried)
                return
            add_mass(label.token, mass, carried.target_mass)
            if known:
                number[NEXT_CLOSED] = after
                number[NEXT_PARTIAL] = 0
                weight[W_NEXT_CLOSED] = mass
            return
        if not known:
            return
        _entries_inside(after, mass, node, label, source, mapping, carried)
        mass *= source.labels[after]
        row = after


@bare
def _node_at(end: int, label: Label, mapping: VocabularyMap) -> int:
    """The trie's node that the label's bytes up to `end` lead to, NO_NODE for none."""
    node = 0
    if label.marked:
        node = child_of(mapping.trie, 0, SPACE)
    if node == NO_NODE:
        return NO_NODE
    start = label.text_start
    node, _ = walk(mapping.trie, node, label.text, start + label.begin, start + end)
    return int(node)


@bare
def _entries_inside(
    row: int,
    mass: float,
    node: int,
    label: Label,
    source: SourceRows,
    mapping: VocabularyMap,
    carried: Carried,
) -> None:
    """Carry the entries of a row that begins inside the label.

    An entry that agrees with the rest of the label gives its mass to the label; any other gives it to
    the target token that the label's first bytes and the entry's bytes make together.

    Args:
        row: The row.
        mass: Probability of the real tokens before it.
        node: The trie's node that the label's bytes before the row lead to.
    """
    trie, pieces, target_mass = mapping.trie, mapping.pieces, carried.target_mass
    row_start = source.ends[row - 1]
    need, text_at = label.end - row_start, label.text_start + row_start
    reached = NO_NODE
    if node >= 0:
        reached, _ = walk(trie, node, label.text, text_at, text_at + need)
    in_trie = reached >= 0 and trie.is_token[reached]
    own = trie.longest[reached] if in_trie else -1
    for k in range(source.entry_offsets[row], source.entry_offsets[row + 1]):
        token = source.entry_ids[k]
        if token == source.ids[row]:
            continue
        part = mass * source.scales[row] * source.probabilities[k]
        branch = source.branches.of_entry[k] if len(source.branches.of_entry) else -1
        base = pieces.offsets[token]
        length = pieces.offsets[token + 1] - base
        if length == 0:
            if token == mapping.eos[0] and node >= 0 and trie.longest[node] >= 0:
                add_mass(trie.longest[node], part, target_mass)  # the text ends here
            continue
        if in_trie and branch >= 0:
            ahead = Ahead(branch, -1, node, base, length, need)
            part, branch = go_on(ahead, part, label, source, mapping, carried)
        if in_trie:
            goal = token_of(trie, node, pieces.data, base, base + length)
        else:  # the label is not in the trie: a special token that is written out in the text
            goal, own = -1, -1
            if length >= need and agrees(pieces.data, base, label.text, text_at, text_at + need):
                goal, own = label.token, label.token
        if goal < 0:
            continue
        if goal != own:
            add_mass(goal, part, target_mass)
            continue
        add_mass(label.token, part, target_mass)
        open_next(base + need, length - need, part, branch, carried)


@bare
def _look_ahead(
    row: int,
    mass: float,
    node: int,
    label: Label,
    source: SourceRows,
    mapping: VocabularyMap,
    carried: Carried,
) -> None:
    """The real tokens end with the label, but the target has longer tokens: use the next row's entries.

    The mass of an entry that would have made a longer target token goes to that token, or to the tail
    where it is not determined which. The rest goes to the label, and only the entries of that rest are
    possible at the next position.

    Args:
        row: The row after the label.
        mass: Probability of the real tokens before it.
        node: The trie's node of the label.
    """
    trie, pieces = mapping.trie, mapping.pieces
    first_entry, scale, tail = source.entry_offsets[row], source.scales[row], source.tails[row]
    same = trie.longest[node]
    kept = 0.0
    total = 0.0
    part_only = 0
    for k in range(first_entry, source.entry_offsets[row + 1]):
        carried.next_counts[k - first_entry] = True
        token = source.entry_ids[k]
        if token == source.ids[row]:
            continue
        part = scale * source.probabilities[k]
        total += part
        base, stop = pieces.offsets[token], pieces.offsets[token + 1]
        goal = token_of(trie, node, pieces.data, base, stop)
        if stop == base or goal == same:
            kept += part
            continue
        carried.next_counts[k - first_entry] = False
        part_only = 1
        if goal >= 0:
            add_mass(goal, mass * part, carried.target_mass)
    kept_tail = tail * kept / total if total > 0.0 else tail
    counts = source.labels[row] + kept + kept_tail
    add_mass(label.token, mass * counts, carried.target_mass)
    carried.number[NEXT_CLOSED] = row
    carried.number[NEXT_PARTIAL] = part_only
    carried.weight[W_NEXT_CLOSED] = mass * counts
    carried.weight[W_NEXT_COUNTS] = counts
