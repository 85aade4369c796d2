"""How often a source token and a target token met, in memory of the distinct pairs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]

_LEAST_PENDING = 1 << 20
"""Fewer pairs are not folded yet: each fold sorts all that is known."""


class DistinctPairs:
    """Counts of (source token, target token)."""

    def __init__(self, target_vocab_size: int) -> None:
        self._width = target_vocab_size
        self._keys = np.empty(0, np.int64)
        self._counts = np.empty(0, np.int64)
        self._pending: list[Ids] = []
        self._num_pending = 0

    def note(self, source: Ids, target: Ids) -> None:
        """Note pairs, each met once more."""
        self._pending.append(source * self._width + target)
        self._num_pending += len(source)

    def merge(self) -> None:
        """Fold what was noted into the counts once there is much of it."""
        if self._num_pending >= max(_LEAST_PENDING, len(self._keys)):
            self._fold()

    def _fold(self) -> None:
        if not self._pending:
            return
        found, counts = np.unique(np.concatenate(self._pending), return_counts=True)
        self._pending, self._num_pending = [], 0
        both = np.concatenate((self._keys, found))
        weights = np.concatenate((self._counts, counts))
        self._keys, rows = np.unique(both, return_inverse=True)
        self._counts = np.bincount(rows, weights).astype(np.int64)

    def counts(self) -> tuple[Ids, Ids, Ids]:
        """Source tokens, target tokens and counts of the distinct pairs, by source, then target."""
        self._fold()
        return self._keys // self._width, self._keys % self._width, self._counts

    def take(self, source: Ids, target: Ids, counts: Ids) -> None:
        """Begin again with what `counts` of another gave."""
        self._pending, self._num_pending = [], 0
        self._keys, self._counts = source * self._width + target, counts
