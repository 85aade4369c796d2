"""A child for each source: what it is told, and what becomes of the ways in which it may end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from extract.engine_kinds.vllm import LEAST_STEP_TOKENS
from extract.engines.protocol import EngineMemoryError
from extract.run import halved, run_source
from extract.scoring.children import SMALLER_STEPS, _wait, check_stop_fd, run_children
from extract.scoring.fork_server import AVAILABLE, ForkedChild, ForkServer
from extract.scoring.sources import check_source
from launch.signals import STOP_SIGNALS, StopFlag
from launch.work import Part, Worker
from store_schema.config import load_run
from store_schema.disk.location import open_location
from store_schema.errors import ModelError, Stopped
from store_schema.plan.run_plan import open_plan
from store_schema.store.reader import StoreReader
from tests.command import ok
from tests.extract_runs import plan_run, write_run

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def run_file(tmp_path: Path, tiny_models: dict[str, Path]) -> Path:
    return write_run(tmp_path, {name: tiny_models[name] for name in ("code", "prose", "target")})


@pytest.fixture
def children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Exit codes of the children to come; each writes its words to words-<n>."""
    codes: list[int] = []
    fake = tmp_path / "python"
    fake.write_text(
        f"#!/bin/sh\ncd {tmp_path}\nn=$(ls words-* 2>/dev/null | wc -l)\n"
        'echo "$@" > words-$n\nexit $(sed -n "$((n + 1))p" codes)\n'
    )
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    return codes


def run(run_file: Path, codes: list[int], names: tuple[str, ...]) -> tuple[StopFlag, list[str]]:
    folder = run_file.parent
    (folder / "codes").write_text("".join(f"{code}\n" for code in codes))
    flag = StopFlag()
    part = Part(Worker(1, 4), ((0, 9),), 3)
    try:
        run_children(load_run(str(run_file)), "run-source", dict.fromkeys(names, part), flag)
    finally:
        words = [path.read_text() for path in sorted(folder.glob("words-*"))]
    return flag, words


def test_each_source_has_a_child_that_is_told_its_part(run_file: Path, children: list[int]) -> None:
    flag, words = run(run_file, [0, 0], ("code", "prose"))
    assert len(words) == 2
    assert "--source code" in words[0]
    assert "--source prose" in words[1]
    assert all("--worker 1/4 --shards 0-9 --limit 3" in text for text in words)
    assert flag.progressed


def test_a_child_out_of_memory_is_started_again_with_smaller_steps(
    run_file: Path, children: list[int]
) -> None:
    _, words = run(run_file, [SMALLER_STEPS, SMALLER_STEPS, 0, 0], ("code", "prose"))
    halvings = [text.split("--halvings ")[1].split()[0] for text in words]
    assert halvings == ["0", "1", "2", "0"]


@pytest.mark.parametrize(
    ("codes", "expected"), [([2], 2), ([143], 143), ([75], 75), ([0, 143], 75), ([0, 1], 1)]
)
def test_how_a_child_ended_is_passed_on(
    run_file: Path, children: list[int], codes: list[int], expected: int
) -> None:
    """A stop after another source was finished is a stop midway: run again."""
    with pytest.raises(SystemExit) as caught:
        run(run_file, codes, ("code", "prose"))
    assert caught.value.code == expected


def test_a_killed_child_is_told(run_file: Path, children: list[int]) -> None:
    Path(sys.executable).write_text("#!/bin/sh\nkill -9 $$\n")
    with pytest.raises(ModelError, match=r"the process that runs code was killed.*SIGKILL"):
        run(run_file, [0], ("code",))


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_child_tells_the_signal_that_its_parent_got(number: signal.Signals) -> None:
    """The parent sends it through the stop_read_fd; the child is Python that waits for it."""
    script = (
        "import sys, time\nfrom extract.scoring.children import check_stop_fd\n"
        "from launch.signals import STOP_SIGNALS, StopFlag\nflag = StopFlag()\n"
        "for _ in range(600):\n    check_stop_fd(flag, int(sys.argv[1]))\n    time.sleep(0.05)\n"
    )
    stop_read_fd, stop_write_fd = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(stop_read_fd)], pass_fds=[stop_read_fd],
        stderr=subprocess.PIPE, cwd=REPOSITORY,
    )  # fmt: skip
    os.close(stop_read_fd)
    flag = StopFlag()
    flag.ask(number)
    with child:
        assert _wait(child, flag, stop_write_fd) == 1
        assert child.stderr is not None
        assert f"stopped by {number.name}," in child.stderr.read().decode()


def test_a_child_whose_parent_died_stops() -> None:
    stop_read_fd, stop_write_fd = os.pipe()
    check_stop_fd(StopFlag(), stop_read_fd)
    os.close(stop_write_fd)
    with pytest.raises(Stopped, match="SIGTERM"):
        check_stop_fd(StopFlag(), stop_read_fd)
    os.close(stop_read_fd)


def test_steps_are_halved_down_to_the_least(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Out of memory: the child asks to be started again, at the least steps it gives up."""
    plan_run(run_file)
    config = load_run(str(run_file), ["extract.engine=vllm", "extract.max_num_batched_tokens=100"])
    spec = check_source(config, "code", open_plan(config)).spec
    steps = [halved(spec, times).section.max_num_batched_tokens for times in range(5)]
    assert steps == [100, 50, 25, LEAST_STEP_TOKENS, LEAST_STEP_TOKENS]

    def refuse(spec: object) -> object:
        raise EngineMemoryError("memory ran out with steps of 100 tokens")

    monkeypatch.setattr("extract.run.open_engine", refuse)
    with pytest.raises(SystemExit) as caught:
        run_source(config, "code", Part())
    assert caught.value.code == SMALLER_STEPS
    assert "code: memory ran out with steps of 100 tokens; going on with half" in (
        capsys.readouterr().err
    )
    with pytest.raises(EngineMemoryError, match="memory"):
        run_source(config, "code", Part(), halvings=3)


linux = pytest.mark.skipif(not AVAILABLE, reason="no server there")


@linux
def test_a_store_is_the_same_whoever_starts_the_children(
    run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_run(run_file)
    config = load_run(str(run_file))

    def contents() -> dict[str, list[str]]:
        ok("extract", "run", run_file)
        readers = {n: StoreReader.open(open_location(config.store_url(n))) for n in config.sources}
        return {n: [c.content_sha256 for c in r.commits.values()] for n, r in readers.items()}

    forked = contents()
    assert set(forked) == {"code", "prose"}
    shutil.rmtree(run_file.parent / "run/stores")
    monkeypatch.setattr("extract.scoring.children.AVAILABLE", False)
    assert contents() == forked


@pytest.fixture
def waiting(tmp_path: Path) -> Iterator[tuple[ForkServer, ForkedChild, int]]:
    """A server and a child of it, which waits for its run file; the child's number."""
    fifo, (stop_read_fd, stop_write_fd) = tmp_path / "run.yaml", os.pipe()
    os.mkfifo(fifo)
    with ForkServer() as server:
        child = server.start(["run-source", str(fifo)], stop_read_fd)
        process = psutil.Process(server._process.pid)  # type: ignore[union-attr]
        while not process.children():
            time.sleep(0.05)
        pid = process.children()[0].pid
        yield server, child, pid
    os.close(stop_read_fd)
    os.close(stop_write_fd)


@linux
def test_how_forked_children_end_is_told(waiting: tuple[ForkServer, ForkedChild, int]) -> None:
    server, child, pid = waiting
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.01)
    os.kill(pid, signal.SIGKILL)
    assert child.wait(30) == -signal.SIGKILL
    # The same server goes on.
    for words, code in ((["run", "--help"], 0), (["no-such-command"], 2)):
        with open(os.devnull) as file:
            assert server.start(words, file.fileno()).wait(30) == code


@linux
def test_stops_reach_children_through_their_pipes_alone(
    waiting: tuple[ForkServer, ForkedChild, int],
) -> None:
    server, child, pid = waiting
    for number in STOP_SIGNALS:
        server._process.send_signal(number)  # type: ignore[union-attr]
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.5)
    os.kill(pid, signal.SIGINT)  # the child itself is as any process
    assert child.wait(30) == Stopped.exit_code


@linux
def test_a_killed_server_is_a_killed_child(waiting: tuple[ForkServer, ForkedChild, int]) -> None:
    server, child, pid = waiting
    server._process.kill()  # type: ignore[union-attr]
    assert child.wait(30) == -signal.SIGKILL
    os.kill(pid, signal.SIGKILL)
    with open(os.devnull) as file:
        assert server.start(["run", "--help"], file.fileno()).wait(30) == -signal.SIGKILL
