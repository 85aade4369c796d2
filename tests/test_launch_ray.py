"""Extraction and alignment on a real Ray cluster of several nodes, of which some die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.ray_workers import Shards
from launch.worklog import read_sessions
from store_schema.config import load_run
from store_schema.disk.location import open_location
from store_schema.errors import LogitfuseError
from store_schema.plan.run_plan import open_plan
from store_schema.store.reader import StoreReader
from tests.command import ok, refused
from tests.extract_runs import plan_run, sample_documents, write_jsonl, write_run

pytest.importorskip("ray")

MEMORY = 80 << 20
"""Bytes of a node's object store: nothing but shard numbers goes through it."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    made = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": MEMORY}
    )
    try:
        yield made
    finally:
        made.shutdown()


def planned(folder: Path, models: dict[str, Path], repeat: int = 4) -> Path:
    folder.mkdir()
    write_jsonl(folder / "docs.jsonl", sample_documents(repeat))
    chosen = {name: models[name] for name in ("code", "prose", "target")}
    return plan_run(write_run(folder, chosen))


def contents(path: Path) -> dict[str, dict[int, str]]:
    run, found = load_run(path), {}
    for source in run.sources:
        for url in (run.store_url(source), run.aligned_url(source)):
            commits = StoreReader.open(open_location(url)).commits
            found[url.replace(run.folder, "")] = {i: c.content_sha256 for i, c in commits.items()}
    return found


def submit(path: Path, cluster: Any, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "logitfuse", "submit", "extract", str(path)]
    command += ["--ray", cluster.address, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_nodes_and_processes_die_and_stores_are_those_of_one_process(
    tmp_path: Path, tiny_models: dict[str, Path], cluster: Any
) -> None:
    whole = planned(tmp_path / "whole", tiny_models)
    ok("extract", "run", whole)
    ok("align", "run", whole)
    path = planned(tmp_path / "ray", tiny_models)
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=MEMORY) for _ in range(3)]
    driver = submit(path, cluster, "--workers", "3")
    commits = tmp_path / "ray/run/stores"
    wait_for(lambda: len(list(commits.glob("*/commits/*.json"))) >= 1, driver)
    cluster.remove_node(nodes[0], allow_graceful=False)
    wait_for(lambda: len(list(commits.glob("*/commits/*.json"))) >= 3, driver)
    os.kill(workers(path)[0], signal.SIGKILL)  # as the machine does when memory is short
    out, err = driver.communicate(timeout=300)
    assert driver.returncode == 0, err
    assert "was lost" in err
    assert contents(path) == contents(whole)
    ok("store", "verify", path)
    assert "Ray does not train" in out
    status = ok("status", path)
    assert "pending" in status
    again = submit(path, cluster)
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert out.count("nothing to do") == 2
    for node in nodes[1:]:
        cluster.remove_node(node)


def test_a_killed_driver_loses_nothing_and_a_signal_stops_it(
    tmp_path: Path, tiny_models: dict[str, Path], cluster: Any
) -> None:
    node = cluster.add_node(num_cpus=2, object_store_memory=MEMORY)
    path = planned(tmp_path / "run", tiny_models)
    commits = tmp_path / "run/run/stores"
    first = submit(path, cluster, "--only")
    wait_for(lambda: len(list(commits.glob("*/commits/*.json"))) >= 1, first)
    first.kill()
    first.communicate()
    wait_until(lambda: not workers(path))
    second = submit(path, cluster, "--only")
    wait_for(lambda: bool(workers(path)), second)
    second.terminate()
    _, err = second.communicate(timeout=120)
    assert second.returncode in (75, 143), err
    assert err.strip().splitlines()[-1].startswith("error: stopped by SIGTERM")
    wait_until(lambda: not workers(path))
    third = submit(path, cluster, "--only")
    _, err = third.communicate(timeout=240)
    assert third.returncode == 0, err
    plan = open_plan(load_run(path))
    for source in load_run(path).sources:
        reader = StoreReader.open(open_location(load_run(path).store_url(source)))
        assert reader.committed(plan.shards) == set(range(len(plan.shards)))
        shards = [
            f.shard for s in read_sessions(load_run(path), "extract", source) for f in s.finished
        ]
        assert len(shards) == len(set(shards))  # none was committed twice
    cluster.remove_node(node)


def test_what_a_worker_refuses_is_the_drivers_error(
    tmp_path: Path, tiny_models: dict[str, Path], cluster: Any
) -> None:
    node = cluster.add_node(num_cpus=1, object_store_memory=MEMORY)
    path = planned(tmp_path / "run", tiny_models)
    run = submit(path, cluster, "--set", "extract.top_k=100000")
    _, err = run.communicate(timeout=120)
    assert run.returncode == 2
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "top_k is larger than the vocabulary" in line
    few = submit(path, cluster, "--gpus-per-worker", "1")
    _, err = few.communicate(timeout=120)
    assert few.returncode == 2
    assert "too few GPUs for one worker" in err
    cluster.remove_node(node)


def test_no_ray_and_no_cluster(
    tmp_path: Path, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = planned(tmp_path / "run", tiny_models)
    line = refused("submit", "extract", path, "--ray", "127.0.0.1:1")
    assert "no Ray cluster answers" in line
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install 'logitfuse[ray]'" in refused("submit", "extract", path, "--ray", "auto")


def test_shards_are_handed_out_once_and_again_when_a_worker_is_lost() -> None:
    shards = Shards({"a": deque([0, 1, 2, 3]), "b": deque([0])})
    assert [shards.source_for(i) for i in (0, 1)] == ["a", "b"]
    assert [shards.next(0, "a"), shards.next(1, "a"), shards.next(0, "a")] == [0, 1, 2]
    shards.lost(0)
    assert [shards.next(1, "a") for _ in range(4)] == [0, 2, 3, None]
    assert shards.source_for(1) == "b"
    shards.lost(1)  # it held nothing any more
    assert shards.next(1, "a") is None


def workers(path: Path) -> list[int]:
    """Processes that do shards of a run."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = place.read_bytes().split(b"\0")
            at = words.index(b"--scheduler-fds")
            run = load_run(Path(words[at - 5].decode()))
        except (OSError, ValueError, LogitfuseError):
            continue
        if run.run_dir == load_run(path).run_dir:
            found.append(int(place.parent.name))
    return found


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_for(condition: Any, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
