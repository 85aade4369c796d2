"""Branches: what the source says after an entry that is not the real token.

A source token whose bytes ahead do not determine the target's token goes on with the tokens of its
branch's row: with the bytes of each it is mostly determined which token the target writes. Where the
target might still go on, the corpus' counts decide between its tokens that agree with both.

All functions read `label` (the target token of this position), `source` and `mapping`, and change
`carried` in place. Shapes are those of `align.chain.kernel`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from align.chain.places import Carried, Label, open_next
from align.chain.rows import SourceRows, agrees
from align.chain.target_mass import add_mass
from align.chain.trie import has_children, walk
from align.chain.vocabulary_map import VocabularyMap
from store_schema.compiled import bare


class Ahead(NamedTuple):
    """A source token with a branch, where a target token begins or goes on.

    Args:
        branch: Index of the branch.
        entry: The source token, if the target's token begins with it; else -1.
        node: The trie's node of the bytes of the target's token before `at`; 0 where it begins there.
        at: Where the token's bytes ahead begin in the piece table.
        length: How many they are, at least 1.
        need: Bytes of the label from there on.
    """

    branch: Any
    entry: Any
    node: Any
    at: Any
    length: Any
    need: Any


@bare
def go_on(
    token: Ahead,
    mass: float,
    label: Label,
    source: SourceRows,
    mapping: VocabularyMap,
    carried: Carried,
) -> tuple[float, int]:
    """Carry the mass of a source token that goes on with its branch's row.

    Args:
        token: The source token.
        mass: Its probability.

    Returns:
        The mass that is left to other rules, and the branch that it still has: all of it where the
        bytes ahead determine the target's token whatever follows, else what the row does not
        determine, without a branch (-1).
    """
    branch, entry, node, at, length, need = token
    trie, pieces, rows = mapping.trie, mapping.pieces, source.branches
    ahead, before = walk(trie, node, pieces.data, at, at + length)
    if ahead < 0 or not has_children(trie, ahead):
        return mass, branch
    own = pieces.middle[at] if node == 0 else before  # if the target's token goes no further
    left, stays = rows.tails[branch], 0.0
    for k in range(rows.offsets[branch], rows.offsets[branch + 1]):
        following, share = rows.ids[k], rows.probabilities[k]
        base, stop = pieces.offsets[following], pieces.offsets[following + 1]
        if base == stop:
            if following == mapping.eos[0] and own >= 0:
                add_mass(own, mass * share, carried.target_mass)  # the text ends here
            continue
        reached, longest = walk(trie, ahead, pieces.data, base, stop)
        part = mass * share
        if reached >= 0 and has_children(trie, reached):
            stop_here = own if longest == before else longest
            ends = _ends(entry, stop_here, length, base, stop, part, mapping, carried)
            if ends < 0.0:
                left += share
                continue
            part *= ends
            share *= ends
        if longest == before:
            stays += share
            continue
        add_mass(longest, part, carried.target_mass)
        if longest == label.token:
            read = need - length
            open_next(base + read, stop - base - read, part, -1, carried)
    if own >= 0:
        add_mass(own, mass * stays, carried.target_mass)
        if own == label.token:
            open_next(at + need, length - need, mass * stays, branch, carried)
    return mass * left, -1


@bare
def _ends(
    entry: int,
    goal: int,
    length: int,
    base: int,
    stop: int,
    mass: float,
    mapping: VocabularyMap,
    carried: Carried,
) -> float:
    """Give longer target tokens their part of the mass of an entry and a token after it.

    Args:
        entry: The entry, from whose first byte on the target's token is counted; -1 where it is not.
        goal: The target's token if it ends with the two, or before.
        length: Bytes of the entry.
        base: Where the bytes of the token after it begin in the piece table.
        stop: Where they end.
        mass: Of the two.

    Returns:
        The share that is left for `goal`, -1 where nothing was counted that agrees.
    """
    if entry < 0:
        return -1.0
    first, targets, weights = mapping.continuation
    trie, data, size = mapping.trie, mapping.pieces.data, length + stop - base
    total, ends = 0.0, 0.0
    for c in range(first[entry], first[entry + 1]):
        if targets[c] == goal:
            ends += weights[c]
            total += weights[c]
        elif mapping.target_lengths[targets[c]] > size:
            at = trie.offsets[targets[c]] + length
            if agrees(trie.data, at, data, base, stop):
                total += weights[c]
    if total == 0.0:
        return -1.0
    for c in range(first[entry], first[entry + 1]):
        target = targets[c]
        if target == goal or mapping.target_lengths[target] <= size:
            continue
        if agrees(trie.data, trie.offsets[target] + length, data, base, stop):
            add_mass(target, mass * weights[c] / total, carried.target_mass)
    return ends / total
