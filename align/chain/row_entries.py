"""Carry the entries of the row that begins at a position, and start again after all states are lost.

All functions read `label` (the target token of this position), `source` and `mapping`, and change
`carried` in place. Shapes are those of `align.chain.kernel`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from align.chain.branch_rows import Ahead, go_on
from align.chain.places import (
    CLOSED,
    NEXT_CLOSED,
    NEXT_REAL,
    PARTIAL,
    W_CLOSED,
    W_COUNTS,
    W_NEXT_CLOSED,
    W_NEXT_REAL,
    Carried,
    Label,
    open_next,
)
from align.chain.real_path import follow
from align.chain.rows import SPACE, SourceRows, agrees
from align.chain.target_mass import add_mass
from align.chain.vocabulary_map import VocabularyMap
from store_schema.compiled import bare

LEAST_SPREAD = 1e-5
"""A smaller part of an entry's mass goes to the tail, not to a second or later target token."""


LEAST_OF_REAL = 1e-3
"""Tokens of the tail with less mass than this part of the real token's stay tail."""


class Begun(NamedTuple):
    """Entries that begin at a position.

    Args:
        ids: Source tokens.
        probabilities: float64.
        branches: int64 branch of each, -1 for none; empty if none has one.
    """

    ids: Any
    probabilities: Any
    branches: Any


@bare
def row_begins(
    lead: int, label: Label, source: SourceRows, mapping: VocabularyMap, carried: Carried
) -> None:
    """Carry the row that begins at this position: its entries, and its real token.

    Args:
        lead: 1 where the source's token begins with a word mark (space) that is not in the text.
    """
    row, scale = carried.number[CLOSED], carried.weight[W_CLOSED]
    if carried.number[PARTIAL]:
        scale /= carried.weight[W_COUNTS]
    if label.at_start or lead == 1:
        _spread_at_start(row, scale, lead, label, source, mapping, carried)
    else:
        first, last = source.entry_offsets[row], source.entry_offsets[row + 1]
        rows = Begun(
            source.entry_ids[first:last],
            source.probabilities[first:last],
            source.branches.of_entry[first:last],
        )
        masked = carried.number[PARTIAL] == 1
        weight = scale * source.scales[row]
        _spread(rows, np.int64(source.ids[row]), masked, weight, label, source, mapping, carried)
        if not masked:
            _open_tail(row, scale, rows.ids, label, source, mapping, carried)
    targets_of, real = mapping.continuation.offsets, source.ids[row]
    several = targets_of[real + 1] - targets_of[real] != 1
    ambiguous = mapping.look_ahead and several and not label.at_start
    follow(row, scale * source.labels[row], ambiguous, label, source, mapping, carried)


@bare
def _open_tail(
    row: int,
    scale: float,
    listed: Any,
    label: Label,
    source: SourceRows,
    mapping: VocabularyMap,
    carried: Carried,
) -> None:
    """Give the label its part of the row's tail: tokens that begin with it and reach beyond it.

    Args:
        row: The row that begins here.
        scale: Its weight.
        listed: Its entries, which have their own mass.
    """
    offsets, tokens, shares, _ = mapping.tail
    pieces, step = mapping.pieces.offsets, label.end - label.begin
    factor, least = scale * source.tail_scales[row], LEAST_OF_REAL * scale * source.labels[row]
    for c in range(offsets[label.token], offsets[label.token + 1]):
        part = factor * shares[c]
        if part <= least:
            break  # shares fall
        token = tokens[c]
        found = token == source.ids[row]
        for k in range(len(listed)):
            found |= listed[k] == token
        if not found:
            add_mass(label.token, part, carried.target_mass)
            base = pieces[token]
            open_next(base + step, pieces[token + 1] - base - step, part, -1, carried)


@bare
def branch_begins(
    branch: int,
    mass: float,
    label: Label,
    source: SourceRows,
    mapping: VocabularyMap,
    carried: Carried,
) -> None:
    """Carry the row of a branch that begins at this position: its entry ended here."""
    branches = source.branches
    first, last = branches.offsets[branch], branches.offsets[branch + 1]
    none = branches.of_entry[:0]
    rows = Begun(branches.ids[first:last], branches.probabilities[first:last], none)
    _spread(rows, np.int64(-1), np.bool_(False), mass, label, source, mapping, carried)


@bare
def _spread(
    rows: Begun,
    real: int,
    masked: bool,
    scale: float,
    label: Label,
    source: SourceRows,
    mapping: VocabularyMap,
    carried: Carried,
) -> None:
    """Spread each entry's mass over its target tokens. Most of alignment's time is spent here.

    Args:
        rows: Entries that begin here.
        real: The real token, which is left out.
        masked: Whether only entries of `carried.counts` are still possible.
        scale: Factor of each entry's probability.
    """
    entry_ids, probabilities, of_entry = rows
    step, token_of_label, counts = label.end - label.begin, label.token, carried.counts
    first, targets, weights = mapping.continuation
    offsets, (source_eos, target_eos) = mapping.pieces.offsets, mapping.eos
    target_mass = carried.target_mass
    tokens, masses = target_mass.tokens, target_mass.masses
    number, branched = target_mass.number[0], len(of_entry) > 0
    for k in range(len(entry_ids)):
        token = entry_ids[k]
        if token == real or (masked and not counts[k]):
            continue
        mass = scale * probabilities[k]
        if offsets[token] == offsets[token + 1]:
            if token == source_eos and target_eos >= 0:
                target_mass.number[0] = number
                add_mass(target_eos, mass, target_mass)
                number = target_mass.number[0]
            continue
        base, stop = offsets[token], offsets[token + 1]
        branch = of_entry[k] if branched else -1
        if branch >= 0:
            target_mass.number[0] = number
            ahead = Ahead(branch, np.int64(token), 0, base, stop - base, step)
            mass, branch = go_on(ahead, mass, label, source, mapping, carried)
            number = target_mass.number[0]
        begin, end = first[token], first[token + 1]
        for c in range(begin, end):
            part = mass * weights[c]
            if part < LEAST_SPREAD and c > begin:
                break  # targets are in order of falling weight: the rest is tail
            goal = targets[c]
            before = masses[goal]
            if before == 0.0:
                if part == 0.0:
                    break
                tokens[number] = goal
                number += 1
            masses[goal] = before + part
            if goal == token_of_label:
                open_next(base + step, stop - base - step, part, branch, carried)
    target_mass.number[0] = number


@bare
def _spread_at_start(
    row: int,
    scale: float,
    lead: int,
    label: Label,
    source: SourceRows,
    mapping: VocabularyMap,
    carried: Carried,
) -> None:
    """The same as `_spread` at the first token of a segment, where no text stands before it."""
    pieces, continuation, target_mass = mapping.pieces, mapping.continuation, carried.target_mass
    source_eos, target_eos = mapping.eos
    first_entry, read = source.entry_offsets[row], label.end - label.begin
    text_at = label.text_start + label.begin
    for k in range(first_entry, source.entry_offsets[row + 1]):
        token = source.entry_ids[k]
        if token == source.ids[row]:
            continue
        if carried.number[PARTIAL] and not carried.counts[k - first_entry]:
            continue
        mass = scale * source.scales[row] * source.probabilities[k]
        branch = source.branches.of_entry[k] if len(source.branches.of_entry) else -1
        base = pieces.offsets[token]
        length = pieces.offsets[token + 1] - base
        if length == 0:
            if token == source_eos and target_eos >= 0:
                add_mass(target_eos, mass, target_mass)
            continue
        if lead == 1 and pieces.data[base] == SPACE:
            base += 1
            length -= 1
            if length == 0:
                continue
        if label.at_start:
            goal = pieces.start[base]
            if goal >= 0:
                add_mass(goal, mass, target_mass)
                if goal != label.token or length < read:
                    continue
                # " The" and "The" after a word mark may begin with the same target token.
                if agrees(pieces.data, base, label.text, text_at, text_at + read):
                    open_next(base + read, length - read, mass, branch, carried)
            continue
        begin = continuation.offsets[token]
        for c in range(begin, continuation.offsets[token + 1]):
            goal = continuation.targets[c]
            part = mass * continuation.weights[c]
            if part < LEAST_SPREAD and c > begin:
                break
            add_mass(goal, part, target_mass)
            if goal == label.token:
                open_next(base + read, length - read, part, branch, carried)


@bare
def resync(
    row: int,
    row_start: int,
    label: Label,
    source: SourceRows,
    mapping: VocabularyMap,
    carried: Carried,
) -> float:
    """After all states were lost: start again after the label, at the source token that `row` predicts.

    Where that token begins exactly there, the row does. Where it began before, its entries that agree
    with the bytes from there to the label's end are open, with the real token.

    Args:
        row: Row of the first source token that ends after the label.
        row_start: Its first byte within the segment.

    Returns:
        Sum of the new states' weights, by which `advance` divides.
    """
    number, weight, pieces = carried.number, carried.weight, mapping.pieces
    if row_start == label.end:
        number[NEXT_CLOSED] = row
        weight[W_NEXT_CLOSED] = 1.0
        return 1.0
    cut = label.end - row_start
    read = label.text_start + row_start
    total = source.labels[row]
    for k in range(source.entry_offsets[row], source.entry_offsets[row + 1]):
        token = source.entry_ids[k]
        base = pieces.offsets[token]
        length = pieces.offsets[token + 1] - base
        if token == source.ids[row] or length < cut:
            continue
        if agrees(pieces.data, base, label.text, read, read + cut):
            part = source.scales[row] * source.probabilities[k]
            branch = source.branches.of_entry[k] if len(source.branches.of_entry) else -1
            open_next(base + cut, length - cut, part, branch, carried)
            total += part
    number[NEXT_REAL] = row
    weight[W_NEXT_REAL] = source.labels[row]
    return float(total)
