"""What other methods make of a source's rows: our plain readings, for `make bench-align-oracle`.

Each gives the row of target token j, as our alignment does, from the source's rows of the same segment:

gold     TRL's GOLD (docs of trl 0.25): where both sides begin a token, tokens of the same bytes have
         the source's probability; the others are compared by rank alone, which says nothing of a token.
h_kl     X-Token's hybrid (arXiv 2605.21699): as gold, and a target token that the source writes as
         several counts as the first of them where that has `PINNED` of its weight.
p_kl     X-Token's projection: each target token is the source's tokens that write it, the first
         `MOST_PARTS` of them with weights that fall by half; a source token's mass is shared out
         among the target tokens that are made of it, in proportion to those weights.
bpm      A byte-prefix map (after arXiv 2607.22334): a source token's mass goes to the longest target
         token that its bytes begin with. Inside a source token, to which the map as published says
         nothing, the tokens that agree with the bytes read, scaled to 1: at its best.

Only bpm has rows where no source token begins; the others leave such positions without an entry.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import NamedTuple

import numpy as np

from store_schema.layout import Arrays
from store_schema.text.tokenizer import EncodedSegment, SegmentTokenizer

MOST_PARTS, PINNED = 4, 0.6

Row = dict[int, float]
"""Target token to probability; what is left of 1 is of no token."""


class Weighted(NamedTuple):
    """A target token and its weight."""

    token: int
    weight: float


class Maps:
    """What the methods know of two vocabularies."""

    def __init__(self, source: SegmentTokenizer, target: SegmentTokenizer) -> None:
        """From their tables of bytes and the source's tokenizer."""
        self.source, self.target = source, target

    @cached_property
    def by_bytes(self) -> dict[bytes, int]:
        """Target token of given bytes."""
        tokens = self.target.vocabulary.tokens
        return {token: i for i, token in reversed(list(enumerate(tokens))) if token}

    @cached_property
    def shared(self) -> dict[int, list[Weighted]]:
        """Source token to the target token of the same bytes."""
        tokens = self.source.vocabulary.tokens
        return {
            i: [Weighted(self.by_bytes[token], 1.0)]
            for i, token in enumerate(tokens)
            if token in self.by_bytes
        }

    @cached_property
    def parts(self) -> dict[int, list[Weighted]]:
        """Target token to the source tokens that write it, with weights that sum to 1."""
        texts: dict[int, str] = {}
        for i, token in enumerate(self.target.vocabulary.tokens):
            try:
                texts[i] = token.decode()
            except UnicodeDecodeError:
                continue  # part of a character: no text to tokenise
        asked = {i: text for i, text in texts.items() if text}
        readings = self.source.encode_text(list(asked.values()))
        found = {}
        for i, ids in zip(asked, readings, strict=True):
            kept = ids[:MOST_PARTS]
            weights = np.array([2.0**-k for k in range(len(kept))])
            weights /= weights.sum()
            found[i] = [Weighted(int(t), float(w)) for t, w in zip(kept, weights, strict=True)]
        exact = {target.token: source for source, (target,) in self.shared.items()}
        return found | {target: [Weighted(source, 1.0)] for target, source in exact.items()}

    @cached_property
    def projection(self) -> dict[int, list[Weighted]]:
        """Source token to the target tokens that are made of it, with weights that sum to 1."""
        found: defaultdict[int, list[Weighted]] = defaultdict(list)
        for target, parts in self.parts.items():
            for source, weight in parts:
                found[source].append(Weighted(target, weight))
        return {source: _scaled(targets) for source, targets in found.items()}

    @cached_property
    def hybrid(self) -> dict[int, list[Weighted]]:
        """As `shared`, and the target tokens whose first part has most of their weight."""
        found = defaultdict(
            list, {source: list(targets) for source, targets in self.shared.items()}
        )
        pinned: defaultdict[int, list[Weighted]] = defaultdict(list)
        for target, parts in self.parts.items():
            source, weight = parts[0]
            if weight >= PINNED and source not in self.shared:
                pinned[source].append(Weighted(target, weight))
        return dict(found) | {source: _scaled(targets) for source, targets in pinned.items()}

    def longest_prefix(self, written: bytes) -> int | None:
        """The longest target token that some bytes begin with."""
        for length in range(len(written), 0, -1):
            if written[:length] in self.by_bytes:
                return self.by_bytes[written[:length]]
        return None


def _scaled(targets: list[Weighted]) -> list[Weighted]:
    total = sum(weight for _, weight in targets)
    return [Weighted(token, weight / total) for token, weight in targets]


def source_row(source: Arrays, row: int) -> Row:
    """Entries of a row of a source store."""
    here = slice(int(source["entry_offsets"][row]), int(source["entry_offsets"][row + 1]))
    probabilities = np.exp(source["entry_logprobs"][here].astype(np.float64))
    return dict(zip(source["entry_ids"][here].tolist(), probabilities.tolist(), strict=True))


def _mapped(row: Row, table: Mapping[int, list[Weighted]]) -> Row:
    found: defaultdict[int, float] = defaultdict(float)
    for token, mass in row.items():
        for target, weight in table.get(token, ()):
            found[target] += mass * weight
    return dict(found)


class Place(NamedTuple):
    """A position of the target, seen from the source.

    Args:
        row: The source's row that begins here, or in whose token the position lies.
        read: Bytes of that token that stand before the position; empty where it begins here.
    """

    row: int
    read: bytes


def places(source: EncodedSegment, target: EncodedSegment, text: bytes) -> Iterator[Place | None]:
    """The place of each of the target's tokens; None behind the source's last byte."""
    starts = np.concatenate(([0], source.byte_ends[:-1])).astype(np.int64)
    begins = np.concatenate(([0], target.byte_ends[:-1])).astype(np.int64)
    for begin in begins.tolist():
        row = int(np.searchsorted(starts, begin, side="right")) - 1
        if begin < int(source.byte_ends[row]):
            yield Place(row, text[int(starts[row]) : begin])
        else:
            yield None


def of_boundaries(table: Callable[[Maps], Mapping[int, list[Weighted]]]) -> RowMaker:
    """Rows where a source token begins, by a map of vocabularies."""

    def make(maps: Maps, source: Arrays, first_row: int, place: Place) -> Row:
        if place.read:
            return {}
        return _mapped(source_row(source, first_row + place.row), table(maps))

    return make


def byte_prefix(maps: Maps, source: Arrays, first_row: int, place: Place) -> Row:
    """Rows of the byte-prefix map."""
    tokens = maps.source.vocabulary.tokens
    agreeing = {
        token: mass
        for token, mass in source_row(source, first_row + place.row).items()
        if tokens[token].startswith(place.read) and len(tokens[token]) > len(place.read)
    }
    total = sum(agreeing.values()) if place.read else 1.0
    found: defaultdict[int, float] = defaultdict(float)
    for token, mass in agreeing.items():
        goal = maps.longest_prefix(tokens[token][len(place.read) :])
        if goal is not None:
            found[goal] += mass / total
    return dict(found)


RowMaker = Callable[[Maps, Arrays, int, Place], Row]
BASELINES: dict[str, RowMaker] = {
    "gold": of_boundaries(lambda maps: maps.shared),
    "h_kl": of_boundaries(lambda maps: maps.hybrid),
    "p_kl": of_boundaries(lambda maps: maps.projection),
    "bpm": byte_prefix,
}
