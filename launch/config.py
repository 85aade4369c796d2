"""The section `launch` of the run file: what to request from a cluster. It does not affect stores."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from launch.slurm.options import OptionValue, checked_options
from launch.stages import Scope, ShardedStage
from store_schema.config import SectionModel, StrictModel


class NodeOptions(StrictModel):
    """What runs before a command on a node, and how often Slurm starts it again."""

    setup: tuple[str, ...] = ()
    """Lines of shell before the command: module load, activate, export HF_HOME."""
    python: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Words that start Python on a node, such as [apptainer, exec, --nv, fuse.sif, python]. None
    takes the interpreter that ran `submit`, on Ray that of the node."""
    max_requeues: int = Field(default=50, ge=0)
    """A job that was restarted this many times does not requeue itself at its time limit."""


class LaunchSection(NodeOptions, SectionModel):
    """How `logitfuse submit` submits stages to Slurm; on Ray `workers` and `python` count."""

    runtime_fields: ClassVar[frozenset[str]] = frozenset(
        {"slurm", "workers", "processes_per_node", "setup", "python", "max_requeues"}
    )

    slurm: dict[Scope, dict[str, OptionValue]] = Field(default={})
    """Long options of sbatch by name, for `all` stages; those for `extract`, `align` or `train`
    override them. true is an option without a value; null removes one. Times need quotes."""
    workers: dict[ShardedStage, Annotated[int, Field(ge=1)]] = Field(default={})
    """Array tasks of a source, by stage. A stage that is not named has one, on Ray as many as there is
    room for."""
    processes_per_node: dict[Literal["train"], Annotated[int, Field(ge=1)]] = Field(default={})
    """Processes of a training on each node of its Slurm job, where that has no GPUs; with GPUs there is
    one for each."""

    @field_validator("slurm")
    @classmethod
    def _options(cls, slurm: dict[Scope, dict[str, OptionValue]]) -> dict[Scope, object]:
        return {scope: checked_options(options, scope) for scope, options in slurm.items()}
