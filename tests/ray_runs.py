"""Runs on a Ray cluster whose workers are made slow, looked for and killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from launch.worklog import SessionRecord, read_sessions
from store_schema.config import load_run
from store_schema.disk.location import open_location
from store_schema.store.reader import StoreReader
from tests.ray_cluster import RayCluster
from tests.slow_progress import slow_hook

REPOSITORY = Path(__file__).resolve().parent.parent
_FOR_EVER = "600"
"""Seconds in which every test has ended."""


class RayRun:
    """A run without stores, whose workers on the cluster are as slow as a file says.

    Args:
        folder: For the run.
        planned: Run file of a run whose corpus and plan are taken.
        s_per_token: Seconds that workers take for a token; None to be told by `slow`, which is a file,
            how many they take for each report of progress.

    Attributes:
        path: The run file.
        environment: Variables of workers, also of those that are started by hand.
    """

    def __init__(self, folder: Path, planned: Path, s_per_token: float | None = None) -> None:
        content = yaml.safe_load(planned.read_text())
        for part in ("corpus", "plan"):
            shutil.copytree(Path(content["run_dir"]) / part, folder / "run" / part)
        hook, self.slow = slow_hook(folder, s_per_token or 0, per_unit=s_per_token is not None)
        path = os.pathsep.join([str(hook), str(REPOSITORY)])
        self.environment = {"PYTHONPATH": path, "SLOW_FILE": str(self.slow)}
        python = ["env", *(f"{k}={v}" for k, v in self.environment.items()), sys.executable]
        content |= {"run_dir": str(folder / "run"), "launch": {"python": python}}
        self._drivers: list[subprocess.Popen[str]] = []
        self.path = folder / "run.yaml"
        self.path.write_text(yaml.safe_dump(content, sort_keys=False))

    def submit(self, *words: str) -> subprocess.Popen[str]:
        """A driver of extraction and alignment."""
        command = [sys.executable, "-m", "logitfuse", "submit", "extract", str(self.path)]
        command += ["--ray", "auto", *words]
        pipe = subprocess.PIPE
        self._drivers.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True))
        return self._drivers[-1]

    def num_commits(self) -> int:
        """Commits of all stores."""
        return len(list((self.path.parent / "run").glob("*/*/commits/*.json")))

    def processes(self) -> list[int]:
        """Processes that do shards of this run."""
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                words = (place / "cmdline").read_bytes()
                environment = (place / "environ").read_bytes()
                if b"--scheduler-fds" in words and bytes(self.slow) in environment:
                    found.append(int(place.name))
        return sorted(found)

    def sessions_in_a_shard(self) -> list[SessionRecord]:
        """Sessions of the extraction that are in the middle of a shard, or were when killed."""
        run = load_run(self.path)
        sessions = [s for name in run.sources for s in read_sessions(run, "extract", name)]
        open_ = [session for session in sessions if session.reason is None]
        return [s for s in open_ if set(s.taken) - {shard.shard for shard in s.finished}]

    def kill_processes(self) -> None:
        """Kill the drivers that still run, and processes that have lost their actor."""
        for driver in self._drivers:
            driver.kill()
            driver.communicate()
        for process in self.processes():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def _num_asleep(self) -> int:
        """How many processes stay in their shard until they are killed."""
        notes = self.slow.parent.glob(f"{self.slow.name}-*")
        return sum(note.read_text() == _FOR_EVER for note in notes)

    def kill_in_a_shard(self, cluster: RayCluster, driver: subprocess.Popen[str]) -> None:
        """Kill three workers in the middle of a shard each: a node, a process and an actor.

        Args:
            cluster: Of three nodes, each with room for one worker.
            driver: Has been started.
        """
        self.slow.write_text("0.5")
        wait_until(lambda: self.num_commits() >= 3, driver)
        self.slow.write_text(_FOR_EVER)  # those who are in a shard stay there
        wait_until(lambda: self._num_asleep() == len(self.processes()) == 3, driver)
        cluster.kill_node()
        wait_until(lambda: len(self.processes()) == 2, driver)
        process, other = self.processes()
        os.kill(process, signal.SIGKILL)  # as the machine does when memory is short
        os.kill(parent_of(other), signal.SIGKILL)
        self.slow.write_text("0")


def parent_of(pid: int) -> int:
    """Id of the process that started a process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def contents(path: Path) -> dict[str, dict[int, str]]:
    """Digests of all shards of all stores of a run, by store."""
    run, found = load_run(path), {}
    for source in run.sources:
        for url in (run.store_url(source), run.aligned_url(source)):
            commits = StoreReader.open(open_location(url)).commits
            found[url.removeprefix(run.folder)] = {i: c.content_sha256 for i, c in commits.items()}
    return found


def wait_until(
    condition: Callable[[], object], process: subprocess.Popen[Any], seconds: float = 120.0
) -> None:
    """Wait for a condition while a process runs.

    Raises:
        AssertionError: The process has ended, or the time is over.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
