"""Starting the stages of a run as commands of their own, with a log and a clean stop."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.process import child_environment
from launch.signals import StopFlag
from store_schema.errors import ConfigError, LogitfuseError, StoppedMidway

LOG_FILE = "log.txt"
_POLL_S = 0.1


class CommandError(LogitfuseError):
    """A command of a study that failed; its own last line says why."""


def run_command(words: Sequence[str], log: Path, stop: StopFlag) -> None:
    """Run a command, its output appended to a log, and pass a stop on to it.

    Args:
        words: Program and arguments; `python` is the running one.
        log: File for its output.
        stop: Asks the command to end, too.

    Raises:
        CommandError: It failed; the message has its last line.
        ConfigError: It cannot be started.
        Stopped: It was stopped.
    """
    stop.check()
    program = [sys.executable] if words[0] == "python" else [words[0]]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        started = out.tell()
        try:
            child = subprocess.Popen(
                [*program, *words[1:]], stdout=out, stderr=out, env=child_environment()
            )
        except OSError as error:
            raise ConfigError(
                "a command of the study cannot be started", where=words[0], got=error.strerror
            ) from error
        code = _wait(child, stop)
    if code == StoppedMidway.exit_code:
        stop.progressed = True
    if code != 0:
        stop.check()  # a launcher of several processes ends with a code of its own
    if code != 0:
        with log.open("rb") as file:
            file.seek(started)
            lines = file.read().decode(errors="replace").strip().splitlines()
        raise CommandError(
            f"`{' '.join(words)}` failed",
            got=(lines[-1].removeprefix("error: ") if lines else f"exit code {code}"),
            hint=f"{log} has all it said",
        )


def _wait(child: subprocess.Popen[bytes], stop: StopFlag) -> int:
    asked = False
    try:
        while True:
            try:
                return child.wait(timeout=_POLL_S)
            except subprocess.TimeoutExpired:
                if stop.asked and not asked:
                    child.terminate()
                    asked = True
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
