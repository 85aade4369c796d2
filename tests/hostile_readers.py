"""Processes that read a store each with little memory, forked from a server that has all imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from store_schema import errors
from store_schema.errors import LogitfuseError

REPOSITORY = Path(__file__).resolve().parent.parent
MAX_GROWTH_MIB = 400
"""Twice the slack of a shard plus what a parsed record takes; the bombs below want gigabytes."""
MAX_SECONDS = 5

READERS = """
import json, os, resource, signal, sys, time
from pathlib import Path
from store_schema.errors import LogitfuseError
from store_schema.disk.location import open_location
from store_schema.plan.plan import Plan
from store_schema.store.reader import StoreReader

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def read(what, folder):
    if what == "plan":
        plan = Plan.open(open_location(folder))
        for shard in plan.shards:
            plan.segments(shard)
        return
    reader = StoreReader.open(open_location(folder))
    reader.vocabulary
    for shard in reader.commits:
        reader.verify(shard)

for line in sys.stdin:
    what, folder = line.split()
    child = os.fork()
    if child == 0:
        before, started = resident(), time.monotonic()
        virtual = int(open("/proc/self/statm").read().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (virtual + (3 << 30),) * 2)
        signal.alarm(20)
        try:
            read(what, folder)
            outcome = ["read", ""]
        except LogitfuseError as error:
            outcome = [type(error).__name__, error.line()]
        except BaseException as error:
            outcome = ["!" + type(error).__name__, str(error)[:500]]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        grown = (peak - before) >> 20
        print(json.dumps([*outcome, grown, time.monotonic() - started]), flush=True)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status:
        print(json.dumps(["!died", f"status {status}", 0, 0]), flush=True)
"""


class Readers:
    """Processes that read a store each, with little memory."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-c", READERS],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"MALLOC_ARENA_MAX": "2"},
        )

    def refusal(self, folder: Path, what: str = "store") -> str:
        """The one line with which a store or plan is refused."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(f"{what} {folder}\n")
        self._server.stdin.flush()
        kind, line, grown_mib, seconds = json.loads(self._server.stdout.readline())
        assert issubclass(getattr(errors, kind, Exception), LogitfuseError), (kind, line)
        assert grown_mib < MAX_GROWTH_MIB, line
        assert seconds < MAX_SECONDS, line
        assert len(line) < 1500
        assert line.isprintable(), line
        return str(line)

    def close(self) -> None:
        self._server.communicate()
