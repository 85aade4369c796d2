"""What each worker is doing, one JSON line at a time.

<run>/logs/<stage>/<source>/worker-<i>-of-<n>.jsonl, appended over all sessions of that worker:

    {"event": "begin", "time": ..., "session": ..., "host": ..., "pid": ..., "job": ...,
     "restarts": ..., "shards": "0,16,32", "num_shards": 3, "tokens": ...}
    {"event": "begun", "time": ..., "session": ..., "shard": 16}
    {"event": "shard", "time": ..., "session": ..., "shard": 16, "tokens": ..., "seconds": ...,
     "tokens_per_s": ..., "size_bytes": ..., and figures of the stage}
    {"event": "end", "time": ..., "session": ..., "reason": "done" | "stopped" | "failed",
     "error": ..., "shard": the one in hand}

Times are UTC, ISO 8601. `job` and `restarts` are the scheduler's and null without one. A session
without an end is running, or was killed. Commits alone say what is finished; the log says who is at
work, how fast, and why somebody stopped.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from launch.json_lines import append_line, read_lines
from launch.summary import logs_folder
from launch.work import Worker, parse_shards, range_text, shard_ranges, shards_in
from store_schema.errors import LogitfuseError, Stopped

if TYPE_CHECKING:
    from store_schema.config import RunConfig
    from store_schema.plan.plan import ShardRecord

logger = logging.getLogger(__name__)

Reason = Literal["done", "stopped", "failed"]
MAX_ERROR_LENGTH = 500
_FILE_NAME = re.compile(r"worker-(\d+)-of-(\d+)\.jsonl")


class WorkLog:
    """The log of one worker of one stage and source.

    Args:
        run: The run.
        stage: "extract", "generate" or "align".
        source: Name of the source.
        worker: Which one.
    """

    def __init__(self, run: RunConfig, stage: str, source: str, worker: Worker) -> None:
        name = f"worker-{worker.index}-of-{worker.count}.jsonl"
        self.path = logs_folder(run) / stage / source / name

    @contextmanager
    def session(self, pending: Sequence[ShardRecord], unit_tokens: str | None) -> Iterator[Session]:
        """Log the begin, what the block tells of its shards, and how it ended.

        Args:
            pending: Shards that this session is to do, in their order.
            unit_tokens: Whose tokens are counted, a key of `num_tokens`; None: not known before.
        """
        session = Session(self.path, [shard.index for shard in pending])
        tokens = None
        if unit_tokens is not None:
            tokens = sum(shard.num_tokens[unit_tokens] for shard in pending)
        session.begin(tokens)
        try:
            yield session
        except BaseException as error:
            stopped = isinstance(error, Stopped | KeyboardInterrupt)
            session.end("stopped" if stopped else "failed", error)
            raise
        session.end("done")


class Session:
    """One run of a worker: what its process writes.

    A disk that refuses a line is told once and never ends the work.
    """

    def __init__(self, path: Path, pending: Sequence[int]) -> None:
        self._path = path
        self._pending = pending
        self._finished: set[int] = set()
        self._name = secrets.token_hex(4)
        self._refused = False

    def begin(self, tokens: int | None) -> None:
        """The session begins."""
        self._write(
            "begin",
            host=socket.gethostname(),
            pid=os.getpid(),
            **scheduler_job(os.environ),
            shards=range_text(shard_ranges(self._pending)),
            num_shards=len(self._pending),
            tokens=tokens,
        )

    def begun(self, index: int) -> None:
        """A shard is taken in hand."""
        self._write("begun", shard=index)

    def shard(
        self, index: int, *, tokens: int, seconds: float, size_bytes: int, **figures: Any
    ) -> None:
        """A shard was committed.

        Args:
            index: Of the shard.
            tokens: Positions done.
            seconds: That its batches took.
            size_bytes: Bytes of its data on disk.
            figures: What else is worth noting.
        """
        self._finished.add(index)
        self._write(
            "shard",
            shard=index,
            tokens=tokens,
            seconds=round(seconds, 3),
            tokens_per_s=round(tokens / seconds, 1) if seconds > 0 else None,
            size_bytes=size_bytes,
            **figures,
        )

    def end(self, reason: Reason, error: BaseException | None = None) -> None:
        """The session ends."""
        in_hand = None
        if reason != "done":
            in_hand = next((i for i in self._pending if i not in self._finished), None)
        self._write("end", reason=reason, error=error_line(error), shard=in_hand)

    def _write(self, event: str, **content: Any) -> None:
        line = {"event": event, "time": datetime.now(UTC).isoformat(), "session": self._name}
        try:
            append_line(self._path, line | content)
        except OSError as error:
            if not self._refused:
                self._refused = True
                logger.warning(
                    "%s cannot be written (%s): work goes on, `logitfuse status` will not show it",
                    self._path,
                    error.strerror or error,
                )


def scheduler_job(environment: Mapping[str, str]) -> dict[str, Any]:
    """The scheduler's id of this job and how often it was restarted, None where it says neither."""
    job = environment.get("SLURM_JOB_ID")
    if "SLURM_ARRAY_JOB_ID" in environment:
        job = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment.get('SLURM_ARRAY_TASK_ID', '')}"
    job = job or environment.get("PBS_JOBID") or environment.get("LSB_JOBID")
    restarts = environment.get("SLURM_RESTART_COUNT", "")
    return {"job": job, "restarts": int(restarts) if restarts.isdecimal() else None}


def error_line(error: BaseException | None) -> str | None:
    """An error on one line of bounded length."""
    if error is None:
        return None
    if isinstance(error, LogitfuseError | Stopped):
        text = error.line()
    else:
        text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= MAX_ERROR_LENGTH else text[: MAX_ERROR_LENGTH - 3] + "..."


# ------------------------------------------------------------------------------- reading


@dataclass(frozen=True, slots=True)
class FinishedShard:
    """A shard that a session committed; `time` is when."""

    shard: int
    time: datetime
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """One session as its log tells it.

    Args:
        worker: Whose.
        begun: When.
        last: Time of its last line.
        host: Where it runs or ran.
        pid: Its process.
        job: The scheduler's id, None without one.
        pending: Shards it had to do when it began.
        finished: Shards it committed, in order.
        reason: How it ended; None: it did not say.
        error: Why it ended.
        in_hand: Shard in hand at the end, None where it ended well or did not end.
        taken: Shards that were begun, finished or not, in order.
    """

    worker: Worker
    begun: datetime
    last: datetime
    host: str
    pid: int
    job: str | None
    pending: frozenset[int]
    finished: tuple[FinishedShard, ...]
    reason: Reason | None
    error: str | None
    in_hand: int | None
    taken: tuple[int, ...] = ()


def read_sessions(run: RunConfig, stage: str, source: str) -> list[SessionRecord]:
    """Sessions of all workers, in the order in which they began.

    Lines that are cut, and sessions whose begin was lost, are left out.
    """
    found: list[SessionRecord] = []
    for path in sorted((logs_folder(run) / stage / source).glob("worker-*.jsonl")):
        name = _FILE_NAME.fullmatch(path.name)
        if name is None or int(name[1]) >= int(name[2]):
            continue
        try:
            lines, _ = read_lines(path)
        except OSError as error:
            logger.warning("%s cannot be read: %s", path, error.strerror or error)
            continue
        found += _sessions(Worker(int(name[1]), int(name[2])), lines)
    return sorted(found, key=lambda session: session.begun)


def _sessions(worker: Worker, lines: Iterable[Mapping[str, Any]]) -> list[SessionRecord]:
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        by_name.setdefault(str(line.get("session")), []).append(line)
    found = []
    for events in by_name.values():
        try:
            found.append(_session(worker, events))
        except (KeyError, TypeError, ValueError, OverflowError, LogitfuseError):
            logger.warning("a session of worker %s cannot be understood, left out", worker)
    return found


def _session(worker: Worker, events: Sequence[Mapping[str, Any]]) -> SessionRecord:
    (begin,) = (event for event in events if event["event"] == "begin")
    end = next((event for event in events if event["event"] == "end"), None)
    finished = tuple(
        FinishedShard(int(e["shard"]), _time(e), int(e["tokens"]), float(e["seconds"]))
        for e in events
        if e["event"] == "shard"
    )
    ranges = parse_shards(begin["shards"]) if begin["shards"] else ()
    return SessionRecord(
        worker=worker,
        begun=_time(begin),
        last=max(_time(event) for event in events),
        host=str(begin["host"]),
        pid=int(begin["pid"]),
        job=begin["job"],
        pending=frozenset(shards_in(ranges)),
        finished=finished,
        reason=None if end is None else end["reason"],
        error=None if end is None else end["error"],
        in_hand=None if end is None else end["shard"],
        taken=tuple(int(event["shard"]) for event in events if event["event"] == "begun"),
    )


def _time(event: Mapping[str, Any]) -> datetime:
    return datetime.fromisoformat(event["time"]).astimezone(UTC)
