"""Calls a function for each shard of a store, several shards at a time.

Threads, not processes: reading, decompressing, checking and hashing release Python's lock, and a
process needs a second of imports before its first shard (docs/store_commands.md has the figures).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

from launch.signals import StopFlag

Result = TypeVar("Result")


def usable_cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def for_each_shard(
    work: Callable[[int], Result],
    shards: Sequence[int],
    *,
    jobs: int | None = None,
    stop: StopFlag | None = None,
) -> Iterator[tuple[int, Result]]:
    """Call `work` for every shard.

    Args:
        work: Called with the shard's index, in a thread.
        shards: Indices of the shards.
        jobs: Shards at a time; None takes one for each processor. Memory holds as many shards.
        stop: Checked after every shard.

    Yields:
        Shard and result, in the order of finishing.

    Raises:
        Stopped: `stop` was set; shards that were begun are finished, the rest is not begun.
    """
    with ThreadPoolExecutor(jobs or usable_cpus()) as pool:
        futures = {pool.submit(work, shard): shard for shard in shards}
        try:
            for future in as_completed(futures):
                yield futures.pop(future), future.result()
                if stop is not None:
                    stop.check()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
