"""Which shards a worker does. Decided by plan and commits, never by a live listing of data."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from store_schema.errors import ConfigError
from store_schema.plan import ShardRecord


@dataclass(frozen=True, slots=True)
class Worker:
    """Worker `index` of `count`, both as schedulers count: from 0."""

    index: int = 0
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def parse_worker(text: str | None, environment: Mapping[str, str] = os.environ) -> Worker:
    """The worker that this process is.

    Args:
        text: "i/n" from the command line, i from 0; None asks the scheduler's variables.
        environment: SLURM_ARRAY_TASK_ID with SLURM_ARRAY_TASK_COUNT (and _MIN), or
            JOB_COMPLETION_INDEX with JOB_COMPLETION_COUNT.

    Raises:
        ConfigError: Not "i/n" with 0 <= i < n.
    """
    if text is None:
        if "SLURM_ARRAY_TASK_ID" in environment:
            text = _array_task(environment)
        elif "JOB_COMPLETION_INDEX" in environment:
            count = environment.get("JOB_COMPLETION_COUNT", "1")
            text = f"{environment['JOB_COMPLETION_INDEX']}/{count}"
        else:
            return Worker()
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise ConfigError(
            "worker refused", where="--worker", expected="i/n with i from 0 to n-1", got=text
        )
    return Worker(int(match[1]), int(match[2]))


def _array_task(environment: Mapping[str, str]) -> str:
    """Slurm's array task as "i/n"; arrays may begin at any number."""
    first = environment.get("SLURM_ARRAY_TASK_MIN", "0")
    index, count = (
        environment["SLURM_ARRAY_TASK_ID"],
        environment.get("SLURM_ARRAY_TASK_COUNT", "1"),
    )
    if not (first.isdecimal() and index.isdecimal()):
        raise ConfigError(
            "Slurm's array variables are not numbers",
            where="SLURM_ARRAY_TASK_ID, SLURM_ARRAY_TASK_MIN",
            got=f"{index}, {first}",
            hint="give --worker i/n",
        )
    return f"{int(index) - int(first)}/{count}"


def pending_shards(
    shards: Iterable[ShardRecord], committed: Collection[int], worker: Worker
) -> list[ShardRecord]:
    """Shards that `worker` still has to do: every n-th of the plan, less what is committed.

    The deal does not depend on what is committed, so workers that start at different moments never
    choose the same shard; a changed worker count deals anew over what is left.
    """
    return [
        shard
        for shard in shards
        if shard.index % worker.count == worker.index and shard.index not in committed
    ]
