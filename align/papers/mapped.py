"""Rows of other methods: each source entry's mass goes to target tokens by a table of vocabularies.

Where a token of both sides begins, the source's row is mapped by the table; what has no target token is
tail. Inside a source token only method `byte_prefix` has rows: of the entries that agree with the
bytes already read, scaled to 1, each gives its mass to the longest target token that goes on with it.
To that the map as published says nothing: it is our reading, at its best. Other positions have no
entries, tail 1 and origin none.

The label's mass at a source token is the exact one of the store. Shapes: N target positions, P pairs
of a position and a target token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from align.methods.shard_arrays import MappedRows, join_segments, mapped_arrays
from align.papers.entry_maps import EntryMap, Vocabularies
from align.papers.mined import join_texts, require_ids, require_text
from store_schema.layout import Arrays, Origin
from store_schema.text.tokenizer import EncodedSegment

_PAIRS = 1 << 22
"""Pairs that are held at a time, about."""


class Mass(NamedTuple):
    """Mass of a target token at a position; a token may come several times.

    Args:
        rows: [P] int64 positions.
        tokens: [P] int64 target ids.
        values: [P] float64 probabilities.
    """

    rows: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]


class Places(NamedTuple):
    """Where each target token stands in the source.

    Args:
        source_rows: [N] int64 row whose token begins here or covers the position; -1 for none.
        read: [N] int64 bytes of that token before the position; 0 where it begins here.
    """

    source_rows: npt.NDArray[np.int64]
    read: npt.NDArray[np.int64]


@dataclass(frozen=True)
class MappedAligner:
    """A method, prepared for one source and one target.

    Args:
        table: Target tokens of each source token.
        vocabularies: Both sides.
        max_entries: Entries kept at each position, at most.
        inside: Whether there are rows inside source tokens.
    """

    table: EntryMap
    vocabularies: Vocabularies
    max_entries: int
    inside: bool = False

    def align(
        self, source: Arrays, texts: Sequence[bytes], target: Sequence[EncodedSegment]
    ) -> Arrays:
        """See `Aligner`.

        Raises:
            MismatchError: Tokens do not end with their texts, or ids are outside the table.
        """
        target_ids, target_ends, target_offsets = join_segments(target)
        source_ends = source["byte_ends"].astype(np.int64)
        segment_rows = (source["token_offsets"], target_offsets)
        _, text_offsets = join_texts(texts)
        require_text(source["token_offsets"], source_ends, text_offsets, "source store")
        require_text(target_offsets, target_ends, text_offsets, "target's tokens")
        require_ids(source, len(self.table.offsets) - 1)
        stand = places(segment_rows, source_ends, target_ends, text_offsets)
        counts = np.zeros(len(target_ids), np.int64)
        label_mass = np.zeros(len(target_ids))
        parts: list[Mass] = []
        for mass in self._mass(source, stand, target_ids, texts, target_offsets):
            kept = largest(mass, target_ids, self.max_entries)
            counts += np.bincount(kept.rows, minlength=len(counts))
            label = kept.tokens == target_ids[kept.rows]
            label_mass[kept.rows[label]] = kept.values[label]
            parts.append(kept)
        # A chunk has either positions where a source token begins or others: back into one order.
        values = np.concatenate([part.values for part in parts] or [np.empty(0)])
        tokens = np.concatenate([part.tokens for part in parts] or [np.empty(0, np.int64)])
        rows = np.concatenate([part.rows for part in parts] or [np.empty(0, np.int64)])
        order = np.argsort(rows, kind="stable")
        offsets = np.concatenate(([0], np.cumsum(counts)))
        origin = np.where(stand.read > 0, Origin.INSIDE, Origin.BOUNDARY).astype(np.uint8)
        made = MappedRows(offsets, tokens[order], values[order], label_mass, origin)
        return mapped_arrays(source, (target_ids, target_ends, target_offsets), made)

    def _mass(
        self,
        source: Arrays,
        stand: Places,
        target_ids: npt.NDArray[np.uint32],
        texts: Sequence[bytes],
        target_offsets: npt.NDArray[np.int64],
    ) -> Iterator[Mass]:
        """All mass, position by position of one kind after the other, a few million pairs at a time."""
        begin = np.flatnonzero((stand.source_rows >= 0) & (stand.read == 0))
        for rows in _chunks(begin, self._pairs(source, stand.source_rows[begin])):
            yield self._mapped(source, rows, stand.source_rows[rows])
        if self.inside:
            inside = np.flatnonzero((stand.source_rows >= 0) & (stand.read > 0))
            segments = np.searchsorted(target_offsets, inside, side="right") - 1
            yield self._inside(source, inside, stand, [texts[d] for d in segments.tolist()])

    def _pairs(self, source: Arrays, source_rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """[rows] upper bounds of the pairs that each source row becomes."""
        fan = np.diff(self.table.offsets)
        sums = np.concatenate(([0], np.cumsum(fan[source["entry_ids"]])))
        offsets = source["entry_offsets"]
        bounds: npt.NDArray[np.int64] = (
            sums[offsets[source_rows + 1]]
            - sums[offsets[source_rows]]
            + fan[source["token_ids"][source_rows]]
        )
        return bounds

    def _mapped(
        self, source: Arrays, rows: npt.NDArray[np.int64], source_rows: npt.NDArray[np.int64]
    ) -> Mass:
        """Positions where a source token begins, through the table."""
        which, tokens, masses = source_entries(source, source_rows)
        first, last = self.table.offsets[tokens], self.table.offsets[tokens + 1]
        pair, of = _ranges(first, last)
        values = masses[of] * self.table.weights[pair]
        return Mass(rows[which[of]], self.table.targets[pair], values)

    def _inside(
        self,
        source: Arrays,
        rows: npt.NDArray[np.int64],
        stand: Places,
        texts: Sequence[bytes],
    ) -> Mass:
        """Positions inside a source token: the entries that agree with what was read."""
        written = self.vocabularies.source.vocabulary.tokens
        ends = source["byte_ends"].astype(np.int64)
        offsets = source["token_offsets"]
        firsts = set(offsets[:-1].tolist())

        @cache
        def rest(token: int, read: bytes) -> int:
            """Where a token's mass goes after some bytes: -1 to no token, -2 if it does not agree."""
            own = written[token]
            if not own.startswith(read) or len(own) == len(read):
                return -2
            goal = self.vocabularies.longest_prefix(own[len(read) :])
            return -1 if goal is None else goal

        which, tokens, masses = source_entries(source, stand.source_rows[rows])
        goals = np.empty(len(tokens), np.int64)
        reads = []
        for row, source_row, text in zip(
            rows.tolist(), stand.source_rows[rows].tolist(), texts, strict=True
        ):
            start = 0 if source_row in firsts else int(ends[source_row - 1])
            reads.append(text[start : start + int(stand.read[row])])
        for i, (k, token) in enumerate(zip(which.tolist(), tokens.tolist(), strict=True)):
            goals[i] = rest(token, reads[k])
        agree = goals > -2
        totals = np.bincount(which[agree], masses[agree], len(rows))
        some = goals >= 0
        values = masses[some] / totals[which[some]]
        return Mass(rows[which[some]], goals[some], values)


def places(
    segment_rows: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]],
    source_ends: npt.NDArray[np.int64],
    target_ends: npt.NDArray[np.int64],
    text_offsets: npt.NDArray[np.int64],
) -> Places:
    """Where each target token stands in the source.

    Args:
        segment_rows: (source token offsets [D+1], target token offsets [D+1]).
        source_ends: Byte after each source token, within its segment.
        target_ends: [N] the same of the target.
        text_offsets: [D+1] where each segment's text begins.
    """
    # Segments lie one byte apart, so that the end of one is not the beginning of the next.
    bases = text_offsets[:-1] + np.arange(len(text_offsets) - 1)
    source_offsets, target_offsets = segment_rows
    starts, stops = _spread(source_offsets, source_ends, bases)
    begins, _ = _spread(target_offsets, target_ends, bases)
    rows = np.searchsorted(starts, begins, side="right") - 1
    segments = np.repeat(np.arange(len(bases)), np.diff(target_offsets))
    found = rows >= source_offsets[segments]
    rows = np.maximum(rows, 0)
    if len(starts):
        found &= (starts[rows] == begins) | (begins < stops[rows])
        read = np.where(found, begins - starts[rows], 0)
    else:
        read = np.zeros(len(begins), np.int64)
    return Places(np.where(found, rows, -1), read)


def _spread(
    offsets: npt.NDArray[np.int64], ends: npt.NDArray[np.int64], bases: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Starts and stops of tokens in all texts."""
    starts = np.concatenate(([0], ends[:-1])) if len(ends) else ends.copy()
    starts = np.where(np.isin(np.arange(len(ends)), offsets[:-1]), 0, starts)
    shift = np.repeat(bases, np.diff(offsets))
    return starts + shift, ends + shift


def source_entries(
    source: Arrays, rows: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Entries of source rows, with the real token's exact mass even where it is no entry.

    Args:
        source: The source store's arrays of the shard.
        rows: [R] its positions.

    Returns:
        Index into `rows`, token and mass of each entry.
    """
    offsets = source["entry_offsets"]
    entry, which = _ranges(offsets[rows], offsets[rows + 1])
    tokens = source["entry_ids"][entry].astype(np.int64)
    masses = np.exp(source["entry_logprobs"][entry].astype(np.float64))
    labels = source["token_ids"][rows].astype(np.int64)
    listed = np.bincount(which[tokens == labels[which]], minlength=len(rows)) > 0
    known = ~np.isnan(source["label_logprobs"][rows])
    more = np.flatnonzero(known & ~listed)
    with np.errstate(invalid="ignore"):
        extra = np.exp(source["label_logprobs"][rows[more]].astype(np.float64))
    return (
        np.concatenate([which, more]),
        np.concatenate([tokens, labels[more]]),
        np.concatenate([masses, extra]),
    )


def largest(mass: Mass, labels: npt.NDArray[np.uint32], most: int) -> Mass:
    """The tokens of most mass at each position, ties by id, the label always among them.

    Args:
        mass: Pairs in any order; those of one token are summed.
        labels: [N] the target's tokens.
        most: Tokens of a position, at most.

    Returns:
        Pairs by position, then falling mass.
    """
    order = np.lexsort((mass.tokens, mass.rows))
    rows, tokens, values = (array[order] for array in mass)
    new = np.ones(len(rows), bool)
    new[1:] = (rows[1:] != rows[:-1]) | (tokens[1:] != tokens[:-1])
    first = np.flatnonzero(new)
    if not len(first):
        return Mass(rows, tokens, values)
    rows, tokens, values = rows[first], tokens[first], np.add.reduceat(values, first)
    some = values > 0
    rows, tokens, values = rows[some], tokens[some], values[some]
    order = np.lexsort((tokens, -values, rows))
    rows, tokens, values = rows[order], tokens[order], values[order]
    starts = np.flatnonzero(np.concatenate(([True], rows[1:] != rows[:-1]))) if len(rows) else rows
    rank = np.arange(len(rows)) - np.repeat(starts, np.diff(np.append(starts, len(rows))))
    label = tokens == labels[rows]
    late = np.isin(rows, rows[label & (rank >= most)])
    kept = (rank < most - late) | label
    totals = np.bincount(rows[kept], values[kept], len(labels))
    scale = np.maximum(totals, 1.0)  # rounding of the store's float32
    return Mass(rows[kept], tokens[kept], values[kept] / scale[rows[kept]])


def _chunks(
    rows: npt.NDArray[np.int64], pairs: npt.NDArray[np.int64]
) -> Iterator[npt.NDArray[np.int64]]:
    """Rows in parts of about `_PAIRS` pairs."""
    if not len(rows):
        return
    part = np.cumsum(pairs) // _PAIRS
    yield from np.split(rows, np.flatnonzero(np.diff(part)) + 1)


def _ranges(
    first: npt.NDArray[np.int64], last: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """All numbers of ranges, end to end, and the range of each."""
    lengths: npt.NDArray[Any] = last - first
    of = np.repeat(np.arange(len(first)), lengths)
    before = np.concatenate(([0], np.cumsum(lengths)))[:-1]
    return np.arange(len(of)) - before[of] + first[of], of
