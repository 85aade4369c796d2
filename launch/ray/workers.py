"""The actors: the queue of shards, and workers that run a stage's own command.

The command runs in a process of its own, which holds the engine and asks for one shard after the other
over a pair of pipes. It reads the plan and commits to the store as always: only shard numbers go
through Ray.
"""

from __future__ import annotations

import itertools
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from launch.process import SMALLER_STEPS, child_environment
from launch.shard_queue import REQUEST
from launch.stages import ShardedStage
from launch.work import Worker
from store_schema.errors import ConfigError, LogitfuseError

_COMMANDS: dict[ShardedStage, tuple[str, str]] = {
    "extract": ("extract", "run-source"),
    "align": ("align", "run"),
}
"""Module and subcommand that does a source's shards in one process."""


@dataclass
class PendingShards:
    """An actor: the shards that no worker has been given, by source.

    Args:
        pending: Indices of shards, by source, in order.
        leased: By worker, what it was given of the source that it is at.
    """

    pending: dict[str, deque[int]]
    leased: dict[int, list[tuple[str, int]]] = field(default_factory=dict)

    def lease(self, worker: int, source: str) -> int | None:
        """Give a worker the next shard of a source; None if there is none."""
        if not self.pending[source]:
            return None
        shard = self.pending[source].popleft()
        self.leased.setdefault(worker, []).append((source, shard))
        return shard

    def requeue(self, worker: int) -> None:
        """Take back what a lost worker was given; whoever gets it skips what is committed."""
        for source, shard in reversed(self.leased.pop(worker, [])):
            self.pending[source].appendleft(shard)

    def next_source(self, worker: int) -> str | None:
        """The source for a worker that has finished its last one; None if nothing is pending.

        Workers are spread over the sources, so that few models are loaded twice.
        """
        self.leased.pop(worker, None)
        sources = [source for source, shards in self.pending.items() if shards]
        return sources[worker % len(sources)] if sources else None

    def leaseholders(self) -> list[int]:
        """Workers whose process has asked for a shard of the source that they are at."""
        return list(self.leased)


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What all workers of a stage are told.

    Args:
        stage: The stage.
        run_text: The resolved run file.
        directory: The driver's working directory; used where a node has it.
        python: Words that start Python; None for the interpreter of the actor.
        gpus: GPUs of each worker.
        probe_file: A file beside the stores that a node must see; None for an object store.
    """

    stage: ShardedStage
    run_text: str
    directory: str
    python: tuple[str, ...] | None
    gpus: float
    probe_file: str | None


@dataclass(frozen=True, slots=True)
class ProcessEnd:
    """How a worker's process ended.

    Args:
        code: Exit code; that of a signal is negative.
        message: Its error in one line, else the last line that it wrote; "" for none.
        host: Where it ran.
    """

    code: int
    message: str
    host: str


class WorkerActor:
    """An actor with the resources of one worker: runs the stage's command, source after source.

    Args:
        queue: Handle of the actor `PendingShards`.
        worker: Which worker this is.
        spec: What all workers are told.
    """

    def __init__(self, queue: Any, worker: Worker, spec: WorkerSpec) -> None:
        self._queue, self._worker, self._spec = queue, worker, spec
        self._host = os.uname().nodename
        self._process: subprocess.Popen[str] | None = None
        self._message = ""

    def run(self, source: str) -> ProcessEnd:
        """Do shards of a source until none is left; with smaller batches each time memory runs out."""
        try:
            require_folder(self._spec.probe_file, self._host)
            for halvings in itertools.count():
                code = self._run_process(source, halvings)
                if code != SMALLER_STEPS:
                    break
                _result(self._queue.requeue.remote(self._worker.index))
        except LogitfuseError as error:
            return ProcessEnd(error.exit_code, f"error: {error.line()}", self._host)
        return ProcessEnd(code, self._message, self._host)

    def stop(self) -> None:
        """Ask the process to stop before its next batch."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)

    def _run_process(self, source: str, halvings: int) -> int:
        """Run the command for a source, serve its requests, and return its exit code."""
        requests, request_end = open_pipe()
        reply_end, replies = open_pipe()
        stop_end, stop = open_pipe()  # closes when this actor dies
        theirs = (reply_end, request_end, stop_end)
        with ExitStack() as stack:
            for file in (requests, replies, stop):
                stack.enter_context(file)
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="logitfuse-"))
            words = self._words(source, Path(folder) / "run.yaml")
            words += ["--scheduler-fds", str(reply_end.fileno()), str(request_end.fileno())]
            if self._spec.stage == "extract":
                words += ["--stop-fd", str(stop_end.fileno()), "--halvings", str(halvings)]
                words += ["--require-gpus", str(math.ceil(self._spec.gpus))]
            process = self._process = start_process(words, theirs, self._spec.directory)
            reader = threading.Thread(target=self._forward, args=(process.stderr,))
            reader.start()
            self._serve(source, requests, replies)
            code = process.wait()
            reader.join()
        return code

    def _words(self, source: str, config: Path) -> list[str]:
        config.write_text(self._spec.run_text, encoding="utf-8")
        python = self._spec.python or (sys.executable,)
        words = [*python, "-P", "-m", *_COMMANDS[self._spec.stage], str(config)]
        return [*words, "--source", source, "--worker", str(self._worker)]

    def _serve(self, source: str, requests: BinaryIO, replies: BinaryIO) -> None:
        """Answer each request by a shard of the source, until the process closes its end."""
        while requests.read(len(REQUEST)):
            shard = _result(self._queue.lease.remote(self._worker.index, source))
            with suppress(BrokenPipeError):  # it has just ended
                replies.write(b"\n" if shard is None else b"%d\n" % shard)

    def _forward(self, stream: TextIO) -> None:
        self._message = forwarded(stream)


def require_folder(probe: str | None, host: str) -> None:
    """Refuse a node that does not see a file that the driver has written; None is none.

    Raises:
        ConfigError: It does not.
    """
    if probe is not None and not os.path.exists(probe):
        raise ConfigError(
            "a node does not see the folder of the stores",
            where=host,
            expected=os.path.dirname(probe),
            got="no such folder, or another one",
            hint="use a file system that all nodes share, or run_dir: s3://...",
        )


def forwarded(stream: TextIO) -> str:
    """Pass on what a process writes until it ends; its error, or else its last line."""
    message = ""
    with stream:
        for line in stream:
            sys.stderr.write(line)
            if line.startswith("error: ") or not message.startswith("error: "):
                message = line.strip() or message
    return message


def start_process(
    words: list[str], theirs: Iterable[BinaryIO], directory: str
) -> subprocess.Popen[str]:
    """Start a command whose standard error is read.

    Args:
        words: Program and arguments.
        theirs: Ends of pipes that it has, too; they are closed here.
        directory: Its working directory, where this node has it.

    Raises:
        ConfigError: It cannot be started.
    """
    try:
        return subprocess.Popen(
            words,
            pass_fds=[file.fileno() for file in theirs],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            cwd=directory if os.path.isdir(directory) else None,
            env=child_environment(),
        )
    except OSError as error:
        raise ConfigError(
            "a worker's process cannot be started",
            where=f"{words[0]} on {os.uname().nodename}",
            got=error.strerror,
            hint="see `launch.python`",
        ) from error
    finally:
        for file in theirs:
            file.close()


def open_pipe() -> tuple[BinaryIO, BinaryIO]:
    """The end that is read, and the end that is written; unbuffered."""
    read_fd, write_fd = os.pipe()
    return open(read_fd, "rb", buffering=0), open(write_fd, "wb", buffering=0)


def _result(reference: Any) -> Any:
    import ray

    return ray.get(reference)
