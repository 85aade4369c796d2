"""Starting the stages of a run as commands of their own, with a log and a clean stop."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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


@contextmanager
def one_at_a_time(folder: Path, stop: StopFlag) -> Iterator[None]:
    """Wait until no other worker is in this block with the same folder: settings share plain trainings.

    Raises:
        Stopped: Asked to stop while waiting.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".worker").open("w") as file:
        while True:
            stop.check()
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(_POLL_S)
            else:
                break
        yield


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
