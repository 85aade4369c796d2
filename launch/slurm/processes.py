"""How many processes a training job has on how many nodes, and what Slurm options do not allow them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from launch.slurm.options import gpu_counts
from store_schema.config import RunConfig
from store_schema.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Processes:
    """Processes of one training: `per_node` on each of `nodes`."""

    nodes: int = 1
    per_node: int = 1

    @property
    def count(self) -> int:
        """All of them."""
        return self.nodes * self.per_node


def training_processes(options: Mapping[str, str], per_node: int | None = None) -> Processes:
    """The processes of a training job: one for each GPU, without GPUs `per_node` on each node.

    Args:
        options: sbatch's options, values by long name.
        per_node: `launch.processes_per_node`; None for as many as there are GPUs, at least one.

    Raises:
        ConfigError: Options that contradict each other, or GPUs that Slurm may share unevenly.
    """
    nodes = int(options.get("nodes", "1"))
    counts = gpu_counts(options)
    if nodes > 1 and "gpus" in counts:
        raise _conflict(
            f"gpus={options['gpus']} with nodes={nodes}",
            "gpus-per-node: gpus counts those of all nodes together, which may get different shares",
            "--slurm train:gpus=,gpus-per-node=N",
        )
    if nodes > 1 and "ntasks" in options:
        raise _conflict(
            f"ntasks={options['ntasks']} with nodes={nodes}",
            "no ntasks: there is one task on each node",
            "--slurm train:ntasks= removes it",
        )
    if len(set(counts.values())) > 1:
        given = ", ".join(f"{name}={options[name]}" for name in counts)
        first = next(iter(counts))
        raise _conflict(given, "one number of GPUs", f"--slurm train:{first}= removes one")
    gpus = next(iter(counts.values()), 0)
    if gpus and per_node not in (None, gpus):
        raise _conflict(
            f"processes_per_node.train {per_node} with {gpus} GPUs on a node",
            "a process for each GPU",
            "leave out launch.processes_per_node.train",
        )
    return Processes(nodes, per_node or max(gpus, 1))


def require_segments(run: RunConfig, processes: Processes) -> None:
    """Refuse more processes than there are segments in a step: each needs one.

    Raises:
        ConfigError: The message names both.
    """
    segments = getattr(run.sections.get("train"), "batch_segments", None)
    if segments is not None and segments < processes.count:
        raise ConfigError(
            "more processes than segments in a step",
            where="train.batch_segments",
            expected=f"at least {processes.count} ({processes.nodes} nodes of {processes.per_node} "
            "processes)",
            got=segments,
            hint="raise it, or take fewer nodes or GPUs (--slurm train:...)",
        )


def _conflict(got: str, expected: str, hint: str) -> ConfigError:
    return ConfigError(
        "options of the training job conflict",
        where="launch.slurm and --slurm",
        expected=expected,
        got=got,
        hint=hint,
    )
