"""Which source tokens a row's tail may hold inside the label: the most frequent ones of the corpus.

A row lists its most probable tokens; the rest is tail. Where the label ends inside the real token,
other tokens that begin with the label's bytes may go on as well, and if the row lists none of them,
only the tail can hold them. Its mass is shared among all pairs of a source token and the target token
that begins with it, as often as the corpus has them, but for the tokens that the row lists:

    mass(v) = tail * share(v, label) / (1 - sum of share(e) over the row's tokens e)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from align.counts.pair_counts import DistinctPairs

PRIOR = 1.0
"""Occurrences that each source token has beside those counted, with no target token in particular."""
LEAST_LEFT = 1e-3
"""A row whose tokens have nearly all of the corpus's pairs leaves none for its tail."""


class TailTokens(NamedTuple):
    """Source tokens that begin with each target token and are longer, in CSR form.

    Args:
        offsets: [V+1] int64, where each target token's part of the other two begins.
        tokens: int64 source tokens, by falling share.
        shares: float64 share of the corpus's pairs.
        of_source: [V'] float64 share of each source token, with whatever target token.
    """

    offsets: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    shares: npt.NDArray[np.float64]
    of_source: npt.NDArray[np.float64]

    def scales(
        self, tails: npt.NDArray[np.float64], ids: Any, entry_offsets: Any, entry_ids: Any
    ) -> npt.NDArray[np.float64]:
        """Factor of each row's shares.

        Args:
            tails: [R] mass of each row that no token has.
            ids: [R] real tokens.
            entry_offsets: [R+1] where each row's entries begin.
            entry_ids: [E] source tokens.

        Returns:
            [R] tail over the share of the tokens that the row does not list; 0 without a tail.
        """
        listed = (
            np.add.reduceat(
                np.concatenate((self.of_source[entry_ids.astype(np.int64)], [0.0])),
                entry_offsets[:-1],
            )
            if len(ids)
            else np.empty(0)
        )
        listed[np.diff(entry_offsets) == 0] = 0.0
        rows = np.repeat(np.arange(len(ids)), np.diff(entry_offsets))
        has_real = np.zeros(len(ids), np.bool_)
        has_real[rows[entry_ids == ids[rows]]] = True
        listed += np.where(has_real, 0.0, self.of_source[ids.astype(np.int64)])
        left = 1.0 - listed
        return np.where(left > LEAST_LEFT, tails / np.maximum(left, LEAST_LEFT), 0.0)


def no_tail_tokens(source_vocab_size: int, target_vocab_size: int) -> TailTokens:
    """None at all: all of a row's tail stays tail."""
    offsets = np.zeros(target_vocab_size + 1, np.int64)
    return TailTokens(offsets, np.empty(0, np.int64), np.empty(0), np.zeros(source_vocab_size))


def tail_tokens(
    pairs: DistinctPairs,
    source_lengths: npt.NDArray[np.int64],
    target_lengths: npt.NDArray[np.int64],
    most: int,
) -> TailTokens:
    """The table from counts of (source token, target token) that begin at the same byte.

    Args:
        pairs: Those counts.
        source_lengths: [V'] bytes of each source token.
        target_lengths: [V] bytes of each target token.
        most: Source tokens kept for a target token, at most.
    """
    source, target, counts = pairs.counts()
    width = len(target_lengths)
    unseen = PRIOR * np.count_nonzero(source_lengths)
    shares = counts.astype(np.float64) / max(counts.sum() + unseen, 1.0)
    of_source = np.bincount(source, shares, len(source_lengths)).astype(np.float64)
    longer = source_lengths[source] > target_lengths[target]
    source, target, shares = source[longer], target[longer], shares[longer]
    order = np.lexsort((source, -shares, target))
    source, target, shares = source[order], target[order], shares[order]
    begins = np.searchsorted(target, np.arange(width))
    kept = np.arange(len(target)) - begins[target] < most
    offsets = np.concatenate(([0], np.cumsum(np.bincount(target[kept], minlength=width))))
    return TailTokens(offsets.astype(np.int64), source[kept], shares[kept], of_source)
