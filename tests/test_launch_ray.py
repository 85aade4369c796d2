"""Extraction and alignment on a real Ray cluster of several nodes, of which some die."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from launch.worklog import read_sessions
from store_schema.config import load_run
from store_schema.disk.location import open_location
from store_schema.plan.run_plan import open_plan
from store_schema.store.reader import StoreReader
from tests.command import ok
from tests.extract_runs import plan_run, sample_documents, write_jsonl, write_run
from tests.slow_progress import slow_hook

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("quick_processes"),
]

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCES = ("code", "prose")
REQUIRED = "LOGITFUSE_REQUIRE_RAY"
"""Environment variable: tests that need a cluster fail where none starts, instead of skipping."""
NODE: dict[str, Any] = {"object_store_memory": 80 << 20, "include_dashboard": False}
"""A node's object store is small: only shard numbers go through Ray."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head node without CPUs, to which tests add nodes."""
    try:
        from ray.cluster_utils import Cluster

        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **NODE})
    except Exception as error:
        reason = f"no Ray cluster: {type(error).__name__}: {error}"
        if os.environ.get(REQUIRED):
            pytest.fail(reason)
        pytest.skip(reason)
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def planned(
    cluster: Any,  # first: without one, nothing is made
    tmp_path_factory: pytest.TempPathFactory,
    tiny_models: dict[str, Path],
    quick_processes: None,
) -> Path:
    """The run file of a run that one process has extracted and aligned."""
    folder = tmp_path_factory.mktemp("planned")
    write_jsonl(folder / "docs.jsonl", sample_documents(3))
    path = plan_run(write_run(folder, {name: tiny_models[name] for name in (*SOURCES, "target")}))
    ok("extract", "run", path)
    ok("align", "run", path)
    return path


class Run:
    """A planned run without stores, on a cluster, whose workers are as slow as a file says."""

    def __init__(self, folder: Path, planned: Path, models: dict[str, Path], cluster: Any) -> None:
        for part in ("corpus", "plan"):
            shutil.copytree(planned.parent / "run" / part, folder / "run" / part)
        shutil.copy(planned.parent / "docs.jsonl", folder)
        hook, self.slow = slow_hook(folder, 0)
        path = os.pathsep.join([str(hook), str(REPOSITORY)])
        python = ["env", f"PYTHONPATH={path}", f"SLOW_FILE={self.slow}", sys.executable]
        chosen = {name: models[name] for name in (*SOURCES, "target")}
        self.path = write_run(folder, chosen, launch={"python": python})
        self._cluster = cluster

    def submit(self, *words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "logitfuse", "submit", "extract", str(self.path)]
        command += ["--ray", self._cluster.address, *words]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def refused(self, *words: str) -> str:
        """The one error line of a command that ends with exit code 2."""
        process = self.submit(*words)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2, err
        [line] = [line for line in err.splitlines() if line.startswith("error: ")]
        assert err.splitlines()[-1] == line
        return line

    def num_commits(self) -> int:
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

    def contents(self) -> dict[str, dict[int, str]]:
        return contents(self.path)


def contents(path: Path) -> dict[str, dict[int, str]]:
    """Digests of all shards of all stores."""
    run, found = load_run(path), {}
    for source in run.sources:
        for url in (run.store_url(source), run.aligned_url(source)):
            commits = StoreReader.open(open_location(url)).commits
            found[url.removeprefix(run.folder)] = {i: c.content_sha256 for i, c in commits.items()}
    return found


@pytest.fixture
def run(tmp_path: Path, planned: Path, tiny_models: dict[str, Path], cluster: Any) -> Run:
    return Run(tmp_path, planned, tiny_models, cluster)


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_nodes_actors_and_processes_die_and_stores_are_those_of_one_process(
    run: Run, planned: Path, cluster: Any
) -> None:
    nodes = [cluster.add_node(num_cpus=1, **NODE) for _ in range(3)]
    run.slow.write_text("0.5")
    driver = run.submit("--workers", "3")
    wait_until(lambda: run.num_commits() >= 3 and len(run.processes()) == 3, driver)
    run.slow.write_text("5")  # everybody is in the middle of a shard
    before = set(run.processes())
    cluster.remove_node(nodes.pop(), allow_graceful=False)
    wait_until(lambda: len(run.processes()) == 2, driver)
    process, other = run.processes()
    os.kill(process, signal.SIGKILL)  # as the machine does when memory is short
    os.kill(parent(other), signal.SIGKILL)
    run.slow.write_text("0")
    out, err = driver.communicate(timeout=240)
    assert driver.returncode == 0, err
    assert err.count("was lost, its shards go to others") == 3
    assert run.contents() == contents(planned)
    ok("store", "verify", run.path)
    assert "next: `logitfuse train run`" in out
    sessions = [s for name in SOURCES for s in read_sessions(load_run(run.path), "extract", name)]
    killed = [session for session in sessions if session.reason is None]
    assert len(killed) == len(before) == 3
    assert all(set(s.taken) > {shard.shard for shard in s.finished} for s in killed)
    status = [line.split() for line in ok("status", run.path).splitlines()]
    shards = f"{len(run.contents()['/stores/code'])} of"
    assert [" ".join(w[2:4]) for w in status if w[:2] == ["extract", "code"]] == [shards]
    again = run.submit()
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert out.count("nothing to do") == 2
    for node in nodes:
        cluster.remove_node(node)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_driver_waits_for_a_node_is_killed_and_stopped_and_nothing_is_lost(
    run: Run, planned: Path, cluster: Any
) -> None:
    run.slow.write_text("0.2")
    first = run.submit("--only", "--node-timeout", "100")
    assert first.stderr is not None
    assert "waiting 100 s for a node with 1 CPU" in first.stderr.readline()
    node = cluster.add_node(num_cpus=2, **NODE)
    wait_until(lambda: run.num_commits() >= 1, first)
    first.kill()
    first.communicate()
    deadline = time.monotonic() + 60
    while run.processes():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    second = run.submit("--only")
    wait_until(run.processes, second)
    second.terminate()
    _, err = second.communicate(timeout=120)
    assert second.returncode in (75, 143), err
    assert err.splitlines()[-1].startswith("error: stopped by SIGTERM")
    assert not run.processes()
    run.slow.write_text("0")
    third = run.submit("--only")
    _, err = third.communicate(timeout=240)
    assert third.returncode == 0, err
    config = load_run(run.path)
    for source in SOURCES:
        reader = StoreReader.open(open_location(config.store_url(source)))
        assert reader.committed(open_plan(config).shards) == set(range(len(reader.commits)))
        sessions = read_sessions(config, "extract", source)
        finished = [shard.shard for session in sessions for shard in session.finished]
        assert len(finished) == len(set(finished))  # none was done twice
    cluster.remove_node(node)


def test_what_a_worker_refuses_is_the_drivers_error(run: Run, planned: Path, cluster: Any) -> None:
    line = run.refused("--gpus-per-worker", "1")
    assert "no node of the Ray cluster has room for a worker" in line
    assert "expected a node with 1 CPU, 1 GPU, got nodes with 0 CPU and 0 GPU" in line
    node = cluster.add_node(num_cpus=1, num_gpus=1, **NODE)
    line = run.refused()
    assert "a worker does not see its GPUs in --gpus-per-worker: expected 1, got 0" in line
    line = run.refused("--gpus-per-worker", "0", "--set", "extract.top_k=100000")
    assert "top_k is larger than the vocabulary" in line
    assert line.endswith(f"(on {os.uname().nodename})")
    cluster.remove_node(node)


def test_a_folder_that_only_the_driver_sees_is_refused(run: Run, cluster: Any) -> None:
    hide = ["unshare", "--mount", "bash", "-c", 'mount -t tmpfs none "$0" && exec "$@"']
    folder = str(run.path.parent)
    if subprocess.run([*hide, folder, "true"], check=False, capture_output=True).returncode:
        pytest.skip("folders cannot be hidden from a process here")
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1"]
    start += [f"--address={cluster.address}", "--include-dashboard=false"]
    node = subprocess.Popen(
        [*hide, folder, *start], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        line = run.refused("--node-timeout", "60")
    finally:
        node.terminate()
        node.wait(timeout=60)
    assert "a node does not see the folder of the stores" in line
    assert f"expected {folder}/run" in line
    assert not list((run.path.parent / "run").glob(".ray-*"))
