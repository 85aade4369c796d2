"""How often a source token and a target token met, in memory of the distinct pairs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


class DistinctPairs:
    """Counts of (source token, target token)."""

    def __init__(self, target_vocab_size: int) -> None:
        self._width = target_vocab_size
        self._keys = np.empty(0, np.int64)
        self._counts = np.empty(0, np.int64)
        self._pending: list[Ids] = []

    def note(self, source: Ids, target: Ids) -> None:
        """Note pairs, each met once more."""
        self._pending.append(source * self._width + target)

    def merge(self) -> None:
        """Fold what was noted into the counts."""
        if not self._pending:
            return
        found, counts = np.unique(np.concatenate(self._pending), return_counts=True)
        self._pending = []
        both = np.concatenate((self._keys, found))
        weights = np.concatenate((self._counts, counts))
        self._keys, rows = np.unique(both, return_inverse=True)
        self._counts = np.bincount(rows, weights).astype(np.int64)

    def counts(self) -> tuple[Ids, Ids, Ids]:
        """Source tokens, target tokens and counts of the distinct pairs, by source, then target."""
        self.merge()
        return self._keys // self._width, self._keys % self._width, self._counts
