"""Extraction and alignment on a real Ray cluster of several nodes, of which some die."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.worklog import read_sessions
from store_schema.config import load_run
from store_schema.disk.location import open_location
from store_schema.plan.run_plan import open_plan
from store_schema.store.reader import StoreReader
from tests.command import ok
from tests.extract_runs import plan_run, sample_documents, write_jsonl, write_run
from tests.ray_cluster import RayCluster, can_hide, cluster_or_skip
from tests.ray_runs import RayRun, contents, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("cluster", "quick_processes"),
]

SOURCES = ("code", "prose")


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """A head node, to which tests add nodes."""
    with cluster_or_skip() as running:
        yield running


@pytest.fixture(scope="module")
def planned(
    cluster: RayCluster,  # first: without one, nothing is made
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


@pytest.fixture
def run(tmp_path: Path, planned: Path, cluster: RayCluster) -> Iterator[RayRun]:
    """A run; at the end its drivers and all nodes are gone."""
    made = RayRun(tmp_path, planned)
    yield made
    made.kill_processes()
    cluster.remove_nodes()


def refused(run: RayRun, *words: str) -> str:
    """The one error line of a driver that ends with exit code 2."""
    driver = run.submit(*words)
    _, err = driver.communicate(timeout=120)
    assert driver.returncode == 2, err
    lines = err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    return str(lines[-1])


def test_nodes_actors_and_processes_die_and_stores_are_those_of_one_process(
    run: RayRun, planned: Path, cluster: RayCluster
) -> None:
    for _ in range(3):
        cluster.add_node()
    driver = run.submit("--workers", "3")
    run.kill_in_a_shard(cluster, driver)
    out, err = driver.communicate(timeout=240)
    assert driver.returncode == 0, err
    assert err.count("was lost, its shards go to others") >= 3
    assert contents(run.path) == contents(planned)
    ok("store", "verify", run.path)
    assert "next: `logitfuse train run`" in out
    assert len(run.sessions_in_a_shard()) == 3
    status = [line.split() for line in ok("status", run.path).splitlines()]
    shards = f"{len(contents(run.path)['/stores/code'])} of"
    assert [" ".join(w[2:4]) for w in status if w[:2] == ["extract", "code"]] == [shards]
    again = run.submit()
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert out.count("nothing to do") == 2


def test_a_driver_waits_for_a_node_is_killed_and_stopped_and_nothing_is_lost(
    run: RayRun, cluster: RayCluster
) -> None:
    run.slow.write_text("0.2")
    first = run.submit("--only", "--node-timeout", "100")
    assert first.stderr is not None
    assert "waiting 100 s for a node with 1 CPU" in first.stderr.readline()
    cluster.add_node(num_cpus=2)
    wait_until(lambda: run.num_commits() >= 1, first)
    first.kill()
    first.communicate()
    deadline = time.monotonic() + 60
    while run.processes():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    second = run.submit("--only", "--ray", cluster.address)
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
        shards = open_plan(config).shards
        assert reader.committed(shards) == {shard.index for shard in shards}
        sessions = read_sessions(config, "extract", source)
        finished = [shard.shard for session in sessions for shard in session.finished]
        assert len(finished) == len(set(finished))  # none was done twice


def test_what_a_worker_refuses_is_the_drivers_error(run: RayRun, cluster: RayCluster) -> None:
    line = refused(run, "--gpus-per-worker", "1")
    assert "no node of the Ray cluster has room for a worker" in line
    assert "expected a node with 1 CPU, 1 GPU, got nodes with 0 CPU and 0 GPU" in line
    cluster.add_node(num_gpus=1)
    line = refused(run)
    assert "a worker does not see its GPUs in --gpus-per-worker: expected 1, got 0" in line
    line = refused(run, "--gpus-per-worker", "0", "--set", "extract.top_k=100000")
    assert "top_k is larger than the vocabulary" in line
    assert line.endswith(f"(on {os.uname().nodename})")


def test_a_folder_that_only_the_driver_sees_is_refused(run: RayRun, cluster: RayCluster) -> None:
    folder = run.path.parent
    if not can_hide(folder):
        pytest.skip("folders cannot be hidden from a process here")
    with cluster.node_without(folder):
        line = refused(run, "--node-timeout", "60")
    assert "a node does not see the folder of the stores" in line
    assert f"expected {folder}/run" in line
    assert not list((folder / "run").glob(".ray-*"))
