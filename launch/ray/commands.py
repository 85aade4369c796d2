"""Commands as Ray tasks: each in a process of its own, and once more where its worker is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TextIO, cast

import click

from launch.ray.cluster import (
    IMPORT_ERROR,
    Resources,
    RoomWatch,
    alive_nodes,
    gpus_of_worker,
    node_room,
)
from launch.ray.workers import ProcessEnd, forwarded, open_pipe, require_folder, start_process
from launch.signals import StopFlag
from store_schema.errors import LogitfuseError, ModelError, Stopped, StoppedMidway

LOSSES = 5
"""Losses of one command after which all end."""
WAIT_S = 1.0
"""How often it is looked whether a stop was asked for."""
STOP_S = 120.0
"""How long commands may take to stop when asked to."""


@dataclass(frozen=True, slots=True)
class Command:
    """One command of this program.

    Args:
        title: For messages.
        words: After `logitfuse`.
    """

    title: str
    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CommandSpec:
    """What all commands are told.

    Args:
        directory: The driver's working directory; used where a node has it.
        python: Words that start Python; None for the interpreter of the task.
        probe_file: A file that a node must see; None for none.
    """

    directory: str
    python: tuple[str, ...] | None
    probe_file: str | None


@dataclass(frozen=True, slots=True)
class NodeShare:
    """What each command takes of a node.

    Args:
        gpus: GPUs. None: 1 if the cluster has any, else 0.
        cpus: CPUs.
        node_timeout_s: How long to wait for the first node that has room for one.
        at_a_time: Commands at a time; None takes as many as there is room for.
    """

    gpus: float | None = None
    cpus: float = 1.0
    node_timeout_s: float = 0.0
    at_a_time: int | None = None


def run_words(spec: CommandSpec, words: Sequence[str]) -> ProcessEnd:
    """Run a command on this node; it stops when this task is cancelled or its process dies.

    Args:
        spec: What all commands are told.
        words: After `logitfuse`.
    """
    host = os.uname().nodename
    stop_end, stop = open_pipe()  # closes when this process dies
    with stop:
        python = spec.python or (sys.executable,)
        program = [*python, "-P", "-m", "logitfuse", *words, "--stop-fd", str(stop_end.fileno())]
        try:
            require_folder(spec.probe_file, host)
            process = start_process(program, (stop_end,), spec.directory)
        except LogitfuseError as error:
            stop_end.close()
            return ProcessEnd(error.exit_code, f"error: {error.line()}", host)
        with ThreadPoolExecutor(1) as reader:
            try:  # also around the start of the thread, which is waited for at the end
                message = reader.submit(forwarded, cast("TextIO", process.stderr))
                code = _waited(process)
            except BaseException:  # Ray cancels a task by a KeyboardInterrupt
                process.send_signal(signal.SIGTERM)
                process.wait(STOP_S)
                raise
            return ProcessEnd(code, message.result(), host)


def _waited(process: subprocess.Popen[str]) -> int:
    """Its exit code; not in one call, which Ray's KeyboardInterrupt would not end."""
    while True:
        try:
            return process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            continue


class CommandDriver:
    """Commands on a Ray cluster.

    Args:
        ray: The module ray, connected.
        share: What each command takes.
        spec: What all of them are told.
        stop: Checked while waiting.
    """

    def __init__(self, ray: Any, share: NodeShare, spec: CommandSpec, stop: StopFlag) -> None:
        self._ray, self._spec, self._stop, self._share = ray, spec, stop, share
        gpus = gpus_of_worker(ray, share.gpus)
        self._resources: Resources = {"CPU": share.cpus, "GPU": gpus}
        self._watch = RoomWatch(ray, self._resources, share.node_timeout_s)
        self._remote = ray.remote(
            num_cpus=share.cpus, num_gpus=gpus, max_retries=0, scheduling_strategy="SPREAD"
        )(run_words)
        self._running: dict[Any, Command] = {}

    def run(self, commands: Sequence[Command], ended: Callable[[Command], None]) -> None:
        """Run commands, as many at a time as there is room for, and wait for all of them.

        Args:
            commands: In the order in which they begin.
            ended: Called after each that has ended well.

        Raises:
            ConfigError: No node has room for a command.
            ModelError: One was lost again and again, or has failed without an error line.
            Stopped: Asked to stop.
            SystemExit: One has failed and said why; with its exit code.
        """
        waiting = list(reversed(commands))
        most = self._share.at_a_time or len(waiting)
        losses: dict[Command, int] = {}
        try:
            while waiting or self._running:
                while waiting and len(self._running) < most:
                    command = waiting.pop()
                    self._running[self._remote.remote(self._spec, command.words)] = command
                self._watch.require(self._room)
                done, _ = self._ray.wait(list(self._running), timeout=WAIT_S)
                self._stop.check()
                for reference in done:
                    command = self._running.pop(reference)
                    reason = self._lost(reference)
                    if reason is None:
                        self._stop.progressed = True
                        ended(command)
                        continue
                    click.echo(f"{command.title} was lost and begins again: {reason}", err=True)
                    losses[command] = losses.get(command, 0) + 1
                    if losses[command] >= LOSSES:
                        raise ModelError(
                            f"{command.title} was lost {LOSSES} times",
                            where="--ray",
                            got=reason,
                            hint="memory running out is the usual cause; rerun to go on",
                        )
                    waiting.append(command)
        finally:
            self._cancel()

    def _room(self) -> int:
        return sum(node_room(node, self._resources) for node in alive_nodes(self._ray))

    def _lost(self, reference: Any) -> str | None:
        """Why a command that is over has not ended by itself; None where it has ended well.

        Raises:
            SystemExit, ModelError: It has failed.
            RayError: It could not be run at all.
        """
        ray = self._ray
        try:
            end: ProcessEnd = ray.get(reference)
        except ray.exceptions.RayError as error:
            if isinstance(error, ray.exceptions.RayTaskError) or IMPORT_ERROR.search(str(error)):
                raise
            return " ".join(str(error).split())[:200]
        if end.code == 0:
            return None
        if end.code < 0:
            return f"{signal.Signals(-end.code).name} on {end.host}"
        if end.code in (Stopped.exit_code, StoppedMidway.exit_code):
            return f"{end.message} on {end.host}"
        if end.message.startswith("error: "):
            click.echo(f"{end.message} (on {end.host})", err=True)
            raise SystemExit(end.code)
        raise ModelError(
            "a command failed",
            where=end.host,
            got=end.message or f"exit code {end.code}",
            hint="`ray logs` shows all that it wrote",
        )

    def _cancel(self) -> None:
        """Stop what runs, and wait until it has ended."""
        waited = list(self._running)
        for reference in waited:
            self._ray.cancel(reference)
        if waited:
            self._ray.wait(waited, num_returns=len(waited), timeout=STOP_S)
        self._running.clear()
