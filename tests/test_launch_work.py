"""Which shards a worker does."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.shard_queue import ASK_EVERY_S, ShardQueue
from launch.work import (
    Part,
    Ranges,
    Worker,
    chosen_sources,
    others_line,
    parse_shards,
    parse_worker,
    range_text,
    shard_ranges,
    shards_in,
    work_line,
)
from store_schema.config import ModelRef, RunConfig
from store_schema.errors import ConfigError
from store_schema.plan.plan import ShardRecord
from tests import store_factory


def _plan(num_shards: int) -> list[ShardRecord]:
    return [store_factory.shard_record(i) for i in range(num_shards)]


def _indices(shards: Iterable[ShardRecord]) -> list[int]:
    return [shard.index for shard in shards]


@given(
    num_shards=st.integers(1, 40),
    count=st.integers(1, 9),
    committed=st.sets(st.integers(0, 60)),
    data=st.data(),
)
def test_parts_share_what_is_pending_and_nothing_twice(
    num_shards: int, count: int, committed: set[int], data: st.DataObject
) -> None:
    plan = _plan(num_shards)
    chosen = data.draw(st.none() | st.sets(st.integers(0, num_shards - 1), min_size=1))
    ranges = None if chosen is None else shard_ranges(chosen)
    parts = [Part(Worker(i, count), ranges) for i in range(count)]
    assigned = [shard for part in parts for shard in part.pending(plan, committed)]
    wanted = set(range(num_shards)) if chosen is None else chosen
    assert sorted(_indices(assigned)) == sorted(wanted - committed)
    totals = [index for part in parts for index in _indices(part.mine(plan))]
    assert sorted(totals) == sorted(wanted)


def test_the_deal_does_not_depend_on_what_is_done() -> None:
    part = Part(Worker(1, 3))
    assert _indices(part.pending(_plan(7), set())) == [1, 4]
    assert _indices(part.pending(_plan(7), {0, 1, 2})) == [4]


def test_a_limit_bounds_a_run_but_not_the_totals() -> None:
    part = Part(Worker(0, 2), ((0, 7),), limit=2)
    assert _indices(part.pending(_plan(9), {0})) == [2, 4]
    assert _indices(part.mine(_plan(9))) == [0, 2, 4, 6]


def test_a_shard_that_the_plan_does_not_have_is_refused() -> None:
    part = Part(shards=((0, 1), (7, 7)))
    assert _indices(part.mine(_plan(8))) == [0, 1, 7]
    with pytest.raises(ConfigError, match="at most 6, the last shard, got 0-1,7"):
        part.pending(_plan(7), set())
    with pytest.raises(ConfigError, match="no shard"):
        part.mine([])


@pytest.mark.parametrize(
    ("text", "ranges"),
    [
        ("3", ((3, 3),)),
        ("3-7", ((3, 7),)),
        ("0-2,9", ((0, 2), (9, 9))),
        ("9, 0-2", ((0, 2), (9, 9))),
        ("0-4,2-3,5,4-8", ((0, 8),)),
    ],
)
def test_shards_of_the_command_line(text: str, ranges: Ranges) -> None:
    assert parse_shards(text) == ranges
    assert parse_shards(range_text(ranges)) == ranges
    assert shard_ranges(shards_in(ranges)) == ranges


@pytest.mark.parametrize(
    "text", ["", "7-3", "a", "-1", "3-", "1,,2", "1.5", "0-1-2", "9999999999", "0-999999999"]
)
def test_bad_shards(text: str) -> None:
    with pytest.raises(ConfigError, match="--shards"):
        parse_shards(text)


@given(st.sets(st.integers(0, 99)))
def test_ranges_are_the_shards(shards: set[int]) -> None:
    ranges = shard_ranges(shards)
    assert {i for first, last in ranges for i in range(first, last + 1)} == shards
    assert all(last + 1 < first for (_, last), (first, _) in pairwise(ranges))


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (Part(), "--worker 0/1"),
        (Part(Worker(2, 5), ((0, 2), (9, 9)), 4), "--worker 2/5 --shards 0-2,9 --limit 4"),
    ],
)
def test_a_part_as_options(part: Part, words: str) -> None:
    assert " ".join(part.arguments()) == words


def test_chosen_sources() -> None:
    sources = {name: ModelRef(model=name) for name in "abc"}
    run = RunConfig(name="t", sources=sources, target=ModelRef(model="t"))
    assert chosen_sources(run, ()) == ("a", "b", "c")
    assert chosen_sources(run, ("c", "a", "c")) == ("c", "a")
    with pytest.raises(ConfigError, match="expected a, b, c, got x, y"):
        chosen_sources(run, ("y", "a", "x"))


def test_what_a_dry_run_says() -> None:
    assert work_line("extract s", [], "s") == "extract s: nothing to do"
    shards = [store_factory.shard_record(i) for i in (0, 1, 2, 9)]
    line = "extract s: would do 4 shards (0-2,9), 32 tokens"
    assert work_line("extract s", shards, "s") == line
    even = [store_factory.shard_record(i) for i in range(0, 40, 2)]
    line = "extract s: would do 20 shards (0,2,4,6,8,10,12,14,16,18,...), 160 tokens"
    assert work_line("extract s", even, "s") == line


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
        (
            None,
            {
                "SLURM_ARRAY_TASK_ID": "14",
                "SLURM_ARRAY_TASK_COUNT": "3",
                "SLURM_ARRAY_TASK_MIN": "10",
                "SLURM_ARRAY_TASK_MAX": "18",
                "SLURM_ARRAY_TASK_STEP": "4",
            },
            Worker(1, 3),
        ),
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
        {"SLURM_ARRAY_TASK_ID": "x", "SLURM_ARRAY_TASK_COUNT": "2"},
        {"SLURM_ARRAY_TASK_ID": "0"},
        {  # --array=0,3,5-7: who is the second?
            "SLURM_ARRAY_TASK_ID": "3",
            "SLURM_ARRAY_TASK_COUNT": "5",
            "SLURM_ARRAY_TASK_MIN": "0",
            "SLURM_ARRAY_TASK_MAX": "7",
            "SLURM_ARRAY_TASK_STEP": "1",
        },
        {
            "SLURM_ARRAY_TASK_ID": "5",
            "SLURM_ARRAY_TASK_COUNT": "3",
            "SLURM_ARRAY_TASK_MIN": "0",
            "SLURM_ARRAY_TASK_MAX": "8",
            "SLURM_ARRAY_TASK_STEP": "4",
        },
        {"JOB_COMPLETION_INDEX": "0"},
        {"JOB_COMPLETION_INDEX": "2", "JOB_COMPLETION_COUNT": "2"},
        {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "y"},
        {"JOB_COMPLETION_INDEX": ""},
        {"JOB_COMPLETION_INDEX": "4", "JOB_COMPLETION_COUNT": "z"},
    ],
)
def test_bad_schedulers(environment: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="give --worker"):
        parse_worker(None, environment)


def test_named_shards_do_not_count_a_limit_again() -> None:
    shards = _plan(8)
    part = Part(Worker(1, 2), ((0, 5),), 2)
    named = part.only(part.pending(shards, set()))
    assert named.arguments() == ["--worker", "1/2", "--shards", "1,3", "--no-steal"]
    assert _indices(named.pending(shards, {1})) == [3]


class _Store:
    """The commits of a store."""

    def __init__(self) -> None:
        self.commits: set[int] = set()

    def committed(self, shards: Iterable[ShardRecord]) -> set[int]:
        return self.commits & {shard.index for shard in shards}

    def committed_now(self) -> set[int]:
        return set(self.commits)

    def is_committed(self, shard: int) -> bool:
        return shard in self.commits


def _queue(part: Part, plan: list[ShardRecord], store: _Store, **options: Any) -> ShardQueue:
    return ShardQueue(part, plan, store, **options)  # type: ignore[arg-type]


@given(data=st.data(), num_shards=st.integers(1, 24), count=st.integers(1, 5))
def test_whoever_is_free_does_what_is_left(
    data: st.DataObject, num_shards: int, count: int
) -> None:
    """Workers of any speed, some of which die: all is done, own shards first and in order."""
    plan, store = _plan(num_shards), _Store()
    workers = {i: iter(_queue(Part(Worker(i, count)), plan, store)) for i in range(count)}
    alive = data.draw(st.sets(st.integers(0, count - 1), min_size=1))
    busy: dict[int, int] = {}
    taken: dict[int, list[int]] = {i: [] for i in range(count)}
    running = list(workers)
    while running:
        i = data.draw(st.sampled_from(running))
        if i in busy:
            if i not in alive:
                running.remove(i)  # it dies over a shard
                continue
            store.commits.add(busy.pop(i))
        shard = next(workers[i], None)
        if shard is None:
            running.remove(i)
            assert store.commits | set(busy.values()) | set(taken[i]) >= set(range(num_shards))
        else:
            assert shard.index not in store.commits
            assert shard.index not in taken[i]
            taken[i].append(shard.index)
            busy[i] = shard.index
    assert store.commits == set(range(num_shards))
    for i, shards in taken.items():
        own = [shard for shard in shards if shard % count == i]
        assert own == sorted(own)
        assert shards[: len(own)] == own


def test_idle_workers_take_the_last_shards_of_others_each_another_one() -> None:
    plan, store = _plan(16), _Store()
    store.commits = set(range(16)) - {1, 5, 9, 13}  # worker 1 of 4 is slow
    idle = [iter(_queue(Part(Worker(i, 4)), plan, store)) for i in (0, 2, 3)]
    assert [next(queue).index for queue in idle] == [13, 5, 13]
    assert [next(queue).index for queue in idle] == [9, 13, 5]  # none twice by one worker
    assert next(idle[0]).index == 5
    assert next(idle[0]).index == 1  # what worker 1 may be at, last of all


def test_nothing_is_taken_from_others_where_that_was_not_asked_for() -> None:
    plan, store = _plan(8), _Store()

    def left(part: Part, **options: Any) -> list[int]:
        return _indices(_queue(part, plan, store, **options))

    assert left(Part(Worker(0, 2), steal=False)) == [0, 2, 4, 6]
    assert left(Part(Worker(0, 2), limit=2)) == [0, 2]
    assert left(Part(Worker(0, 2), ((0, 3),))) == [0, 2, 3, 1]
    assert sorted(left(Part(Worker(0, 2)), available={1, 7, 0})) == [0, 1, 2, 4, 6, 7]
    store.commits = set(range(8))
    assert not _queue(Part(Worker(0, 2)), plan, store)


def test_a_dry_run_says_what_others_may_leave() -> None:
    plan = _plan(8)
    said = "; then what other workers leave of 3 shards"
    assert others_line(Part(Worker(0, 2)), plan, {0, 1}) == said
    assert others_line(Part(Worker(0, 2), steal=False), plan, {0, 1}) == ""
    assert others_line(Part(), plan, {0, 1}) == ""


def test_a_store_is_asked_now_and_then_about_the_shard_under_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("launch.shard_queue.time", SimpleNamespace(monotonic=lambda: now))
    store = _Store()
    queue = _queue(Part(Worker(0, 2)), _plan(4), store)
    store.commits.add(0)
    assert not queue.done_elsewhere(0)
    now += ASK_EVERY_S
    assert queue.done_elsewhere(0)
    assert queue.done_elsewhere(0)
    store.commits.add(2)
    assert not queue.done_elsewhere(2)
    assert queue.done_elsewhere(2, wait_s=0)
    alone = _queue(Part(), _plan(4), store)
    assert not alone.done_elsewhere(0, wait_s=0)  # there are no others


BATCH = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}
STEP = {**BATCH, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}
ARRAY = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "0"}


@pytest.mark.parametrize(
    ("environment", "worker"),
    [
        (BATCH, Worker()),  # the batch script itself
        (STEP, Worker(0, 4)),
        (STEP | {"SLURM_PROCID": "3"}, Worker(3, 4)),
        (BATCH | {"SLURM_PROCID": "1"}, Worker(1, 4)),  # no batch script is task 1
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, Worker()),
        (STEP | {"SLURM_NTASKS": "1"}, Worker()),  # a batch script that was submitted from a step
        (STEP | {"SLURM_PROCID": "2"} | ARRAY, Worker(6, 12)),
        (BATCH | ARRAY, Worker(1, 3)),
        ({"SLURM_PROCID": "x", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}, Worker(0, 4)),
    ],
)
def test_tasks_of_srun_share_the_shards(environment: dict[str, str], worker: Worker) -> None:
    assert parse_worker(None, environment) == worker
    assert parse_worker("1/2", environment) == Worker(1, 2)


def test_all_tasks_of_an_array_of_steps_share_the_shards() -> None:
    workers = [
        parse_worker(None, STEP | ARRAY | {"SLURM_ARRAY_TASK_ID": str(i), "SLURM_PROCID": str(j)})
        for i in range(3)
        for j in range(4)
    ]
    assert [worker.index for worker in workers] == list(range(12))
