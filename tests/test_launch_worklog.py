"""What workers note, and what is read of it again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.json_lines import append_line, read_lines
from launch.work import Worker
from launch.worklog import MAX_ERROR_LENGTH, WorkLog, read_sessions, scheduler_job
from store_schema.config import ModelRef, RunConfig
from store_schema.errors import ConfigError, Stopped
from tests import store_factory


def make_run(folder: Path) -> RunConfig:
    ref = ModelRef(model="m")
    return RunConfig(name="t", run_dir=str(folder), sources={"s": ref}, target=ref)


def shards(*indices: int) -> list:
    return [store_factory.shard_record(index) for index in indices]


def test_a_session_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "77")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    log = WorkLog(make_run(tmp_path), "extract", "s", Worker(1, 3))
    with log.session(shards(1, 4, 7, 8), "s") as session:
        session.shard(1, tokens=8, seconds=2.0, size_bytes=100, nats=np.float32(0.5))
    assert log.path == tmp_path / "logs/extract/s/worker-1-of-3.jsonl"
    begin, shard, end = (json.loads(line) for line in log.path.read_text().splitlines())
    assert {key: begin[key] for key in ("event", "pid", "job", "restarts")} == {
        "event": "begin", "pid": os.getpid(), "job": "77_1", "restarts": 2,
    }  # fmt: skip
    assert (begin["shards"], begin["num_shards"], begin["tokens"]) == ("1,4,7-8", 4, 32)
    assert begin["session"] == shard["session"] == end["session"]
    assert datetime.fromisoformat(begin["time"]).utcoffset() == UTC.utcoffset(None)
    del shard["time"], shard["session"]
    assert shard == {
        "event": "shard", "shard": 1, "tokens": 8, "seconds": 2.0, "tokens_per_s": 4.0,
        "size_bytes": 100, "nats": 0.5,
    }  # fmt: skip
    assert (end["event"], end["reason"], end["error"], end["shard"]) == ("end", "done", None, None)


@pytest.mark.parametrize(
    ("error", "reason", "line"),
    [
        (Stopped("stopped by SIGTERM"), "stopped", "stopped by SIGTERM"),
        (KeyboardInterrupt(), "stopped", "KeyboardInterrupt:"),
        (ConfigError("wrong", where="x", got="two\nlines"), "failed", "wrong in x: got two lines"),
        (ValueError("odd\nthing"), "failed", "ValueError: odd thing"),
        (SystemExit(76), "failed", "SystemExit: 76"),
    ],
)
def test_how_a_session_ended(tmp_path: Path, error: BaseException, reason: str, line: str) -> None:
    run = make_run(tmp_path)

    def work() -> None:
        with WorkLog(run, "align", "s", Worker()).session(shards(0, 1, 2), "target") as session:
            session.shard(0, tokens=8, seconds=1.0, size_bytes=1)
            raise error

    with pytest.raises(type(error)):
        work()
    (found,) = read_sessions(run, "align", "s")
    assert (found.reason, found.error, found.in_hand) == (reason, line, 1)
    assert [shard.shard for shard in found.finished] == [0]
    assert found.pending == {0, 1, 2}
    assert found.pid == os.getpid()


def test_long_errors_are_cut(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with pytest.raises(RuntimeError):
        with WorkLog(run, "align", "s", Worker()).session(shards(0), None):
            raise RuntimeError("x" * 9999)
    (found,) = read_sessions(run, "align", "s")
    assert found.error is not None
    assert len(found.error) == MAX_ERROR_LENGTH


def test_nothing_of_a_session_that_was_killed(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    child = os.fork()
    if child == 0:
        with WorkLog(run, "align", "s", Worker()).session(shards(0, 1), "target") as session:
            session.shard(0, tokens=8, seconds=1.0, size_bytes=1)
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (found,) = read_sessions(run, "align", "s")
    assert (found.reason, found.error, found.in_hand) == (None, None, None)
    assert found.pid == child
    assert len(found.finished) == 1


def test_sessions_of_all_workers_in_the_order_they_began(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for worker in (Worker(1, 2), Worker(0, 2), Worker(1, 2)):
        with WorkLog(run, "align", "s", worker).session(shards(worker.index), "target"):
            pass
    (tmp_path / "logs/align/s/notes.jsonl").write_text("{}\n")
    found = read_sessions(run, "align", "s")
    assert [str(session.worker) for session in found] == ["1/2", "0/2", "1/2"]
    assert read_sessions(run, "extract", "s") == []


def test_a_twin_of_a_worker_does_not_mix_its_lines_in(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    log = WorkLog(run, "align", "s", Worker())
    with log.session(shards(0, 1), "target") as one, log.session(shards(0, 1), "target") as two:
        one.shard(0, tokens=8, seconds=1.0, size_bytes=1)
        two.shard(0, tokens=8, seconds=1.0, size_bytes=1)
        two.shard(1, tokens=8, seconds=1.0, size_bytes=1)
    first, second = read_sessions(run, "align", "s")
    assert [len(first.finished), len(second.finished)] == [1, 2]


def test_a_disk_that_refuses_is_told_once_and_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "logs").write_text("a file in the way")
    with WorkLog(make_run(tmp_path), "align", "s", Worker()).session(shards(0), None) as session:
        session.shard(0, tokens=8, seconds=0.0, size_bytes=1)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "work goes on" in caplog.text


@given(cut=st.integers(0, 10_000))
def test_a_log_cut_anywhere_is_read_and_gone_on_with(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    run = make_run(tmp_path_factory.mktemp("run"))
    log = WorkLog(run, "extract", "s", Worker())
    with log.session(shards(*range(6)), "s") as session:
        for index in range(6):
            session.shard(index, tokens=8, seconds=1.0, size_bytes=1)
    whole = log.path.read_bytes()
    cut %= len(whole) + 1
    log.path.write_bytes(whole[:cut])
    lines = [i for i, byte in enumerate(whole) if byte == ord("\n")]
    # A line is whole once its last brace is there, with or without its end.
    num_whole = sum(end <= cut for end in lines)
    before = read_sessions(run, "extract", "s")
    assert [len(s.finished) for s in before] == ([] if not num_whole else [min(num_whole - 1, 6)])
    with log.session(shards(5), "s") as session:
        session.shard(5, tokens=8, seconds=1.0, size_bytes=1)
    after = read_sessions(run, "extract", "s")
    assert after[:-1] == before
    assert [shard.shard for shard in after[-1].finished] == [5]
    assert after[-1].reason == "done"


def test_a_session_that_nobody_understands_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path)
    log = WorkLog(run, "align", "s", Worker())
    with log.session(shards(0), None):
        pass
    begin = json.loads(log.path.read_text().splitlines()[0])
    append_line(log.path, begin | {"session": "x", "shards": "many"})
    append_line(log.path, begin | {"session": "y", "time": "today"})
    append_line(log.path, {"event": "shard", "session": "z"})
    append_line(log.path, begin | {"session": "w", "shards": "0-99999999"})
    assert len(read_sessions(run, "align", "s")) == 1
    assert len(caplog.records) == 4


def test_a_log_of_a_worker_that_cannot_be_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    log = WorkLog(run, "align", "s", Worker())
    with log.session(shards(0), None):
        pass
    shutil.copy(log.path, log.path.with_name("worker-3-of-3.jsonl"))
    assert len(read_sessions(run, "align", "s")) == 1


@pytest.mark.parametrize(
    ("environment", "job", "restarts"),
    [
        ({}, None, None),
        ({"SLURM_JOB_ID": "5", "SLURM_RESTART_COUNT": "x"}, "5", None),
        ({"PBS_JOBID": "9.host"}, "9.host", None),
        ({"LSB_JOBID": "8"}, "8", None),
    ],
)
def test_jobs_of_schedulers(
    environment: dict[str, str], job: str | None, restarts: int | None
) -> None:
    assert scheduler_job(environment) == {"job": job, "restarts": restarts}


# ------------------------------------------------------------------------------- lines


def test_lines_of_many_writers_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    writers = [
        threading.Thread(
            target=lambda name=name: [append_line(path, {"n": name * 50}) for _ in range(40)]
        )
        for name in "abcd"
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    lines, cut = read_lines(path)
    assert cut == []
    assert sorted(line["n"][0] for line in lines) == sorted("abcd" * 40)
    assert {len(line["n"]) for line in lines} == {50}


def test_odd_values_are_written_as_text(tmp_path: Path) -> None:
    append_line(tmp_path / "log.jsonl", {"a": np.int64(3), "b": Path("x"), "c": np.arange(2)})
    assert read_lines(tmp_path / "log.jsonl") == ([{"a": 3, "b": "x", "c": [0, 1]}], [])
