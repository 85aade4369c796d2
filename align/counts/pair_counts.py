"""How often each (source token, target token) pair occurs, in memory linear in the distinct pairs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]

_LEAST_PENDING = 1 << 20
"""Fewer pairs than this are not merged yet: each merge sorts all distinct pairs."""


class DistinctPairs:
    """Counts of (source token, target token)."""

    def __init__(self, target_vocab_size: int) -> None:
        self._width = target_vocab_size
        self._keys = np.empty(0, np.int64)
        self._counts = np.empty(0, np.int64)
        self._pending: list[Ids] = []
        self._num_pending = 0

    def note(self, source: Ids, target: Ids) -> None:
        """Add one occurrence of each pair (source[i], target[i]); int64 ids."""
        self._pending.append(source * self._width + target)
        self._num_pending += len(source)

    def merge(self) -> None:
        """Merge the noted pairs into the counts, if there are enough of them to be worth a sort."""
        if self._num_pending >= max(_LEAST_PENDING, len(self._keys)):
            self._fold()

    def _fold(self) -> None:
        if not self._pending:
            return
        keys, counts = np.unique(np.concatenate(self._pending), return_counts=True)
        self._pending, self._num_pending = [], 0
        both = np.concatenate((self._keys, keys))
        weights = np.concatenate((self._counts, counts))
        self._keys, rows = np.unique(both, return_inverse=True)
        self._counts = np.bincount(rows, weights).astype(np.int64)

    def counts(self) -> tuple[Ids, Ids, Ids]:
        """Source tokens [P], target tokens [P] and counts [P] of the distinct pairs, sorted by source
        token, then target token; int64."""
        self._fold()
        return self._keys // self._width, self._keys % self._width, self._counts

    def restore(self, source: Ids, target: Ids, counts: Ids) -> None:
        """Replace everything counted by what `counts` of another object returned."""
        self._pending, self._num_pending = [], 0
        self._keys, self._counts = source * self._width + target, counts
