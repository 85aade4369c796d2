"""A study's trainings in several processes of one machine, each with its part of the cores."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from fuse_eval.study.stages import CommandError
from launch.process import child_environment
from launch.signals import StopFlag
from store_schema.errors import Stopped, StoppedMidway

_POLL_S = 0.2
_ROUNDS = 2
"""Rows that are tuned as others are trained in the second one, when these are there."""


def run_side_by_side(words: Sequence[str], count: int, stop: StopFlag) -> None:
    """Start `study run` as `count` workers, and wait for them; once more for rows tuned as others.

    Args:
        words: Study file and options of the command.
        count: Workers.
        stop: Asks them to end, too.

    Raises:
        CommandError: A worker failed; the others have ended by themselves.
        Stopped: Asked to stop; what is scored stays.
    """
    for _ in range(_ROUNDS):
        stop.check()
        children = [_start(words, index, count) for index in range(count)]
        try:
            _wait(children, stop)
        finally:
            for child in children:
                if child.poll() is None:
                    child.kill()
                    child.wait()
        codes = [child.returncode for child in children]
        stop.progressed |= StoppedMidway.exit_code in codes
        stop.check()
        failed = [code for code in codes if code not in (0, Stopped.exit_code)]
        if failed:
            raise CommandError(
                "a worker of the study failed",
                got=f"exit code {failed[0]}",
                hint="it has said why above; run again to go on",
            )


def _start(words: Sequence[str], index: int, count: int) -> subprocess.Popen[bytes]:
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    # Threads that spin while they wait would take the cores of the other workers.
    threads = {"OMP_NUM_THREADS": str(max(1, cores // count)), "OMP_WAIT_POLICY": "passive"}
    return subprocess.Popen(
        [sys.executable, "-m", "logitfuse", "study", "run", *words, "--worker", f"{index}/{count}"],
        stdout=subprocess.DEVNULL,
        env={**threads, **child_environment()},
    )


def _wait(children: Sequence[subprocess.Popen[bytes]], stop: StopFlag) -> None:
    asked = False
    while any(child.poll() is None for child in children):
        if stop.asked and not asked:
            asked = True
            for child in children:
                with suppress(ProcessLookupError):
                    child.terminate()
        time.sleep(_POLL_S)
