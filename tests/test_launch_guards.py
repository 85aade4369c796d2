"""Two guards of the stages: shards that the plan does not have, and stopping between commits."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest

from align import run as align_run
from launch.shard_queue import ShardQueue
from launch.signals import StopFlag
from launch.work import Part
from store_schema.errors import ConfigError, Stopped, StoppedMidway
from tests import store_factory


@pytest.mark.parametrize(
    ("shards", "num_shards", "expected"),
    [
        (((3, 3),), 3, "at most 2, the last shard"),
        (((0, 1), (2, 7)), 3, "at most 2, the last shard"),
        (((0, 0),), 0, "no shard"),
    ],
)
def test_a_shard_that_the_plan_does_not_have_is_refused(shards, num_shards, expected) -> None:
    plan = [store_factory.shard_record(index) for index in range(num_shards)]
    for ask in (Part(shards=shards).mine, lambda p: Part(shards=shards).pending(p, set())):
        with pytest.raises(ConfigError, match="the plan has no such shard") as caught:
            ask(plan)
        assert caught.value.expected == expected
        assert caught.value.where == "--shards"


def test_the_last_shard_is_one_of_the_plan() -> None:
    plan = [store_factory.shard_record(index) for index in range(3)]
    assert [s.index for s in Part(shards=((2, 2),)).mine(plan)] == [2]
    assert Part(shards=None).mine([]) == []


class Nothing:
    """A log, a progress bar, an aligner: takes whatever it is given."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: Nothing()

    def __enter__(self):
        return self

    def __exit__(self, *args) -> None:
        return None


class Written:
    """A writer that remembers what was committed."""

    encoding = None

    def __init__(self) -> None:
        self.shards: list[int] = []

    def committed(self, shards):
        return set()

    def write(self, shard, arrays, figures):
        self.shards.append(shard.index)
        counts = SimpleNamespace(positions=1, segments=1, entries=1)
        return SimpleNamespace(files={}, counts=counts, stats={})


@pytest.mark.parametrize(
    ("asked_in", "committed", "kind"),
    [(None, [], Stopped), (0, [0], StoppedMidway), (1, [0, 1], StoppedMidway)],
)
def test_alignment_stops_between_commits(monkeypatch, asked_in, committed, kind) -> None:
    """The current shard is finished and committed, the next one is not begun."""
    stop, writer, begun = StopFlag(), Written(), []

    def align_shard(checked, loaded, *rest):
        index = loaded.result()
        begun.append(index)
        if index == asked_in:
            stop.ask(signal.SIGTERM)
        return {}, {}

    if asked_in is None:
        stop.ask(signal.SIGTERM)
    monkeypatch.setattr(align_run, "load_shard", lambda checked, shard: shard.index)
    monkeypatch.setattr(align_run, "align_shard", align_shard)
    monkeypatch.setattr(align_run, "make_aligner", lambda checked, stop: Nothing())
    monkeypatch.setattr(align_run, "Progress", lambda *args, **kwargs: Nothing())
    shards = [store_factory.shard_record(index) for index in range(3)]
    for shard in shards:
        shard.num_tokens["target"] = 1
    queue = ShardQueue(Part(), shards, writer)
    with pytest.raises(kind) as ended:
        align_run.align_shards(
            SimpleNamespace(reader=Nothing(), source="s"), writer, queue, stop, Nothing()
        )
    assert type(ended.value) is kind
    assert writer.shards == begun == committed
