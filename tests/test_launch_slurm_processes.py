"""The script of a training of several processes, with programs that stand where Slurm's are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.slurm.script import Job, script_text
from tests.fake_slurm import calls, fake_tools
from tests.test_launch_slurm import WORKER, Stopping, place, run_script

SEVERAL_GPUS = Job("train", None, {"nodes": "2", "gpus-per-node": "2"})
SRUN = """\
import os, signal, subprocess, sys
if "torchrun" not in " ".join(sys.argv): sys.exit("not a torchrun")
print(" ".join(word for word in sys.argv if word.startswith("--rdzv-")), file=sys.stderr)
os.execv(sys.executable, [sys.executable, os.environ["WORKER"]])
"""


@pytest.fixture
def started(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the script of a job of two nodes, with an `srun` that is WORKER itself."""
    hostnames = 'case "$*" in "show hostnames n[1-2]") printf "n1\\nn2\\n";; esac'
    tools = fake_tools(tmp_path / "tools", scontrol=hostnames)
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "srun.py").write_text(SRUN)
    (tools / "bash").symlink_to("/bin/bash")

    def run(number: signal.Signals | None, code: int, *, has_srun: bool = True) -> Any:
        if has_srun:
            srun = tools / "srun"
            srun.write_text(f'#!/bin/bash\nexec {sys.executable} {tmp_path}/srun.py "$@"\n')
            srun.chmod(0o755)
        environment = {
            "PATH": f"{tools}:{os.environ['PATH']}" if has_srun else str(tools),
            "WORKER": str(tmp_path / "worker.py"),
            "CODE": str(code),
            "SLEEP": "60" if number else "0",
            "SLURM_JOB_ID": "40044",
            "SLURM_JOB_NODELIST": "n[1-2]",
        }
        done = run_script(tmp_path, script_text(SEVERAL_GPUS, place(tmp_path)), environment, number)
        done.args = [line for line in calls(tools) if "requeue" in line]
        return done

    return run


def test_several_processes_meet_on_the_first_node_at_the_port_of_the_job(started: Stopping) -> None:
    done = started(None, 0)
    assert done.returncode == 0
    assert "--rdzv-id=40044 --rdzv-endpoint=n1:10044" in done.stderr


def test_several_processes_are_warned_and_requeued_as_one_is(started: Stopping) -> None:
    done = started(signal.SIGUSR1, 75)
    assert "stopped by SIGUSR1" in done.stdout
    assert (done.returncode, done.args) == (75, ["scontrol requeue 40044"])
    done = started(signal.SIGUSR1, 2)
    assert (done.returncode, len(done.args)) == (2, 1)


def test_srun_is_not_told_to_end(started: Stopping) -> None:
    """It would kill its tasks, which Slurm itself has told."""
    done = started(signal.SIGTERM, 75)
    assert "stopped by SIGUSR1" in done.stdout
    assert (done.returncode, done.args) == (75, [])


def test_a_node_without_srun_says_so(started: Stopping) -> None:
    done = started(None, 0, has_srun=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no srun on ")
    assert done.stderr.count("\n") == 1
