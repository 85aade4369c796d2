"""The shards that a worker does, one after the other, each chosen when it is needed."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from launch.work import Part

if TYPE_CHECKING:
    from store_schema.plan.plan import ShardRecord
    from store_schema.store.writer import StoreWriter

REQUEST = b"next\n"
"""What a worker writes to its scheduler for each shard."""

ASK_EVERY_S = 5.0
"""How often a worker asks whether others have committed the shard that it works on."""


class ShardQueue:
    """The shards that a worker does, one after the other: its own, then what others have left.

    Commits alone say what is left, so workers need not know of each other. Two that do the same shard
    do no harm: whoever is later finds a commit and leaves its own out.

    Args:
        part: Of this worker.
        shards: All shards of the plan.
        store: Of the stage.
        available: Indices of shards that can be done; others are not taken from other workers. None
            for all.

    Attributes:
        pending: This worker's own shards that were not finished when it began.
    """

    def __init__(
        self,
        part: Part,
        shards: Sequence[ShardRecord],
        store: StoreWriter,
        available: Collection[int] | None = None,
    ) -> None:
        committed = store.committed(shards)
        self.pending = part.pending(shards, committed)
        self._others = [
            shard
            for shard in part.shards_of_others(shards)
            if shard.index not in committed and (available is None or shard.index in available)
        ]
        self._worker, self._store = part.worker, store
        self._done_elsewhere: set[int] = set()
        self._asked = time.monotonic()

    def __bool__(self) -> bool:
        return bool(self.pending or self._others)

    def __iter__(self) -> Iterator[ShardRecord]:
        """Each shard when it is needed; none that others have finished meanwhile."""
        for shard in self.pending:
            if not self.done_elsewhere(shard.index, wait_s=0):
                yield shard
        while self._others:
            done = self._store.committed_now()
            self._others = [shard for shard in self._others if shard.index not in done]
            if self._others:
                taken = self._next_of_others()
                self._others.remove(taken)
                yield taken

    def _next_of_others(self) -> ShardRecord:
        """One of the last shards, another one for each worker; last of all those that may be under way.

        A worker does its shards in order, so the first one that is left of it may be under way.
        """
        count = self._worker.count
        first = {s.index % count: s.index for s in reversed(self._others)}.values()
        waiting = [s for s in self._others if s.index not in first] or self._others
        return waiting[-1 - self._worker.index % min(count, len(waiting))]

    def is_own(self, shard: int) -> bool:
        """Whether a shard is this worker's, and not one that it took from another."""
        return any(own.index == shard for own in self.pending)

    def own_are_done(self) -> bool:
        """Whether its own shards are committed, by whomever: what it does now is others'."""
        return all(self._store.is_committed(shard.index) for shard in self.pending)

    def done_elsewhere(self, shard: int, *, wait_s: float = ASK_EVERY_S) -> bool:
        """Whether another worker has committed a shard that this one has not.

        Args:
            shard: Its index.
            wait_s: Seconds since the store was last asked, before it is asked again.
        """
        if self._worker.count > 1 and time.monotonic() - self._asked >= wait_s:
            self._asked = time.monotonic()
            if self._store.is_committed(shard):
                self._done_elsewhere.add(shard)
        return shard in self._done_elsewhere


class ScheduledQueue(ShardQueue):
    """Shards that a scheduler in another process assigns, over a pair of pipes.

    For each shard the worker writes `REQUEST` and reads a line: an index, or nothing if there are no
    more. The queue ends too when the scheduler has closed the pipes, because it died.

    Args:
        part: Of this worker, with the scheduler's file descriptors.
        shards: All shards of the plan.
        store: Of the stage.
    """

    def __init__(self, part: Part, shards: Sequence[ShardRecord], store: StoreWriter) -> None:
        if part.scheduler_fds is None:
            raise TypeError("no scheduler to ask")
        super().__init__(part, shards, store)
        self._shards = shards
        self._read_fd, self._write_fd = part.scheduler_fds

    def __bool__(self) -> bool:
        return True

    def is_own(self, shard: int) -> bool:
        """Always."""
        return True

    def own_are_done(self) -> bool:
        """Never: every shard that it is assigned is its own."""
        return False

    def __iter__(self) -> Iterator[ShardRecord]:
        while (index := self._assigned()) is not None:
            if not self._store.is_committed(index):
                yield self._shards[index]

    def _assigned(self) -> int | None:
        try:
            os.write(self._write_fd, REQUEST)
        except BrokenPipeError:
            return None
        line = b""
        while not line.endswith(b"\n"):
            byte = os.read(self._read_fd, 1)
            if not byte:
                return None
            line += byte
        return int(line) if line.strip() else None


def shard_queue(
    part: Part,
    shards: Sequence[ShardRecord],
    store: StoreWriter,
    available: Collection[int] | None = None,
) -> ShardQueue:
    """The queue of a worker: a scheduler's if the part has one, else by the commits (`ShardQueue`)."""
    if part.scheduler_fds is not None:
        return ScheduledQueue(part, shards, store)
    return ShardQueue(part, shards, store, available)
