"""The align stage: convert every source store of a run to the target's tokens, shard by shard."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from align.methods.method import Aligner
from align.methods.shard_arrays import statistics
from align.methods.turn_ends import (
    source_logprobs,
    turn_end_rows,
    with_turn_ends,
    without_turn_ends,
)
from align.prepare.checked import CheckedAlignment, check_alignment
from align.prepare.prepare import make_aligner
from launch.process import quick_switches
from launch.progress import Progress
from launch.quantities import size_text
from launch.shard_queue import ShardQueue, shard_queue
from launch.signals import StopFlag
from launch.work import Part, others_line, work_line
from launch.worklog import Session, WorkLog
from store_schema.config import RunConfig
from store_schema.encoding.selection import select_entries
from store_schema.errors import LogitfuseError, StorageError
from store_schema.layout import Arrays
from store_schema.manifest import BRANCHES_SETTING, Commit
from store_schema.plan.plan import Segment, ShardRecord
from store_schema.presets import Encoding
from store_schema.store.reader import StoreReader
from store_schema.store.writer import StoreWriter
from store_schema.text.encoded import EncodedSegment

logger = logging.getLogger(__name__)

WRITERS = 2
"""Shards that are written at a time: one waits for the disk while the other is encoded."""


@dataclass(frozen=True, slots=True)
class AlignSummary:
    """Figures of one source's alignment.

    Args:
        source: Name of the source.
        commits: All commits of the aligned store.
        work: Target tokens and seconds of each shard that this call aligned, in order.
    """

    source: str
    commits: tuple[Commit, ...]
    work: tuple[tuple[int, float], ...]

    @property
    def done(self) -> int:
        """Number of shards that this call aligned."""
        return len(self.work)

    @property
    def tokens_per_s(self) -> float | None:
        """Target tokens per second, reading and writing included; None where nothing was done.

        The first shard may include compilation, so it counts only if it is the only one.
        """
        counted = self.work[1:] or self.work
        seconds = sum(spent for _, spent in counted)
        return sum(tokens for tokens, _ in counted) / seconds if seconds > 0 else None

    def total(self, name: str) -> float:
        """Sum of one statistic over the commits."""
        return sum(commit.stats.get(name, 0.0) for commit in self.commits)

    @property
    def coverage(self) -> float:
        """Share of the target's positions that have a distribution."""
        return 1.0 - self.total("origin_none") / max(self.total("positions"), 1.0)

    def figures(self) -> dict[str, Any]:
        """Coverage, mass and speed, for tables and JSON."""
        positions = max(self.total("positions"), 1.0)
        covered = max(positions - self.total("origin_none"), 1.0)
        return {
            "positions": int(self.total("positions")),
            "coverage": self.coverage,
            "boundary": self.total("origin_boundary") / positions,
            "inside": self.total("origin_inside") / positions,
            "mass_in": self.total("mass_in") / max(self.total("source_positions"), 1.0),
            "mass_out": self.total("mass_out") / covered,
            "tokens_per_s": self.tokens_per_s,
        }


def align_source(run: RunConfig, source: str, part: Part, stop: StopFlag) -> AlignSummary:
    """Align the shards of one source that are not committed yet.

    Args:
        run: The run file.
        source: Name of the source.
        part: Which shards are this worker's.
        stop: Checked between shards.

    Raises:
        MissingError: The plan or the source store is not there, or not complete.
        MismatchError: Plan, store, tokenizer or settings changed since the store was begun.
        Stopped: On a signal; committed shards stay.
    """
    checked = check_alignment(run, source)
    tell_other_target(checked)
    writer = checked.open_store()
    queue = shard_queue(part, checked.plan.shards, writer, set(checked.reader.commits))
    work: list[tuple[int, float]] = []
    if queue:
        with WorkLog(run, "align", source, part.worker).session(queue.pending, "target") as log:
            work = align_shards(checked, writer, queue, stop, log)
    reader = StoreReader.open(writer.location)
    finished = sorted(reader.committed(checked.plan.shards))
    return AlignSummary(source, tuple(reader.commits[index] for index in finished), tuple(work))


def tell_other_target(checked: CheckedAlignment) -> None:
    """Say so if the source's branches were chosen for another target's tokenizer."""
    settings = checked.reader.manifest.settings.get(BRANCHES_SETTING)
    chosen_for = settings.get("target") if isinstance(settings, dict) else None
    if chosen_for is not None and chosen_for != checked.target.fingerprint:
        logger.warning(
            "%s: its branches were chosen for another target's tokenizer; they are used, but fit less "
            "well", checked.source,
        )  # fmt: skip


def dry_run(run: RunConfig, source: str, part: Part) -> str:
    """Check all that can be checked without reading a shard; writes nothing.

    Returns:
        A line on the work that `align_source` would do.

    Raises:
        MissingError: The plan or a shard of the source store is not there.
        MismatchError: Plan, store, tokenizer or settings changed since the store was begun.
    """
    checked = check_alignment(run, source, keep=False)
    shards, committed = checked.plan.shards, checked.committed()
    pending = part.pending(shards, committed)
    checked.reader.require_shards(pending)
    line = work_line(f"align {source}", pending, "target")
    return line + others_line(part, shards, committed)


def align_shards(
    checked: CheckedAlignment,
    writer: StoreWriter,
    queue: ShardQueue,
    stop: StopFlag,
    log: Session,
) -> list[tuple[int, float]]:
    """Align and commit shards, one after the other.

    While one is aligned, the next is read and the two before it are written, each in a thread of its
    own: four are in memory, and a kill loses the work of three.

    Returns:
        Target tokens and seconds of each shard; seconds are those since the commit before it.
    """
    checked.reader.require_shards(queue.pending)
    aligner = make_aligner(checked, stop)
    total, written = sum(shard.num_tokens["target"] for shard in queue.pending), 0
    work: list[tuple[int, float]] = []
    being_written: deque[tuple[ShardRecord, Future[Commit | None]]] = deque()
    begun = time.monotonic()

    def commit(shard: ShardRecord, arrays: Arrays, figures: dict[str, float]) -> Commit | None:
        if queue.done_elsewhere(shard.index, wait_s=0):
            return None
        return writer.write(shard, arrays, figures)

    def finish_writing(most: int = 0) -> None:
        """Wait until no more than so many shards are being written."""
        nonlocal begun, written
        while len(being_written) > most:
            shard, future = being_written.popleft()
            done = future.result()
            if done is None:
                continue
            stop.progressed = True
            size_bytes = sum(file.size for file in done.files.values())
            written += size_bytes
            now = time.monotonic()
            tokens, seconds, begun = done.counts.positions, now - begun, now
            work.append((tokens, seconds))
            log.shard(shard.index, tokens=tokens, seconds=seconds, size_bytes=size_bytes)
            progress.add(shard.num_tokens["target"], f"{size_text(written)} written")

    with (
        Progress(f"align {checked.source}", total, unit="tok") as progress,
        quick_switches(),
        ThreadPoolExecutor(1, "read") as reading,
        ThreadPoolExecutor(WRITERS, "write") as writing,
    ):
        try:
            for shard, loaded in read_ahead(queue, partial(load_shard, checked), reading):
                if stop.asked:
                    finish_writing()
                stop.check()
                log.begun(shard.index)
                try:
                    arrays, figures = align_shard(checked, loaded, aligner, writer.encoding)
                except LogitfuseError as error:
                    if isinstance(error, StorageError) or queue.is_own(shard.index):
                        raise
                    logger.warning("left to the worker whose shard it is: %s", error.line())
                    continue
                finish_writing(WRITERS - 1)
                being_written.append((shard, writing.submit(commit, shard, arrays, figures)))
        finally:
            finish_writing()
    return work


Loaded = tuple[Arrays, list[Segment], list[EncodedSegment]]
"""Arrays of a source's shard, its segments, and these as the target reads them."""


def read_ahead(
    queue: Iterable[ShardRecord], load: Callable[[ShardRecord], Loaded], pool: Executor
) -> Iterator[tuple[ShardRecord, Future[Loaded]]]:
    """Each shard while the one after it is being read."""
    waiting: tuple[ShardRecord, Future[Loaded]] | None = None
    for shard in queue:
        following = shard, pool.submit(load, shard)
        if waiting is not None:
            yield waiting
        waiting = following
    if waiting is not None:
        yield waiting


def load_shard(checked: CheckedAlignment, shard: ShardRecord) -> Loaded:
    """What alignment reads of a shard."""
    segments = checked.plan.segments(shard)
    return checked.reader.read(shard.index), segments, checked.target.encode(segments)


def align_shard(
    checked: CheckedAlignment, loaded: Future[Loaded], aligner: Aligner, encoding: Encoding
) -> tuple[Arrays, dict[str, float]]:
    """Aligned arrays of one shard, with the entries that `encoding` keeps, and their statistics."""
    whole, segments, target = loaded.result()
    texts = [segment.text.encode() for segment in segments]
    rows_D = turn_end_rows(whole, segments, checked.reader.vocabulary.special)
    source = without_turn_ends(whole, rows_D)
    arrays = aligner.align(source, texts, [part.text_only for part in target])
    arrays = select_entries(arrays, encoding)
    figures = statistics(arrays, source)
    return with_turn_ends(arrays, target, source_logprobs(whole, rows_D)), figures
