"""Workers on a Ray cluster: actors that run a stage's own command and name one shard after the other.

The command runs in a process of its own, reads the plan and writes commits as always; nothing but shard
numbers goes through Ray.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from launch.signals import SMALLER_STEPS
from launch.slurm.options import ArrayStage
from launch.work import Worker
from store_schema.errors import ConfigError

COMMANDS: dict[ArrayStage, tuple[str, str]] = {
    "extract": ("extract", "run-source"),
    "align": ("align", "run"),
}
"""Module and subcommand that does a source's shards in one process."""


class Ended(NamedTuple):
    """How a worker's process ended."""

    code: int
    error: str | None
    host: str


@dataclass
class Shards:
    """An actor: what is left of each source, handed out one shard at a time.

    Args:
        left: Indices of shards by source, in order.
    """

    left: dict[str, deque[int]]
    held: dict[int, list[tuple[str, int]]] = field(default_factory=dict)

    def next(self, worker: int, source: str) -> int | None:
        """The next shard of a source for a worker, None if there is none."""
        if not self.left[source]:
            return None
        shard = self.left[source].popleft()
        self.held.setdefault(worker, []).append((source, shard))
        return shard

    def source_for(self, worker: int) -> str | None:
        """A source with shards left, another one for each worker; None if all are handed out."""
        self.held.pop(worker, None)
        sources = [source for source, shards in self.left.items() if shards]
        return sources[worker % len(sources)] if sources else None

    def holders(self) -> list[int]:
        """Workers that have been given a shard of the source that they are at."""
        return list(self.held)

    def lost(self, worker: int) -> None:
        """Hand out again what a worker held; what it had finished is left out by whoever gets it."""
        for source, shard in reversed(self.held.pop(worker, [])):
            self.left[source].appendleft(shard)


class RayWorker:
    """An actor with the resources of one worker: runs the stage's command, source after source.

    Args:
        shards: Handle of the actor `Shards`.
        worker: Which worker this is, for its log.
        run_text: The resolved run file.
        place: The driver's working directory.
        python: Words that start Python.
        marker: A file of the run's folder that all nodes must see; None for an object store.
    """

    def __init__(
        self,
        shards: Any,
        worker: Worker,
        run_text: str,
        place: str,
        python: Sequence[str],
        marker: str | None,
    ) -> None:
        self._shards, self._worker, self._run_text = shards, worker, run_text
        self._place, self._python, self._marker = place, tuple(python), marker
        self._child: subprocess.Popen[str] | None = None
        self._error: str | None = None

    def run(self, stage: ArrayStage, source: str) -> Ended:
        """Do shards of a source until none is left."""
        host = os.uname().nodename
        if self._marker is not None and not os.path.exists(self._marker):
            told = ConfigError(
                "this node does not see the run's folder",
                where=self._marker,
                hint="use a file system that all nodes share, or run_dir: s3://...",
            )
            return Ended(told.exit_code, f"error: {told.line()}", host)
        for halvings in range(32):
            self._error = None
            code = self._process(stage, source, halvings)
            if code != SMALLER_STEPS:
                break
            self._ray_get(self._shards.lost.remote(self._worker.index))
        return Ended(code, self._error, host)

    def _process(self, stage: ArrayStage, source: str, halvings: int) -> int:
        asked_fd, ask_fd = os.pipe()
        named_fd, name_fd = os.pipe()
        alive_read_fd, alive_fd = os.pipe()
        theirs = [named_fd, ask_fd]
        module, command = COMMANDS[stage]
        with tempfile.TemporaryDirectory(prefix="logitfuse-") as folder:
            config = Path(folder) / "run.yaml"
            config.write_text(self._run_text, encoding="utf-8")
            words = [*self._python, "-P", "-m", module, command, str(config), "--source", source]
            words += ["--worker", str(self._worker), "--scheduler-fds", str(named_fd), str(ask_fd)]
            if stage == "extract":  # a process that this one's death does not end by itself
                words += ["--stop-fd", str(alive_read_fd), "--halvings", str(halvings)]
                theirs.append(alive_read_fd)
            try:
                self._child = subprocess.Popen(
                    words,
                    pass_fds=theirs,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                    errors="replace",
                    cwd=self._place if os.path.isdir(self._place) else None,
                )
                for fd in (named_fd, ask_fd, alive_read_fd):
                    os.close(fd)
                reader = threading.Thread(target=self._forward, args=(self._child.stderr,))
                reader.start()
                self._answer(asked_fd, name_fd, source)
                code = self._child.wait()
                reader.join()
            finally:
                for fd in (asked_fd, name_fd, alive_fd):
                    os.close(fd)
        return code

    def _answer(self, asked_fd: int, name_fd: int, source: str) -> None:
        """Name a shard for each line that the process writes, until it closes its end."""
        while os.read(asked_fd, len(b"next\n")):
            shard = self._ray_get(self._shards.next.remote(self._worker.index, source))
            with suppress(BrokenPipeError):  # it has just ended
                os.write(name_fd, b"\n" if shard is None else b"%d\n" % shard)

    def _forward(self, lines: Any) -> None:
        for line in lines:
            sys.stderr.write(line)
            if line.startswith("error: "):
                self._error = line.strip()

    def stop(self) -> None:
        """Ask the process to stop at its next batch."""
        if self._child is not None:
            self._child.send_signal(signal.SIGTERM)

    @staticmethod
    def _ray_get(reference: Any) -> Any:
        import ray

        return ray.get(reference)
