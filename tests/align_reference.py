"""The alignment of design.md in plain Python: dictionaries, one position at a time, no shortcuts.

Written from the description, not from the kernel; the fast path is held against it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from align.project import VocabularyMap
from store_schema.layout import Arrays
from store_schema.tokenizer import EncodedSegment
from store_schema.vocabulary import Vocabulary


@dataclass
class Row:
    """A source position: its token, bytes [start, end), entries and the label's probability."""

    token: int
    start: int
    end: int
    entries: dict[int, float]
    label: float


def source_rows(arrays: Arrays, segment: int) -> list[Row]:
    """Rows of one segment."""
    rows, begin = [], 0
    for i in range(arrays["token_offsets"][segment], arrays["token_offsets"][segment + 1]):
        entries = slice(arrays["entry_offsets"][i], arrays["entry_offsets"][i + 1])
        ids = arrays["entry_ids"][entries].tolist()
        mass = np.exp(arrays["entry_logprobs"][entries].astype(float)).tolist()
        end = int(arrays["byte_ends"][i])
        rows.append(
            Row(
                int(arrays["token_ids"][i]),
                begin,
                end,
                dict(zip(ids, mass, strict=True)),
                math.exp(arrays["label_logprobs"][i]),
            )
        )
        begin = end
    return rows


def reference(
    arrays: Arrays,
    segment: int,
    text: bytes,
    target: EncodedSegment,
    mapping: VocabularyMap,
    source: Vocabulary,
) -> list[dict[int, float]]:
    """Target distributions of one segment as {token: mass}; what is missing to 1 is tail."""
    rows = source_rows(arrays, segment)
    virtual = bool(rows) and len(source.spelt[rows[0].token]) == rows[0].end + 1
    result, begin = [], 0
    for j, end in enumerate(target.byte_ends.tolist()):
        covering = [i for i, row in enumerate(rows) if row.start <= begin < row.end]
        if not covering or not rows[covering[0]].entries:
            result.append({})
        else:
            opened = int(target.token_ids[0]) if j > 0 and begin == 0 else None
            position = Position(rows, covering[0], begin, end, text, source, mapping, virtual)
            result.append(position.distribution(int(target.token_ids[j]), j == 0, opened))
        begin = end
    return result


@dataclass
class Position:
    """One target position and the source row that covers its first byte."""

    rows: list[Row]
    index: int
    begin: int
    end: int
    text: bytes
    source: Vocabulary
    mapping: VocabularyMap
    virtual: bool

    def pieces(self, opened: int | None) -> tuple[dict[int, tuple[int, int]], float]:
        """Entries that agree with the bytes read: token -> (place in the piece table, cut), and the
        mass of entries that are wholly read: they agree too, but say nothing of what follows."""
        row = self.rows[self.index]
        read = self.text[row.start : self.begin]
        table = self.mapping.pieces
        agreeing = {}
        ended = 0.0
        for token in row.entries:
            place, spelt = int(table.offsets[token]), self.source.tokens[token]
            if self.virtual and self.index == 0 and spelt.startswith(b" "):
                place, spelt = place + 1, spelt[1:]
            if spelt and read.startswith(spelt) and token != row.token:
                ended += row.entries[token]
            if len(spelt) <= len(read) or not spelt.startswith(read):
                continue
            if opened is not None and table.start[place] != opened:
                continue
            agreeing[token] = (place, len(read))
        return agreeing, ended

    def distribution(self, label: int, at_start: bool, opened: int | None) -> dict[int, float]:
        """Mass by target token."""
        row = self.rows[self.index]
        agreeing, ended = self.pieces(opened)
        agreeing.pop(row.token, None)
        real = row.entries.get(row.token, row.label)
        seen = sum(row.entries.values()) + (0 if row.token in row.entries else real)
        restricted = self.begin > row.start or opened is not None
        scale = 1.0
        if restricted:
            scale = min(seen, 1.0) / (sum(row.entries[t] for t in agreeing) + real + ended)
        mass: dict[int, float] = defaultdict(float)
        mass[label] += real * scale * self.share(self.index)
        table, going = self.mapping.pieces, self.mapping.continuation
        for token, (place, cut) in agreeing.items():
            amount = row.entries[token] * scale
            if at_start:
                goal = int(table.start[place])
            elif restricted:
                goal = int(table.middle[place + cut])
            else:
                for k in range(going.offsets[token], going.offsets[token + 1]):
                    mass[int(going.targets[k])] += amount * going.weights[k]
                continue
            if goal >= 0:
                mass[goal] += amount
        return {token: value for token, value in mass.items() if value > 0}

    def share(self, index: int) -> float:
        """Share of the real token's mass that goes on to cover the label."""
        row = self.rows[index]
        if row.end >= self.end:
            return 1.0
        if index + 1 == len(self.rows):
            return 0.0
        after = self.rows[index + 1]
        rest = self.text[row.end : self.end]
        others = sum(
            mass
            for token, mass in after.entries.items()
            if token != after.token and self.source.tokens[token].startswith(rest)
        )
        return min(others + after.label * self.share(index + 1), 1.0)
