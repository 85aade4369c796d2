"""A real Ray cluster of several nodes on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.slurm_cluster import free_ports

REQUIRED = "LOGITFUSE_REQUIRE_RAY"
"""Environment variable: tests that need a cluster fail where none starts, instead of skipping."""
_MEMORY = 80 << 20
"""Bytes of a node's object store: only shard numbers go through Ray."""
_AGENT_PORTS = (
    *("metrics_agent_port", "metrics_export_port"),
    *("dashboard_agent_listen_port", "runtime_env_agent_port"),
)
"""A node whose agents choose ports waits for them, and gives up after 15 s on a busy machine."""
_AGENT_OPTIONS = (
    *("dashboard-agent-grpc-port", "metrics-export-port"),
    *("dashboard-agent-listen-port", "runtime-env-agent-port"),
)
"""The same on the command line of `ray start`."""
_HIDE = ("unshare", "--mount", "bash", "-c", 'mount -t tmpfs none "$0" && exec "$@"')
"""Before a folder and a command: runs the command with the folder empty."""


class RayCluster:
    """A running cluster, whose head node has no CPUs.

    Args:
        cluster: Of `ray.cluster_utils`.
    """

    def __init__(self, cluster: Any) -> None:
        self._cluster = cluster
        self._nodes: list[Any] = []
        self.address: str = cluster.address

    def add_node(self, num_cpus: int = 1, num_gpus: int = 0) -> None:
        """Start a node, whatever the machine has, and wait until it has joined."""
        with _signal_handlers_stay():
            self._nodes.append(self._cluster.add_node(**_node(num_cpus, num_gpus)))

    @contextmanager
    def node_without(self, folder: Path) -> Iterator[None]:
        """A node of one CPU that does not see what is in a folder (`can_hide`)."""
        words = [f"{sys.prefix}/bin/python", "-m", "ray.scripts.scripts", "start", "--block"]
        words += [f"--address={self.address}", "--num-cpus=1", f"--object-store-memory={_MEMORY}"]
        ports = zip(_AGENT_OPTIONS, free_ports(len(_AGENT_OPTIONS)), strict=True)
        words += [f"--{option}={port}" for option, port in ports]
        node = subprocess.Popen(
            [*_HIDE, str(folder), *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            yield
        finally:
            node.terminate()
            node.wait(timeout=60)

    def kill_node(self) -> None:
        """Kill all processes of the node that was added last."""
        self._cluster.remove_node(self._nodes.pop(), allow_graceful=False)

    def remove_nodes(self) -> None:
        """Stop all nodes that were added."""
        while self._nodes:
            self._cluster.remove_node(self._nodes.pop())


def _node(num_cpus: int, num_gpus: int) -> dict[str, Any]:
    ports = dict(zip(_AGENT_PORTS, free_ports(len(_AGENT_PORTS)), strict=True))
    return {"num_cpus": num_cpus, "num_gpus": num_gpus, "object_store_memory": _MEMORY, **ports}


@contextmanager
def _signal_handlers_stay() -> Iterator[None]:
    """Undo what Ray does to this process, whose death ends the nodes without a handler too."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def can_hide(folder: Path) -> bool:
    """Whether processes can be started here that see a folder empty (as root, mostly)."""
    done = subprocess.run([*_HIDE, str(folder), "true"], capture_output=True, check=False)
    return done.returncode == 0


@contextmanager
def running_cluster() -> Iterator[RayCluster]:
    """Start a head node; everything ends with the block, within which `auto` means this cluster.

    Raises:
        Exception: Ray is not installed, or its processes do not start.
    """
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        environment = {"RAY_TMPDIR": folder, "RAY_worker_niceness": "0"}  # not starved by others
        with mock.patch.dict(os.environ, environment):
            with _signal_handlers_stay():
                cluster = Cluster(initialize_head=True, head_node_args=_node(0, 0))
            try:
                yield RayCluster(cluster)
            finally:
                cluster.shutdown()


@contextmanager
def cluster_or_skip() -> Iterator[RayCluster]:
    """The same; without one the test is skipped, or fails where `REQUIRED` is set."""
    with ExitStack() as stack:
        try:
            running = stack.enter_context(running_cluster())
        except Exception as error:
            reason = f"no Ray cluster: {type(error).__name__}: {error}"
            if os.environ.get(REQUIRED):
                pytest.fail(reason)
            pytest.skip(reason)
        # `--ray auto` is this one, whatever other tests have started meanwhile.
        stack.enter_context(mock.patch.dict(os.environ, RAY_ADDRESS=running.address))
        yield running
