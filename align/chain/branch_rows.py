"""Branches: what the source says after an entry that is not the real token.

A source token whose bytes ahead do not determine the target's token goes on with the tokens of its
branch's row: with the bytes of each it is mostly determined which token the target writes. What is not
is left to the rules for a token without a branch.

All functions read `label` (the target token of this position), `source` and `mapping`, and change
`carried` in place. Shapes are those of `align.chain.kernel`.
"""

from __future__ import annotations

from align.chain.places import Carried, Label, open_next
from align.chain.rows import SourceRows
from align.chain.target_mass import add_mass
from align.chain.trie import has_children, walk
from align.chain.vocabulary_map import VocabularyMap
from store_schema.compiled import bare


@bare
def go_on(
    branch: int,
    node: int,
    at: int,
    length: int,
    mass: float,
    need: int,
    label: Label,
    source: SourceRows,
    mapping: VocabularyMap,
    carried: Carried,
) -> tuple[float, int]:
    """Carry the mass of a source token that goes on with its branch's row.

    Args:
        branch: Index of the branch.
        node: The trie's node of the bytes of the target's token before `at`; 0 where it begins there.
        at: Where the token's bytes ahead begin in the piece table.
        length: How many they are, at least 1.
        mass: Its probability.
        need: Bytes of the label from there on.

    Returns:
        The mass that is left to other rules, and the branch that it still has: all of it where the
        bytes ahead determine the target's token whatever follows, else what the row does not
        determine, without a branch (-1).
    """
    trie, pieces, rows = mapping.trie, mapping.pieces, source.branches
    ahead, before = walk(trie, node, pieces.data, at, at + length)
    if ahead < 0 or not has_children(trie, ahead):
        return mass, branch
    own = pieces.middle[at] if node == 0 else before  # if the target's token goes no further
    left, stays = rows.tails[branch], 0.0
    for k in range(rows.offsets[branch], rows.offsets[branch + 1]):
        token, share = rows.ids[k], rows.probabilities[k]
        base, stop = pieces.offsets[token], pieces.offsets[token + 1]
        if base == stop:
            if token == mapping.eos[0] and own >= 0:
                add_mass(own, mass * share, carried.target_mass)  # the text ends here
            continue
        reached, longest = walk(trie, ahead, pieces.data, base, stop)
        if reached >= 0 and has_children(trie, reached):
            left += share
            continue
        if longest == before:
            stays += share
            continue
        add_mass(longest, mass * share, carried.target_mass)
        if longest == label.token:
            read = need - length
            open_next(base + read, stop - base - read, mass * share, -1, carried)
    if own >= 0:
        add_mass(own, mass * stays, carried.target_mass)
        if own == label.token:
            open_next(at + need, length - need, mass * stays, branch, carried)
    return mass * left, -1
