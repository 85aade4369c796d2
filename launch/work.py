"""Which shards a worker does, decided by plan and commits, not by listing data."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from store_schema.errors import ConfigError

if TYPE_CHECKING:  # the command line is answered before the plan's packages are loaded
    from store_schema.config import RunConfig
    from store_schema.plan.plan import ShardRecord

Ranges = tuple[tuple[int, int], ...]
"""Shards as inclusive ranges, sorted, neither overlapping nor adjacent."""

SHOWN_RANGES = 10
"""Most ranges in messages and tables."""

MAX_SHARD = 1_000_000
"""Larger than any plan's shard numbers."""


@dataclass(frozen=True, slots=True)
class Worker:
    """Worker `index` of `count`, both as schedulers count: from 0."""

    index: int = 0
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


@dataclass(frozen=True, slots=True)
class Part:
    """Which part of a stage's shards this process does.

    Args:
        worker: Does every count-th shard of the plan, beginning with its index.
        shards: Only these shards; None for all.
        limit: Most shards of each source in this run; None for no limit.
        steal: Whether to go on with other workers' shards when its own are finished.
        scheduler_fds: File descriptors, to read and to write, of a scheduler that assigns one shard
            after the other (`launch.shard_queue.ScheduledQueue`), so that none is this part's
            beforehand; None without one.
    """

    worker: Worker = Worker()
    shards: Ranges | None = None
    limit: int | None = None
    steal: bool = True
    scheduler_fds: tuple[int, int] | None = None

    def mine(self, shards: Iterable[ShardRecord]) -> list[ShardRecord]:
        """Shards of the plan that belong to this part, finished or not; ignores the limit.

        Raises:
            ConfigError: A shard was named that the plan does not have.
        """
        return [shard for shard in self._named(shards) if self._is_mine(shard.index)]

    def shards_of_others(self, shards: Iterable[ShardRecord]) -> list[ShardRecord]:
        """Shards of the plan that belong to other workers and that this one may go on with."""
        if not self.steal or self.limit is not None:
            return []
        return [shard for shard in self._named(shards) if not self._is_mine(shard.index)]

    def pending(
        self, shards: Iterable[ShardRecord], committed: Collection[int]
    ) -> list[ShardRecord]:
        """Shards that this process still has to do.

        The assignment does not depend on what is committed, so workers that start at different times
        never choose the same shard; with another worker count, shards that are left are assigned again.

        Args:
            shards: All shards of the plan.
            committed: Indices of those that are finished.

        Raises:
            ConfigError: A shard was named that the plan does not have.
        """
        return [s for s in self.mine(shards) if s.index not in committed][: self.limit]

    def only(self, pending: Iterable[ShardRecord]) -> Part:
        """This part without a limit and with these shards by name, so that they stay the same later."""
        named = shard_ranges(shard.index for shard in pending)
        return Part(self.worker, named, None, steal=False)

    def without_stealing(self) -> Part:
        """This part, of its own shards alone."""
        return replace(self, steal=False)

    def arguments(self) -> list[str]:
        """This part as command line options; --worker is always among them."""
        words = ["--worker", str(self.worker)]
        if self.shards is not None:
            words += ["--shards", range_text(self.shards)]
        if self.limit is not None:
            words += ["--limit", str(self.limit)]
        return words if self.steal else [*words, "--no-steal"]

    def _is_mine(self, shard: int) -> bool:
        return shard % self.worker.count == self.worker.index

    def _named(self, shards: Iterable[ShardRecord]) -> list[ShardRecord]:
        """Those of the plan's shards that --shards names; none where a scheduler assigns them."""
        planned, ranges = list(shards), () if self.scheduler_fds else self.shards
        if ranges is None:
            return planned
        if ranges and ranges[-1][1] >= len(planned):
            raise ConfigError(
                "the plan has no such shard",
                where="--shards",
                expected=f"at most {len(planned) - 1}, the last shard" if planned else "no shard",
                got=range_text(ranges),
            )
        return [s for s in planned if any(first <= s.index <= last for first, last in ranges)]


def parse_shards(text: str) -> Ranges:
    """Ranges from text such as "3-7", "3" or "0-2,9", in any order.

    Raises:
        ConfigError: Not of this form.
    """
    ranges = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last > MAX_SHARD:
            raise ConfigError(
                "shards refused", where="--shards", expected="such as 3-7 or 0-2,9", got=text
            )
        ranges.append((first, last))
    return _joined(ranges)


def shards_in(ranges: Ranges) -> list[int]:
    """All shards of the ranges, ascending."""
    return [shard for first, last in ranges for shard in range(first, last + 1)]


def shard_ranges(shards: Iterable[int]) -> Ranges:
    """Shards as ranges."""
    return _joined((shard, shard) for shard in shards)


def _joined(ranges: Iterable[tuple[int, int]]) -> Ranges:
    joined: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(joined[-1][1], last))
        else:
            joined.append((first, last))
    return tuple(joined)


def range_text(ranges: Ranges) -> str:
    """Ranges as `parse_shards` reads them."""
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


def some_shards(shards: Iterable[int]) -> str:
    """Shards as text for one line: at most `SHOWN_RANGES` ranges."""
    ranges = shard_ranges(shards)
    return range_text(ranges[:SHOWN_RANGES]) + (",..." if len(ranges) > SHOWN_RANGES else "")


def parse_worker(text: str | None, environment: Mapping[str, str] = os.environ) -> Worker:
    """The worker that this process is.

    Args:
        text: "i/n" from the command line, i from 0; None uses the scheduler's variables.
        environment: SLURM_ARRAY_TASK_ID with _COUNT, _MIN, _MAX and _STEP, or JOB_COMPLETION_INDEX
            with JOB_COMPLETION_COUNT; and the variables of `step_task`.

    Raises:
        ConfigError: Not "i/n" with 0 <= i < n, or variables that do not determine the worker.
    """
    if text is None:
        job = Worker()
        if "SLURM_ARRAY_TASK_ID" in environment:
            job = _array_task(environment)
        elif "JOB_COMPLETION_INDEX" in environment:
            job = _indexed_job(environment)
        step = step_task(environment)
        return Worker(job.index * step.count + step.index, job.count * step.count)
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise ConfigError(
            "worker refused", where="--worker", expected="i/n with i from 0 to n-1", got=text
        )
    return Worker(int(match[1]), int(match[2]))


def step_task(environment: Mapping[str, str] = os.environ) -> Worker:
    """This process's task among those that one `srun` started; 0/1 outside a step of several tasks.

    A batch script is in no step, but has SLURM_NTASKS and may have inherited the variables of the step
    that it was submitted from, whose number of tasks then differs as a rule.
    """
    names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS")
    values = [environment.get(name, "") for name in names]
    task, tasks, of_step = (int(text) if text.isdecimal() else 0 for text in values)
    in_step = of_step == tasks or (task > 0 and not of_step)
    return Worker(task, tasks) if in_step and task < tasks else Worker()


def _array_task(environment: Mapping[str, str]) -> Worker:
    """Worker of Slurm's array task; arrays may have any first number and step, but no gaps."""
    names = ("ID", "COUNT", "MIN", "MAX", "STEP")
    values = {name: environment.get(f"SLURM_ARRAY_TASK_{name}") for name in names}
    shown = ", ".join(f"{name} {text}" for name, text in values.items() if text is not None)
    refusal = ConfigError(
        "Slurm's array variables do not tell which worker this is",
        where="SLURM_ARRAY_TASK_*",
        expected="ID and COUNT of an array without gaps, such as 0-15",
        got=shown,
        hint="give --worker i/n",
    )
    if values["COUNT"] is None or not all(t is None or t.isdecimal() for t in values.values()):
        raise refusal
    task, count = int(values["ID"] or 0), int(values["COUNT"])
    first, step = int(values["MIN"] or 0), max(int(values["STEP"] or 1), 1)
    last = int(values["MAX"] or first + step * (count - 1))
    index, rest = divmod(task - first, step)
    if rest or (last - first) // step != count - 1 or not 0 <= index < count:
        raise refusal
    return Worker(index, count)


def _indexed_job(environment: Mapping[str, str]) -> Worker:
    """Worker of a Kubernetes indexed job, which sets the index but not the number of completions."""
    index = environment["JOB_COMPLETION_INDEX"]
    count = environment.get("JOB_COMPLETION_COUNT")
    both = index.isdecimal() and count is not None and count.isdecimal()
    if not (both and int(index) < int(count or 0)):
        raise ConfigError(
            "the indexed job's variables do not tell which worker this is",
            where="JOB_COMPLETION_INDEX, JOB_COMPLETION_COUNT",
            expected="index below count",
            got=f"{index}, {count}",
            hint="give --worker $(JOB_COMPLETION_INDEX)/N with N the job's completions",
        )
    return Worker(int(index), int(count or 0))


def chosen_sources(run: RunConfig, names: Collection[str]) -> tuple[str, ...]:
    """The sources of a command: each of `names` once, or all of the run if there are none.

    Raises:
        ConfigError: The run has no such source.
    """
    unknown = sorted(set(names) - set(run.sources))
    if unknown:
        raise ConfigError(
            "no such source",
            where="--source",
            expected=", ".join(run.sources),
            got=", ".join(unknown),
        )
    return tuple(dict.fromkeys(names)) or tuple(run.sources)


def others_line(part: Part, shards: Iterable[ShardRecord], committed: Collection[int]) -> str:
    """What `--dry-run` adds to a source's line: how many shards other workers may leave to this one."""
    left = sum(shard.index not in committed for shard in part.shards_of_others(shards))
    return f"; then what other workers leave of {left:,} shards" if left else ""


def work_line(what: str, pending: Collection[ShardRecord], model: str) -> str:
    """Line that `--dry-run` prints for a source: shards and tokens that a run would do.

    Args:
        what: Stage and source, such as "extract coder".
        pending: Shards to do.
        model: Model whose tokens to count, a key of `num_tokens`.
    """
    if not pending:
        return f"{what}: nothing to do"
    shards = some_shards(shard.index for shard in pending)
    tokens = sum(shard.num_tokens[model] for shard in pending)
    count = "1 shard" if len(pending) == 1 else f"{len(pending):,} shards"
    return f"{what}: would do {count} ({shards}), {tokens:,} tokens"
