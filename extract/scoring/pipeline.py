"""Scores shards with an engine while other shards are prepared, encoded and written in threads.

There are four threads: one reads and tokenises the next shard's segments; the caller's runs the
engine; one converts rows to the store's entries; one encodes, writes and commits finished shards. So
that memory does not grow with the corpus and a kill loses little work, at most `queue_bytes` of rows
wait for conversion and at most two shards are open: one being scored, and the one before it, being
written. The engine waits only if the threads after it are slower.

A batch of the engine never mixes two shards, so a resumed run scores the same batches.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Self

from extract.engines.protocol import CHECK_WEIGHTS, DenseRows, Engine
from extract.scoring.brancher import Brancher
from extract.scoring.rows import ScoredSegment, scored_segment, unscored_segment
from extract.scoring.score import UNSCORED, shard_arrays, shard_stats
from launch.process import quick_switches
from store_schema.errors import MismatchError, ModelError
from store_schema.layout import Arrays
from store_schema.plan.plan import Plan, Segment, ShardRecord
from store_schema.text.tokenizer import EncodedSegment, SegmentTokenizer

logger = logging.getLogger(__name__)

OPEN_SHARDS = 2
"""Maximal number of shards that are begun and not committed, whose work a kill would lose."""

Write = Callable[[ShardRecord, Arrays, dict[str, float]], object]
"""Encodes, writes and commits one shard; called in a thread of its own, one shard at a time."""


class Backlog:
    """Jobs that one thread does in order; `put` waits while too much is queued."""

    def __init__(self, name: str, limit: int) -> None:
        """Start the thread.

        Args:
            name: Of the thread.
            limit: Maximal total size of the unfinished jobs; a larger job is accepted if it is alone.
        """
        self._limit = limit
        self._jobs: deque[tuple[Callable[[], None], int]] = deque()
        self._undone = 0
        self._closed = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def put(self, job: Callable[[], None], size: int) -> None:
        """Hand over a job.

        Raises:
            BaseException: What an earlier job raised; no job is done after it.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._error or self._undone == 0 or self._undone + size <= self._limit
            )
            if self._error is not None:
                raise self._error
            self._jobs.append((job, size))
            self._undone += size
            self._changed.notify_all()

    def check(self) -> None:
        """Raise what a job raised, if one did."""
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Wait until all jobs are done and the thread has ended.

        Raises:
            BaseException: What a job raised.
        """
        self._close()
        self.check()

    def abandon(self) -> None:
        """Drop the queued jobs and wait until the running one has ended."""
        with self._changed:
            self._jobs.clear()
        self._close()

    def _close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if not self._jobs:
                    return
                job, size = self._jobs.popleft()
            try:
                job()
            except BaseException as error:  # raised in the thread that calls `put` or `finish`
                with self._changed:
                    self._error = error
                    self._jobs.clear()
                    self._changed.notify_all()
                return
            del job
            with self._changed:
                self._undone -= size
                self._changed.notify_all()


@dataclass(slots=True)
class PreparedShard:
    """A shard's segments as the engine reads them, and their scores so far."""

    record: ShardRecord
    segments: list[Segment]
    encoded: list[EncodedSegment]
    scored: dict[int, ScoredSegment] = field(default_factory=dict)
    too_long: int = 0
    faulty: int = 0
    seconds: float = 0.0
    """Time in the engine, including waits for the threads after it."""
    branched: Arrays | None = None
    """All arrays, once its branches are computed."""

    def arrays(self) -> Arrays:
        """All arrays of the shard, in the plan's order."""
        if self.branched is not None:
            return self.branched
        return shard_arrays(self.segments, self.encoded, self._in_order())

    def stats(self) -> dict[str, float]:
        """Figures of the shard."""
        stats = shard_stats(self.segments, self.encoded, self._in_order(), self.seconds)
        unscored = self.too_long + self.faulty
        return stats | ({UNSCORED: float(unscored)} if unscored else {})

    def _in_order(self) -> list[ScoredSegment]:
        return [self.scored[i] for i in range(len(self.segments))]


class Pipeline:
    """Scores shards of one source; a context manager that ends its threads.

    Leaving it by an exception drops rows that are not converted yet; a shard that is complete is still
    written and committed.
    """

    def __init__(
        self,
        tokenizer: SegmentTokenizer,
        plan: Plan,
        write: Write,
        *,
        queue_bytes: int,
        records_bad: bool = False,
        longest: int | None = None,
        brancher: Brancher | None = None,
    ) -> None:
        """Start the threads.

        Args:
            tokenizer: Of the model.
            plan: Whose shards are scored.
            write: Called with each finished shard.
            queue_bytes: Maximal bytes of rows that wait to be converted to entries.
            records_bad: Whether a segment that cannot be scored is kept without a distribution.
            longest: Tokens, with the context, that the model can read; with `records_bad`. None: any.
            brancher: Adds branches to each shard before it is written; None adds none.
        """
        self._brancher = brancher
        self._records_bad, self._longest = records_bad, longest if records_bad else None
        self._tokenizer, self._plan, self._write = tokenizer, plan, write
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="prepare")
        self._rows = Backlog("entries", queue_bytes)
        self._shards = Backlog("write", 1)
        self._open_shards = threading.Semaphore(OPEN_SHARDS)
        self._switches = quick_switches()

    def __enter__(self) -> Self:
        self._switches.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ahead.shutdown(cancel_futures=True)
        try:
            self._finish_threads(succeeded=error is None)
        finally:
            self._switches.__exit__(None, None, None)

    def _finish_threads(self, *, succeeded: bool) -> None:
        try:
            if succeeded:
                self._rows.finish()
        except BaseException:
            self._abort_threads()
            raise
        if succeeded:
            self._shards.finish()
        else:
            self._abort_threads()

    def _abort_threads(self) -> None:
        """End the threads after an error; further errors are ignored."""
        self._rows.abandon()
        with contextlib.suppress(Exception):
            self._shards.finish()

    def score(
        self,
        engine: Engine,
        shards: Iterable[ShardRecord],
        *,
        on_scored: Callable[[int], None],
        on_begun: Callable[[int], None] = lambda shard: None,
        done_elsewhere: Callable[[int], bool] = lambda shard: False,
    ) -> None:
        """Score shards in order; all are written when the context is left without an exception.

        Args:
            engine: The loaded model.
            shards: Of the plan; the next one is asked for when one begins.
            on_scored: Called with the number of positions of each segment as it is done, and with 0
                while waiting for an earlier shard to be written; may raise to stop.
            on_begun: Called with the index of each shard that is about to be scored.
            done_elsewhere: Asked with the index of the shard that is being scored, after each segment;
                True leaves the shard out.

        Raises:
            ModelError: The model returns NaN; names segment and position.
            TokenizerError: A segment's tokens do not join to its text.
            MismatchError: The tokens of a shard are not those of the plan.
            StorageError: A shard cannot be written.
        """
        for shard in self._prepared(shards):
            while not self._open_shards.acquire(timeout=0.1):
                self._rows.check()
                self._shards.check()
                on_scored(0)
            on_begun(shard.record.index)
            start = time.monotonic()
            scored = 0
            for i, dense in self._scored(engine, shard):
                # Before `put`: with the last segment's rows converted, the shard is complete.
                shard.seconds = time.monotonic() - start
                size_bytes = 0 if dense is None else dense.size_bytes
                self._rows.put(partial(self._convert, shard, i, dense), size_bytes)
                scored += 1
                on_scored(len(shard.encoded[i].token_ids))
                if scored < len(shard.segments) and done_elsewhere(shard.record.index):
                    break
            if scored == len(shard.segments):
                if self._brancher is not None:
                    self._branch(engine, shard, self._brancher, on_scored)
                continue
            if not done_elsewhere(shard.record.index):
                raise ModelError(
                    "the engine left segments out",
                    where=f"shard {shard.record.index}, source {self._tokenizer.name}",
                    expected=len(shard.segments),
                    got=scored,
                )
            self._open_shards.release()  # its rows, which are not complete, are never written

    def _branch(
        self,
        engine: Engine,
        shard: PreparedShard,
        brancher: Brancher,
        on_scored: Callable[[int], object],
    ) -> None:
        """Compute the branches of a shard once its rows are converted, and hand it on."""
        while len(shard.scored) < len(shard.segments):
            self._rows.check()
            on_scored(0)
            time.sleep(0.002)
        start = time.monotonic()
        where = f"shard {shard.record.index}, source {self._tokenizer.name}"
        shard.branched = brancher.with_branches(
            engine, shard.encoded, shard.arrays(), where=where, on_segment=lambda: on_scored(0)
        )
        shard.seconds += time.monotonic() - start
        self._shards.put(partial(self._finish, shard), 1)

    def _scored(
        self, engine: Engine, shard: PreparedShard
    ) -> Iterator[tuple[int, DenseRows | None]]:
        """Rows of a shard's segments as they are done; None for one that the model cannot read."""
        most = self._longest
        fitting = [
            i for i, e in enumerate(shard.encoded) if most is None or len(e.input_ids) <= most
        ]
        for i in sorted(set(range(len(shard.encoded))).difference(fitting)):
            yield i, None
        for number, dense in engine.score([shard.encoded[i] for i in fitting]):
            yield fitting[number], dense

    def _prepared(self, shards: Iterable[ShardRecord]) -> Iterator[PreparedShard]:
        """Yield each shard while the next one is being prepared."""
        coming: deque[Future[PreparedShard]] = deque()
        for following in shards:
            coming.append(self._ahead.submit(self._prepare, following))
            if len(coming) == 2:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()

    def _prepare(self, record: ShardRecord) -> PreparedShard:
        segments = self._plan.segments(record)
        encoded = self._tokenizer.encode(segments)
        require_planned(record, self._tokenizer.name, sum(len(e.token_ids) for e in encoded))
        return PreparedShard(record, segments, encoded)

    def _convert(self, shard: PreparedShard, i: int, dense: DenseRows | None) -> None:
        shard.scored[i] = self._converted(shard, i, dense)
        if len(shard.scored) == len(shard.segments) and self._brancher is None:
            self._shards.put(partial(self._finish, shard), 1)

    def _converted(self, shard: PreparedShard, i: int, dense: DenseRows | None) -> ScoredSegment:
        """A segment as the store keeps it, without distributions if it cannot be scored."""
        num_positions = len(shard.encoded[i].token_ids)
        where = f"segment {shard.segments[i].segment_id}, source {self._tokenizer.name}"
        if dense is None:
            reason = f"it is longer than the {self._longest} tokens that the model can read"
            shard.too_long += 1
        else:
            try:
                return scored_segment(
                    dense, num_positions, vocab_size=self._tokenizer.vocab_size, where=where
                )
            except ModelError as error:
                if not self._records_bad:
                    raise
                reason = error.what
                shard.faulty += 1
        logger.warning("%s is left unscored (extract.on_bad: record): %s", where, reason)
        if 1 < shard.faulty == len(shard.segments) - shard.too_long:
            raise ModelError(
                "no segment of a shard can be scored",
                where=f"shard {shard.record.index}, source {self._tokenizer.name}",
                got=reason,
                hint=CHECK_WEIGHTS,
            )
        return unscored_segment(num_positions)

    def _finish(self, shard: PreparedShard) -> None:
        arrays, stats = shard.arrays(), shard.stats()
        shard.scored.clear()
        self._write(shard.record, arrays, stats)
        self._open_shards.release()


def require_planned(shard: ShardRecord, name: str, num_tokens: int) -> None:
    """Refuse a shard whose number of tokens differs from the plan's."""
    if num_tokens != shard.num_tokens[name]:
        raise MismatchError(
            "a shard has another number of tokens than in the plan",
            where=f"shard {shard.index}, source {name}",
            expected=shard.num_tokens[name],
            got=num_tokens,
            hint="the tokenizers library may be another version than at planning; plan again with it",
        )
