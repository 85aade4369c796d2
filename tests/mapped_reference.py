"""Rows of the mapped methods (align/papers/mapped.py), one position at a time: the plain reading."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from align.papers.entry_maps import Table, Vocabularies
from store_schema.layout import Arrays
from store_schema.text.tokenizer import EncodedSegment

Row = dict[int, float]
"""Token to probability; what is left of 1 is tail."""


def source_row(source: Arrays, row: int) -> Row:
    """Entries of a row of a source store, the real token among them."""
    here = slice(int(source["entry_offsets"][row]), int(source["entry_offsets"][row + 1]))
    probabilities = np.exp(source["entry_logprobs"][here].astype(np.float64))
    found = dict(zip(source["entry_ids"][here].tolist(), probabilities.tolist(), strict=True))
    label = float(source["label_logprobs"][row])
    if not np.isnan(label):
        found.setdefault(int(source["token_ids"][row]), float(np.exp(label)))
    return found


class Place(NamedTuple):
    """A position of the target, seen from the source.

    Args:
        row: The source's row that begins here, or in whose token the position lies.
        read: Bytes of that token that stand before the position; empty where it begins here.
    """

    row: int
    read: bytes


def places(source: EncodedSegment, target: EncodedSegment, text: bytes) -> Iterator[Place | None]:
    """The place of each of the target's tokens; None where the source has neither."""
    starts = [0, *source.byte_ends[:-1].tolist()]
    for begin in [0, *target.byte_ends[:-1].tolist()]:
        row = max(r for r, start in enumerate(starts) if start <= begin)
        if starts[row] == begin or begin < int(source.byte_ends[row]):
            yield Place(row, text[starts[row] : begin])
        else:
            yield None


def mapped_row(table: Table, source: Arrays, place: Place) -> Row:
    """Where a source token begins: through a table of vocabularies."""
    found: defaultdict[int, float] = defaultdict(float)
    if not place.read:
        for token, mass in source_row(source, place.row).items():
            for target, weight in table.get(token, ()):
                found[target] += mass * weight
    return dict(found)


def byte_prefix_row(both: Vocabularies, source: Arrays, place: Place) -> Row:
    """The byte-prefix map, also inside a source token."""
    if not place.read:
        return mapped_row(both.prefixes, source, place)
    tokens = both.source.vocabulary.tokens
    agreeing = {
        token: mass
        for token, mass in source_row(source, place.row).items()
        if tokens[token].startswith(place.read) and len(tokens[token]) > len(place.read)
    }
    found: defaultdict[int, float] = defaultdict(float)
    for token, mass in agreeing.items():
        goal = both.longest_prefix(tokens[token][len(place.read) :])
        if goal is not None:
            found[goal] += mass / sum(agreeing.values())
    return dict(found)
