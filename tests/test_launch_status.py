"""Where a run stands, on run folders made by hand: plans and commits are real, times are given."""

from __future__ import annotations

import json
import os
import time as clock
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.json_lines import append_line, json_text
from launch.status import RunStatus, WorkerStatus, WorkStatus, run_status
from launch.status_text import status_json, status_text
from logitfuse import main
from store_schema.config import load_run
from store_schema.disk.location import open_location
from store_schema.disk.sealed import seal
from store_schema.manifest import Commit, Counts, FileRecord
from store_schema.plan.plan import PlanRecord
from store_schema.store.reader import StoreReader, commit_key
from tests import store_factory
from tests.s3_server import UNCLOSED, new_bucket, serve_s3

NOON = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
TOKENS = 1000
"""Of a shard, for each model."""


class Made:
    """A run: sources "code" and "prose", a plan, and what workers left.

    Args:
        folder: Of the run file and all that is local.
        num_shards: Of the plan.
        url: Where plan and stores lie instead.
    """

    def __init__(self, folder: Path, num_shards: int = 12, url: str | None = None) -> None:
        self.root = folder / "run"
        self.url = url or str(self.root)
        self.file = folder / "run.yaml"
        sources = {name: {"model": name} for name in ("code", "prose")}
        content = {"name": "t", "run_dir": self.url, "sources": sources}
        self.file.write_text(yaml.safe_dump(content | {"target": {"model": "t"}}))
        tokens = dict.fromkeys(("code", "prose", "target"), TOKENS)
        shards = tuple(
            store_factory.shard_record(i).model_copy(update={"num_tokens": tokens})
            for i in range(num_shards)
        )
        self.plan = PlanRecord(
            corpus_fingerprint="c",
            request_fingerprint="r",
            tokenizers={},
            settings={},
            num_segments=3 * num_shards,
            shards=shards,
        )
        open_location(f"{self.url}/plan").write_atomic("plan.json", seal(self.plan))

    def commit(
        self, shards: Iterable[int], store: str = "stores/code", segments: str = "f" * 32
    ) -> None:
        """Commits without data, each of 2 MB, written from segments of a fingerprint."""
        manifest = store_factory.manifest().model_copy(
            update={
                "plan_fingerprint": "as it was when the store was begun",
                "num_shards": len(self.plan.shards),
                "ranking_fingerprint": "r",
            }
        )
        location = open_location(f"{self.url}/{store}")
        location.write_atomic("manifest.json", seal(manifest))
        for shard in shards:
            commit = Commit(
                shard=shard,
                path=f"data/{shard:05d}-{'0' * 16}",
                store_fingerprint=manifest.fingerprint(),
                shard_fingerprint=segments,
                first_segment=self.plan.shards[shard].start,
                content_sha256="0" * 64,
                files={name: FileRecord(size=10**6, crc32c=1) for name in "ab"},
                counts=Counts(segments=3, positions=TOKENS, entries=5),
            )
            location.write_atomic(commit_key(shard), seal(commit))

    def session(
        self,
        worker: str,
        pending: str,
        *,
        begun: float,
        finished: Iterable[tuple[int, float, float]] = (),
        end: tuple[float, str, int | None] | None = None,
        error: str | None = None,
        stage: str = "extract",
        source: str = "code",
    ) -> None:
        """Lines of one session; times are minutes before noon, shards (index, when, seconds)."""
        index, count = worker.split("/")
        path = self.root / "logs" / stage / source / f"worker-{index}-of-{count}.jsonl"

        def write(event: str, minutes: float, **content: Any) -> None:
            time = (NOON - timedelta(minutes=minutes)).isoformat()
            name = f"{worker}@{begun}"
            append_line(path, {"event": event, "time": time, "session": name} | content)

        write("begin", begun, host="node1", pid=7, job="5_1", restarts=None, shards=pending)
        for shard, minutes, seconds in finished:
            write("shard", minutes, shard=shard, tokens=TOKENS, seconds=seconds)
        if end is not None:
            write("end", end[0], reason=end[1], error=error, shard=end[2])

    def status(self, time: datetime = NOON) -> RunStatus:
        return run_status(load_run(self.file), time)

    def work(self, stage: str = "extract", source: str = "code") -> WorkStatus:
        (found,) = (w for w in self.status().work if (w.stage, w.source) == (stage, source))
        return found


def worker_of(work: WorkStatus, name: str) -> WorkerStatus:
    (found,) = (worker for worker in work.workers if str(worker.worker) == name)
    return found


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path)


def test_a_planned_run(made: Made) -> None:
    status = made.status()
    assert [(w.stage, w.source) for w in status.work] == [
        ("extract", "code"),
        ("extract", "prose"),
        ("align", "code"),
        ("align", "prose"),
    ]
    for work in status.work:
        assert (work.total, work.done, work.pending, work.failed) == (12, 0, 12, ())
        assert (work.tokens_done, work.tokens_left, work.size_bytes) == (0, 12 * TOKENS, 0)
        assert (work.tokens_per_s, work.eta_s, work.workers) == (None, None, ())
    assert [(t.label, t.state) for t in status.trainings] == [
        ("fused", "not begun"),
        ("control", "not begun"),
    ]


def five_workers(made: Made) -> None:
    """Of 5: 0 is done, 1 runs, 2 was stopped, 3 failed, 4 stalled."""
    made.commit([0, 5, 10, 1, 6, 2, 3, 4])
    done = [(0, 50.0, 60.0), (5, 49.0, 60.0), (10, 48.0, 60.0)]
    made.session("0/5", "0,5,10", begun=55, finished=done, end=(48, "done", None))
    made.session("1/5", "1,6,11", begun=55, finished=[(1, 5, 40.0), (6, 4, 60.0)])
    made.session(
        "2/5", "2,7", begun=55, finished=[(2, 40, 60.0)], end=(39, "stopped", 7), error="SIGTERM"
    )
    made.session(
        "3/5", "3,8", begun=55, finished=[(3, 40, 60.0)], end=(30, "failed", 8), error="it broke"
    )
    made.session("4/5", "4,9", begun=55, finished=[(4, 40, 60.0)])


def test_every_state_of_a_worker(made: Made) -> None:
    five_workers(made)
    work = made.work()
    states = {str(worker.worker): worker.state for worker in work.workers}
    assert states == {
        "0/5": "done",
        "1/5": "running",
        "2/5": "stopped",
        "3/5": "failed",
        "4/5": "silent",
    }
    assert (work.done, work.pending, work.failed) == (8, 3, (8,))
    assert work.size_bytes == 8 * 2 * 10**6
    assert (work.tokens_done, work.tokens_left) == (8 * TOKENS, 4 * TOKENS)
    assert [(w.finished, w.left, w.in_hand) for w in work.workers] == [
        (3, 0, None),
        (2, 1, 11),
        (1, 1, 7),
        (1, 1, 8),
        (1, 1, 9),
    ]
    running, failed = worker_of(work, "1/5"), worker_of(work, "3/5")
    assert running.since == NOON - timedelta(minutes=4)
    # 2,000 tokens from 40 s before the first commit to the second, a minute later.
    assert running.tokens_per_s == pytest.approx(2000 / 100)
    assert (failed.error, failed.host, failed.job) == ("it broke", "node1", "5_1")
    # Only those at work count: 20 tokens/s for 4,000 tokens.
    assert work.tokens_per_s == pytest.approx(20)
    assert work.eta_s == pytest.approx(200)


def test_a_failed_shard_is_pending_once_it_is_taken_up_again(made: Made) -> None:
    five_workers(made)
    made.session("3/5", "8", begun=2)
    work = made.work()
    assert (work.failed, work.pending) == ((), 4)
    worker = worker_of(work, "3/5")
    assert (worker.state, worker.finished, worker.left, worker.in_hand) == ("running", 1, 1, 8)
    assert worker.tokens_per_s is None
    made.commit([8])
    assert made.work().failed == ()
    assert made.work().done == 9


def test_a_failed_shard_is_done_once_anybody_committed_it(made: Made) -> None:
    five_workers(made)
    made.commit([8])
    work = made.work()
    assert (work.failed, work.pending, work.done) == ((), 3, 9)
    worker = worker_of(work, "3/5")
    assert (worker.left, worker.in_hand, worker.needs_care) == (0, None, False)


def test_only_the_shard_in_hand_is_failed_and_only_the_last_session_counts(made: Made) -> None:
    made.session("0/1", "3,8,9", begun=9, finished=[(3, 8, 1.0)], end=(7, "failed", 8))
    made.commit([3])
    assert (made.work().failed, made.work().pending) == ((8,), 10)
    made.session("0/1", "9", begun=5)
    work = made.work()
    assert (work.failed, work.pending) == ((8,), 10)
    assert (work.workers[0].state, work.workers[0].left) == ("running", 1)


def test_a_changed_worker_count_counts_nothing_twice(made: Made) -> None:
    five_workers(made)
    made.session("0/2", "8", begun=3)
    made.session("1/2", "7,9,11", begun=3, finished=[(7, 2, 60.0)])
    made.commit([7])
    work = made.work()
    assert work.done + work.pending + len(work.failed) == 12
    assert (work.done, work.failed) == (9, ())
    # What the five had left is now the two's, but for those that nobody took up.
    left = {str(worker.worker): worker.left for worker in work.workers}
    assert left == {"0/5": 0, "1/5": 0, "2/5": 0, "3/5": 0, "4/5": 0, "0/2": 1, "1/2": 2}
    # Old failures whose shards are in other hands are no news.
    lines = status_text(made.status()).splitlines()
    assert [line.split("  ")[-1] for line in lines if line.startswith("extract  code")] == [
        "3 running"
    ]
    assert not [line for line in lines if "it broke" in line]


@pytest.mark.parametrize(
    ("shard_seconds", "heard_minutes", "state"),
    [
        (1.0, 9.9, "running"),
        (1.0, 10.1, "silent"),
        (240.0, 19.9, "running"),
        (240.0, 20.1, "silent"),
        (None, 59.0, "running"),
        (None, 61.0, "silent"),
        (None, -59.0, "running"),  # a clock that is a little ahead
        (None, -61.0, "silent"),
    ],
)
def test_silence(made: Made, shard_seconds: float | None, heard_minutes: float, state: str) -> None:
    """Ten minutes, or five shards where those are long; an hour before any shard was done."""
    finished = [] if shard_seconds is None else [(0, heard_minutes, shard_seconds)]
    made.session("0/1", "0-11", begun=heard_minutes if not finished else 200, finished=finished)
    assert made.work().workers[0].state == state


def test_a_worker_without_a_shard_is_measured_by_the_others(made: Made) -> None:
    made.session("0/2", "0,2", begun=30, finished=[(0, 1, 30.0)])
    made.session("1/2", "1,3", begun=11)
    assert [worker.state for worker in made.work().workers] == ["running", "silent"]


def test_a_worker_with_shards_is_measured_by_its_own(made: Made) -> None:
    made.session("0/2", "0,2", begun=90, finished=[(0, 11, 600.0)])
    made.session("1/2", "1,3", begun=90, finished=[(1, 11, 30.0)])
    assert [worker.state for worker in made.work().workers] == ["running", "silent"]


def test_stores_that_cannot_be_used_are_named(made: Made) -> None:
    made.commit([0, 1, 2])
    made.commit([0], "stores/prose", segments="e" * 32)
    key = made.root / "stores/code" / commit_key(1)
    key.write_bytes(key.read_bytes()[:-9])
    code, prose = made.work(), made.work(source="prose")
    assert (code.done, code.pending) == (2, 10)
    assert code.problem is not None
    assert code.problem.startswith("1 commit(s) cannot be used: ")
    assert prose.done == 0
    assert prose.problem is not None
    assert "do not belong together" in prose.problem
    text = status_text(made.status())
    assert code.problem in text
    assert prose.problem in text


def test_generated_and_aligned_stores(made: Made) -> None:
    made.commit([0, 1], "aligned/prose")
    made.commit([0], "generated/code")
    made.session("0/1", "1", begun=2, stage="generate", finished=[(1, 1, 10.0)])
    stages = [(w.stage, w.source) for w in made.status().work]
    assert ("generate", "code") in stages
    assert ("generate", "prose") not in stages
    generated = made.work("generate")
    assert (generated.done, generated.tokens_left, generated.eta_s) == (1, None, None)
    assert generated.tokens_per_s == pytest.approx(100)
    made.session("0/1", "0-1", begun=2, stage="generate", source="prose")
    begun = [work for work in made.status().work if work.stage == "generate"]
    assert [(work.source, work.done) for work in begun] == [("code", 1), ("prose", 0)]
    assert made.work("align", "prose").done == 2


@UNCLOSED[0]
@UNCLOSED[1]
def test_a_run_in_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commits are read there; logs lie where the workers were started."""
    with serve_s3() as server, new_bucket(server, monkeypatch) as bucket:
        made = Made(tmp_path, url=f"{bucket}/run")
        made.commit([0, 1])
        monkeypatch.chdir(tmp_path)
        made.root = Path("runs/t")
        made.session("0/1", "0-11", begun=9, finished=[(0, 8, 60.0), (1, 7, 60.0)])
        work = made.work()
    assert (work.done, work.pending, work.size_bytes) == (2, 10, 4 * 10**6)
    assert [worker.state for worker in work.workers] == ["running"]


# ------------------------------------------------------------------------------- trainings


def steps(made: Made, label: str, last: int, *, minutes: float = 1.0, total: int = 40) -> None:
    path = made.root / "logs" / f"{label}_steps.jsonl"
    append_line(path, {"step": 0, "valid_bpb": {}})
    for step in range(1, last + 1):
        line = {"step": step, "num_steps": total, "loss": 2.0 + step / 100, "seconds": 3.0}
        append_line(path, line | {"tokens_per_s": 500.0})
    written = (NOON - timedelta(minutes=minutes)).timestamp()
    os.utime(path, (written, written))


def test_trainings(made: Made) -> None:
    steps(made, "train", 40, minutes=90)
    steps(made, "control", 30)
    fused, control = made.status().trainings
    assert (fused.state, fused.step, fused.num_steps, fused.eta_s) == ("done", 40, 40, None)
    assert (control.state, control.step, control.loss) == ("running", 30, pytest.approx(2.3))
    assert (control.tokens_per_s, control.eta_s) == (500, pytest.approx(30))


@pytest.mark.parametrize(
    ("minutes", "ended", "error", "state"),
    [
        (20, None, None, "silent"),
        (20, 20, "StoppedMidway", "stopped"),
        (20, 20, "ModelError", "failed"),
        (2, 20, "ModelError", "running"),
        (20, 20, None, "silent"),
    ],
)
def test_trainings_that_ended(
    made: Made, minutes: float, ended: float | None, error: str | None, state: str
) -> None:
    steps(made, "train", 3, minutes=minutes)
    if ended is not None:
        time = (NOON - timedelta(minutes=ended)).strftime("%Y-%m-%dT%H:%M:%S%z")
        line = {"stage": "train", "ended": time} | ({"error": error} if error else {})
        append_line(made.root / "logs/train.jsonl", line)
    assert made.status().trainings[0].state == state


def test_a_run_without_a_control_has_none(made: Made) -> None:
    run = load_run(made.file, ("train.control=false",))
    assert [training.label for training in run_status(run, NOON).trainings] == ["fused"]


# ------------------------------------------------------------------------------- command


def call(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main.main(["status", *words])
    code = caught.value.code
    return code if isinstance(code, int) else -1


def test_the_table(made: Made) -> None:
    five_workers(made)
    steps(made, "train", 30)
    text = status_text(made.status())
    lines = text.splitlines()
    assert lines[0] == f"t ({made.root}), 2026-11-21 12:00:00 UTC"
    (row,) = (line for line in lines if line.startswith("extract  code"))
    cells = [cell for cell in row.split("  ") if cell]
    assert [cell.strip() for cell in cells[2:]] == [
        *("8 of 12", "3", "1", "8.00 k of 12.0 k", "20", "3 min", "16.0 MB"),
        "1 running, 1 failed, 1 silent",
    ]
    assert "train fused: running, step 30 of 40, loss 2.3000, 500 tok/s, 30 s left" in lines
    assert "  failed shards: 8" in lines
    # Those who need care are always shown, with why; the others on demand.
    assert "it broke" in text
    assert [line.split()[:2] for line in lines if "/5 " in line] == [
        ["3/5", "failed"],
        ["4/5", "silent"],
    ]
    whole = status_text(made.status(), all_workers=True)
    assert sum("/5 " in line for line in whole.splitlines()) == 5


def test_sixteen_workers_of_four_sources_fit_a_screen(tmp_path: Path) -> None:
    made = Made(tmp_path, num_shards=64)
    content = yaml.safe_load(made.file.read_text())
    content["sources"] = {name: {"model": name} for name in ("one", "two", "three", "four")}
    made.file.write_text(yaml.safe_dump(content))
    for source in content["sources"]:
        for worker in range(16):
            made.session(
                f"{worker}/16",
                f"{worker},{worker + 16}",
                begun=9,
                finished=[(worker, 3, 60.0)],
                source=source,
            )
    lines = status_text(made.status()).splitlines()
    assert len(lines) < 20
    assert max(map(len, lines)) <= 110
    assert sum(line.endswith("16 running") for line in lines) == 4


def test_json(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    five_workers(made)
    content = json.loads(json_text(status_json(made.status())))
    assert content["time"] == "2026-11-21T12:00:00+00:00"
    first = content["work"][0]
    assert (first["stage"], first["source"], first["total"]) == ("extract", "code", 12)
    assert (first["done"], first["pending"], first["failed"]) == (8, 3, [8])
    assert first["eta_s"] == pytest.approx(200)
    assert [w["state"] for w in first["workers"]][:2] == ["done", "running"]
    assert first["workers"][1]["worker"] == "1/5"
    assert [training["label"] for training in content["trainings"]] == ["fused", "control"]
    assert call("--config", str(made.file), "--json") == 0
    assert json.loads(capsys.readouterr().out)["name"] == "t"


def test_asking_changes_nothing(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    five_workers(made)
    before = {p: p.read_bytes() for p in made.root.rglob("*") if p.is_file()}
    assert call(str(made.file), "--workers") == 0
    assert capsys.readouterr().out.startswith("t (")
    assert {p: p.read_bytes() for p in made.root.rglob("*") if p.is_file()} == before


def test_a_run_without_a_plan(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    (made.root / "plan/plan.json").unlink()
    assert call(str(made.file)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: no plan in ")
    assert err.count("\n") == 1


def test_watching_ends_with_an_interrupt(
    made: Made, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(clock, "sleep", sleep)
    assert call(str(made.file), "--watch", "2.5", "--json") == 0
    assert waited == [2.5] * 3
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert call(str(made.file), "--watch", "0") == 2


def test_a_thousand_commits_are_read_in_a_moment(tmp_path: Path) -> None:
    made = Made(tmp_path, num_shards=1000)
    location = open_location(made.root / "stores/code")
    made.commit([0])
    commit = StoreReader.open(location).commits[0]
    for shard in range(1, 1000):
        path = Path(location.url) / commit_key(shard)
        update = {"shard": shard, "path": f"data/{shard:05d}-{'0' * 16}"}
        update["first_segment"] = made.plan.shards[shard].start
        path.write_bytes(seal(commit.model_copy(update=update)))
    start = clock.monotonic()
    assert made.work().done == 1000
    assert clock.monotonic() - start < 2
