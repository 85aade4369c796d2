"""torchrun on one node of a job: what it passes on, what it exits with, what it says."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from fuse_train.machine.torchrun import EXIT_FILE, _first_code
from tests.slurm_cluster import free_ports

pytestmark = pytest.mark.usefixtures("quick_processes")

PROGRAM = """\
import os, signal, sys, time
rank, code = int(os.environ["RANK"]), int(sys.argv[1])
def say(line):
    os.write(1, line.encode() + b"\\n")  # at once: lines of both processes go into one pipe
def stop(number, frame):
    say(f"process {rank}: {signal.Signals(number).name}")
    time.sleep(0.3 * rank)  # one takes longer
    sys.exit(code)
signal.signal(signal.SIGUSR1, stop)
signal.signal(signal.SIGTERM, lambda *_: None)
say("ready")
if code < 0 and rank == 1:
    os.kill(os.getpid(), -code)
if code in (0, 2):
    time.sleep(0 if rank == 1 else 0.5)
    sys.exit(code if rank == 1 else 1 if code else 0)
time.sleep(60)
"""


def command(folder: Path, port: int, code: int, *options: str) -> list[str]:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    torchrun = ["-m", "fuse_train.machine.torchrun", "--nnodes=1", "--nproc-per-node=2"]
    torchrun += ["--max-restarts=0", "--rdzv-backend=c10d", "--rdzv-id=7", *options]
    return [sys.executable, *torchrun, f"--rdzv-endpoint=127.0.0.1:{port}", str(program), str(code)]


def run(
    words: Sequence[str], folder: Path, number: signal.Signals | None = None
) -> subprocess.CompletedProcess[str]:
    """Run it, and signal it alone once both processes are ready."""
    process = subprocess.Popen(
        words,
        env=os.environ | {"TMPDIR": str(folder)},  # torchrun leaves its logs there
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    head = ""
    if number is not None:
        assert process.stdout is not None
        head = "".join(process.stdout.readline() for _ in range(2))
        assert head == "ready\nready\n"
        process.send_signal(number)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(words, process.returncode, head + out, err)


@pytest.mark.slow
@pytest.mark.parametrize("code", [0, 2])
def test_the_exit_code_is_that_of_the_process_that_failed_first(tmp_path: Path, code: int) -> None:
    done = run(command(tmp_path, *free_ports(1), code), tmp_path)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "error: " not in done.stderr  # the process itself has said it


@pytest.mark.slow
def test_usr1_reaches_every_process_and_their_code_comes_back(tmp_path: Path) -> None:
    done = run(command(tmp_path, *free_ports(1), 75), tmp_path, signal.SIGUSR1)
    assert {f"process {rank}: SIGUSR1" for rank in (0, 1)} <= set(done.stdout.splitlines())
    assert done.returncode == 75, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_process_that_a_signal_ended_is_named(tmp_path: Path) -> None:
    done = run(command(tmp_path, *free_ports(1), -signal.SIGKILL), tmp_path)
    assert done.returncode == 128 + signal.SIGKILL
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert lines == ["error: process 1 of the training was ended by SIGKILL"]


@pytest.mark.slow
def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        started = time.monotonic()
        done = run(command(tmp_path, port, 0), tmp_path)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert f"port of the rendezvous is in use in 127.0.0.1:{port}" in lines[0]
    assert "Traceback" not in done.stderr
    assert time.monotonic() - started < 60


@pytest.mark.slow
def test_a_node_that_does_not_find_the_first_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_NODEID", "1")
    nobody = command(tmp_path, *free_ports(1), 0, "--rdzv-conf=read_timeout=3")
    done = run(nobody, tmp_path)
    assert done.returncode == 2
    assert "error: the nodes of the training do not meet in 127.0.0.1:" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [None, signal.SIGTERM])
def test_a_node_never_ends_by_the_signal_that_ends_the_others(
    number: signal.Signals | None,
) -> None:
    """While an interpreter ends, its signal handlers are gone: a second SIGTERM would be its end."""
    lines = [
        "import atexit, os, threading",
        "from fuse_train.machine import torchrun",
        "atexit.register(lambda: os.kill(os.getpid(), 15))",  # as srun does, in that moment
        "torchrun._GRACE_S = 60 if {0} else 0",
        "threading.Timer(0.2, lambda: {0} and os.kill(os.getpid(), {0})).start()",
        "torchrun._wait_for_others(2)",
        "torchrun._end(2)",
    ]
    program = "\n".join(lines).format(int(number or 0))
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=50
    )
    assert done.returncode == 2, done.stderr


def test_the_first_node_s_exit_code_is_that_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(EXIT_FILE, raising=False)
    assert _first_code(75) == 75
    assert _first_code() is None
    left = tmp_path / "train.exit-7-0"
    monkeypatch.setenv(EXIT_FILE, str(left))
    assert _first_code() is None  # none has failed yet
    monkeypatch.setenv("SLURM_NODEID", "1")
    assert _first_code(75) == 75
    monkeypatch.setenv("SLURM_NODEID", "0")
    assert _first_code(2) == 75
    assert _first_code() == 75  # of a node that srun ends
    assert [path.name for path in tmp_path.iterdir()] == [left.name]
    monkeypatch.setenv(EXIT_FILE, str(tmp_path / "gone" / "file"))
    assert _first_code(3) == 3
