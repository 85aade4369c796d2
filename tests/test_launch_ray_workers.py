"""The parts of launch/ray without Ray: queue of shards, worker's process, room on nodes, refusals."""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch.ray import cluster, workers
from launch.ray.workers import PendingShards, WorkerActor, WorkerSpec
from launch.shard_queue import REQUEST, shard_queue
from launch.work import Part, Worker
from tests import planned_store
from tests.command import refused


def test_a_shard_is_leased_once_and_again_when_its_worker_is_lost() -> None:
    shards = PendingShards({"a": deque([0, 1, 2, 3]), "b": deque([0])})
    assert [shards.next_source(i) for i in (0, 1)] == ["a", "b"]
    assert [shards.lease(0, "a"), shards.lease(1, "a"), shards.lease(0, "a")] == [0, 1, 2]
    assert shards.leaseholders() == [0, 1]
    shards.requeue(0)
    assert [shards.lease(1, "a") for _ in range(4)] == [0, 2, 3, None]
    assert shards.next_source(1) == "b"
    shards.requeue(1)  # it has finished what it was given
    assert shards.lease(1, "a") is None
    assert shards.lease(0, "b") == 0
    assert shards.next_source(1) is None


class _Store:
    def __init__(self, *committed: int) -> None:
        self.done = set(committed)

    def committed(self, shards: Any) -> set[int]:
        return set()

    def is_committed(self, shard: int) -> bool:
        return shard in self.done


@pytest.mark.parametrize("scheduler_dies", [False, True])
def test_a_worker_does_what_its_scheduler_assigns(scheduler_dies: bool) -> None:
    reply_read, reply_write = os.pipe()
    request_read, request_write = os.pipe()
    replies = [b"5\n", b"2\n", b"0\n"] + ([] if scheduler_dies else [b"\n"])

    def scheduler() -> None:
        for reply in replies:
            assert os.read(request_read, 100) == REQUEST
            os.write(reply_write, reply)
        os.close(reply_write)

    thread = threading.Thread(target=scheduler)
    thread.start()
    part = Part(Worker(1, 3), scheduler_fds=(reply_read, request_write))
    plan: Any = [SimpleNamespace(index=index) for index in range(6)]
    queue = shard_queue(part, plan, _Store(2))  # type: ignore[arg-type]
    assert queue
    assert queue.pending == part.mine(plan) == part.shards_of_others(plan) == []
    assert not queue.own_are_done()
    assert [shard.index for shard in queue] == [5, 0]
    thread.join()
    for fd in (reply_read, request_read, request_write):
        os.close(fd)


def test_a_worker_whose_scheduler_is_gone_has_no_shards() -> None:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    part = Part(scheduler_fds=(0, write_fd))
    assert list(shard_queue(part, [], _Store())) == []  # type: ignore[arg-type]
    os.close(write_fd)


PROCESS = """\
import os, sys
at = sys.argv.index("--scheduler-fds")
read_fd, write_fd = map(int, sys.argv[at + 1 : at + 3])
print("source", sys.argv[sys.argv.index("--source") + 1], file=sys.stderr)
while True:
    os.write(write_fd, b"next\\n")
    line = os.read(read_fd, 100)
    if not line.strip():
        break
    print("shard", line.decode().strip(), file=sys.stderr)
halvings = int(sys.argv[sys.argv.index("--halvings") + 1])
{end}
"""


def _actor(
    monkeypatch: pytest.MonkeyPatch, python: tuple[str, ...] | None, probe: Path | None = None
) -> tuple[WorkerActor, PendingShards]:
    """A worker with a queue that is called without Ray."""
    shards = PendingShards({"code": deque(range(3))})
    remote = {name: SimpleNamespace(remote=getattr(shards, name)) for name in ("lease", "requeue")}
    monkeypatch.setattr(workers, "_result", lambda reference: reference)
    place = None if probe is None else str(probe)
    spec = WorkerSpec("extract", "name: t\n", "/no such folder", python, 0.0, place)
    return WorkerActor(SimpleNamespace(**remote), Worker(1, 2), spec), shards


@pytest.mark.parametrize(
    ("end", "code", "message"),
    [
        ("", 0, "shard 2"),
        ("print('error: no; do so', file=sys.stderr); print('x', file=sys.stderr); sys.exit(2)", 2,
         "error: no; do so"),
        ("raise RuntimeError('odd')", 1, "RuntimeError: odd"),
        ("os.kill(os.getpid(), 9)", -9, "shard 2"),
        ("sys.exit(76 if halvings < 2 else 0)", 0, "shard 2"),
    ],
)  # fmt: skip
def test_a_worker_runs_the_command_and_passes_on_how_it_ended(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    end: str,
    code: int,
    message: str,
) -> None:
    script = tmp_path / "process.py"
    script.write_text(PROCESS.format(end=end))
    actor, shards = _actor(monkeypatch, (sys.executable, str(script)))
    found = actor.run("code")
    assert (found.code, found.message, found.host) == (code, message, os.uname().nodename)
    assert not shards.pending["code"]
    tries = 3 if "halvings" in end else 1
    assert capfd.readouterr().err.count("shard 1") == tries


def test_a_worker_refuses_a_node_without_the_folder_or_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = os.uname().nodename
    actor, _ = _actor(monkeypatch, None, tmp_path / "gone")
    end = actor.run("code")
    assert end.code == 2
    assert end.message.startswith(
        f"error: a node does not see the folder of the stores in {host}: expected {tmp_path}, got "
    )
    actor, _ = _actor(monkeypatch, ("/no/python",))
    end = actor.run("code")
    assert (end.code, end.message) == (
        2,
        f"error: a worker's process cannot be started in /no/python on {host}: got No such file or "
        "directory; see `launch.python`",
    )


@pytest.mark.parametrize(
    ("worker", "room"),
    [
        ({"CPU": 1.0, "GPU": 0.0}, 8),
        ({"CPU": 3.0, "GPU": 0.0}, 2),
        ({"CPU": 1.0, "GPU": 1.0}, 2),
        ({"CPU": 0.0, "GPU": 0.1}, 20),
        ({"CPU": 1.0, "GPU": 4.0}, 0),
        ({"CPU": 0.0, "GPU": 0.0}, 1),
    ],
)
def test_room_on_a_node(worker: dict[str, float], room: int) -> None:
    assert cluster.node_room({"CPU": 8.0, "GPU": 2.0, "memory": 1e9}, worker) == room


def test_errors_of_ray_are_one_line() -> None:
    died = "The actor died.\nTraceback:\n  x\nModuleNotFoundError: No module named 'launch.ray'\nx"
    line = cluster.failure(RuntimeError(died), "head:6379").line()
    assert line == (
        "a node of the Ray cluster cannot import logitfuse in head:6379: got ModuleNotFoundError: No "
        "module named 'launch.ray'; install this version of it for the Python that Ray runs there"
    )
    line = cluster.failure(RuntimeError("GCS is\ngone"), "head:6379").line()
    assert line.startswith("the Ray cluster failed in head:6379: got GCS is gone; what is finished")


def test_what_auto_stands_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert cluster._head_address() is None
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/ray_current_cluster").write_text("10.0.0.1:6379\n")
    assert cluster._head_address() == "10.0.0.1:6379"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:6379")
    assert cluster._head_address() == "10.0.0.2:6379"


def test_no_ray_no_cluster_and_options_that_do_not_go_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = planned_store.make_run(tmp_path, kinds=())
    submit = ("submit", "extract", path)
    assert "options of Slurm given to another scheduler" in refused(
        *submit, "--ray", "auto", "--dry-run"
    )
    assert "options of Ray given to another scheduler" in refused(*submit, "--cpus-per-worker", "2")
    monkeypatch.setitem(sys.modules, "ray", None)
    line = refused(*submit, "--ray", "auto")
    assert line == "error: Ray is not installed in --ray; pip install 'logitfuse[ray]'"
    line = refused("submit", "train", path, "--ray", "auto")
    assert "Ray is used for extraction and alignment only" in line
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False))
    line = refused(*submit, "--ray", "http://head:8265")
    assert line.endswith("expected auto, or host:port of the head node, got http://head:8265")
    line = refused(*submit, "--ray", "127.0.0.1:1")
    assert "no Ray cluster answers in --ray 127.0.0.1:1" in line
    assert "Connection refused" in line
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # as a file that a killed head has left
    assert "--ray auto, 127.0.0.1:1" in refused(*submit, "--ray", "auto")
