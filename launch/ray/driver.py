"""`logitfuse submit STAGE RUN --ray ADDRESS`: the driver, which starts workers and gives them sources.

Workers or nodes that are lost lose what they were working on, and so does a driver that is killed: the
same command goes on.
"""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import click

from launch.pending import find_pending
from launch.progress import Progress
from launch.ray.cluster import (
    IMPORT_ERROR,
    Resources,
    RoomWatch,
    alive_nodes,
    connect,
    failure,
    gpus_of_worker,
    node_room,
    probe_file,
)
from launch.ray.workers import PendingShards, ProcessEnd, WorkerActor, WorkerSpec
from launch.signals import StopFlag, stop_on_signals
from launch.stages import ShardedStage, Stage
from launch.work import Worker
from store_schema.config import RunConfig
from store_schema.disk.location import open_location
from store_schema.errors import (
    ConfigError,
    ModelError,
    Stopped,
    StoppedMidway,
    StorageError,
)
from store_schema.store.reader import listed_commits

LOSSES_PER_WORKER = 5
"""Times the number of workers: losses, one after the other without a commit, that end a run."""
STOP_S = 120.0
"""How long workers may take to stop when asked to."""
WAIT_S = 1.0
"""How often the driver looks whether it was asked to stop,"""
COUNT_S = 5.0
"""and how often it counts commits."""


@dataclass(frozen=True, slots=True)
class RayRequest:
    """What is asked of a Ray cluster.

    Args:
        address: "auto", or host:port of the head node.
        workers: By stage, so many; as many as the cluster has room for where a stage is not named.
        python: Words that start Python on a node; None for the one that Ray runs there.
        gpus: GPUs of each worker of an extraction. None: 1 if the cluster has any, else 0.
        cpus: CPUs of each worker.
        node_timeout_s: How long to wait for the first node that has room for a worker.
    """

    address: str
    workers: Mapping[ShardedStage, int]
    python: tuple[str, ...] | None = None
    gpus: float | None = None
    cpus: float = 1.0
    node_timeout_s: float = 0.0


def run_on_ray(
    run: RunConfig, stages: Sequence[Stage], sources: Sequence[str], request: RayRequest
) -> None:
    """Do what is left of extraction and alignment, and wait for it.

    Args:
        run: The run.
        stages: Consecutive stages; training is left out.
        sources: Which sources.
        request: What is asked of the cluster.

    Raises:
        ConfigError: Ray is not there, does not answer, fails, or has no node for a worker.
        MissingError: There is no plan, or an alignment's source is not extracted.
        ModelError: Workers are lost again and again.
        StorageError: Workers wrote where this process does not see it.
        Stopped: Asked to stop; committed shards stay.
        SystemExit: A worker refused its input and said why; with its exit code.
    """
    if stages[0] == "train":
        raise ConfigError(
            "Ray is used for extraction and alignment only",
            where="--ray",
            got="submit train",
            hint="give `logitfuse train run` on the machine that trains, or submit it to Slurm",
        )
    find_pending(run).require_extracted(stages, sources)
    ray = connect(request.address)  # sets signal handlers of its own
    with stop_on_signals() as stop:
        for stage in stages:
            if stage == "train":
                click.echo("next: `logitfuse train run` (training is not submitted to Ray)")
                continue
            left = _pending(run, stage, sources)
            num_shards = sum(map(len, left.values()))
            if not num_shards:
                click.echo(f"{stage}: nothing to do")
                continue
            try:
                StageDriver(ray, run, stage, request, left, stop).work()
            except ray.exceptions.RayError as error:
                raise failure(error, request.address) from error
            missing = sum(map(len, _pending(run, stage, sources).values()))
            if missing:
                raise StorageError(
                    "workers have ended, but not all of their commits are there",
                    where=run.folder,
                    expected=f"{num_shards:,} new ones",
                    got=f"{num_shards - missing:,}",
                    hint="use a file system that all nodes share, or run_dir: s3://...",
                )
            click.echo(f"{stage}: {num_shards:,} shards of {', '.join(left)} done")


def _pending(run: RunConfig, stage: ShardedStage, sources: Sequence[str]) -> dict[str, list[int]]:
    """Pending shards of those sources that have any."""
    pending: Mapping[str, Sequence[int]] = getattr(find_pending(run), stage)
    return {source: list(pending[source]) for source in sources if pending[source]}


class StageDriver:
    """One stage of a run on a Ray cluster.

    Args:
        ray: The module ray, connected.
        run: The run.
        stage: Which stage.
        request: What is asked of the cluster.
        pending: Indices of the shards to do, at least one, by source.
        stop: Checked while waiting.
    """

    def __init__(
        self,
        ray: Any,
        run: RunConfig,
        stage: ShardedStage,
        request: RayRequest,
        pending: Mapping[str, Sequence[int]],
        stop: StopFlag,
    ) -> None:
        self._ray, self._run, self._stage, self._request = ray, run, stage, request
        self._pending, self._stop = pending, stop
        self._resources = self._worker_resources()
        self._total = sum(map(len, pending.values()))
        self._count = min(request.workers.get(stage, max(self._room(), 1)), self._total)
        self._before = self._finished = self._num_commits()
        self._queue = self._start_queue()
        self._actors: dict[int, Any] = {}
        self._running: dict[Any, int] = {}
        self._losses = 0
        self._watch = RoomWatch(ray, self._resources, request.node_timeout_s)

    def work(self) -> None:
        """Do all pending shards.

        Raises:
            ConfigError: No node has room for a worker.
            ModelError, Stopped, SystemExit: See `run_on_ray`.
        """
        folder = self._run.data_folder if self._stage == "extract" else self._run.folder
        try:
            with (
                probe_file(folder) as probe,
                Progress(f"{self._stage} on Ray", self._total, unit="shard") as progress,
            ):
                self._spec = WorkerSpec(
                    stage=self._stage,
                    run_text=self._run.resolved(),
                    directory=os.getcwd(),
                    python=self._request.python,
                    gpus=self._resources["GPU"],
                    probe_file=probe,
                )
                for index in range(self._count):
                    self._start(index)
                    self._assign(index)
                self._wait(progress)
        finally:
            for actor in (*self._actors.values(), self._queue):
                self._kill(actor)

    def _worker_resources(self) -> Resources:
        gpus = 0.0 if self._stage == "align" else gpus_of_worker(self._ray, self._request.gpus)
        return {"CPU": self._request.cpus, "GPU": gpus}

    def _room(self) -> int:
        """Workers that the cluster has room for: extraction without GPUs takes one a node."""
        rooms = [node_room(node, self._resources) for node in alive_nodes(self._ray)]
        if self._stage == "extract" and not self._resources["GPU"]:
            rooms = [min(room, 1) for room in rooms]
        return sum(rooms)

    def _start_queue(self) -> Any:
        """The actor `PendingShards`, on this node, so that it lives as long as this driver."""
        ray = self._ray
        here = ray.get_runtime_context().get_node_id()
        strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(here, soft=False)
        remote = ray.remote(num_cpus=0, scheduling_strategy=strategy)(PendingShards)
        return remote.remote({source: deque(shards) for source, shards in self._pending.items()})

    def _start(self, index: int) -> None:
        remote = self._ray.remote(
            num_cpus=self._resources["CPU"],
            num_gpus=self._resources["GPU"],
            max_concurrency=2,  # `stop` beside `run`
            scheduling_strategy="SPREAD",
        )(WorkerActor)
        self._actors[index] = remote.remote(self._queue, Worker(index, self._count), self._spec)

    def _assign(self, index: int) -> None:
        """Give a worker the next source with pending shards; without one its resources are freed."""
        source = self._ray.get(self._queue.next_source.remote(index))
        if source is None:
            self._kill(self._actors.pop(index))
        else:
            self._running[self._actors[index].run.remote(source)] = index

    def _wait(self, progress: Progress) -> None:
        """Until all shards are done, give workers that end the next source, and replace lost ones."""
        counted = time.monotonic()
        while self._running:
            self._watch.require(self._room)
            ended, _ = self._ray.wait(list(self._running), timeout=WAIT_S)
            if ended or time.monotonic() - counted >= COUNT_S:
                counted = time.monotonic()
                self._count_commits(progress)
            if self._stop.asked:
                self._stop_workers()
                self._count_commits(progress)
                self._stop.check()
            for reference in ended:
                self._end(reference)

    def _num_commits(self) -> int:
        url = self._run.store_url if self._stage == "extract" else self._run.aligned_url
        return sum(len(listed_commits(open_location(url(source)))) for source in self._pending)

    def _count_commits(self, progress: Progress) -> None:
        finished = self._num_commits()
        if finished > self._finished:
            self._losses = 0
        self._stop.progressed |= finished > self._before
        progress.add(finished - self._finished, f"{len(self._running)} workers")
        self._finished = finished

    def _end(self, reference: Any) -> None:
        """Go on after a worker has ended: with the next source, or with what it had not finished."""
        ray, index = self._ray, self._running.pop(reference)
        try:
            end: ProcessEnd = ray.get(reference)
        except ray.exceptions.RayError as error:
            if isinstance(error, ray.exceptions.RayTaskError) or IMPORT_ERROR.search(str(error)):
                raise
            # Its actor is gone, or the node.
            reason = " ".join(str(error).split())[:200]
            self._kill(self._actors[index])
            self._start(index)
        else:
            if end.code == 0:
                self._assign(index)
                return
            if end.code > 0 and end.code not in (Stopped.exit_code, StoppedMidway.exit_code):
                self._refuse(end)
            name = signal.Signals(-end.code).name if end.code < 0 else end.message
            reason = f"{name} on {end.host}"
        ray.get(self._queue.requeue.remote(index))
        click.echo(f"worker {index} was lost, its shards go to others: {reason}", err=True)
        self._losses += 1
        if self._losses >= LOSSES_PER_WORKER * self._count:
            raise ModelError(
                f"{self._losses} workers were lost and no shard was finished",
                where=self._run.folder,
                got=reason,
                hint="memory running out is the usual cause; rerun to go on",
            )
        self._assign(index)

    def _refuse(self, end: ProcessEnd) -> None:
        """Stop all workers after one of them has failed, and end with its error.

        Raises:
            SystemExit: It has said why in one line; with its exit code.
            ModelError: It has not.
        """
        self._stop_workers()
        if end.message.startswith("error: "):
            click.echo(f"{end.message} (on {end.host})", err=True)
            raise SystemExit(end.code)
        raise ModelError(
            "a worker failed",
            where=end.host,
            got=end.message or f"exit code {end.code}",
            hint="`ray logs` shows all that it wrote",
        )

    def _stop_workers(self) -> None:
        """Stop the workers that have begun, and wait until they have ended."""
        begun = self._ray.get(self._queue.leaseholders.remote())
        waited = [reference for reference, index in self._running.items() if index in begun]
        for reference in waited:
            self._actors[self._running[reference]].stop.remote()
        if waited:
            self._ray.wait(waited, num_returns=len(waited), timeout=STOP_S)

    def _kill(self, actor: Any) -> None:
        with suppress(self._ray.exceptions.RayError):  # it is lost already
            self._ray.kill(actor)
