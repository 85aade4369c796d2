"""Shards scored while others are prepared and written: order, bounds, faults, stops."""

from __future__ import annotations

import os
import signal
import threading
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from extract.engines.protocol import DenseRows
from extract.engines.vllm_tap import Tap
from extract.run import run_source
from extract.scoring.pipeline import Backlog, Pipeline
from launch.work import Part
from store_schema.config import load_run
from store_schema.errors import MismatchError, ModelError, StoppedMidway, StorageError
from store_schema.layout import Arrays, check_shard
from store_schema.plan.plan import Plan, ShardRecord
from store_schema.plan.run_plan import open_plan
from store_schema.store.writer import StoreWriter
from store_schema.text.tokenizer import EncodedSegment, SegmentTokenizer
from tests.command import ok
from tests.extract_runs import plan_run, sample_documents, write_jsonl, write_run


class FakeEngine:
    """Uniform rows in an order of its own, as fast as they are taken."""

    description = "fake"

    def __init__(self, top_k: int = 8, fault: float | None = None) -> None:
        self.top_k, self.fault = top_k, fault
        self.calls: list[int] = []

    def score(self, segments: Sequence[EncodedSegment]) -> Iterator[tuple[int, DenseRows]]:
        self.calls.append(len(segments))
        for i in reversed(range(len(segments))):
            known = len(segments[i].token_ids) - (not segments[i].context_ids)
            logprobs = np.full((known, self.top_k), -np.log(2 * self.top_k), np.float32)
            ids = np.tile(np.arange(self.top_k), (known, 1))
            # Labels tell which segment the rows were made from.
            labels = np.full(known, -float(segments[i].token_ids[-1]) - 1, np.float32)
            if self.fault is not None and known:
                labels[-1] = self.fault
            yield i, DenseRows(ids, logprobs, labels)

    def answer(self, prompts: Any, rules: Any) -> Iterator[Any]:
        raise NotImplementedError

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    write_jsonl(folder / "docs.jsonl", sample_documents(12))
    return plan_run(write_run(folder, {name: tiny_models[name] for name in ("prose", "target")}))


@pytest.fixture
def source(planned: Path) -> tuple[SegmentTokenizer, Plan]:
    run = load_run(planned)
    return SegmentTokenizer.load(run.sources["prose"], name="prose"), open_plan(run)


class Sink:
    """Takes finished shards, checked; `gate` holds the writer back."""

    def __init__(self, vocab_size: int) -> None:
        self.shards: dict[int, Arrays] = {}
        self.order: list[int] = []
        self.begun = threading.Event()
        self.gate = threading.Event()
        self.gate.set()
        self._vocab_size = vocab_size

    def write(self, shard: ShardRecord, arrays: Arrays, stats: dict[str, float]) -> None:
        self.begun.set()
        assert self.gate.wait(30)
        check_shard("source", arrays, vocab_size=self._vocab_size, where="test")
        assert stats["tokens"] == shard.num_tokens["prose"]
        self.shards[shard.index] = arrays
        self.order.append(shard.index)


def test_a_shard_that_another_worker_has_done_is_left_out(
    source: tuple[SegmentTokenizer, Plan],
) -> None:
    tokenizer, plan = source
    whole, sink, begun = Sink(tokenizer.vocab_size), Sink(tokenizer.vocab_size), []
    assert len(plan.shards) > 2
    with Pipeline(tokenizer, plan, whole.write, queue_bytes=1 << 20) as pipeline:
        pipeline.score(FakeEngine(), plan.shards, on_scored=lambda _: None)
    with Pipeline(tokenizer, plan, sink.write, queue_bytes=1 << 20) as pipeline:
        pipeline.score(
            FakeEngine(),
            iter(plan.shards),
            on_scored=lambda _: None,
            on_begun=begun.append,
            done_elsewhere=lambda shard: shard % 2 == 0,
        )
    assert begun == [shard.index for shard in plan.shards]
    assert sink.order == [index for index in begun if index % 2]
    for index, arrays in sink.shards.items():
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, whole.shards[index][name])


def test_every_shard_is_written_in_order_with_its_own_rows(
    source: tuple[SegmentTokenizer, Plan],
) -> None:
    tokenizer, plan = source
    sink, engine, seen = Sink(tokenizer.vocab_size), FakeEngine(), []
    with Pipeline(tokenizer, plan, sink.write, queue_bytes=1 << 20) as pipeline:
        pipeline.score(engine, plan.shards, on_scored=seen.append)
    assert sink.order == [shard.index for shard in plan.shards]
    assert engine.calls == [shard.stop - shard.start for shard in plan.shards]
    assert sum(seen) == sum(shard.num_tokens["prose"] for shard in plan.shards)
    for shard in plan.shards:
        arrays = sink.shards[shard.index]
        segments = plan.segments(shard)
        assert arrays["segment_ids"].tolist() == [segment.index for segment in segments]
        for d, part in enumerate(tokenizer.encode(segments)):
            rows = slice(*arrays["token_offsets"][d : d + 2])
            assert arrays["token_ids"][rows].tolist() == part.token_ids.tolist()
            labels = arrays["label_logprobs"][rows]
            assert np.isnan(labels[0])
            assert set(labels[1:]) <= {-float(part.token_ids[-1]) - 1}


def test_scoring_goes_on_while_a_shard_is_written(source: tuple[SegmentTokenizer, Plan]) -> None:
    """With the writer held back, the next shard is scored; the one after it has to wait."""
    tokenizer, plan = source
    sink, engine = Sink(tokenizer.vocab_size), FakeEngine()
    sink.gate.clear()

    begun: list[int] = []

    def run() -> None:
        with Pipeline(tokenizer, plan, sink.write, queue_bytes=1 << 30) as pipeline:
            pipeline.score(engine, plan.shards, on_scored=lambda _: None, on_begun=begun.append)

    thread = threading.Thread(target=run)
    thread.start()
    deadline = time.monotonic() + 60
    while len(engine.calls) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    # However many rows fit, two shards are begun and not committed: what a kill costs.
    assert len(engine.calls) == 2
    assert begun == [0, 1]
    assert thread.is_alive()
    sink.gate.set()
    thread.join(30)
    assert sink.order == [shard.index for shard in plan.shards]


def test_memory_does_not_grow_with_the_corpus(source: tuple[SegmentTokenizer, Plan]) -> None:
    """A slow writer, a fast engine: the peak is that of the bounds, however many shards there are."""
    tokenizer, plan = source
    top_k, queue_bytes = 256, 64 << 10

    def peak(shards: Sequence[ShardRecord]) -> int:
        def write(*_: object) -> None:
            time.sleep(0.01)

        tracemalloc.start()
        try:
            with Pipeline(tokenizer, plan, write, queue_bytes=queue_bytes) as pipeline:
                pipeline.score(FakeEngine(top_k), shards, on_scored=lambda _: None)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(plan.shards[:1])  # compiles
    shards = plan.shards * 3
    tokens = [shard.num_tokens["prose"] for shard in shards]
    # Rows that wait, one row in work on either side; three shards of entries, each joined once more.
    bound = 2 * queue_bytes + 6 * max(tokens) * (8 * top_k + 24)
    assert bound < sum(tokens) * 8 * top_k / 4
    assert peak(shards) < bound


@pytest.mark.parametrize("fault", [np.nan, 0.5])
def test_a_fault_of_the_model_ends_it(source: tuple[SegmentTokenizer, Plan], fault: float) -> None:
    """Told at the latest when the context ends; its threads end with it."""
    tokenizer, plan = source
    sink = Sink(tokenizer.vocab_size)
    before = threading.active_count()
    for shards in (plan.shards, plan.shards[:1]):
        with pytest.raises(ModelError, match=r"segment \S+#\d+, source prose, position \d+"):
            with Pipeline(tokenizer, plan, sink.write, queue_bytes=1 << 20) as pipeline:
                pipeline.score(FakeEngine(fault=fault), shards, on_scored=lambda _: None)
        assert threading.active_count() == before
    assert sink.shards == {}


def test_a_fault_of_the_disk_ends_it(source: tuple[SegmentTokenizer, Plan]) -> None:
    """Told once, at the latest when the context ends; no shard is written after it."""
    tokenizer, plan = source
    written = []

    def write(shard: ShardRecord, arrays: Arrays, stats: dict[str, float]) -> None:
        if shard.index == 2:
            raise StorageError("disk full")
        written.append(shard.index)

    for shards in (plan.shards, plan.shards[:3]):
        written.clear()
        with pytest.raises(StorageError, match="disk full"):
            with Pipeline(tokenizer, plan, write, queue_bytes=1 << 20) as pipeline:
                pipeline.score(FakeEngine(), shards, on_scored=lambda _: None)
        assert written == [0, 1]


def test_a_stop_drops_the_shard_in_hand_and_keeps_the_one_being_written(
    source: tuple[SegmentTokenizer, Plan],
) -> None:
    tokenizer, plan = source
    sink = Sink(tokenizer.vocab_size)
    sink.gate.clear()
    scored = 0
    limit = plan.shards[0].num_tokens["prose"] + 1

    def on_scored(positions: int) -> None:
        nonlocal scored
        scored += positions
        if scored > limit:
            assert sink.begun.wait(60)
            sink.gate.set()
            raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        with Pipeline(tokenizer, plan, sink.write, queue_bytes=1 << 20) as pipeline:
            pipeline.score(FakeEngine(), plan.shards, on_scored=on_scored)
    assert sink.order == [0]
    assert threading.active_count() == before


def test_tokens_that_were_not_planned_are_refused_before_they_are_scored(
    source: tuple[SegmentTokenizer, Plan],
) -> None:
    tokenizer, plan = source
    record = plan.shards[1].model_copy(update={"num_tokens": {"prose": 1}})
    engine, sink = FakeEngine(), Sink(tokenizer.vocab_size)
    with pytest.raises(MismatchError, match="another number of tokens than in the plan"):
        with Pipeline(tokenizer, plan, sink.write, queue_bytes=1 << 20) as pipeline:
            pipeline.score(engine, [plan.shards[0], record], on_scored=lambda _: None)
    assert len(engine.calls) <= 1


def test_seconds_are_those_in_the_engine(source: tuple[SegmentTokenizer, Plan]) -> None:
    class SlowEngine(FakeEngine):
        def score(self, segments: Sequence[EncodedSegment]) -> Iterator[tuple[int, DenseRows]]:
            for found in super().score(segments):
                time.sleep(0.01)
                yield found

    tokenizer, plan = source
    found: dict[int, dict[str, float]] = {}

    def write(shard: ShardRecord, arrays: Arrays, stats: dict[str, float]) -> None:
        found[shard.index] = stats

    with Pipeline(tokenizer, plan, write, queue_bytes=1 << 20) as pipeline:
        pipeline.score(SlowEngine(), plan.shards[:2], on_scored=lambda _: None)
    for shard in plan.shards[:2]:
        stats = found[shard.index]
        assert stats["seconds"] >= 0.01 * (shard.stop - shard.start)
        assert stats["tokens_per_s"] == pytest.approx(stats["tokens"] / stats["seconds"])


def test_an_abandoned_backlog_ends_the_job_in_hand_and_no_other() -> None:
    begun, gate, done = threading.Event(), threading.Event(), []
    backlog = Backlog("test", 10)

    def first() -> None:
        begun.set()
        assert gate.wait(30)
        done.append("first")

    backlog.put(first, 1)
    backlog.put(lambda: done.append("second"), 1)
    assert begun.wait(30)
    threading.Timer(0.1, gate.set).start()
    backlog.abandon()
    assert done == ["first"]


def test_backlog_lets_a_job_in_that_is_larger_than_its_limit() -> None:
    done: list[int] = []
    backlog = Backlog("test", 10)
    for size in (3, 100, 3):
        backlog.put(lambda size=size: done.append(size), size)  # type: ignore[misc]
    backlog.finish()
    assert done == [3, 100, 3]


def test_a_limited_run_and_chosen_shards(planned: Path) -> None:
    """--shards and --limit through the command: what is asked for is committed, no more."""
    run = load_run(planned)
    run_source(run, "prose", Part(shards=((2, 5),), limit=2))
    commits = planned.parent / "run" / "stores" / "prose" / "commits"
    assert sorted(path.name for path in commits.iterdir()) == ["00002.json", "00003.json"]
    ok("extract", "run", planned, "--dry-run", "--shards", "2-5")
    text = ok("extract", "run", planned, "--dry-run", "--shards", "2-5")
    assert "would do 2 shards (4-5)" in text
    assert len(list(commits.iterdir())) == 2


def test_an_engine_that_leaves_segments_out_is_told(source: tuple[SegmentTokenizer, Plan]) -> None:
    tokenizer, plan = source

    class Lazy(FakeEngine):
        def score(self, segments: Sequence[EncodedSegment]) -> Iterator[tuple[int, DenseRows]]:
            yield from list(super().score(segments))[1:]

    with pytest.raises(ModelError, match="the engine left segments out"):
        with Pipeline(tokenizer, plan, lambda *_: None, queue_bytes=1 << 20) as pipeline:
            pipeline.score(Lazy(), plan.shards, on_scored=lambda _: None)


def test_no_shards_are_no_work(source: tuple[SegmentTokenizer, Plan]) -> None:
    tokenizer, plan = source
    engine, sink = FakeEngine(), Sink(tokenizer.vocab_size)
    with Pipeline(tokenizer, plan, sink.write, queue_bytes=1) as pipeline:
        pipeline.score(engine, [], on_scored=lambda _: None)
    assert engine.calls == sink.order == []


def test_a_tap_joins_the_parts_of_a_prompt_and_leaves_others_alone() -> None:
    """A front end that hands a prompt over in two parts, and a request nobody watches."""
    passed: list[Any] = []
    front = SimpleNamespace(process_outputs=lambda outputs: passed.append(outputs))
    tap = Tap(front)
    tap.watch("a")

    def output(name: str, first: int, num_rows: int) -> SimpleNamespace:
        ids = np.arange(first, first + 2 * num_rows, dtype=np.int32).reshape(-1, 2)
        tensors = SimpleNamespace(logprob_token_ids=ids, logprobs=-ids.astype(np.float32))
        return SimpleNamespace(request_id=name, new_prompt_logprobs_tensors=tensors)

    other = output("b", 50, 1)
    front.process_outputs([output("a", 0, 2), other])
    front.process_outputs([output("a", 4, 1)])
    assert len(passed) == 2
    assert passed[0][0].new_prompt_logprobs_tensors is None
    assert other.new_prompt_logprobs_tensors is not None
    ids, logprobs = tap.take("a")
    assert ids.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert logprobs.tolist() == (-ids).tolist()
    assert not tap.watched


def test_a_stop_while_the_first_shard_is_written_is_a_stop_midway(
    planned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shard is committed on the way out, so running again gets further: exit code 75."""
    write = StoreWriter.write

    def slow(self: StoreWriter, *arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.5)
        return write(self, *arguments)

    monkeypatch.setattr(StoreWriter, "write", slow)
    monkeypatch.setattr("extract.run.open_engine", lambda spec: FakeEngine())
    monkeypatch.setattr("extract.run.require_causal", lambda *_: None)
    with pytest.raises(StoppedMidway) as caught:
        run_source(load_run(planned), "prose", Part(shards=((6, 9),)))
    assert caught.value.exit_code == 75
    commits = planned.parent / "run" / "stores" / "prose" / "commits"
    assert (commits / "00006.json").exists()
    assert not (commits / "00008.json").exists()
