"""To which target tokens the mass of a source token goes, where the target's token may be longer.

If the source token "12" is followed by "3", the target may write "123" as one token. So it is counted
on the corpus which target token y begins at the same byte as source token e. The prior is first(e), the
token with which the target's tokenizer begins the bytes of e alone:

    weight(e -> y) = (count(e, y) + prior * [y = first(e)]) / (count(e) + prior)

A source token that the corpus does not have gives all its mass to first(e).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from align.chain.first_token import NO_TOKEN, PieceTable
from align.counts.pair_counts import DistinctPairs

MAX_TARGETS = 32
"""Target tokens kept per source token, at most; the mass of the others becomes tail."""
LEAST_SHARE = 0.01
"""Target tokens with a smaller share of a source token's mass are left out too, and their mass becomes
tail. With 32k x 32k ids this was 0.3 % of the mass, and alignment was twice as fast."""


class Continuation(NamedTuple):
    """The target tokens of each source token with their weights, in CSR form (read by compiled code).

    Args:
        offsets: [V+1] int64, where each source token's part of the other two begins.
        targets: uint32 target tokens, by falling weight.
        weights: float64 shares of the source token's mass; where they add up to less than 1, the rest
            is tail.
    """

    offsets: npt.NDArray[np.int64]
    targets: npt.NDArray[np.uint32]
    weights: npt.NDArray[np.float64]

    def only_certain(self) -> Continuation:
        """Keep only source tokens with a single target token; the mass of all others becomes tail."""
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
        source_vocab_size: All source ids are below it.
        target_vocab_size: All target ids are below it.
    """

    def __init__(self, source_vocab_size: int, target_vocab_size: int) -> None:
        self._width = target_vocab_size
        self._height = source_vocab_size
        self.distinct = DistinctPairs(target_vocab_size)

    def add(
        self,
        source_ids: npt.NDArray[np.uint32],
        source_ends: npt.NDArray[np.int64],
        target_ids: npt.NDArray[np.uint32],
        target_ends: npt.NDArray[np.int64],
    ) -> None:
        """Count the pairs of one segment, except its first tokens, which have no text before them.

        Args:
            source_ids: [R] source tokens of the segment.
            source_ends: [R] byte after each of them, within the segment.
            target_ids: [N] target tokens of the segment.
            target_ends: [N] byte after each of them.
        """
        _, here, there = np.intersect1d(source_ends[:-1], target_ends[:-1], return_indices=True)
        source, target = source_ids[1:][here], target_ids[1:][there]
        self.distinct.note(source.astype(np.int64), target.astype(np.int64))

    def continuation(self, first: npt.NDArray[np.int32], prior: float) -> Continuation:
        """Weights of the target tokens of each source token, by the formula above.

        Args:
            first: [V] first target token of each source token, -1 for none.
            prior: How many occurrences the first token counts for.
        """
        source, target, counts = self.distinct.counts()
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
    """[V] int32 first target token of each source token in running text, -1 for none."""
    lengths = np.diff(pieces.offsets)
    first = np.full(len(lengths), NO_TOKEN, np.int32)
    some = lengths > 0
    first[some] = pieces.middle[pieces.offsets[:-1][some]]
    return first
