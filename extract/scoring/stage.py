"""What scoring and generation have in common: a source, its pending shards and their commits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from extract.engines.protocol import Engine, EngineMemoryError
from extract.scoring.children import check_stop_fd
from extract.scoring.sources import CheckedSource
from launch.shard_queue import ShardQueue
from launch.signals import StopFlag
from launch.work import Part
from launch.worklog import Session
from store_schema.config import RunConfig
from store_schema.errors import LogitfuseError
from store_schema.layout import Arrays
from store_schema.plan.plan import Plan, ShardRecord
from store_schema.store.writer import StoreWriter

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Job:
    """The shards of one source, in the process that works on them.

    Args:
        source: The checked source.
        writer: Of its store.
        part: This process's part of the shards.
        queue: The shards to do, in order.
        session: Of the worker's log.
        flag: Of this process.
        stop_fd: See `extract.scoring.children`.
        written: Bytes committed so far.
    """

    source: CheckedSource
    writer: StoreWriter
    part: Part
    queue: ShardQueue
    session: Session
    flag: StopFlag
    stop_fd: int | None
    written: int = 0

    def check(self) -> None:
        """Raise if asked to stop.

        Raises:
            Stopped: Asked to stop; committed shards stay.
        """
        check_stop_fd(self.flag, self.stop_fd)

    def leaves(self, error: LogitfuseError) -> bool:
        """Whether an error is of another worker's shard, which is then left to that worker."""
        if isinstance(error, EngineMemoryError) or not self.queue.own_are_done():
            return False
        logger.warning("left to the worker whose shard it is: %s", error.line())
        return True

    def commit(self, shard: ShardRecord, arrays: Arrays, stats: dict[str, float]) -> None:
        """Encode, write and commit a shard, and log it; one that others have committed is left out."""
        if self.queue.done_elsewhere(shard.index, wait_s=0):
            return
        commit = self.writer.write(shard, arrays, stats)
        size_bytes = sum(file.size for file in commit.files.values())
        self.written += size_bytes
        self.flag.progressed = True
        self.session.shard(
            shard.index,
            tokens=commit.counts.positions,
            seconds=stats["seconds"],
            size_bytes=size_bytes,
        )


@dataclass(frozen=True, slots=True)
class Stage:
    """Scoring text, or answering prompts.

    Args:
        name: In logs and messages.
        child: Subcommand of `python -m extract` that runs this stage for one source.
        check: Returns a source checked for this stage; writes nothing.
        work: Works on the shards of a job with a loaded engine.
        outlook: Returns the line of a dry run for a source and its pending shards.
        planned_tokens: Whether the plan has the number of tokens of each shard.
    """

    name: str
    child: str
    check: Callable[[RunConfig, str, Plan], CheckedSource]
    work: Callable[[Engine, Job], None]
    outlook: Callable[[CheckedSource, Sequence[ShardRecord]], str]
    planned_tokens: bool
