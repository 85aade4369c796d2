"""Where the mass of a source token goes when the target may write on past its end.

A source token "12" may stand before "3": the target would then write "123", not "12". Which target
token follows a source token is counted on the corpus itself, at positions where both begin together,
and the token that the target would begin with on the source token alone is the prior:

    weight(e -> y) = (count(e, y) + prior * [y = first(e)]) / (count(e) + prior)

so a token never seen goes to its first token, and a frequent one where it went in this corpus.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from align.chain.first_token import NO_TOKEN, PieceTable
from align.counts.pair_counts import DistinctPairs

MAX_TARGETS = 32
"""Target tokens kept per source token; what they leave out becomes tail."""
LEAST_SHARE = 0.01
"""Smaller shares of a source token are tail too. With 32k x 32k ids that cost 0.3 % of the mass and
made alignment twice as fast: each entry of each row is spread over so many."""


class Continuation(NamedTuple):
    """CSR over source tokens, which compiled code reads as it is.

    Args:
        offsets: [V+1] int64.
        targets: Target tokens, uint32.
        weights: float64, at most 1 in sum per source token; the rest is tail.
    """

    offsets: npt.NDArray[np.int64]
    targets: npt.NDArray[np.uint32]
    weights: npt.NDArray[np.float64]

    def only_sure(self) -> Continuation:
        """Only where a source token always went to one target token; the rest of the mass is tail."""
        counts = np.diff(self.offsets)
        sure = counts == 1
        return Continuation(
            offsets=np.concatenate(([0], np.cumsum(np.where(sure, counts, 0)))),
            targets=self.targets[np.repeat(sure, counts)],
            weights=self.weights[np.repeat(sure, counts)],
        )


class PairCounts:
    """Counts of (source token, target token) that begin at the same byte of running text.

    Args:
        source_vocab_size: Ids of the source are below it.
        target_vocab_size: Ids of the target are below it.
    """

    def __init__(self, source_vocab_size: int, target_vocab_size: int) -> None:
        self._width = target_vocab_size
        self._height = source_vocab_size
        self.met = DistinctPairs(target_vocab_size)

    def add(
        self,
        source_ids: npt.NDArray[np.uint32],
        source_ends: npt.NDArray[np.int64],
        target_ids: npt.NDArray[np.uint32],
        target_ends: npt.NDArray[np.int64],
    ) -> None:
        """Note one segment; its first tokens are left out (nothing stands before them)."""
        _, here, there = np.intersect1d(source_ends[:-1], target_ends[:-1], return_indices=True)
        source, target = source_ids[1:][here], target_ids[1:][there]
        self.met.note(source.astype(np.int64), target.astype(np.int64))

    def continuation(self, first: npt.NDArray[np.int32], prior: float) -> Continuation:
        """The weights.

        Args:
            first: [V] first target token of each source token, -1 for none.
            prior: Weight of the first token, in occurrences.
        """
        source, target, counts = self.met.counts()
        known = np.flatnonzero(first != NO_TOKEN)
        all_source = np.concatenate((source, known))
        all_target = np.concatenate((target, first[known].astype(np.int64)))
        mass = np.concatenate((counts.astype(np.float64), np.full(len(known), prior)))
        keys, rows = np.unique(all_source * self._width + all_target, return_inverse=True)
        mass = np.bincount(rows, mass, len(keys))
        source, target = keys // self._width, keys % self._width
        totals = np.bincount(source, mass, self._height)
        order = np.lexsort((target, -mass, source))
        source, target, mass = source[order], target[order], mass[order]
        begins = np.searchsorted(source, np.arange(self._height))
        place = np.arange(len(source)) - begins[source]
        kept = (place < MAX_TARGETS) & ((mass >= LEAST_SHARE * totals[source]) | (place == 0))
        source, target, mass = source[kept], target[kept], mass[kept]
        counts = np.bincount(source, minlength=self._height)
        return Continuation(
            offsets=np.concatenate(([0], np.cumsum(counts))),
            targets=target.astype(np.uint32),
            weights=mass / totals[source],
        )


def first_tokens(pieces: PieceTable) -> npt.NDArray[np.int32]:
    """[V] target token that each whole source token begins with in running text, -1 for none."""
    lengths = np.diff(pieces.offsets)
    found = np.full(len(lengths), NO_TOKEN, np.int32)
    some = lengths > 0
    found[some] = pieces.middle[pieces.offsets[:-1][some]]
    return found
