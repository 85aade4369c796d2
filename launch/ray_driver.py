"""`logitfuse submit STAGE RUN --ray ADDRESS`: the driver, which starts workers and gives them sources.

Ray is a scheduler and no more: it finds places for workers, restarts them elsewhere when a node is
lost, and carries shard numbers. A driver or node that dies loses what was being worked on, and the same
command goes on.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from launch.progress import Progress
from launch.ray_workers import Ended, RayWorker, Shards
from launch.signals import StopFlag, stop_on_signals
from launch.slurm.options import ArrayStage, Stage
from launch.slurm.submit import find_pending
from launch.summary import logs_folder
from launch.work import Worker
from store_schema.config import RunConfig
from store_schema.disk.location import open_location
from store_schema.errors import ConfigError, ModelError, Stopped, StoppedMidway
from store_schema.store.reader import listed_commits

LOSSES = 20
"""Workers that may be lost one after the other without a shard being finished."""
CONNECT_S = 10.0
"""How long the head node may take to answer."""
STOP_S = 120.0
"""How long workers may take to stop when asked to."""


@dataclass(frozen=True, slots=True)
class RayRequest:
    """What is asked of a Ray cluster.

    Args:
        address: "auto", or host:port of the head node.
        workers: By stage, at most so many; a stage that is not named has as many as the cluster has
            room for.
        gpus: GPUs of each worker. None: 1 if the cluster has any, else 0.
        cpus: CPUs of each worker.
        python: Words that start Python on a node.
    """

    address: str
    workers: Mapping[ArrayStage, int]
    gpus: float | None = None
    cpus: float = 1.0
    python: tuple[str, ...] = (sys.executable,)


def run_on_ray(
    run: RunConfig, stages: Sequence[Stage], sources: Sequence[str], request: RayRequest
) -> None:
    """Do what is left of extraction and alignment, and wait for it; training is not Ray's.

    Args:
        run: The run.
        stages: Which stages, in order.
        sources: Which sources.
        request: What is asked of the cluster.

    Raises:
        ConfigError: Ray is not there, does not answer or has too few GPUs.
        MissingError: There is no plan, or an alignment's source is not extracted.
        ModelError, Stopped, SystemExit: See `RayRun.work`.
    """
    connected(request.address)  # Ray sets handlers of signals of its own
    with stop_on_signals() as stop:
        for stage in stages:
            if stage == "train":
                click.echo("Ray does not train: `logitfuse train run`, or `submit train`")
                continue
            pending = getattr(find_pending(run), stage)
            left = {source: pending[source] for source in sources if pending[source]}
            if not left:
                click.echo(f"{stage}: nothing to do")
                continue
            on_ray = RayRun(run, stage, request)
            try:
                on_ray.work(left, stop)
            except on_ray.ray.exceptions.RayError as error:
                raise ConfigError(
                    "the Ray cluster failed",
                    where=request.address,
                    got=" ".join(str(error).split())[:300],
                    hint="what is finished is kept: run the same command again",
                ) from error
            shards = sum(map(len, left.values()))
            click.echo(f"{stage}: {shards:,} shards of {', '.join(left)} done")


class RayRun:
    """One stage of a run on a Ray cluster.

    Args:
        run: The run.
        stage: Which stage.
        request: What is asked of the cluster.
    """

    def __init__(self, run: RunConfig, stage: ArrayStage, request: RayRequest) -> None:
        self.ray = connected(request.address)
        self._run, self._stage, self._python = run, stage, request.python
        total = self.ray.cluster_resources()
        gpus = request.gpus
        if gpus is None:
            gpus = 1.0 if total.get("GPU", 0) >= 1 else 0.0
        if gpus > total.get("GPU", 0):
            raise ConfigError(
                "the Ray cluster has too few GPUs for one worker",
                where=f"--gpus-per-worker, {request.address}",
                expected=f"{gpus:g} or more in the cluster",
                got=f"{total.get('GPU', 0):g}",
                hint="start a node with GPUs, or give --gpus-per-worker 0",
            )
        nodes = sum(
            node["Alive"] and node["Resources"].get("CPU", 0) >= request.cpus
            for node in self.ray.nodes()
        )
        room = int(total.get("GPU", 0) // gpus) if gpus else nodes
        self._count = max(request.workers.get(stage, room), 1)
        self._options = {
            "num_gpus": gpus,
            "num_cpus": request.cpus,
            "max_concurrency": 2,
            "scheduling_strategy": "SPREAD",
        }

    def work(self, pending: Mapping[str, Sequence[int]], stop: StopFlag) -> None:
        """Do all pending shards.

        Args:
            pending: Indices of shards, by source.
            stop: Checked while waiting.

        Raises:
            ModelError: Workers are lost again and again.
            Stopped: Asked to stop; committed shards stay.
            SystemExit: A worker refused its input and said why; with its exit code.
        """
        left = {source: deque(shards) for source, shards in pending.items() if shards}
        total = sum(map(len, left.values()))
        if not total:
            return
        ray = self.ray
        here = ray.get_runtime_context().get_node_id()  # it lives as long as this driver
        strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(here, soft=False)
        remote = ray.remote(num_cpus=0, scheduling_strategy=strategy)(Shards)
        self._shards = remote.remote(left)
        marker = _marker(self._run)
        self._actors: dict[int, Any] = {}
        self._running: dict[Any, int] = {}
        losses, before = 0, self._committed(left)
        finished = before
        try:
            for index in range(min(self._count, total)):
                self._start(index, marker)
                self._assign(index)
            with Progress(f"{self._stage} on Ray", total, unit="shard") as progress:
                while self._running:
                    done, _ = ray.wait(list(self._running), timeout=1.0)
                    now = self._committed(left)
                    progress.add(now - finished, f"{len(self._running)} workers")
                    losses, finished = (0 if now > finished else losses), now
                    stop.progressed = finished > before
                    if stop.asked:
                        self._stop_all()
                        stop.check()
                    for reference in done:
                        losses += self._ended(reference, marker, losses)
        finally:
            for actor in self._actors.values():
                ray_kill(ray, actor)
            if marker is not None:
                marker.unlink(missing_ok=True)

    def _committed(self, sources: Mapping[str, Any]) -> int:
        urls = [getattr(self._run, f"{_URLS[self._stage]}")(source) for source in sources]
        return sum(len(listed_commits(open_location(url))) for url in urls)

    def _start(self, index: int, marker: Path | None) -> None:
        self._actors[index] = (
            self.ray.remote(RayWorker)
            .options(**self._options)
            .remote(
                self._shards,
                Worker(index, self._count),
                self._run.resolved(),
                os.getcwd(),
                self._python,
                None if marker is None else str(marker),
            )
        )

    def _assign(self, index: int) -> None:
        """Give a worker the next source with shards left; without one its resources are freed."""
        source = self.ray.get(self._shards.source_for.remote(index))
        if source is None:
            ray_kill(self.ray, self._actors.pop(index))
        else:
            self._running[self._actors[index].run.remote(self._stage, source)] = index

    def _ended(self, reference: Any, marker: Path | None, losses: int) -> int:
        """Go on after a worker's process or actor has ended; returns 1 if it was lost."""
        index = self._running.pop(reference)
        try:
            ended = Ended(*self.ray.get(reference))
        except self.ray.exceptions.RayActorError as error:
            ended = Ended(-signal.SIGKILL, " ".join(str(error).split())[:200], "a lost node")
            ray_kill(self.ray, self._actors[index])
            self._start(index, marker)
        if ended.code == 0:
            self._assign(index)
            return 0
        self.ray.get(self._shards.lost.remote(index))
        if ended.code > 0 and ended.code not in (Stopped.exit_code, StoppedMidway.exit_code):
            self._stop_all()
            print(f"{ended.error or f'exit code {ended.code}'} (on {ended.host})", file=sys.stderr)
            raise SystemExit(ended.code)
        print(f"worker {index} was lost on {ended.host}; its shards go to others", file=sys.stderr)
        if losses + 1 >= LOSSES:
            raise ModelError(
                f"{LOSSES} workers were lost and no shard was finished",
                where=self._run.folder,
                got=ended.error or signal.Signals(-ended.code).name,
                hint="memory running out is the usual cause; rerun to go on",
            )
        self._assign(index)
        return 1

    def _stop_all(self) -> None:
        """Stop the workers that have begun, and wait until they have ended."""
        begun = self.ray.get(self._shards.holders.remote())
        waited = [reference for reference, index in self._running.items() if index in begun]
        for reference in waited:
            self._actors[self._running[reference]].stop.remote()
        if waited:
            self.ray.wait(waited, num_returns=len(waited), timeout=STOP_S)


_URLS: dict[ArrayStage, str] = {"extract": "store_url", "align": "aligned_url"}


def connected(address: str) -> Any:
    """Ray, connected to a cluster.

    Raises:
        ConfigError: Ray is not installed, or does not answer.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "Ray is not installed", where="--ray", hint="pip install 'logitfuse[ray]'"
        ) from error
    if ray.is_initialized():
        return ray
    try:
        host, colon, port = address.removeprefix("ray://").rpartition(":")
        if colon:  # Ray itself tries for minutes
            socket.create_connection((host, int(port)), CONNECT_S).close()
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            "no Ray cluster answers",
            where=f"--ray {address}",
            got=" ".join(str(error).split())[:200],
            hint="start one with `ray start --head`, or give the address of its head node",
        ) from error
    return ray


def ray_kill(ray: Any, actor: Any) -> None:
    """End an actor that may be lost already."""
    with suppress(ray.exceptions.RayError):
        ray.kill(actor)


def _marker(run: RunConfig) -> Path | None:
    """A file in a local run folder, by which a node shows that it sees the same folder."""
    if open_location(run.folder).path is None:
        return None
    folder = logs_folder(run)
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix="ray-", dir=folder)
    os.close(handle)
    return Path(name).resolve()
