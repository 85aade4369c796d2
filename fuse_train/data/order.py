"""The order of samples: a pure function of seed, epoch and the plan's shard sizes.

Worker counts, processes and resumption never enter, so they cannot change what is trained on. The
training sequence is the epochs one after the other; a position in it is one integer, and finding a
sample at any position costs one window's permutation, so resuming replays nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Units = Callable[[int], npt.NDArray[np.int64]]
"""From a shard to a group number for each of its segments [D]; a group stays together."""


@dataclass(frozen=True, slots=True)
class SampleRef:
    """One sample: index of its shard in the list of sizes, and of its segment in the shard."""

    shard: int
    segment: int


class SampleOrder:
    """Shards shuffled per epoch, segments shuffled within windows of a few shards.

    Args:
        shard_sizes: Segments of each shard of the split, in plan order; none is 0.
        seed: Of the run.
        window_shards: Shards whose segments are mixed, and so are needed at one time.
        units: Groups of segments that stay together, in their order; None shuffles single segments.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        *,
        seed: int,
        window_shards: int,
        units: Units | None = None,
    ) -> None:
        self._sizes = np.asarray(shard_sizes, np.int64)
        self._seed = seed
        self._window_shards = window_shards
        self._units = units
        self._epoch = lru_cache(maxsize=4)(self._epoch_uncached)
        self._window = lru_cache(maxsize=4)(self._window_uncached)

    def __len__(self) -> int:
        """Samples of one epoch."""
        return int(self._sizes.sum())

    def samples(self, start: int, count: int) -> list[SampleRef]:
        """`count` samples from position `start` of the endless sequence of epochs."""
        return [self._sample(position) for position in range(start, start + count)]

    def _sample(self, position: int) -> SampleRef:
        epoch, index = divmod(position, len(self))
        _, ends = self._epoch(epoch)
        window = int(np.searchsorted(ends, index, side="right"))
        start = int(ends[window - 1]) if window else 0
        shards, segments = self._window(epoch, window)
        return SampleRef(int(shards[index - start]), int(segments[index - start]))

    def _epoch_uncached(self, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Order of the shards, and where each window of them ends."""
        shards = np.random.default_rng([self._seed, epoch]).permutation(len(self._sizes))
        starts = np.arange(0, len(shards), self._window_shards)
        return shards, np.cumsum(np.add.reduceat(self._sizes[shards], starts))

    def _window_uncached(
        self, epoch: int, window: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Shard and segment of each sample of a window."""
        order, _ = self._epoch(epoch)
        first = window * self._window_shards
        chosen = order[first : first + self._window_shards]
        shards = np.repeat(chosen, self._sizes[chosen])
        segments = np.concatenate([np.arange(self._sizes[shard]) for shard in chosen])
        rng = np.random.default_rng([self._seed, epoch, window])
        if self._units is None:
            mixed = rng.permutation(len(shards))
        else:
            numbers = np.concatenate([self._units(int(shard)) for shard in chosen])
            _, unit = np.unique(np.stack([shards, numbers]), axis=1, return_inverse=True)
            mixed = np.argsort(rng.permutation(int(unit.max()) + 1)[unit], kind="stable")
        return shards[mixed], segments[mixed]


def process_slice(num_samples: int, index: int, count: int) -> slice:
    """The part of a global batch that process `index` of `count` takes; sizes differ by at most 1."""
    return slice(num_samples * index // count, num_samples * (index + 1) // count)
