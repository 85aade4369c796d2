"""The Slurm jobs of a study: data first, then trainings side by side, the page at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from pydantic import Field, field_validator

from launch.config import NodeOptions
from launch.slurm.options import OptionValue, checked_options, merged_options
from launch.slurm.script import ArrayLimits, Job, array_parts

Part = Literal["data", "train", "tuned", "show"]
PARTS: tuple[Part, ...] = get_args(Part)


class SubmitSection(NodeOptions):
    """What `logitfuse study submit` asks of Slurm."""

    slurm: dict[Literal["all", Part], dict[str, OptionValue]] = Field(default={})
    """Long options of sbatch by name, for `all` jobs; those for `data` (inputs and stores), `train`,
    `tuned` (rows that take another row's recipe) or `show` override them. true is an option without
    a value; null removes one. Times need quotes."""
    workers: int = Field(default=1, ge=1)
    """Tasks of the arrays that train."""

    @field_validator("slurm")
    @classmethod
    def _options(cls, slurm: dict[str, dict[str, OptionValue]]) -> dict[str, object]:
        return {part: checked_options(options, "all") for part, options in slurm.items()}


def study_jobs(
    section: SubmitSection,
    command_line: Mapping[str, OptionValue],
    limits: ArrayLimits,
    *,
    workers: int,
    tuned: bool,
    words: tuple[str, ...] = (),
) -> list[Job]:
    """The jobs, in an order in which each comes after those it waits for.

    Args:
        section: What the study file asks for.
        command_line: Options over it, for all jobs.
        limits: The cluster's limits of arrays.
        workers: Tasks of an array that trains.
        tuned: Whether rows are tuned as others, which these have to be trained for.
        words: Further words of each command.
    """
    jobs: list[Job] = []
    for part in PARTS:
        if part == "tuned" and not tuned:
            continue
        of_file = section.slurm.get("all", {}), section.slurm.get(part, {})
        options = merged_options(*of_file, command_line)
        after = tuple(job.stem for job in jobs if job.source == jobs[-1].source)
        if part in ("data", "show"):
            own = ("--data-only",) if part == "data" else ()
            jobs.append(Job("study", part, options, after=after, words=(*words, *own)))
            continue
        parts = array_parts(range(workers), limits)
        numbers = range(1, len(parts) + 1) if len(parts) > 1 else (0,)
        jobs += [
            Job("study", part, options, workers, array, number, after, words=words)
            for array, number in zip(parts, numbers, strict=True)
        ]
    return jobs
