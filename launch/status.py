"""The status of a run, read from its plan, commits and logs alone.

Commits say what is finished; work logs (see `launch.worklog`) say which workers run and how fast. A
shard belongs to the session that was assigned it last, so that a changed worker count, a requeue or a
second worker on the same shard never count it twice.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from launch.training_status import State, TrainingStatus, read_trainings
from launch.work import Worker
from launch.worklog import SessionRecord, read_sessions
from store_schema.config import RunConfig
from store_schema.disk.location import open_location
from store_schema.errors import StoreError
from store_schema.manifest import Commit
from store_schema.plan.plan import Plan
from store_schema.plan.run_plan import open_plan
from store_schema.store.reader import MANIFEST_FILE, StoreReader

SILENT_S = 600.0
"""A worker is `silent` (stalled) when it wrote nothing for this long,"""
SILENT_SHARDS = 5
"""and for longer than this many times its slowest shard."""
SILENT_FIRST_S = 3600.0
"""The limit before any shard is finished: a model is loaded first."""


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker of one stage and source.

    Args:
        worker: Which worker.
        state: `silent` is stalled: its log has no end, and no new line for long.
        finished: Number of shards it committed, over all its sessions.
        left: Number of its shards that are not committed and not assigned to a later session.
        in_hand: The shard it works on, or worked on when it ended; None for none.
        since: When it began that shard.
        tokens_per_s: Speed of its current session; None if not known.
        error: Why its last session ended.
        host: Where it runs or ran.
        job: The scheduler's id.
        last: Time of the last line it wrote.
    """

    worker: Worker
    state: State
    finished: int
    left: int
    in_hand: int | None
    since: datetime
    tokens_per_s: float | None
    error: str | None
    host: str
    job: str | None
    last: datetime

    @property
    def needs_care(self) -> bool:
        """Whether it failed or stalled, with shards left that no later session was assigned."""
        return self.state in ("failed", "silent") and self.left > 0


@dataclass(frozen=True, slots=True)
class WorkStatus:
    """One stage of one source.

    Args:
        stage: "extract", "generate" or "align".
        source: Name.
        total: Shards of the plan.
        done: Committed shards.
        failed: Shards that a worker failed on and no later session was assigned.
        tokens_done: Positions of committed shards.
        tokens_left: Tokens of the other shards; None where not known before (generation).
        size_bytes: Bytes of the committed shards' data.
        workers: All workers that have a log.
        problem: Why the store cannot be used, None for a usable one.
    """

    stage: str
    source: str
    total: int
    done: int
    failed: tuple[int, ...]
    tokens_done: int
    tokens_left: int | None
    size_bytes: int
    workers: tuple[WorkerStatus, ...]
    problem: str | None

    @property
    def pending(self) -> int:
        """Shards that are neither committed nor failed."""
        return self.total - self.done - len(self.failed)

    @property
    def tokens_per_s(self) -> float | None:
        """Total speed of the running workers; None if none is known."""
        rates = [w.tokens_per_s for w in self.workers if w.state == "running" and w.tokens_per_s]
        return sum(rates) if rates else None

    @property
    def eta_s(self) -> float | None:
        """Seconds to the end at that speed; None if no worker runs or the end is not known."""
        rate = self.tokens_per_s
        return None if rate is None or self.tokens_left is None else self.tokens_left / rate


@dataclass(frozen=True, slots=True)
class RunStatus:
    """The status of a run at `time`."""

    name: str
    folder: str
    time: datetime
    work: tuple[WorkStatus, ...]
    trainings: tuple[TrainingStatus, ...]


def run_status(run: RunConfig, time: datetime | None = None) -> RunStatus:
    """Read the status of a run. Writes nothing, and works while workers run.

    Raises:
        MissingError: The run has no plan yet.
        CorruptionError: The plan is damaged.
        StorageError: Disk or object store cannot be read.
    """
    time = datetime.now(UTC) if time is None else time
    plan = open_plan(run)
    work = []
    for stage in ("extract", "generate", "align"):
        for source in run.sources:
            url, model = _store_of(run, stage, source)
            sessions = read_sessions(run, stage, source)
            commits, problem = _read_commits(url, plan)
            if stage == "generate" and commits is None and not sessions:
                continue  # not every run has generated stores
            shards = {shard.index: shard.num_tokens.get(model, 0) for shard in plan.shards}
            known = None if stage == "generate" else shards
            work.append(
                work_status(
                    stage, source, len(shards), known, commits or {}, sessions, time, problem
                )
            )
    return RunStatus(run.name, run.folder, time, tuple(work), read_trainings(run, time))


def _store_of(run: RunConfig, stage: str, source: str) -> tuple[str, str]:
    """URL of the store that a stage fills, and the model whose tokens it counts."""
    if stage == "align":
        return run.aligned_url(source), "target"
    return (run.generated_url if stage == "generate" else run.store_url)(source), source


def _read_commits(url: str, plan: Plan) -> tuple[Mapping[int, Commit] | None, str | None]:
    """The usable commits of a store (None without a store), and what is wrong with it, if anything."""
    location = open_location(url)
    if not location.exists(MANIFEST_FILE):
        return None, None
    try:
        reader = StoreReader.open(location)
        reader.require_plan(plan)
    except StoreError as error:
        return {}, error.line()
    commits, faults = reader.scan()
    shards = {shard.index: shard for shard in plan.shards}
    own = {i: commit for i, commit in commits.items() if i in shards and commit.matches(shards[i])}
    problem = None
    if faults:
        first = next(iter(faults.values()))
        problem = f"{len(faults)} commit(s) cannot be used: {first.line()}"
    elif len(own) < len(commits):
        problem = f"{len(commits) - len(own)} commit(s) are of other segments than the plan's"
    return own, problem


def work_status(
    stage: str,
    source: str,
    total: int,
    tokens: Mapping[int, int] | None,
    commits: Mapping[int, Commit],
    sessions: Sequence[SessionRecord],
    time: datetime,
    problem: str | None = None,
) -> WorkStatus:
    """The status of one stage of one source.

    Args:
        stage: Name of the stage.
        source: Name of the source.
        total: Number of shards of the plan.
        tokens: Tokens of each shard; None where not known before (generation).
        commits: Commits by shard.
        sessions: Sessions of all workers, in the order in which they began.
        time: Time of the status.
        problem: What is wrong with the store, None for nothing.
    """
    owners = shard_owners(sessions, commits)
    last_sessions: dict[Worker, list[SessionRecord]] = {}
    for session in sessions:
        last_sessions.setdefault(session.worker, []).append(session)
    slowest = max((s.seconds for session in sessions for s in session.finished), default=None)
    workers = [
        worker_status(own, [i for i, owner in owners.items() if owner is own[-1]], slowest, time)
        for own in last_sessions.values()
    ]
    failed = {
        shard
        for shard, owner in owners.items()
        if owner.reason == "failed" and owner.in_hand == shard
    }
    return WorkStatus(
        stage=stage,
        source=source,
        total=total,
        done=len(commits),
        failed=tuple(sorted(failed)),
        tokens_done=sum(commit.counts.positions for commit in commits.values()),
        tokens_left=None
        if tokens is None
        else sum(count for shard, count in tokens.items() if shard not in commits),
        size_bytes=sum(file.size for commit in commits.values() for file in commit.files.values()),
        workers=tuple(sorted(workers, key=lambda w: (w.worker.count, w.worker.index))),
        problem=problem,
    )


def shard_owners(
    sessions: Sequence[SessionRecord], committed: Collection[int]
) -> dict[int, SessionRecord]:
    """For each shard that is not committed, the last session that was assigned it."""
    owners: dict[int, SessionRecord] = {}
    for session in sessions:
        shards = session.pending.union(session.taken)
        owners |= dict.fromkeys((i for i in shards if i not in committed), session)
    return owners


def worker_status(
    sessions: Sequence[SessionRecord],
    left: Collection[int],
    slowest_s: float | None,
    time: datetime,
) -> WorkerStatus:
    """The status of one worker.

    Args:
        sessions: Its sessions, at least one, in the order in which they began.
        left: Shards that belong to the last of them.
        slowest_s: Seconds of the slowest shard of any worker; None before there is one.
        time: Time of the status.
    """
    session = sessions[-1]
    finished = {shard.shard for own in sessions for shard in own.finished}
    own_slowest = max((s.seconds for own in sessions for s in own.finished), default=slowest_s)
    state: State = session.reason or (
        # abs: a last line from the future, by a clock that is ahead, does not count as recent.
        "silent" if abs(time - session.last) > _patience(own_slowest) else "running"
    )
    in_hand = session.in_hand if session.reason else min(left, default=None)
    return WorkerStatus(
        worker=session.worker,
        state=state,
        finished=len(finished),
        left=len(left),
        in_hand=in_hand if in_hand in left else None,
        since=session.finished[-1].time if session.finished else session.begun,
        tokens_per_s=session_rate(session),
        error=session.error,
        host=session.host,
        job=session.job,
        last=session.last,
    )


def _patience(slowest_s: float | None) -> timedelta:
    """How long a running worker may write nothing."""
    if slowest_s is None:
        return timedelta(seconds=SILENT_FIRST_S)
    return timedelta(seconds=max(SILENT_S, SILENT_SHARDS * slowest_s))


def session_rate(session: SessionRecord) -> float | None:
    """Tokens per second of a session, without loading the model; None before its first shard ends."""
    if not session.finished:
        return None
    first, last = session.finished[0], session.finished[-1]
    seconds = first.seconds + (last.time - first.time).total_seconds()
    tokens = sum(shard.tokens for shard in session.finished)
    return tokens / seconds if seconds > 0 else None
