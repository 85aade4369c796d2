"""Which shards a worker does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.work import Worker, parse_worker, pending_shards
from store_schema.errors import ConfigError
from tests import store_factory


@given(shards=st.integers(0, 40), count=st.integers(1, 9), committed=st.sets(st.integers(0, 60)))
def test_workers_share_what_is_pending_and_nothing_twice(
    shards: int, count: int, committed: set[int]
) -> None:
    plan = [store_factory.shard_record(i) for i in range(shards)]
    dealt = [
        shard.index
        for i in range(count)
        for shard in pending_shards(plan, committed, Worker(i, count))
    ]
    assert sorted(dealt) == [i for i in range(shards) if i not in committed]


def test_the_deal_does_not_depend_on_what_is_done() -> None:
    plan = [store_factory.shard_record(i) for i in range(7)]
    assert [s.index for s in pending_shards(plan, set(), Worker(1, 3))] == [1, 4]
    assert [s.index for s in pending_shards(plan, {0, 1, 2}, Worker(1, 3))] == [4]


@pytest.mark.parametrize(
    ("text", "environment", "expected"),
    [
        ("2/5", {"SLURM_ARRAY_TASK_ID": "9"}, Worker(2, 5)),
        (None, {}, Worker(0, 1)),
        (None, {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4"}, Worker(3, 4)),
        (
            None,
            {
                "SLURM_ARRAY_TASK_ID": "12",
                "SLURM_ARRAY_TASK_COUNT": "4",
                "SLURM_ARRAY_TASK_MIN": "10",
            },
            Worker(2, 4),
        ),
        (None, {"JOB_COMPLETION_INDEX": "1", "JOB_COMPLETION_COUNT": "2"}, Worker(1, 2)),
        (None, {"JOB_COMPLETION_INDEX": "0"}, Worker(0, 1)),
    ],
)
def test_worker_of_the_command_line_or_the_scheduler(
    text: str | None, environment: dict[str, str], expected: Worker
) -> None:
    assert parse_worker(text, environment) == expected
    assert parse_worker(str(expected), {}) == expected


@pytest.mark.parametrize("text", ["", "3", "3/3", "-1/3", "1/0", "a/b", "1/2/3", " 1/2", "1.0/2"])
def test_bad_workers(text: str) -> None:
    with pytest.raises(ConfigError, match="--worker"):
        parse_worker(text, {})


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "2"},
        {"SLURM_ARRAY_TASK_ID": "x"},
        {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "y"},
        {"JOB_COMPLETION_INDEX": ""},
        {"JOB_COMPLETION_INDEX": "4", "JOB_COMPLETION_COUNT": "z"},
    ],
)
def test_bad_schedulers(environment: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        parse_worker(None, environment)
