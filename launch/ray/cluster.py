"""A Ray cluster: how to connect to it, and how many workers it has room for."""

from __future__ import annotations

import os
import re
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from store_schema.disk.location import open_location
from store_schema.errors import ConfigError, StorageError

_CONNECT_S = 10.0
"""How long the head node may take to accept a connection."""
_ATTEMPTS = "2"
"""Of 40 seconds each, where something other than Ray answers; Ray itself makes 20."""

IMPORT_ERROR = re.compile(r"(?:ModuleNotFound|Import)Error: .*")
"""In Ray's error for an actor whose module a node does not have."""

Resources = Mapping[str, float]
"""Amounts by Ray's name of a resource: CPU, GPU and others."""


def connect(address: str) -> Any:
    """Connect to a cluster.

    Args:
        address: "auto", this machine's cluster or that of RAY_ADDRESS, or host:port of the head node.

    Returns:
        The module ray.

    Raises:
        ConfigError: Ray is not installed, or no cluster answers.
    """
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", _ATTEMPTS)  # read when it is imported
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "Ray is not installed", where="--ray", hint="pip install 'logitfuse[ray]'"
        ) from error
    if address != "auto" and not re.fullmatch(r"[^\s/]+:\d{1,5}", address):
        raise ConfigError(
            "not the address of a Ray cluster",
            where="--ray",
            expected="auto, or host:port of the head node",
            got=address,
        )
    if ray.is_initialized():
        return ray
    found = _head_address() if address == "auto" else address
    try:
        if found is not None:  # Ray itself tries for minutes
            host, _, port = found.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
        ray.init(address=found or address, log_to_driver=False, configure_logging=False)
    except Exception as error:  # Ray raises all kinds
        raise ConfigError(
            "no Ray cluster answers",
            where=f"--ray {address}" + (f", {found}" if found not in (None, address) else ""),
            expected="a cluster that this machine is a node of",
            got=" ".join(str(error).split())[:200],
            hint="start one with `ray start --head`, or give the address of its head node",
        ) from error
    return ray


def _head_address() -> str | None:
    """What "auto" stands for, as Ray determines it; None if that is not known here."""
    text = os.environ.get("RAY_ADDRESS")
    if not text:
        folder = os.environ.get("RAY_TMPDIR", os.environ.get("TMPDIR", "/tmp"))
        file = Path(folder) / "ray/ray_current_cluster"
        text = file.read_text().strip() if file.exists() else None
    return text if text and re.fullmatch(r"[^\s/]+:\d+", text) else None


def node_room(node: Resources, worker: Resources) -> int:
    """Workers that a node has room for.

    Args:
        node: All resources of the node.
        worker: What each worker takes.
    """
    rooms = [
        int(node.get(name, 0.0) / amount + 1e-6) for name, amount in worker.items() if amount > 0
    ]
    return min(rooms, default=1)


def alive_nodes(ray: Any) -> list[Resources]:
    """Resources of each node that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def resources_text(nodes: Iterable[Resources]) -> str:
    """Different nodes for a message, such as "nodes with 8 CPU and 0 GPU"."""
    texts = {f"{node.get('CPU', 0):g} CPU and {node.get('GPU', 0):g} GPU" for node in nodes}
    return "nodes with " + ", ".join(sorted(texts)) if texts else "no node"


def gpus_of_worker(ray: Any, asked: float | None) -> float:
    """GPUs that a worker takes: as many as were asked for, or 1 where any node has one."""
    if asked is not None:
        return asked
    return float(any(node.get("GPU", 0) >= 1 for node in alive_nodes(ray)))


class RoomWatch:
    """Refuses a cluster whose nodes are all too small for a worker.

    Args:
        ray: The module ray, connected.
        worker: What each worker takes.
        timeout_s: How long to wait for the first node that has room.
    """

    def __init__(self, ray: Any, worker: Resources, timeout_s: float) -> None:
        self._ray, self._worker, self._timeout_s = ray, worker, timeout_s
        self._had_room = False
        self._deadline: float | None = None

    def require(self, room: Callable[[], int]) -> None:
        """Check again. Later, when there was such a node, Ray is trusted to replace it.

        Args:
            room: How many workers there is room for now.

        Raises:
            ConfigError: There is none, and the time is over.
        """
        if self._had_room or room():
            self._had_room = True
            return
        now = time.monotonic()
        wanted = ", ".join(f"{amount:g} {name}" for name, amount in self._worker.items())
        if self._deadline is None:
            self._deadline = now + self._timeout_s
            if self._timeout_s:
                click.echo(f"waiting {self._timeout_s:g} s for a node with {wanted}", err=True)
        if now >= self._deadline:
            raise ConfigError(
                "no node of the Ray cluster has room for a worker",
                where="--cpus-per-worker, --gpus-per-worker",
                expected=f"a node with {wanted}",
                got=resources_text(alive_nodes(self._ray)),
                hint="ask for less, start such a node, or give --node-timeout to an autoscaler",
            )


def failure(error: Exception, address: str) -> ConfigError:
    """An error of Ray's, in one line."""
    not_there = IMPORT_ERROR.search(str(error))
    if not_there:
        return ConfigError(
            "a node of the Ray cluster cannot import logitfuse",
            where=address,
            got=not_there[0],
            hint="install this version of it for the Python that Ray runs there",
        )
    return ConfigError(
        "the Ray cluster failed",
        where=address,
        got=" ".join(str(error).split())[:300],
        hint="what is finished is kept: run the same command again",
    )


@contextmanager
def probe_file(url: str) -> Iterator[str | None]:
    """A file in a local folder, by which nodes show that they see that folder; removed at the end."""
    folder = open_location(url).path
    if folder is None:
        yield None
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".ray-", dir=folder.resolve())
    except OSError as error:
        raise StorageError("folder cannot be written", where=folder, got=error.strerror) from error
    os.close(handle)
    try:
        yield name
    finally:
        Path(name).unlink(missing_ok=True)
