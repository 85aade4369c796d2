"""A Ray cluster: how to connect to it, and how many workers it has room for."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from store_schema.errors import ConfigError

_CONNECT_S = 10.0
"""How long the head node may take to accept a connection."""
_ATTEMPTS = "2"
"""Of 40 seconds each, where something other than Ray answers; Ray itself makes 20."""

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
        ray.init(address=address, log_to_driver=False, configure_logging=False)
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
