"""Which row of a capture has which segment: by the tokens that the text begins with.

A segment is found where a text of the capture begins with all of the segment's tokens, context and
text. What comes after them does not matter, since a model does not look ahead. Each beginning of each
text has a fingerprint, so one pass over the capture's tokens finds all segments at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from extract.captures.files import TokenBatch

_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def beginnings(token_ids: Any, text_starts: Any) -> npt.NDArray[np.uint64]:
    """[N] fingerprint of each text from its first token up to this one.

    Sums of numbers that are made of each token and its place (splitmix64), so all are had in one pass.

    Args:
        token_ids: [N] int64 of texts, joined.
        text_starts: [N] int64 index of the first token of each token's text.
    """
    ids = np.asarray(token_ids, np.int64).astype(np.uint64)
    starts = np.asarray(text_starts, np.int64)
    place = (np.arange(len(ids)) - starts + 1).astype(np.uint64)
    x = ids + place * _STEP
    x = (x ^ (x >> np.uint64(30))) * _FIRST
    x = (x ^ (x >> np.uint64(27))) * _SECOND
    x ^= x >> np.uint64(31)
    sums = np.cumsum(x, dtype=np.uint64)
    return sums - (sums - x)[starts] if len(x) else sums


def fingerprint_of(input_ids: list[int]) -> int:
    """Fingerprint of one text."""
    return int(beginnings(input_ids, np.zeros(len(input_ids), np.int64))[-1])


@dataclass(frozen=True, slots=True)
class Place:
    """Where a text begins: file, row group, row of the group, and token of the row."""

    file: int
    group: int
    row: int
    start: int


@dataclass(slots=True)
class Index:
    """Places of the wanted texts.

    Args:
        wanted: [W] uint64 fingerprints, sorted, each once.
    """

    wanted: npt.NDArray[np.uint64]
    _places: npt.NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self._places = np.full((len(self.wanted), 4), -1, np.int64)

    def add(self, batch: TokenBatch) -> None:
        """Look for the texts that are not found yet in some rows."""
        if not len(batch.token_ids) or not len(self.wanted):
            return
        found = beginnings(batch.token_ids, batch.text_starts)
        at = np.searchsorted(self.wanted, found)
        at[at == len(self.wanted)] = 0
        hits = np.flatnonzero((self.wanted[at] == found) & (self._places[at, 0] < 0))
        starts = batch.text_starts[hits]
        rows = np.searchsorted(batch.row_offsets, starts, side="right") - 1
        self._places[at[hits], 0] = batch.file
        self._places[at[hits], 1] = batch.group
        self._places[at[hits], 2] = batch.first_row + rows
        self._places[at[hits], 3] = starts - batch.row_offsets[rows]

    def place(self, text: int) -> Place | None:
        """Where a text is, by its fingerprint; None where it is not."""
        at = int(np.searchsorted(self.wanted, np.uint64(text)))
        if at == len(self.wanted) or int(self.wanted[at]) != text or self._places[at, 0] < 0:
            return None
        return Place(*map(int, self._places[at]))

    def missing(self) -> int:
        """Wanted texts that are not found."""
        return int((self._places[:, 0] < 0).sum())
