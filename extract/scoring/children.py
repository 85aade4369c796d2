"""Run each source in a child process of its own, one after the other.

This frees memory between sources and keeps vLLM's patches of model classes inside one process. Several
children of the engine transformers are forked by one server, which spares them the imports. A pipe
tells the child to stop: when the parent is asked to stop it writes the signal's number to the pipe, and
when it dies the pipe closes; in both cases the child stops before its next batch.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from extract.scoring.fork_server import AVAILABLE, STDERR, ForkServer
from launch.process import SMALLER_STEPS, child_environment
from launch.signals import StopFlag
from launch.work import Part
from store_schema.config import RunConfig
from store_schema.errors import ModelError, Stopped, StoppedMidway


class Child(Protocol):
    """A started process."""

    def wait(self, timeout: float) -> int:
        """Its exit code; raises `subprocess.TimeoutExpired` while it runs."""


Start = Callable[[Sequence[str], int], Child]
"""Starts a child with arguments of `python -m extract` and a file descriptor that it inherits, whose
number replaces "{fd}" among them."""


def run_children(
    run: RunConfig,
    command: str,
    parts: Mapping[str, Part],
    flag: StopFlag,
    forked: Collection[str] = (),
) -> None:
    """Run one child for each source.

    Args:
        run: The run file.
        command: Subcommand of `python -m extract`; takes --source, a part, --stop-fd and --halvings.
        parts: Which of the shards to do, by source.
        flag: Checked between children, and passed on to the one that runs.
        forked: Sources whose children a server may fork; it is not started for one alone.

    Raises:
        ModelError: A child was killed.
        SystemExit: A child failed or was stopped, and printed why; with its exit code.
    """
    forked = parts.keys() & set(forked) if AVAILABLE else set()
    with ForkServer() as server:
        for name, part in parts.items():
            flag.check()
            start = server.start if name in forked and len(forked) > 1 else _start
            words = ["--source", name, *part.arguments()]
            halvings = 0
            while (
                code := _run_child(run, [command, *words], flag, halvings, start)
            ) == SMALLER_STEPS:
                halvings += 1
            if code < 0 and not flag.asked:
                raise ModelError(
                    f"the process that runs {name} was killed",
                    where=run.folder,
                    got=signal.Signals(-code).name,
                    hint="memory running out is the usual cause; rerun to go on",
                )
            stopped = code in (Stopped.exit_code, StoppedMidway.exit_code)
            if stopped and flag.progressed:
                raise SystemExit(StoppedMidway.exit_code)
            if code > 0:
                raise SystemExit(code)
            flag.progressed |= code == 0
            flag.check()


def _run_child(
    run: RunConfig, words: Sequence[str], flag: StopFlag, halvings: int, start: Start
) -> int:
    with tempfile.TemporaryDirectory(prefix="logitfuse-") as folder:
        config = Path(folder) / "run.yaml"
        config.write_text(run.resolved(), encoding="utf-8")
        stop_read_fd, stop_write_fd = os.pipe()
        try:
            arguments = [words[0], str(config), *words[1:], "--stop-fd", "{fd}"]
            child = start([*arguments, "--halvings", str(halvings)], stop_read_fd)
            return _wait(child, flag, stop_write_fd)
        finally:
            os.close(stop_read_fd)


def _start(arguments: Sequence[str], stop_read_fd: int) -> Child:
    # -P: do not import a folder named `extract` of the current directory.
    words = [sys.executable, "-P", "-m", "extract"]
    words += [word.replace("{fd}", str(stop_read_fd)) for word in arguments]
    # Its stdout is stderr: what its libraries print is no part of the command's output.
    return subprocess.Popen(words, pass_fds=[stop_read_fd], stdout=STDERR, env=child_environment())


def _wait(child: Child, flag: StopFlag, stop_write_fd: int) -> int:
    """Wait for the child and return its exit code; close its pipe when asked to stop or on an error."""
    pipe_open = True
    try:
        while True:
            try:
                return child.wait(timeout=0.1)
            except subprocess.TimeoutExpired:
                if flag.asked and pipe_open:
                    with suppress(BrokenPipeError):  # it has just ended
                        os.write(stop_write_fd, bytes([flag.number]))
                    os.close(stop_write_fd)
                    pipe_open = False
    finally:
        if pipe_open:
            os.close(stop_write_fd)


def check_stop_fd(flag: StopFlag, stop_read_fd: int | None) -> None:
    """In the child: raise if it was asked to stop or if the parent has closed the pipe.

    Args:
        flag: Of this process.
        stop_read_fd: File descriptor of a pipe whose closing asks to stop, or None.

    Raises:
        Stopped: Asked to stop; committed shards stay.
    """
    if stop_read_fd is not None and not flag.asked and select.select([stop_read_fd], [], [], 0)[0]:
        number = os.read(stop_read_fd, 1)  # b"" if the parent died
        flag.ask(number[0] if number else signal.SIGTERM)
    flag.check()
