"""A real Slurm on loopback: munged, slurmctld and two slurmd in a folder of their own.

Jobs get the first node, those of partition `both` may have two.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

DAEMONS = ("munged", "slurmctld", "slurmd")
PROGRAMS = (*DAEMONS, "sbatch", "sinfo", "squeue", "scontrol", "scancel")
REQUIRED = "LOGITFUSE_REQUIRE_SLURM"
"""Environment variable: tests that need a cluster fail where there is none, instead of skipping."""
SEARCH_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
MAX_ARRAY_SIZE = 4
_HOST = socket.gethostname().partition(".")[0]
NODES = (_HOST, f"{_HOST}-2")
"""The first one's name has an address, as node names of a cluster have."""

_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={first}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5,socket={folder}/munge.socket
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
SlurmdParameters=config_overrides
EnforcePartLimits=ALL
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
KillWait=5
MaxArraySize={max_array_size}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
NodeName={first} NodeHostname={first} NodeAddr=127.0.0.1 Port={first_port} CPUs=5 RealMemory=4096
NodeName={second} NodeHostname={first} NodeAddr=127.0.0.1 Port={second_port} CPUs=2 RealMemory=4096
PartitionName=main Nodes={first} Default=YES State=UP
PartitionName=both Nodes={first},{second} State=UP
"""


def unavailable() -> str | None:
    """Why no cluster can be started here; None where one can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=SEARCH_PATH) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    return None if os.geteuid() == 0 else "Slurm's daemons are started as root"


def wanted() -> None:
    """Skip the test where no cluster can be started, or fail it where one is required."""
    reason = unavailable()
    if reason and os.environ.get(REQUIRED):
        pytest.fail(f"no Slurm: {reason}")
    if reason:
        pytest.skip(f"no Slurm: {reason}")


class Cluster:
    """A running cluster. Its commands find it through SLURM_CONF."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.beside: set[str] = set()
        """Jobs that nobody waits for yet: the queue is told without them."""

    def wait_until(self, condition: Callable[[], bool], what: str, seconds: float = 240.0) -> None:
        """Wait for a condition; the daemons' logs are part of the failure."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"not in {seconds:.0f} s: {what}\n{self.report()}")
            time.sleep(0.2)

    def report(self) -> str:
        """What the queue and the daemons say, for failures."""
        parts = [_output("squeue", "--all"), _output("scontrol", "show", "job", "--oneliner")]
        for log in sorted(self.folder.glob("*.log")):
            parts.append(f"==> {log.name}\n" + "\n".join(log.read_text().splitlines()[-40:]))
        return "\n".join(parts)

    def queue(self) -> list[tuple[str, str, str, str]]:
        """Job id, task id, state and script's stem of every task that waits or runs, but `beside`."""
        form = "--format=%F|%K|%T|%o"
        lines = _output("squeue", "--noheader", "--array", form).splitlines()
        rows = [line.split("|") for line in lines]
        return [
            (job, task, state, Path(script).stem)
            for job, task, state, script in rows
            if job not in self.beside
        ]

    def tasks(self, stem: str, state: str = "RUNNING") -> list[str]:
        """`scontrol`'s and `scancel`'s names of a script's tasks in a state."""
        return [
            f"{job}_{task}" for job, task, at, name in self.queue() if (name, at) == (stem, state)
        ]

    def run_seconds(self, task: str) -> int:
        """How long a task has been running."""
        text = _output("squeue", "--noheader", "--format=%M", f"--jobs={task}").strip()
        seconds = 0
        for part in text.split(":"):
            seconds = 60 * seconds + int(part)
        return seconds

    def wait_until_idle(self, seconds: float = 300.0) -> None:
        """Wait for the end of all jobs."""
        self.wait_until(lambda: not self.queue(), "an empty queue", seconds)

    def exit_code(self, job: str) -> str:
        """Exit code and signal of an ended job, "2:0"."""
        text = _output("scontrol", "show", "job", job, "--oneliner")
        (code,) = [word.partition("=")[2] for word in text.split() if word.startswith("ExitCode=")]
        return code

    def states(self) -> dict[str, set[str]]:
        """Last states of all jobs that Slurm remembers, by script's stem."""
        found: dict[str, set[str]] = {}
        for line in _output("scontrol", "show", "job", "--oneliner").splitlines():
            fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
            stem = Path(fields.get("Command", "")).stem
            found.setdefault(stem, set()).add(fields["JobState"])
        return found


def _output(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    return done.stdout + done.stderr


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """Start the daemons, wait for an idle node, and stop them by their pid files."""
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder:
        with _daemons(Path(folder)) as cluster:
            yield cluster


@contextmanager
def _daemons(folder: Path) -> Iterator[Cluster]:
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    folder.chmod(0o755)  # munge's socket must be in everybody's reach
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    ports = free_ports(3)
    configuration = _CONFIGURATION.format(
        folder=folder,
        controller_port=ports[0],
        first=NODES[0],
        first_port=ports[1],
        second=NODES[1],
        second_port=ports[2],
        max_array_size=MAX_ARRAY_SIZE,
    )
    (folder / "slurm.conf").write_text(configuration)
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    cluster = Cluster(folder)
    try:
        munge = [f"--{name}={folder}/munge.{end}" for name, end in _MUNGE_FILES.items()]
        _start("munged", *munge, f"--pid-file={folder}/munged.pid")
        _start("slurmctld")
        for node in NODES:
            _start("slurmd", "-N", node)
        cluster.wait_until(_nodes_are_idle, "idle nodes", 60)
        yield cluster
    finally:
        _output("scancel", "--user=root", "--signal=KILL", "--full")
        for name in (*(f"slurmd-{node}" for node in NODES), "slurmctld", "munged"):
            _stop(folder / f"{name}.pid")
        if before is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = before


def _nodes_are_idle() -> bool:
    return set(_output("sinfo", "--noheader", "--Node", "--format=%T").split()) == {"idle"}


_MUNGE_FILES = {"key-file": "key", "socket": "socket", "log-file": "log", "seed-file": "seed"}


def _start(program: str, *options: str) -> None:
    """Start a daemon, which goes into the background by itself."""
    path = shutil.which(program, path=SEARCH_PATH)
    assert path is not None
    done = subprocess.run([path, *options], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, f"{program}: {done.stderr}"


def _stop(pid_file: Path) -> None:
    try:
        pid = int(pid_file.read_text())
    except (OSError, ValueError):
        return
    for number, seconds in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
        with suppress(ProcessLookupError):
            os.kill(pid, number)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not Path(f"/proc/{pid}").exists():
                return
            time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
