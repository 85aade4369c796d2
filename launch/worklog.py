"""Logs of what each worker does, with one JSON object per line.

<run>/logs/<stage>/<source>/worker-<i>-of-<n>.jsonl, appended over all sessions of that worker:

    {"event": "begin", "time": ..., "session": ..., "host": ..., "pid": ..., "job": ...,
     "restarts": ..., "shards": "0,16,32", "num_shards": 3, "tokens": ...}
    {"event": "begun", "time": ..., "session": ..., "shard": 16}
    {"event": "shard", "time": ..., "session": ..., "shard": 16, "tokens": ..., "seconds": ...,
     "tokens_per_s": ..., "size_bytes": ..., and figures of the stage}
    {"event": "end", "time": ..., "session": ..., "reason": "done" | "stopped" | "failed",
     "error": ..., "shard": the one that was being worked on}

Times are UTC, ISO 8601. `job` and `restarts` are the scheduler's and null without one. A session
without an end is running, or was killed. Commits alone say what is finished; the log says which workers
run, how fast, and why one stopped.
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
        worker: Which worker.
    """

    def __init__(self, run: RunConfig, stage: str, source: str, worker: Worker) -> None:
        name = f"worker-{worker.index}-of-{worker.count}.jsonl"
        self.path = logs_folder(run) / stage / source / name

    @contextmanager
    def session(self, pending: Sequence[ShardRecord], unit_tokens: str | None) -> Iterator[Session]:
        """Log begin and end of a session; the block logs its shards through the yielded Session.

        Args:
            pending: Shards that this session will do, in order.
            unit_tokens: Model whose tokens to count, a key of `num_tokens`; None if not known before.
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
    """Writes the log of one run of a worker.

    If a line cannot be written, that is reported once, and the work goes on.
    """

    def __init__(self, path: Path, pending: Sequence[int]) -> None:
        self._path = path
        self._pending = pending
        self._begun: list[int] = []
        self._finished: set[int] = set()
        self._name = secrets.token_hex(4)
        self._refused = False

    def begin(self, tokens: int | None) -> None:
        """Log that the session begins, with `tokens` to do (None if not known)."""
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
        """Log that work on a shard begins, one of its own or one that another worker has left."""
        self._begun.append(index)
        self._write("begun", shard=index)

    def shard(
        self, index: int, *, tokens: int, seconds: float, size_bytes: int, **figures: Any
    ) -> None:
        """Log that a shard was committed.

        Args:
            index: Index of the shard.
            tokens: Positions done.
            seconds: Time that its batches took.
            size_bytes: Bytes of its data on disk.
            figures: Further figures of the stage.
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
        """Log that the session ends, why, and which shard was being worked on."""
        in_hand = None
        if reason != "done":
            shards = [*self._begun, *self._pending]
            in_hand = next((i for i in shards if i not in self._finished), None)
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
    """The scheduler's id of this job and its number of restarts, None where not known."""
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
    """A shard that a session committed at `time`."""

    shard: int
    time: datetime
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """One session, as read from its log.

    Args:
        worker: Its worker.
        begun: When it began.
        last: Time of its last line.
        host: Where it runs or ran.
        pid: Its process.
        job: The scheduler's id, None without one.
        pending: Shards it had to do when it began.
        finished: Shards it committed, in order.
        reason: How it ended; None if its log has no end.
        error: Why it ended.
        in_hand: Shard that it worked on when it ended; None if it is done or has no end.
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

    Incomplete lines, and sessions whose begin is lost, are left out.
    """
    sessions: list[SessionRecord] = []
    for path in sorted((logs_folder(run) / stage / source).glob("worker-*.jsonl")):
        name = _FILE_NAME.fullmatch(path.name)
        if name is None or int(name[1]) >= int(name[2]):
            continue
        try:
            lines, _ = read_lines(path)
        except OSError as error:
            logger.warning("%s cannot be read: %s", path, error.strerror or error)
            continue
        sessions += _sessions(Worker(int(name[1]), int(name[2])), lines)
    return sorted(sessions, key=lambda session: session.begun)


def _sessions(worker: Worker, lines: Iterable[Mapping[str, Any]]) -> list[SessionRecord]:
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        by_name.setdefault(str(line.get("session")), []).append(line)
    sessions = []
    for events in by_name.values():
        try:
            sessions.append(_session(worker, events))
        except (KeyError, TypeError, ValueError, OverflowError, LogitfuseError):
            logger.warning("a session of worker %s cannot be understood, left out", worker)
    return sessions


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
